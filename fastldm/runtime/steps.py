"""A batch that takes several steps a call, by a bundle's graph of them: see `export.graphs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastldm import spans
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.export.graphs import HISTORY, STATE
from fastldm.export.spec import NetworkSpec
from fastldm.runtime.denoise import Run
from fastldm.samplers.table import COLUMNS, NEUTRAL

if TYPE_CHECKING:
    from fastldm.export.engine import Engine

Piece = tuple[Run, int, int]
"""The images first to last - 1 of a run."""


def start_of(run: Run) -> dict[str, Tensor]:
    """The state before the first row."""
    x = run.latents
    return {
        "latents": x,
        "anchor": torch.zeros_like(x),
        "history": x.new_zeros(len(x), HISTORY * x.shape[1], *x.shape[2:]),
    }


def rows_of(run: Run, start: int, stop: int, spec: NetworkSpec) -> dict[str, Tensor]:
    """What the rows start to stop - 1 of a run's table read, and what all rows read of its images. spec: of the graph.
    InputError for a sampler that uses columns that the graph does not have."""
    width = next(port.shape[2] for port in spec.inputs if port.name == "table")
    assert isinstance(width, int)
    later = dict(zip(COLUMNS[width:], run.table.rows.T[width:], strict=True))
    later.pop("gm", None)  # it is in `guidance`
    if used := [name for name, own in later.items() if (own != NEUTRAL[name]).any()]:
        raise InputError(
            f"the bundle's graph does not know {', '.join(used)} of the sampler's table: run it on PyTorch"
        )
    if run.table.threshold is not None:
        raise InputError("the bundle's graph knows no dynamic thresholding: run it on PyTorch")
    if run.guidance.projection is not None:
        raise InputError("the bundle's graph knows no adaptive projected guidance: run it on PyTorch")
    if run.gradient is not None:
        raise InputError("the bundle's graph knows no guidance by gradient: run it on PyTorch")
    images, table, edits = run.batch, run.table, run.guidance.image_scale is not None
    zeros, ones = torch.zeros_like(run.latents), torch.ones_like(run.latents[:, :1])
    weights = run.table_weights[start:stop]
    scales = {"guidance": [w1 for _, w1, *_ in weights]}
    scales |= {"image_guidance": [1 - w0 for w0, *_ in weights]} if edits else {}
    noises = [zeros if noise is None else noise for noise in run.noises[start:stop]]
    if not any(noise is not None for noise in run.noises[start:stop]):
        noises = [zeros]
    mask, init, init_noise = (ones, zeros, zeros) if run.inpainting is None else run.inpainting
    inputs = {
        "table": torch.from_numpy(table.rows[start:stop, :width])[:, None].expand(-1, images, -1),
        **{name: torch.tensor(own, dtype=torch.float32)[:, None].expand(-1, images) for name, own in scales.items()},
        "rescale": torch.full((images,), run.guidance.rescales),
        "noises": torch.stack(noises),
        "mask": mask.expand(images, -1, -1, -1),
        "init": init,
        "init_noise": init_noise,
    }
    extra = run.extra_of((1,))  # the prompt's; of the others the graph knows
    return inputs if extra is None else {**inputs, "extra": extra}


class StepsBatch:
    """Each run gets what `denoise` computes for it. Runs whose next rows are guided alike, with texts of one length,
    share a call, each at its own rows of its own table."""

    nbytes = 0  # what it holds is the runs'

    def __init__(self, steps: Engine, backend: str, *, together: bool = True) -> None:
        """backend: what runs it. together: whether runs share calls; else each has its own."""
        self._steps, self.backend, self.together = steps, backend, together
        self._spec = steps.specs[0]
        self._max_images = self._spec.axes["images"].most
        self._states: dict[Run, dict[str, Tensor]] = {}
        self._norms: dict[Run, list[Tensor]] = {}  # (1 or rows, B) of the start, and of each call
        self._texts: dict[tuple[bool, tuple[Piece, ...]], list[Tensor]] = {}

    def holds(self, run: Run) -> bool:
        return True

    def admit(self, run: Run) -> None:
        norms = run.latents.abs().sum((1, 2, 3))
        extra = run.extra_of((1,))
        if extra is not None:
            norms = norms + extra.float().abs().sum((1, 2, 3))
        self._states[run], self._norms[run] = start_of(run), [norms[None]]

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> str:
        count = min(map(_alike, runs))
        after: list[tuple[Piece, dict[str, Tensor]]] = []
        for guided, pieces in self._calls(runs):
            with spans.span("U-Net"):
                after += self._call(guided, pieces, count)
        for run in runs:  # none has moved until all calls were made
            own = [outputs for (other, *_), outputs in after if other is run]
            self._states[run] = {name: _cat([outputs[f"{name}_out"] for outputs in own]) for name in STATE}
            self._norms[run].append(_cat([outputs["norms"] for outputs in own], 1))
            run.row += count
        return self.backend

    def _calls(self, runs: Sequence[Run]) -> list[tuple[bool, tuple[Piece, ...]]]:
        calls: list[tuple[tuple[bool, int, Run | None], list[Piece]]] = []
        for run in runs:
            key = (len(run.branches) > 1, run.tokens, None if self.together else run)
            for first in range(0, run.batch, self._max_images):
                piece = (run, first, min(first + self._max_images, run.batch))
                images = piece[2] - first
                fits = (pieces for own, pieces in calls if own == key and _images(pieces) + images <= self._max_images)
                pieces = next(fits, None)
                if pieces is None:
                    calls.append((key, [piece]))
                else:
                    pieces.append(piece)
        return [(guided, tuple(pieces)) for (guided, *_), pieces in calls]

    def _call(self, guided: bool, pieces: tuple[Piece, ...], count: int) -> list[tuple[Piece, dict[str, Tensor]]]:
        """The next rows of these images, and what the graph gives for each piece."""
        parts = [self._part(piece, count) for piece in pieces]
        inputs = {name: _cat([part[name] for part in parts], _axis(name)) for name in parts[0]}
        sides = [False, False, True] if "image_guidance" in inputs else [False, True]
        sides = sides if guided else [True]
        temb = [_temb(piece, count, side) for side in sides for piece in pieces]
        inputs["temb_rows"] = _cat(temb, 1)
        key = (guided, pieces)
        if key not in self._texts:
            of_sides = [_side(piece, side) for side in sides for piece in pieces]
            self._texts = {key: [_cat(layer) for layer in zip(*of_sides, strict=True)]}
        inputs |= {f"kv.{k}": kv for k, kv in enumerate(self._texts[key])}
        outputs = self._steps({port.name: inputs[port.name].to(port.torch_dtype) for port in self._spec.inputs})
        sizes = [last - first for _, first, last in pieces]
        split = {name: x.split(sizes, _axis(name)) for name, x in outputs.items()}
        return [(piece, {name: split[name][k] for name in split}) for k, piece in enumerate(pieces)]

    def _part(self, piece: Piece, count: int) -> dict[str, Tensor]:
        run, first, last = piece
        inputs = {**self._states[run], **rows_of(run, run.row, run.row + count, self._spec)}
        if len(inputs["noises"]) < count:
            inputs["noises"] = inputs["noises"].expand(count, -1, -1, -1, -1)
        return {name: x.narrow(_axis(name), first, last - first) for name, x in inputs.items()}

    def latents(self, run: Run) -> Tensor:
        return self._states[run]["latents"]

    def go_on_from(self, run: Run, latents: Tensor) -> None:
        own = self._states[run]["latents"]
        self._states[run] = {**self._states[run], "latents": send(latents, own.device, own.dtype)}

    def recondition(self, run: Run) -> None:
        self.close()

    def release(self, run: Run) -> Callable[[], int | None]:
        self.close()
        del self._states[run]
        finite = torch.cat(self._norms.pop(run)).isfinite().all(1).tolist()
        return lambda: None if all(finite) else finite.index(False) - 1

    def close(self) -> None:
        self._texts = {}


def _alike(run: Run) -> int:
    """How many rows of a run, from its next on, are guided or not as that is: at most as many as it may take."""
    rows = run.table_branches[run.row : run.row + run.at_once]
    return next((k for k, branches in enumerate(rows) if branches != run.branches), len(rows))


def _images(pieces: Sequence[Piece]) -> int:
    return sum(last - first for _, first, last in pieces)


def _axis(name: str) -> int:
    """The axis of images of an input or output."""
    return 1 if name in ("table", "guidance", "image_guidance", "noises", "norms") else 0


def _rows(piece: Piece, conditional: bool, of: int) -> slice:
    """Where the rows of one side of the guidance lie among `of` rows: all negatives and then all prompts."""
    run, first, last = piece
    start = of - run.batch if conditional else 0
    return slice(start + first, start + last)


def _side(piece: Piece, conditional: bool) -> list[Tensor]:
    return [kv[_rows(piece, conditional, len(kv))] for kv in piece[0].text_kv]


def _temb(piece: Piece, count: int, conditional: bool) -> Tensor:
    run, first, last = piece
    assert run.temb is not None
    temb = run.temb[run.row : run.row + count]
    if temb.shape[1] == 1:
        return temb.expand(-1, last - first, -1)
    return temb[:, _rows(piece, conditional, temb.shape[1])]


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), axis)
