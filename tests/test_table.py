"""A sampler's table: its steps and columns, and what cannot be asked of it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from named import EXCHANGEABLE
from scheduler_judge import judge
from scheduler_runs import SD, Case

from fastldm.errors import InputError
from fastldm.kernels import step as step_kernel
from fastldm.samplers.classes import DIFFUSERS
from fastldm.samplers.grid import Churn
from fastldm.samplers.names import SAMPLERS
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import COLUMNS, NEUTRAL, make_table


def test_steps_of_a_table() -> None:
    """The user's steps, the start and the header, where samplers differ in them."""
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    euler, heun, plms = (make_table(config, 4, sampler=name) for name in ("euler", "heun", "plms"))
    assert (euler.steps, euler.index) == (4, (0, 1, 2, 3))
    assert (heun.steps, heun.index) == (4, (0, 0, 1, 1, 2, 2, 3))
    assert (plms.steps, plms.index, plms.depth, plms.anchored) == (4, (0, 0, 1, 2, 3), 3, True)
    assert make_table(config, 8, sampler="plms").depth == 4
    assert (euler.depth, euler.anchored, make_table(config, 9, sampler="unipc").depth) == (1, False, 3)
    assert make_table(config, 4, sampler="ddim").init_noise_sigma == 1.0
    assert make_table(config, 10, strength=0.35).steps == 3
    assert euler.rows.dtype == euler.timesteps.dtype == np.float32
    assert not any(make_table(config, 4, sampler="ddim").draws)
    assert all(make_table(config, 4, sampler="ddim", eta=0.1).draws)
    assert [make_table(config, 4, sampler=name).float32_noise for name in ("euler a", "dpm++ 2m sde")] == [False, True]


def test_columns_begin_with_those_of_the_kernel() -> None:
    assert step_kernel.SAMPLER == COLUMNS == (*step_kernel.COLUMNS, *NEUTRAL)


def test_reuse_says_which_rows_compute_all() -> None:
    """Rows are counted, not steps, from the first that a start from an image runs; other columns stay."""
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    plain, heun = make_table(config, 4, sampler="heun"), make_table(config, 4, sampler="heun", reuse=3)
    assert plain.deep == (True,) * 7
    assert heun.deep == (True, False, False, True, False, False, True)
    others = [k for k, name in enumerate(COLUMNS) if name != "deep"]
    assert np.array_equal(plain.rows[:, others], heun.rows[:, others])
    assert make_table(config, 10, strength=0.5, reuse=2).deep == (True, False, True, False, True)


def test_no_torch() -> None:
    code = "import sys; import fastldm.samplers.table; assert not {'torch', 'scipy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


BAD_CALLS = [
    ("ddim", {"num_inference_steps": 0}, "whole number from 1 to 1000, got 0"),
    ("ddim", {"num_inference_steps": 2.5}, "whole number from 1 to 1000, got 2.5"),
    ("ddim", {"num_inference_steps": 1001}, "whole number from 1 to 1000, got 1001"),
    ("ddim", {"strength": 0.05}, "strength 0.05 leaves none of 10 steps: take 20 steps"),
    ("ddim", {"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
    ("ddim", {"eta": -1.0}, "eta must be from 0 to 1, got -1.0"),
    ("ddim", {"reuse": 0}, "reuse must be a whole number from 1, got 0"),
    ("ddim", {"reuse": 2.5}, "reuse must be a whole number from 1, got 2.5"),
    ("ddim", {"timesteps": [999, 500]}, "DDIMScheduler takes no timesteps, here as in diffusers; these do: DDPM"),
    ("heun", {"sigmas": [1.0, 0.0]}, "takes no sigmas, here as in diffusers; these do: EulerDiscreteScheduler"),
    ("heun karras", {"timesteps": [999, 500]}, "timesteps cannot be given together with karras sigmas"),
    ("euler", {"timesteps": [500, 999]}, "timesteps must be descending"),
    ("euler", {"timesteps": []}, "timesteps must be descending and not empty"),
    ("euler", {"timesteps": [999, 500], "sigmas": [1.0, 0.0]}, "not both"),
    ("ddpm", {"timesteps": [1000, 500]}, "timesteps leave the trained timesteps, 0 to 999, and DDPMScheduler has"),
    ("lcm", {"timesteps": [500, -1]}, "timesteps leave the trained timesteps, 0 to 999, and LCMScheduler has"),
    ("lcm", {"num_inference_steps": 51}, "more than the 50 of distillation"),
]


@pytest.mark.parametrize(("sampler", "arguments", "message"), BAD_CALLS)
def test_bad_calls(sampler: str, arguments: dict[str, Any], message: str) -> None:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    with pytest.raises(InputError, match=message):
        make_table(config, **{"num_inference_steps": 10, "sampler": sampler, **arguments})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm", "tcd"])
def test_epsilon_at_zero_snr(sampler: str) -> None:
    """diffusers divides by zero here."""
    file = {"_class_name": "DDIMScheduler", **SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="epsilon prediction cannot start at zero terminal SNR"):
        make_table(read_config(file), 4, sampler=sampler)
    make_table(replace(read_config(file), prediction_type="v_prediction"), 4)


CUTS = [(0.5, None), (0.31, None), (None, 0.5), (None, 0.83), (0.2, 0.75)]


def slices_agree(name: str, spacings: Sequence[str], steps: Sequence[int], masks: Sequence[bool]) -> None:
    for spaced, n, (start, end), mask in itertools.product(spacings, steps, CUTS, masks):
        config = {**SD, "timestep_spacing": spaced} if "timestep_spacing" in DIFFUSERS[name].keys else SD
        verdict = judge(Case(name, config, n, eta=0.3, mask=mask, start=start, end=end))
        assert verdict.kind in ("agree", "differ"), (spaced, n, start, end, mask, verdict)


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_slices_are_diffusers(name: str) -> None:
    slices_agree(name, ["leading"], [7], [False])


@pytest.mark.full
@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_slices_of_all_spacings_are_diffusers(name: str) -> None:
    slices_agree(name, ["leading", "linspace", "trailing"], [7, 10], [False, True])


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpm fast" and "inverse" not in name])
def test_parts_of_a_table_have_all_steps(sampler: str) -> None:
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    whole = make_table(config, 10, sampler=sampler)
    first = make_table(config, 10, sampler=sampler, denoising_end=0.6)
    second = make_table(config, 10, sampler=sampler, denoising_start=0.6)
    cut = 1000 - 600
    assert (first.timesteps >= cut).all()
    assert set(whole.timesteps) == set(first.timesteps) | set(second.timesteps)
    assert second.timesteps[[row for row, step in enumerate(second.index) if step == 0][-1]] < cut
    assert second.depth <= whole.depth


def test_slices_without_a_step_are_refused() -> None:
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    with pytest.raises(InputError, match=r"denoising_start 0.9999 leaves none of 3 steps"):
        make_table(config, 3, denoising_start=0.9999)
    with pytest.raises(InputError, match=r"denoising_end 0.1 leaves none of 3 steps"):
        make_table(config, 3, denoising_start=0.05, denoising_end=0.1)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "CMStochasticIterativeScheduler", "DDIMInverseScheduler"])
def test_slices_of_other_timesteps_are_refused(name: str) -> None:
    """A fraction of descending timesteps of training, which these have not; nor has dpm fast a row for each."""
    with pytest.raises(InputError, match="those of sample_dpm_fast are not"):
        make_table(read_config({"_class_name": "DDIMScheduler"}), 5, sampler="dpm fast", denoising_end=0.5)
    with pytest.raises(InputError, match=f"are of descending timesteps of training, and those of {name} are not"):
        make_table(read_config({"_class_name": name}), 5, denoising_end=0.5)


# ---- models in EDM's preconditioning ----


@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("euler exponential", "EDMEulerScheduler", {"sigma_schedule": "exponential"}),
        ("dpm++ 2m sde", "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpm++ 3m", "EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_edm_models_are_sampled_by_plain_names(sampler: str, name: str, options: dict[str, Any]) -> None:
    """Whichever class the file names, with its noise levels and preconditioning."""
    own = {"sigma_min": 0.01, "sigma_max": 40.0, "rho": 5.0, "sigma_data": 0.7, "prediction_type": "v_prediction"}
    for file in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        table = make_table(read_config({"_class_name": file, **own}), 6, sampler=sampler)
        expected = make_table(read_config({"_class_name": name, **own, **options}), 6)
        np.testing.assert_array_equal(table.rows, expected.rows)
        np.testing.assert_array_equal(table.timesteps, expected.timesteps)
        assert (table.init_noise_sigma, table.float32_noise) == (expected.init_noise_sigma, expected.float32_noise)
        assert table.sampler == expected.sampler == f"{sampler.removesuffix(' exponential')} {sampler_kind(sampler)}"


def sampler_kind(sampler: str) -> str:
    return "exponential" if sampler.endswith("exponential") else "karras"


def test_a_model_is_sampled_as_it_was_trained() -> None:
    """Preconditioned, consistent, or neither."""
    plain, edm, consistent = (
        read_config({"_class_name": name})
        for name in ("DDIMScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler")
    )
    for config, sampler, message in (
        (plain, "EDMEulerScheduler", "is for EDM models, and this is a model that is not"),
        (plain, "CMStochasticIterativeScheduler", "is for consistency models"),
        (consistent, "euler", "this is a consistency model: leave it out"),
        (edm, "ddim", "steps on timesteps of training, which models in EDM's preconditioning have none of"),
        (edm, "euler simple", "simple spaces timesteps of training"),
        (edm, "CMStochasticIterativeScheduler", "is for consistency models"),
    ):
        with pytest.raises(InputError, match=message):
            make_table(config, 4, sampler=sampler)
    with pytest.raises(InputError, match="takes no timesteps"):
        make_table(edm, 4, timesteps=[3.0, 2.0])
    with pytest.raises(InputError, match="s_churn is of the sampler euler, and this is 'ddim'"):
        make_table(plain, 4, churn=Churn(1.0))
    with pytest.raises(InputError, match="goes from an image to its noise: set strength 1"):
        make_table(plain, 4, sampler="ddim inverse", strength=0.5)
