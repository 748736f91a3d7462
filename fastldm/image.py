"""Images: from a caller's images and masks to tensors, and from tensors to the requested output type and files.

Over 500 lines, for all that reads a picture of anybody's shares the checks at its beginning.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fastldm.errors import InputError, out_of_memory_named
from fastldm.files import FORMATS, check_folder, output_paths, whole_file
from fastldm.metadata import parameters_text, parse_parameters
from fastldm.version import __version__

if TYPE_CHECKING:
    from fastldm.request import Request, Result

__all__ = [
    "check_folder",
    "decode_image",
    "encode_image",
    "image_size",
    "load_control",
    "load_depth",
    "load_image",
    "load_latents",
    "load_mask",
    "load_pictures",
    "measure",
    "output_paths",
    "parameters_text",
    "read_parameters",
    "result_parameters",
    "save_image",
    "save_result",
    "to_images",
    "to_pixels",
]

MAX_PIXELS = 2**28 // 3
"""The most pixels of an image, 89 million, as in PIL: a quarter of a GiB as RGB. A small file may declare any size."""

# Raster formats, including those of plugins. Others that PIL opens run programs (EPS) or need a display (WMF).
_PHOTOS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "TIFF")
_READ = (*_PHOTOS, "GIF", "BMP", "DIB", "PPM", "TGA", "ICO", "PCX", "PSD", "QOI", "SGI")
_FULL_SCALE = {"bool": 1, "uint8": 255, "uint16": 65535}
_LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, with PIL's fractions, which sum to 1
_MAX_OVERSHOOT = 1 / 64
_decoding = threading.Lock()  # several calls may read the same PIL image


def load_image(
    source: Any,
    size: tuple[int, int] | None = None,
    *,
    name: str = "image",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> torch.Tensor:
    """Images as float32 (B, 3, H, W) in -1..1, resized to `size` = (height, width) if it is not None.

    `source` is a PIL image, a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), or a list
    of those; one channel is grey. Colours are RGB: OpenCV's BGR cannot be recognised and must be converted.

    - PIL images and files are rotated by their EXIF orientation (as by `diffusers.utils.load_image`), composited on
      white if transparent, since hidden colours are noise, and resized by `resample`. 16-bit and float ones are
      read in their full range. Of an animation, the current frame is read, of a file the first.
    - Arrays and tensors are bool, uint8, uint16, or floats in 0..1, or in -1..1 if any is negative, and are resized
      to the nearest pixel (as by `VaeImageProcessor.preprocess`).

    InputError for anything else, and for images that are damaged, empty, or have more than MAX_PIXELS pixels.
    """
    loaded = [_pixels(image, size, name, resample) for image in _each(source, name)]
    _check_one_size([pixels for pixels, _ in loaded], name)
    signed = any(is_float and bool(pixels.min() < 0) for pixels, is_float in loaded)
    return torch.cat(
        [(pixels if is_float and signed else pixels * 2 - 1).expand(-1, 3, -1, -1) for pixels, is_float in loaded]
    )


def load_control(
    source: Any, size: tuple[int, int] | None = None, *, grey: bool = False, name: str = "control_image"
) -> torch.Tensor:
    """Images as a ControlNet or T2I-Adapter reads them: float32 (B, 3, H, W) in 0..1, or (B, 1, H, W) if `grey`.

    Sources as in `load_image`, but floats are taken as they are, as in diffusers: a ControlNet for inpainting reads -1
    where there is nothing.
    """
    loaded = [_pixels(image, size, name)[0] for image in _each(source, name)]
    _check_one_size(loaded, name)
    colours = torch.cat([pixels.expand(-1, 3, -1, -1) for pixels in loaded])
    return (colours * torch.tensor(_LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True) if grey else colours


def load_mask(
    source: Any,
    size: tuple[int, int] | None = None,
    *,
    name: str = "mask_image",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> torch.Tensor:
    """Masks as float32 (B, 1, H, W) of zeros and ones: 1 is repainted, and grey is rounded at one half.

    Sources as in `load_image`, with one channel: tensors of three dimensions are masks (B, H, W), as are arrays unless
    they are (H, W, 1 or 3). Colours are converted to luminance, ignoring transparency, and images are resized before
    they are rounded, all as in diffusers' mask processor. In arrays and tensors, whole numbers up to 1 are 0 and 1,
    not dark greys; images of those are refused.
    """
    masks = [_mask(mask, size, name, resample) for mask in _each(source, name)]
    _check_one_size(masks, name)
    return torch.cat([(mask >= 0.5).float() for mask in masks])


def is_picture(source: Any) -> bool:
    """Whether `load_picture` reads it, if it can be read."""
    return isinstance(source, (Image.Image, str, os.PathLike))


def load_picture(source: Any, name: str = "image", *, mask: bool = False) -> Image.Image:
    """One PIL image or file, decoded and upright, at its own size: RGB on white, or for a mask the luminance, L.

    InputError as `load_image`.
    """
    with _opened(source, name) as image:
        image = _upright(image)
        if _is_deep(image):
            image = _deep(image, name).convert("L")
        return image.convert("L") if mask else _on_white(image)


def load_depth(source: Any, *, name: str = "depth_map") -> torch.Tensor:
    """Depth maps as float32 (n, H, W) of any range: a tensor of that shape, or pictures as of `load_control`, in grey.

    InputError for NaN and infinity, and for a map that is flat.
    """
    if isinstance(source, torch.Tensor) and source.ndim == 3:
        _check_kind(source, name)
        depth = source.detach().float()
        if not bool(depth.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity: expected finite numbers")
    else:
        depth = load_control(source, grey=True, name=name)[:, 0]
    if not depth.numel() or bool((depth.amax((1, 2)) == depth.amin((1, 2))).any()):
        raise InputError(f"{name} is flat or empty, shape {tuple(depth.shape)}: expected nearer and farther pixels")
    return depth


def load_pictures(source: Any, name: str = "image") -> list[Image.Image]:
    """Images as upright PIL images in RGB: as they are, or arrays and tensors in 8 bits."""
    pictures: list[Image.Image] = []
    for each in _each(source, name):
        if isinstance(each, (np.ndarray, torch.Tensor)):
            pictures += to_images(to_pixels(load_image(each, name=name), "pil"), "pil")
        else:
            pictures.append(load_picture(each, name))
    return pictures


def load_latents(source: Any, channels: int) -> torch.Tensor | None:
    """Latents float32 (B, C, h, w), scaled as for the U-Net, if `source` is latents; None for anything else.

    As in diffusers, tensors with the VAE's number of channels are latents: (C, h, w), (B, C, h, w), or a list.
    InputError for NaN or infinity.
    """
    tensors = list(source) if isinstance(source, (list, tuple)) else [source]
    if channels in (1, 3) or not tensors:
        return None  # ambiguous
    if not all(isinstance(t, torch.Tensor) and t.ndim in (3, 4) and t.shape[-3] == channels for t in tensors):
        return None
    for latents in tensors:
        _check_kind(latents, "image")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise InputError(f"image is latents of {latents.dtype} with NaN or infinity: expected finite floats")
    if len({t.shape[-2:] for t in tensors}) > 1:
        raise InputError("image is a list of latents of different sizes: give them one size")
    return torch.cat([(t if t.ndim == 4 else t[None]).detach().float() for t in tensors])


def measure(source: Any, name: str = "image", *, mask: bool = False) -> tuple[int, int, int]:
    """(number of images, height, width) of anything that `load_image`, or `load_mask`, accepts; size of the first.

    Only from headers and shapes, without decoding; raises all errors that can be found that way.
    """
    sizes = [_measure(image, name, mask) for image in _each(source, name)]
    return sum(count for count, _, _ in sizes), sizes[0][1], sizes[0][2]


def image_size(source: Any, name: str = "image") -> tuple[int, int]:
    """(height, width) in pixels, upright, of anything that `load_image` accepts."""
    return measure(source, name)[1:]


def _each(source: Any, name: str) -> list[Any]:
    if not isinstance(source, (list, tuple)):
        return [source]
    if not source:
        raise InputError(f"{name} is an empty list: expected at least one picture")
    return list(source)


def _measure(source: Any, name: str, mask: bool) -> tuple[int, int, int]:
    if isinstance(source, (np.ndarray, torch.Tensor)):
        planes = _planes(source, name, mask)
        return int(planes.shape[0]), int(planes.shape[2]), int(planes.shape[3])
    with _opened(source, name) as image:
        width, height = image.size
        if image.format == "TIFF":  # which PIL rotates itself, with `size` before or after the rotation
            tags = getattr(image, "tag_v2", {})
            rotated = tags.get(ExifTags.Base.Orientation, 1) >= 5
            if rotated:
                width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        else:
            rotated = _orientation(image) >= 5
        return (1, width, height) if rotated else (1, height, width)


def _check_one_size(images: list[torch.Tensor], name: str) -> None:
    if len({image.shape[2:] for image in images}) > 1:
        raise InputError(
            f"{name} is a list of pictures of different sizes: give them one size, or pass height and width"
        )


def _check_pixels(width: int, height: int, label: str, most: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{label} is {width}x{height}: it has no pixels")
    if width * height > most:
        raise InputError(f"{label} is {width}x{height}: expected at most {most:,} pixels, resize it first")


# ------------------------------------------------------------------------------------------- PIL images and files


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """A PIL image of `source`, not yet decoded. Errors that PIL raises meanwhile become InputErrors."""
    if isinstance(source, Image.Image):
        label = f"{name}, a {source.mode} picture of PIL,"
        with _readable(label):
            _check_pixels(source.width, source.height, label)
            yield source
    elif isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        label = f"{name}: {_show(path)}"
        with _readable(label):
            _check_file(path, label)
            with Image.open(path, formats=_formats()) as image:
                _check_pixels(image.width, image.height, label)
                yield image
    else:
        raise InputError(f"{name} is a {type(source).__name__}: expected a PIL image, a path, an array or a tensor")


def decode_image(content: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded PIL image of a file's bytes, whatever its name says. InputError for what is no picture, and for one
    of more pixels, before it is decoded."""
    if not content:
        raise InputError(f"{name} is empty: expected a picture")
    with _readable(name), Image.open(BytesIO(content), formats=_formats()) as image:
        _check_pixels(image.width, image.height, name, max_pixels)
        image.load()
        return image


def _formats() -> list[str]:
    Image.init()
    return [kind for kind in _READ if kind in Image.OPEN]


@contextmanager
def _readable(label: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(f"{label} cannot be read as a picture: expected PNG, JPEG, WebP or the like") from None
    except Exception as error:
        if out_of_memory_named(error) is not error:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{label} cannot be read as a picture ({reason})") from error


def _check_file(path: str | bytes, label: str) -> None:
    try:
        mode = Path(os.fsdecode(path)).stat().st_mode
    except FileNotFoundError:
        raise InputError(label.replace(": ", ": there is no file ", 1)) from None
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for its writer
        raise InputError(f"{label} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}: expected a picture")


def _show(path: str | bytes) -> str:
    text = repr(path)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; from 5 on width and height are swapped."""
    if image.format == "PNG" and "exif" not in image.info and _metadata_follows(image):
        _decode(image)
    try:
        # PngImageFile.getexif would decode every image, since EXIF may follow the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # invalid EXIF is ignored
        return 1


def _metadata_follows(image: Image.Image) -> bool:
    """Whether a PNG that is not yet decoded has EXIF or text after its pixels, from the lengths of its chunks."""
    with _decoding:
        file = getattr(image, "fp", None)
        if file is None or file.closed:
            return False  # already decoded
        position = file.tell()
        try:
            return _text_behind_pixels(file)
        finally:
            file.seek(position)


def _text_behind_pixels(png: IO[bytes]) -> bool:
    png.seek(8)
    pixels_seen = False
    for _ in range(2**16):
        header = png.read(8)
        kind = header[4:]
        if len(header) < 8 or kind == b"IEND":
            return False
        if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        pixels_seen |= kind == b"IDAT"
        png.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return True  # too many chunks to tell


def _decode(image: Image.Image) -> None:
    with _decoding:
        image.load()


def _upright(image: Image.Image) -> Image.Image:
    _decode(image)
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _deep(image: Image.Image, name: str) -> Image.Image:
    """A grey image of more than 8 bits as floats in 0..255. PIL's conversions would clip at 255.

    If the mode does not define white, it is derived from the values.
    """
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = 65535.0
    elif image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    else:
        white = 255.0 if high <= 255 else 65535.0
    if not (low >= 0 and high <= white):
        expected = "0 to 1, or 0 to 255" if image.mode == "F" else "0 to 255, or 0 to 65535"
        raise InputError(f"{name} has mode {image.mode} and values from {low:g} to {high:g}: expected {expected}")
    scaled = Image.fromarray(values * (255 / white))
    if image.info.get("transparency") is not None:
        scaled.info["transparency"] = float(image.info["transparency"]) * 255 / white
    return scaled


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _fit(
    image: Image.Image, size: tuple[int, int] | None, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), resample)


def _unit(image: Image.Image) -> torch.Tensor:
    """(1, C, H, W) in 0..1."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).clamp(0, 1)  # filtered floats overshoot
    return (pixels[..., None] if pixels.dim() == 2 else pixels).movedim(-1, 0)[None]


# ------------------------------------------------------------------------------------------------ arrays and tensors


def _check_kind(source: np.ndarray | torch.Tensor, name: str) -> None:
    """InputError for anything but dense real numbers: text, objects, complex numbers, tensors without storage."""
    if isinstance(source, np.ndarray):
        usable, kind = source.dtype.kind in "biuf", f"an array of {source.dtype}"
    else:
        usable = not (source.is_complex() or source.is_quantized or source.is_meta or source.layout != torch.strided)
        kind = f"a tensor of {source.dtype}, {source.layout}, on device {source.device}"
    if not usable:
        raise InputError(f"{name} is {kind}: expected uint8, or floats in 0 to 1")


def _planes(source: Any, name: str, mask: bool) -> Any:
    """An array or tensor viewed as (B, C, H, W), with C 1 or 3."""
    _check_kind(source, name)
    tensor, shape = isinstance(source, torch.Tensor), tuple(source.shape)
    planes = None
    if len(shape) == 2:
        planes = source[None, None]
    elif len(shape) == 3 and mask and (tensor or shape[-1] not in (1, 3)):
        planes = source[:, None]
    elif len(shape) == 3:
        planes = source[None] if tensor else np.moveaxis(source, -1, 0)[None]
    elif len(shape) == 4:
        planes = source if tensor else np.moveaxis(source, -1, 1)
    if planes is None or planes.shape[1] not in (1, 3):
        expected = "(H, W) or (B, H, W)" if mask else "(H, W, 3) for an array or (B, 3, H, W) for a tensor"
        raise InputError(f"{name} has shape {shape}: expected {expected}")
    if not planes.shape[0]:
        raise InputError(f"{name} has shape {shape}: it holds no pictures")
    _check_pixels(int(planes.shape[3]), int(planes.shape[2]), name)
    return planes


def _floats(source: Any, name: str, mask: bool) -> tuple[torch.Tensor, bool]:
    """An array or tensor as float32 (B, C, H, W), and whether its range is not determined by its dtype."""
    planes = _planes(source, name, mask)
    tensor = isinstance(source, torch.Tensor)
    values = planes.detach().cpu().float() if tensor else torch.from_numpy(np.array(planes, np.float32, order="C"))
    low, high = float(values.min()), float(values.max())
    kind = str(source.dtype).removeprefix("torch.") if tensor else source.dtype.name
    if full := _FULL_SCALE.get(kind):
        return values / (1 if mask and high <= 1 else full), False
    lowest = 0 if mask else -1
    # Slightly negative values are a filter's overshoot of 0..1, and would be misread as -1..1.
    if not (lowest <= low and high <= 1) or -_MAX_OVERSHOOT < low < 0:
        expected = "0 to 1" if mask else "0 to 1, or -1 to 1"
        raise InputError(
            f"{name} has values from {low:.3g} to {high:.3g}: expected {expected} (uint8 arrays: 0 to 255)"
        )
    return values, True


def _nearest(values: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    if size is None or tuple(values.shape[2:]) == size:
        return values
    return torch.nn.functional.interpolate(values, size)


# ----------------------------------------------------------------------------------------- one image or mask


def _pixels(
    source: Any,
    size: tuple[int, int] | None,
    name: str,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> tuple[torch.Tensor, bool]:
    """float32 (B, 1 or 3, H, W) in 0..1 and False, or a caller's floats, which may be in -1..1, and True."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        values, is_float = _floats(source, name, mask=False)
        return _nearest(values, size), is_float
    with _opened(source, name) as image:
        image = _upright(image)
        if _is_deep(image):
            grey = _deep(image, name)
            if "transparency" in grey.info:
                shades = np.array(grey)
                shades[shades == np.float32(grey.info["transparency"])] = 255
                grey = Image.fromarray(shades)
            return _unit(_fit(grey, size, resample)), False
        return _unit(_fit(_on_white(image), size, resample)), False


def _on_white(image: Image.Image) -> Image.Image:
    """An 8-bit image as RGB."""
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _mask(source: Any, size: tuple[int, int] | None, name: str, resample: Image.Resampling) -> torch.Tensor:
    """float32 (B, 1, H, W) in 0..1."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        values, _ = _floats(source, name, mask=True)
        if values.shape[1] == 3:
            values = (values * torch.tensor(_LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
        return _nearest(values, size)
    with _opened(source, name) as image:
        image = _upright(image)
        if _is_deep(image):
            mask = _unit(_fit(_deep(image, name), size, resample))
        else:
            mask = _unit(_fit(image, size, resample).convert("L"))
    if 0 < mask.max() <= 1 / 255:
        raise InputError(
            f"{name} is at most 1 of 255 bright, so nothing would be repainted: give white as 255, or an array of 0 "
            "and 1"
        )
    return mask


# --------------------------------------------------------------------------------------------------- out


def to_pixels(decoded: torch.Tensor, output_type: str) -> torch.Tensor:
    """The VAE's images (B, 3, H, W) in -1..1, on their device: for "pt" as float32 in 0..1, for "np" likewise as
    (B, H, W, 3), for "pil" as uint8 (B, H, W, 3)."""
    unit = (decoded.float() / 2 + 0.5).clamp_(0, 1)
    if output_type == "pt":
        return unit
    unit = unit.movedim(1, -1)
    return unit if output_type == "np" else (unit * 255).round_().to(torch.uint8)


def to_images(pixels: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """The output of `to_pixels`, for "np" and "pil" on the CPU, as the requested output type."""
    if output_type == "pt":
        return pixels
    arrays = pixels.numpy()
    return arrays if output_type == "np" else [Image.fromarray(array) for array in arrays]


def encode_image(
    image: Image.Image,
    kind: str,
    parameters: str | None = None,
    *,
    quality: int | None = None,
    compress_level: int | None = None,
) -> bytes:
    """An image as a file's bytes. kind: "PNG", "JPEG" or "WEBP". parameters: a PNG's text. quality: of the others, 0 to
    100. compress_level: of a PNG, 0 to 9: 1 takes half the time of the default."""
    options: dict[str, Any] = {}
    if kind == "PNG":
        options = {} if compress_level is None else {"compress_level": compress_level}
        if parameters:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", parameters)
    elif quality is not None or kind == "JPEG":
        options["quality"] = 95 if quality is None else quality
    encoded = BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def save_image(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Write an image atomically: to a temporary file beside `path`, which is then renamed.

    Raises OSError, with the file's name, if the file cannot be written or the disk is full.
    """
    # As a whole, since PIL's encoders do not report why writing to a file failed.
    encoded = encode_image(image, FORMATS[path.suffix.lower()], parameters)
    with whole_file(path) as file:
        file.write(encoded)


def result_parameters(result: Result, model: str) -> list[str]:
    """The generation parameters of each image of a result, as text. model: its name."""
    extra = {"Version": f"fastldm {__version__}", "Backend": f"{result.backend} {result.dtype}"}
    if result.refiner:
        extra["Refiner"] = result.refiner
    if result.upscalers:
        extra["Upscalers"] = ", ".join(result.upscalers)
    seeds = result.seeds or (None,) * result.request.batch
    scores = [{"Score": f"{score:.4f}"} for score in result.scores] or [{}] * len(seeds)
    return [
        parameters_text(result.request, seed, model, {**score, **extra}, picture=k, embeddings=result.embeddings)
        for k, (seed, score) in enumerate(zip(seeds, scores, strict=True))
    ]


def save_result(result: Result, paths: list[Path], model: str, metadata: bool = True) -> None:
    """Write the images of a result with output_type="pil" to files, PNGs with their generation parameters."""
    texts = result_parameters(result, model) if metadata else [None] * len(paths)
    for image, path, text in zip(result.images, paths, texts, strict=True):
        save_image(image, path, text)


def read_parameters(source: Any) -> tuple[Request, dict[str, str]]:
    """The request in a PNG's parameters, and the remaining fields, such as its model: see `parse_parameters`.

    source: a path or a PIL image. InputError for anything but an image with parameters.
    """
    with _opened(source, "the picture") as image:
        if image.format == "PNG" and "parameters" not in image.info:
            _decode(image)  # text may follow the pixels
        text = image.info.get("parameters")
    if not isinstance(text, str):
        raise InputError(f"{_show(str(source))} does not say how it was made: expected a PNG with parameters")
    return parse_parameters(text)
