"""Dynamic thresholding: the denoised latent is clamped to a quantile of its own numbers, and divided by it.

    limit = clamp(quantile(|m|, ratio), 1, most)                    of all C*h*w numbers of a sample
    m     = clamp(m, -limit, limit) / limit

Formula: Saharia et al. 2022, arXiv:2205.11487, section 2.3, with most as diffusers' `sample_max_value`.

The kernel that ends a step does not know of it, and no plain sampler pays: what a slot's row says, `clip` and the
coefficients of m_(i-k), is rewritten in the slot's own table just before, for they divide by the limit of row i - k as
well as the history could. The quantile is a sort of each slot, by PyTorch: fixed shapes, no value read by the host, so
that it is captured with the step. Only batches with such a slot run it.

Bytes: the rows of out and x of all slots, sorted in float32, some ten times 4 C*h*w a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.kernels.columns import COLUMNS, EXTRA, W0, State, branch_output, next_rows

P, Q, B0, F0 = (COLUMNS.index(name) for name in ("p", "q", "b0", "f0"))
CLIP = W0 + EXTRA.index("clip")
TERMS = 4  # m_i to m_(i-3)


class Thresholds(NamedTuple):
    """What slots are thresholded by, and were: S slots of up to T rows."""

    ratio: Tensor  # (S,) float32, the quantile; negative: the slot is not thresholded
    most: Tensor  # (S,) float32
    limits: Tensor  # (S, T) float32: of each row that was; 1 for others


def quantile(x: Tensor, ratio: float | Tensor) -> Tensor:
    """Of x (B, N), between its two nearest numbers as `torch.quantile`, which is not captured: (B,)."""
    count = x.shape[1]
    ordered = x.sort(1).values
    rank = (torch.as_tensor(ratio, dtype=x.dtype, device=x.device) * (count - 1)).expand(len(x))
    below = rank.floor()
    pair = torch.stack((below, rank.ceil()), 1).long().clamp(0, count - 1)
    low, high = ordered.gather(1, pair).unbind(1)
    return torch.lerp(low, high, rank - below)


def limit(m: Tensor, ratio: float | Tensor, most: float | Tensor) -> Tensor:
    """The limit of each sample of m (B, C, h, w): (B,)."""
    found = quantile(m.flatten(1).abs(), ratio)
    return torch.minimum(found.clamp_min(1.0), torch.as_tensor(most, dtype=found.dtype, device=found.device))


def threshold_rows(out: Tensor, state: State, thresholds: Thresholds) -> None:
    """Rewrite the rows that come next of slots that are thresholded; those of others stay as they are. In place."""
    x = state.x
    slots, i, row, running = next_rows(state)
    active = running & (thresholds.ratio >= 0)  # (S,)
    mixed = torch.zeros_like(x)
    for k in range(3):
        weight = row[:, W0 + k, None, None, None]
        own = branch_output(out, state, k).float()
        mixed = torch.where(weight != 0, torch.addcmul(mixed, weight, own), mixed)  # what has no weight may be anything
    rescaled = (state.rescale > 0) & ((row[:, W0] != 0) | (row[:, W0 + 2] != 0))
    mixed = mixed * torch.where(rescaled, state.factor, 1.0)[:, None, None, None]
    m = row[:, P, None, None, None] * x + row[:, Q, None, None, None] * mixed
    own = torch.where(active, limit(m, thresholds.ratio.clamp_min(0), thresholds.most), 1.0)
    thresholds.limits[slots, i] = own
    past = [torch.where(i >= k, thresholds.limits[slots, (i - k).clamp_min(0)], 1.0) for k in range(TERMS)]
    divisors = torch.where(active[:, None], torch.stack(past, 1), 1.0)  # (S, TERMS)
    row[:, B0 : B0 + TERMS] /= divisors
    row[:, F0 : F0 + TERMS] /= divisors
    row[:, CLIP] = torch.where(active, own, row[:, CLIP])
    state.table[slots, i] = row
