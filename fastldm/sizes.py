"""Ranges of sizes that a network supports, and checks of image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastldm.errors import InputError


@dataclass(frozen=True)
class Axis:
    """A dimension whose size is selected at run time, from `least` to `most`; engines are tuned for `best`.

    Axes of the same name are the same quantity. If a network's outputs have it in another unit (pixels and latents),
    the ratio of sizes is that of their `best`.
    """

    name: str
    least: int
    best: int
    most: int
    multiple_of: int = 1


def check_size(latents: Sequence[tuple[Axis, Axis]], factor: int, width: int, height: int) -> None:
    """InputError for an image size that is in none of these ranges. latents: ranges of heights and widths. factor:
    pixels per latent."""

    def describe(h: Axis, w: Axis) -> str:
        least, most = (f"{x * factor}x{y * factor}" for x, y in ((w.least, h.least), (w.most, h.most)))
        return least if least == most else f"{least} to {most} in steps of {h.multiple_of * factor}"

    suggestions = [(nearest(h, height // factor) * factor, nearest(w, width // factor) * factor) for h, w in latents]
    if (height, width) not in suggestions:
        best_h, best_w = min(suggestions, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
        ranges = " or ".join(describe(h, w) for h, w in latents)
        raise InputError(
            f"the size is {width}x{height}: this bundle runs {ranges}, of which {best_w}x{best_h} is nearest"
        )


def nearest(axis: Axis, size: int) -> int:
    """The closest allowed size of an axis; of two equally close, the smaller."""
    unit = axis.multiple_of
    below, above = size // unit * unit, -(-size // unit) * unit
    return min(max(below if size - below <= above - size else above, axis.least), axis.most)
