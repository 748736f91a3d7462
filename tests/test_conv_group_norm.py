"""kernels/conv_group_norm.py: the reference against the two ops, the kernels against the reference."""

from __future__ import annotations

from typing import Any

import ops
import pytest
import torch
from mutations import Every
from torch import Tensor

from fastldm.kernels import dispatch
from fastldm.kernels.conv import conv2d
from fastldm.kernels.conv_group_norm import CONV_GROUP_NORM, conv_group_norm
from fastldm.kernels.group_norm import group_norm

# The interpreter computes the lanes that are masked off, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
HALVES = TILE | {"BLOCK_M": 128, "BLOCK_N": 128}  # an accumulator that is finished in halves
CONVOLUTIONS = {"wide": TILE | {"MORE_N": 16}, "split": TILE | {"BLOCK_M": 32, "BLOCK_N": 32, "SPLIT": 3}}
NORMS = {
    "one pass": {"GROUPS": 1, "PIXELS": 32, "TILES": 1, "num_warps": 4},
    "pieces": {"GROUPS": 2, "PIXELS": 8, "TILES": 2, "num_warps": 4},
}
DESIGNS = pytest.mark.parametrize(
    ("convolution", "norm"),
    [(c, n) for c in CONVOLUTIONS.values() for n in NORMS.values()],
    ids=[f"{c}, {n}" for c in CONVOLUTIONS for n in NORMS],
)
OPTIONS: dict[str, set[str]] = {
    "nothing": set(),
    "shift": {"shift"},
    "sum and ahead": {"conv_bias", "residual", "ahead"},
    "sum and skip": {"conv_bias", "residual", "skip"},
    "shift and each row's weights": {"shift", "rows"},
}


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def arguments(
    given: set[str], dtype: torch.dtype = torch.float32, height: int = 4, width: int = 8, filters: int = 30
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Groups of 10; with skip, one has channels of both."""
    vector = lambda count: torch.randn(count, device=ops.DEVICE).to(dtype)  # noqa: E731
    made: dict[str, Tensor] = {
        "conv_bias": vector(filters),
        "residual": image(2, filters, height, width, dtype=dtype),
        "shift": image(2, filters, 1, 1, dtype=dtype).flatten(1),
        "skip": image(2, 15, height, width, dtype=dtype),
        "ahead": vector(filters),
    }
    channels = filters + (15 if "skip" in given else 0)
    named = {name: value if name in given else None for name, value in made.items()}
    x, weight = image(2, 16, height, width, dtype=dtype), image(filters, 16, 3, 3, dtype=dtype)
    args = (x, weight, named.pop("conv_bias"), named.pop("residual"), channels // (channels // 3))
    norm = [image(2, channels, 1, 1, dtype=dtype).flatten(1) if "rows" in given else vector(channels) for _ in range(2)]
    return (*args, *norm, 1e-5), {"padding": 1, "silu": True, **named}


def forced(convolution: dict[str, Any], norm: dict[str, Any]) -> Any:
    """The configurations of both, as tables have them."""
    arch = dispatch.capability(torch.empty(0, device=ops.DEVICE))
    return dispatch.use_table({f"sm_{arch}": {"conv2d": Every(convolution), "add_group_norm": Every(norm)}})


@DESIGNS
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_kernels_match_reference(given: set[str], convolution: dict[str, Any], norm: dict[str, Any]) -> None:
    args, named = arguments(given)
    with dispatch.use("triton"), forced(convolution, norm):
        ops.check(CONV_GROUP_NORM, *args, **named)


@pytest.mark.full
@DESIGNS
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 7), (6, 8)], ids=["no whole tiles", "three tiles"])
def test_kernels_match_reference_in_every_dtype(
    size: tuple[int, int], dtype: torch.dtype, given: set[str], convolution: dict[str, Any], norm: dict[str, Any]
) -> None:
    args, named = arguments(given, dtype, *size)
    with dispatch.use("triton"), forced(convolution, norm):
        ops.check(CONV_GROUP_NORM, *args, **named)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_an_accumulator_in_halves_matches_reference(dtype: torch.dtype) -> None:
    args, named = arguments(OPTIONS["sum and ahead"], dtype, 16, 16, filters=120)
    with dispatch.use("triton"), forced(HALVES, NORMS["pieces"]):
        ops.check(CONV_GROUP_NORM, *args, **named)


@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_the_two_are_a_convolution_and_a_norm(given: set[str]) -> None:
    (x, weight, bias, residual, *norm), named = arguments(given)
    total, out = conv_group_norm(x, weight, bias, residual, *norm, **named)
    expected = conv2d(x, weight, bias, padding=1, residual=residual)
    normed = group_norm(expected, *norm, silu=True, shift=named["shift"], skip=named["skip"])
    ahead = named["ahead"]
    assert ops.error(total, expected if ahead is None else expected + ahead[:, None, None]) < 1e-6
    assert ops.error(out, normed) < 1e-5


@DESIGNS
def test_rows_are_independent_of_their_batch(convolution: dict[str, Any], norm: dict[str, Any]) -> None:
    """Bitwise, though how many programs merge moments depends on it."""
    (x, *rest), named = arguments({"shift"})
    with dispatch.use("triton"), forced(convolution, norm):
        together = CONV_GROUP_NORM.triton(x, *rest, **named)
        for row in range(2):
            mine = slice(row, row + 1)
            alone = CONV_GROUP_NORM.triton(x[mine], *rest, **{**named, "shift": named["shift"][mine]})
            assert torch.equal(alone[0], together[0][mine])
            assert torch.equal(alone[1], together[1][mine])


def test_the_op_follows_the_convolutions_path() -> None:
    """By the library where that convolves; with its own shapes, on Hopper alone by the kernel."""
    filters, norm = torch.empty(320, device="meta").half(), torch.empty(320, device="meta").half()
    channels_last = torch.channels_last
    x = torch.empty(2, 320, 64, 64, device="meta", dtype=torch.float16).contiguous(memory_format=channels_last)
    weight = torch.empty(320, 320, 3, 3, device="meta", dtype=torch.float16).contiguous(memory_format=channels_last)
    small = x[:, :, :8, :8].contiguous(memory_format=channels_last)
    args = (weight, filters, None, 32, norm, norm, 1e-5, 1, 1)
    for arch, image_of, ok in ((90, x, True), (80, x, False), (90, small, False)):
        with dispatch.targeting(dispatch.Target(arch)):
            assert bool(CONV_GROUP_NORM.path(image_of, *args)) is ok


def test_registered_op_agrees_with_its_schema() -> None:
    args, _ = arguments({"conv_bias", "residual"})
    ops.check_registered(CONV_GROUP_NORM, *args, 1, 1, True)
