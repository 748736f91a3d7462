"""GroupNorm with what stands around it in a diffusion network.

    y = concat(x, skip) + shift                                      skip and shift are optional
    out = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias         mean and var over a group of channels, H and W
    out = out * sigmoid(out)                                         when silu

    x (B, C1, H, W), skip (B, C2, H, W), shift (B, C1 + C2), weight and bias (C1 + C2,) -> (B, C1 + C2, H, W)

`shift` is the time embedding's row for this block, with the bias of the convolution before it folded in. Statistics are
float32 whatever the dtype; a group may straddle the seam between x and skip. Formula: Wu and He 2018, arXiv:1803.08494.
Bytes: two reads and one write of (B, C1 + C2, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The formula plainly. PyTorch's group_norm keeps float32 statistics for half types, and channels-last memory."""
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out, inplace=True) if silu else out


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Group-normalise concat(x, skip) + shift, then SiLU if asked: (B, C, H, W), in x's dtype and memory format."""
    return group_norm_reference(x, groups, weight, bias, eps, silu=silu, shift=shift, skip=skip)
