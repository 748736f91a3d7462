"""diffusers' scheduler classes, and sampling functions of k-diffusion and ComfyUI: the solver, the spacing, the
configuration and the names of each.

To add a sampler, write its function in `solvers.py` or `k_solvers.py`, and its entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastldm.samplers import k_solvers, solvers
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.grid import Grid, SolverRow
from fastldm.samplers.spacing import (
    GridArrays,
    StepRequest,
    on_consistency,
    on_distilled_timesteps,
    on_ends,
    on_inverse_lambdas,
    on_inverse_timesteps,
    on_lambdas,
    on_preconditioned,
    on_sigmas,
    on_timesteps,
)

Options = Mapping[str, Any]  # of a configuration


@dataclass(frozen=True)
class SchedulerClass:
    """A scheduler class, or a function: its solver and spacing, and the keys of its configuration with defaults."""

    solver: Callable[[Grid], Iterator[SolverRow]]
    spacing: Callable[[ScheduleConfig, StepRequest], GridArrays]
    keys: Options
    names: Mapping[str, Options]  # of its samplers, with the options that each name sets
    aliases: Mapping[str, Options] = field(default_factory=dict)  # other names of the first of `names`
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # if they differ from scheduler_config's
    custom: tuple[str, ...] = ()  # which of `timesteps` and `sigmas` a caller may pass
    float32_noise: bool = False  # whether diffusers draws noise in float32 for models of any dtype
    cfg_pp: bool = False  # whether guidance is CFG++
    model: str = ""  # the only models that it is for: "EDM" or "consistency"
    like: str = ""  # the class by whose names it is called for such models


_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_ANY = {**_BETAS, "prediction_type": "epsilon"}
_LEADING = {**_ANY, "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {**_ANY, "timestep_spacing": "linspace", "steps_offset": 0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SIGMA_KINDS = {key.split("_")[1]: key for key in (*_SIGMAS, "use_lu_lambdas")}  # "karras" and so on
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_TWO_STAGE = {**_LINSPACE, **_SIGMAS, **_SD_BETAS}
_LCM = {"set_alpha_to_one": True, "original_inference_steps": 50, "timestep_scaling": 10.0, "clip_sample": False}
_DISTILLED = {**_ANY, **_SD_BETAS, **_LCM, "beta_schedule": "scaled_linear"}
_PNDM = {"set_alpha_to_one": False, "skip_prk_steps": False}
_HEUN = {**_TWO_STAGE, "clip_sample": False}
_ORDER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_DPM = {**_ORDER, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_DPM_KEYS = {**_LINSPACE, **_SIGMAS, **_DPM, "use_lu_lambdas": False, "euler_at_final": False}
_SINGLE_KEYS = {**_ANY, **_SIGMAS, **_DPM, "lower_order_final": False}
_UNIPC = {**_ORDER, "solver_type": "bh2", "predict_x0": True, "disable_corrector": ()}
_DEIS = {**_ORDER, "solver_type": "logrho", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
_CONTINUOUS = {"interpolation_type": "linear", "timestep_type": "discrete"}
_EULER = {**_LINSPACE, **_SIGMAS, **_CONTINUOUS, "final_sigmas_type": "zero"}
_SA_ORDER = {"predictor_order": 2, "corrector_order": 2, "lower_order_final": True, "final_sigmas_type": "sigma_min"}
_SA = {**_SA_ORDER, "algorithm_type": "data_prediction", "tau_func": None, "lambda_min_clipped": -math.inf}
_INVERSE = {**_DPM, "final_sigmas_type": "sigma_min", "euler_at_final": False}
_LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
EDM_KEYS = {**_LEVELS, "sigma_schedule": "karras", "prediction_type": "epsilon"}
"""Of EDM's models, with diffusers' defaults: whatever samples one needs these of its configuration."""
_EDM = {**EDM_KEYS, "num_train_timesteps": 1000, "final_sigmas_type": "zero"}
_EDM_DPM = {**_EDM, **_ORDER, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
_CONSISTENCY = {**_LEVELS, "num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True}
_UNCLIP = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small_log",
    "clip_sample": True,
}
_DDPM = {"variance_type": "fixed_small", "clip_sample": True}
_DDIM = {"set_alpha_to_one": True, "clip_sample": True}

_DEIS_ONLY = {"solver_type": ("logrho",), "algorithm_type": ("deis",), "final_sigmas_type": ("sigma_min",)}
_NO_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
_SINGLE = {"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")}
_MULTI = {"solver_type": ("midpoint", "heun"), "algorithm_type": (*_SINGLE["algorithm_type"], "sde-dpmsolver")}

_SA_ONLY = {"algorithm_type": ("data_prediction", "noise_prediction"), "final_sigmas_type": ("sigma_min",)}
_TO_NOISE = {"algorithm_type": ("dpmsolver", "dpmsolver++"), "final_sigmas_type": ("sigma_min",)}
_EDM_ONLY = {"sigma_schedule": ("karras", "exponential"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
_UNCLIP_ONLY = {
    "beta_schedule": ("squaredcos_cap_v2",),
    "prediction_type": ("epsilon", "sample"),
    "variance_type": ("fixed_small_log", "learned_range"),
}

_FREE = ("timesteps",)
_EITHER = ("timesteps", "sigmas")


def _dpm(order: int, algorithm: str = "dpmsolver++") -> Options:
    return {"solver_order": order, "algorithm_type": algorithm}


_MULTI_NAMES = {
    "dpm++ 2m": _dpm(2),
    "dpm++ 2m sde": _dpm(2, "sde-dpmsolver++"),
    "dpm++ 2m sde heun": {**_dpm(2, "sde-dpmsolver++"), "solver_type": "heun"},
    "dpm++ 3m": _dpm(3),
    "dpm++ 3m sde": _dpm(3, "sde-dpmsolver++"),
}
_SINGLE_NAMES = {"dpm++ 2s": _dpm(2), "dpm++ 3s": _dpm(3)}
_UNIPC_ALIASES = {"unipc bh1": {"solver_type": "bh1"}, "unipc bh2": {"solver_type": "bh2"}}

DIFFUSERS: dict[str, SchedulerClass] = {
    f"{name}Scheduler": entry
    for name, entry in {
        "DDPM": SchedulerClass(solvers.ddpm, on_timesteps, {**_LEADING, **_DDPM}, {"ddpm": {}}, custom=_FREE),
        "DDIM": SchedulerClass(solvers.ddim, on_timesteps, {**_LEADING, **_DDIM}, {"ddim": {}}),
        "PNDM": SchedulerClass(
            solvers.plms, on_timesteps, {**_LEADING, **_PNDM}, {"plms": {}}, {"pndm": {}}, choices=_NO_SAMPLE
        ),
        "EulerDiscrete": SchedulerClass(solvers.euler, on_sigmas, _EULER, {"euler": {}}, custom=_EITHER),
        "EulerAncestralDiscrete": SchedulerClass(
            solvers.euler_ancestral, on_sigmas, _LINSPACE, {"euler a": {}}, choices=_NO_SAMPLE
        ),
        "HeunDiscrete": SchedulerClass(solvers.heun, on_sigmas, _HEUN, {"heun": {}}, custom=_FREE),
        "KDPM2Discrete": SchedulerClass(solvers.dpm2, on_sigmas, _TWO_STAGE, {"dpm2": {}}, choices=_NO_SAMPLE),
        "KDPM2AncestralDiscrete": SchedulerClass(
            solvers.dpm2_ancestral, on_sigmas, _TWO_STAGE, {"dpm2 a": {}}, choices=_NO_SAMPLE
        ),
        "LMSDiscrete": SchedulerClass(solvers.lms, on_sigmas, {**_LINSPACE, **_SIGMAS}, {"lms": {}}),
        "DPMSolverMultistep": SchedulerClass(
            solvers.dpm_multistep,
            on_lambdas,
            _DPM_KEYS,
            _MULTI_NAMES,
            choices=_MULTI,
            custom=_FREE,
            float32_noise=True,
        ),
        "DPMSolverSinglestep": SchedulerClass(
            solvers.dpm_singlestep, on_lambdas, _SINGLE_KEYS, _SINGLE_NAMES, choices=_SINGLE, custom=_FREE
        ),
        "DEISMultistep": SchedulerClass(
            solvers.deis,
            on_lambdas,
            {**_LINSPACE, **_SIGMAS, **_DEIS},
            {"deis": {"algorithm_type": "deis"}},
            choices=_DEIS_ONLY,
        ),
        "UniPCMultistep": SchedulerClass(
            solvers.unipc,
            on_lambdas,
            {**_LINSPACE, **_SIGMAS, **_UNIPC},
            {"unipc": {}},
            _UNIPC_ALIASES,
            choices={"solver_type": ("bh1", "bh2")},
        ),
        "SASolver": SchedulerClass(
            solvers.sa_solver, on_lambdas, {**_LINSPACE, **_SIGMAS, **_SA}, {"sa solver": {}}, choices=_SA_ONLY
        ),
        "DDIMInverse": SchedulerClass(
            partial(solvers.ddim, inverse=True),
            on_inverse_timesteps,
            {**_LEADING, "set_alpha_to_one": True, "clip_sample": True},
            {"ddim inverse": {}},
            choices={"timestep_spacing": ("leading", "trailing")},
        ),
        "DPMSolverMultistepInverse": SchedulerClass(
            solvers.dpm_multistep,
            on_inverse_lambdas,
            {**_LINSPACE, **_SIGMAS, **_INVERSE},
            {"dpm++ 2m inverse": _dpm(2), "dpm++ 3m inverse": _dpm(3)},
            choices={**_TO_NOISE, "solver_type": ("midpoint", "heun")},
        ),
        "UnCLIP": SchedulerClass(solvers.ddpm, on_ends, _UNCLIP, {}, choices=_UNCLIP_ONLY),
        "EDMEuler": SchedulerClass(
            solvers.euler,
            on_preconditioned,
            _EDM,
            {},
            choices={**_NO_SAMPLE, **_EDM_ONLY},
            model="EDM",
            like="EulerDiscreteScheduler",
        ),
        "EDMDPMSolverMultistep": SchedulerClass(
            solvers.dpm_multistep,
            on_preconditioned,
            _EDM_DPM,
            {},
            choices={**_NO_SAMPLE, **_EDM_ONLY, "solver_type": ("midpoint", "heun")},
            model="EDM",
            like="DPMSolverMultistepScheduler",
        ),
        "CMStochasticIterative": SchedulerClass(
            solvers.consistency, on_consistency, _CONSISTENCY, {}, custom=_FREE, model="consistency"
        ),
        "LCM": SchedulerClass(solvers.lcm, on_distilled_timesteps, _DISTILLED, {"lcm": {}}, custom=_FREE),
        "TCD": SchedulerClass(solvers.tcd, on_distilled_timesteps, _DISTILLED, {"tcd": {}}, custom=_FREE),
    }.items()
}

_K = {**_LINSPACE, **_SIGMAS, **_SD_BETAS, "final_sigmas_type": "zero", "log_interpolation": True}


def _function(solver: Callable[..., Iterator[SolverRow]], name: str, *aliases: str, **options: Any) -> SchedulerClass:
    own, cfg_pp = partial(solver, **options) if options else solver, name.endswith("cfg++")
    others: dict[str, Options] = {alias: {} for alias in aliases}
    return SchedulerClass(own, on_sigmas, _K, {name: {}}, others, custom=_EITHER, cfg_pp=cfg_pp)


WITH_TORCHSDE: dict[str, SchedulerClass] = {
    "DPMSolverSDEScheduler": SchedulerClass(
        k_solvers.dpmpp_sde,
        on_sigmas,
        {**_LINSPACE, **_SIGMAS, **_SD_BETAS, "noise_sampler_seed": None},
        {},
        choices=_NO_SAMPLE,
    )
}
"""diffusers' classes that it has only where torchsde is installed."""
SCHEDULERS = {**DIFFUSERS, **WITH_TORCHSDE}
"""Those that a model's scheduler_config.json may name."""

FUNCTIONS: dict[str, SchedulerClass] = {
    f"sample_{name}": entry
    for name, entry in {
        "dpmpp_2s_ancestral": _function(k_solvers.dpmpp_2s_ancestral, "dpm++ 2s a"),
        "dpmpp_sde": _function(k_solvers.dpmpp_sde, "dpm++ sde"),
        "dpm_fast": _function(k_solvers.dpm_fast, "dpm fast"),
        "heunpp2": _function(k_solvers.heunpp2, "heun++ 2"),
        "ipndm": _function(k_solvers.ipndm, "ipndm"),
        "res_multistep": _function(k_solvers.res_multistep, "res multistep"),
        "res_multistep_ancestral": _function(k_solvers.res_multistep, "res multistep a", eta=1.0),
        "gradient_estimation": _function(k_solvers.gradient_estimation, "gradient estimation"),
        "er_sde": _function(k_solvers.er_sde, "er sde"),
        "seeds_2": _function(k_solvers.dpmpp_sde, "seeds 2", brownian=False),
        "euler_cfg_pp": _function(k_solvers.euler_cfg_pp, "euler cfg++"),
        "euler_ancestral_cfg_pp": _function(k_solvers.euler_cfg_pp, "euler a cfg++", eta=1.0),
        "dpmpp_2m_cfg_pp": _function(k_solvers.dpmpp_2m_cfg_pp, "dpm++ 2m cfg++"),
        "dpmpp_2s_ancestral_cfg_pp": _function(k_solvers.dpmpp_2s_ancestral, "dpm++ 2s a cfg++", cfg_pp=True),
        "res_multistep_cfg_pp": _function(k_solvers.res_multistep, "res multistep cfg++", cfg_pp=True),
        "res_multistep_ancestral_cfg_pp": _function(
            k_solvers.res_multistep, "res multistep a cfg++", eta=1.0, cfg_pp=True
        ),
        "gradient_estimation_cfg_pp": _function(
            k_solvers.gradient_estimation, "gradient estimation cfg++", cfg_pp=True
        ),
        "ddim_cfg_pp": SchedulerClass(
            partial(solvers.ddim, cfg_pp=True),
            on_timesteps,
            {**_LEADING, **_SD_BETAS, "set_alpha_to_one": True},
            {"ddim cfg++": {}},
            cfg_pp=True,
        ),
    }.items()
}

CLASSES = {**SCHEDULERS, **FUNCTIONS}
