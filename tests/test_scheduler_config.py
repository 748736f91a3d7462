"""scheduler_config.json as diffusers' pipelines run with it; diffusers' own classes judge."""

from __future__ import annotations

import inspect
import json
import logging
from typing import Any

import diffusers
import pytest
import tiny
from diffusers import schedulers as diffusers_schedulers

from fastldm.errors import CheckpointError, InputError
from fastldm.samplers.classes import DIFFUSERS
from fastldm.samplers.scheduler_config import SET_BY_PIPELINES, read_config, read_scheduler

PIPELINES = (
    *(name for name in SET_BY_PIPELINES if hasattr(diffusers, name)),
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)


def components_of(xl: bool) -> dict[str, Any]:
    return {k: v for k, v in tiny.pipeline("sdxl" if xl else "sd1").components.items() if k != "image_encoder"}


@pytest.fixture(scope="module")
def components() -> dict[bool, dict[str, Any]]:
    return {xl: components_of(xl) for xl in (False, True)}


def as_file(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


CLIP = {"clip_sample": True}
VALUES = ({}, {"steps_offset": 0}, CLIP, {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True})


CLIPPED_BY_NAME = tuple(name for name in DIFFUSERS if "clip_denoised" not in DIFFUSERS[name].keys)
FEW = ("DDIMScheduler", "LCMScheduler", "PNDMScheduler", "DPMSolverSinglestepScheduler")


@pytest.mark.parametrize("schedulers", [FEW, pytest.param(CLIPPED_BY_NAME, marks=pytest.mark.full)], ids=["few", "all"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_sets_what_diffusers_class_sets(
    pipeline: str, schedulers: tuple[str, ...], components: dict[bool, dict[str, Any]]
) -> None:
    """For every scheduler class, with keys missing and with their values: what diffusers' __init__ leaves of them."""
    cls = getattr(diffusers, pipeline)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    arguments = components["XL" in pipeline] | ({} if "XL" in pipeline else options)
    for name in schedulers:
        ours = DIFFUSERS[name]
        takes = inspect.signature(getattr(diffusers, name).__init__).parameters
        for values in VALUES:
            file = as_file(getattr(diffusers, name)(**{key: v for key, v in values.items() if key in takes}))
            scheduler = getattr(diffusers, name).from_config(file)
            built = cls(**{**arguments, "scheduler": scheduler}).scheduler.config
            if built.get("skip_prk_steps") is False:  # what the table of no sampler holds
                with pytest.raises(CheckpointError, match="somewhere: 'skip_prk_steps' is False, by its"):
                    read_scheduler(file, pipeline, "somewhere")
                continue
            got = read_scheduler(file, pipeline, "somewhere")
            assert got.clip == (built.get("clip_sample") is True and "clip_sample" in takes), (name, values)
            assert got.raw["steps_offset"] == built["steps_offset"] if "steps_offset" in takes else True, (
                name,
                values,
            )
            if "steps_offset" in ours.keys:
                assert got.steps_offset == built["steps_offset"], (name, values)


def test_a_loaded_pipelines_scheduler_runs_as_it_is() -> None:
    for offset in (0, 1):
        file = as_file(diffusers.EulerDiscreteScheduler(steps_offset=offset))
        assert read_scheduler(file, None, "").steps_offset == offset


def test_another_sampler_starts_from_the_files_own_keys() -> None:
    """diffusers' from_config hands on what the file says, as the pipeline has changed it, and no defaults."""
    file = {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_start": 0.00085}
    assert "steps_offset" not in read_scheduler(file, "StableDiffusionPipeline", "").raw
    raw = read_scheduler({**file, "steps_offset": 0}, "StableDiffusionPipeline", "").raw
    assert raw == {**file, "steps_offset": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatchEulerDiscreteScheduler' is not"),
        ({"_class_name": ["DDIMScheduler"]}, "'_class_name' is"),
        ({"num_train_timesteps": 10**12}, "'num_train_timesteps' is 1000000000000, expected a whole number"),
        ({"beta_end": float("nan")}, "'beta_end' is nan, expected a number from 0 to 1"),
        ({"beta_start": "0.1"}, "'beta_start' is '0.1', expected"),
        ({"trained_betas": [0.1, None]}, r"'trained_betas\[1\]' is None"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps 1000"),
        ({"prediction_type": "v"}, "prediction_type='v' is none of"),
        ({"_class_name": "TCDScheduler", "thresholding": True}, "thresholding=True is not supported"),
    ],
)
def test_bad_values_are_named_by_file_and_key(change: dict[str, Any], message: str) -> None:
    file = {"_class_name": "DDIMScheduler", "clip_sample": False}
    with pytest.raises(CheckpointError, match=f"^somewhere: .*{message}"):
        read_scheduler({**file, **change}, None, "somewhere")


BAD_CONFIGS = [
    ({"_class_name": "VQDiffusionScheduler"}, "_class_name 'VQDiffusionScheduler' is not supported; these are: DDPM"),
    ({}, "_class_name None is not supported"),
    (
        {"_class_name": "DEISMultistepScheduler", "thresholding": True},
        "thresholding=True is not supported: its history",
    ),
    ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one kind"),
    ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of epsilon, v_"),
    ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned' is none of"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned"},
        "variance_type='learned' is not supported: the U-Net would predict it, not its log",
    ),
    ({"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}, "beta_schedule='cosine' is none of linear, scaled_"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "log"}, "timestep_spacing='log' is none of"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        "needs final_sigmas_type 'sigma_min'",
    ),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_order": 3,
        },
        "has no third order",
    ),
    (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "use_flow_sigmas=True is not supported: flow",
    ),
    ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order=4 is none of 1, 2, 3"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(config)


def test_pipeline_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastldm"):
        config = read_config({"_class_name": "DDIMScheduler"})
        read_config({"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1})
    assert [r.message for r in caplog.records] == [
        "scheduler: clip_sample is off, steps_offset is 1, as in diffusers' latent pipelines"
    ]
    assert config.steps_offset == 1


def test_all_diffusers_classes_are_supported() -> None:
    """Those that diffusers says can be exchanged for one another, but for one."""
    missing = {e.name for e in diffusers_schedulers.KarrasDiffusionSchedulers} - set(DIFFUSERS)
    assert missing == {"DPMSolverSDEScheduler"}  # in FUNCTIONS
