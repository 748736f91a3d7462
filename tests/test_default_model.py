"""The model that ships inside: a standard diffusers folder, small, and as good as its committed measurements say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import fastldm
from fastldm.loading import DEFAULT_MODEL

ROOT = Path(fastldm.__file__).resolve().parent.parent
GATES = ROOT / "benchmarks" / "results" / "default_model.json"


@pytest.fixture(scope="module")
def pipe() -> fastldm.Pipeline:
    return fastldm.Pipeline.default(device="cpu", dtype="float32")


def test_diffusers_loads_it_and_makes_the_same_picture(pipe: fastldm.Pipeline) -> None:
    peer = diffusers.StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np"}
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = pipe("a red apple", latents=start, **options).images
    theirs = peer("a red apple", latents=start, **options).images
    assert np.abs((ours * 255).round() - (theirs * 255).round()).max() <= 1


def test_it_is_small_and_documented() -> None:
    size = sum(path.stat().st_size for path in DEFAULT_MODEL.rglob("*") if path.is_file())
    assert size <= 40e6
    card = (DEFAULT_MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    for notice in ("Noto Emoji", "Fluent", "MIT", "Apache"):
        assert notice in card


def test_the_committed_gates_are_those_of_these_weights() -> None:
    measured = json.loads(GATES.read_text())
    weights = DEFAULT_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    name = str(weights.relative_to(DEFAULT_MODEL))
    assert measured["weights (sha256)"][name] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_its_family_is_known(pipe: fastldm.Pipeline) -> None:
    assert pipe.family.name == "small"
    result = pipe("a red apple", seed=0)
    assert (len(result.timings.steps), result.request.guidance_scale, result.images[0].size) == (8, 2.0, (64, 64))
