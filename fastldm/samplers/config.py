"""scheduler_config.json: its values, checked, and what diffusers' pipelines change of them when they are built.

How a sampler steps is in schedule.py and samplers.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastldm.errors import CheckpointError, InputError
from fastldm.reading import Field, Flag, Integer, ListOf, Maybe, Number, Text, read_fields
from fastldm.samplers.table import CLASSES, ScheduleConfig

logger = logging.getLogger("fastldm")

_MAX_STEPS = 10**5  # that a model was trained with; all there are had 1000
_BETA, _STEP, _WORD = Number(0, 1), Integer(0, _MAX_STEPS), Maybe(Text(100))
_SIGMA = Maybe(Number(1e-9, 1e9))
_FIELDS: dict[str, Field] = {
    "num_train_timesteps": Field(Integer(1, _MAX_STEPS)),
    "beta_start": Field(_BETA),
    "beta_end": Field(_BETA),
    "trained_betas": Field(Maybe(ListOf(_BETA, 1, _MAX_STEPS))),
    "steps_offset": Field(_STEP),
    "sigma_min": Field(_SIGMA),
    "sigma_max": Field(_SIGMA),
    "lambda_min_clipped": Field(Number(-math.inf, 1e3)),  # diffusers' own files say -Infinity
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
            "solver_type",
            "timestep_spacing",
            "timestep_type",
            "variance_type",
        ),
        Field(_WORD),
    ),
    **dict.fromkeys(
        (
            "clip_sample",
            "euler_at_final",
            "lower_order_final",
            "predict_x0",
            "rescale_betas_zero_snr",
            "set_alpha_to_one",
            "skip_prk_steps",
            "thresholding",
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

# What the classes' __init__ sets where a scheduler has it and another value; those of XL and LCM set nothing.
_TEXT_TO_IMAGE = {"steps_offset": 1, "clip_sample": False}
SET_BY_PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionImg2ImgPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionInpaintPipelineLegacy": _TEXT_TO_IMAGE,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
# What classes have by default that no table needs.
_ALSO_KNOWN: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": {"clip_sample": False},
    "LCMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": False},
    "TCDScheduler": {"clip_sample": False},
}


def read_scheduler(config: Mapping[str, Any], pipeline: str | None, source: str) -> ScheduleConfig:
    """A `scheduler_config.json` as a pipeline of the class `pipeline` runs with it; None takes it as it is, as that of
    a loaded pipeline is. source: the file, for errors.

    CheckpointError for a class without a sampler, a value of the wrong kind, and what a table cannot hold.
    """
    present = {key: field for key, field in _FIELDS.items() if key in config}
    config = {**config, **read_fields(config, present, source)}
    name = config.get("_class_name")
    known = {**CLASSES[name].keys, **_ALSO_KNOWN.get(name, {})} if name in CLASSES else {}
    has = {**known, **config}
    changed = {
        key: value
        for key, value in SET_BY_PIPELINES.get(pipeline or "", {}).items()
        if key in has and has[key] != value
    }
    if changed:
        told = ", ".join(f"{key} is {value}" for key, value in changed.items())
        logger.info("%s: %s, as a %s of diffusers sets it", source, told, pipeline)
    runs = {**config, **changed}
    for key, bad, why in (("clip_sample", True, "clips latents"), ("skip_prk_steps", False, "starts with Runge-Kutta")):
        if key in known and runs.get(key, known[key]) == bad:
            raise CheckpointError(
                f"{source}: {key!r} is {bad}, here by {'its value' if key in runs else 'default'}, so that diffusers "
                f"{why}, which fastldm does not: set it to {not bad}"
            )
    try:
        read = ScheduleConfig.from_dict(runs, steps_offset=None)
    except InputError as error:
        raise CheckpointError(f"{source}: {error}") from error
    # Another sampler starts from the file's own keys: diffusers' `from_config` leaves away what was a default.
    return replace(read, given={key: value for key, value in runs.items() if key in config})
