"""2-D convolutions, and the nearest upsampling that stands before some of them.

    conv2d:           out[o, h, w] = sum_cij weight[o, c, i, j] x[c, stride h + i - padding, stride w + j - padding]
                                     + bias[o] + residual[o, h, w]
    upsample_conv2d:  x enlarged to `size` by nearest neighbour, then a 3x3 convolution with padding 1

    x (B, C, H, W), weight (O, C, K, K), bias (O,), residual as out -> out (B, O, H', W')

Channels-last in gives channels-last out. Accumulation is float32. For size = (2H, 2W) upsample_conv2d equals four 2x2
convolutions of the small input, one for each parity of the output's row and column, at 4/9 of the operations.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """PyTorch's convolution, then the sum."""
    out = F.conv2d(x, weight, bias, stride, padding)
    return out if residual is None else out + residual


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve x (B, C, H, W) with weight (O, C, K, K), add bias (O,) and residual (B, O, H', W'), in x's dtype."""
    return conv2d_reference(x, weight, bias, stride=stride, padding=padding, residual=residual)


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Enlarge, then convolve."""
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Enlarge x (B, C, H, W) to `size` (height, width), convolve with weight (O, C, 3, 3): (B, O, *size)."""
    return upsample_conv2d_reference(x, weight, bias, size)
