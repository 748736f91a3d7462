"""Enlarging latents and pixels between two stages, by AUTOMATIC1111's names."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import InputError
from fastldm.request import Request


@dataclass(frozen=True)
class Upscaler:
    """A way to enlarge what a stage made."""

    reads: str
    """The output_type of that stage: "latent", or "pt" for pixels in 0..1."""
    mode: str
    antialias: bool = False

    def enlarge(self, made: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) to (B, C, *size)."""
        if self.mode == "lanczos":
            return lanczos(made, size).clamp(0, 1)
        options: dict[str, Any] = {"antialias": self.antialias} if self.mode.startswith("bi") else {}
        resized = F.interpolate(made, size, mode=self.mode, **options)
        return resized.clamp(0, 1) if self.reads == "pt" else resized


_UPSCALERS = {
    "Latent": Upscaler("latent", "bilinear"),
    "Latent (antialiased)": Upscaler("latent", "bilinear", True),
    "Latent (bicubic)": Upscaler("latent", "bicubic"),
    "Latent (bicubic antialiased)": Upscaler("latent", "bicubic", True),
    "Latent (nearest)": Upscaler("latent", "nearest"),
    "Latent (nearest-exact)": Upscaler("latent", "nearest-exact"),
    "Nearest": Upscaler("pt", "nearest-exact"),
    "Bilinear": Upscaler("pt", "bilinear", True),
    "Bicubic": Upscaler("pt", "bicubic", True),
    "Lanczos": Upscaler("pt", "lanczos"),
}


def wanted(request: Request) -> Upscaler | None:
    """That of a request's high-resolution pass; None where it has none."""
    if request.hires_scale is None and request.hires_width is None and request.hires_height is None:
        return None
    return _UPSCALERS[request.hires_upscaler or "Latent"]


def size(request: Request, factor: int) -> tuple[int, int]:
    """(height, width) in pixels of the high-resolution pass of a completed request, multiples of `factor`.

    InputError for one that is not larger, or of another shape.
    """
    height, width = int(request.height or 0), int(request.width or 0)
    asked, scale = (request.hires_height, request.hires_width), request.hires_scale
    if scale is None:  # of one side: in proportion, as in AUTOMATIC1111
        scale = asked[0] / height if asked[0] is not None else (asked[1] or width) / width
    tall, wide = (round(scale * side / factor) * factor for side in (height, width))
    large = asked[0] or tall, asked[1] or wide
    if abs(large[0] * width - large[1] * height) > factor * max(width, height):
        raise InputError(
            f"hires_width and hires_height are {large[1]}x{large[0]}: expected {width}x{height} in proportion"
        )
    if large[0] < height or large[1] < width:
        raise InputError(f"the high-resolution pass is of {large[1]}x{large[0]} pixels, less than {width}x{height}")
    return large


def lanczos(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, C, *size) by Lanczos' filter of three lobes, as Pillow resizes."""
    down = _matrix(pixels.shape[2], size[0]).to(pixels)
    across = _matrix(pixels.shape[3], size[1]).to(pixels)
    return down @ pixels @ across.mT


@functools.lru_cache(16)
def _matrix(length: int, new: int) -> Tensor:
    """The filter's weights (new, length), float64: of each new pixel those of the old ones."""
    scale = length / new
    stretch = max(scale, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]) / stretch
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)
