"""kernels/onednn.py: cached layouts give the same products, for registered weights only, and never of stale weights."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import onednn
from fastldm.kernels.conv import conv2d
from fastldm.kernels.linear import linear, linear_geglu
from fastldm.kernels.onednn import Layouts, convolve, product, row_sums

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn._available(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="oneDNN's ops are not there")
needs_layouts = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_BYTES", 0)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def as_good(got: Tensor | None, reference: Tensor, exact: Tensor) -> None:
    """The kernels' budget: at most twice the error of torch's own in the same precision, plus a small constant, which
    covers float32 sums of some hundred products in another order."""
    assert got is not None
    assert got.shape == reference.shape
    assert got.dtype == reference.dtype
    scale = exact.abs().max()
    off, allowed = ((t.double() - exact).abs().max() / scale for t in (got, reference))
    assert off <= 2 * allowed + max(torch.finfo(got.dtype).eps / 4, 4 * torch.finfo(torch.float32).eps)


@needs_layouts
@pytest.mark.parametrize("rows", [1, 77, 130])  # one row, a text, more than a block
def test_products_match_pytorch(dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = torch.randn(2, rows, 96).to(dtype), torch.randn(200, 96).to(dtype), torch.randn(200).to(dtype)
    layouts = Layouts([weight])
    for rows_view in (slice(None), slice(0, 64), slice(64, 200)):  # a view of a weight has a layout of its own
        for columns in (slice(0, 96), slice(32, 96)):
            arguments = x[..., columns], weight[rows_view, columns], bias[rows_view]
            as_good(product(*arguments), F.linear(*arguments), F.linear(*(t.double() for t in arguments)))
    residual = torch.randn(2, rows, 200).to(dtype)
    as_good(
        linear(x, weight, bias, residual=residual),
        F.linear(x, weight, bias) + residual,
        F.linear(x.double(), weight.double(), bias.double()) + residual.double(),
    )
    cached = len(layouts._cached)
    linear_geglu(x, weight, bias)
    assert len(layouts._cached) == cached  # the whole weight's, again


@needs_layouts
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_two_sizes_match_pytorch(dtype: torch.dtype, stride: int) -> None:
    weight, bias = last(torch.randn(48, 32, 3, 3).to(dtype)), torch.randn(48).to(dtype)
    layouts = Layouts([weight])
    for size in ((2, 32, 8, 8), (2, 32, 4, 4), (1, 32, 9, 7), (2, 32, 8, 8)):
        x = last(torch.randn(size).to(dtype))
        reference = F.conv2d(x, weight, bias, stride, 1)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1)
        got = convolve(x, weight, bias, stride, 1)  # None where this size wants another layout
        as_good(conv2d(x, weight, bias, stride=stride, padding=1), reference, exact)
        if size == (2, 32, 8, 8):
            as_good(got, reference, exact)
        residual = last(torch.randn(reference.shape).to(dtype))
        out = conv2d(x, weight, bias, stride=stride, padding=1, residual=residual)
        as_good(out, reference + residual, exact + residual.double())
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert layouts.nbytes == weight.nbytes  # one layout for all sizes


@needs_layouts
def test_a_changed_weight_gets_a_new_layout(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(48, 64).to(dtype)
    layouts = Layouts([weight])
    before = product(x, weight, None)
    assert not layouts.stale()
    weight.data += 1
    assert layouts.stale()
    assert [w.data_ptr() for w in layouts.drop_stale()] == [weight.data_ptr()]
    after = product(x, weight, None)
    as_good(after, F.linear(x, weight), F.linear(x.double(), weight.double()))
    assert not torch.equal(before, after)
    assert not layouts.stale()


def test_only_registered_weights_have_layouts() -> None:
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    assert product(x, weight, None) is None
    layouts = Layouts([weight])
    assert product(x, weight, None) is not None
    assert product(x, weight.clone(), None) is None
    assert product(x.double(), weight, None) is None
    assert product(x.requires_grad_(), weight, None) is None  # the ops have no gradient
    assert product(torch.randn(onednn._ROWS + 1, 64), weight, None) is None
    del layouts
    gc.collect()
    assert product(x.detach(), weight, None) is None


def test_small_weights_have_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 64)
    layouts = Layouts([weight])
    monkeypatch.setattr(onednn, "_BYTES", weight.nbytes + 1)
    assert product(torch.randn(5, 64), weight, None) is None
    assert layouts.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(8, 12),
        lambda: torch.randn(8, 13),  # rows that are no whole number of words
        lambda: torch.randn(8, 24)[:, 1:9],  # strided, and not at the start of a word
        lambda: last(torch.randn(6, 8, 3, 3)),
        lambda: torch.randn(6, 8, 3, 3),
        lambda: torch.randn(7),
    ],
    ids=["matrix", "odd", "strided", "channels-last", "filters", "vector"],
)
def test_row_sums_detect_every_bit(make: object, dtype: torch.dtype) -> None:
    x = make().to(dtype)  # type: ignore[operator]
    before = row_sums(x)
    assert before.shape == x.shape[:1]
    bits = x.view({2: torch.int16, 4: torch.int32}[x.element_size()])
    for index in (0, x.numel() // 2, x.numel() - 1):
        at = torch.unravel_index(torch.tensor(index), x.shape)
        for bit in (0, 8 * x.element_size() - 2):  # the last of the fraction, the first of the exponent
            bits[at] ^= 1 << bit
            assert not torch.equal(row_sums(x), before)
            bits[at] ^= 1 << bit
    assert torch.equal(row_sums(x), before)
