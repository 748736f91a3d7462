"""LayerNorm, alone and after a sum, against PyTorch's own and torch.compile's.

python -m benchmarks.layer_norm [--list] [--workload NAME] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from benchmarks import harness
from fastldm.kernels.layer_norm import ADD_LAYER_NORM, LAYER_NORM, add_layer_norm_reference, layer_norm_reference


def rivals(*args: Any) -> dict[str, Callable[[], object]]:
    """Arguments of either op: with a residual they are more than four."""
    torch._dynamo.config.recompile_limit = 1000  # one for each shape
    reference = add_layer_norm_reference if len(args) > 4 else layer_norm_reference
    compiled: Callable[..., object] = torch.compile(reference, dynamic=False, fullgraph=True)
    return {"torch.compile": lambda: compiled(*args)}


if __name__ == "__main__":
    harness.main([LAYER_NORM, ADD_LAYER_NORM], rivals)
