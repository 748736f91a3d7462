"""The denoising loop, eager: what correct means.

One call of the network and one `kernels.step` for each row of the table. Nothing in the loop waits for the device or
looks at a value: coefficients and flags are Python numbers that were known before it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastldm.errors import InputError, NonFinite
from fastldm.kernels.step import blend, guide, model_input, step
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

    network: (model input in `dtype`, row of the table, guided) -> its output, a tensor of its own. The input of a
        guided row is 2B wide, the unconditional half first; of any other it is B wide, conditional.
    noises: a float32 (B, C, h, w) or None for each row, as `draw_noise` gives them.
    mask, init, init_noise: inpainting by blending: (B or 1, 1, h, w), 1 where to paint; the latents of the picture;
        and the noise that the run began with.
    extra_channels: (B, K, h, w), what an inpainting model sees behind the latents: mask and masked picture.
    on_step: called after each row with (row, timestep, latents); a tensor that it returns replaces the latents.

    Raises NonFinite naming the first step whose latents held NaN or infinity; it is looked for once, at the end.
    """
    if mask is not None and (init is None or init_noise is None):
        raise InputError("a mask needs init, the latents of the picture, and init_noise, the noise the run began with.")
    rows, guided, depth = table.rows.tolist(), guidance.rows(table), table.depth
    if [noise is not None for noise in noises] != list(table.draws):
        raise InputError("the noises are not those of this table; draw them with draw_noise.")
    extra = None if extra_channels is None else extra_channels.to(dtype)
    x = latents.float()
    y = torch.zeros_like(x) if table.anchored else None
    history: tuple[Tensor, ...] = ()
    sums = [x.sum()]  # not finite when one value is not: one small reduction a step, read once after the loop
    for i, row in enumerate(rows):
        out = network(model_input(x, row[0], dtype, 2 if guided[i] else 1, extra), i, guided[i])
        out = guide(out, guidance.scale, guidance.rescale) if guided[i] else out.float()
        x, y, history = step(row, x, y, history, out, noises[i], depth=depth)
        if mask is not None:
            x = blend(row, x, mask, init, init_noise)
        sums.append(x.sum())
        if on_step is not None:
            replaced = on_step(i, float(table.timesteps[i]), x)
            x = x if replaced is None else replaced.to(x)
    _check_finite(torch.stack(sums), table)
    return x


def _check_finite(sums: Tensor, table: StepTable) -> None:
    finite = sums.isfinite().tolist()
    if all(finite):
        return
    first = finite.index(False)
    if first == 0:
        raise NonFinite("the latents that denoising starts from hold NaN or infinity.")
    raise NonFinite(
        f"denoising: NaN or infinity in the latents after step {table.index[first - 1] + 1} of {table.steps} "
        f"(row {first - 1}, timestep {table.timesteps[first - 1]:g}); try dtype float32 or bfloat16, or less guidance."
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


def draw_noise(
    table: StepTable, shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, list[Tensor | None]]:
    """All of a request's noise: (what its latents start from, in float32, and `draw_step_noise`)."""
    return randn(shape, generators, dtype, device).float(), draw_step_noise(table, shape, generators, dtype, device)
