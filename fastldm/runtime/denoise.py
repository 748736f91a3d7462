"""The denoising loop of one run: `denoise`, which defines correct. batch.py has many runs take their steps together.

One call of the network and one end of a step for each row of a run's table. Nothing in the loop waits for the device or
looks at a value: coefficients and flags were known before it began, as Python numbers or in device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastldm.adapters.selection import NONE, Selection
from fastldm.device import send
from fastldm.errors import InputError, NonFinite
from fastldm.kernels.lora import ScaledPages
from fastldm.kernels.step import W0, blend, guide, model_input, step, table_rows
from fastldm.runtime.controls import RunControl, RunFeatures
from fastldm.runtime.pages import Applied
from fastldm.samplers.table import COLUMNS, StepTable

if TYPE_CHECKING:
    pass

Network = Callable[[Tensor, int, bool], Tensor]
PicturesKV = tuple[tuple[Tensor | None, ...], ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. A scale of at most 1 is one pass of the network, not two."""

    scale: float = 1.0
    rescale: float = 0.0  # 0 none, 1 the deviation of the conditional branch
    start: float = 0.0  # guided from this fraction of the steps on ...
    end: float = 1.0  # ... and before this one
    cfg_pp: bool = False  # whether the table's guidance is CFG++, which is guided at any scale

    def guides(self, table: StepTable, row: int) -> bool:
        """Whether a row of the table is guided."""
        return (self.scale > 1 or self.cfg_pp) and self.start <= table.index[row] / table.steps < self.end

    def rows(self, table: StepTable) -> list[bool]:
        """Whether each row of the table is."""
        return [self.guides(table, row) for row in range(len(table))]

    def weights(self, table: StepTable) -> list[tuple[float, float, float, float]]:
        """w0, w1, w2 and gx of each row of the table, as `kernels.step.table_rows` takes them."""
        columns = table.rows[:, [COLUMNS.index("gm"), COLUMNS.index("gx")]].tolist()
        return [
            (1.0 - self.scale * gm, self.scale * gm, 0.0, self.scale * gx) if guided else (0.0, 1.0, 0.0, 0.0)
            for guided, (gm, gx) in zip(self.rows(table), columns, strict=True)
        ]


class Inpainting(NamedTuple):
    """Blending: what is repainted is a latent like any other, the rest comes back at each step's noise level."""

    mask: Tensor  # (B or 1, 1, h, w), 1 where to paint
    init: Tensor  # (B, C, h, w) the latents of the image
    noise: Tensor  # (B, C, h, w) that the run starts with


class Embeds(NamedTuple):
    """What the rows of the U-Net are conditioned on: R rows, all negatives and then all prompts, or the prompts alone.
    The names are those by which step callbacks of diffusers know them."""

    prompt_embeds: Tensor  # (R, T, D)
    add_text_embeds: Tensor | None = None  # (R, P), SDXL's pooled vectors
    add_time_ids: Tensor | None = None  # (R, 6), SDXL's sizes

    def split(self, images: int) -> list[Embeds]:
        """Those of each of so many images: one row, or with guidance two."""
        return [Embeds(*(None if x is None else x[k::images] for x in self)) for k in range(images)]  # type: ignore

    @staticmethod
    def join(images: Sequence[Embeds]) -> Embeds:
        """Those of all images. Texts of unequal length are repeated, which does not change attention."""
        tokens = math.lcm(*(embeds.prompt_embeds.shape[1] for embeds in images))
        hidden = [x.repeat(1, tokens // x.shape[1], 1) for x in (embeds.prompt_embeds for embeds in images)]

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            rows = [x for x in parts if x is not None]
            return torch.stack(rows, dim=1).flatten(0, 1) if rows else None  # negatives first

        return Embeds(*(joined(x) for x in (hidden, *list(zip(*images, strict=True))[1:])))  # type: ignore[arg-type]


@dataclass(eq=False)
class Run:
    """A request of B images on its way through the loop, all of them at the same row of the same table.

    All noise has been drawn, and what the network reads besides the latents has been computed: nothing is left to
    chance or to the host. R rows of conditioning: B negatives and then B prompts where any step is guided, else the
    prompts. The latents under way belong to the batch.

    A batch-invariant run is taken apart: `images` are its images as runs of their own, each conditioned as if it were
    alone, and it has no conditioning itself.
    """

    table: StepTable
    latents: Tensor  # (B, C, h, w) float32, at the table's start
    noises: Sequence[Tensor | None]  # of each row, float32 (B, C, h, w), as `draw_step_noise` gives them
    guidance: Guidance = Guidance()
    inpainting: Inpainting | None = None
    extra: Tensor | None = None  # (B or R, K, h, w) in `dtype`: what the network sees behind the latents (inpainting)
    dtype: torch.dtype = torch.float32  # the network's
    temb: Tensor | None = None  # (steps, 1 or R, channels): `UNet.time_rows` of each row of the table
    text_kv: tuple[Tensor, ...] = ()  # of each cross-attention (R, T, 2C): `UNet.cross_kv`
    embeds: Embeds | None = None  # what temb and text_kv were computed from
    adapters: Selection = NONE
    embeddings: Mapping[str, str] = field(default_factory=dict)  # `Result.embeddings`
    controls: tuple[RunControl, ...] = ()
    features: RunFeatures | None = None
    applied: Applied = ()  # pages of the adapters that are beside the weights
    pictures: PicturesKV = ()  # by IP-Adapter and cross-attention (R, T, 2C): `IPAdapter.kv`
    images: tuple[Run, ...] = ()
    row: int = 0  # the one that comes next
    at_once: int = 1  # how many rows its next step may take, of a batch that can take several
    branches_kept: int = 0  # of which deep features are there: 1 the conditional, 2 the unconditional too

    def __post_init__(self) -> None:
        if [noise is not None for noise in self.noises] != list(self.table.draws):
            raise InputError("the noises are not those of this table; draw them with draw_step_noise.")

    @property
    def batch(self) -> int:
        return self.latents.shape[0]

    @property
    def done(self) -> bool:
        return self.row == len(self.table)

    @property
    def guided(self) -> bool:
        """Whether the next row is."""
        return self.guidance.guides(self.table, self.row)

    @property
    def branches(self) -> int:
        """Of the next row: 2 where it is guided."""
        return 2 if self.guided else 1

    @property
    def reuses(self) -> bool:
        """Whether rows reuse the deep features of earlier ones."""
        return not all(self.table.deep)

    @property
    def computes_all(self) -> bool:
        """Whether the next row computes all of the network: where its table says so, and where a branch has no deep
        features, since it was not there at the last row that computed all."""
        return self.table.deep[self.row] or self.branches > self.branches_kept

    def advance(self) -> None:
        """The next row has been taken."""
        if self.computes_all:
            self.branches_kept = self.branches
        self.row += 1

    @property
    def beside(self) -> ScaledPages:
        """The pages of the next row, with scales."""
        if not self.applied or self.done:
            return ()
        at = self.table.index[self.row] / self.table.steps
        return tuple((page, scale) for page, scale, (start, end) in self.applied if start <= at < end)

    @property
    def tokens(self) -> int:
        """Of the longest text."""
        return max((run.text_kv[0].shape[1] for run in self.images or (self,) if run.text_kv), default=0)

    @property
    def picture_tokens(self) -> list[int]:
        """Of each IP-Adapter."""
        pictures = (self.images[0] if self.images else self).pictures
        return [next(kv.shape[1] for kv in layers if kv is not None) for layers in pictures]

    @property
    def max_rows(self) -> int:
        """The most rows of the network that a step of this run takes."""
        return self.batch * (2 if any(self.guidance.rows(self.table)) else 1)

    def take_apart(self) -> None:
        """Set `images`, not conditioned yet."""

        def of(k: int, x: Tensor) -> Tensor:
            return x if len(x) == 1 else x[k : k + 1]

        self.images = tuple(
            Run(
                self.table,
                of(k, self.latents),
                [None if noise is None else of(k, noise) for noise in self.noises],
                self.guidance,
                None if self.inpainting is None else Inpainting(*(of(k, x) for x in self.inpainting)),
                None if self.extra is None else self.extra[k :: self.batch],
                self.dtype,
                controls=tuple(control.image(k) for control in self.controls),
                features=None if self.features is None else self.features.image(k),
            )
            for k in range(self.batch)
        )


@torch.no_grad()
def denoise(
    network: Network, run: Run, *, on_step: Callable[[int, float, Tensor], Tensor | None] | None = None
) -> Tensor:
    """Take all steps of a run: (B, C, h, w) float32 latents at the table's end. This defines what is correct.

    network: (model input in `run.dtype`, row of the table, guided) -> its output. The input of a guided row has 2B
        rows, the unconditional branch first; any other has B, conditional.
    on_step: called after each row with (row, timestep, latents); a tensor that it returns replaces the latents.

    Raises NonFinite naming the first step whose latents held NaN or infinity; it is looked for once, at the end.
    """
    state = State(run)
    for i, guided in enumerate(run.guidance.rows(run.table)):
        state.end(i, network(state.input(i), i, guided))
        if on_step is not None:
            replaced = on_step(i, float(run.table.timesteps[i]), state.x)
            if replaced is not None:
                state.go_on_from(replaced)
    check_finite(state.first_bad(), run.table)
    return state.x


class State:
    """The latents of a run between two steps, and the end of a step function by function, on any device."""

    def __init__(self, run: Run) -> None:
        self.run, self.depth = run, run.table.depth
        self._guide()
        self.x = run.latents  # (B, C, h, w); never written in place, so that whoever was given it may keep it
        self.deep: Tensor | None = None  # deep features of all branches at the last row that computed all
        self.y = torch.zeros_like(self.x) if run.table.anchored else None
        self.history: tuple[Tensor, ...] = ()
        # Not finite when one value is not: one small reduction a step, read once after the loop.
        self.sums = [self.x.sum() if run.extra is None else self.x.sum() + run.extra.sum(dtype=torch.float32)]

    def input(self, i: int) -> Tensor:
        """What the network sees at row i: (2B, C + K, h, w) where it is guided, unconditional branch first, else B."""
        run = self.run
        branches = 2 if run.guidance.guides(run.table, i) else 1
        extra = None if run.extra is None else run.extra[-branches * run.batch :]
        return model_input(self.x, float(run.table.rows[i, 0]), run.dtype, branches, extra)

    def end(self, i: int, out: Tensor) -> None:
        """Row i, with the network's output."""
        run = self.run
        if run.guidance != self._guidance:  # a callback's
            self._guide()
        row, channels, rest = self._rows[i], self.x.shape[1], {}
        if out.shape[1] > channels:
            rest["variance"] = out[-run.batch :, channels : 2 * channels].float()
            out = out[:, :channels]
        if run.guidance.guides(run.table, i):
            if run.table.rare:
                rest["difference"] = out[-run.batch :].float() - out[: run.batch].float()
            out = guide(out, row[W0 : W0 + 2], run.guidance.rescale)
        args = (row, self.x, self.y, self.history, out.float(), run.noises[i])
        x, self.y, self.history = step(*args, depth=self.depth, **rest)
        if run.inpainting is not None:
            x = blend(row, x, run.inpainting.mask, run.inpainting.init, run.inpainting.noise)
        self.x = x
        self.sums.append(x.sum())

    def _guide(self) -> None:
        """The table with the weights of the run's guidance."""
        self._guidance, table = self.run.guidance, self.run.table
        self._rows = table_rows(table.rows, table.draws, self._guidance.weights(table)).tolist()

    def go_on_from(self, latents: Tensor) -> None:
        """Go on from other latents."""
        self.x = send(latents, self.x.device, self.x.dtype)

    def first_bad(self) -> int | None:
        """The first row that left NaN or infinity, -1 for the start. Waits for the device."""
        finite = torch.stack(self.sums).isfinite().tolist()
        return None if all(finite) else finite.index(False) - 1


# -------------------------------------------------------------------------------------------------- what may go wrong


def check_finite(first: int | None, table: StepTable) -> None:
    """NonFinite where a run has a first bad row."""
    if first is None:
        return
    if first == -1:
        raise NonFinite("the latents that denoising starts from hold NaN or infinity.")
    raise NonFinite(
        f"denoising: NaN or infinity in the latents after step {table.index[first] + 1} of {table.steps} "
        f"(row {first}, timestep {table.timesteps[first]:g}); try dtype float32 or bfloat16, or less guidance."
    )
