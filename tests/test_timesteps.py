"""A caller's own timesteps between, below and beyond those of training: diffusers' schedulers judge."""

from __future__ import annotations

import diffusers
import ops
import pytest
import tiny
import torch
from torch import Tensor

from fastldm import Pipeline
from fastldm.errors import InputError
from fastldm.runtime.denoise import Run, denoise
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.table import make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x) + torch.sin(x + t / 300)


@pytest.mark.parametrize("timesteps", [[759.5, 500.25, 100.75], [700, 300, -5], [1200, 700, 300], [1000.5, 400, -0.5]])
@pytest.mark.parametrize("name", CLASSES)
def test_timesteps_equal_diffusers(name: str, timesteps: list[float]) -> None:
    options = {"_class_name": name, **SD}
    table = make_table(read_scheduler(options, None, "a file"), 3, timesteps=timesteps)
    noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    run = Run(table, noise * table.init_noise_sigma, [None] * len(table))
    got = denoise(lambda u, i, _: network(u, float(table.timesteps[i])), run)
    scheduler = getattr(diffusers, name).from_config(options)
    scheduler.set_timesteps(timesteps=timesteps)
    assert table.timesteps.tolist() == [float(t) for t in scheduler.timesteps]
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
    assert ops.error(got, x) < 2e-5


def test_freeu_is_refused_by_name() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    with pytest.raises(InputError, match=r"enable_freeu\(0.9, 0.2, 1.5, 1.6\) is not supported: .* Fourier"):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    pipe.disable_freeu()
