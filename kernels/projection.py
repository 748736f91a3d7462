"""Adaptive projected guidance: the difference of two branches is shortened, its part along the guided one scaled.

    difference = row1 - row0
    short      = min(1, norm / |difference|)                        1 where norm is 0
    along      = <difference, row1> / |row1|^2                      of all C*h*w numbers of a sample
    out        = row0 + g * short * (difference + (eta - 1) * along * row1)

Formula: Sadat et al. 2024, arXiv:2410.02416, algorithm 1 without momentum, around row 0 as diffusers'
AdaptiveProjectedGuidance has it by default.

That is two numbers a sample, w0 = 1 - g * short and w1 = g * short * (1 + (eta - 1) * along): weights of the rows as
classifier-free guidance has, so the kernel that ends a step does not know of it, and no plain guidance pays. They are
written into the slot's own table just before, where w1 was g: PyTorch's operations of fixed shapes, no value read by
the host, captured with the step. Only batches with such a slot run them. Sums are of float64, so that their order does
not show in float32.

Bytes: the two rows of out of all slots, as float64 some twenty times C*h*w a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.kernels.columns import W0, State, branch_output, next_rows


class Projections(NamedTuple):
    """How slots are projected, (S,) float32 each."""

    eta: Tensor  # what remains of the part along row 1
    norm: Tensor  # the longest that a difference is; 0: any length; negative: the slot is not projected


def projected_weights(
    unguided: Tensor, guided: Tensor, scale: float | Tensor, eta: float | Tensor, norm: float | Tensor
) -> tuple[Tensor, Tensor]:
    """w0 and w1 (B,) float32 of rows 0 and 1, each (B, C, h, w). scale, eta, norm: for all or (B,)."""
    row0, row1 = unguided.flatten(1).double(), guided.flatten(1).double()
    difference = row1 - row0
    # Neither divides by 0: no difference is not shortened, and has nothing along row 1.
    length = difference.square().sum(1).sqrt()
    longest = torch.as_tensor(norm, dtype=length.dtype, device=length.device).expand_as(length)
    short = torch.where(longest > 0, longest / length.maximum(longest), 1.0)
    along = (difference * row1).sum(1) / row1.square().sum(1).clamp_min(1e-24)
    step = scale * short
    return (1 - step).float(), (step * (1 + (eta - 1) * along)).float()


def project_rows(out: Tensor, state: State, projections: Projections) -> None:
    """Rewrite w0 and w1 of the rows that come next of slots that are projected, and guided there. In place."""
    slots, i, row, running = next_rows(state)
    active = running & (projections.norm >= 0) & (row[:, W0] != 0)  # (S,)
    unguided, guided = (branch_output(out, state, k) for k in (0, 1))
    weights = projected_weights(unguided, guided, row[:, W0 + 1], projections.eta, projections.norm)
    for k, weight in enumerate(weights):  # of others it may be anything
        row[:, W0 + k] = torch.where(active, weight, row[:, W0 + k])
    state.table[slots, i] = row
