"""GroupNorm with SiLU, shift and skip, against PyTorch's own and torch.compile's, in both memory formats; and after a
sum, against torch.compile's.

python -m benchmarks.group_norm [--list] [--workload NAME] [--dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import harness
from fastldm.kernels.group_norm import ADD_GROUP_NORM, GROUP_NORM, add_group_norm_reference, group_norm_reference


def rivals(*args: Any, **kwargs: Any) -> dict[str, Callable[[], object]]:
    """Arguments of either op: behind x that of the sum has a residual and a bias, the other's groups."""
    torch._dynamo.config.recompile_limit = 1000  # one for each shape
    if isinstance(args[1], int):
        return _alone(*args, **kwargs)
    compiled = torch.compile(add_group_norm_reference, dynamic=False, fullgraph=True)
    return {"torch.compile": lambda: compiled(*args, **kwargs)}


def _alone(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> dict[str, Callable[[], object]]:
    """The channels-first rivals get channels-first tensors, as in a network that is channels-first throughout."""
    compiled = torch.compile(group_norm_reference, dynamic=False, fullgraph=True)
    x_first, skip_first = x.contiguous(), None if skip is None else skip.contiguous()

    def call(norm: Callable[..., Tensor], x: Tensor, skip: Tensor | None) -> Callable[[], object]:
        return lambda: norm(x, groups, weight, bias, eps, silu, shift, skip)

    return {  # eager channels-last is the harness's "torch"
        "eager NCHW": call(group_norm_reference, x_first, skip_first),
        "torch.compile": call(compiled, x, skip),
        "torch.compile NCHW": call(compiled, x_first, skip_first),
    }


if __name__ == "__main__":
    harness.main([GROUP_NORM, ADD_GROUP_NORM], rivals)
