"""The denoising loop: for one run `denoise`, which defines correct, and batches for many that take steps together.

One call of the network and one end of a step for each row of a run's table. Nothing in the loop waits for the device or
looks at a value: coefficients and flags were known before it began, as Python numbers or in device memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import spans
from fastldm.adapters.selection import NONE, Selection
from fastldm.device import send, send_numbers
from fastldm.errors import InputError, NonFinite
from fastldm.kernels.lora import Group, Rows, ScaledPages
from fastldm.kernels.step import blend, guide, model_input, step
from fastldm.models.controlnet import ControlNet
from fastldm.models.unet import Features, Pictures, Residuals
from fastldm.runtime.controls import RunControl, RunFeatures, evaluate
from fastldm.runtime.pages import Applied
from fastldm.samplers.table import StepTable

if TYPE_CHECKING:
    from fastldm.models.interfaces import Denoiser

Network = Callable[[Tensor, int, bool], Tensor]
PicturesKV = tuple[tuple[Tensor | None, ...], ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. A scale of at most 1 is one pass of the network, not two."""

    scale: float = 1.0
    rescale: float = 0.0  # 0 none, 1 the deviation of the conditional branch
    start: float = 0.0  # guided from this fraction of the steps on ...
    end: float = 1.0  # ... and before this one

    def guides(self, table: StepTable, row: int) -> bool:
        """Whether a row of the table is guided."""
        return self.scale > 1 and self.start <= table.index[row] / table.steps < self.end

    def rows(self, table: StepTable) -> list[bool]:
        """Whether each row of the table is."""
        return [self.guides(table, row) for row in range(len(table))]


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
    extra: Tensor | None = None  # (B, K, h, w) in `dtype`: what an inpainting model sees behind the latents
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
                None if self.extra is None else of(k, self.extra),
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
        self.run, self.rows, self.depth = run, run.table.rows.tolist(), run.table.depth
        self.x = run.latents  # (B, C, h, w); never written in place, so that whoever was given it may keep it
        self.y = torch.zeros_like(self.x) if run.table.anchored else None
        self.history: tuple[Tensor, ...] = ()
        # Not finite when one value is not: one small reduction a step, read once after the loop.
        self.sums = [self.x.sum() if run.extra is None else self.x.sum() + run.extra.sum(dtype=torch.float32)]

    def input(self, i: int) -> Tensor:
        """What the network sees at row i: (2B, C + K, h, w) where it is guided, unconditional branch first, else B."""
        run = self.run
        branches = 2 if run.guidance.guides(run.table, i) else 1
        return model_input(self.x, self.rows[i][0], run.dtype, branches, run.extra)

    def end(self, i: int, out: Tensor) -> None:
        """Row i, with the network's output."""
        row, run = self.rows[i], self.run
        if run.guidance.guides(run.table, i):
            out = guide(out, run.guidance.scale, run.guidance.rescale)
        x, self.y, self.history = step(row, self.x, self.y, self.history, out.float(), run.noises[i], depth=self.depth)
        if run.inpainting is not None:
            x = blend(row, x, run.inpainting.mask, run.inpainting.init, run.inpainting.noise)
        self.x = x
        self.sums.append(x.sum())

    def go_on_from(self, latents: Tensor) -> None:
        """Go on from other latents."""
        self.x = send(latents, self.x.device, self.x.dtype)

    def first_bad(self) -> int | None:
        """The first row that left NaN or infinity, -1 for the start. Waits for the device."""
        finite = torch.stack(self.sums).isfinite().tolist()
        return None if all(finite) else finite.index(False) - 1


# ----------------------------------------------------------------------------------------------- many runs at once


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
        """One row of each of these runs; says what ran it, such as "torch". Where it raises, no run has moved."""

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

    def __init__(self, unet: Denoiser, backend: str = "torch", *, together: bool = True) -> None:
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
        calls = [runs] if self.together else [[run] for run in runs]
        outputs = [output for call in calls for output in self._outputs(call)]
        for run, model_output in zip(runs, outputs, strict=True):
            self._states[run].end(run.row, model_output)
            run.row += 1
        return self.backend

    def _outputs(self, runs: Sequence[Run]) -> Sequence[Tensor]:
        """The network's output for each of these runs, of one call."""
        inputs = [self._states[run].input(run.row) for run in runs]
        temb = [_rows(run.temb, run, run.guided).expand(len(x), -1) for run, x in zip(runs, inputs, strict=True)]
        text, options = self._text_of(None, [(run, run.text_kv, run.guided) for run in runs])
        # inference_mode: a step's hundreds of views cost less there
        with torch.inference_mode(), spans.span("U-Net"), _beside(self.unet, runs, inputs):
            if residuals := self._residuals(runs, inputs):
                options["residuals"] = residuals
            if features := _features(runs):
                options["features"] = features
            if pictures := _pictures(runs):
                options["pictures"] = pictures
            out = self.unet.step(_cat(inputs), _cat(temb), text, **options)
        return out.split([len(x) for x in inputs])

    def _residuals(self, runs: Sequence[Run], inputs: Sequence[Tensor]) -> list[Residuals]:
        """Of all ControlNets that act on rows of these runs; one call of each."""
        parts: dict[ControlNet, list[tuple[Run, RunControl, bool, int, Tensor]]] = {}
        first = 0
        for run, x in zip(runs, inputs, strict=True):
            for control in run.controls:
                if control.acts[run.row]:
                    guided = run.guided and not control.conditional
                    count = run.batch * (1 + guided)
                    begin = first + len(x) - count
                    parts.setdefault(control.network, []).append((run, control, guided, begin, x[-count:]))
            first += len(x)
        residuals: list[Residuals] = []
        for network, acting in parts.items():
            text, options = self._text_of(
                network, [(run, control.text_kv, guided) for run, control, guided, *_ in acting]
            )
            model_input = _cat([x for *_, x in acting])
            hint = _cat([control.hint.repeat(1 + guided, 1, 1, 1) for _, control, guided, *_ in acting])
            weights = _cat([control.weights.expand(len(x), -1) for _, control, _, _, x in acting])
            temb = _cat([_rows(control.temb, run, guided).expand(len(x), -1) for run, control, guided, _, x in acting])
            ranges = [(begin, begin + len(x)) for *_, begin, x in acting]
            residuals += evaluate(network, model_input, ranges, weights, temb, text, hint, **options)
        return residuals

    def _text_of(
        self, network: object, parts: Sequence[tuple[Run, tuple[Tensor, ...], bool]]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Keys and values of all rows of runs, guided or not, and as options of a step their lengths where they differ;
        the same tensors while the runs are the same."""
        key = [(run, guided) for run, _, guided in parts]
        known = self._texts.get(network)
        if known is None or known[0] != key:
            texts = [text if guided else tuple(kv[-run.batch :] for kv in text) for run, text, guided in parts]
            known = self._texts[network] = (key, _join_texts(texts))
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


def _beside(network: Denoiser, runs: Sequence[Run], inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, the network's rows have the adapters that the runs have beside its weights."""
    if not any(run.beside for run in runs):
        return nullcontext()
    ends = list(itertools.accumulate(len(x) for x in inputs))
    groups = [Group(end - len(x), end, run.beside) for run, x, end in zip(runs, inputs, ends, strict=True)]
    nothing = torch.empty(0)
    return network.beside.having(Rows(nothing, nothing, tuple(groups)))


def _rows(temb: Tensor | None, run: Run, guided: bool) -> Tensor:
    """(1 or rows of the next step, channels)."""
    assert temb is not None
    return temb[run.row] if guided else temb[run.row][-run.batch :]


Texts = tuple[tuple[Tensor, ...], Tensor | None]


def _join_texts(texts: Sequence[tuple[Tensor, ...]]) -> Texts:
    """Keys and values of all rows, and their lengths where they differ."""
    tokens = [layers[0].shape[1] if layers else 0 for layers in texts]
    kv_len = None
    if len(set(tokens)) > 1:
        counts = [count for count, layers in zip(tokens, texts, strict=True) for _ in range(layers[0].shape[0])]
        kv_len = send_numbers(counts, torch.int32, texts[0][0].device)
    return tuple(_cat([_padded(kv, max(tokens)) for kv in layer]) for layer in zip(*texts, strict=True)), kv_len


def _features(runs: Sequence[Run]) -> list[Features]:
    """Of all T2I-Adapters that act on rows of these runs."""
    features, first = [], 0
    for run in runs:
        for _ in (0, 1) if run.guided else (1,):
            if run.features is not None and run.features.acts[run.row]:
                features.append(Features(run.features.levels, first))
            first += run.batch
    return features


def _pictures(runs: Sequence[Run]) -> list[Pictures]:
    """Of all IP-Adapters that rows of these runs have."""
    pictures, first = [], 0
    for run in runs:
        count = run.batch * (2 if run.guided else 1)
        for layers in run.pictures:
            pictures.append(Pictures(tuple(None if kv is None else kv[-count:] for kv in layers), count, first))
        first += count
    return pictures


def _padded(kv: Tensor, tokens: int) -> Tensor:
    return kv if kv.shape[1] == tokens else F.pad(kv, (0, 0, 0, tokens - kv.shape[1]))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


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
