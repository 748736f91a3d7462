"""scheduler_config.json as diffusers' pipelines run with it; diffusers' own classes judge."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import pytest
import tiny

from fastldm.errors import CheckpointError
from fastldm.samplers.classes import CLASSES
from fastldm.samplers.scheduler_config import SET_BY_PIPELINES, read_scheduler

PIPELINES = (
    *(name for name in SET_BY_PIPELINES if hasattr(diffusers, name)),
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)


def parts(xl: bool) -> dict[str, Any]:
    return {k: v for k, v in tiny.pipeline("sdxl" if xl else "sd1").components.items() if k != "image_encoder"}


@pytest.fixture(scope="module")
def components() -> dict[bool, dict[str, Any]]:
    return {xl: parts(xl) for xl in (False, True)}


def as_file(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


CLIP = {"clip_sample": True}
VALUES = ({}, {"steps_offset": 0}, CLIP, {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True})


FEW = ("DDIMScheduler", "LCMScheduler", "PNDMScheduler", "DPMSolverSinglestepScheduler")


@pytest.mark.parametrize("schedulers", [FEW, pytest.param(tuple(CLASSES), marks=pytest.mark.full)], ids=["few", "all"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_sets_what_diffusers_class_sets(
    pipeline: str, schedulers: tuple[str, ...], components: dict[bool, dict[str, Any]]
) -> None:
    """For every scheduler class, with keys missing and with their values: what diffusers' __init__ leaves of them."""
    cls = getattr(diffusers, pipeline)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = components["XL" in pipeline] | ({} if "XL" in pipeline else options)
    for name in schedulers:
        ours = CLASSES[name]
        takes = inspect.signature(getattr(diffusers, name).__init__).parameters
        for values in VALUES:
            file = as_file(getattr(diffusers, name)(**{key: v for key, v in values.items() if key in takes}))
            scheduler = getattr(diffusers, name).from_config(file)
            built = cls(**{**parts, "scheduler": scheduler}).scheduler.config
            steps = {
                "clip_sample": built.get("clip_sample") is True,
                "skip_prk_steps": built.get("skip_prk_steps") is False,
            }
            if any(steps.values()):  # what the table of no sampler holds
                key = next(key for key, holds in steps.items() if holds)
                with pytest.raises(CheckpointError, match=f"somewhere: '{key}' is {key == 'clip_sample'}, here by its"):
                    read_scheduler(file, pipeline, "somewhere")
                continue
            got = read_scheduler(file, pipeline, "somewhere")
            assert got.given["steps_offset"] == built["steps_offset"] if "steps_offset" in takes else True, (
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
    assert "steps_offset" not in read_scheduler(file, "StableDiffusionPipeline", "").given
    given = read_scheduler({**file, "steps_offset": 0}, "StableDiffusionPipeline", "").given
    assert given == {**file, "steps_offset": 1}


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
        ({"thresholding": True}, "thresholding=True is not supported"),
    ],
)
def test_bad_values_are_named_by_file_and_key(change: dict[str, Any], message: str) -> None:
    file = {"_class_name": "DDIMScheduler", "clip_sample": False}
    with pytest.raises(CheckpointError, match=f"^somewhere: .*{message}"):
        read_scheduler({**file, **change}, None, "somewhere")
