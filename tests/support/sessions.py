"""A pipeline for the tests of sessions, requests to it, and what counts as the same result."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks import ladder
from fastldm import Pipeline


def tiny_pipeline(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Seeded random weights, 64x64 pixels of 8x8 latents; built without diffusers, which a GPU's machine may lack."""
    pipe = ladder.pipeline(ladder.MODELS["tiny"], torch.device(device), dtype)
    image = pipe("a cat", num_inference_steps=1, seed=0, output_type="np").images
    assert image.std() > 0.05, "a flat image would agree with anything"  # type: ignore[union-attr]
    return pipe


def options(seed: int = 0, steps: int = 2, **more: Any) -> dict[str, Any]:
    defaults = {"prompt": "a cat", "seed": seed, "num_inference_steps": steps, "sampler": "ddim", "output_type": "np"}
    return defaults | more


def same(actual: Any, expected: Any) -> None:
    """But for the order of sums: float32 rounding through some steps of a random network."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 2e-5
