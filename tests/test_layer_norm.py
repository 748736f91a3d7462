"""kernels/layer_norm.py: the references against the formula, the kernels against the references."""

from __future__ import annotations

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import dispatch
from fastldm.kernels.layer_norm import (
    ADD_LAYER_NORM,
    LAYER_NORM,
    add_layer_norm,
    add_layer_norm_reference,
    default,
    is_candidate,
    layer_norm,
    layer_norm_reference,
)

SHAPES = {
    "sd15-level-0": (2, 5, 320),  # two rows a program, across images
    "odd-rows": (3, 1, 320),  # a program with one row of two
    "sd15-level-1": (1, 3, 640),
    "clip-l": (1, 3, 768),
    "sd21-text": (1, 2, 1024),
    "sd15-level-2": (1, 3, 1280),
    "one-row": (2048,),
    "longest": (2, 8192),
    "one-channel": (3, 1),
    "odd-channels": (5, 37),
}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(dtype)


def check(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    """Both ops."""
    x, residual = (scale * random(*shape) for _ in range(2))
    weight, bias = random(2, shape[-1], dtype=dtype)
    ops.check(LAYER_NORM, x.to(dtype), weight, bias, 1e-5)
    ops.check(ADD_LAYER_NORM, x.to(dtype), residual.to(dtype), weight, bias, 1e-5)
    ops.check(ADD_LAYER_NORM, x.to(dtype), residual.to(dtype), weight, bias, 1e-5, scale * weight)


def test_references_match_formula() -> None:
    x, residual, (weight, bias) = (
        torch.randn(2, 3, 24).double(),
        torch.randn(2, 3, 24).double(),
        torch.randn(2, 24).double(),
    )

    def formula(y: Tensor) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()
        return y * weight + bias

    assert torch.allclose(layer_norm_reference(x, weight, bias, 1e-3), formula(x), rtol=1e-12, atol=1e-12)
    total, out = add_layer_norm(x, residual, weight, bias, 1e-3)
    assert torch.equal(total, x + residual)
    assert torch.allclose(out, formula(x + residual), rtol=1e-12, atol=1e-12)
    later, same = add_layer_norm(x, residual, weight, bias, 1e-3, ahead=weight)
    assert torch.equal(later, x + residual + weight)
    assert torch.equal(same, out)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_output_of_eight_bits_is_the_quantized_output(dtype: torch.dtype) -> None:
    """But for numbers that the sums' order puts beyond the middle of two."""
    x, residual = random(2, 5, 320, dtype=dtype), random(2, 5, 320, dtype=dtype)
    weight, bias = random(2, 320, dtype=dtype)
    arguments = (x, residual, weight, bias, 1e-5, bias, 0.01)
    if not ADD_LAYER_NORM.supports(*arguments):
        pytest.skip("this GPU has no matrix units for e4m3")
    (total, got), (same, expected) = ADD_LAYER_NORM.triton(*arguments), add_layer_norm_reference(*arguments)
    assert torch.allclose(total, same, rtol=1e-3, atol=1e-3)
    alone = LAYER_NORM.triton(x, weight, bias, 1e-5, 0.01)
    for a, b in ((got, expected), (alone, layer_norm_reference(x, weight, bias, 1e-5, 0.01))):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        near, exact = a.float(), b.float()
        equal = near == exact
        assert equal.float().mean() > 0.99
        assert ((near - exact).abs()[~equal] <= 2**-3 * exact.abs()[~equal]).all()


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_match_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_the_sum_is_rounded_before_normalising(dtype: torch.dtype) -> None:
    """Bitwise equal to a sum and then a norm."""
    x, residual, (weight, bias) = (
        random(5, 320, dtype=dtype),
        9 * random(5, 320, dtype=dtype),
        random(2, 320, dtype=dtype),
    )
    for path in (ADD_LAYER_NORM.triton, add_layer_norm_reference):
        with ops.poisoned():
            total, out = path(x, residual, weight, bias, 1e-5)
        assert torch.equal(total, x + residual)
        normalise = LAYER_NORM.triton if path is ADD_LAYER_NORM.triton else layer_norm_reference
        assert torch.equal(out, normalise(total, weight, bias, 1e-5))


@pytest.mark.parametrize(("mean", "dtype"), [(1e3, torch.float32), (1e4, torch.float32), (1e3, torch.float16)])
def test_huge_means_lose_no_precision(mean: float, dtype: torch.dtype) -> None:
    """Deviation 1 about a large mean: right to the last places of the mean itself."""
    x, weight, bias = (random(3, 320) + mean).to(dtype), torch.ones(320), torch.zeros(320)
    exact = F.layer_norm(x.double(), (320,))
    got = LAYER_NORM.triton(x, weight.to(x), bias.to(x), 1e-5)
    rounding = 0.0 if dtype == torch.float32 else 2e-3  # of results up to 4 in float16
    assert (got.double() - exact).abs().max() < 2 * 2**-23 * mean + rounding


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_values_match_reference(scale: float) -> None:
    """Squares that overflow float16; a variance that drowns in eps."""
    check((2, 64), torch.float16, scale)


def test_constant_rows_give_the_bias() -> None:
    """Variance 0 gives the bias, but for the mean's rounding times 1 / sqrt(eps)."""
    x, weight, bias = torch.full((3, 320), 0.7, device=ops.DEVICE), random(320), random(320)
    got = LAYER_NORM.triton(x, weight, bias, 1e-5)
    assert (got - bias).abs().max() <= 2**-24 / 1e-5**0.5 * weight.abs().max()


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), channels=st.integers(1, 200), config=st.sampled_from([None, 1, 4]))
def test_any_shape_matches_reference(rows: int, channels: int, config: int | None) -> None:
    forced = {} if config is None else {"ROWS": config, "num_warps": 2}
    name = "" if config is None else "layer_norm"
    weight, bias = random(2, channels)
    with dispatch.forced(name, forced):
        ops.check(LAYER_NORM, random(rows, channels), weight, bias, 1e-5)
    with dispatch.forced(f"add_{name}" if name else "", forced):
        ops.check(ADD_LAYER_NORM, random(rows, channels), random(rows, channels), weight, bias, 1e-5)


@pytest.mark.parametrize("channels", [320, 640, 768, 1024, 1280, 2048, 8192])
def test_defaults_are_candidates(channels: int) -> None:
    assert is_candidate(default(f"c{channels}", 90), torch.empty(2, channels), torch.empty(0), torch.empty(0), 1e-5)


def test_refusals_name_the_reason() -> None:
    weight = torch.ones(8)

    def refusal(x: Tensor, weight: Tensor = weight) -> str:
        return LAYER_NORM.supports(x, weight, weight, 1e-5).reason

    x = torch.randn(4, 8)
    assert refusal(x) == ""
    assert "float64" in refusal(x.double())
    assert "empty" in refusal(x[:0])
    assert "rows are not contiguous" in refusal(x[::2])
    assert "weight or bias" in refusal(x, torch.ones(16)[::2])
    assert "8200 channels" in refusal(torch.empty(1, 8200), torch.ones(8200))
    assert "residual torch.float16" in ADD_LAYER_NORM.supports(x, x.half(), weight, weight, 1e-5).reason
    assert "residual torch.float32 (8,)" in ADD_LAYER_NORM.supports(x, x[0], weight, weight, 1e-5).reason
    assert "not contiguous" in ADD_LAYER_NORM.supports(x, torch.randn(8, 8)[::2], weight, weight, 1e-5).reason
    assert torch.equal(layer_norm(x[::2], weight, weight, 1e-5), layer_norm_reference(x[::2], weight, weight, 1e-5))


def test_registered_op_agrees_with_its_schema() -> None:
    x, residual, (weight, bias) = random(3, 32), random(3, 32), random(2, 32)
    ops.check_registered(LAYER_NORM, x, weight, bias, 1e-5)
    ops.check_registered(ADD_LAYER_NORM, x, residual, weight, bias, 1e-5)
    ops.check_registered(ADD_LAYER_NORM, x, residual, weight, bias, 1e-5, weight)
