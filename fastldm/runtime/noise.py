"""The noise of a run, drawn as diffusers draws it: all of it before the loop begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
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
    signal, noise_rate = noise_rates(config, timestep)
    return signal * x + noise_rate * noise


def noise_rates(config: ScheduleConfig, timestep: int) -> tuple[float, float]:
    """What a signal and its noise are multiplied by at a timestep of a training schedule."""
    signal = float(alphas_cumprod(config)[timestep])
    return signal**0.5, (1 - signal) ** 0.5


def draw_step_noise(
    table: StepTable, shape: Sequence[int], generators: Generators, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor | None]:
    """The noise of every row, float32 or None, in diffusers' order, drawn in `dtype` (the model's, as diffusers does)
    but where the sampler's is always float32.
    """
    noise_dtype = torch.float32 if table.float32_noise else dtype
    return [randn(shape, generators, noise_dtype, device).float() if draws else None for draws in table.draws]


def draw_brownian_noise(
    table: StepTable, shape: Sequence[int], seed: int | Sequence[int], device: torch.device | str
) -> list[Tensor | None]:
    """The noise of every row, float32 (B, ...) or None, as increments of a Brownian motion in sigma over their square
    root: those of torchsde's BrownianInterval, which diffusers' DPMSolverSDEScheduler takes.

    seed: of one motion for the whole batch, or of one for each image. Noise levels are rounded as diffusers rounds
    them, since the motion is far from smooth. InputError without torchsde.
    """
    check_torchsde()
    import torchsde

    seeds, size = ([seed], tuple(shape)) if isinstance(seed, int) else (list(seed), tuple(shape[1:]))
    if not isinstance(seed, int) and len(seeds) != shape[0]:
        raise InputError(f"noise_sampler_seed has {len(seeds)} seeds for a batch of {shape[0]}: expected one for each")
    low, high = (float(np.float32(sigma)) for sigma in table.motion)
    motions = [
        torchsde.BrownianInterval(
            t0=low, t1=high, size=size, dtype=torch.float32, entropy=own, tol=1e-6, pool_size=24, halfway_tree=True
        )
        for own in seeds
    ]
    noises: list[Tensor | None] = []
    for draws, span in zip(table.draws, table.spans, strict=True):
        if not draws:
            noises.append(None)
            continue
        first, last = torch.tensor(span[:2], dtype=torch.float32).log()
        points = (last if part == 1 else first + (last - first) * part for part in (span.begin, span.end))
        begin, end = (point.exp() for point in points)
        moved = [-motion(end, begin) for motion in motions]
        increment = moved[0] if isinstance(seed, int) else torch.stack(moved)
        noises.append(send(increment / (begin - end).sqrt(), device))
    return noises


def check_torchsde() -> None:
    """InputError unless torchsde is installed."""
    if importlib.util.find_spec("torchsde") is None:
        raise InputError(
            "noise_sampler_seed needs torchsde, whose Brownian motion diffusers takes: pip install torchsde, or leave "
            "it out, and the request's seed or generator draws"
        )
