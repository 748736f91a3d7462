"""kernels/geglu.py: the reference against PyTorch, the kernel against the reference."""

from __future__ import annotations

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.kernels.geglu import GEGLU, default, geglu, geglu_reference, is_candidate

SHAPES = {
    "sd15-level-0": (2, 6, 2 * 1280),
    "one-row": (1, 2 * 320),
    "odd-rows": (7, 2 * 328),  # a tail of rows and of channels
    "few-channels": (3, 5, 2 * 8),  # fewer than a block
}


def test_reference_matches_formula() -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    a, b = x[..., :6], x[..., 6:]
    assert torch.allclose(geglu_reference(x), a * F.gelu(b, approximate="none"), rtol=0, atol=0)
    assert torch.allclose(geglu_reference(x), a * b * torch.special.ndtr(b), rtol=1e-12)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ops.check(GEGLU, torch.randn(shape, dtype=dtype, device=ops.DEVICE))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # where the square of b overflows, as it may
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e20])
def test_extreme_values_match_reference(scale: float) -> None:
    """Far out, gelu is 0 or the identity, also where the square of b overflows."""
    x = torch.randn(4, 2 * 64, device=ops.DEVICE)
    x[:, 64:] *= scale
    ops.check(GEGLU, x)


def test_gelu_has_float32_precision() -> None:
    """Everywhere, and for large negative b, where 1 + erf(b / sqrt 2) would have no digit left, relatively too."""
    b = torch.linspace(-5.5, 5.5, 2000, device=ops.DEVICE)
    got = GEGLU.triton(torch.stack((torch.ones_like(b), b), 1).contiguous())[:, 0].double()
    exact = F.gelu(b.double())
    assert (got - exact).abs().max() < 4e-7
    assert ((got - exact) / exact)[b < -3].abs().max() < 5e-3


@pytest.mark.parametrize("channels", [1280, 2560, 5120])
def test_defaults_fit_the_networks(channels: int) -> None:
    """No block of channels is beyond the end, and a tuner would try them."""
    config = default(f"c{channels}", 90)
    assert channels % config["CHANNELS"] == 0
    assert is_candidate(config, torch.empty(1, 2 * channels))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 20), channels=st.integers(1, 80))
def test_any_shape_matches_reference(rows: int, channels: int) -> None:
    ops.check(GEGLU, torch.randn(rows, 16 * channels, device=ops.DEVICE))


def test_refusals_name_the_reason() -> None:
    assert "do not halve" in GEGLU.supports(torch.empty(2, 7)).reason
    assert "not contiguous" in GEGLU.supports(torch.empty(4, 64)[::2]).reason
    assert "stride" in GEGLU.supports(torch.empty(64, 4).t()).reason
    assert torch.equal(geglu(torch.ones(2, 6)), geglu_reference(torch.ones(2, 6)))  # and runs all the same


def test_registered_op_agrees_with_its_schema() -> None:
    ops.check_registered(GEGLU, torch.randn(3, 32, device=ops.DEVICE))
