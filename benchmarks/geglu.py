"""The gate of a feed-forward, against PyTorch's own and torch.compile's.

python -m benchmarks.geglu [--list] [--workload NAME] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import harness
from fastldm.kernels.geglu import GEGLU, geglu_reference


def rivals(x: Tensor) -> dict[str, Callable[[], object]]:
    torch._dynamo.config.recompile_limit = 1000  # one for each shape
    compiled = torch.compile(geglu_reference, dynamic=False, fullgraph=True)
    return {"torch.compile": lambda: compiled(x)}


if __name__ == "__main__":
    harness.main([GEGLU], rivals)
