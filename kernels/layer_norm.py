"""LayerNorm over the last dimension.

    out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        x (..., C), weight and bias (C,) -> (..., C)

Statistics are float32 whatever the dtype. Formula: Ba et al. 2016, arXiv:1607.06450. Bytes: x read and written once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's layer_norm, which keeps float32 statistics for half types."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each row of x (..., C), in x's dtype."""
    return layer_norm_reference(x, weight, bias, eps)
