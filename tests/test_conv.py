"""kernels/conv.py: references against formulas, the library path against references, kernels against both."""

from __future__ import annotations

from typing import Any
from unittest import mock

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import conv, dispatch, linear
from fastldm.kernels.conv import CONV2D, UPSAMPLE_CONV2D
from fastldm.models.layers import Resnet

# Tiles so small that an image of the interpreter's size has several in each direction.
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
DTYPES = [dtype for dtype in ops.DTYPES if dtype != torch.float32 or ops.DEVICE == "cpu"]

SHAPES = {  # B, C, H, W, O, K, stride, padding
    "full tiles": (1, 16, 8, 8, 32, 3, 1, 1),
    "tails everywhere": (3, 24, 5, 3, 24, 3, 1, 1),  # of pixels, of channels in and out
    "one pixel": (2, 16, 1, 1, 24, 3, 1, 1),  # eight taps of nine are outside
    "one row": (1, 16, 1, 9, 16, 3, 1, 1),
    "3 filters": (1, 32, 6, 6, 3, 3, 1, 1),  # the autoencoder's last
    "1x1": (2, 24, 3, 5, 16, 1, 1, 0),
    "halved": (2, 16, 8, 8, 16, 3, 2, 1),  # the U-Net's
    "halved, odd": (1, 24, 7, 5, 16, 3, 2, 1),
    "halved, padded before": (1, 16, 9, 9, 16, 3, 2, 0),  # the autoencoder's
    "halved, last row unseen": (1, 16, 8, 6, 16, 3, 2, 0),
    "1x1 of every other": (1, 16, 5, 5, 16, 1, 2, 0),
    "no padding": (1, 16, 6, 5, 16, 3, 1, 0),
}


def randn(*shape: int, dtype: torch.dtype = DTYPES[0]) -> Tensor:
    """Channels-last for images and weights of convolutions."""
    t = torch.randn(shape, device=ops.DEVICE).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def case(
    b: int, c: int, h: int, w: int, o: int, k: int, stride: int, padding: int, dtype: torch.dtype = DTYPES[0]
) -> tuple[Any, ...]:
    """Arguments of CONV2D with bias and residual, from one of SHAPES; products near 1."""
    x, weight = randn(b, c, h, w, dtype=dtype), randn(o, c, k, k, dtype=dtype) / (k * c**0.5)
    height, width = ((n + 2 * padding - k) // stride + 1 for n in (h, w))
    return x, weight, randn(o, dtype=dtype), randn(b, o, height, width, dtype=dtype), stride, padding


def formula(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, stride: int, padding: int) -> Tensor:
    """As it stands at the top of conv.py."""
    x = F.pad(x, (padding,) * 4)
    out = bias[:, None, None] + residual
    height, width = residual.shape[2:]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            taps = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], taps)
    return out


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's path for GPUs, on the CPU and in any dtype."""
    for module in (conv, linear):
        monkeypatch.setattr(module, "fast_library", lambda x: True)


# -------------------------------------------------------------------------------- references and the library's path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_matches_formula(shape: tuple[int, ...]) -> None:
    args = case(*shape, dtype=torch.float64)
    before = args[3].clone()
    expected = formula(*args)
    assert torch.allclose(conv.conv2d_reference(*args), expected, rtol=0, atol=1e-12)
    x, weight, bias, residual, stride, padding = args
    got = conv.conv2d(x, weight, bias, stride=stride, padding=padding, residual=residual)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(residual, before)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_library_path_matches_reference(shape: tuple[int, ...]) -> None:
    args = case(*shape, dtype=torch.float64)
    before = args[3].clone()
    got = conv.conv2d_torch(*args)
    assert torch.allclose(got, formula(*args), rtol=0, atol=1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(args[3], before)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("channels", "filters"), [(3, 16), (4, 24), (9, 8), (16, 3), (8, 4), (4, 3)])
def test_narrow_images_are_padded_to_eight_channels(channels: int, filters: int) -> None:
    args = case(2, channels, 6, 5, filters, 3, 1, 1, dtype=torch.float64)
    with mock.patch.object(torch, "_convolution", wraps=torch._convolution) as library:
        got = conv.conv2d_torch(*args)
    assert torch.allclose(got, formula(*args), rtol=0, atol=1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)
    x, weight = library.call_args.args[:2]
    assert x.shape[1] == weight.shape[1] == -(-channels // 8) * 8
    assert weight.shape[0] % 8 == 0
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_library_gets_no_bias_and_searches_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case(1, 8, 4, 4, 8, 3, 1, 1, dtype=torch.float64)

    def flags() -> tuple[bool, bool]:
        with mock.patch.object(torch, "_convolution", wraps=torch._convolution) as library:
            conv.conv2d_torch(*args)
        assert library.call_args.args[2] is None
        return library.call_args.args[9:11]

    assert flags() == (True, False)  # benchmark, deterministic
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert flags() == (False, True)


@pytest.mark.gpu
def test_a_capture_reuses_the_plan() -> None:
    x, weight, bias, residual, _, _ = case(2, 64, 16, 16, 64, 3, 1, 1, dtype=torch.float16)
    expected = conv.conv2d(x, weight, bias, padding=1, residual=residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = conv.conv2d(x, weight, bias, padding=1, residual=residual)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_gpu_path_multiplies_pixels_and_adds_in_one_pass() -> None:
    calls: list[str] = []
    with dispatch.observe(lambda op, args, kwargs: calls.append(op.name)):
        conv.conv2d_torch(*case(1, 8, 4, 4, 8, 1, 1, 0, dtype=torch.float64))
        conv.conv2d_torch(*case(1, 8, 4, 4, 8, 3, 1, 1, dtype=torch.float64))
        conv.conv2d_torch(*case(1, 8, 4, 4, 8, 3, 1, 1, dtype=torch.float64)[:2], padding=1)
        conv.upsample_conv2d(randn(1, 8, 64, 32), randn(8, 8, 3, 3), randn(8), (128, 64))
    assert calls == ["linear", "bias_residual", "upsample_conv2d", "bias_residual"]


def test_the_norm_adds_the_first_bias_of_a_block() -> None:
    """An autoencoder's block has no time row: on a GPU the norm adds conv1's bias in its place."""
    with torch.device("meta"):
        block = Resnet(16, 16, groups=4, eps=1e-5).half()
        x = torch.empty(2, 16, 8, 8, dtype=torch.float16)
    calls: list[tuple[str, Any]] = []
    with dispatch.observe(lambda op, args, kwargs: calls.append((op.name, args))):
        block(x)
    first, second, sums = (args for name, args in calls if name in ("conv2d", "bias_residual"))
    assert first[2] is None
    assert second[2] is block.conv2.bias
    assert sums[1] is block.conv2.bias

    block = Resnet(16, 16, groups=4, eps=1e-5).double()
    for parameter in block.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    by_the_norm = block(x, shift=block.conv1.bias.expand(2, -1))
    assert torch.allclose(block(x), by_the_norm, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------------- upsampling


def test_upsampling_equals_a_transposed_convolution() -> None:
    """With each weight set alone, so that its position is checked; then with all, at the edges too."""
    for at in range(9):
        weight = torch.zeros(1, 1, 9, dtype=torch.float64)
        weight[..., at] = 1
        weight = weight.view(1, 1, 3, 3)
        x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
        expected = conv.upsample_conv2d_reference(x, weight, None, 6, 8)
        got = F.conv_transpose2d(x, conv.upsample_phases(weight), stride=2, padding=1)
        assert torch.allclose(got, expected, rtol=0, atol=1e-15)
    x, weight = torch.randn(2, 6, 5, 7, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    phases = conv.upsample_phases(weight)
    assert phases.shape == (6, 4, 4, 4)
    expected = conv.upsample_conv2d_reference(x, weight, None, 10, 14)
    assert torch.allclose(F.conv_transpose2d(x, phases, stride=2, padding=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_phases_are_summed_in_float32(dtype: torch.dtype) -> None:
    weight = randn(8, 16, 3, 3, dtype=dtype)
    phases = conv.upsample_phases(weight)
    assert phases.dtype == dtype
    assert phases.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(phases, conv.upsample_phases(weight.float()).to(dtype))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("given_phases", [False, True])
@pytest.mark.parametrize("size", [(64, 32), (4, 4)], ids=str)
def test_upsampling_takes_phases_for_large_images(
    size: tuple[int, int], given_phases: bool, gpu: bool, request: pytest.FixtureRequest
) -> None:
    """Large images take them, small ones if they are cached."""
    if gpu:
        request.getfixturevalue("_as_on_a_gpu")
    h, w = size
    x, weight, bias = (randn(*s, dtype=torch.float64) for s in ((1, 3, h, w), (4, 3, 3, 3), (4,)))
    phases = conv.upsample_phases(weight) if given_phases else None
    with mock.patch.object(F, "interpolate", wraps=F.interpolate) as enlarge:
        got = conv.upsample_conv2d(x, weight, bias, (2 * h, 2 * w), phases=phases)
    assert enlarge.called == (h < 32 and not given_phases)
    assert torch.allclose(got, conv.upsample_conv2d_reference(x, weight, bias, 2 * h, 2 * w), rtol=0, atol=1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_sizes_other_than_double_are_enlarged() -> None:
    x, weight, bias = (randn(*s, dtype=torch.float64) for s in ((1, 8, 65, 32), (4, 8, 3, 3), (4,)))
    for phases in (None, conv.upsample_phases(weight)):
        got = conv.upsample_conv2d(x, weight, bias, (129, 64), phases=phases)
        enlarged = F.interpolate(x, size=(129, 64), mode="nearest")
        assert torch.allclose(got, F.conv2d(enlarged, weight, bias, padding=1), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, split: int) -> None:
    """Splits cut through taps: 9 taps of one or two steps each over 4."""
    with dispatch.forced("conv2d", SMALL | {"SPLIT": split}):
        ops.check(CONV2D, *case(*shape, dtype=dtype))


def test_kernel_without_bias_or_residual_matches_reference() -> None:
    x, weight, bias, residual, _, _ = case(2, 24, 4, 5, 16, 3, 1, 1)
    for split in (1, 2):
        with dispatch.forced("conv2d", SMALL | {"SPLIT": split}):
            ops.check(CONV2D, x, weight, padding=1)
            ops.check(CONV2D, x, weight, bias, padding=1)
            ops.check(CONV2D, x, weight, None, residual, padding=1)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 4, 4, 16), (2, 24, 3, 5, 24), (2, 16, 1, 1, 8)], ids=str)
def test_upsampling_kernel_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, split: int) -> None:
    b, c, h, w, o = shape
    args = randn(b, c, h, w, dtype=dtype), randn(o, c, 3, 3, dtype=dtype) / (3 * c**0.5), randn(o, dtype=dtype)
    with dispatch.forced("upsample_conv2d", SMALL | {"SPLIT": split}):
        ops.check(UPSAMPLE_CONV2D, *args, 2 * h, 2 * w)
        ops.check(UPSAMPLE_CONV2D, *args[:2], None, 2 * h, 2 * w, conv.upsample_phases(args[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [24, 20, 12, 40], ids=str)
def test_wide_tile_of_two_accumulators_matches_reference(filters: int, dtype: torch.dtype) -> None:
    """Tiles of 16 + 16 filters, of which the second accumulator has some, few or none."""
    x, weight, bias, residual, stride, padding = case(2, 24, 4, 5, filters, 3, 1, 1, dtype=dtype)
    for split in (1, 2):
        with dispatch.forced("conv2d", SMALL | {"MORE_N": 16, "SPLIT": split}):
            ops.check(CONV2D, x, weight, bias, residual, stride, padding)
    with dispatch.forced("upsample_conv2d", SMALL | {"MORE_N": 16}):
        ops.check(UPSAMPLE_CONV2D, x, weight, bias, 8, 10)


def test_default_configurations_match_reference() -> None:
    args = case(2, 64, 5, 5, 24, 3, 1, 1)
    ops.check(CONV2D, *args)
    ops.check(UPSAMPLE_CONV2D, *args[:3], 10, 10)
    with dispatch.forced("conv2d", SMALL | {"BLOCK_M": 256, "BLOCK_N": 128}):  # finished in halves
        ops.check(CONV2D, *args)


@settings(max_examples=10, deadline=None)
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    o=st.integers(1, 40),
    k=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    split=st.integers(1, 3),
)
def test_any_shape_matches_reference(
    b: int, c: int, h: int, w: int, o: int, k: int, stride: int, padding: int, split: int
) -> None:
    if min(h, w) + 2 * padding >= k:
        with dispatch.forced("conv2d", SMALL | {"SPLIT": split}):
            ops.check(CONV2D, *case(b, 8 * c, h, w, o, k, stride, padding))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [c for c in linear.SPACE if c["SPLIT"] in (1, 3, 16)], ids=str)
def test_every_configuration_matches_reference(config: dispatch.Config, dtype: torch.dtype) -> None:
    with dispatch.forced("conv2d", config), dispatch.forced("upsample_conv2d", config):
        args = case(2, 72, 9, 9, 136, 3, 1, 1, dtype=dtype)
        ops.check(CONV2D, *args)
        ops.check(UPSAMPLE_CONV2D, *args[:3], 18, 18)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 6), h=st.integers(1, 9), w=st.integers(1, 9), o=st.integers(8, 40))
def test_any_upsampled_shape_matches_reference(b: int, c: int, h: int, w: int, o: int) -> None:
    """32 outputs at least: the error is of the largest, and a few may all be small beside what they sum."""
    x, weight = randn(b, 8 * c, h, w, dtype=torch.float16), randn(o, 8 * c, 3, 3, dtype=torch.float16) / 12
    with dispatch.forced("upsample_conv2d", SMALL | {"SPLIT": 1 + o % 3}):
        ops.check(UPSAMPLE_CONV2D, x, weight, None, 2 * h, 2 * w)


# ------------------------------------------------------------------------------- where, what for, at what cost


def test_refusals_name_the_reason() -> None:
    x, weight, bias, residual, _, _ = args = case(2, 16, 4, 4, 24, 3, 1, 1)
    assert CONV2D.supports(*args)
    assert "no multiple of 8" in CONV2D.supports(randn(2, 12, 4, 4), randn(8, 12, 3, 3)).reason
    assert "x (2, 16, 4, 4)" in CONV2D.supports(x.contiguous(), weight).reason
    assert "weight (24, 16, 3, 3)" in CONV2D.supports(x, weight.contiguous()).reason
    assert "residual" in CONV2D.supports(x, weight, bias, residual.contiguous(), 1, 1).reason
    assert "dtype" in CONV2D.supports(x.double(), weight.double()).reason
    assert "does not double" in UPSAMPLE_CONV2D.supports(x, weight, bias, 8, 9).reason
    phases = conv.upsample_phases(weight).contiguous()
    assert "phases are not channels-last" in UPSAMPLE_CONV2D.supports(x, weight, bias, 8, 8, phases).reason


def test_cost_counts_operations_and_bytes() -> None:
    x, weight, bias, residual, _, _ = case(2, 16, 8, 8, 24, 3, 2, 1, dtype=torch.float16)
    elements = 2 * 16 * 64 + 24 * 16 * 9 + 2 * 24 * 16
    assert CONV2D.cost(x, weight, bias, None, 2, 1) == (2 * 2 * 24 * 16 * 16 * 9, 2 * elements, 0)
    assert CONV2D.cost(x, weight, bias, residual, 2, 1).bytes == 2 * (elements + 2 * 24 * 16)
    full = CONV2D.cost(randn(2, 16, 16, 16), weight, None, None, 1, 1).flop
    assert UPSAMPLE_CONV2D.cost(x, weight, bias, 16, 16).flop * 9 == full * 4
    assert UPSAMPLE_CONV2D.cost(x, weight, bias, 16, 17).flop == 9 * 2 * 2 * 16 * 17 * 24 * 16


def test_shape_classes_and_candidates() -> None:
    x, weight, bias, _, _, _ = case(2, 64, 8, 8, 640, 3, 1, 1)
    assert CONV2D.shape_class(x, weight, bias, None, 1, 1) == "m128 n640 k576"
    assert CONV2D.shape_class(x, weight, bias, None, 2, 1) == "m32 n640 k576 strided"
    assert UPSAMPLE_CONV2D.shape_class(x, weight, bias, 16, 16) == "m512 n640 k256"
    assert conv.default("m128 n1280 k11520 strided", 90) == linear.default("m128 n1280 k11520", 90)
    for op, args in ((CONV2D, (x, weight, bias, None, 1, 1)), (UPSAMPLE_CONV2D, (x, weight, bias, 16, 16))):
        assert 1 <= sum(op.is_candidate(config, *args) for config in op.space) <= 30  # a tuner's patience


def test_meta_tensors_take_the_gpu_path() -> None:
    """A dry run has the calls of a GPU: padded, summed in one pass, channels-last."""
    x = torch.empty(1, 4, 8, 8, device="meta", dtype=torch.float16)
    weight, bias = (torch.empty(*s, device="meta", dtype=torch.float16) for s in ((320, 4, 3, 3), (320,)))
    calls: list[str] = []
    with dispatch.observe(lambda op, args, kwargs: calls.append(op.name)):
        out = conv.conv2d(x, weight, bias, padding=1)
    assert calls == ["conv2d", "bias_residual"]
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_registered_op_agrees_with_its_schema() -> None:
    args = case(1, 16, 3, 4, 8, 3, 1, 1)
    ops.check_registered(CONV2D, *args)
    ops.check_registered(UPSAMPLE_CONV2D, *args[:3], 6, 8)
