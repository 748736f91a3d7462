"""A pipeline for the tests of sessions, requests to it, and what counts as the same result."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks import ladder
from fastldm import Pipeline


def tiny_pipeline(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Seeded random weights, 64x64 pixels of 8x8 latents; made without diffusers, which a GPU's machine may lack."""
    pipe = ladder.pipeline(ladder.MODELS["tiny"], torch.device(device), dtype)
    picture = pipe("a cat", num_inference_steps=1, seed=0, output_type="np").images
    assert picture.std() > 0.05, "a flat picture would agree with anything"  # type: ignore[union-attr]
    return pipe


def options(seed: int = 0, steps: int = 2, **more: Any) -> dict[str, Any]:
    given = {"prompt": "a cat", "seed": seed, "num_inference_steps": steps, "sampler": "ddim", "output_type": "np"}
    return given | more


def same(one: Any, other: Any) -> None:
    """But for the order of sums: float32 rounding through some steps of a random network."""
    assert one.shape == other.shape
    assert np.abs(one - other).max() < 2e-5
