"""Request: names, defaults, and one clear error for each thing that can be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastldm import InputError, Request
from fastldm.request import picture_seeds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 3}, "prompt is 3: expected a text"),
        ({"prompt": ["a", None]}, "expected a text or a list of texts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "1 texts for 2 prompts"),
        ({"prompt": "a", "height": 0}, "height is 0"),
        ({"prompt": "a", "width": -64}, "width is -64"),
        ({"prompt": "a", "height": 64.5}, "height is 64.5"),
        (
            {"prompt": "a", "num_inference_steps": 0},
            "num_inference_steps is 0: expected a whole number of steps, 1 to 10000",
        ),
        ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps is True"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "a", "guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"prompt": "a", "guidance_rescale": 1.5}, "guidance_rescale is 1.5: expected a number from 0 to 1"),
        ({"prompt": "a", "guidance_interval": (0.8, 0.2)}, "0 <= start <= end <= 1"),
        ({"prompt": "a", "strength": 1.01}, "strength is 1.01"),
        ({"prompt": "a", "denoising_end": 1.0}, "denoising_end is 1: expected a fraction above 0 and below 1"),
        ({"prompt": "a", "denoising_start": 0.5}, "denoising_start was given without image"),
        (
            {"prompt": "a", "image": "a.png", "denoising_start": 0.5, "denoising_end": 0.4},
            "denoising_start is 0.5 and denoising_end 0.4: expected a later end",
        ),
        ({"prompt": "a", "output_type": "jpg"}, "expected one of pil, np, pt, latent"),
        ({"prompt": "a", "mask_image": "m.png"}, "mask_image was given without image"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "seed": 2**63}, "expected a whole number from 0 to 2"),
        ({"prompt": "a", "seed": [1, 2]}, "list of 2 for 1 images"),
        ({"prompt": "a", "seed": 1, "generator": object()}, "seed and generator were both given"),
        ({"prompt": "a", "timesteps": [1], "sigmas": [1.0]}, "timesteps and sigmas were both given"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "clip_skip": -1}, "clip_skip is -1"),
        ({"prompt": "a", "num_inference_step": 4}, "did you mean 'num_inference_steps'?"),
        ({"prompt": "a", "zzz": 4}, "unknown argument 'zzz': known are: prompt, "),
    ],
)
def test_bad_input_shows_value_and_expectation(options: dict, message: str) -> None:
    options = dict(options)
    with pytest.raises(InputError) as caught:
        Request.of(options.pop("prompt", None), options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_an_empty_prompt_is_fine() -> None:
    assert Request(prompt="").prompts == [""]


def test_prompts_repeat_in_diffusers_order() -> None:
    request = Request(prompt=["a", "b"], negative_prompt=["x", "y"], num_images_per_prompt=2)
    assert request.prompts == ["a", "a", "b", "b"]
    assert request.negative_prompts == ["x", "x", "y", "y"]
    assert Request(prompt=["a", "b"], negative_prompt="x").negative_prompts == ["x", "x"]


def test_seeds_count_up_or_are_listed() -> None:
    assert picture_seeds(Request(prompt=["a", "b", "c"], seed=7)) == (7, 8, 9)
    assert picture_seeds(Request(prompt=["a", "b"], seed=np.array([5, 3]).tolist())) == (5, 3)
    assert picture_seeds(Request(prompt="a", seed=np.int64(4))) == (4,)
    drawn = {picture_seeds(Request(prompt="a")) for _ in range(4)}
    assert len(drawn) > 1, "without a seed every call draws a fresh one"


def test_changed_request_is_checked_again() -> None:
    request = Request(prompt="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.height = 3  # type: ignore[misc]
    with pytest.raises(InputError):
        request.replace(height=-1)


def test_a_request_with_some_fields_changed() -> None:
    request = Request(prompt="a cat", seed=3)
    assert Request.of(request, {"seed": 4}) == request.replace(seed=4)
    with pytest.raises(InputError, match="unknown argument 'sed': did you mean 'seed'"):
        Request.of(request, {"sed": 4})
