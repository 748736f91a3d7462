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

    def __init__(self, every: int, branches: Sequence[Sequence[int]] | None = None) -> None:
        """branches: of each call those that its rows are, by default one and the same."""
        self.every, self.branches, self.call = every, branches, 0
        self.kept: dict[int, Tensor] = {}

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        branches = (1,) if self.branches is None else self.branches[self.call]
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
