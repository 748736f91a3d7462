"""The adapters of a loaded model, and which weights its networks have at the moment.

A request carries a `Selection`. What of it the text encoders and the U-Net's conditioning read is merged into those
weights when the request is prepared: no step reads them, so each request may have its own, whatever else runs. What
every step reads runs one of two ways:

    merged    into the weights too, while all runs under way want the same
    beside    the weights, each row of a batch its own (pages.py), from when one comes that wants something else, until
              none is left and the same set comes twice running. All has to be of low rank, and fit the pages of a GPU.

A run for which neither is possible, and one that has to be bitwise as alone, waits until those under way are done; no
later one passes it. A bundle that takes adapters has them in the inputs of its networks (places.py), always beside.

The list of adapters may be changed by any thread; the weights are the worker's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastldm.adapters.packing import Packed, PackedParameters
from fastldm.adapters.read import Adapter
from fastldm.adapters.selection import Parameter, Part, Selected, Selection, Weight, scaled
from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.models.config import UNetConfig
from fastldm.models.families import TEXT_ENCODERS
from fastldm.models.unet import UNet
from fastldm.runtime.denoise import Run
from fastldm.runtime.merge import Merged
from fastldm.runtime.pages import Pages
from fastldm.runtime.places import Places

MAX_ADAPTERS = 1000
_SELECTIONS = 64  # that are remembered: finding what one changes takes longer than a small step
_ONCE: tuple[Part, ...] = ("text", "conditions")


class Adapted:
    """What a model's adapters are, and what is merged into its weights."""

    def __init__(
        self,
        networks: Mapping[str, Any],
        config: UNetConfig,
        update: Callable[[], Any],
        *,
        shared: bool,
        packed: Mapping[str, Packed] | None = None,
    ) -> None:
        """networks: by component's name. update: brings up to date what is derived from weights. shared: whether others
        read the same weights, which are put back whenever no request needs them changed. packed: of a bundle that takes
        adapters, where its networks read their factors."""
        self._networks, self._config, self._update, self._shared = networks, config, update, shared
        self._lock = threading.Lock()
        self._loaded: dict[str, Adapter] = {}
        self._weights: dict[str, Weight] = {}
        self._fused: tuple[Selected, ...] = ()
        self._enabled = True
        self._selections: dict[Any, Selection] = {}
        self.merged: dict[Part, Merged | PackedParameters] = {}
        self.pages: Pages | Places | None = None
        if packed:
            self.pages = Places(packed)
            text = {name: own for name, own in packed.items() if name in TEXT_ENCODERS}
            self.merged["text"] = PackedParameters(text)
            self.merged["conditions"] = PackedParameters({name: packed[name] for name in ("text_kv", "time_rows")})
        else:
            self.merged |= {part: Merged(self._read) for part in (*_ONCE, "step")}
            self.pages = Pages(networks["unet"]) if isinstance(networks["unet"], UNet) else None
        self._step: frozenset[Selected] = frozenset()  # what the last run wanted; merged, all under way
        self._beside = bool(packed)  # whether adapters are beside the weights
        self._under_way: weakref.WeakSet[Run] = weakref.WeakSet()
        self._next: weakref.ref[Run] | None = None  # a run that waits for the weights
        self.swaps = 0
        """How often weights were written."""

    @property
    def places(self) -> Places | None:
        """Of a bundle that takes adapters."""
        return self.pages if isinstance(self.pages, Places) else None

    # --- the list

    @property
    def loaded(self) -> dict[str, Adapter]:
        """By name, in the order of loading."""
        with self._lock:
            return dict(self._loaded)

    @property
    def active(self) -> dict[str, Weight]:
        """What requests have that do not say: names and weights; nothing while disabled."""
        with self._lock:
            return dict(self._weights) if self._enabled else {}

    @property
    def fused(self) -> tuple[str, ...]:
        """The names of those that are a part of the model."""
        return tuple(one.name for one in self._fused)

    def check_free(self, name: str | None) -> None:
        """InputError for a name that is taken."""
        with self._lock:
            self._check_free(name)

    def _check_free(self, name: str | None) -> None:
        if name in self._loaded:
            raise InputError(f"adapter {show(name)} is loaded: give another adapter_name, or delete_adapters it first")

    def add(self, name: str | None, adapter: Adapter) -> str:
        """Add an adapter, active with weight 1 if no other is. name: None is "default_0" and so on. Returns the name.
        InputError for a name that is taken, and for what a bundle does not take."""
        if self.places is not None:
            self.places.check_adapter(adapter)
        with self._lock:
            self._check_free(name)
            if len(self._loaded) >= MAX_ADAPTERS:
                raise InputError(f"{len(self._loaded)} adapters are loaded, the most there may be: delete some")
            if name is None:
                name = next(free for k in range(MAX_ADAPTERS) if (free := f"default_{k}") not in self._loaded)
            self._loaded[name] = adapter
            if not self._weights:
                self._weights = {name: 1.0}
        return name

    def remove(self, names: Sequence[str] | None = None) -> None:
        """Remove some adapters, or all. Requests that were submitted with them, and the model if they are fused, keep
        them. InputError for an unknown name, and none is removed."""
        with self._lock:
            names = list(self._loaded) if names is None else names
            self._check(names)
            for name in names:
                self._loaded.pop(name, None)
                self._weights.pop(name, None)
            self._selections.clear()

    def activate(self, weights: Mapping[str, Weight]) -> None:
        """Make these active, and no others. InputError for an unknown name, or a weight that does not fit."""
        with self._lock:
            self._select(weights)
            self._weights = dict(weights)

    def enable(self, enabled: bool) -> None:
        """Whether the active ones count."""
        with self._lock:
            self._enabled = enabled

    def fuse(self, names: Sequence[str] | None, scale: float, components: Sequence[str]) -> None:
        """Make adapters, by default the active ones, a part of some components of the model: with their weights times
        `scale`, and no longer active."""
        with self._lock:
            active = self._weights if self._enabled else {}
            names = list(active) if names is None else list(names)
            self._check(names)
            if not names:
                raise InputError("no adapter is active: load one, or give adapter_names")
            for name in names:
                if name in self.fused:
                    raise InputError(f"adapter {show(name)} is fused already: unfuse_lora first")
            fused = self._select({name: scaled(active.get(name, 1.0), scale) for name in names})
            self._fused += tuple(one.within(components) for one in fused)
            self._weights = {name: weight for name, weight in self._weights.items() if name not in names}

    def unfuse(self) -> None:
        """Take them out again; they are loaded and not active."""
        with self._lock:
            self._fused = ()

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._loaded:
                loaded = ", ".join(map(repr, self._loaded)) or "none"
                raise InputError(f"there is no adapter {show(name)}: loaded are {loaded}")

    def _select(self, weights: Mapping[str, Weight]) -> list[Selected]:
        self._check(list(weights))
        return [Selected.of(name, self._loaded[name], weight, self._config) for name, weight in weights.items()]

    def select(self, weights: Mapping[str, Weight] | None, factor: float = 1.0) -> Selection:
        """The adapters of a request: None for the active ones. factor: multiplies all weights.

        InputError for names that are not loaded, and weights that name what the model does not have.
        """
        with self._lock:
            if isinstance(weights, Selection):
                for one in weights.selected:
                    if self._loaded.get(one.name) is not one.adapter:
                        raise InputError(f"adapter {show(one.name)} of this request is not loaded any more")
                selected = list(weights.selected)
            else:
                active = self._weights if self._enabled else {}
                weights = active if weights is None else weights
                selected = self._select({name: scaled(weight, factor) for name, weight in weights.items()})
            key = (*((one.name, one) for one in selected), self._fused)
            if key not in self._selections:
                if len(self._selections) >= _SELECTIONS:
                    self._selections.clear()
                self._selections[key] = Selection(selected, self._fused)
            return self._selections[key]

    # --- the weights

    def _read(self, parameter: Parameter) -> Tensor:
        return self._networks[parameter.component].get_parameter(f"{parameter.module}.{parameter.leaf}").data

    def _switch(self, part: Part, selection: Selection | None) -> None:
        if self.merged[part].switch({} if selection is None else selection.by_part[part]):
            self.swaps += 1
            self._update()
        if not self._loaded and not self._fused:
            self.merged[part].trim()
            if self.pages is not None and not self._under_way:
                self.pages.trim()

    @contextmanager
    def conditioned(self, selection: Selection) -> Iterator[None]:
        """Inside, the text encoders and the U-Net's conditioning have a selection's weights."""
        try:
            for part in _ONCE:
                self._switch(part, selection)
            yield
        finally:
            for part in _ONCE if self._shared else ():
                self._switch(part, None)

    def admits(self, run: Run) -> bool:
        """Whether a run may take its steps now: with those that are under way, and with none waiting that was there
        before it."""
        waiting = None if self._next is None else self._next()
        if waiting is not None and waiting is not run:
            return False
        return not self._under_way or self._shares(run) or self._can_mix(run)

    def check(self, selection: Selection, *, batch_invariant: bool = False) -> None:
        """InputError for what can never run: more than a bundle takes, and intervals of adapters that cannot be beside
        the weights."""
        if self.places is not None:
            self.places.check(selection)
        if self.places is not None or not selection.in_intervals:
            return
        if batch_invariant or self.pages is None:
            reason = "images have to be bitwise as alone" if batch_invariant else "this is a bundle"
            raise InputError(f"an adapter has an interval of the steps, and {reason}: give it one weight for all steps")
        if not selection.of_low_rank or not self.pages.fits([selection]):
            raise InputError(
                "an adapter has an interval of the steps, and not all adapters of this request can be beside the "
                "weights (LoRA without a bias, on a GPU of a rank of at most 128): give it one weight for all steps"
            )

    def _shares(self, run: Run) -> bool:
        """Whether the weights are merged to what a run wants."""
        return not self._beside and self._step == run.adapters.step and not run.adapters.in_intervals

    def _can_mix(self, run: Run) -> bool:
        runs = [*self._under_way, run]
        if self.pages is None:
            return False
        if any(each.images for each in runs):  # taken apart, to be as if alone: a bundle has the same places then
            same = all(each.adapters.step == run.adapters.step and each.images for each in runs)
            return self.places is not None and same
        adapters = [each.adapters for each in runs]
        if any(each.fused != run.adapters.fused or not each.of_low_rank for each in adapters):
            return False
        return self.pages.fits(adapters)

    def enter(self, run: Run) -> bool:
        """Begin a run's steps, with its weights in place; False where it has to wait, and is the next."""
        if not self.admits(run):
            if self._next is None or self._next() is None:
                self._next = weakref.ref(run)
            return False
        # After a mix the next is likely to be one too: only a set that comes twice running is merged again.
        likely = self._beside and self._step != run.adapters.step and self._can_mix(run)
        merges = self.places is None and not likely and not run.adapters.in_intervals
        if not self._under_way and merges:
            self._switch("step", run.adapters)
            self._beside = False
        elif not self._shares(run):
            self._mix(run)
        self._step = run.adapters.step
        self._under_way.add(run)
        self._next = None
        return True

    def _mix(self, run: Run) -> None:
        """Put the adapters of a run, and of those under way, beside the weights."""
        assert self.pages is not None
        runs = [*self._under_way, run]
        adapters = [each.adapters for each in runs]
        if run.images and len(runs) == 1:
            self.pages.trim()  # so that its adapters get the places that they get alone
        applied = [self.pages.apply(each, adapters) for each in adapters]  # may fail: nothing has changed so far
        if not self._beside:
            self._switch("step", Selection((), run.adapters.fused))
        self._beside = True
        for each, pages in zip(runs, applied, strict=True):
            for own in (each, *each.images):
                own.applied = pages

    def leave(self, run: Run) -> None:
        """A run takes no more steps."""
        self._under_way.discard(run)
        if self._shared and not self._under_way:
            self._switch("step", None)
            self._beside = False

    @contextmanager
    def applied(self, selection: Selection) -> Iterator[None]:
        """Inside, all weights are those of a selection: for what reads them all, such as an export. InputError while
        requests with others are under way."""
        if self._under_way and (self._beside or self._step != selection.step):
            raise InputError("requests with other adapters are under way: wait for them, or cancel them")
        try:
            with self.conditioned(selection):
                self._switch("step", selection)
                self._beside, self._step = False, selection.step
                yield
        finally:
            if self._shared and not self._under_way:
                self._switch("step", None)

    def renewed(self, names: Sequence[str]) -> None:
        """Parameters were given other values by their owner, which are their originals from now on."""
        for merged in self.merged.values():
            for parameter in merged.parameters:
                if str(parameter) in names:
                    merged.forget(parameter)

    @property
    def layers_added(self) -> int:
        """How often a layer was given pages on a GPU, where captured steps do not read them."""
        return 0 if self.pages is None else self.pages.layers_added

    def missing(self, selection: Selection) -> int:
        """Bytes of the weights that have to be copied before a selection is merged into them."""
        if self.places is not None:
            return 0
        missing = [parameter for parameter in selection.deltas if not self.merged[parameter.part].has_copy(parameter)]
        return sum(self._read(parameter).nbytes for parameter in missing)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies of weights that adapters were merged into, and of pages or places."""
        return sum(merged.nbytes for merged in self.merged.values()) + (self.pages.nbytes if self.pages else 0)
