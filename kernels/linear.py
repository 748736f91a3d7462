"""Matrix products with what follows them.

    out = x weight^T + bias + residual        x (..., I), weight (O, I), bias (O,), residual (..., O) -> (..., O)

Float32 accumulation. Rows of x and of weight may have any stride; the last dimension is dense.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None
) -> Tensor:
    """PyTorch's linear, then the sum."""
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
    """Multiply x (..., I) by weight (O, I), then add bias (O,) and residual (..., O), in x's dtype."""
    return linear_reference(x, weight, bias, residual=residual)
