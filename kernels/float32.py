"""float32 is float32: PyTorch's libraries on a GPU multiply it as it is, whatever the process allows them.

By default cuDNN rounds the operands of float32 convolutions to TF32's 10 bits, and so does cuBLAS for matrix products
where somebody asked for it (`torch.set_float32_matmul_precision("high")`). Whoever loads a model in float32 wants
neither, and what decodes once more in float32 because float16 overflowed does not either. Triton's matrix products
would round too: the kernels that have some refuse float32 on a GPU.

A convolution takes this as an argument. A matrix product reads a switch of the whole process as it is launched, so the
switch is turned for that long, and only where it is on. There are two APIs for it. The older one
(`allow_tf32`, `set_float32_matmul_precision`) raises where the newer one was used to say something else, and cannot say
all that the newer one can, so the newer one (`fp32_precision`, since torch 2.9) is read, set and set back.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.dispatch import traced


def _may_round(x: Tensor) -> bool:
    """Whether a library might multiply x in TF32. What is recorded for another time follows the switches of then."""
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
    """Inside, matrix products of x are launched."""
    return _switch if _may_round(x) else nullcontext()


class _Switch(AbstractContextManager[None]):
    """The process's, kept from TF32 while any thread is inside, and then as it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: str | None = None  # None: it was not on

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            self._inside += 1
            if self._inside == 1 and matmul.fp32_precision == "tf32":
                matmul.fp32_precision = "none"  # as the switch for all of PyTorch says: is it that which is on?
                self._before = "none" if matmul.fp32_precision == "tf32" else "tf32"
                matmul.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._before is not None:
                if matmul.fp32_precision == "ieee":  # else somebody has set it meanwhile
                    matmul.fp32_precision = self._before
                self._before = None


_switch = _Switch()
