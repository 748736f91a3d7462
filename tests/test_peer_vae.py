"""Autoencoders whose latents have statistics of their own, as Playground 2.5's: diffusers' pipelines of XL judge."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pairs import close, generator
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import CheckpointError
from fastldm.models import vae as autoencoders
from fastldm.models.config import TinyVAEConfig, VAEConfig

STATISTICS = {"latents_mean": (-1.6, 1.1, 0.2, -0.4), "latents_std": (8.4, 5.9, 5.1, 6.7), "scaling_factor": 0.5}
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Pipeline]:
    theirs = tiny.pipeline("sdxl", vae=tiny.vae("sdxl", **STATISTICS), scheduler=diffusers.EDMEulerScheduler())
    return theirs, Pipeline.from_diffusers(theirs)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    rows, columns = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([rows * 4, columns * 4, rows ^ columns], -1).astype(np.uint8))


def peer(cls: Any, theirs: Any) -> Any:
    pipe = cls(**theirs.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_to_image_denormalizes_as_diffusers(pair: tuple[Any, Pipeline]) -> None:
    """With EDM's scheduler, as Playground 2.5 has it."""
    theirs, ours = pair
    options = {**OPTIONS, "height": 64, "width": 64, "prompt": "a cat"}
    judge = peer(diffusers.StableDiffusionXLPipeline, theirs)
    close(ours(**options, generator=generator()).images, judge(**options, generator=generator()).images)


def test_image_to_image_normalizes_as_diffusers(pair: tuple[Any, Pipeline], image: Image.Image) -> None:
    theirs, ours = pair
    options = {**OPTIONS, "prompt": "a cat", "image": image, "strength": 0.7}
    judge = peer(diffusers.StableDiffusionXLImg2ImgPipeline, theirs)
    close(ours(**options, generator=generator()).images, judge(**options, generator=generator()).images)


def test_inpainting_normalizes_both_ways(
    pair: tuple[Any, Pipeline], image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' inpainting encodes without the statistics, and decodes with them: judged with an encoding that has."""
    theirs, ours = pair
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 16, 40, 48))
    options = {**OPTIONS, "prompt": "a cat", "image": image, "mask_image": mask, "strength": 0.7}
    options |= {"height": 64, "width": 64}
    judge = peer(diffusers.StableDiffusionXLInpaintPipeline, theirs)
    encode = judge._encode_vae_image
    mean, std = (torch.tensor(STATISTICS[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    plain = judge(**options, generator=generator()).images
    monkeypatch.setattr(
        judge, "_encode_vae_image", lambda *args, **kwargs: (encode(*args, **kwargs) - mean * 0.5) / std
    )
    mine = ours(**options, generator=generator()).images
    close(mine, judge(**options, generator=generator()).images)
    assert np.abs(plain - mine).max() > 0.05


def test_statistics_are_undone() -> None:
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for config in (VAEConfig.from_dict(dict(tiny.vae("sdxl", **STATISTICS).config)), tiny_config()):
        torch.testing.assert_close(autoencoders.unscaled(config, autoencoders.scaled(config, z)), z)


def tiny_config() -> TinyVAEConfig:
    return TinyVAEConfig.from_dict(dict(tiny.tiny_vae().config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_std": None}, "'latents_std' has 0 numbers, expected 4, one for each channel"),
        ({"latents_mean": (0.0,) * 3}, "'latents_mean' has 3 numbers, expected 4"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "'latents_std[2]' is 0.0, expected a number"),
    ],
)
def test_incomplete_statistics_are_refused(changes: dict[str, Any], message: str) -> None:
    file = {**dict(tiny.vae("sdxl").config), **STATISTICS, **changes}
    with pytest.raises(CheckpointError, match=re.escape(f"vae/config.json: {message}")):
        VAEConfig.from_dict(file, "vae/config.json")
