"""What the tables of keys of networks' configs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastldm.errors import CheckpointError
from fastldm.reading import MAX_CHANNELS, Field, Integer, Kind, ListOf, Number, OneOf, read_fields

WIDTH = Integer(1, MAX_CHANNELS)  # channels, heads, groups
LAYERS = Integer(1, 64)
EPSILON = Number(0, 1)
MAX_LEVELS = 12


def only(values: Mapping[str, tuple[Any, ...]]) -> dict[str, Field]:
    """Keys with their implemented values. A missing key has the first."""
    return {key: Field(OneOf(*allowed), allowed[0]) for key, allowed in values.items()}


def per_level(kind: Kind, levels: int, scalar: bool = True) -> ListOf:
    """A value per level; a scalar is the value of all levels."""
    return ListOf(kind, levels, levels, scalar, each="level")


def channels_of(cfg: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """Channels per level; their number is the length of other keys' lists."""
    fields = {"block_out_channels": Field(ListOf(WIDTH, 1, MAX_LEVELS))}
    return read_fields(cfg, fields, source)["block_out_channels"]


def check_divides(channels: int, into: int, key: str, source: str, what: str = "channels") -> None:
    if channels % into:
        raise CheckpointError(f"{source}: {channels} {what} do not divide into {key!r} {into}")
