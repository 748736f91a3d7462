"""Adaptive projected guidance: the difference of two branches is shortened, its part along the guided one scaled.

    difference = row1 - row0 + momentum * the last step's difference     averaged from step to step
    short      = min(1, norm / |difference|)                             1 where norm is 0
    along      = <difference, row1> / |row1|^2                           of all C*h*w numbers of a sample
    out        = base + g * short * (difference + (eta - 1) * along * row1)

Formula: Sadat et al. 2024, arXiv:2410.02416, algorithm 1. base is row 0, as diffusers' AdaptiveProjectedGuidance has it
by default, or row 1, as in the paper, `use_original_formulation` there.

Without momentum that is two numbers a sample, w0 = 1 - g * short and w1 = g * short * (1 + (eta - 1) * along), around
row 1 w0 = -g * short and 1 more of w1: weights of the rows as classifier-free guidance has, so the kernel that ends a
step does not know of it, and no plain guidance pays. They are written into the slot's own table just before, where w1
was g: PyTorch's operations of fixed shapes, no value read by the host, captured with the step. Only batches with such a
slot run them. Sums are of float64, so that their order does not show in float32.

With momentum, the last difference is a third tensor, which no row of the network holds: one more plane a slot, only in
buffers for such slots. The sum is then computed here, and takes the place of row 0, with the weights (1, 0), in a copy
of the network's output in float32.

Bytes: the two rows of out of all slots, as float64 some twenty times C*h*w a slot; thirty with momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.columns import W0, State, branch_output, next_rows


class Projection(NamedTuple):
    """How a request is projected."""

    eta: float  # what remains of the part along row 1
    norm: float  # the longest that a difference is; 0: any length
    momentum: float = 0.0  # how much of the last step's difference is added to this one's
    from_guided: bool = False  # whether row 1 is the base


class Projections(NamedTuple):
    """How slots are projected, (S,) float32 each."""

    eta: Tensor
    norm: Tensor  # negative: the slot is not projected
    momentum: Tensor
    from_guided: Tensor  # 1 or 0
    average: Tensor | None = None  # (S, C, h, w): their last differences, 0 before the first; None: none has momentum

    @staticmethod
    def empty(average: Tensor | None, slots: int, device: torch.device | str) -> Projections:
        """Of slots that are not projected. average: None for slots that never have momentum."""
        eta, norm, momentum, from_guided = (
            torch.full((slots,), number, device=device) for number in (1.0, -1.0, 0.0, 0.0)
        )
        return Projections(eta, norm, momentum, from_guided, average)

    def set(self, index: Tensor, projection: Projection | None) -> None:
        """Of the slots of an index, in place."""
        numbers = Projection(1.0, -1.0) if projection is None else projection
        for buffer, number in zip(self, numbers, strict=False):
            assert buffer is not None
            buffer.index_fill_(0, index, float(number))


def project(
    unguided: Tensor, guided: Tensor, scale: float, projection: Projection, average: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out` and the difference, each (B, C, h, w) float32, of rows 0 and 1. average: the last step's difference."""
    row0, row1 = unguided.double(), guided.double()
    difference = row1 - row0
    if average is not None:
        difference = difference + projection.momentum * average
    step, along = _shares(difference, row1, scale, projection.eta, projection.norm)
    base = row1 if projection.from_guided else row0
    return (base + _each(step) * difference + _each(along) * row1).float(), difference.float()


def project_rows(out: Tensor, state: State, projections: Projections) -> Tensor:
    """Rewrite w0 and w1 of the rows that come next of slots that are projected, and guided there, and average their
    differences. In place. Returns what to go on with: `out`, or where slots average a copy in float32."""
    slots, i, row, running = next_rows(state)
    active = running & (projections.norm >= 0) & (row[:, W0] != 0)  # (S,)
    unguided, guided = (branch_output(out, state, k).double() for k in (0, 1))  # of others they may be anything
    difference, average = guided - unguided, projections.average
    if average is not None:
        difference = difference + _each(projections.momentum) * average
    base = projections.from_guided.double()
    step, along = _shares(difference, guided, row[:, W0 + 1] - base, projections.eta, projections.norm)
    weights = [1 - base - step, base + step + along]
    if average is not None:
        averaging = active & (projections.momentum != 0)
        mixed = torch.where(_each(base) > 0, guided, unguided) + _each(step) * difference + _each(along) * guided
        average.copy_(torch.where(_each(averaging), difference, average))
        weights = [torch.where(averaging, own, w) for own, w in zip((1.0, 0.0), weights, strict=True)]
        out = _with_rows(out, torch.where(averaging, state.rows[:, 0], len(out)), mixed)
    for k, weight in enumerate(weights):
        row[:, W0 + k] = torch.where(active, weight.float(), row[:, W0 + k])
    state.table[slots, i] = row
    return out


def _shares(
    difference: Tensor, guided: Tensor, scale: float | Tensor, eta: float | Tensor, norm: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) float64: how much of the difference is added, and how much of row 1 beside it. Each (B, C, h, w) float64."""
    flat, row1 = difference.flatten(1), guided.flatten(1)
    # Neither divides by 0: no difference is not shortened, and has nothing along row 1.
    length = flat.square().sum(1).sqrt()
    longest = torch.as_tensor(norm, dtype=length.dtype, device=length.device).expand_as(length)
    short = torch.where(longest > 0, longest / length.maximum(longest), 1.0)
    along = (flat * row1).sum(1) / row1.square().sum(1).clamp_min(1e-24)
    step = scale * short
    return step, step * (eta - 1) * along


def _with_rows(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of `out` (R, C or more, h, w) in float32 with the first C channels of rows `index` (S,) replaced by
    `values` (S, C, h, w); R for those that replace none."""
    padded = F.pad(out.float(), (0, 0, 0, 0, 0, 0, 0, 1))  # a row that takes the others' in
    padded[:, : values.shape[1]].index_copy_(0, index.long(), values.float())
    return padded[: len(out)]


def _each(x: Tensor) -> Tensor:
    return x[:, None, None, None]
