"""Families of models: which is which, and a new one as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny

import fastldm
from fastldm.errors import CheckpointError
from fastldm.models import families
from fastldm.models.config import UNetConfig
from fastldm.models.families import recognise


def scheduler_config(family: str) -> dict[str, Any]:
    """scheduler_config.json, which has the class name that a scheduler built in memory does not."""
    return json.loads(tiny.scheduler(family).to_json_string())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_families_are_recognised(name: str) -> None:
    unet = UNetConfig.from_dict(tiny.UNETS[name])
    unet = replace(unet, added_ids=5) if name == "sdxl-refiner" else unet  # as its model_index.json says
    family = recognise(unet, scheduler_config(name))
    assert family.name == {"bk-sdm": "sd1", "tiny-sd": "sd1", "ssd-1b": "sdxl"}.get(name, name)


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo", "sdxl-lightning"])
def test_zero_snr_fine_tunes_are_not_turbo_models(name: str) -> None:
    scheduler = {**scheduler_config(name), "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    unet = UNetConfig.from_dict({**tiny.UNETS[name], "cross_attention_dim": 1024})
    assert recognise(unet, scheduler).num_inference_steps >= 20


def test_a_family_is_added_by_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints load under their own pipeline's name, and run with its defaults."""
    folder = tiny.save_pipeline("sd1", tmp_path)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "DummyDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="DummyDiffusionPipeline, a pipeline that fastldm does not know"):
        fastldm.Pipeline.from_pretrained(folder)

    def matches(unet: UNetConfig, scheduler: Any) -> bool:
        return scheduler["_class_name"] == tiny.scheduler("sd1").__class__.__name__

    dummy = families.Family("dummy", 3, 1.0, matches, sampler="euler a", pipelines=("DummyDiffusionPipeline",))
    monkeypatch.setattr(families, "FAMILIES", (replace(dummy, label="dummies"), *families.FAMILIES))
    assert families.what_runs().startswith("fastldm runs Stable Diffusion 1, 2 and XL, ")
    assert families.what_runs().endswith(", dummies")
    pipe = fastldm.Pipeline.from_pretrained(folder, dtype="float32")
    result = pipe("a dummy", seed=0)
    assert pipe.family.name == "dummy"
    assert result.request.num_inference_steps == 3
    assert result.request.guidance_scale == 1.0
    assert result.request.sampler == "euler a"
