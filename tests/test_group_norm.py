"""kernels/group_norm.py: the reference against the formula, the kernels against the reference."""

from __future__ import annotations

from typing import Any

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import dispatch
from fastldm.kernels.group_norm import (
    ADD_GROUP_NORM,
    GROUP_NORM,
    add_group_norm,
    add_supports,
    default,
    group_norm,
    group_norm_reference,
    is_candidate,
    supports,
)

# The interpreter computes the lanes that are masked off, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Configurations that force both designs onto small shapes: one program for a group; pieces of two tiles of 8 pixels.
ONE_PASS = {"GROUPS": 1, "PIXELS": 32, "TILES": 2, "num_warps": 4}
PIECES = {"GROUPS": 2, "PIXELS": 8, "TILES": 2, "num_warps": 4}
DESIGNS = pytest.mark.parametrize("config", [ONE_PASS, PIECES], ids=["one pass", "pieces"])
SIZES = (4, 8, 16, 10, 20, 30, 40, 60, 80)  # channels a group of the autoencoders and of the U-Nets, skips and all


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    """Channels-last."""
    x = torch.randn(shape, device=ops.DEVICE) + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, device=ops.DEVICE, dtype=dtype)
    return weight, bias


def check(
    config: dict[str, Any] | None,
    x: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    skip: Tensor | None = None,
    **kwargs: Any,
) -> None:
    weight, bias = vectors(x.shape[1] + (0 if skip is None else skip.shape[1]), x.dtype)
    with dispatch.forced("group_norm" if config else "", config or {}):
        ops.check(GROUP_NORM, x, groups, weight, bias, eps, skip=skip, **kwargs)


def test_statistics_of_large_images_are_exact() -> None:
    x = torch.randn(2, 16, 256, 272).contiguous(memory_format=torch.channels_last) + 1
    weight, bias = torch.randn(2, 16)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
    out = group_norm_reference(x, 4, weight, bias, 1e-6)
    assert out.stride() == x.stride()
    assert (out - expected).abs().max() < 1e-6 * expected.abs().max()
    flat = torch.full_like(x, 3.0)
    assert (group_norm_reference(flat, 4, weight, bias, 1e-6) - bias[:, None, None]).abs().max() < 1e-3
    x.requires_grad_()
    assert group_norm_reference(x, 4, weight, bias, 1e-6).requires_grad


def check_sum(
    config: dict[str, Any] | None,
    x: Tensor,
    groups: int,
    residual: bool = True,
    x_bias: bool = True,
    ahead: bool = True,
    skip: Tensor | None = None,
    silu: bool = False,
) -> None:
    weight, bias = vectors(x.shape[1] + (0 if skip is None else skip.shape[1]), x.dtype)
    later, own = (
        torch.randn(x.shape[1], device=ops.DEVICE, dtype=x.dtype) if given else None for given in (ahead, x_bias)
    )
    other = image(*x.shape, dtype=x.dtype) if residual else None
    with dispatch.forced("add_group_norm" if config else "", config or {}):
        ops.check(ADD_GROUP_NORM, x, other, own, groups, weight, bias, 1e-5, silu, skip, later)


def error(x: Tensor, groups: int, eps: float = 1e-5) -> float:
    """The kernel's greatest error, with weight 1 and bias 0, where PyTorch's own result is no measure."""
    weight, bias = torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
    with ops.poisoned():
        got = GROUP_NORM.triton(x, groups, weight, bias, eps)
    return (got.double() - exact).abs().max().item()


def test_reference_matches_formula() -> None:
    x, skip, shift = torch.randn(2, 10, 5, 3).double(), torch.randn(2, 14, 5, 3).double(), torch.randn(2, 24).double()
    weight, bias = torch.randn(2, 24, dtype=torch.float64)
    y = torch.cat((x, skip), 1) + shift[:, :, None, None]
    group = y.reshape(2, 4, -1)  # groups of 6: one has channels of x and of skip
    group = (group - group.mean(2, keepdim=True)) / (group.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    expected = group.reshape(2, 24, 5, 3) * weight[:, None, None] + bias[:, None, None]
    got = group_norm_reference(x, 4, weight, bias, 1e-3, shift=shift, skip=skip)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    got = group_norm(x, 4, weight, bias, 1e-3, silu=True, shift=shift, skip=skip)
    assert torch.allclose(got, expected * expected.sigmoid(), rtol=1e-12, atol=1e-12)


def test_the_sum_matches_its_formula() -> None:
    x, residual, skip = (
        torch.randn(2, 10, 5, 3).double(),
        torch.randn(2, 10, 5, 3).double(),
        torch.randn(2, 2, 5, 3).double(),
    )
    x_bias, ahead, (weight, bias) = torch.randn(10).double(), torch.randn(10).double(), torch.randn(2, 12).double()
    total, out = add_group_norm(x, residual, x_bias, 3, weight, bias, 1e-3, silu=True, skip=skip, ahead=ahead)
    expected = x + residual + x_bias[:, None, None]
    assert torch.allclose(total, expected + ahead[:, None, None], rtol=1e-12, atol=1e-12)
    expected = group_norm(expected, 3, weight, bias, 1e-3, silu=True, skip=skip)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)


@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize(
    "given",
    [(True, True, False), (True, True, True), (False, True, False), (False, False, True)],
    ids=["residual, bias", "residual, bias, ahead", "bias", "ahead"],
)
def test_every_sum_matches_reference(
    given: tuple[bool, bool, bool], dtype: torch.dtype, config: dict[str, Any]
) -> None:
    """Groups of 10, two rows, tails of tile, piece and block."""
    check_sum(config, image(2, 30, 5, 7, dtype=dtype), 3, *given, silu=True)


@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_a_sum_with_skip_matches_reference(dtype: torch.dtype, config: dict[str, Any]) -> None:
    """A group with channels of the sum and of the skip, which is added nothing to."""
    check_sum(config, image(2, 17, 5, 7, dtype=dtype), 3, skip=image(2, 13, 5, 7, dtype=dtype), silu=True)


@pytest.mark.full
@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_every_group_size_match_reference(size: int, dtype: torch.dtype, config: dict[str, Any]) -> None:
    split_channel = 2 * size - size // 2
    skip = image(3, 4 * size - split_channel, 5, 7, dtype=dtype)
    check_sum(config, image(3, split_channel, 5, 7, dtype=dtype), 4, skip=skip)


@DESIGNS
def test_the_sum_is_rounded_before_normalising(config: dict[str, Any]) -> None:
    """Bitwise equal to a sum and then a norm, and `ahead` only in the sum that is returned."""
    x, residual = image(2, 30, 5, 7, dtype=torch.float16), image(2, 30, 5, 7, dtype=torch.float16).mul_(9)
    weight, bias = vectors(30, torch.float16)
    with dispatch.forced("add_group_norm", config), ops.poisoned():
        total, out = ADD_GROUP_NORM.triton(x, residual, None, 3, weight, bias, 1e-5)
        later, same = ADD_GROUP_NORM.triton(x, residual, None, 3, weight, bias, 1e-5, ahead=bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(later, total + bias[:, None, None])
    with dispatch.forced("group_norm", config):
        expected = GROUP_NORM.triton(total, 3, weight, bias, 1e-5)
    assert torch.equal(out, expected)
    assert torch.equal(same, expected)


def test_unsupported_sums_are_refused_with_the_reason() -> None:
    x, (weight, bias) = image(1, 8, 4, 4), vectors(8)
    rest = (2, weight, bias, 1e-5)
    assert "residual torch.float16" in add_supports(x, x.half(), None, *rest).reason
    assert "residual torch.float32 (1, 8, 4, 2)" in add_supports(x, x[..., :2], None, *rest).reason
    assert "is not channels-last" in add_supports(x, x.contiguous(), None, *rest).reason
    assert "x_bias is (4,)" in add_supports(x, None, bias[:4], *rest).reason
    assert "ahead is (8,) with strides (2,)" in add_supports(x, None, None, *rest, ahead=torch.zeros(16)[::2]).reason


def test_sums_of_rows_are_independent_of_their_batch() -> None:
    x, residual, (weight, bias) = image(3, 20, 5, 7), image(3, 20, 5, 7), vectors(20)
    with dispatch.forced("add_group_norm", PIECES):
        together = ADD_GROUP_NORM.triton(x, residual, bias, 2, weight, bias, 1e-5)
        alone = [
            ADD_GROUP_NORM.triton(x[i : i + 1], residual[i : i + 1], bias, 2, weight, bias, 1e-5) for i in range(3)
        ]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@DESIGNS
@pytest.mark.parametrize("size", SIZES)
def test_every_group_size_matches_reference(size: int, config: dict[str, Any]) -> None:
    """Three groups: the last block of the pieces has one of its two. 35 pixels: a tail of tile and piece."""
    check(config, image(1, 3 * size, 5, 7), 3, silu=True)


@pytest.mark.full
@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_group_size_with_all_options_matches_reference(
    size: int, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    """Four groups in two blocks of pieces, channels of x and skip in the second group, a shift, SiLU, batch 3."""
    split_channel = 2 * size - size // 2
    x, skip = image(3, split_channel, 5, 7, dtype=dtype), image(3, 4 * size - split_channel, 5, 7, dtype=dtype)
    shift = torch.randn(3, 4 * size, device=ops.DEVICE, dtype=dtype)
    check(config, x, 4, silu=True, shift=shift, skip=skip)


@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_all_options_match_reference(dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Groups of 10, the third with channels of x and skip; a shift that is a slice of a wider row; batch 3; no SiLU."""
    x, skip = image(3, 24, 3, 9, dtype=dtype), image(3, 16, 3, 9, dtype=dtype)
    shift = torch.randn(3, 100, device=ops.DEVICE, dtype=dtype)[:, 20:60]
    check(config, x, 4, shift=shift, skip=skip)


@DESIGNS
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_weights_of_each_row_match_reference(dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Slices of a wider row, as of time rows; a group with channels of x and skip; a shift; batch 3."""
    x, skip = image(3, 24, 3, 9, dtype=dtype), image(3, 16, 3, 9, dtype=dtype)
    rows = torch.randn(3, 200, device=ops.DEVICE, dtype=dtype)
    weight, bias, shift = rows[:, 20:60], rows[:, 60:100], rows[:, 120:160]
    with dispatch.forced("group_norm", config):
        ops.check(GROUP_NORM, x, 4, weight, bias, 1e-5, silu=True, shift=shift, skip=skip)
    x, other = image(3, 40, 3, 9, dtype=dtype), image(3, 40, 3, 9, dtype=dtype)
    with dispatch.forced("add_group_norm", config):
        ops.check(ADD_GROUP_NORM, x, other, None, 4, weight, bias, 1e-5)


def test_weights_of_each_row_match_formula() -> None:
    x, weight, bias = torch.randn(2, 12, 5, 3), torch.randn(2, 12), torch.randn(2, 12)
    expected = torch.cat([F.group_norm(x[i : i + 1], 3, weight[i], bias[i], 1e-3) for i in range(2)])
    assert ops.error(group_norm(x, 3, weight, bias, 1e-3), expected) < 1e-6
    large = torch.randn(2, 12, 256, 136).contiguous(memory_format=torch.channels_last)
    expected = F.group_norm(large.double(), 3) * weight[:, :, None, None] + bias[:, :, None, None]
    assert ops.error(group_norm(large, 3, weight, bias, 1e-5), expected) < 1e-6


@DESIGNS
def test_a_shared_shift_matches_reference(config: dict[str, Any]) -> None:
    """Rows of stride 0; much larger than what it is added to, as a bias may be."""
    check(config, image(2, 20, 4, 5), 2, shift=torch.randn(1, 20, device=ops.DEVICE).mul_(50).expand(2, 20), silu=True)


@pytest.mark.parametrize(
    "shape",
    {
        "one pixel": (2, 20, 1, 1),
        "one channel a group": (1, 2, 3, 5),
        "one column": (2, 8, 7, 1),
        "one row": (2, 8, 1, 7),
        "the 8x8 level": (1, 80, 8, 8),
    }.items(),
    ids=lambda item: item[0],
)
def test_default_configurations_match_reference(shape: tuple[str, tuple[int, ...]]) -> None:
    check(None, image(*shape[1]), 2, silu=True)


@pytest.mark.full
def test_a_full_level_matches_reference() -> None:
    """SD1.5's 64x64 level as it is launched, split among 192 programs."""
    check(None, image(1, 320, 64, 64, dtype=torch.float16), 32, silu=True)


@DESIGNS
def test_views_match_reference(config: dict[str, Any]) -> None:
    """Tokens viewed as an image, and a skip whose pixels are further apart than their channels."""
    tokens = torch.randn(2, 4 * 5, 16, device=ops.DEVICE)
    width = torch.randn(2, 4, 5, 24, device=ops.DEVICE).permute(0, 3, 1, 2)
    check(config, tokens.unflatten(1, (4, 5)).permute(0, 3, 1, 2), 4, skip=width[:, 8:16])


@DESIGNS
@pytest.mark.parametrize(("mean", "dtype"), [(1e3, torch.float32), (1e4, torch.float32), (1e3, torch.float16)])
def test_huge_means_lose_no_precision(mean: float, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Deviation 1 about a large mean: right to the last places of the mean itself, which float32 resolves to 6e-8.

    PyTorch on a CPU is no measure: channels-last it takes E[x^2] - mean^2, which at 1e3 is wrong by percents.
    """
    with dispatch.forced("group_norm", config):
        rounding = 0.0 if dtype == torch.float32 else 2e-3  # of results up to 4 in float16
        assert error(image(2, 20, 8, 7, dtype=dtype, mean=mean), 2) < 3 * 2**-23 * mean + rounding


@DESIGNS
def test_distant_group_means_match_reference(config: dict[str, Any]) -> None:
    """Channels of one group at -3e3, 0 and 3e3 and pixels that drift: subsets of different means are merged."""
    x = image(1, 12, 7, 9) + torch.linspace(-3e3, 3e3, 12, device=ops.DEVICE)[:, None, None]
    x = x + torch.linspace(0, 1e3, 63, device=ops.DEVICE).view(7, 9)
    with dispatch.forced("group_norm", config):
        assert error(x.contiguous(memory_format=torch.channels_last), 2) < 2e-6


@DESIGNS
def test_a_constant_input_gives_the_bias(config: dict[str, Any]) -> None:
    """Variance 0: what is left is the mean's rounding, times 1 / sqrt(eps)."""
    x = torch.full((1, 20, 5, 7), 0.7, device=ops.DEVICE).contiguous(memory_format=torch.channels_last)
    with dispatch.forced("group_norm", config):
        assert error(x, 2, eps=1e-6) <= 2**-23 / 1e-6**0.5


@DESIGNS
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_values_match_reference(scale: float, config: dict[str, Any]) -> None:
    """float16 whose squares overflow float16; and values whose variance is far below eps."""
    check(config, image(1, 20, 5, 7).mul_(scale).half(), 2, silu=True)


def test_an_infinity_stays_in_its_group() -> None:
    x = image(1, 40, 5, 7)
    weight, bias = vectors(40)
    with dispatch.forced("group_norm", {**PIECES, "GROUPS": 4}):
        good = GROUP_NORM.triton(x, 4, weight, bias, 1e-5)
        x[0, 13, 2, 2] = float("inf")
        bad = GROUP_NORM.triton(x, 4, weight, bias, 1e-5)
    assert bad[:, 10:20].isnan().all()
    assert torch.equal(bad[:, :10], good[:, :10])
    assert torch.equal(bad[:, 20:], good[:, 20:])


def test_a_row_is_independent_of_its_batch() -> None:
    x, shift = image(3, 20, 5, 7), torch.randn(3, 20, device=ops.DEVICE)
    weight, bias = vectors(20)
    with dispatch.forced("group_norm", PIECES):
        together = GROUP_NORM.triton(x, 2, weight, bias, 1e-5, shift=shift)
        alone = [GROUP_NORM.triton(x[i : i + 1], 2, weight, bias, 1e-5, shift=shift[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_float32_weights_with_float16_match_reference() -> None:
    x, (weight, bias) = image(2, 20, 4, 4, dtype=torch.float16), vectors(20)
    exact = F.group_norm(x.double(), 2, weight.double(), bias.double())
    got = GROUP_NORM.triton(x, 2, weight, bias, 1e-5)
    assert got.dtype == torch.float16
    assert ops.error(got, exact) < 2**-11


def test_output_is_channels_last() -> None:
    weight, bias = vectors(12)
    out = GROUP_NORM.triton(image(2, 8, 4, 6), 3, weight, bias, 1e-5, skip=image(2, 4, 4, 6))
    assert out.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 2),
    size=st.integers(1, 12),
    groups=st.integers(1, 3),
    cut=st.floats(0, 1),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    silu=st.booleans(),
    shifted=st.booleans(),
    config=st.sampled_from([None, PIECES, {**PIECES, "GROUPS": 1, "TILES": 1}]),
)
def test_any_shape_matches_reference(
    batch: int,
    size: int,
    groups: int,
    cut: float,
    height: int,
    width: int,
    silu: bool,
    shifted: bool,
    config: dict[str, Any] | None,
) -> None:
    channels = size * groups
    if size * height * width == 1:
        height += 1  # a group of one number is 0 / sqrt(eps), or noise
    split_channel = max(1, round(cut * channels))
    x = image(batch, split_channel, height, width)
    skip = image(batch, channels - split_channel, height, width) if split_channel < channels else None
    shift = torch.randn(batch, channels, device=ops.DEVICE) if shifted else None
    check(config, x, groups, silu=silu, skip=skip, shift=shift)


# What is normalised: channels, height, width (the U-Nets of SD1.5 at 512 and SDXL at 1024, their autoencoders)
LEVELS = [
    *((c, 64, 64) for c in (320, 512, 640, 960, 1280, 1920)),
    *((c, 32, 32) for c in (320, 640, 960, 1280, 1920, 2560)),
    *((c, 16, 16) for c in (640, 1280, 1920, 2560)),
    *((c, 8, 8) for c in (1280, 2560)),
    *((c, 128, 128) for c in (256, 320, 512, 640, 960)),
    *((c, side, side) for c in (128, 256, 512) for side in (256, 512, 1024)),
]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_defaults_fit_the_networks(level: tuple[int, int, int]) -> None:
    """They are candidates, and either one program takes a group or one row fills a GPU."""
    channels, height, width = level
    x = torch.empty(1, height, width, channels, device="meta").permute(0, 3, 1, 2)
    weight = torch.empty(channels, device="meta")
    config = default(GROUP_NORM.shape_class(x, 32, weight, weight, 1e-5), 90)
    assert is_candidate(config, x, 32, weight, weight, 1e-5)
    pieces = -(-height * width // (config["PIXELS"] * config["TILES"]))
    assert pieces == 1 or pieces * -(-32 // config["GROUPS"]) >= 132


def test_refusals_name_the_reason() -> None:
    weight = torch.ones(8)

    def refusal(x: Tensor, groups: int = 2, weight: Tensor = weight, **kwargs: Any) -> str:
        return supports(x, groups, weight, weight, 1e-5, **kwargs).reason

    x = image(2, 8, 3, 3)
    assert refusal(x) == ""
    assert "float64" in refusal(x.double())
    assert "empty" in refusal(x[:0])
    assert "not channels-last" in refusal(torch.randn(2, 8, 3, 3))
    assert "not channels-last" in refusal(x[..., :2])  # rows of pixels with a gap between them
    assert "not channels-last" in refusal(x, weight=torch.ones(16), skip=torch.randn(2, 8, 3, 3))
    assert "float16" in refusal(x, weight=torch.ones(16), skip=x.half())
    assert "shift is (1, 8)" in refusal(x, shift=torch.ones(1, 8))
    assert "weight is (1, 8) and bias (1, 8)" in refusal(x, weight=torch.ones(1, 8))
    assert "stride 2" in refusal(x, shift=torch.ones(2, 16)[:, ::2])
    assert "1025 channels a group" in refusal(image(1, 1025, 1, 1), 1, torch.ones(1025))
    nchw = torch.randn(2, 8, 3, 3)  # and runs all the same
    assert torch.equal(group_norm(nchw, 2, weight, weight, 1e-5), group_norm_reference(nchw, 2, weight, weight, 1e-5))


def test_registered_op_agrees_with_its_schema() -> None:
    weight, bias = vectors(12)
    ops.check_registered(GROUP_NORM, image(2, 8, 3, 3), 3, weight, bias, 1e-5)
    shift, skip = torch.randn(2, 12, device=ops.DEVICE), image(2, 4, 3, 3)
    ops.check_registered(GROUP_NORM, image(2, 8, 3, 3), 3, weight, bias, 1e-5, silu=True, shift=shift, skip=skip)
