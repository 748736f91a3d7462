"""The noise of DPM++ SDE from a seed of its own: diffusers judges, where torchsde is installed."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from pairs import Pairs, generator
from scheduler_runs import SD, SHAPE, error, network

from fastldm.errors import InputError
from fastldm.runtime.denoise import Run, denoise
from fastldm.runtime.noise import draw_brownian_noise
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table

needs_torchsde = pytest.mark.skipif(importlib.util.find_spec("torchsde") is None, reason="torchsde is not installed")
NAME = "DPMSolverSDEScheduler"
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True, "timestep_spacing": "leading"},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
)


@needs_torchsde
@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", [3, [1, 2]], ids=["one", "each"])
def test_trajectories_are_diffusers(steps: int, seed: Any) -> None:
    """Of one motion for the batch, and of one for each image."""
    for config in CONFIGS:
        theirs = getattr(diffusers, NAME).from_config({**SD, **config, "noise_sampler_seed": seed})
        theirs.set_timesteps(steps)
        start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        x = start * theirs.init_noise_sigma
        for t in theirs.timesteps:
            x = theirs.step(network(theirs.scale_model_input(x, t), t), t, x).prev_sample
        table = make_table(read_config({"_class_name": NAME, **SD, **config}), steps)
        run = Run(table, start * table.init_noise_sigma, draw_brownian_noise(table, (2, *SHAPE), seed, "cpu"))
        times = table.timesteps
        end = denoise(lambda model_input, i, _, times=times: network(model_input, times[i]), run)
        assert error(end, x) < 1e-3, config  # the last bit of a noise level moves the motion by some 1e-4


@needs_torchsde
@pytest.mark.full
@pytest.mark.parametrize("where", ["in the request", "in the model's file"])
def test_pictures_are_diffusers(where: str) -> None:
    """Whatever the request's generator: it draws the start alone."""
    seed = {"noise_sampler_seed": 11}
    theirs, _ = Pairs()("sd1")
    theirs.scheduler = getattr(diffusers, NAME).from_config(theirs.scheduler.config, **seed)
    ours = type(_).from_diffusers(theirs) if where == "in the model's file" else _
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np", "height": 64, "width": 64}
    more = {} if where == "in the model's file" else {"sampler": NAME, **seed}
    drawn, used = generator(), generator()
    mine = ours("a cat", **options, **more, generator=drawn).images
    assert np.abs(mine - theirs("a cat", **options, generator=used).images).max() < 2e-3
    assert torch.equal(drawn.get_state(), used.get_state())


def test_without_a_seed_the_generator_draws() -> None:
    table = make_table(read_config({"_class_name": NAME, **SD}), 3)
    assert table.draws == (True, True, True, True, False)
    assert table.noise_seed is None
    assert [span.sigma for span in table.spans] == [table.start[1]] * 2 + [span.sigma for span in table.spans[2:]]
    assert all(a.end == b.begin or b.begin == 0 for a, b in itertools.pairwise(table.spans))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++ 2m sde"])
def test_other_samplers_refuse_its_seed(sampler: str) -> None:
    _, ours = Pairs()("sd1")
    with pytest.raises(
        InputError, match=f"noise_sampler_seed is of the sampler dpm.. sde, and this is '.*{sampler[:3]}"
    ):
        ours("a cat", sampler=sampler, noise_sampler_seed=1, num_inference_steps=2)


def test_a_missing_package_is_named() -> None:
    table = make_table(read_config({"_class_name": NAME, **SD}), 3)
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(InputError, match="pip install"):
        draw_brownian_noise(table, (1, *SHAPE), 0, "cpu")
