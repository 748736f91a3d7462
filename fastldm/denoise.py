"""The denoising loop.

One call of the network and one end of a step for each row of the table. Nothing in the loop waits for the device or
looks at a value: coefficients and flags were known before it began, as Python numbers or in device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastldm.errors import InputError, NonFinite
from fastldm.kernels.step import NEVER, StepState, blend, end_step, fuses, guide, model_input, step, table_rows
from fastldm.schedule import StepTable

Network = Callable[[Tensor, int, bool], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. A scale of at most 1 is one pass of the network, not two."""

    scale: float = 1.0
    rescale: float = 0.0  # 0 none, 1 the deviation of the guided half
    start: float = 0.0  # guided from this fraction of the steps on ...
    end: float = 1.0  # ... and before this one

    def rows(self, table: StepTable) -> list[bool]:
        """Whether each row of the table is guided."""
        return [self.scale > 1 and self.start <= step / table.steps < self.end for step in table.index]


@dataclass(frozen=True)
class _Inpainting:
    """Blending: what is repainted is a latent like any other, what is kept comes back at each step's noise."""

    mask: Tensor  # (B or 1, 1, h, w), 1 where to paint
    init: Tensor  # (B, C, h, w) the latents of the picture
    noise: Tensor  # (B, C, h, w) that the run began with


@torch.no_grad()
def denoise(
    network: Network,
    table: StepTable,
    latents: Tensor,
    noises: Sequence[Tensor | None],
    guidance: Guidance,
    *,
    mask: Tensor | None = None,
    init: Tensor | None = None,
    init_noise: Tensor | None = None,
    extra_channels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Run the table: (B, C, h, w) float32 latents at its start to float32 latents at its end.

    network: (model input in `dtype`, row of the table, guided) -> its output. The input of a guided row is 2B wide,
        the unconditional half first; of any other it is B wide, conditional. It is valid until the network returns.
    noises: a float32 (B, C, h, w) or None for each row, as `draw_step_noise` gives them.
    mask, init, init_noise: inpainting by blending: (B or 1, 1, h, w), 1 where to paint; the latents of the picture;
        and the noise that the run began with.
    extra_channels: (B, K, h, w), what an inpainting model sees behind the latents: mask and masked picture.
    on_step: called after each row with (row, timestep, latents); a tensor that it returns replaces the latents.

    Raises NonFinite naming the first step whose latents held NaN or infinity; it is looked for once, at the end.
    """
    inpainting = None
    if mask is not None:
        if init is None or init_noise is None:
            raise InputError(
                "a mask needs init, the latents of the picture, and init_noise, the noise the run began with."
            )
        inpainting = _Inpainting(mask, init, init_noise)
    if [noise is not None for noise in noises] != list(table.draws):
        raise InputError("the noises are not those of this table; draw them with draw_step_noise.")
    x, extra = latents.float(), None if extra_channels is None else extra_channels.to(dtype)
    guided = guidance.rows(table)
    work = _Work(table, x, noises, guidance, inpainting, extra, dtype)
    run = _Fused(work) if fuses(x) else _Eager(work)
    for i in range(len(table)):
        run.end(i, network(run.input(i), i, guided[i]))
        if on_step is not None:
            replaced = on_step(i, float(table.timesteps[i]), run.latents())
            if replaced is not None:
                run.go_on_from(i, replaced)
    _check_finite(run.first_bad(), table)
    return run.latents()


@dataclass(frozen=True)
class _Work:
    """What `denoise` was given, checked."""

    table: StepTable
    x: Tensor
    noises: Sequence[Tensor | None]
    guidance: Guidance
    inpainting: _Inpainting | None
    extra: Tensor | None
    dtype: torch.dtype


class _Eager:
    """The end of a step, function by function, on any device: what correct means."""

    def __init__(self, work: _Work) -> None:
        self.work, self.rows, self.depth = work, work.table.rows.tolist(), work.table.depth
        self.guided = work.guidance.rows(work.table)
        self.x = work.x
        self.y = torch.zeros_like(work.x) if work.table.anchored else None
        self.history: tuple[Tensor, ...] = ()
        self.sums = [
            work.x.sum()
        ]  # not finite when one value is not: one small reduction a step, read once after the loop

    def input(self, i: int) -> Tensor:
        """What the network sees at row i."""
        return model_input(self.x, self.rows[i][0], self.work.dtype, 2 if self.guided[i] else 1, self.work.extra)

    def end(self, i: int, out: Tensor) -> None:
        """Row i, with what the network said."""
        row, work = self.rows[i], self.work
        out = guide(out, work.guidance.scale, work.guidance.rescale) if self.guided[i] else out.float()
        x, self.y, self.history = step(row, self.x, self.y, self.history, out, work.noises[i], depth=self.depth)
        if work.inpainting is not None:
            x = blend(row, x, work.inpainting.mask, work.inpainting.init, work.inpainting.noise)
        self.x = x
        self.sums.append(x.sum())

    def latents(self) -> Tensor:
        """The latents as they are now, in a tensor that later steps leave alone."""
        return self.x

    def go_on_from(self, i: int, latents: Tensor) -> None:
        """Go on after row i from other latents."""
        self.x = latents.to(self.x)

    def first_bad(self) -> int | None:
        """The first row that left NaN or infinity, -1 for the start. Waits for the device."""
        finite = torch.stack(self.sums).isfinite().tolist()
        return None if all(finite) else finite.index(False) - 1


class _Fused:
    """The same in one kernel a step: each picture is a slot, and all are at the same row of the same table."""

    def __init__(self, work: _Work) -> None:
        table, x, guidance, inpainting, extra = work.table, work.x, work.guidance, work.inpainting, work.extra
        batch, channels, height, width = x.shape
        self.guided, self.c_in = guidance.rows(table), table.rows[:, 0].tolist()
        self.rescales = guidance.rescale > 0
        self.state = state = StepState.empty(
            slots=batch,
            rows=2 * batch if any(self.guided) else batch,
            channels=channels,
            height=height,
            width=width,
            steps=len(table),
            draws=sum(table.draws),
            extra_channels=0 if extra is None else extra.shape[1],
            masked=inpainting is not None,
            dtype=work.dtype,
            device=x.device,
        )
        state.x.copy_(x)
        state.table.copy_(table_rows(table.rows.tolist(), table.draws, self.guided, inpainting is not None))
        state.steps.fill_(len(table))
        state.guidance.fill_(guidance.scale)
        state.rescale.fill_(guidance.rescale)
        for at, noise in enumerate(noise for noise in work.noises if noise is not None):
            state.noise[:, at] = noise
        if inpainting is not None:
            for target, given in zip(
                (state.mask, state.init, state.init_noise),
                (inpainting.mask, inpainting.init, inpainting.noise),
                strict=True,
            ):
                target.copy_(given)
        if extra is not None:
            state.u[:, channels:] = extra.repeat(state.u.shape[0] // batch, 1, 1, 1)
        # Which rows of the network are a slot's, in a pass with both halves and in one with the prompts alone.
        slots = torch.arange(batch, dtype=torch.int32, device=x.device)
        self.halves = torch.stack((slots, slots + batch), 1)
        self.prompts = torch.stack((torch.full_like(slots, -1), slots), 1)
        self.started_finite = x.isfinite().all()
        self._write_input(0)

    def _rows(self, i: int) -> Tensor:
        return self.halves if self.guided[min(i, len(self.guided) - 1)] else self.prompts

    def _write_input(self, i: int) -> None:
        x, u = self.state.x, self.input(i)
        u[:, : x.shape[1]] = model_input(x, self.c_in[i], u.dtype, u.shape[0] // x.shape[0])

    def input(self, i: int) -> Tensor:
        return self.state.u[: (2 if self.guided[i] else 1) * self.state.x.shape[0]]

    def end(self, i: int, out: Tensor) -> None:
        state = self.state._replace(rows=self._rows(i), next_rows=self._rows(i + 1))
        end_step(out, state, rescales=self.rescales and self.guided[i])

    def latents(self) -> Tensor:
        return self.state.x.clone(memory_format=torch.contiguous_format)

    def go_on_from(self, i: int, latents: Tensor) -> None:
        self.state.x.copy_(latents)
        if i + 1 < len(self.guided):
            self._write_input(i + 1)

    def first_bad(self) -> int | None:
        if not bool(self.started_finite):
            return -1
        first = int(self.state.first_bad.min())
        return None if first == NEVER else first


def _check_finite(first: int | None, table: StepTable) -> None:
    if first is None:
        return
    if first == -1:
        raise NonFinite("the latents that denoising starts from hold NaN or infinity.")
    raise NonFinite(
        f"denoising: NaN or infinity in the latents after step {table.index[first] + 1} of {table.steps} "
        f"(row {first}, timestep {table.timesteps[first]:g}); try dtype float32 or bfloat16, or less guidance."
    )


def randn(shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Normal noise, (B, ...), as diffusers' `randn_tensor` draws it.

    In `dtype`, on the generator's device, then moved; a list of generators draws one sample each.
    """
    if generators is None or isinstance(generators, torch.Generator):
        place = device if generators is None else generators.device
        return torch.randn(*shape, generator=generators, dtype=dtype, device=place).to(device)
    if len(generators) == 1:
        return randn(shape, generators[0], dtype, device)
    if len(generators) != shape[0]:
        raise InputError(f"{len(generators)} generators for a batch of {shape[0]}: give one, or one for each image.")
    return torch.cat([randn((1, *shape[1:]), generator, dtype, device) for generator in generators])


def draw_step_noise(
    table: StepTable, shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor | None]:
    """The noise of every row, float32 or None, in diffusers' order, drawn in `dtype` (the model's, as diffusers does)
    but where the sampler's is always float32.
    """
    drawn = torch.float32 if table.float32_noise else dtype
    return [randn(shape, generators, drawn, device).float() if draws else None for draws in table.draws]
