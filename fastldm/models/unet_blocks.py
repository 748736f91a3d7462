"""The blocks of a U-Net as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

AttentionKind = Literal["transformer", "pixels", "added", "adaptive"]
Resampling = Literal["convolution", "resnet", "blur"]

GROUP_SIZE = 32
"""Channels of a group of adaptive norms."""


@dataclass(frozen=True)
class Level:
    """One block of a U-Net: a resnet for each of `depths`, followed by an attention, or none (None)."""

    channels: int
    heads: int
    context: int  # channels of the text
    depths: tuple[int | None, ...]  # layers of each transformer; 1 of other kinds
    only_cross: bool = False  # whether the first attention of each transformer layer reads the text too, not itself
    attention: AttentionKind = "transformer"
    """What follows a resnet: a transformer; self-attention over the pixels; attention to the pixels and to keys that
    the text adds, or with `only_cross` to those alone; or attention to the text after an adaptive norm, with
    `self_attention` after one to the pixels."""
    resampling: Resampling = "convolution"
    """How the block is halved or enlarged, if it is not the last: by a convolution, a resnet, or a fixed blur."""
    scale: float = 1.0  # divides the outputs of resnets, and of attention over pixels
    skip_time_act: bool = False  # whether resnets read the time embedding without an activation
    self_attention: bool = False
    attention_groups: int | None = None  # of the norm before attention over pixels; None: there is none
    last_channels: int | None = None  # of the last resnet's output, where they are others
    skips: tuple[bool, ...] = ()
    """For each resnet, whether its output is a skip connection, or in the decoder, whether it reads one; by default all
    are and do."""

    @property
    def cross_attentions(self) -> int:
        """How many there are."""
        if self.attention == "pixels":
            return 0
        twice = self.attention == "transformer" and self.only_cross
        return sum(depth or 0 for depth in self.depths) * (2 if twice else 1)

    @property
    def uses_skip(self) -> tuple[bool, ...]:
        """`skips`, of each resnet."""
        return self.skips or (True,) * len(self.depths)

    @property
    def out_channels(self) -> int:
        """Channels of the last resnet's output."""
        return self.last_channels or self.channels


class Layer(NamedTuple):
    """A resnet of a level, and the attention after it."""

    in_channels: int  # of the output of the one before
    skip: int  # channels of the skip connection that it reads too; 0: none
    channels: int  # between its convolutions
    out_channels: int
    depth: int | None


def layers_of(level: Level, in_channels: int, skips: list[int] | None = None) -> list[Layer]:
    """The layers of a level after one of in_channels. skips: of the decoder, the channels of the skip connections that
    are left, of which it takes the last ones."""
    layers = []
    last = len(level.depths) - 1
    for k, (depth, uses_skip) in enumerate(zip(level.depths, level.uses_skip, strict=True)):
        skip = skips.pop() if skips is not None and uses_skip else 0
        out = level.out_channels if k == last else level.channels
        # The decoder's blocks with an adaptive norm and without attention narrow in the first convolution.
        inner = out if depth is None else level.channels
        layers.append(Layer(in_channels, skip, inner, out, depth))
        in_channels = out
    return layers
