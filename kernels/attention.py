"""Attention over heads that lie side by side in the channels, as the projections leave them.

    out[b, n, h] = sum_m softmax_m(scale * q[b, n, h] . k[b, m, h]) v[b, m, h]        scale = head_dim ** -0.5

    q (B, N, H*D), k and v (B, M, H*D) -> (B, N, H*D)

Rows (b, n) may have any stride, so k and v can be the halves of one packed (B, M, 2*H*D) tensor; channels are dense.
Bytes: q, k, v and out once each; the (N, M) scores are never written.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """PyTorch's scaled dot product, which keeps the softmax in float32 for half types."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N or M, D)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # (B, N, H*D)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Multi-head attention: q (B, N, H*D), k and v (B, M, H*D) -> (B, N, H*D), in q's dtype.

    `scale` multiplies the scores (D ** -0.5 when None); `causal` lets query n see keys 0 to n only (text encoders).
    """
    return attention_reference(q, k, v, heads, scale=scale, causal=causal)
