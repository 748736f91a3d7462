"""Step callbacks as diffusers' pipelines call them: the tensors they get, what they may change, the pipeline they see.

    def callback(pipe, step, timestep, tensors):            # tensors: those of callback_on_step_end_tensor_inputs
        pipe._guidance_scale = 3.0                           # from the next step on
        pipe._interrupt = step == 10                         # skip the remaining steps
        return {"latents": tensors["latents"] * 0.99}

A callback runs in its caller's thread, while its request waits. Several calls of one pipeline may be under way at once:
what a callback sets is its own call's.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastldm import checks
from fastldm.errors import InputError
from fastldm.request import MAX_GUIDANCE
from fastldm.runtime.denoise import Embeds
from fastldm.runtime.stages import Change
from fastldm.samplers.names import is_cfg_pp

if TYPE_CHECKING:
    from fastldm.request import Request
    from fastldm.serving.generation import Generation, Progress

StepCallback = Callable[[Any, int, float, "dict[str, Any]"], "Mapping[str, Any] | None"]

LATENTS, NEGATIVE = "latents", "negative_prompt_embeds"


def tensor_names(callback: Any, names: Any, xl: bool) -> tuple[str, ...]:
    """The tensors that a callback gets. Its own `tensor_inputs`, which diffusers' callbacks have, take precedence over
    `names`. Raises InputError for what is not a callback, and for a tensor that does not exist."""
    if not callable(callback):
        raise InputError(f"callback_on_step_end is {checks.show(callback)}: expected a function")
    names = getattr(callback, "tensor_inputs", names)
    listed = checks.listed("callback_on_step_end_tensor_inputs", names, 100, "names of tensors")
    expected = _names(xl)
    for name in listed:
        if not isinstance(name, str) or name not in expected:
            raise InputError(
                f"callback_on_step_end_tensor_inputs holds {checks.show(name)}: expected some of {', '.join(expected)}"
            )
    return tuple(listed)


def _names(xl: bool) -> tuple[str, ...]:
    return (LATENTS, *(Embeds._fields if xl else Embeds._fields[:1]), NEGATIVE)


class CallState:
    """What diffusers keeps in a pipeline during a call, and callbacks read and set: here one for each call."""

    def __init__(self, generation: Generation, embedded_guidance: bool) -> None:
        """embedded_guidance: whether the model reads the scale itself, and never has negatives."""
        request: Request = generation.request
        self.generation, self.embedded_guidance = generation, embedded_guidance
        self.guidance_scale = float(request.guidance_scale or 0)
        self.image_guidance_scale = request.image_guidance_scale
        self.pag_scale, self.pag_adaptive_scale = float(request.pag_scale or 0), request.pag_adaptive_scale
        self.guidance_rescale, self.clip_skip = request.guidance_rescale, request.clip_skip
        self._cfg_pp, self._original = is_cfg_pp(request.sampler), request.use_original_formulation
        self.num_timesteps = 0
        self.interrupt = False

    @property
    def do_perturbed_attention_guidance(self) -> bool:
        return self.pag_scale > 0

    @property
    def do_classifier_free_guidance(self) -> bool:
        guides = self.guidance_scale > (0 if self._original else 1) or self._cfg_pp
        guided = guides and not self.embedded_guidance
        return guided and (self.image_guidance_scale is None or self.image_guidance_scale >= 1)

    def call(self, pipe: Any, callback: StepCallback, names: Sequence[str], step: Progress) -> Change | None:
        """Call a callback after a step; returns what it changed. Raises InputError for what it cannot change."""
        assert step.latents is not None
        assert step.embeds is not None
        self.num_timesteps = step.steps
        # Copies: writing into them is detected by their version, and does no harm.
        with torch.inference_mode(False):
            tensors = {name: None if x is None else x.clone() for name, x in self._tensors(step, names).items()}
        versions = {name: x._version for name, x in tensors.items() if x is not None}
        before = self._scales()
        returned = callback(pipe, step.step, step.timestep, dict(tensors))
        changed = self._changed(tensors, versions, returned, _names(step.embeds.add_time_ids is not None))

        latents = changed.pop(LATENTS, None)
        if latents is not None:
            latents = _checked(LATENTS, latents, tuple(step.latents.shape))
        embeds = self._embeds(step.embeds, changed) if changed else None
        after = self._scales()
        if embeds is not None or before != after:  # else they are those of a stage that may be unguided
            self._check_rows(embeds or step.embeds, len(step.latents))
        if self.interrupt:
            self.generation.interrupt()
        if before != after and embeds is None and self.embedded_guidance:
            embeds = step.embeds  # the scale enters there
        return None if latents is None and embeds is None and before == after else Change(*after, latents, embeds)

    def _scales(self) -> tuple[float, float, float | None, float, float]:
        """As `Change` has them."""
        pag = (self.pag_scale, self.pag_adaptive_scale)
        return (self.guidance_scale, self.guidance_rescale, self.image_guidance_scale, *pag)

    def _tensors(self, step: Progress, names: Sequence[str]) -> dict[str, Tensor | None]:
        assert step.embeds is not None
        assert step.latents is not None
        images, prompts = len(step.latents), step.embeds.prompt_embeds
        negative = prompts[:-images] if len(prompts) > images else None
        tensors = {LATENTS: step.latents, **step.embeds._asdict(), NEGATIVE: negative}
        return {name: tensors[name] for name in names}

    def _changed(
        self, tensors: Mapping[str, Tensor | None], versions: Mapping[str, int], returned: Any, expected: Sequence[str]
    ) -> dict[str, Any]:
        """The tensors that a callback returned or has written into."""
        if returned is not None and not isinstance(returned, Mapping):
            raise InputError(f"the callback returned {checks.show(returned)}: expected a dict of tensors, or None")
        after = {**tensors, **(returned or {})}
        for name in after:
            if name not in expected:
                suggestions = difflib.get_close_matches(str(name)[:100], expected, n=1)
                hint = f"did you mean {suggestions[0]!r}?" if suggestions else f"expected some of {', '.join(expected)}"
                raise InputError(f"the callback returned {checks.show(name)}: {hint}")
        changed = {}
        for name, value in after.items():
            same = name in tensors and value is tensors[name]
            if not same or (value is not None and value._version != versions[name]):
                changed[name] = value
        if NEGATIVE in changed:
            raise InputError(
                f"the callback changed {NEGATIVE}, which no step reads: change the first half of prompt_embeds"
            )
        return changed

    def _embeds(self, before: Embeds, changed: Mapping[str, Any]) -> Embeds:
        tensors = {}
        for name, value in changed.items():
            original = getattr(before, name)
            rows = len(value) if isinstance(value, Tensor) and value.ndim else 0
            tensors[name] = _checked(name, value, (rows, *original.shape[1:])).to(original)
        return before._replace(**tensors)

    def _check_rows(self, embeds: Embeds, images: int) -> None:
        guided = self.do_classifier_free_guidance
        for name, value in embeds._asdict().items():
            if value is not None and len(value) != 2 * images and (guided or len(value) != images):
                rows = f"{2 * images}, negatives first" if guided else f"{images} or {2 * images}"
                raise InputError(
                    f"after the callback, {name} has {len(value)} rows: expected {rows}, at guidance_scale "
                    f"{self.guidance_scale:g} with {images} pictures"
                )


def _checked(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    try:
        return checks.finite(name, checks.tensor(name, value, shape)).detach()
    except InputError as error:
        raise InputError(f"the callback's {error}") from None


class _OfCall:
    """An attribute of the call whose callback runs in this thread."""

    def __init__(self, field: str, check: Callable[[str, Any], Any] | None = None) -> None:
        self.field, self.check = field, check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: type) -> Any:
        if pipe is None:
            return self
        return getattr(pipe.calls.current(self.name), self.field)

    def __set__(self, pipe: Any, value: Any) -> None:
        if self.check is None:
            raise AttributeError(f"{self.name} cannot be set")
        setattr(pipe.calls.current(self.name), self.field, self.check(self.name, value))


def _scale(name: str, value: Any) -> float:
    return checks.real(name, value, 0.0, MAX_GUIDANCE)


def _image_scale(name: str, value: Any) -> float | None:
    return None if value is None else _scale(name, value)


class Calls:
    """The calls of a pipeline that are under way."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._open: set[Generation] = set()
        self._lock = threading.Lock()

    @contextmanager
    def open(self, generation: Generation) -> Iterator[None]:
        """While a call is under way."""
        with self._lock:
            self._open.add(generation)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(generation)

    def interrupt(self) -> None:
        """Finish all calls early."""
        with self._lock:
            calls = list(self._open)
        for generation in calls:
            generation.interrupt()

    @contextmanager
    def entered(self, call: CallState) -> Iterator[None]:
        """While a call's callback runs in this thread; it may make calls of its own."""
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            yield
        finally:
            self._local.call = outer

    def current(self, name: str) -> CallState:
        """The call whose callback runs in this thread; AttributeError, for `name`, where none does."""
        call: CallState | None = self.in_this_thread()
        if call is None:
            raise AttributeError(f"{name} belongs to a call: it is there while its callback runs, in the same thread")
        return call

    def in_this_thread(self) -> CallState | None:
        return getattr(self._local, "call", None)


class Steered:
    """The attributes by which callbacks written for diffusers' pipelines see and change a call."""

    calls: Calls

    guidance_scale = _OfCall("guidance_scale")
    guidance_rescale = _OfCall("guidance_rescale")
    image_guidance_scale = _OfCall("image_guidance_scale")
    pag_scale = _OfCall("pag_scale")
    pag_adaptive_scale = _OfCall("pag_adaptive_scale")
    do_perturbed_attention_guidance = _OfCall("do_perturbed_attention_guidance")
    do_classifier_free_guidance = _OfCall("do_classifier_free_guidance")
    clip_skip = _OfCall("clip_skip")
    num_timesteps = _OfCall("num_timesteps")
    _guidance_scale = _OfCall("guidance_scale", _scale)
    _pag_scale = _OfCall("pag_scale", _scale)
    _pag_adaptive_scale = _OfCall("pag_adaptive_scale", _scale)
    _image_guidance_scale = _OfCall("image_guidance_scale", _image_scale)
    _guidance_rescale = _OfCall("guidance_rescale", lambda name, value: checks.real(name, value, 0.0, 1.0))
    _num_timesteps = _OfCall("num_timesteps")

    @property
    def interrupt(self) -> bool:
        """Whether the call whose callback runs in this thread is to skip the remaining steps."""
        call = self.calls.in_this_thread()
        return call is not None and call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback its own call's; elsewhere, such as in the thread of a stop button, that of all under way."""
        call, stop = self.calls.in_this_thread(), checks.flag("_interrupt", value)
        if call is not None:
            call.interrupt = stop
        elif stop:
            self.calls.interrupt()
