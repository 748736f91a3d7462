"""Ranges of sizes that a network runs with, and whether a picture's is among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastldm.errors import InputError


@dataclass(frozen=True)
class Axis:
    """A dimension whose size is chosen at run time, from `least` to `most`; `best` is what an engine is tuned for.

    Axes of one name are one quantity. Where a network's outputs have it in another unit (pixels for latents), sizes are
    to each other as `best` is to `best`.
    """

    name: str
    least: int
    best: int
    most: int
    multiple_of: int = 1


def check_size(latents: Sequence[tuple[Axis, Axis]], factor: int, width: int, height: int) -> None:
    """InputError for pictures of a size that none of these ranges has. latents: heights and widths. factor: pixels a
    latent."""

    def words(tall: Axis, wide: Axis) -> str:
        least, most = (f"{w * factor}x{h * factor}" for w, h in ((wide.least, tall.least), (wide.most, tall.most)))
        return least if least == most else f"{least} to {most} in steps of {tall.multiple_of * factor}"

    near = [
        [nearest(axis, n // factor) * factor for axis, n in zip(one, (height, width), strict=True)] for one in latents
    ]
    if [height, width] not in near:
        h, w = min(near, key=lambda one: abs(one[0] - height) + abs(one[1] - width))
        runs = " or ".join(words(*one) for one in latents)
        raise InputError(f"the size is {width}x{height}: this bundle runs {runs}, of which {w}x{h} is nearest")


def nearest(axis: Axis, size: int) -> int:
    """The size closest to this one that an axis can have; the smaller of two."""
    unit = axis.multiple_of
    below, above = size // unit * unit, -(-size // unit) * unit
    return min(max(below if size - below <= above - size else above, axis.least), axis.most)
