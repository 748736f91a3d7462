"""kernels/lora.py: the reference against merged weights, the kernels and the CPU's way against the reference."""

from __future__ import annotations

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import dispatch
from fastldm.kernels.geglu import geglu
from fastldm.kernels.lora import (
    LORA_GEGLU,
    LORA_LINEAR,
    RANK,
    SHRINK,
    Group,
    Rows,
    add_conv,
    add_lora,
    lora_geglu,
    lora_linear,
)

Workload = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SHAPES = {  # B, N, I, O, J, K, P
    "one-page": (2, 70, 40, 48, 1, 1, 3),
    "query-key-value": (3, 16, 64, 24, 3, 2, 5),
    "many-pages": (2, 130, 72, 136, 1, 4, 6),
    "one-token": (4, 1, 8, 8, 1, 2, 3),
    "320": (2, 64, 320, 320, 1, 2, 4),
}


def workload(
    batch: int,
    tokens: int,
    inputs: int,
    outputs: int,
    layers: int,
    count: int,
    pages: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Workload:
    """x, weight, bias, residual, down, up, pages, scales: of each row other pages, some of them none."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(ops.DEVICE, dtype)

    down = randn(pages, layers, RANK, inputs, scale=inputs**-0.5)
    down[0] = 0
    wide = layers * outputs
    numbers = torch.randint(0, pages, (batch, count), generator=g, dtype=torch.int32).to(ops.DEVICE)
    numbers[0, 0] = 1
    x, weight = randn(batch, tokens, inputs), randn(wide, inputs, scale=inputs**-0.5)
    scales = (torch.rand(batch, count, generator=g) + 0.5).to(ops.DEVICE)
    return x, weight, randn(wide), randn(batch, tokens, wide), down, randn(pages, wide, RANK), numbers, scales


def merged(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, pages: Tensor, scales: Tensor) -> Tensor:
    """Each row by a weight of its own."""
    out = []
    for row, own, factors in zip(x, pages.tolist(), scales.tolist(), strict=True):
        total = weight.clone()
        for page, scale in zip(own, factors, strict=True):
            for j, part in enumerate(total.chunk(down.shape[1])):
                part += scale * (up[page].chunk(down.shape[1])[j] @ down[page, j])
        out.append(F.linear(row, total, bias))
    return torch.stack(out)


def groups(pages: Tensor, scales: Tensor) -> Rows:
    """The same as the host knows it."""
    numbers = zip(pages.tolist(), scales.tolist(), strict=True)
    own = [tuple((p, s) for p, s in zip(*row, strict=True) if p) for row in numbers]
    return Rows(pages, scales, tuple(Group(k, k + 1, each) for k, each in enumerate(own)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_equals_merged_weights(shape: tuple[int, ...]) -> None:
    x, weight, bias, residual, *rest = (t.double() if t.is_floating_point() else t for t in workload(*shape))
    expected = merged(x, weight, bias, *rest) + residual
    assert ops.error(LORA_LINEAR.reference(x, weight, bias, residual, *rest), expected) < 1e-6
    gated = LORA_GEGLU.reference(x, weight, bias, *rest)
    assert ops.error(gated, geglu(merged(x, weight, bias, *rest))) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_groups_on_the_host_equal_reference(shape: tuple[int, ...]) -> None:
    x, weight, bias, residual, down, up, pages, scales = workload(*shape)
    expected = LORA_LINEAR.reference(x, weight, bias, residual, down, up, pages, scales)
    rows = groups(pages, scales)
    assert ops.error(lora_linear(x, weight, bias, down, up, rows, residual=residual), expected) < 2e-6
    product = F.linear(x, weight, bias)
    for way in (rows, Rows(pages, scales)):
        assert ops.error(add_lora(product.clone(), x, down, up, way), expected - residual) < 2e-6
    gated = LORA_GEGLU.reference(x, weight, bias, down, up, pages, scales)
    assert ops.error(lora_geglu(x, weight, bias, down, up, rows), gated) < 2e-6


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, residual, *rest = workload(*shape, dtype=dtype)
    ops.check(LORA_LINEAR, x, weight, bias, residual, *rest)
    ops.check(LORA_LINEAR, x, weight, None, None, *rest)
    if shape[4] == 1:
        ops.check(LORA_GEGLU, x, weight, bias, *rest)
    down, _, pages, scales = rest
    ops.check(SHRINK, x, down, pages.clamp(min=1), scales)  # none is left out, and nothing written for it


@pytest.mark.parametrize("config", LORA_LINEAR.space, ids=str)
def test_every_tile_matches_reference(config: dispatch.Config) -> None:
    with dispatch.forced("lora_linear", config):
        ops.check(LORA_LINEAR, *workload(2, 140, 40, 72, 3, 2, 4))


@pytest.mark.parametrize("config", LORA_GEGLU.space, ids=str)
def test_every_gated_tile_matches_reference(config: dispatch.Config) -> None:
    x, weight, bias, _, *rest = workload(2, 140, 40, 144, 1, 2, 4)
    with dispatch.forced("lora_geglu", config):
        ops.check(LORA_GEGLU, x, weight, bias, *rest)


def test_strided_input_matches_reference() -> None:
    """A part of a wider tensor, as the output of a stacked projection."""
    x, *rest = workload(2, 20, 40, 24, 1, 2, 4)
    wide = torch.cat((x, x), dim=-1)
    ops.check(LORA_LINEAR, wide[..., 40:], *rest)


def test_foreign_overflow_stays_foreign() -> None:
    """An index, not a mask: zero times another's infinity would be NaN."""
    x, weight, bias, residual, down, up, pages, scales = workload(2, 20, 40, 24, 1, 2, 4)
    pages[:] = torch.tensor([[1, 0], [3, 2]])
    down[3], up[2] = float("inf"), float("nan")
    with dispatch.use("triton"):
        kernel = LORA_LINEAR.triton(x, weight, bias, residual, down, up, pages, scales)
    host = lora_linear(x, weight, bias, down, up, groups(pages, scales), residual=residual)
    for out in (kernel, host, LORA_LINEAR.reference(x, weight, bias, residual, down, up, pages, scales)):
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 90),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 60),
    layers=st.sampled_from([1, 3]),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_reference(
    batch: int, tokens: int, inputs: int, outputs: int, layers: int, count: int, seed: int
) -> None:
    ops.check(LORA_LINEAR, *workload(batch, tokens, 8 * inputs, outputs, layers, count, 4, seed=seed))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("host", [True, False])
def test_convolutions_equal_merged_weights(kernel: int, stride: int, padding: int, host: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, 7).contiguous(memory_format=torch.channels_last)
    weight, down, up = (
        torch.randn(6, 5, kernel, kernel),
        torch.randn(4, RANK, 5, kernel, kernel),
        torch.randn(4, 6, RANK),
    )
    down[0] = 0
    pages, scales = torch.tensor([[1, 2], [0, 0], [3, 0]], dtype=torch.int32), torch.rand(3, 2) + 0.5
    rows = groups(pages, scales) if host else Rows(pages, scales)
    expected = []
    for k in range(3):
        deltas = torch.einsum("por,prchw,p->ochw", up[pages[k].long()], down[pages[k].long()], scales[k])
        expected.append(F.conv2d(x[k : k + 1], weight + deltas, stride=stride, padding=padding))
    out = F.conv2d(x, weight, stride=stride, padding=padding).contiguous(memory_format=torch.channels_last)
    assert ops.error(add_conv(out, x, down, up, rows, stride, padding), torch.cat(expected)) < 2e-6


def test_refusals_name_the_reason() -> None:
    x, weight, bias, residual, down, up, pages, scales = workload(2, 8, 12, 8, 1, 1, 2)
    assert "multiple of 8" in LORA_LINEAR.supports(x, weight, bias, residual, down, up, pages, scales).reason
    x, weight, bias, residual, down, up, pages, scales = workload(2, 8, 16, 8, 1, 1, 2)
    assert "not contiguous" in LORA_LINEAR.supports(x, weight, bias, residual, down, up.mT, pages, scales).reason
    assert "(B, N, I)" in SHRINK.supports(x[0], down, pages, scales).reason


def test_registered_op_agrees_with_its_schema() -> None:
    x, weight, bias, residual, down, up, pages, scales = workload(2, 8, 16, 8, 1, 1, 2)
    ops.check_registered(LORA_LINEAR, x, weight, bias, residual, down, up, pages, scales)
    ops.check_registered(LORA_GEGLU, x, weight, bias, down, up, pages, scales)
    ops.check_registered(SHRINK, x, down, pages, scales)
