"""Names of samplers, as users and other programs spell them."""

from __future__ import annotations

import pytest
from scheduler_runs import SD

from fastldm.errors import InputError
from fastldm.samplers.names import SAMPLERS, resolve_sampler
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde_gpu", "dpm++ 2m sde"),
        ("sample_dpmpp_2m", "dpm++ 2m"),
        ("dpm++ 3m sde exponential", "dpm++ 3m sde exponential"),
        ("Euler a", "euler a"),
        ("k_euler_ancestral", "euler a"),
        ("DPM2 a Karras", "dpm2 a karras"),
        ("dpm_2_ancestral", "dpm2 a"),
        ("uni_pc_bh2", "unipc"),
        ("UniPC", "unipc"),
        ("PNDM", "plms"),
        ("K_LMS", "lms"),
        ("DDIM", "ddim"),
        ("heun beta", "heun beta"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("kdpm2discrete", "KDPM2DiscreteScheduler"),
        ("DPM++ 2S a Karras", "dpm++ 2s a karras"),
        ("dpmpp_2s_ancestral", "dpm++ 2s a"),
        ("DPM++ SDE Karras", "dpm++ sde karras"),
        ("dpmpp_sde_gpu", "dpm++ sde"),
        ("DPMSolverSDEScheduler", "DPMSolverSDEScheduler"),
        ("heunpp2", "heun++ 2"),
        ("res_multistep_ancestral", "res multistep a"),
        ("gradient_estimation", "gradient estimation"),
        ("er_sde", "er sde"),
        ("seeds_2", "seeds 2"),
        ("ipndm", "ipndm"),
        ("euler_ancestral_cfg_pp", "euler a cfg++"),
        ("DPM++ 2M CFG++ Karras", "dpm++ 2m cfg++ karras"),
        ("res_multistep_ancestral_cfg_pp", "res multistep a cfg++"),
        ("DDIM CFG++", "ddim cfg++"),
        ("DPM++ 2M SGM Uniform", "dpm++ 2m sgm uniform"),
        ("euler ddim_uniform", "euler ddim uniform"),
        ("Euler a Align Your Steps", "euler a ays"),
        ("dpmpp_2m_sde kl_optimal", "dpm++ 2m sde kl optimal"),
        ("DPM++ SDE Simple", "dpm++ sde simple"),
        ("k_dpm_fast", "dpm fast"),
        ("sa_solver", "sa solver"),
        ("SASolverScheduler", "sa solver"),
        ("DDIMInverseScheduler", "ddim inverse"),
        ("dpmpp_2m_sde_heun_gpu", "dpm++ 2m sde heun"),
        ("DPM++ 2M SDE Heun Karras", "dpm++ 2m sde heun karras"),
        ("Euler Uniform", "euler normal"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert resolve_sampler(name).name == expected


def test_every_name_makes_a_table() -> None:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    for name in SAMPLERS:
        assert make_table(config, 6, sampler=name).sampler == name
        assert make_table(config, 6, sampler=SAMPLERS[name].class_name).steps == 6
    assert make_table(config, 6, sampler="dpm++ 2m sde karras").sampler == "dpm++ 2m sde karras"
    with pytest.raises(
        InputError, match=r"unknown sampler 'oiler a'. Did you mean 'euler a'\? There are: ddpm, ddim, "
    ):
        resolve_sampler("oiler a")
    with pytest.raises(InputError, match="EulerAncestralDiscreteScheduler takes no karras sigmas"):
        resolve_sampler("euler a karras")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dpm_adaptive", "it chooses each step's length by the error of the last one"),
        ("DPM adaptive Karras", "it chooses each step's length"),
        ("sa_solver_pece", "it calls the network twice a step"),
        ("Restart Karras", "it returns to more noise between its steps"),
        ("seeds_3", "of the SEEDS methods, that of two calls a step is built"),
        ("CosineDPMSolverMultistepScheduler", "its third order raises in diffusers"),
    ],
)
def test_what_no_table_holds_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"sampler '{name}' is not supported: {reason}"):
        resolve_sampler(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("euler gits", "'gits' of sampler 'euler gits' is not supported: its noise levels"),
        ("DPM++ 2M Polyexponential", "exponential: w"),
        ("DPM++ 2M Align Your Steps 32", "schedule 'ays 32' of .*: take ays, with any number of steps"),
        ("euler ays_svd", "schedule 'ays svd' of .* a model for video"),
        ("euler ays if", "schedule 'ays if' of "),
    ],
)
def test_schedules_that_are_not_here_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve_sampler(name)
