"""Autoencoders of other kinds in whole pipelines, which diffusers' judge: those whose latents have statistics of their
own, as Playground 2.5's, and asymmetric ones, whose decoder reads what is repainted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pairs import close, generator
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import CheckpointError, InputError
from fastldm.models.config import TinyVAEConfig, VAEConfig
from fastldm.models.latents import scaled, unscaled

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
        torch.testing.assert_close(unscaled(config, scaled(config, z)), z)


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


# ---- asymmetric autoencoders ----


def asymmetric(**changes: Any) -> Any:
    """A decoder that is half as wide again as the encoder, and has a layer more."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "down_block_out_channels": (8, 16, 24, 24),
        "up_block_out_channels": (12, 24, 36, 36),
        "layers_per_down_block": 1,
        "layers_per_up_block": 2,
        "norm_num_groups": 4,
    }
    return tiny.seeded(lambda: diffusers.AsymmetricAutoencoderKL(**{**config, **changes}), 3)


@pytest.fixture(scope="module")
def asymmetric_pairs() -> dict[str, tuple[Any, Pipeline]]:
    pairs = {}
    for family in ("sd1", "sd1-inpaint"):
        theirs = tiny.pipeline(family, vae=asymmetric(), scheduler=tiny.scheduler("sd1"))
        theirs.scheduler = diffusers.DDIMScheduler.from_config({**theirs.scheduler.config, "clip_sample": False})
        pairs[family] = theirs, Pipeline.from_diffusers(theirs)
    return pairs


def test_an_asymmetric_vae_draws_and_changes_pictures(asymmetric_pairs: Any, image: Image.Image) -> None:
    """Without a mask its decoder is a plain one."""
    theirs, ours = asymmetric_pairs["sd1"]
    parts = {**theirs.components, "requires_safety_checker": False}
    text = {**OPTIONS, "prompt": "a cat", "height": 64, "width": 64}
    judge = diffusers.StableDiffusionPipeline(**parts)
    close(ours(**text, generator=generator()).images, judge(**text, generator=generator()).images)
    change = {**OPTIONS, "prompt": "a cat", "image": image, "strength": 0.7}
    judge = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    close(ours(**change, generator=generator()).images, judge(**change, generator=generator()).images)


@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint"])
def test_its_decoder_reads_what_is_repainted(asymmetric_pairs: Any, image: Image.Image, family: str) -> None:
    theirs, ours = asymmetric_pairs[family]
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 16, 40, 48))
    options = {**OPTIONS, "prompt": "a cat", "image": image, "mask_image": mask, "strength": 0.7}
    options |= {"height": 64, "width": 64}
    parts = {**theirs.components, "requires_safety_checker": False}
    judge = diffusers.StableDiffusionInpaintPipeline(**parts)
    mine = ours(**options, generator=generator()).images
    close(mine, judge(**options, generator=generator()).images)
    for two in ours(**{**options, "prompt": ["a cat", "a cat"]}, seed=[1, 1]).images:  # diffusers takes one at a time
        close(two[None], ours(**options, seed=1).images)
    ours.enable_vae_tiling()
    with pytest.raises(InputError, match="decodes what is repainted as a whole, and not in tiles"):
        ours(**options)
    ours.disable_vae_tiling()


def test_an_asymmetric_vae_is_not_exported(asymmetric_pairs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the VAE is asymmetric"):
        asymmetric_pairs["sd1"][1].export(tmp_path / "bundle")


def test_widths_that_do_not_meet_are_refused() -> None:
    file = {**dict(asymmetric().config), "_class_name": "AsymmetricAutoencoderKL"}
    assert VAEConfig.from_dict(file).conditioned
    file["up_block_out_channels"] = (12, 20, 36, 36)
    with pytest.raises(
        CheckpointError, match=r"'up_block_out_channels' is \[12, 20, 36, 36\], expected \[12, 24, 36, 36\]"
    ):
        VAEConfig.from_dict(file, "vae/config.json")
