"""Pictures in and out: what a caller gives as a picture or a mask to a tensor, tensors to what a caller asked for."""

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
    "image_size",
    "load_image",
    "load_latents",
    "load_mask",
    "measure",
    "output_paths",
    "parameters_text",
    "read_parameters",
    "save_image",
    "save_result",
    "to_images",
    "to_pixels",
]

MAX_PIXELS = 2**28 // 3
"""The most pixels of one picture, 89 million, as in PIL: a quarter of a GiB as RGB. A small file can claim any size."""

# Plain raster formats, those of plugins too. PIL opens more: some run other programs (EPS) or need a display (WMF).
_PHOTOS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "TIFF")
_READ = (*_PHOTOS, "GIF", "BMP", "DIB", "PPM", "TGA", "ICO", "PCX", "PSD", "QOI", "SGI")
_FULL_SCALE = {"bool": 1, "uint8": 255, "uint16": 65535}
_LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, in PIL's fractions: they add up to 1
_BARELY = 1 / 64
_decoding = threading.Lock()  # one PIL image may be given to several calls at once


def load_image(source: Any, size: tuple[int, int] | None = None, *, name: str = "image") -> torch.Tensor:
    """Pictures as float32 (B, 3, H, W) in -1..1, of `size` = (height, width) where given.

    `source` is a PIL image, a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), or a list
    of those; one channel is grey. Colours are red, green, blue: OpenCV's BGR cannot be told from that, convert it.

    - Pictures are turned upright as their EXIF orientation says (`diffusers.utils.load_image`), laid on white where
      they are transparent, since hidden colours are noise, and resized by Lanczos' filter. 16-bit and float ones are
      read in their full range. Of an animation the frame that is current is read, in a file the first.
    - Arrays and tensors are bool, uint8, uint16, or floats in 0..1, or in -1..1 where any is negative, and are resized
      to the nearest pixel (`VaeImageProcessor.preprocess`).

    InputError for what is none of those, is damaged, empty, or has more than MAX_PIXELS pixels.
    """
    loaded = [_picture(picture, size, name) for picture in _each(source, name)]
    _check_one_size([pixels for pixels, _ in loaded], name)
    signed = any(free and bool(pixels.min() < 0) for pixels, free in loaded)
    return torch.cat([(pixels if free and signed else pixels * 2 - 1).expand(-1, 3, -1, -1) for pixels, free in loaded])


def load_mask(source: Any, size: tuple[int, int] | None = None, *, name: str = "mask_image") -> torch.Tensor:
    """Masks as float32 (B, 1, H, W) of zeros and ones: 1 is repainted, and grey is cut at one half.

    Sources as in `load_image`, with one channel: tensors of three dimensions are masks (B, H, W), arrays too, unless
    they are (H, W, 1 or 3). Colours count by their luminance, whatever their transparency, and pictures are resized
    before they are cut, all as in diffusers' mask processor. In arrays and tensors whole numbers of at most 1 are 0 and
    1, not shades of black; a picture of those is refused.
    """
    masks = [_mask(mask, size, name) for mask in _each(source, name)]
    _check_one_size(masks, name)
    return torch.cat([(mask >= 0.5).float() for mask in masks])


def load_latents(source: Any, channels: int) -> torch.Tensor | None:
    """Latents float32 (B, C, h, w), scaled as the U-Net has them, where that is what is given as a picture.

    As in diffusers a tensor is latents where it has as many channels as the VAE's: (C, h, w), (B, C, h, w), or a list.
    None for anything else. InputError for NaN or infinity.
    """
    tensors = list(source) if isinstance(source, (list, tuple)) else [source]
    if channels in (1, 3) or not tensors:
        return None  # no telling them from pictures
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
    """(pictures, height, width) of anything that `load_image`, or `load_mask`, takes, the size that of the first.

    From headers and shapes alone: nothing is decoded, and all that can be refused by them is.
    """
    sizes = [_measure(picture, name, mask) for picture in _each(source, name)]
    return sum(count for count, _, _ in sizes), sizes[0][1], sizes[0][2]


def image_size(source: Any, name: str = "image") -> tuple[int, int]:
    """(height, width) in pixels of anything that `load_image` takes, upright."""
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
        if image.format == "TIFF":  # which PIL turns itself, and whose size it turns before or after that
            tags = getattr(image, "tag_v2", {})
            turned = tags.get(ExifTags.Base.Orientation, 1) >= 5
            if turned:
                width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        else:
            turned = _orientation(image) >= 5
        return (1, width, height) if turned else (1, height, width)


def _check_one_size(pictures: list[torch.Tensor], name: str) -> None:
    if len({picture.shape[2:] for picture in pictures}) > 1:
        raise InputError(
            f"{name} is a list of pictures of different sizes: give them one size, or pass height and width"
        )


def _check_pixels(width: int, height: int, what: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{what} is {width}x{height}: it has no pixels")
    if width * height > MAX_PIXELS:
        raise InputError(f"{what} is {width}x{height}: expected at most {MAX_PIXELS:,} pixels, resize it first")


# ------------------------------------------------------------------------------------------- pictures of PIL's, files


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """A PIL image of what is given, not decoded yet. What PIL raises inside, of many types, is an InputError."""
    if isinstance(source, Image.Image):
        what = f"{name}, a {source.mode} picture of PIL,"
        with _named(what):
            _check_pixels(source.width, source.height, what)
            yield source
    elif isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        what = f"{name}: {_shown(path)}"
        with _named(what):
            _check_file(path, what)
            Image.init()
            with Image.open(path, formats=[kind for kind in _READ if kind in Image.OPEN]) as image:
                _check_pixels(image.width, image.height, what)
                yield image
    else:
        raise InputError(f"{name} is a {type(source).__name__}: expected a PIL image, a path, an array or a tensor")


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(f"{what} cannot be read as a picture: expected PNG, JPEG, WebP or the like") from None
    except Exception as error:
        if out_of_memory_named(error) is not error:
            raise
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{what} cannot be read as a picture ({why})") from error


def _check_file(path: str | bytes, what: str) -> None:
    try:
        mode = Path(os.fsdecode(path)).stat().st_mode
    except FileNotFoundError:
        raise InputError(what.replace(": ", ": there is no file ", 1)) from None
    if not stat.S_ISREG(mode):  # to open a FIFO would wait for its writer
        raise InputError(f"{what} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}: expected a picture")


def _shown(path: str | bytes) -> str:
    text = repr(path)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; from 5 on width and height change places."""
    if image.format == "PNG" and "exif" not in image.info and _metadata_follows(image):
        _decode(image)
    try:
        # PngImageFile's own getexif decodes every picture, for what may come after its pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # what a camera wrote badly is no reason to refuse its picture
        return 1


def _metadata_follows(image: Image.Image) -> bool:
    """Whether a PNG that is not decoded yet has EXIF or text after its pixels, found by the lengths of its chunks."""
    with _decoding:
        file = getattr(image, "fp", None)
        if file is None or file.closed:
            return False  # decoded: all of it is known
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
    return True  # too many chunks to say


def _decode(image: Image.Image) -> None:
    with _decoding:
        image.load()


def _upright(image: Image.Image) -> Image.Image:
    _decode(image)
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _deep(image: Image.Image, name: str) -> Image.Image:
    """A grey picture of more than 8 bits as floats in 0..255. PIL's own conversions cut off what is above 255.

    Where the mode does not say how bright white is, the values do.
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


def _fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def _unit(image: Image.Image) -> torch.Tensor:
    """(1, C, H, W) in 0..1."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).clamp(0, 1)  # a float's filter overshoots
    return (pixels[..., None] if pixels.dim() == 2 else pixels).movedim(-1, 0)[None]


# ------------------------------------------------------------------------------------------------ arrays and tensors


def _check_kind(source: np.ndarray | torch.Tensor, name: str) -> None:
    """InputError for what holds no plain numbers: text and objects, complex ones, tensors of no device."""
    if isinstance(source, np.ndarray):
        plain, kind = source.dtype.kind in "biuf", f"an array of {source.dtype}"
    else:
        plain = not (source.is_complex() or source.is_quantized or source.is_meta or source.layout != torch.strided)
        kind = f"a tensor of {source.dtype}, {source.layout}, on device {source.device}"
    if not plain:
        raise InputError(f"{name} is {kind}: expected uint8, or floats in 0 to 1")


def _planes(source: Any, name: str, mask: bool) -> Any:
    """An array or tensor as a view (B, C, H, W) of it, C being 1 or 3."""
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
        wanted = "(H, W) or (B, H, W)" if mask else "(H, W, 3) for an array or (B, 3, H, W) for a tensor"
        raise InputError(f"{name} has shape {shape}: expected {wanted}")
    if not planes.shape[0]:
        raise InputError(f"{name} has shape {shape}: it holds no pictures")
    _check_pixels(int(planes.shape[3]), int(planes.shape[2]), name)
    return planes


def _floats(source: Any, name: str, mask: bool) -> tuple[torch.Tensor, bool]:
    """An array or tensor as float32 (B, C, H, W), and whether its type leaves open what its range is."""
    planes = _planes(source, name, mask)
    tensor = isinstance(source, torch.Tensor)
    values = planes.detach().cpu().float() if tensor else torch.from_numpy(np.array(planes, np.float32, order="C"))
    low, high = float(values.min()), float(values.max())
    kind = str(source.dtype).removeprefix("torch.") if tensor else source.dtype.name
    if full := _FULL_SCALE.get(kind):
        return values / (1 if mask and high <= 1 else full), False
    lowest = 0 if mask else -1
    # Barely negative is neither: a filter's overshoot, which would be read as half as bright.
    if not (lowest <= low and high <= 1) or -_BARELY < low < 0:
        wanted = "0 to 1" if mask else "0 to 1, or -1 to 1"
        raise InputError(f"{name} has values from {low:.3g} to {high:.3g}: expected {wanted} (uint8 arrays: 0 to 255)")
    return values, True


def _nearest(values: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    if size is None or tuple(values.shape[2:]) == size:
        return values
    return torch.nn.functional.interpolate(values, size)


# ----------------------------------------------------------------------------------------- one picture, or one mask


def _picture(source: Any, size: tuple[int, int] | None, name: str) -> tuple[torch.Tensor, bool]:
    """float32 (B, 1 or 3, H, W) in 0..1, or what a caller gave as floats, which may be in -1..1: then True."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        values, free = _floats(source, name, mask=False)
        return _nearest(values, size), free
    with _opened(source, name) as image:
        image = _upright(image)
        if _is_deep(image):
            grey = _deep(image, name)
            if "transparency" in grey.info:
                shades = np.array(grey)
                shades[shades == np.float32(grey.info["transparency"])] = 255
                grey = Image.fromarray(shades)
            return _unit(_fit(grey, size)), False
        if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
            rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return _unit(_fit(image.convert("RGB"), size)), False


def _mask(source: Any, size: tuple[int, int] | None, name: str) -> torch.Tensor:
    """float32 (B, 1, H, W) in 0..1."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        values, _ = _floats(source, name, mask=True)
        if values.shape[1] == 3:
            values = (values * torch.tensor(_LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
        return _nearest(values, size)
    with _opened(source, name) as image:
        image = _upright(image)
        if _is_deep(image):
            mask = _unit(_fit(_deep(image, name), size))
        else:
            mask = _unit(_fit(image, size).convert("L"))
    if 0 < mask.max() <= 1 / 255:
        raise InputError(
            f"{name} is at most 1 of 255 bright, so nothing would be repainted: give white as 255, or an array of 0 "
            "and 1"
        )
    return mask


# --------------------------------------------------------------------------------------------------- out


def to_pixels(decoded: torch.Tensor, output_type: str) -> torch.Tensor:
    """The VAE's pictures (B, 3, H, W) in -1..1 on their device: for "pt" float32 in 0..1, for "np" the same as
    (B, H, W, 3), for "pil" that as uint8."""
    unit = (decoded.float() / 2 + 0.5).clamp_(0, 1)
    if output_type == "pt":
        return unit
    unit = unit.movedim(1, -1)
    return unit if output_type == "np" else (unit * 255).round_().to(torch.uint8)


def to_images(pixels: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """What `to_pixels` made, "np" and "pil" on the CPU by now, as the caller gets it."""
    if output_type == "pt":
        return pixels
    arrays = pixels.numpy()
    return arrays if output_type == "np" else [Image.fromarray(one) for one in arrays]


def save_image(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Writes a picture whole or not at all: a temporary file beside `path`, then a rename.

    Raises OSError, with the file's name, where the disk is full or cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    if kind == "PNG" and parameters:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", parameters)
    encoded = BytesIO()  # PIL's encoders, writing to a file themselves, do not say why they could not
    image.save(encoded, kind, **options)
    with whole_file(path) as file:
        file.write(encoded.getbuffer())


def save_result(result: Result, paths: list[Path], model: str, metadata: bool = True) -> None:
    """Writes every picture of a result made with output_type="pil" to its path, a PNG with how it was made."""
    version = {"Version": f"fastldm {__version__}", "Backend": f"{result.backend} {result.dtype}"}
    for k, (image, path) in enumerate(zip(result.images, paths, strict=True)):
        seed = result.seeds[k] if result.seeds else None
        text = parameters_text(result.request, seed, model, version, picture=k) if metadata else None
        save_image(image, path, text)


def read_parameters(source: Any) -> tuple[Request, dict[str, str]]:
    """The request that a PNG says it was made by, and what else it says, such as its model: see `parse_parameters`.

    source: a path or a PIL image. InputError for what is not a picture, or says nothing.
    """
    with _opened(source, "the picture") as image:
        if image.format == "PNG" and "parameters" not in image.info:
            _decode(image)  # text may follow the pixels
        text = image.info.get("parameters")
    if not isinstance(text, str):
        raise InputError(f"{_shown(str(source))} does not say how it was made: expected a PNG with parameters")
    return parse_parameters(text)
