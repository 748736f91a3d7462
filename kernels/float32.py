"""Full float32 precision for PyTorch's libraries on a GPU, whatever TF32 settings the process has.

By default cuDNN rounds the operands of float32 convolutions to TF32's 10 bits, and so does cuBLAS for matrix products
after `torch.set_float32_matmul_precision("high")`. A model that is loaded in float32 must not be rounded, nor a decode
that is repeated in float32 because float16 overflowed. Triton's matrix products would round too: kernels with matrix
products refuse float32 on a GPU.

For a convolution the precision is an argument. A matrix product reads a setting of the process when it is launched, so
that setting is changed for the launch, and only where it allows TF32. There are two APIs for it. The older one
(`allow_tf32`, `set_float32_matmul_precision`) raises where the newer one has set a different value, and cannot express
all of its values, so the newer one (`fp32_precision`, since torch 2.9) is read, set and restored.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.dispatch import traced


def _may_round(x: Tensor) -> bool:
    """Whether a library might multiply x in TF32. A traced call follows the settings of when it will run."""
    return x.is_cuda and x.dtype == torch.float32 and not traced()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, transposed: bool = False
) -> Tensor:
    """F.conv2d or F.conv_transpose2d."""
    if not _may_round(x):
        function = F.conv_transpose2d if transposed else F.conv2d
        return function(x, weight, bias, stride=stride, padding=padding)
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return torch._convolution(
        *(x, weight, bias, (stride, stride), (padding, padding), (1, 1), transposed, (0, 0), 1),
        *(cudnn.benchmark, deterministic, cudnn.enabled, False),
    )


def products(x: Tensor) -> AbstractContextManager[None]:
    """A context for launching matrix products of x, in full precision."""
    return _switch if _may_round(x) else nullcontext()


class _Switch(AbstractContextManager[None]):
    """The setting of the process: no TF32 while any thread is inside the context, then restored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._previous: str | None = None  # None: TF32 was off

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            self._entered += 1
            if self._entered == 1 and matmul.fp32_precision == "tf32":
                matmul.fp32_precision = "none"  # inherit from the global setting: is it that one which allows TF32?
                self._previous = "none" if matmul.fp32_precision == "tf32" else "tf32"
                matmul.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._previous is not None:
                if matmul.fp32_precision == "ieee":  # else it was set elsewhere meanwhile
                    matmul.fp32_precision = self._previous
                self._previous = None


_switch = _Switch()
