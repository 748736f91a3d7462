"""The denoising loop of one run: `denoise`, which defines correct. batch.py has many runs take their steps together.

One call of the network and one end of a step for each row of a run's table. Nothing in the loop waits for the device or
looks at a value: coefficients and flags were known before it began, as Python numbers or in device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.adapters.selection import NONE, Selection
from fastldm.device import send
from fastldm.errors import InputError, NonFinite
from fastldm.kernels.columns import W0
from fastldm.kernels.lora import ScaledPages
from fastldm.kernels.projection import Projection, project
from fastldm.kernels.step import BRANCHES, blend, guide, model_input, step, table_rows
from fastldm.runtime.controls import RunControl, RunFeatures
from fastldm.runtime.gradient import At, Gradient
from fastldm.runtime.pages import Applied
from fastldm.samplers.table import COLUMNS, StepTable

Branches = tuple[int, ...]
Weights = tuple[float, float, float, float]
"""w0, w1, w2 and gx of a row of a table."""
Network = Callable[[Tensor, int, Branches], Tensor]
PicturesKV = tuple[tuple[Tensor | None, ...], ...]


@dataclass(frozen=True)
class Guidance:
    """Guidance by up to three branches of the network for each image:

        out = w0 * branch 0 + w1 * branch 1 + w2 * branch 2

    Branch 1 is the prompt's, and always there. Branch 0 is the negative prompt's, of classifier-free guidance. Branch 2
    is one of two: the negative prompt's with the image that InstructPix2Pix edits, of which branch 0 has zeros; or the
    prompt's with some self-attentions perturbed (PAG, arXiv:2403.17377). A branch whose weight is 0 is not computed, so
    that a scale of at most 1 is one pass of the network, not two.
    """

    scale: float = 1.0  # at most 1 is no classifier-free guidance; see `original`
    rescale: float = 0.0  # 0 none, 1 the deviation of the conditional branch; of classifier-free guidance only
    start: float = 0.0  # guided from this fraction of the steps on ...
    end: float = 1.0  # ... and before this one
    cfg_pp: bool = False  # whether the table's guidance is CFG++, which is guided at any scale
    image_scale: float | None = None  # of InstructPix2Pix; below 1 nothing is guided, as in diffusers
    pag_scale: float = 0.0  # of perturbed-attention guidance, there without classifier-free guidance too
    pag_adaptive_scale: float = 0.0  # above 0, the scale is so much less for each training timestep below 1000
    apg: Projection | None = None  # adaptive projected guidance
    original: bool = False  # whether the scale is how far guidance goes beyond branch 1, from 0: a scale less by 1
    pag_layers: tuple[int, ...] = ()  # those of `UNetConfig.self_attentions` that are perturbed

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance, which needs negatives."""
        guides = self.scale > (0 if self.original else 1) or self.cfg_pp
        return guides and (self.image_scale is None or self.image_scale >= 1)

    @property
    def texts(self) -> tuple[int, int, int]:
        """Of each branch its text: 0 is the negative prompt's, 1 the prompt's."""
        return (0, 1, 0 if self.image_scale is not None else 1)

    @property
    def perturbs(self) -> bool:
        """Whether branch 2 is perturbed."""
        return self.pag_scale > 0 and len(self.pag_layers) > 0

    @property
    def has_third(self) -> bool:
        """Whether any row of a table may have branch 2."""
        return self.perturbs or (self.guided and self.image_scale is not None)

    @property
    def projection(self) -> Projection | None:
        """What applies: of classifier-free guidance, of two branches."""
        return self.apg if self.guided and not self.has_third else None

    @property
    def averages(self) -> bool:
        """Whether it has momentum, or has where a callback guides more."""
        return self.apg is not None and self.apg.momentum != 0

    @property
    def rescales(self) -> float:
        """The rescale that applies."""
        return self.rescale if self.guided else 0.0

    def weights(self, table: StepTable) -> list[Weights]:
        """w0, w1, w2 and gx of each row of the table, as `kernels.step.table_rows` takes them."""
        columns = table.rows[:, [COLUMNS.index("gm"), COLUMNS.index("gx")]].tolist()
        return [
            self._weights(gm, gx, t) if self.start <= step / table.steps < self.end else (0.0, 1.0, 0.0, 0.0)
            for step, (gm, gx), t in zip(table.index, columns, table.timesteps.tolist(), strict=True)
        ]

    def _weights(self, gm: float, gx: float, timestep: float) -> Weights:
        w0, w1, w2, wx = 0.0, 1.0, 0.0, 0.0
        if self.guided and self.image_scale is not None:
            w0, w1, w2 = 1.0 - self.image_scale, self.scale, self.image_scale - self.scale
        elif self.guided:
            scale = self.scale + self.original
            w0, w1, wx = 1.0 - scale * gm, scale * gm, scale * gx
        if self.perturbs:
            scale = self.pag_scale
            if self.pag_adaptive_scale > 0:
                scale = max(0.0, scale - self.pag_adaptive_scale * (1000 - timestep))
            w1, w2 = w1 + scale, w2 - scale
        return w0, w1, w2, wx

    def branches(self, table: StepTable) -> list[Branches]:
        """Those of each row of the table, in ascending order."""
        return branches_of(self.weights(table))


def branches_of(weights: Sequence[Weights]) -> list[Branches]:
    """Of each row those that any weight of it needs."""
    return [tuple(k for k, needed in enumerate((w0 or gx, True, w2)) if needed) for w0, _, w2, gx in weights]


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
    lengths: Tensor | None = None  # (R,) int32: of T tokens those that are read; None: all

    def split(self, images: int) -> list[Embeds]:
        """Those of each of so many images: one row, or with negatives two."""
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
    extra: Tensor | None = None  # (B or B for each branch, K, h, w) in `dtype`: what is behind the latents (inpainting)
    dtype: torch.dtype = torch.float32  # the network's
    temb: Tensor | None = None  # (steps, 1 or R, channels): `UNet.time_rows` of each row of the table
    text_kv: tuple[Tensor, ...] = ()  # of each cross-attention (R, T, 2C): `UNet.cross_kv`
    text_len: Tensor | None = None  # (R,) int32: of its T tokens the visible ones, the first; None: all
    embeds: Embeds | None = None  # what temb and text_kv were computed from
    adapters: Selection = NONE
    embeddings: Mapping[str, str] = field(default_factory=dict)  # `Result.embeddings`
    controls: tuple[RunControl, ...] = ()
    features: RunFeatures | None = None
    applied: Applied = ()  # pages of the adapters that are beside the weights
    pictures: PicturesKV = ()  # by IP-Adapter and cross-attention (R, T, 2C): `IPAdapter.kv`
    repainted: tuple[Tensor, Tensor] | None = None  # picture (B, 3, H, W) and mask (B, 1, H, W) for an asymmetric VAE
    noise_level: int = 0  # of `extra`, where that is a small picture: a class of the network
    labels: Tensor | None = None  # (B,) whole numbers: classes of the images
    vectors: Tensor | None = None  # (B, 2D): of pictures that unCLIP reads, as `read_picture` gives them
    vector_noise: Tensor | None = None  # (B, D): the noise that is in those
    images: tuple[Run, ...] = ()
    generators: Sequence[torch.Generator] | None = None  # of the seeds, behind all that was drawn
    gradient: Gradient | None = None  # by which it is guided besides
    row: int = 0  # the one that comes next
    at_once: int = 1  # how many rows its next step may take, of a batch that can take several
    branches_kept: Branches = ()  # of which deep features are there

    def __post_init__(self) -> None:
        if [noise is not None for noise in self.noises] != list(self.table.draws):
            raise InputError("the noises are not those of this table; draw them with draw_step_noise.")
        self._of_guidance: tuple[Guidance | None, list[Weights], list[Branches]] = (None, [], [])

    @property
    def batch(self) -> int:
        return self.latents.shape[0]

    @property
    def done(self) -> bool:
        return self.row == len(self.table)

    @property
    def table_branches(self) -> list[Branches]:
        """Of each row of the table, with the guidance that there is now."""
        return self._guided()[1]

    @property
    def table_weights(self) -> list[Weights]:
        """`Guidance.weights` likewise."""
        return self._guided()[0]

    def _guided(self) -> tuple[list[Weights], list[Branches]]:
        """Computed anew where a callback has changed the guidance."""
        if self._of_guidance[0] is not self.guidance:
            weights = self.guidance.weights(self.table)
            self._of_guidance = (self.guidance, weights, branches_of(weights))
        return self._of_guidance[1:]

    @property
    def branches(self) -> Branches:
        """Of the next row."""
        return self.table_branches[self.row]

    @property
    def perturbed(self) -> tuple[int, ...]:
        """The self-attentions that are perturbed in the next row's branch 2; none where it has no such branch."""
        return self.guidance.pag_layers if self.guidance.perturbs and 2 in self.branches else ()

    @property
    def rare(self) -> bool:
        """Whether its rows have what the plain kernel does not look at."""
        return self.table.rare or self.guidance.has_third

    def texts_of(self, x: Tensor, branches: Branches) -> Tensor:
        """x (R, ...), something of each text, negatives first if there are any: that of each row of these branches."""
        count = len(x) // self.batch
        texts = [self.guidance.texts[branch] - (2 - count) for branch in branches]
        if texts == [*range(count)]:
            return x
        parts = x.split(self.batch)
        return parts[texts[0]] if len(texts) == 1 else torch.cat([parts[text] for text in texts])

    def extra_of(self, branches: Branches) -> Tensor | None:
        """(rows, K, h, w) behind the latents of the rows of these branches; (B, K, h, w) where it is the same."""
        if self.extra is None or len(self.extra) == self.batch:
            return self.extra
        parts = self.extra.split(self.batch)
        return torch.cat([parts[branch] for branch in branches])

    @property
    def reuses(self) -> bool:
        """Whether rows reuse the deep features of earlier ones."""
        return not all(self.table.deep)

    @property
    def computes_all(self) -> bool:
        """Whether the next row computes all of the network: where its table says so, and where a branch has no deep
        features, since it was not there at the last row that computed all."""
        return self.table.deep[self.row] or not set(self.branches) <= set(self.branches_kept)

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
        return self.batch * max(map(len, self.table_branches))

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
                noise_level=self.noise_level,
                labels=None if self.labels is None else of(k, self.labels),
                vectors=None if self.vectors is None else of(k, self.vectors),
                gradient=None if self.gradient is None else self.gradient.image(k),
            )
            for k in range(self.batch)
        )


@torch.no_grad()
def denoise(
    network: Network, run: Run, *, on_step: Callable[[int, float, Tensor], Tensor | None] | None = None
) -> Tensor:
    """Take all steps of a run: (B, C, h, w) float32 latents at the table's end. This defines what is correct.

    network: (model input in `run.dtype`, row of the table, its branches) -> its output. The input has B rows for each
        of the branches.
    on_step: called after each row with (row, timestep, latents); a tensor that it returns replaces the latents.

    Raises NonFinite naming the first step whose latents held NaN or infinity; it is looked for once, at the end.
    """
    state = State(run)
    for i, branches in enumerate(run.table_branches):
        added = added_output(run, i, state.x, network)
        state.end(i, network(state.input(i), i, branches), added)
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
        self.deep: dict[int, Tensor] = {}  # of each branch its deep features at the last row that computed all
        self.y = torch.zeros_like(self.x) if run.table.anchored else None
        self.average: Tensor | None = None  # of projected guidance with momentum
        self.history: tuple[Tensor, ...] = ()
        # Not finite when one value is not: one small reduction a step, read once after the loop.
        self.sums = [self.x.sum() if run.extra is None else self.x.sum() + run.extra.sum(dtype=torch.float32)]

    def input(self, i: int) -> Tensor:
        """What the network sees at row i: (B for each of its branches, C + K, h, w)."""
        run = self.run
        branches = run.table_branches[i]
        return model_input(self.x, float(run.table.rows[i, 0]), run.dtype, len(branches), run.extra_of(branches))

    def end(self, i: int, out: Tensor, added: Tensor | None = None) -> None:
        """Row i, with the network's output. added: of `added_output`."""
        run = self.run
        if run.guidance is not self._guidance:  # a callback's
            self._guide()
        row, channels, branches, rest = self._rows[i], self.x.shape[1], run.table_branches[i], {}
        outs = dict(zip(branches, out.chunk(len(branches)), strict=True))
        if out.shape[1] > channels:
            rest["variance"] = outs[1][:, channels : 2 * channels].float()
            outs = {branch: own[:, :channels] for branch, own in outs.items()}
        if 0 in outs and run.table.rare:
            rest["difference"] = outs[1].float() - outs[0].float()
        projected, projection, weights = None, run.guidance.projection, row[W0 : W0 + BRANCHES]
        if 0 in outs and projection is not None:
            scale = weights[1] - projection.from_guided
            projected, difference = project(outs[0], outs[1], scale, projection, self.average)
            self.average = difference if projection.momentum else self.average
        out = guide(outs, weights, run.guidance.rescales, projected=projected)
        out = out.float() if added is None else out.float() + added
        args = (row, self.x, self.y, self.history, out, run.noises[i])
        x, self.y, self.history = step(*args, depth=self.depth, threshold=run.table.threshold, **rest)
        if run.inpainting is not None:
            x = blend(row, x, run.inpainting.mask, run.inpainting.init, run.inpainting.noise)
        self.x = x
        self.sums.append(x.sum())

    def _guide(self) -> None:
        """The table with the weights of the run's guidance."""
        self._guidance, table = self.run.guidance, self.run.table
        self._rows = table_rows(table.rows, table.draws, self.run.table_weights).tolist()

    def go_on_from(self, latents: Tensor) -> None:
        """Go on from other latents."""
        self.x = send(latents, self.x.device, self.x.dtype)

    def first_bad(self) -> int | None:
        """The first row that left NaN or infinity, -1 for the start. Waits for the device."""
        finite = torch.stack(self.sums).isfinite().tolist()
        return None if all(finite) else finite.index(False) - 1


# -------------------------------------------------------------------------------------------- guidance by gradient

_PROMPT = (1,)


def added_output(run: Run, i: int, x: Tensor, network: Network) -> Tensor | None:
    """What the gradient of a run adds to the network's output at row i, (B, C, h, w) float32, see `gradient`; None
    where it adds nothing. x (B, C, h, w): the latents. network: as of `denoise`, for autograd.

    Raises what `Gradient` does, with the step.
    """
    guidance, table = run.guidance, run.table
    if run.gradient is None or not guidance.start <= table.index[i] / table.steps < guidance.end:
        return None
    level, timestep = table.levels[i], float(table.timesteps[i])
    if level.gain == 0:
        return None

    def denoised(u: Tensor) -> Tensor:
        model_output = network(model_input(u, 1.0, run.dtype, 1, run.extra_of(_PROMPT)), i, _PROMPT)
        return level.skip * u + level.gain * model_output[:, : u.shape[1]].float()  # learned variance is behind

    with torch.inference_mode(False), torch.enable_grad():
        u = x.clone() * float(table.rows[i, 0])  # a copy: the caller's function may write into it
        try:
            moved = run.gradient(At(u, u.new_full((len(u),), timestep), i, level, denoised))
        except (InputError, NonFinite) as error:
            where = f"at step {table.index[i] + 1} of {table.steps} (timestep {timestep:g})"
            raise type(error)(f"{run.gradient.name} {where}: {error}") from error
    return None if moved is None else moved / level.gain


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
