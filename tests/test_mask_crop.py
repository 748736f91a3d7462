"""Repainting around the mask alone: diffusers' image processor judges the pixels, its pipelines the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import controls
import diffusers
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from pairs import Pairs, generator
from PIL import Image

from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.mask_crop import mask_crop

BOXES = [(30, 20, 50, 41), (0, 0, 9, 70), (70, 5, 80, 12), (2, 30, 78, 34), (0, 0, 80, 72), (40, 40, 41, 41)]


def picture(seed: int = 0, size: tuple[int, int] = (80, 72)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int] = (80, 72), white: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(white, box)
    return mask


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 88)])
@pytest.mark.parametrize("padding", [0, 3, 32])
def test_pixels_are_diffusers(size: tuple[int, int], padding: int) -> None:
    """The region, what is cut out of picture and mask, and the overlay, with a soft mask too."""
    processor = VaeImageProcessor()
    width, height = size
    for box in BOXES:
        for mask in (mask_of(box), mask_of(box, white=90)):
            request = Request(
                "a cat", image=picture(), mask_image=mask, padding_mask_crop=padding, width=width, height=height
            )
            crop = mask_crop(request)
            assert crop is not None
            assert crop.box == processor.get_crop_region(mask, width, height, pad=padding)
            for ours, source in ((crop.cut(crop.image), picture()), (crop.cut(crop.mask), mask)):
                theirs = processor.resize(source.crop(crop.box), height, width, resize_mode="fill")
                np.testing.assert_array_equal(np.asarray(ours.convert("RGB")), np.asarray(theirs))
            repainted = picture(1, size)
            theirs = processor.apply_overlay(mask, picture(), repainted, crop.box)
            np.testing.assert_array_equal(np.asarray(crop.overlay(repainted)), np.asarray(theirs))
            untouched = np.asarray(mask) == 0
            np.testing.assert_array_equal(
                np.asarray(crop.overlay(repainted))[untouched], np.asarray(picture())[untouched]
            )


OPTIONS: dict[str, Any] = {
    **{"prompt": ["a cat", "a dog"], "num_inference_steps": 3, "guidance_scale": 4.0, "strength": 0.8},
    **{"height": 64, "width": 64, "padding_mask_crop": 5, "mask_image": mask_of((30, 20, 50, 41))},
}


def agree(ours: Pipeline, peer: Any, **options: Any) -> None:
    peer.set_progress_bar_config(disable=True)
    peer.scheduler = diffusers.DDIMScheduler.from_config({**peer.scheduler.config, "clip_sample": False})
    options = {**OPTIONS, "image": picture(), **options}
    mine = ours(**options, sampler="ddim", generator=generator()).images
    theirs = peer(**options, generator=generator()).images
    assert [image.size for image in mine] == [(80, 72)] * 2
    for a, b in zip(mine, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 2


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs()


@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint", pytest.param("sdxl", marks=pytest.mark.full)])
def test_pictures_are_diffusers(pipes: Pairs, family: str) -> None:
    theirs, ours = pipes(family)
    cls = diffusers.StableDiffusionXLInpaintPipeline if family == "sdxl" else diffusers.StableDiffusionInpaintPipeline
    checker = {} if family == "sdxl" else {"requires_safety_checker": False}
    agree(ours, cls(**theirs.components, **checker))


@pytest.mark.full
def test_controlled_pictures_are_diffusers(pipes: Pairs) -> None:
    """The control's picture is cut as the other two are."""
    theirs, _ = pipes("sd1")
    network = controls.controlnet("sd1")
    parts = {**theirs.components, "requires_safety_checker": False}
    peer = diffusers.StableDiffusionControlNetInpaintPipeline(**parts, controlnet=network)
    ours = Pipeline.from_diffusers(peer)
    agree(ours, peer, control_image=picture(3), controlnet_conditioning_scale=1.0)
    with pytest.raises(InputError, match="control_image is 64x64: expected 80x72 as image"):
        ours(**OPTIONS, image=picture(), control_image=picture(3, (64, 64)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_image": None}, "padding_mask_crop is for inpainting: give image and mask_image"),
        ({"output_type": "np"}, "padding_mask_crop gives PIL images, and output_type is 'np'"),
        ({"image": np.zeros((72, 80, 3), np.uint8)}, "image is a ndarray: expected one PIL image or a path"),
        ({"mask_image": mask_of((0, 0, 9, 9), (64, 64))}, "mask_image is 64x64: expected 80x72 as image"),
        ({"mask_image": mask_of((0, 0, 0, 0))}, "mask_image is black: with padding_mask_crop, something has to be"),
        ({"padding_mask_crop": -1}, "padding_mask_crop is -1: expected a whole number of pixels, 0 to"),
    ],
)
def test_what_cannot_be_cropped_is_refused(pipes: Pairs, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipes("sd1")[1](**{**OPTIONS, "image": picture(), **changes})


def test_files_are_read_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture().save(tmp_path / "turned.png", exif=turned)
    mask_of((10, 20, 30, 40), (72, 80)).save(tmp_path / "mask.png")
    paths = {"image": str(tmp_path / "turned.png"), "mask_image": tmp_path / "mask.png"}
    crop = mask_crop(Request("a cat", **paths, padding_mask_crop=2, width=64, height=64))
    assert crop is not None
    assert crop.image.size == crop.mask.size == (72, 80)
