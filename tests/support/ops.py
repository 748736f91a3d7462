"""Checks of a kernel against its reference: the same on a GPU and, interpreted, on a CPU.

check(GEGLU, x)                      the kernel, in x's dtype, within the error budget
check_registered(GEGLU, x)           the op as torch.compile and FakeTensor see it
with poisoned(): ...                 every uninitialised buffer of torch is NaN
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastldm.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 products are wrong: that dtype is tested where there is a device.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SMALL = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}  # a quarter of the last place, about


def modules() -> set[str]:
    """The files of kernels/ that declare ops: each has tests of its name, and faults in mutations.py."""
    return {op.module for op in dispatch.load_ops().values()}


def kernels() -> set[str]:
    """The names of all that ops launch: an op whose kernels are not in the table of benchmarks/aot.py is not compiled
    by it.
    """
    files = [sys.modules[f"fastldm.kernels.{name}"] for name in modules()]
    return {name for file in files for name in vars(file) if name.endswith("_kernel")}


def error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|, in float64; infinite where got is not finite."""
    got, expected = got.double().cpu(), expected.double().cpu()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.isfinite().all():
        return float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item() if got.numel() else 0.0


def check(op: dispatch.Op[..., Any], *args: Any, **kwargs: Any) -> None:
    """The Triton path within twice the error of the reference in the same precision, plus a small constant.

    Both against the reference in float64. Tensors that the op mutates are compared too.
    """
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    verdict = op.supports(*args, **kwargs)
    assert verdict, verdict.reason

    exact = outputs(op.reference, *(_double((args, kwargs))))
    expected = outputs(op.reference, *copy.deepcopy((args, kwargs)))
    with poisoned():
        got = outputs(op.triton, *copy.deepcopy((args, kwargs)))
    assert len(got) == len(expected) == len(exact)
    for result, same_precision, truth in zip(got, expected, exact, strict=True):
        assert result.dtype == same_precision.dtype
        allowed = 2 * error(same_precision, truth) + SMALL[dtype]
        assert error(result, truth) <= allowed, f"error {error(result, truth):.2e}, allowed {allowed:.2e}"


def check_registered(op: dispatch.Op[..., Any], *args: Any, **kwargs: Any) -> None:
    """Schema and fake implementation of torch.ops.fastldm.NAME agree with the implementation."""
    torch.library.opcheck(op.registered, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def outputs(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The results of the function, and all of its floating arguments, which it may have mutated."""
    result = function(*args, **kwargs)
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    floating = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    return [t for t in (*returned, *floating) if t is not None]


def _double(value: Any) -> Any:
    """Deep copy with floating tensors in float64, strides kept where that is possible."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_double, value))
    return value


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty, empty_like, empty_strided and Tensor.new_empty give NaN (integers: their least value)."""

    def spoil(t: Tensor) -> Tensor:
        if t.is_meta:
            return t
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(torch.iinfo(t.dtype).min)

    def spoiled(function: Any) -> Any:
        return lambda *args, **kwargs: spoil(function(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty", spoiled(torch.empty)),
        mock.patch.object(torch, "empty_like", spoiled(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", spoiled(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", spoiled(Tensor.new_empty)),
    ):
        yield
