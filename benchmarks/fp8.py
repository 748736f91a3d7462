"""Products of eight bits, against cuBLAS's of eight and of sixteen.

python -m benchmarks.fp8 [--list] [--workload NAME] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from fastldm.kernels.fp8 import E4M3, LINEAR_FP8, QUANTIZE


def rivals(x: Tensor, *rest: Any) -> dict[str, Callable[[], object]]:
    """Of quantize, which is called with one number more, and of linear_fp8. cuBLAS computes one product of a layer:
    for a gate, what comes before it."""
    if x.dtype != E4M3:
        scale = rest[0]
        return {"torch": lambda: (x * (1 / scale)).clamp_(-448, 448).to(E4M3)}
    weight, scale, bias, _, dtype = rest[:5]
    rows, factors = x.reshape(-1, x.shape[-1]), weight.t()
    ones = torch.ones(len(rows), 1, device=x.device)
    wide, wide_factors = rows.to(dtype), factors.to(dtype)

    def scaled() -> Tensor:  # by rows and columns, which cuBLAS does for bfloat16 outputs only
        return torch._scaled_mm(rows, factors, ones, scale[None, :], out_dtype=torch.bfloat16)

    def sixteen() -> Tensor:
        return wide @ wide_factors if bias is None else torch.addmm(bias, wide, wide_factors)

    return {"torch._scaled_mm": scaled, "sixteen bits": sixteen}


if __name__ == "__main__":
    harness.main([QUANTIZE, LINEAR_FP8], rivals)
