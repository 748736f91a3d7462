"""kernels/geglu.py: the reference against PyTorch, the kernel against the reference."""

from __future__ import annotations

import ops
import pytest
import torch
import torch.nn.functional as F
from fastldm.kernels.geglu import GEGLU, geglu, geglu_reference
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = {
    "sd15-level-0": (2, 6, 2 * 1280),
    "one-row": (1, 2 * 320),
    "odd-rows": (7, 2 * 328),  # a tail of rows and of channels
    "few-channels": (3, 5, 2 * 8),  # fewer than a block
}


def test_the_reference_is_the_formula() -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    a, b = x[..., :6], x[..., 6:]
    assert torch.allclose(geglu_reference(x), a * F.gelu(b, approximate="none"), rtol=0, atol=0)
    assert torch.allclose(geglu_reference(x), a * b * torch.special.ndtr(b), rtol=1e-12)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ops.check(GEGLU, torch.randn(shape, dtype=dtype, device=ops.DEVICE))


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_extreme_values(scale: float) -> None:
    """Far out, gelu is 0 or the identity: erf must saturate, not overflow."""
    ops.check(GEGLU, scale * torch.randn(4, 2 * 64, device=ops.DEVICE))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 20), channels=st.integers(1, 80))
def test_any_shape(rows: int, channels: int) -> None:
    ops.check(GEGLU, torch.randn(rows, 16 * channels, device=ops.DEVICE))


def test_what_is_refused_says_why() -> None:
    assert "do not halve" in GEGLU.supports(torch.empty(2, 7)).why
    assert "not contiguous" in GEGLU.supports(torch.empty(4, 64)[::2]).why
    assert "stride" in GEGLU.supports(torch.empty(64, 4).t()).why
    assert torch.equal(geglu(torch.ones(2, 6)), geglu_reference(torch.ones(2, 6)))  # and runs all the same


def test_registered() -> None:
    ops.check_registered(GEGLU, torch.randn(3, 32, device=ops.DEVICE))
