"""Images in and out: the forms a caller may give, what files carry, and what is found before any work starts."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from fastldm import InputError, Request
from fastldm.image import (
    MAX_PIXELS,
    image_size,
    load_image,
    load_latents,
    load_mask,
    measure,
    output_paths,
    parameters_text,
    save_image,
    to_images,
    to_pixels,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)  # not square: swapped axes show


def test_all_forms_of_an_image_load_the_same(pixels: np.ndarray, tmp_path: Path) -> None:
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


def test_images_survive_loading_and_converting_back(pixels: np.ndarray) -> None:
    decoded = load_image(pixels)
    assert np.array_equal(np.asarray(to_images(to_pixels(decoded, "pil"), "pil")[0]), pixels)
    np.testing.assert_allclose(to_images(to_pixels(decoded, "np"), "np")[0], pixels / 255, atol=1e-6)
    assert to_images(to_pixels(decoded, "pt"), "pt").shape == (1, 3, 6, 10)


def test_transparent_pixels_become_white() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(hidden).min() == 1.0


def test_resizing_takes_height_then_width(pixels: np.ndarray) -> None:
    for form in (Image.fromarray(pixels), pixels):
        assert load_image(form, (16, 24)).shape == (1, 3, 16, 24)
        assert load_mask(form, (16, 24)).shape == (1, 1, 16, 24)


def test_masks_become_zeros_and_ones() -> None:
    mask = load_mask(np.array([[0.0, 0.49], [0.5, 1.0]], np.float32))
    assert mask.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("source", "message"),
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
def test_bad_images_are_refused(source: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(source)
    assert message in str(caught.value)


# --- against diffusers' reader and processors


def processed(source: Any, size: tuple[int, int], mask: bool = False) -> torch.Tensor:
    from diffusers.image_processor import VaeImageProcessor

    kind = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True} if mask else {}
    processor = VaeImageProcessor(vae_scale_factor=1, **kind)
    return processor.preprocess(source, height=size[0], width=size[1]).float()


def upright(source: Any) -> Image.Image:
    from diffusers.utils import load_image as reader

    return reader(source)


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)  # RGBA


SIZES = st.sampled_from([(24, 32), (16, 16), (40, 12)])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    photo, path = scene(32, 20).convert("RGB"), str(tmp_path / "photo")
    exif = photo.getexif()
    exif[0x0112] = orientation
    photo.save(path, kind, exif=exif)
    expected = processed(upright(path), (20, 32))
    for source in (path, Image.open(path)):
        assert image_size(source) == upright(path).size[::-1]
        torch.testing.assert_close(load_image(source, (20, 32)), expected, atol=1e-6, rtol=0)
        assert load_image(source).shape[2:] == image_size(source)


def png_with_late_exif(image: Image.Image, orientation: int) -> bytes:
    """The standard lets eXIf come after the pixels, where exiftool writes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    written = io.BytesIO()
    image.save(written, "PNG")
    end = written.getvalue().rindex(b"IEND") - 4
    return written.getvalue()[:end] + chunk + written.getvalue()[end:]


def test_exif_after_png_pixels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    path.write_bytes(png_with_late_exif(scene(32, 20), 6))
    assert upright(str(path)).size == (20, 32)
    for source in (path, Image.open(path)):
        assert image_size(source) == (32, 20) == load_image(source).shape[2:]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"]),
    size=SIZES,
    seed=st.integers(0, 9),
)
def test_masks_of_every_mode_match_diffusers(mode: str, size: tuple[int, int], seed: int) -> None:
    image = scene(33, 27, seed)
    mask = image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)
    try:
        expected = processed(mask, size, mask=True)
    except ValueError:  # there is no way from LAB to grey
        with pytest.raises(InputError, match="LAB"):
            load_mask(mask, size)
        return
    assert torch.equal(load_mask(mask, size), expected)


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from(["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"]), size=SIZES, seed=st.integers(0, 9))
def test_images_of_every_mode_match_diffusers(mode: str, size: tuple[int, int], seed: int) -> None:
    image = scene(33, 27, seed).convert("RGB").convert(mode)
    torch.testing.assert_close(load_image(image, size), processed(upright(image), size), atol=1e-6, rtol=0)


@settings(max_examples=80, deadline=None)
@given(
    size=SIZES,
    tensor=st.booleans(),
    signed=st.booleans(),
    batch=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_arrays_and_tensors_match_diffusers(
    size: tuple[int, int], tensor: bool, signed: bool, batch: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).random((max(batch, 1), 21, 30, 3), np.float32) * (2 if signed else 1) - signed
    pixels = pixels if batch else pixels[0]
    source = torch.from_numpy(np.moveaxis(pixels, -1, -3)) if tensor else pixels
    torch.testing.assert_close(load_image(source, size), processed(source, size), atol=1e-6, rtol=0)
    assert measure(source) == (max(batch, 1), 21, 30)


def test_list_is_normalized_by_one_range() -> None:
    dark, bright = torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 0.5)
    assert torch.equal(load_image([dark, bright]), processed([dark, bright], (8, 8)))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64, np.float32, bool])
@pytest.mark.parametrize("shape", [(21, 30), (2, 21, 30), (21, 30, 1), (2, 21, 30, 1)])
def test_binary_masks_match_diffusers(shape: tuple[int, ...], kind: type) -> None:
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
    expected = processed(mask.astype(np.float32), (24, 32), mask=True)
    assert torch.equal(load_mask(mask, (24, 32)), expected)
    if shape[-1] != 1:
        assert torch.equal(load_mask(torch.from_numpy(mask), (24, 32)), expected)


def test_three_channel_tensor_is_three_masks() -> None:
    masks = torch.rand(3, 8, 8)
    assert torch.equal(load_mask(masks), processed(masks, (8, 8), mask=True))
    assert load_mask(masks).shape == (3, 1, 8, 8)
    assert measure(masks, "mask_image", mask=True) == (3, 8, 8)


def test_coloured_masks_are_read_by_luminance() -> None:
    pixels = np.array(scene(16, 12).convert("RGB"))
    expected = load_mask(Image.fromarray(pixels))
    assert 0 < expected.mean() < 1
    assert torch.equal(load_mask(pixels), expected)
    assert torch.equal(load_mask(np.full((8, 8, 3), 0.5, np.float32)), torch.ones(1, 1, 8, 8))


def test_transparent_canvas_masks_by_its_strokes() -> None:
    canvas = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    canvas.paste((255, 255, 255, 255), (16, 16, 32, 32))
    for mask in (canvas, canvas.convert("LA"), canvas.convert("PA"), canvas.convert("P")):
        assert load_mask(mask).mean() == 1 / 16


@pytest.mark.parametrize(
    ("kind", "white"), [(np.uint16, 65535), (">u2", 65535), (np.int32, 65535), (np.int32, 255), (np.float32, 1)]
)
@pytest.mark.parametrize("container", ["memory", "TIFF", "PNG"])
def test_16_bit_and_float_greys_keep_their_range(kind: Any, white: int, container: str) -> None:
    ramp = np.linspace(0, white, 64)[None].repeat(64, 0).astype(kind)
    image = Image.fromarray(ramp)
    if container == "PNG" and kind in (np.int32, np.float32):
        pytest.skip("PNG has 16 bits, and no floats")
    if container != "memory":
        file = io.BytesIO()
        image.save(file, container)
        image = Image.open(file)
    expected = torch.from_numpy(ramp.astype(np.float32) / white * 2 - 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(load_image(image), expected, atol=1e-4, rtol=0)
    assert load_image(image, (32, 32)).abs().max() <= 1
    assert load_mask(image).mean() == 0.5
    if kind is np.uint16:
        torch.testing.assert_close(load_image(ramp), expected, atol=1e-4, rtol=0)


def test_16_bit_transparency_is_white() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(file, "PNG", transparency=0)
    shades = load_image(Image.open(file))[0, 0, 0]
    torch.testing.assert_close(shades, torch.tensor([1, 30000 / 65535 * 2 - 1, 1]), atol=1e-4, rtol=0)


def test_current_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    moving = Image.open(tmp_path / "a.gif")
    moving.seek(1)
    assert load_image(tmp_path / "a.gif")[0, :, 0, 0].tolist() == [1, -1, -1]
    assert load_image(moving)[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_views_with_negative_strides_are_read() -> None:
    pixels = np.random.default_rng(0).random((6, 10, 3)).astype(np.float32)
    assert torch.equal(load_image(pixels[::-1, :, ::-1]), load_image(pixels[::-1, :, ::-1].copy()))


def test_latents_are_recognised_by_their_channels() -> None:
    latents = torch.randn(2, 4, 8, 6)
    for source in (latents, list(latents), [latents[:1], latents[1:]]):
        assert torch.equal(load_latents(source, 4), latents)
    for image in (torch.rand(2, 3, 8, 6), Image.new("RGBA", (8, 8)), [Image.new("RGB", (8, 8))], [], "a.png"):
        assert load_latents(image, 4) is None
    assert load_latents(torch.rand(1, 3, 8, 8), 3) is None, "three channels are an image"
    with pytest.raises(InputError, match="NaN or infinity"):
        load_latents(latents * np.inf, 4)


# --- hostile files and images: one error of one type, before anything is decoded


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims a size, with the given chunks before no pixels at all."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in all_chunks)


BOMB = zlib.compress(bytes(2**24))
HOSTILE_FILES = {
    "bomb.png": (png(60000, 60000), "60000x60000: expected at most 89,478,485 pixels|decompression bomb"),
    "between.png": (png(11000, 9000), "11000x9000: expected at most 89,478,485 pixels"),
    "text.png": (png(8, 8, (b"zTXt", b"a\0\0" + BOMB)), "(?i)too large"),
    "itext.png": (png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + BOMB)), "(?i)too large"),
    "profile.png": (png(8, 8, (b"iCCP", b"a\0\0" + BOMB)), "(?i)too large"),
    "truncated.png": (png(8, 8), "truncated|broken|unexpected"),
    "empty.png": (b"", "expected PNG, JPEG"),
    "flat.png": (png(0, 8), "no pixels|expected PNG"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "expected PNG, JPEG"),
    "a.wmf": (b"\xd7\xcd\xc6\x9a\0\0" + bytes([0, 0, 0, 0, 8, 0, 8, 0, 72, 0]) + bytes(64), "expected PNG, JPEG"),
    "text.txt": (b"a text", "expected PNG, JPEG"),
}


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE_FILES)
@pytest.mark.parametrize("read", [load_image, load_mask])
def test_hostile_files_are_refused(read: Callable[[Any], torch.Tensor], name: str, tmp_path: Path) -> None:
    contents, message = HOSTILE_FILES[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path, message in [
        (tmp_path / "fifo.png", "not a regular file"),  # a FIFO that is opened waits for ever
        (tmp_path, "is a folder"),
        (tmp_path / "loop.png", "cannot be read"),
        ("nul\0.png", "cannot be read"),
        ("\udcff.png", "there is no file '\\\\udcff.png'"),
        ("n" * 5000, "cannot be read"),
        ("", "image: '' is|mask_image: '' is"),
        (b"nowhere.png", "a bytes: expected"),
        (io.BytesIO(), "a BytesIO: expected"),
    ]:
        for read in (load_image, load_mask, image_size):
            with pytest.raises(InputError, match=message) as caught:
                read(path)
            assert len(str(caught.value)) < 400


def closed() -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.close()
    return image


HOSTILE_IMAGES = {
    "closed": (closed, "cannot be read"),
    "no pixels": (lambda: Image.new("RGB", (0, 8)), "no pixels"),
    "objects": (lambda: np.array([[None]]), "an array of object"),
    "texts": (lambda: np.array([["a"]]), "an array of <U1"),
    "complex": (lambda: np.zeros((8, 8), complex), "an array of complex128"),
    "empty": (lambda: np.zeros((0, 8, 3)), "no pixels"),
    "none": (lambda: np.zeros((0, 8, 8, 3)), "holds no pictures"),
    "flat": (lambda: np.zeros(3), r"shape \(3,\)"),
    "meta": (lambda: torch.zeros(3, 8, 8, device="meta"), "device meta"),
    "sparse": (lambda: torch.zeros(3, 8, 8).to_sparse(), "sparse"),
    "complex tensor": (lambda: torch.zeros(3, 8, 8, dtype=torch.complex64), "complex64"),
    "no channels": (lambda: torch.zeros(1, 0, 8, 8), "shape"),
    "broadcast": (lambda: np.broadcast_to(np.uint8(0), (10**6, 10**6, 3)), "at most 89,478,485 pixels"),
    "infinite": (lambda: np.full((8, 8), np.inf), "values from inf"),
    "huge": (lambda: np.full((8, 8), 1e300), "values from"),
    "above": (lambda: np.full((8, 8, 3), 255.0), "values from 255 to 255"),
    "beside": (lambda: np.linspace(-0.01, 1, 64).reshape(8, 8), "values from -0.01 to 1"),
    "deep": (lambda: Image.fromarray(np.full((8, 8), 1e9, np.float32)), "mode F and values from 1e[+]09"),
    "negative": (lambda: Image.fromarray(np.full((8, 8), -5, np.int32)), "mode I and values from -5"),
    "not finite": (lambda: Image.fromarray(np.full((8, 8), np.nan, np.float32)), "mode F and values from nan"),
    "nested": (lambda: [[np.zeros((8, 8, 3))]], "a list: expected"),
    "None": (lambda: None, "a NoneType: expected"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE_IMAGES)
@pytest.mark.parametrize("read", [load_image, load_mask])
def test_hostile_images_are_refused(read: Callable[[Any], torch.Tensor], name: str) -> None:
    make, message = HOSTILE_IMAGES[name]
    with pytest.raises(InputError, match=message) as caught:
        read(make())
    assert "\n" not in str(caught.value)


def test_nearly_black_masks_are_refused() -> None:
    labels = np.zeros((8, 8), np.uint8)
    assert load_mask(Image.fromarray(labels)).sum() == 0, "nothing to repaint is a wish"
    labels[2:4] = 1
    for mask in (Image.fromarray(labels), Image.fromarray(labels.astype(np.uint16) * 257)):
        with pytest.raises(InputError, match="nothing would be repainted"):
            load_mask(mask)


def test_images_are_measured_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS > 9000 * 9000
    path = tmp_path / "large.png"
    path.write_bytes(png(9000, 9000))
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (path, Image.open(path), [path, path]):
        assert image_size(source) == (9000, 9000)


def test_threads_may_share_an_undecoded_image(tmp_path: Path) -> None:
    scene(400, 300).save(tmp_path / "a.png")
    expected = load_image(tmp_path / "a.png")

    def read(image: Image.Image) -> bool:
        return image_size(image) == (300, 400) and torch.equal(load_image(image), expected)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(pool.map(read, [Image.open(tmp_path / "a.png")] * 4))


# --- out


def test_png_holds_prompt_and_settings(tmp_path: Path) -> None:
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
        "Steps: 8, Sampler: DDIM, CFG scale: 2.5, Seed: 3, Size: 96x64, Model: default, Version: x"
    )
    save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", text)
    with Image.open(tmp_path / "a.png") as back:
        assert back.info["parameters"] == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"], "no temporary file stays behind"


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    class Broken:
        def save(self, file: object, *_: object, **__: object) -> None:
            file.write(b"half")  # type: ignore[attr-defined]
            raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"before")
    with pytest.raises(OSError, match="disk full"):
        save_image(Broken(), tmp_path / "a.png")  # type: ignore[arg-type]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"before")]


def test_output_paths_are_numbered_and_checked(tmp_path: Path) -> None:
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
