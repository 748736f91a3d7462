"""The gate of a transformer's feed-forward.

    out = a * gelu(b)       (a | b) = x        x (..., 2C) -> (..., C)        gelu(b) = b * (1 + erf(b / sqrt 2)) / 2

The exact GELU, not its tanh approximation. Formula: Shazeer 2020, arXiv:2002.05202. Bytes: x once, half of it written.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu_reference(x: Tensor) -> Tensor:
    """The formula written plainly."""
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def geglu(x: Tensor) -> Tensor:
    """Gate the first half of the channels by the GELU of the second: x (..., 2C) -> (..., C), in x's dtype."""
    return geglu_reference(x)
