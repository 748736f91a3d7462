"""The noise of a run, drawn as diffusers draws it: all of it before the loop begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.device import send
from fastldm.errors import InputError
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.spacing import alphas_cumprod
from fastldm.samplers.table import StepTable

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Normal noise, (B, ...), as diffusers' `randn_tensor` draws it.

    In `dtype`, on the generator's device, then moved; a list of generators draws one sample each.
    """
    if generators is None or isinstance(generators, torch.Generator):
        drawn_on = device if generators is None else generators.device
        return send(torch.randn(*shape, generator=generators, dtype=dtype, device=drawn_on), device)
    if len(generators) == 1:
        return randn(shape, generators[0], dtype, device)
    if len(generators) != shape[0]:
        raise InputError(f"{len(generators)} generators for a batch of {shape[0]}: give one, or one for each image.")
    return torch.cat([randn((1, *shape[1:]), generator, dtype, device) for generator in generators])


def add_noise(config: ScheduleConfig, x: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """x with noise of a timestep of a training schedule, as diffusers' DDPMScheduler adds it."""
    signal = float(alphas_cumprod(config)[timestep])
    return signal**0.5 * x + (1 - signal) ** 0.5 * noise


def draw_step_noise(
    table: StepTable, shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor | None]:
    """The noise of every row, float32 or None, in diffusers' order, drawn in `dtype` (the model's, as diffusers does)
    but where the sampler's is always float32.
    """
    noise_dtype = torch.float32 if table.float32_noise else dtype
    return [randn(shape, generators, noise_dtype, device).float() if draws else None for draws in table.draws]
