"""Pictures in and out: what a caller gives as a picture to a tensor, tensors to what a caller asked for, and files."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastldm import __version__
from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.request import Request, Result

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def load_image(source: Any, size: tuple[int, int] | None = None, *, name: str = "image") -> torch.Tensor:
    """A picture as float32 (B, 3, H, W) in -1..1, resized (Lanczos) to `size` = (height, width) where given.

    `source` is a PIL image, a path, an array (H, W, 3) or (B, H, W, 3) of uint8 or of floats in 0..1, a tensor
    (3, H, W) or (B, 3, H, W) in 0..1, or a list of those. A transparent picture is laid on white, since its hidden
    colours are noise.
    """
    return _load(source, "RGB", size, Image.Resampling.LANCZOS, name) * 2 - 1


def load_mask(source: Any, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A mask as float32 (B, 1, H, W) of zeros and ones: 1 is repainted. Sources as in `load_image`; grey is cut at
    one half."""
    return (_load(source, "L", size, Image.Resampling.NEAREST, "mask_image") >= 0.5).float()


def image_size(source: Any, name: str = "image") -> tuple[int, int]:
    """(height, width) in pixels of anything that `load_image` takes."""
    first = source[0] if isinstance(source, (list, tuple)) and source else source
    if isinstance(first, (str, Path)):
        first = _open(first, name)
    if isinstance(first, Image.Image):
        return first.height, first.width
    if isinstance(first, torch.Tensor) and first.dim() in (3, 4):
        return int(first.shape[-2]), int(first.shape[-1])
    if isinstance(first, np.ndarray) and first.ndim in (2, 3, 4):
        height, width = first.shape[:2] if first.ndim < 4 else first.shape[1:3]
        return int(height), int(width)
    raise InputError(f"{name} is a {type(source).__name__}: expected a PIL image, a path, an array or a tensor")


def _open(path: str | Path, name: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{name}: there is no file {str(path)!r}") from None
    except OSError as error:
        raise InputError(f"{name}: {str(path)!r} cannot be read as a picture ({error})") from error
    return image


def _load(source: Any, mode: str, size: tuple[int, int] | None, resample: Image.Resampling, name: str) -> torch.Tensor:
    if isinstance(source, (list, tuple)):
        if not source:
            raise InputError(f"{name} is an empty list: expected at least one picture")
        loaded = [_load(one, mode, size, resample, name) for one in source]
        if len({one.shape[1:] for one in loaded}) > 1:
            raise InputError(
                f"{name} is a list of pictures of different sizes: give them one size, or pass height and width"
            )
        return torch.cat(loaded)
    if isinstance(source, (str, Path)):
        source = _open(source, name)
    if isinstance(source, Image.Image):
        return _from_pil(source, mode, size, resample)
    if isinstance(source, np.ndarray):
        pixels = source.astype(np.float32) / 255 if source.dtype == np.uint8 else source.astype(np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        tensor = torch.from_numpy(pixels)
        tensor = (tensor if tensor.dim() == 4 else tensor[None]).movedim(-1, 1)  # (B, C, H, W)
    elif isinstance(source, torch.Tensor):
        tensor = source.detach().float().cpu()
        tensor = tensor[None] if tensor.dim() == 3 else tensor
    else:
        raise InputError(f"{name} is a {type(source).__name__}: expected a PIL image, a path, an array or a tensor")
    channels = 3 if mode == "RGB" else 1
    if tensor.dim() != 4 or tensor.shape[1] not in {1, 3}:
        raise InputError(
            f"{name} has shape {tuple(source.shape)}: expected (H, W, 3) for an array or (B, 3, H, W) for a tensor"
        )
    if not (torch.isfinite(tensor).all() and tensor.min() >= 0 and tensor.max() <= 1):
        raise InputError(
            f"{name} has values from {tensor.min():.3g} to {tensor.max():.3g}: expected 0 to 1 (uint8 arrays: 0 to 255)"
        )
    if tensor.shape[1] != channels:
        tensor = tensor.expand(-1, 3, -1, -1) if channels == 3 else tensor.mean(1, keepdim=True)
    if size is not None and tuple(tensor.shape[-2:]) != size:
        kind = {"mode": "bicubic", "antialias": True} if mode == "RGB" else {"mode": "nearest"}
        tensor = torch.nn.functional.interpolate(tensor, size, **kind).clamp(0, 1)
    return tensor


def _from_pil(image: Image.Image, mode: str, size: tuple[int, int] | None, resample: Image.Resampling) -> torch.Tensor:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert(mode)
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), resample)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    pixels = pixels[..., None] if pixels.dim() == 2 else pixels
    return pixels.movedim(-1, 0)[None]  # (1, C, H, W)


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


def parameters_text(request: Request, seed: int | None, model: str, extra: dict[str, str] | None = None) -> str:
    """How picture `seed` was made, in the form that other tools read from a PNG's `parameters` chunk
    (AUTOMATIC1111's)."""
    lines = [_one(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {_one(request.negative_prompt)}")
    facts: dict[str, Any] = {
        "Steps": request.num_inference_steps,
        "Sampler": request.sampler,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model,
    }
    if request.image is not None:
        facts["Denoising strength"] = request.strength
    if request.clip_skip:
        facts["Clip skip"] = request.clip_skip
    facts |= extra or {}
    shown = {
        key: f"{value:g}" if isinstance(value, float) else value for key, value in facts.items() if value is not None
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in shown.items()))
    return "\n".join(lines)


def _one(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else (prompt or [""])[0]


def output_paths(output: str | Path, count: int, *, force: bool = False) -> list[Path]:
    """The files that `count` pictures go to: `a.png`, or `a-0.png`, `a-1.png`, ... Found usable before any work starts.

    InputError where the format is unknown, the folder is missing or cannot be written, or a file exists and `force`
    is not set.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{str(path)!r} does not end in a picture format that can be written: use one of {', '.join(FORMATS)}"
        )
    check_folder(path.parent)
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(count)]
    for one in paths:
        if one.is_dir() or (one.exists() and not force):
            raise InputError(
                f"{str(one)!r} exists: choose another name with -o"
                + ("" if one.is_dir() else ", or overwrite it with --force")
            )
    return paths


def check_folder(folder: Path) -> None:
    """InputError where files cannot be made in it."""
    if not folder.is_dir():
        raise InputError(f"the folder {str(folder)!r} does not exist: make it first, or write somewhere else")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the folder {str(folder)!r} cannot be written to ({error.strerror}): choose another with -o"
        ) from error


def save_image(image: Image.Image, path: Path, parameters: str | None = None) -> None:
    """Writes a picture whole or not at all: a temporary file beside `path`, then a rename."""
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    if kind == "PNG" and parameters:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", parameters)
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            image.save(file, kind, **options)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_result(result: Result, paths: list[Path], model: str, metadata: bool = True) -> None:
    """Writes every picture of a result made with output_type="pil" to its path."""
    version = {"Version": f"fastldm {__version__}", "Backend": f"{result.backend} {result.dtype}"}
    for k, (image, path) in enumerate(zip(result.images, paths, strict=True)):
        seed = result.seeds[k] if result.seeds else None
        save_image(image, path, parameters_text(result.request, seed, model, version) if metadata else None)
