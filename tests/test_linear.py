"""kernels/linear.py: the references against the formulas, the kernels against the references."""

from __future__ import annotations

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import dispatch, linear
from fastldm.kernels.compile import ARCHS, SHARED_MEMORY
from fastldm.kernels.linear import LINEAR, LINEAR_GEGLU

# Tiles small enough that a matrix of the interpreter's size has several in each direction.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
GEGLU_SMALL = {name: value for name, value in SMALL.items() if name != "SPLIT"}

SHAPES = {  # M, N, K
    "full tiles": (64, 64, 64),
    "tails everywhere": (37, 43, 40),
    "one row": (1, 48, 64),
    "one column": (33, 1, 32),
    "fewer than a tile": (5, 8, 8),
    "more rows of tiles than a group": (290, 40, 32),  # 10 of 8, so that the second group is a short one
}


# On a GPU these kernels refuse float32.
DTYPES = [dtype for dtype in ops.DTYPES if dtype != torch.float32 or ops.DEVICE == "cpu"]


def randn(*shape: int, dtype: torch.dtype = DTYPES[0]) -> Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(dtype)


def matrices(m: int, n: int, k: int, dtype: torch.dtype = DTYPES[0]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual; products near 1."""
    return randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, randn(n, dtype=dtype), randn(m, n, dtype=dtype)


# -------------------------------------------------------------------------------------------------- references


def test_references_match_formulas() -> None:
    x, weight, bias, residual = (t.double() for t in matrices(7, 12, 16))
    product = torch.einsum("mk,nk->mn", x, weight)
    before = residual.clone()
    got = linear.linear_reference(x, weight, bias, residual)
    assert torch.allclose(got, product + bias + residual, rtol=0, atol=1e-12)
    assert torch.equal(residual, before)
    a, b = (product + bias).chunk(2, dim=-1)
    gated = a * b * torch.special.ndtr(b)
    assert torch.allclose(linear.linear_geglu_reference(x, weight, bias), gated, rtol=0, atol=1e-12)
    assert torch.allclose(linear.linear_geglu(x, weight, bias), gated, rtol=0, atol=1e-12)


def test_public_op_takes_any_leading_dimensions() -> None:
    x, weight, bias, residual = (t.double() for t in matrices(12, 16, 24))
    got = linear.linear(x.view(3, 2, 2, 24), weight, bias, residual=residual.view(3, 2, 2, 16))
    assert torch.allclose(got.view(12, 16), F.linear(x, weight, bias) + residual, rtol=0, atol=1e-12)


def test_gpu_path_gates_by_geglu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "fast_library", lambda x: True)
    x, weight, bias, _ = (t.double().cpu() for t in matrices(5, 16, 8))
    calls: list[str] = []
    with dispatch.observe(lambda op, args, kwargs: calls.append(op.name)):
        got = linear.linear_geglu(x, weight, bias)
    assert calls == ["linear_geglu", "linear", "geglu"]
    assert torch.allclose(got, linear.linear_geglu_reference(x, weight, bias), atol=1e-12)


# ----------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: tuple[int, int, int], dtype: torch.dtype, split: int) -> None:
    """In three splits "full tiles" has two steps of K: a split may have none."""
    x, weight, bias, residual = matrices(*shape, dtype=dtype)
    with dispatch.forced("linear", SMALL | {"SPLIT": split}):
        ops.check(LINEAR, x, weight, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("columns", [48, 50, 30, 96], ids=str)
def test_wide_tile_of_two_accumulators_matches_reference(columns: int, split: int, dtype: torch.dtype) -> None:
    """Tiles of 32 + 16 columns: a whole one, a tail of two columns, none for the second accumulator, two tiles."""
    x, weight, bias, residual = matrices(37, columns, 72, dtype=dtype)
    with dispatch.forced("linear", SMALL | {"MORE_N": 16, "SPLIT": split}):
        ops.check(LINEAR, x, weight, bias, residual)
        ops.check(LINEAR, x, weight)


def test_channels_in_multiples_of_320_leave_no_column_idle() -> None:
    for m, n, k in ((8192, 320, 1280), (8192, 640, 640), (2048, 640, 5760), (512, 1280, 11520)):
        assert n % linear.columns_of(linear.default(f"m{m} n{n} k{k}", 90)) == 0


def test_a_sum_may_take_the_place_of_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cuBLAS adds as it writes: only without a bias, and only if the caller allows it."""
    monkeypatch.setattr(linear, "fast_library", lambda x: True)
    x, weight, bias, residual = matrices(12, 16, 24, torch.float32)
    x, before = x.view(3, 4, 24), residual.view(3, 4, 16).clone()
    for other in (bias, None):
        kept = before.clone()
        got = linear.linear(x, weight, other, residual=kept, overwrite=other is not None)
        assert torch.equal(kept, before)
        assert torch.allclose(got, F.linear(x, weight, other) + before, atol=1e-5)
    kept = before.clone()
    got = linear.linear(x, weight, residual=kept, overwrite=True)
    assert got.data_ptr() == kept.data_ptr()
    assert torch.allclose(got, F.linear(x, weight) + before, atol=1e-5)


@pytest.mark.parametrize("split", [1, 2])
def test_kernel_without_bias_or_residual_matches_reference(split: int) -> None:
    x, weight, bias, residual = matrices(20, 40, 72)
    with dispatch.forced("linear", SMALL | {"SPLIT": split}):
        ops.check(LINEAR, x, weight)
        ops.check(LINEAR, x, weight, bias)
        ops.check(LINEAR, x, weight, None, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 64), (37, 22, 40), (1, 32, 8)], ids=str)
def test_gated_kernel_matches_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    x, weight, bias, _ = matrices(m, 2 * n, k, dtype=dtype)
    with dispatch.forced("linear_geglu", GEGLU_SMALL):
        ops.check(LINEAR_GEGLU, x, weight, bias)
        ops.check(LINEAR_GEGLU, x, weight)


def test_default_configurations_match_reference() -> None:
    """As they are, tiles of more than 16,384 elements included, which are finished in halves."""
    x, weight, bias, residual = matrices(40, 48, 64)
    ops.check(LINEAR, x, weight, bias, residual)
    ops.check(LINEAR_GEGLU, x, weight, bias)
    for tile in ({"BLOCK_M": 128, "BLOCK_N": 256}, {"BLOCK_M": 256, "BLOCK_N": 128}):
        with dispatch.forced("linear", SMALL | tile):
            ops.check(LINEAR, randn(150, 64), randn(200, 64) / 8, randn(200), randn(150, 200))


def test_strided_rows_match_reference() -> None:
    """As in the networks: channels of a packed projection, a shortcut's weight for one of two sources."""
    _, weight, bias, _ = matrices(1, 24, 48)
    packed = randn(2, 9, 3 * 48)
    width = randn(24, 96)
    with dispatch.forced("linear", SMALL):
        ops.check(LINEAR, packed[..., 48:96], weight, bias)
        ops.check(LINEAR, packed[:, ::3, :48], weight, bias)  # rows that no single stride reaches: copied
        ops.check(LINEAR, randn(2, 5, 48), width[:, 48:], bias, randn(2, 5, 24))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_extreme_values_match_reference(scale: float) -> None:
    """Within float16's range; the gate saturates."""
    x, weight, bias, residual = matrices(16, 16, 64)
    with dispatch.forced("linear", SMALL):
        ops.check(LINEAR, scale * x, weight, bias, residual / scale)
    with dispatch.forced("linear_geglu", GEGLU_SMALL):
        ops.check(LINEAR_GEGLU, scale * x, weight, bias)


@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 50), n=st.integers(1, 50), k=st.integers(1, 12), split=st.integers(1, 4))
def test_any_shape_matches_reference(m: int, n: int, k: int, split: int) -> None:
    with dispatch.forced("linear", SMALL | {"SPLIT": split}):
        ops.check(LINEAR, *matrices(m, n, 8 * k))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [c for c in linear.SPACE if c["SPLIT"] in (1, 3, 16)], ids=str)
def test_every_configuration_matches_reference(config: dispatch.Config, dtype: torch.dtype) -> None:
    with dispatch.forced("linear", config):
        ops.check(LINEAR, *matrices(150, 136, 264, dtype=dtype))


@pytest.mark.full
@settings(max_examples=100, deadline=None)
@given(m=st.integers(1, 100), n=st.integers(1, 100), k=st.integers(1, 40), gate=st.booleans())
def test_any_16_bit_shape_matches_reference(m: int, n: int, k: int, gate: bool) -> None:
    x, weight, bias, residual = matrices(m, 2 * n, 8 * k, dtype=torch.float16)
    with dispatch.forced("linear", SMALL | {"SPLIT": 1 + n % 3}), dispatch.forced("linear_geglu", GEGLU_SMALL):
        if gate:
            ops.check(LINEAR_GEGLU, x, weight, bias)
        else:
            ops.check(LINEAR, x, weight, bias, residual)


@pytest.mark.gpu
def test_split_products_are_deterministic() -> None:
    x, weight, bias, residual = matrices(128, 1280, 5120, dtype=torch.float16)
    with dispatch.use("triton"), dispatch.forced("linear", linear.default("m128 n1280 k5120", 90) | {"SPLIT": 6}):
        first = linear.linear(x, weight, bias, residual=residual)
        assert all(torch.equal(linear.linear(x, weight, bias, residual=residual), first) for _ in range(20))


# ------------------------------------------------------------------------------- where, what for, at what cost


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = matrices(4, 16, 24)
    assert LINEAR.supports(x, weight, bias, residual)
    assert "no multiple of 8" in LINEAR.supports(x[:, :12], weight[:, :12]).reason
    assert "not contiguous" in LINEAR.supports(x, weight, bias, residual.t().contiguous().t()).reason
    assert "stride" in LINEAR.supports(x, weight.t().contiguous().t()).reason
    assert "not 16 bytes aligned" in LINEAR.supports(randn(4, 25)[:, :24], weight).reason
    assert "is empty" in LINEAR.supports(x[:0], weight).reason
    assert "another argument torch.float64" in LINEAR.supports(x, weight.double()).reason
    assert "dtype torch.float64" in LINEAR.supports(x.double(), weight.double()).reason
    assert "do not halve" in LINEAR_GEGLU.supports(x, weight[:15]).reason
    monkeypatch.setattr(linear, "interpreting", lambda: False)
    assert "10 bits" in LINEAR.supports(x.float(), weight.float()).reason
    assert LINEAR.supports(x.half(), weight.half())


def test_library_runs_unless_a_table_prefers_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(128, 640, device="meta").half(), torch.empty(640, 640, device="meta").half()
    with dispatch.targeting(dispatch.Target(90)):
        assert LINEAR.path(x, weight).reason == "torch's own is taken by default"
        measured = {"sm_90": {"linear": {"m128 n640 k640": {"path": "triton", "config": SMALL}}}}
        monkeypatch.setattr(dispatch, "table", lambda: measured)
        assert LINEAR.path(x, weight)
        assert LINEAR.config(x, weight) == SMALL


@pytest.mark.parametrize("arch", [*ARCHS, 87, 103, 121])
def test_configurations_fit_the_gpu(arch: int) -> None:
    chip = max(entry for entry in ARCHS if entry <= arch)
    for m, n, k in ((128, 1280, 11520), (2048, 1280, 1280), (8192, 320, 320), (262144, 3, 1152), (2, 1280, 320)):
        for config, accumulators in (
            (linear.default(f"m{m} n{n} k{k}", arch), 1),
            (linear.linear_geglu_default(f"m{m} n{2 * n} k{k}", arch), 2),
        ):
            block_m, block_n = config["BLOCK_M"], accumulators * config["BLOCK_N"]
            assert (block_m + block_n) * config["BLOCK_K"] * 2 * config["num_stages"] <= SHARED_MEMORY[chip] << 10
            assert block_m * block_n <= 128 * 32 * config["num_warps"]


def test_products_with_few_tiles_split_k() -> None:
    assert linear.default("m128 n1280 k11520", 90)["SPLIT"] > 1
    assert linear.default("m8192 n320 k320", 90)["SPLIT"] == 1
    x, weight = randn(128, 64), randn(1280, 64)
    assert 1 <= sum(linear.is_candidate(config, x, weight) for config in linear.SPACE) <= 30  # a tuner's patience


def test_cost_counts_operations_and_bytes() -> None:
    x, weight, bias, residual = matrices(10, 16, 8, dtype=torch.float16)
    assert LINEAR.cost(x, weight) == (2 * 10 * 16 * 8, 2 * (80 + 128 + 160), 0)
    assert LINEAR.cost(x, weight, bias, residual) == (2 * 10 * 16 * 8, 2 * (80 + 128 + 320), 0)
    assert LINEAR_GEGLU.cost(x, weight, bias) == (2 * 10 * 16 * 8, 2 * (80 + 128 + 80), 80)


def test_registered_op_agrees_with_its_schema() -> None:
    x, weight, bias, residual = matrices(6, 16, 24)
    ops.check_registered(LINEAR, x, weight, bias, residual)
    ops.check_registered(LINEAR_GEGLU, x, weight, bias)
