"""Requests of the families beside Stable Diffusion in one session, many at once: each picture is the one that its seed
makes alone, whoever shares its steps, is cancelled, or comes too late."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from typing import Any

import all_families
import numpy as np
import pytest
import torch
from PIL import Image

from fastldm import Cancelled, DeadlineExceeded, Pipeline, Session
from fastldm.runtime.complete import sample_request

FEW = ("consistency", "ldm-super-resolution")
EACH = [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in all_families.MAKERS]


def picture(seed: int) -> Image.Image:
    return Image.effect_noise((32, 32), 60 + seed).convert("RGB")


def mixed(pipe: Pipeline) -> list[dict[str, Any]]:
    """Requests with other prompts, pictures, vectors, classes, noise levels, guidance, counts and steps."""
    spec = pipe.stages.spec
    sample = sample_request(spec)
    requests: list[dict[str, Any]] = []
    for k in range(5):
        own: dict[str, Any] = {**sample, "seed": 10 * k, "num_inference_steps": 2 + k % 3, "output_type": "np"}
        if sample["prompt"]:
            own["prompt"] = ("a cat", "two dogs", "a photo of a squirrel", "", "cats")[k]
        if "image" in sample and spec.vision is None:
            own["image"] = picture(k) if "mask_image" not in sample else own["image"]
        if "image_embeds" in sample:
            g = torch.Generator().manual_seed(k)
            names = ("image_embeds", "negative_image_embeds")
            own |= {name: torch.randn(1, spec.unet.text_width, generator=g) for name in names}
        if spec.low_res is not None:
            own["noise_level"] = 100 * k
        if spec.unet.needs_label:
            own["class_labels"] = k
        if spec.conditioned and k == 1:
            own["guidance_scale"] = 1.0
        if k == 3:
            own["num_images_per_prompt"] = 2
        requests.append(own)
    return requests


@pytest.mark.parametrize("name", EACH)
def test_mixed_requests_are_those_made_alone(name: str) -> None:
    """One is cancelled and one is late, and both tell of their steps; the others do not notice."""
    pipe = Pipeline.from_diffusers(all_families.MAKERS[name]())
    requests = mixed(pipe)
    alone = [np.asarray(pipe(**each).images) for each in requests]
    assert np.abs(alone[0] - alone[2]).max() > 1e-2, "requests that are alike would show nothing"
    with Session(pipe, max_batch=4) as session:
        late = session.submit(**{**requests[0], "num_inference_steps": 40}, deadline=0.001)
        cancelled = session.submit(**{**requests[2], "num_inference_steps": 40})
        together = [session.submit(**each) for each in requests]
        cancelled.cancel()
        told = list(together[-1].progress())
        for generation, expected, each in zip(together, alone, requests, strict=True):
            made = np.asarray(generation.result().images)
            assert made.shape == expected.shape
            assert np.abs(made - expected).max() < 2e-3, each
        with pytest.raises(DeadlineExceeded):
            late.result()
        with pytest.raises((Cancelled, CancelledError)):  # under way, or while it waited
            cancelled.result()
        assert [step.step for step in told] == list(range(told[-1].steps))
        until = time.monotonic() + 30
        while (stats := session.stats()).running + stats.waiting:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in all_families.MAKERS if name != "kandinsky"])
def test_callbacks_see_each_step(name: str) -> None:
    """They see latents and may end a request; its seed's picture is the same with one that changes nothing."""
    pipe = Pipeline.from_diffusers(all_families.MAKERS[name]())
    request = {**mixed(pipe)[2], "num_inference_steps": 3}
    seen: list[int] = []

    def look(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert torch.isfinite(tensors["latents"]).all()
        seen.append(step)
        return {}

    expected = np.asarray(pipe(**request).images)
    made = np.asarray(pipe(**request, callback_on_step_end=look).images)
    assert np.array_equal(made, expected)
    assert seen
    assert seen == list(range(len(seen)))
