"""Matrix products with bias, residual and gate, against cuBLAS through PyTorch and torch.compile's best.

python -m benchmarks.linear [--list] [--workload NAME] [--dtype bfloat16]

"torch" is the path where the kernel is not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import harness
from fastldm.kernels.linear import LINEAR, LINEAR_GEGLU, linear_geglu_reference, linear_reference


def rivals(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> dict[str, Callable[[], object]]:
    """Of linear, which is called with a residual or None and whether it may be overwritten, and of linear_geglu, which
    is not."""
    rest = rest[:1]
    torch._dynamo.config.recompile_limit = 1000  # one for each shape
    reference = linear_reference if rest else linear_geglu_reference
    compiled = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
    contenders: dict[str, Callable[[], object]] = {"torch.compile": lambda: compiled(x, weight, bias, *rest)}

    rows, factors = x.reshape(-1, x.shape[-1]), weight.t()
    residual = rest[0] if rest else None
    if not rest:
        contenders["gate by torch"] = lambda: linear_geglu_reference(x, weight, bias)
    elif residual is not None:  # which cuBLAS adds, from a copy; then the bias takes a pass
        flat = residual.view(len(rows), -1)
        contenders["addmm"] = lambda: _plus(torch.addmm(flat, rows, factors), bias)
    elif bias is not None:
        contenders["addmm"] = lambda: torch.addmm(bias, rows, factors)
    else:
        contenders["mm"] = lambda: rows @ factors
    return contenders


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out.add_(bias)


if __name__ == "__main__":
    harness.main([LINEAR, LINEAR_GEGLU], rivals)
