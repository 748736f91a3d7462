"""kernels/fp8.py: the references against the formulas, the kernels against the references."""

from __future__ import annotations

import ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import dispatch, fp8
from fastldm.kernels.fp8 import E4M3, LINEAR_FP8, QUANTIZE

SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
needs_units = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="matrix units for e4m3 came with sm_89",
)


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(dtype)


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight as e4m3, and the scale of each column; products near 1."""
    x_scale = 4 / fp8.LARGEST
    weight, scale = fp8.quantize_weight(randn(n, k) / k**0.5)
    return fp8.quantize_reference(randn(m, k), x_scale), weight, scale * x_scale


def check(*args: object) -> None:
    """The kernel's float16 within half a last place and the order of the sums of the reference's float32."""
    verdict = LINEAR_FP8.supports(*args)
    assert verdict, verdict.reason
    *most, dtype, gated = args
    exact = fp8.linear_fp8_reference(*most, torch.float32, gated)
    with ops.poisoned():
        got = fp8.linear_fp8_triton(*most, dtype, gated)
    assert got.dtype == dtype
    assert ops.error(got, exact) < 6e-4


# -------------------------------------------------------------------------------------------------- references


def test_quantized_weights_are_near_and_use_the_whole_range() -> None:
    weight = randn(12, 64, dtype=torch.float32) * torch.logspace(-6, 3, 12, device=ops.DEVICE)[:, None]
    weight[5] = 0
    eight, scale = fp8.quantize_weight(weight)
    assert (eight.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (12,))
    back = eight.float() * scale[:, None]
    largest = weight.abs().amax(1, keepdim=True)
    assert ((back - weight).abs() <= 2**-4 * weight.abs() + 2**-10 * largest / 448).all()
    assert torch.allclose(back.abs().amax(1), largest[:, 0], rtol=1e-6)


def test_reference_is_the_formula() -> None:
    x, weight, scale = operands(7, 12, 16)
    bias, residual = randn(12), randn(7, 12)
    product = x.double() @ weight.double().T * scale.double()
    got = fp8.linear_fp8_reference(x, weight, scale, bias, residual, torch.float32)
    assert torch.allclose(got.double(), product + bias + residual, atol=1e-5)
    a, b = (product + bias).chunk(2, dim=-1)
    gated = fp8.linear_fp8_reference(x, weight, scale, bias, None, torch.float32, True)
    assert torch.allclose(gated.double(), a * b * torch.special.ndtr(b), atol=1e-5)


def test_large_inputs_are_clipped_and_not_lost() -> None:
    x = torch.tensor([1e4, -1e4, 3.0, 0.0], device=ops.DEVICE, dtype=torch.float16)
    for way in (fp8.quantize_reference, fp8.quantize_triton if ops.DEVICE == "cuda" else fp8.quantize):
        assert way(x, 1.0).float().tolist() == [448, -448, 3, 0]


# ----------------------------------------------------------------------------------------------------- kernels


@needs_units
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2048, 5001])
def test_quantizing_is_the_reference(count: int, dtype: torch.dtype) -> None:
    """Bitwise: beyond the range, in the lowest binade, ties."""
    x, scale = 200 * randn(count, dtype=dtype), 0.7
    x[::2] *= 1e-4
    assert QUANTIZE.supports(x, scale)
    with ops.poisoned():
        got = fp8.quantize_triton(x, scale).float()
    expected = fp8.quantize_reference(x, scale).float()
    assert torch.equal(got, expected)


@needs_units
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("shape", [(64, 64, 64), (37, 43, 48), (1, 48, 64), (5, 8, 16)], ids=str)
def test_kernel_matches_reference(shape: tuple[int, int, int], split: int) -> None:
    m, n, _ = shape
    with dispatch.forced("linear_fp8", SMALL | {"SPLIT": split}):
        check(*operands(*shape), randn(n), randn(m, n), torch.float16, False)
        check(*operands(*shape), None, None, torch.float16, False)


@needs_units
def test_wide_tile_of_two_accumulators_matches_reference() -> None:
    with dispatch.forced("linear_fp8", SMALL | {"SPLIT": 1, "MORE_N": 16}):
        check(*operands(40, 50, 48), randn(50), randn(40, 50), torch.float16, False)


@needs_units
@pytest.mark.parametrize("shape", [(64, 32, 64), (37, 11, 48)], ids=str)
def test_gated_kernel_matches_reference(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    with dispatch.forced("linear_fp8", SMALL):
        check(*operands(m, 2 * n, k), randn(2 * n), None, torch.float16, True)


@needs_units
def test_output_of_eight_bits_is_the_quantized_output() -> None:
    """Rounded from float32 sums that may differ in the last place: equal but for numbers between two."""
    x, weight, scale = operands(40, 64, 64)
    bias = randn(64)
    with dispatch.forced("linear_fp8", SMALL):
        got = fp8.linear_fp8_triton(x, weight, scale, bias, None, torch.float16, True, 0.01)
    expected = fp8.linear_fp8_reference(x, weight, scale, bias, None, torch.float16, True, 0.01)
    assert got.dtype == expected.dtype == E4M3
    near, exact = got.float(), expected.float()
    assert (near == exact).float().mean() > 0.99
    assert (near - exact).abs().max() <= 2**-3 * exact.abs().max()
    with dispatch.forced("linear_fp8", SMALL | {"SPLIT": 2}):  # written by the sum of the splits
        split = fp8.linear_fp8_triton(x, weight, scale, bias, None, torch.float16, False, 0.01)
    expected = fp8.linear_fp8_reference(x, weight, scale, bias, None, torch.float16, False, 0.01)
    assert (split.float() == expected.float()).float().mean() > 0.99


@needs_units
def test_default_configurations_match_reference() -> None:
    check(*operands(40, 48, 128), randn(48), randn(40, 48), torch.float16, False)
    check(*operands(40, 96, 128), randn(96), None, torch.float16, True)


@needs_units
@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 50), n=st.integers(1, 50), k=st.integers(1, 6), split=st.integers(1, 3))
def test_any_shape_matches_reference(m: int, n: int, k: int, split: int) -> None:
    with dispatch.forced("linear_fp8", SMALL | {"SPLIT": split}):
        check(*operands(m, n, 16 * k), randn(n), randn(m, n), torch.float16, False)


# ------------------------------------------------------------------------------- where, what for, at what cost


def test_refusals_name_the_reason() -> None:
    x, weight, scale = (t.to("meta") for t in operands(4, 16, 32))
    rest = (None, None, torch.float16)
    with dispatch.targeting(dispatch.Target(90)):
        assert LINEAR_FP8.supports(x, weight, scale, *rest)
        assert "not e4m3" in LINEAR_FP8.supports(x.half(), weight, scale, *rest).reason
        assert "no multiple of 16" in LINEAR_FP8.supports(x[:, :8], weight[:, :8], scale, *rest).reason
        assert "no residual" in LINEAR_FP8.supports(x, weight[:15], scale, None, None, torch.float16, True).reason
        assert "is empty" in LINEAR_FP8.supports(x[:0], weight, scale, *rest).reason
        assert "dtype torch.float64" in QUANTIZE.supports(x.double(), 1.0).reason
    with dispatch.targeting(dispatch.Target(80)):
        assert LINEAR_FP8.supports(x, weight, scale, *rest).reason.startswith("sm_80 has no matrix units for e4m3")


def test_steps_along_k_have_the_bytes_of_sixteen_bits() -> None:
    for shape, gated in (("m2048 n1280 k5120", ""), ("m2048 n10240 k1280", " gated")):
        config = fp8.default(shape + gated, 90)
        assert config["BLOCK_K"] == 128
        assert ("SPLIT" in config) == (not gated)
    x, weight, scale = (t.to("meta") for t in operands(2048, 1280, 1280))
    candidates = [c for c in LINEAR_FP8.space if fp8.is_candidate(c, x, weight, scale, None, None, torch.float16)]
    assert 1 <= len(candidates) <= 30
    assert fp8.default("m2048 n1280 k1280", 90) in candidates


def test_cost_counts_operations_and_bytes() -> None:
    x, weight, scale = operands(10, 16, 32)
    assert LINEAR_FP8.cost(x, weight, scale, None, None, torch.float16) == (2 * 10 * 16 * 32, 320 + 512 + 320, 0)
    gated = LINEAR_FP8.cost(x, weight, scale, None, None, torch.float16, True, 1.0)
    assert gated == (2 * 10 * 16 * 32, 320 + 512 + 80, 80)
    assert QUANTIZE.cost(randn(8, 8), 1.0) == (0, 64 * 3, 0)
