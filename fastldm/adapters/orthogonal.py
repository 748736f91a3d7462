"""Forms that rotate the rows of a weight: OFT (arXiv:2306.07280), in blocks, and BOFT (2311.06243), by butterflies.

A rotation is the Cayley transform R = (I + Q)(I - Q)^-1 of the skew-symmetric Q = b - b^T of a stored block b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rotations(blocks: Tensor, limit: float) -> Tensor:
    """R (..., b, b) in float32 of stored blocks (..., b, b). limit: of the norm of all Q together; 0 for none."""
    blocks = blocks.float()
    q = blocks - blocks.mT
    if limit > 0:
        norm = q.norm() + 1e-8
        q = torch.where(norm > limit, q * limit / norm, q)
    identity = torch.eye(q.shape[-1], device=q.device)
    return (identity + q) @ torch.linalg.inv(identity - q)


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    """Each output of a weight (out, ...) times its own factor (out,)."""
    return weight if rescale is None else weight * rescale.float().view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True, eq=False)
class OFT:
    """W + dW = rescale * ((1 - s) I + s R)^T W in blocks of rows, at scale s. `rescale` acts fully at every scale."""

    blocks: Tensor
    """(blocks, b, b) with blocks * b = out."""
    limit: float
    """What alpha states: the constraint of the norm of Q, times the outputs."""
    rescale: Tensor | None
    """(out,)."""
    rank: None = None

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        base = weight.float()
        r = rotations(self.blocks, self.limit)
        rows = base.reshape(*r.shape[:2], -1)  # (blocks, b, in * kh * kw)
        turned = torch.baddbmm(rows, r.mT - torch.eye(r.shape[1], device=r.device), rows, alpha=scale)
        return _rescaled(turned.reshape(weight.shape), self.rescale) - base


@dataclass(frozen=True, eq=False)
class BOFT:
    """W + dW = rescale * B_m ... B_1 W: stage i rotates blocks of rows that lie 2^i b / 2 apart, b in a block.

    At scale s each stage is (1 - s) I + s R; `rescale` acts fully at every scale.
    """

    blocks: Tensor
    """(stages, blocks, b, b) with blocks * b = out and b even."""
    limit: float
    rescale: Tensor | None
    """(out,)."""
    rank: None = None

    def delta(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        base = weight.float()
        turned = base.flatten(1)  # (out, columns)
        _, count, size, _ = self.blocks.shape
        identity = torch.eye(size, device=self.blocks.device)
        for stage, r in enumerate(rotations(self.blocks, self.limit)):
            half = 2**stage * size // 2
            paired = turned.unflatten(0, (-1, 2, half)).transpose(1, 2)  # rows that meet lie side by side
            rows = paired.reshape(count, size, -1)
            rows = torch.bmm(scale * r + (1 - scale) * identity, rows)
            turned = rows.reshape(paired.shape).transpose(1, 2).flatten(0, 2)
        return _rescaled(turned.reshape(weight.shape), self.rescale) - base
