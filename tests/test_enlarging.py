"""The default model at twice its size: sampled at its own, and enlarged by the model that ships for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from pairs import generator
from PIL import Image

from fastldm import Pipeline
from fastldm.cli import main
from fastldm.loading import spec as loading


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The default model with an upscaler of random weights, and that."""
    folder = tiny.save_pixel_upscaler(tmp_path_factory.mktemp("assets") / "upscaler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "UPSCALER", folder)
        yield Pipeline.default(dtype="float32", backend="torch"), Pipeline.from_pretrained("upscaler", dtype="float32")


OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


def by_hand(pipes: Any, prompt: str, seed: int, **options: Any) -> np.ndarray:
    """Both models one after the other; the seed's generator goes on."""
    base, upscaler = pipes
    draws = generator(seed)
    small = base(prompt, num_inference_steps=2, output_type="pt", generator=draws, **options).images
    return upscaler(image=small, output_type="np", generator=draws).images


def test_twice_the_size_is_enlarged(pipes: Any) -> None:
    base, upscaler = pipes
    generation = base.session.submit(["a red apple", "an owl"], width=128, height=128, seed=[5, 9], **OPTIONS)
    steps, result = list(generation.progress()), generation.result()
    assert result.images.shape == (2, 128, 128, 3)
    assert np.abs(result.images[0] - by_hand(pipes, "a red apple", 5)[0]).max() < 1e-4
    assert np.abs(result.images[1] - by_hand(pipes, "an owl", 9)[0]).max() < 1e-4
    assert (result.request.width, result.request.height, result.seeds) == (128, 128, (5, 9))
    count = 2 + upscaler.family.num_inference_steps
    assert [(step.step, step.steps) for step in steps] == [(k, count) for k in range(count)]
    assert len(result.timings.steps) == count


@pytest.mark.parametrize(
    "options",
    [
        {"width": 96, "height": 96},
        {"width": 128, "height": 128, "image": torch.zeros(1, 3, 128, 128)},
        {"width": 128, "height": 128, "output_type": "latent"},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_is_not_enlarged_is_made_at_its_size(pipes: Any, options: dict[str, Any]) -> None:
    base, _ = pipes
    request = {"num_inference_steps": 1, "strength": 1.0, "output_type": "np", "seed": 1, **options}
    assert len(base("an owl", **request).timings.steps) == 1


def test_guidance_goes_along(pipes: Any) -> None:
    base, _ = pipes
    options: dict[str, Any] = {"guidance_scale": 1.0, "negative_prompt": "blue"}
    result = base("an owl", width=128, height=128, seed=3, **OPTIONS, **options)
    assert np.abs(result.images[0] - by_hand(pipes, "an owl", 3, **options)[0]).max() < 1e-4
    assert result.request.guidance_scale == 1.0
    assert result.request.prompt == "an owl"


def test_command_enlarges(pipes: Any, tmp_path: Path) -> None:
    arguments = [
        "generate",
        "an owl",
        "--size",
        "128x128",
        "--steps",
        "1",
        "--seed",
        "2",
        "-o",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "a.png").size == (128, 128)
    again = ["generate", "-m", "upscaler", "--image", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "b.png").size == (256, 256)
