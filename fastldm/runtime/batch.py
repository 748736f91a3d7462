"""Batches: many runs that take their steps together, each getting what `denoise` computes for it alone. `EagerBatch`
runs on any device; slots.py is that of a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import spans
from fastldm.device import send_numbers
from fastldm.kernels.lora import Group, Rows
from fastldm.models.controlnet import ControlNet
from fastldm.models.unet import Features, Pictures, Residuals, Reuse
from fastldm.runtime.controls import RunControl, evaluate
from fastldm.runtime.denoise import Branches, Guidance, Run, State, added_output

if TYPE_CHECKING:
    from fastldm.models.interfaces import Denoiser
    from fastldm.models.prior import PriorNetwork


class Batch(Protocol):
    """Runs of one latent size whose steps are taken together, each getting what it would have got alone."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds while it is empty, for the next of that size."""

    def holds(self, run: Run) -> bool:
        """Whether it could take a run in, were it empty."""

    def admit(self, run: Run) -> None:
        """Take a run in. Its steps may be taken from now on."""

    def step(self, runs: Sequence[Run]) -> str:
        """A row of each of these runs, or up to `Run.at_once`; says what ran it. Where it raises, no run has moved."""

    def latents(self, run: Run) -> Tensor:
        """(B, C, h, w) float32 as they are now, in a tensor that later steps leave alone."""

    def go_on_from(self, run: Run, latents: Tensor) -> None:
        """Replace a run's latents."""

    def recondition(self, run: Run) -> None:
        """Read a run's guidance and conditioning anew, for it has others now: of no more tokens than before."""

    def release(self, run: Run) -> Callable[[], int | None]:
        """Let a run go, done or not. Returns a function that gives its first bad row, once the device is so far."""

    def close(self) -> None:
        """Free what the batch holds. It is empty, and not used again."""


class EagerBatch:
    """A batch that is put together anew at each step, on any device: what a CPU runs, and the reference of `Slots`.
    Each run gets what `denoise` computes for it."""

    nbytes = 0  # what it holds is the runs'

    def __init__(self, unet: Denoiser | PriorNetwork, backend: str = "torch", *, together: bool = True) -> None:
        """backend: what runs it. together: whether all runs share a call of the network; else each has its own."""
        self.unet, self.backend, self.together = unet, backend, together
        self._states: dict[Run, State] = {}
        self._texts: dict[object, tuple[object, Texts]] = {}  # by network

    def holds(self, run: Run) -> bool:
        return True

    def admit(self, run: Run) -> None:
        self._states[run] = State(run)

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> str:
        runs = sorted(runs, key=lambda run: not run.computes_all)  # those that do come first
        calls = [runs] if self.together else [[run] for run in runs]
        added = [added_output(run, run.row, self._states[run].x, partial(self._for_autograd, run)) for run in runs]
        inputs = [[self._states[run].input(run.row) for run in call] for call in calls]
        outputs = [output for each in zip(calls, inputs, strict=True) for output in self._outputs(*each)]
        for run, model_output, own in zip(runs, outputs, added, strict=True):
            self._states[run].end(run.row, model_output, own)
            run.advance()
        return self.backend

    def _for_autograd(self, run: Run, inputs: Tensor, row: int, branches: Branches) -> Tensor:
        """The network's output for the prompt's branch of a run at its next row."""
        assert (row, branches) == (run.row, (1,))
        return EagerBatch(self.unet)._outputs([replace(run, guidance=Guidance())], [inputs], for_autograd=True)[0]

    def _outputs(
        self, runs: Sequence[Run], inputs: Sequence[Tensor], *, for_autograd: bool = False
    ) -> Sequence[Tensor]:
        """The network's output for the inputs of each of these runs, of one call. for_autograd: of one run, all of the
        network computed, where nothing is written in place that autograd may keep."""
        temb = [_rows(run.temb, run, run.branches).expand(len(x), -1) for run, x in zip(runs, inputs, strict=True)]
        text, options = self._text_of(None, [(run, run.text_kv, run.branches) for run in runs])
        deep = None
        if not for_autograd and any(run.reuses for run in runs):
            deep = sum(len(x) for run, x in zip(runs, inputs, strict=True) if run.computes_all)
            options["reuse"] = Reuse(deep, partial(self._exchange, runs))
        # inference_mode: a step's hundreds of views cost less there
        mode: AbstractContextManager[Any] = nullcontext() if for_autograd else torch.inference_mode()
        with mode, spans.span("U-Net"), _beside(self.unet, runs, inputs):
            if residuals := self._residuals(runs, inputs, deep):
                options["residuals"] = [_out_of_place(own) for own in residuals] if for_autograd else residuals
            if features := _features(runs):
                options["features"] = [own._replace(first=None) for own in features] if for_autograd else features
            if pictures := _pictures(runs):
                options["pictures"] = pictures
            if perturbed := _perturbed(runs, inputs[0].device):
                options["perturbed"] = perturbed
            out = self.unet.step(_cat(inputs), _cat(temb), text, **options)
        return out.split([len(x) for x in inputs])

    def _exchange(self, runs: Sequence[Run], deep: Tensor | None) -> Tensor:
        """See `Reuse`."""
        if deep is not None:
            computed = [run for run in runs if run.computes_all]
            rows = [run.batch * len(run.branches) for run in computed]
            for run, own in zip(computed, deep.split(rows), strict=True):
                self._states[run].deep = dict(zip(run.branches, own.split(run.batch), strict=True))
            if len(computed) == len(runs):
                return deep
        return _cat([self._states[run].deep[branch] for run in runs for branch in run.branches])

    def _residuals(self, runs: Sequence[Run], inputs: Sequence[Tensor], deep: int | None) -> list[Residuals]:
        """Of all ControlNets that act on rows of these runs; one call of each. deep: how many rows compute all."""
        parts: dict[ControlNet, list[tuple[Run, RunControl, Branches, int, Tensor]]] = {}
        first = 0
        for run, x in zip(runs, inputs, strict=True):
            for control in run.controls:
                if control.acts[run.row]:  # on neighbouring branches
                    reading = [control.reads(run.guidance.texts[branch]) for branch in run.branches]
                    begin, count = run.batch * reading.index(True), run.batch * sum(reading)
                    branches = tuple(branch for branch, reads in zip(run.branches, reading, strict=True) if reads)
                    own = (run, control, branches, first + begin, x[begin : begin + count])
                    parts.setdefault(control.network, []).append(own)
            first += len(x)
        residuals: list[Residuals] = []
        for network, acting in parts.items():
            text, options = self._text_of(
                network, [(run, control.text_kv, branches) for run, control, branches, *_ in acting]
            )
            model_input = _cat([x for *_, x in acting])
            hint = _cat([control.hint.repeat(len(branches), 1, 1, 1) for _, control, branches, *_ in acting])
            weights = _cat([control.weights.expand(len(x), -1) for _, control, _, _, x in acting])
            temb = _cat([_rows(control.temb, run, own).expand(len(x), -1) for run, control, own, _, x in acting])
            ranges = [(begin, begin + len(x)) for *_, begin, x in acting]
            residuals += evaluate(network, model_input, ranges, weights, temb, text, hint, deep=deep, **options)
        return residuals

    def _text_of(
        self, network: object, parts: Sequence[tuple[Run, tuple[Tensor, ...], Branches]]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Keys and values of all rows of branches of runs, and as options of a step their lengths where they differ;
        the same tensors while the runs are the same."""
        key = [(run, branches) for run, _, branches in parts]
        known = self._texts.get(network)
        if known is None or known[0] != key:
            texts = [tuple(run.texts_of(kv, branches) for kv in text) for run, text, branches in parts]
            visible = [None if run.text_len is None else run.texts_of(run.text_len, own) for run, _, own in parts]
            known = self._texts[network] = (key, _join_texts(texts, visible))
        text, kv_len = known[1]
        return text, {} if kv_len is None else {"kv_len": kv_len}

    def latents(self, run: Run) -> Tensor:
        return self._states[run].x

    def go_on_from(self, run: Run, latents: Tensor) -> None:
        self._states[run].go_on_from(latents)

    def recondition(self, run: Run) -> None:
        self.close()

    def release(self, run: Run) -> Callable[[], int | None]:
        self.close()
        return self._states.pop(run).first_bad

    def close(self) -> None:
        self._texts.clear()


class BatchInvariant:
    """A batch of runs that were taken apart: it holds their images, and to another each is as good as alone."""

    def __init__(self, images: Batch) -> None:
        """images: computes each run the same whatever others it holds."""
        self._images = images

    @property
    def nbytes(self) -> int:
        return self._images.nbytes

    def holds(self, run: Run) -> bool:
        return self._images.holds(run)

    def admit(self, run: Run) -> None:
        for image in run.images:
            self._images.admit(image)

    def step(self, runs: Sequence[Run]) -> str:
        for run in runs:
            for image in run.images:
                image.at_once = run.at_once
        ran_on = self._images.step([image for run in runs for image in run.images])
        for run in runs:
            run.row = run.images[0].row
        return ran_on

    def latents(self, run: Run) -> Tensor:
        return torch.cat([self._images.latents(image) for image in run.images])

    def go_on_from(self, run: Run, latents: Tensor) -> None:
        for image, own in zip(run.images, latents.split(1), strict=True):
            self._images.go_on_from(image, own)

    def recondition(self, run: Run) -> None:
        for image in run.images:
            self._images.recondition(image)

    def release(self, run: Run) -> Callable[[], int | None]:
        verdicts = [self._images.release(image) for image in run.images]

        def first_bad() -> int | None:
            return min((row for verdict in verdicts if (row := verdict()) is not None), default=None)

        return first_bad

    def close(self) -> None:
        self._images.close()


def _out_of_place(residuals: Residuals) -> Residuals:
    """Of a ControlNet that acts on all rows: added to them without writing in place."""
    skips, mid, weights, _ = residuals
    if weights is not None:
        skips = tuple(x * w[:, None, None, None] for x, w in zip(skips, weights, strict=False))
        mid = mid * weights[-1][:, None, None, None]
    return Residuals(skips, mid, first=None)


def _beside(
    network: Denoiser | PriorNetwork, runs: Sequence[Run], inputs: Sequence[Tensor]
) -> AbstractContextManager[None]:
    """Inside, the network's rows have the adapters that the runs have beside its weights."""
    if not any(run.beside for run in runs):
        return nullcontext()
    ends = list(itertools.accumulate(len(x) for x in inputs))
    groups = [Group(end - len(x), end, run.beside) for run, x, end in zip(runs, inputs, ends, strict=True)]
    nothing = torch.empty(0)
    return network.beside.having(Rows(nothing, nothing, tuple(groups)))


def _rows(temb: Tensor | None, run: Run, branches: Branches) -> Tensor:
    """(1 or rows of these branches, channels), of the next step."""
    assert temb is not None
    return temb[run.row] if temb.shape[1] == 1 else run.texts_of(temb[run.row], branches)


Texts = tuple[tuple[Tensor, ...], Tensor | None]


def _join_texts(texts: Sequence[tuple[Tensor, ...]], visible: Sequence[Tensor | None]) -> Texts:
    """Keys and values of all rows, and their lengths where they differ. visible: of each, the lengths of its rows;
    None: all of its tokens."""
    tokens = [layers[0].shape[1] if layers else 0 for layers in texts]
    kv_len = None
    if len(set(tokens)) > 1 or any(own is not None for own in visible):
        lengths = [
            send_numbers([count] * len(layers[0]), torch.int32, layers[0].device) if own is None else own
            for count, layers, own in zip(tokens, texts, visible, strict=True)
        ]
        kv_len = _cat(lengths)
    return tuple(_cat([_padded(kv, max(tokens)) for kv in layer]) for layer in zip(*texts, strict=True)), kv_len


def _features(runs: Sequence[Run]) -> list[Features]:
    """Of all T2I-Adapters that act on rows of these runs."""
    features, first = [], 0
    for run in runs:
        for _ in run.branches:
            if run.features is not None and run.features.acts[run.row]:
                features.append(Features(run.features.levels, first))
            first += run.batch
    return features


def _pictures(runs: Sequence[Run]) -> list[Pictures]:
    """Of all IP-Adapters that rows of these runs have."""
    pictures, first = [], 0
    for run in runs:
        count = run.batch * len(run.branches)
        for layers in run.pictures:
            own = tuple(None if kv is None else run.texts_of(kv, run.branches) for kv in layers)
            pictures.append(Pictures(own, count, first))
        first += count
    return pictures


def _perturbed(runs: Sequence[Run], device: torch.device) -> dict[int, Tensor]:
    """The rows of these runs that are perturbed, of each self-attention that is in any."""
    rows = [(run.perturbed, branch == 2) for run in runs for branch in run.branches for _ in range(run.batch)]
    return {
        layer: send_numbers([third and layer in layers for layers, third in rows], torch.bool, device)
        for layer in sorted({layer for run in runs for layer in run.perturbed})
    }


def _padded(kv: Tensor, tokens: int) -> Tensor:
    return kv if kv.shape[1] == tokens else F.pad(kv, (0, 0, 0, tokens - kv.shape[1]))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
