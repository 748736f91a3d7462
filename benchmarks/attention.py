"""Attention, against each backend of PyTorch's scaled_dot_product_attention.

python -m benchmarks.attention [--list] [--workload NAME] [--dtype bfloat16]

Rivals get (B, H, N, D) views of the same tensors, so nothing is copied. For a call with lengths they get a mask, for
one with slots the keys and values gathered by slot, both computed before timing; backends that take no mask fail.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from fastldm.kernels.attention import ATTENTION

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def rivals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> dict[str, Callable[[], object]]:
    mask = None
    if kv_len is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < kv_len[:, None])[:, None, None]  # (S, 1, 1, M)
    if slots is not None:
        k, v, mask = k[slots], v[slots], mask if mask is None else mask[slots]
    if mask is not None and causal:
        mask = mask & mask.new_ones(q.shape[1], k.shape[1]).tril()
    views = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]  # (B, H, N or M, D)

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*views, mask, scale=scale, is_causal=causal and mask is None)

    return {name: lambda backend=backend: attend(backend) for name, backend in BACKENDS.items()}


if __name__ == "__main__":
    harness.main([ATTENTION], rivals)
