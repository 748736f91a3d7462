"""Pictures in and out: every form a caller may give, what files carry, and what is found before any work starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm import InputError, Request
from fastldm.image import (
    image_size,
    load_image,
    load_mask,
    output_paths,
    parameters_text,
    save_image,
    to_images,
    to_pixels,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)  # not square: swapped axes show


def test_every_form_of_a_picture_is_the_same_tensor(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    floats = pixels.astype(np.float32) / 255
    expected = torch.from_numpy(floats).movedim(-1, 0)[None] * 2 - 1  # (1, 3, 6, 10)
    forms = [
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        floats,
        pixels[None],
        torch.from_numpy(floats).movedim(-1, 0),
        [pixels],
    ]
    for form in forms:
        loaded = load_image(form)
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, expected, atol=1e-6, rtol=0)
        assert image_size(form) == (6, 10)
    assert load_image([pixels, pixels]).shape == (2, 3, 6, 10)


def test_there_and_back(pixels: np.ndarray) -> None:
    decoded = load_image(pixels)
    assert np.array_equal(np.asarray(to_images(to_pixels(decoded, "pil"), "pil")[0]), pixels)
    np.testing.assert_allclose(to_images(to_pixels(decoded, "np"), "np")[0], pixels / 255, atol=1e-6)
    assert to_images(to_pixels(decoded, "pt"), "pt").shape == (1, 3, 6, 10)


def test_what_lies_under_transparency_is_white() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(hidden).min() == 1.0


def test_resizing_takes_height_then_width(pixels: np.ndarray) -> None:
    for form in (Image.fromarray(pixels), pixels):
        assert load_image(form, (16, 24)).shape == (1, 3, 16, 24)
        assert load_mask(form, (16, 24)).shape == (1, 1, 16, 24)


def test_a_mask_is_zeros_and_ones() -> None:
    mask = load_mask(np.array([[0.0, 0.49], [0.5, 1.0]], np.float32))
    assert mask.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.png", "there is no file 'nowhere.png'"),
        (3, "image is a int: expected"),
        ([], "image is an empty list"),
        (np.zeros((4, 4, 2), np.float32), "shape (4, 4, 2)"),
        (np.full((4, 4, 3), 7.0), "values from 7 to 7: expected 0 to 1"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 8, 3))], "different sizes"),
        (__file__, "cannot be read as a picture"),
    ],
)
def test_bad_pictures(source: object, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(source)
    assert says in str(caught.value)


def test_the_png_says_how_it_was_made(tmp_path: Path) -> None:
    request = Request(
        prompt="a cat, 猫",
        negative_prompt="dog",
        num_inference_steps=8,
        sampler="ddim",
        guidance_scale=2.5,
        height=64,
        width=96,
        seed=3,
    )
    text = parameters_text(request, 3, "default", {"Version": "x"})
    assert text == (
        "a cat, 猫\nNegative prompt: dog\n"
        "Steps: 8, Sampler: ddim, CFG scale: 2.5, Seed: 3, Size: 96x64, Model: default, Version: x"
    )
    save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", text)
    with Image.open(tmp_path / "a.png") as back:
        assert back.info["parameters"] == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"], "no temporary file stays behind"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save(self, file: object, *_: object, **__: object) -> None:
            file.write(b"half")  # type: ignore[attr-defined]
            raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"before")
    with pytest.raises(OSError, match="disk full"):
        save_image(Broken(), tmp_path / "a.png")  # type: ignore[arg-type]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"before")]


def test_output_paths(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]
    assert [p.name for p in output_paths(tmp_path / "a.png", 3)] == ["a-0.png", "a-1.png", "a-2.png"]
    (tmp_path / "a-1.png").touch()
    with pytest.raises(InputError, match="exists"):
        output_paths(tmp_path / "a.png", 3)
    assert len(output_paths(tmp_path / "a.png", 3, force=True)) == 3
    with pytest.raises(InputError, match="does not exist"):
        output_paths(tmp_path / "no" / "a.png", 1)
    with pytest.raises(InputError, match="picture format"):
        output_paths(tmp_path / "a", 1)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(InputError, match="exists"):
        output_paths(tmp_path / "d.png", 1, force=True)
