"""Convolutions and upsampling, against cuDNN in both layouts and torch.compile's best.

python -m benchmarks.conv [--list] [--workload NAME] [--dtype bfloat16]

"torch" is the path where the kernel is not taken. cuDNN searches its best plan for the rivals too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from fastldm.kernels.conv import (
    CONV2D,
    UPSAMPLE_CONV2D,
    conv2d_reference,
    upsample_conv2d_reference,
    upsample_conv2d_torch,
    upsample_phases,
)

Rivals = dict[str, Callable[[], object]]


def rivals(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Rivals:
    """Of conv2d, whose next argument is the residual, and of upsample_conv2d, where it is the height."""
    torch._dynamo.config.recompile_limit = 1000  # one for each shape
    torch.backends.cudnn.benchmark = True
    upsampling = bool(rest) and isinstance(rest[0], int)
    reference: Callable[..., Tensor] = upsample_conv2d_reference if upsampling else conv2d_reference
    options = rest[:2] if upsampling else rest
    compiled = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
    flat, flat_weight = x.contiguous(), weight.contiguous()
    flat_rest = [t.contiguous() if isinstance(t, Tensor) else t for t in options]
    contenders: Rivals = {
        "F.conv2d": lambda: reference(x, weight, bias, *options),
        "F.conv2d, contiguous": lambda: reference(flat, flat_weight, bias, *flat_rest),
        "torch.compile": lambda: compiled(x, weight, bias, *options),
    }
    return contenders | (_upsampling(x, weight, bias) if upsampling else _bare(x, weight, *options))


def _bare(x: Tensor, weight: Tensor, residual: Tensor | None = None, stride: int = 1, padding: int = 0) -> Rivals:
    """cuDNN alone: less work than the op if that has a bias or a residual."""
    return {"no bias, no residual": lambda: F.conv2d(x, weight, None, stride, padding)}


def _upsampling(x: Tensor, weight: Tensor, bias: Tensor | None) -> Rivals:
    """With cached phases: as a transposed convolution, and as one 2x2 convolution to four times the channels.

    In the latter each phase is a row and a column too large, which the interleaving cuts off.
    """
    batch, _, height, width = x.shape
    filters = weight.shape[0]
    phases = upsample_phases(weight)
    four = torch.cat(
        [phases[:, :, [3 - down, 1 - down]][..., [3 - right, 1 - right]] for down in (0, 1) for right in (0, 1)], dim=1
    )  # (C, 4O, 2, 2)
    four = four.transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def one_convolution() -> Tensor:
        each = F.conv2d(x, four, padding=1).unflatten(1, (2, 2, filters))  # (B, 2, 2, O, H + 1, W + 1)
        out = x.new_empty((batch, 2 * height, 2 * width, filters)).permute(0, 3, 1, 2)
        for down in (0, 1):
            for right in (0, 1):
                phase = each[:, down, right, :, down : down + height, right : right + width]
                target = out[:, :, down::2, right::2]
                target.copy_(phase) if bias is None else torch.add(phase, bias[:, None, None], out=target)
        return out

    return {
        "phases made before": lambda: upsample_conv2d_torch(x, weight, bias, 2 * height, 2 * width, phases),
        "one convolution": one_convolution,
    }


if __name__ == "__main__":
    harness.main([CONV2D, UPSAMPLE_CONV2D], rivals)
