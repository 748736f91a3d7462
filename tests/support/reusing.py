"""The judge of reuse between steps: diffusers' own U-Net in diffusers' own loop, of which the deep output is replaced.

All of the network runs at each call. Where a row reuses, what the decoder's last block but one puts out is replaced by
what it put out at the last call that computed all: so what the rest computes is what reuse means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Reusing:
    """A hook of the block, and what it keeps between calls, by branch of guidance."""

    def __init__(self, every: int, guided: Sequence[bool] | None = None) -> None:
        """guided: of each call whether the first half of its rows is unconditional; by default all calls are alike."""
        self.every, self.guided, self.call = every, guided, 0
        self.kept: dict[str, Tensor] = {}

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        branches = (
            ["conditional"] if self.guided is None or not self.guided[self.call] else ["unconditional", "conditional"]
        )
        if self.call % self.every == 0 or not self.kept.keys() >= set(branches):
            self.kept = dict(zip(branches, output.clone().chunk(len(branches)), strict=True))
        self.call += 1
        return torch.cat([self.kept[branch] for branch in branches])


@contextmanager
def reusing(unet: Any, every: int) -> Iterator[None]:
    """Inside, of every so many calls of a U-Net of diffusers the first computes all."""
    handle = unet.up_blocks[-2].register_forward_hook(Reusing(every))
    try:
        yield
    finally:
        handle.remove()
