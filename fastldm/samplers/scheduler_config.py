"""Reading scheduler_config.json: its values, checked, and the changes that diffusers' pipelines make to them.

The steps of samplers are in solvers.py and spacing.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from fastldm.checks import show
from fastldm.errors import CheckpointError, InputError
from fastldm.reading import Field, Flag, Integer, ListOf, Maybe, Number, Text, read_fields
from fastldm.samplers.classes import CLASSES, EDM_KEYS, SCHEDULERS, SIGMA_KINDS
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.spacing import SCHEDULES, alphas_cumprod, on_lambdas, on_preconditioned, on_sigmas

logger = logging.getLogger("fastldm")

_MAX_STEPS = 10**5  # of training; usually 1000
_BETA, _STEP, _NAME = Number(0, 1), Integer(0, _MAX_STEPS), Maybe(Text(100))
_SIGMA = Maybe(Number(1e-9, 1e9))
_FIELDS: dict[str, Field] = {
    "num_train_timesteps": Field(Integer(1, _MAX_STEPS)),
    "beta_start": Field(_BETA),
    "beta_end": Field(_BETA),
    "trained_betas": Field(Maybe(ListOf(_BETA, 1, _MAX_STEPS))),
    "steps_offset": Field(_STEP),
    "own_timesteps": Field(Maybe(ListOf(_STEP, 1, _MAX_STEPS))),
    "noise_scale": Field(Number(1e-3, 10)),
    "sigma_min": Field(_SIGMA),
    "sigma_max": Field(_SIGMA),
    "clip_sample_range": Field(Number(1e-6, 1e6)),
    "sigma_data": Field(Number(1e-6, 1e6)),
    "rho": Field(Number(1, 100)),
    "s_noise": Field(Number(0, 1e3)),
    "noise_sampler_seed": Field(Maybe(Integer(0, 2**63 - 1))),
    "predictor_order": Field(Integer(1, 4)),
    "corrector_order": Field(Integer(1, 4)),
    "dynamic_thresholding_ratio": Field(Number(0, 1)),
    "sample_max_value": Field(Number(1, 1e6)),
    "lambda_min_clipped": Field(Number(-math.inf, 1e3)),  # -Infinity in diffusers' files
    "solver_order": Field(Integer(1, 3)),
    "disable_corrector": Field(Maybe(ListOf(_STEP, 0, _MAX_STEPS))),
    "original_inference_steps": Field(Integer(1, _MAX_STEPS)),
    "timestep_scaling": Field(Number(0, 1e6)),
    **dict.fromkeys(
        (
            "_class_name",
            "algorithm_type",
            "beta_schedule",
            "final_sigmas_type",
            "interpolation_type",
            "prediction_type",
            "sigma_schedule",
            "solver_type",
            "timestep_spacing",
            "timestep_type",
            "variance_type",
        ),
        Field(_NAME),
    ),
    **dict.fromkeys(
        (
            "clip_denoised",
            "clip_sample",
            "euler_at_final",
            "lower_order_final",
            "predict_x0",
            "rescale_betas_zero_snr",
            "set_alpha_to_one",
            "skip_prk_steps",
            "thresholding",
            "use_clipped_model_output",
            "use_beta_sigmas",
            "use_dynamic_shifting",
            "use_exponential_sigmas",
            "use_flow_sigmas",
            "use_karras_sigmas",
            "use_lu_lambdas",
        ),
        Field(Flag()),
    ),
}

SET_LATER = "_use_default_values"  # diffusers' key: of its values, those that a pipeline has set
# Values that the classes' __init__ sets if a scheduler has the key; those of XL and LCM set none.
_TEXT_TO_IMAGE = {"steps_offset": 1, "clip_sample": False}
SET_BY_PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionImg2ImgPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionInpaintPipelineLegacy": _TEXT_TO_IMAGE,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "solver_order": (1, 2, 3),
    "predictor_order": (1, 2, 3),
    "corrector_order": (1, 2, 3, 4),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
}
_FOREIGN: dict[str, tuple[Any, ...]] = {  # other classes' values, which a class replaces by its default
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": ("deis", "dpmsolver", "dpmsolver++", "data_prediction"),
    "final_sigmas_type": ("zero",),
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # allowed values of keys of any class, and why others are not
    "variance_type": ((None, *_CHOICES["variance_type"], "fixed_large_log"), "the U-Net would predict it, not its log"),
    "use_flow_sigmas": ((None, False), "flow matching models are another family"),
    "use_dynamic_shifting": ((None, False), "flow matching models are another family"),
    "solver_p": ((None,), "a second scheduler as the predictor is no table"),
    "timestep_type": ((None, "discrete"), "only EulerDiscreteScheduler has continuous timesteps"),
    "interpolation_type": ((None, "linear"), "only EulerDiscreteScheduler has it"),
}


_THRESHOLDS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)
_NO_THRESHOLDS = (  # diffusers' other classes that have it
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


def read_scheduler(config: Mapping[str, Any], pipeline: str | None, source: str) -> ScheduleConfig:
    """Read a `scheduler_config.json` as a pipeline of the class `pipeline` uses it; None for unchanged values, as in a
    loaded pipeline. source: the file, for errors.

    CheckpointError for a class without a sampler, invalid values, and options that a table cannot represent.
    """
    config = {**config, **read_fields(config, {k: field for k, field in _FIELDS.items() if k in config}, source)}
    name = config.get("_class_name")
    defaults = SCHEDULERS[name].keys if name in SCHEDULERS else {}
    present = {**defaults, **config}
    changed = {
        key: value
        for key, value in SET_BY_PIPELINES.get(pipeline or "", {}).items()
        if key in present and present[key] != value
    }
    if changed:
        report = ", ".join(f"{key} is {value}" for key, value in changed.items())
        logger.info("%s: %s, as in diffusers' %s", source, report, pipeline)
    set_later = found if isinstance(found := config.pop(SET_LATER, ()), list) else ()
    effective = {**config, **changed}
    if defaults.get("skip_prk_steps") is False and not effective.get("skip_prk_steps", False):
        by = "its value" if "skip_prk_steps" in effective else "default"
        raise CheckpointError(
            f"{source}: 'skip_prk_steps' is False, by {by}, so that diffusers starts with Runge-Kutta, which fastldm "
            "does not, for it would need a history of 13 outputs: set it to True"
        )
    clips = "clip_sample" in defaults and bool(effective.get("clip_sample", defaults["clip_sample"]))
    try:
        result = read_config({**effective, "clip_sample": False} if clips else effective, steps_offset=None)
        if clips:
            result = replace(result, clip=float(effective.get("clip_sample_range") or 1.0))
    except InputError as error:
        raise CheckpointError(f"{source}: {error}") from error
    # Another sampler starts from the file's keys: diffusers' `from_config` drops values that were defaults.
    return replace(result, raw={k: v for k, v in effective.items() if k in config and k not in set_later})


def read_config(config: Mapping[str, Any], *, steps_offset: int | None = 1) -> ScheduleConfig:
    """Read a `scheduler_config.json`.

    `steps_offset` replaces the file's, since diffusers' Stable Diffusion pipelines always use 1; None keeps the file's.

    Raises InputError for a class without a sampler, and for values that diffusers refuses or a table cannot represent.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise InputError(f"scheduler: _class_name {show(name)} is not supported; these are: {', '.join(SCHEDULERS)}.")
    fixes = []
    if config.get("clip_sample", SCHEDULERS[name].keys.get("clip_sample", False)):
        config = {**config, "clip_sample": False}
        fixes.append("clip_sample is off")
    if steps_offset is not None and config.get("steps_offset", 0) != steps_offset:
        config = {**config, "steps_offset": steps_offset}
        fixes.append(f"steps_offset is {steps_offset}")
    if name == "PNDMScheduler" and not config.get("skip_prk_steps", False):
        fixes.append("skip_prk_steps is on (PLMS)")
    if fixes:
        logger.info("scheduler: %s, as in diffusers' latent pipelines", ", ".join(fixes))
    return config_of(name, config)


def config_of(name: str, options: Mapping[str, Any], model: ScheduleConfig | None = None) -> ScheduleConfig:
    """The configuration of a scheduler class: its defaults, and the values of its keys in `options`.

    model: the configuration of the model that is sampled, if it is another class's. One in EDM's preconditioning keeps
        it with each sampler that steps from noise level to noise level; a consistency model has its own sampler only.

    Raises as `read_config` does.
    """
    entry = CLASSES[name]
    kind = entry.model if model is None else CLASSES[model.class_name].model
    if entry.model not in ("", kind) or (kind == "consistency" and not entry.model):
        own = "a consistency model" if kind == "consistency" else "a model that is not"
        raise InputError(f"sampler: {name} is for {entry.model or 'other'} models, and this is {own}: leave it out.")
    if kind == "EDM" and entry.spacing not in (on_sigmas, on_lambdas, on_preconditioned):
        raise InputError(f"{name} steps on timesteps of training, which models in EDM's preconditioning have none of.")
    values: dict[str, Any] = {**entry.keys, **{key: value for key, value in options.items() if key in entry.keys}}
    for key, choices in {**_CHOICES, **entry.choices}.items():
        if key in values and values[key] in _FOREIGN.get(key, ()) and values[key] not in choices:
            values[key] = entry.keys[key]
        if key in values and values[key] not in choices:
            raise InputError(f"{name}: {key}={show(values[key])} is none of {', '.join(map(str, choices))}.")
    for key, (allowed, reason) in _REFUSED.items():
        if options.get(key) not in allowed and not (key in _CHOICES and key in entry.keys):
            raise InputError(f"{name}: {key}={show(options[key])} is not supported: {reason}.")
    if not (values.get("tau_func") is None or callable(values["tau_func"])):
        raise InputError(f"{name}: tau_func must be a function of the timestep, got {show(values['tau_func'])}.")
    thresholds = bool(options.get("thresholding")) and name in (*_THRESHOLDS, *_NO_THRESHOLDS)
    if thresholds and (name in _NO_THRESHOLDS or not values.get("algorithm_type", "++").endswith("++")):
        raise InputError(
            f"{name}: thresholding=True is not supported: its history is not of denoised latents, which are "
            f"thresholded; take one of {', '.join(_THRESHOLDS)}, with data prediction."
        )
    kinds = [kind for kind, key in SIGMA_KINDS.items() if values.get(key)]
    if len(kinds) > 1:
        raise InputError(f"{name}: only one kind of sigmas can be used, got {' and '.join(kinds)}.")
    values |= {
        "sigma_kind": options.get("schedule") or "".join(kinds),
        "sigma_min": options.get("sigma_min"),
        "sigma_max": options.get("sigma_max"),
    }
    if kind == "EDM":
        edm = {**EDM_KEYS, **{key: options[key] for key in EDM_KEYS if options.get(key) is not None}}
        values |= {**edm, "preconditioned": True, "sigma_kind": values["sigma_kind"] or edm["sigma_schedule"]}
        if values["sigma_kind"] in SCHEDULES:
            raise InputError(f"{values['sigma_kind']} spaces timesteps of training, which EDM's models have none of.")
    if kind == "consistency":
        values |= {key: options.get(key, default) for key, default in entry.keys.items() if key.startswith("sigma_")}
        values["clip"] = 1.0 if values["clip_denoised"] else 0.0
    for key in ("trained_betas", "disable_corrector"):  # lists, arrays of numpy or torch
        values[key] = () if values.get(key) is None else tuple(np.asarray(values[key]).tolist())
    betas, trained = len(values["trained_betas"]), values["num_train_timesteps"]
    if betas != trained and options.get("trained_betas") is not None:
        raise InputError(
            f"{name}: {betas} trained_betas for num_train_timesteps {trained}; their number must be the same."
        )
    algorithm = values.get("algorithm_type", "++")
    if not algorithm.endswith("++") and values.get("final_sigmas_type") == "zero":
        raise InputError(f"{name}: algorithm_type {show(algorithm)} needs final_sigmas_type 'sigma_min', not 'zero'.")
    if algorithm == "sde-dpmsolver" and values["solver_order"] == 3:
        raise InputError(f"{name}: algorithm_type {show(algorithm)} has no third order; set solver_order 2.")
    values |= {key: options[key] for key in ("use_clipped_model_output", "noise_scale") if key in options}
    values["own_timesteps"] = tuple(options.get("own_timesteps") or ())
    if options.get("clip_sample") and "clip_sample" in entry.keys:
        values["clip"] = float(options.get("clip_sample_range") or 1.0)
    if thresholds:
        ratio, most = options.get("dynamic_thresholding_ratio", 0.995), options.get("sample_max_value", 1.0)
        values["threshold"] = (float(ratio), float(most))
        values |= {"clip": 1.0} if "clip_sample" in entry.keys else {}  # the rows of clamped latents
    names = {f.name for f in fields(ScheduleConfig)} & set(values)
    config = ScheduleConfig(class_name=name, raw=dict(options), **{key: values[key] for key in names})
    alphas_cumprod(config)  # raises for invalid betas
    return config
