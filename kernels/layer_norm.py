"""LayerNorm over the last dimension, alone or with the sum before it in a transformer.

    layer_norm:        out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    add_layer_norm:    total = x + residual, rounded to x's dtype         out = layer_norm(total)         returns both

    x, residual (..., C), weight and bias (C,) -> (..., C)

With `out_scale` the output is e4m3, as fp8.quantize of it would be: for a product of eight bits.

Statistics are float32 whatever the dtype. Formula: Ba et al. 2016, arXiv:1607.06450.

A program holds ROWS full rows in registers. It computes their means, and from them M2 = sum (x - mean)^2, which is
accurate where E[x^2] - mean^2 loses all precision. A row's C channels are the first of next_power_of_2(C) lanes: of
320, 640 and 1280 three lanes in eight are idle, which costs instructions and no bytes. Four 16-byte loads a thread
set the tile: two rows of 320 or one of 640 for one warp, which then exchanges nothing through shared memory, and one of
1280 for two.

Bytes: x read, out written. With the sum two are read and two written, where a sum of its own would read and write two
more. 8192 rows of 320 in float16 are 10.5 MB (3.5 us at 3 TB/s), with the sum 21 MB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, cdiv, jit, launch, next_power_of_2, no
from fastldm.kernels.fp8 import E4M3, has_units, quantize_reference
from fastldm.kernels.linear import to_range

if TYPE_CHECKING:
    import triton.language as tl


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None) -> Tensor:
    """PyTorch's layer_norm, which has float32 statistics for 16-bit dtypes."""
    if out_scale is not None:
        return quantize_reference(F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps), out_scale)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum, then PyTorch's layer_norm of it."""
    total = x + residual
    out = layer_norm_reference(total, weight, bias, eps, out_scale)
    return total if ahead is None else total.add_(ahead), out


def supports(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None) -> Verdict:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"dtype {x.dtype}")
    if x.numel() == 0:
        return no(f"{tuple(x.shape)} is empty")
    if not x.is_contiguous():
        return no("rows are not contiguous")
    if not (weight.is_contiguous() and bias.is_contiguous()):
        return no("weight or bias is not contiguous")
    if x.shape[-1] > _LONGEST_ROW:
        return no(f"{x.shape[-1]} channels are more than {_LONGEST_ROW}")
    return YES if out_scale is None else has_units(x)


def add_supports(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> Verdict:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        return no(f"x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} {tuple(residual.shape)}")
    return supports(x, weight, bias, eps, out_scale) and supports(residual, weight, bias, eps)


def cost(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None) -> Cost:
    return Cost(flop=0, bytes=x.numel() * (x.element_size() + (x.element_size() if out_scale is None else 1)))


def add_cost(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> Cost:
    return Cost(flop=0, bytes=x.numel() * (3 * x.element_size() + (x.element_size() if out_scale is None else 1)))


# ---------------------------------------------------------------------------------------------- configurations

_LONGEST_ROW = 8192  # channels: 16 a thread of 16 warps

SPACE = [{"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8, 16)]


def is_candidate(
    config: Config, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None
) -> bool:
    """8 to 64 elements for each thread."""
    return 8 <= config["ROWS"] * next_power_of_2(x.shape[-1]) // (32 * config["num_warps"]) <= 64


def add_is_candidate(
    config: Config,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> bool:
    return is_candidate(config, x, weight, bias, eps)


def shape_class(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None) -> str:
    return f"c{x.shape[-1]}"


def add_shape_class(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> str:
    return f"c{x.shape[-1]}"


def default(shape: str, arch: int) -> Config:
    """32 elements for each thread."""
    lanes = next_power_of_2(int(shape[1:]))
    return {"ROWS": max(1024 // lanes, 1), "num_warps": max(lanes // 1024, 1)}


# ------------------------------------------------------------------------------------------------------ kernel


@jit
def _layer_norm_kernel(
    x, residual, weight, bias, ahead, inverse, total, out, rows, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, LANES)[None, :]
    mask = (row < rows) & (channel < channels)
    offset = row.to(tl.int64) * channels + channel  # 64 bits: rows * channels exceeds 2^31 at large batches
    y = tl.load(x + offset, mask, other=0.0)
    scale = tl.load(weight + channel, channel < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)
    if residual is not None:
        y = (y.to(tl.float32) + tl.load(residual + offset, mask, other=0.0).to(tl.float32)).to(y.dtype)
        later = y
        if ahead is not None:
            later = (y.to(tl.float32) + tl.load(ahead + channel, channel < channels, other=0.0).to(tl.float32)).to(
                y.dtype
            )
        tl.store(total + offset, later, mask)
    y = y.to(tl.float32)
    mean = tl.sum(y, axis=1, keep_dims=True) / channels
    deviation = tl.where(mask, y - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=1, keep_dims=True) / channels + EPS)
    y = deviation * rstd * scale + shift
    if inverse is not None:
        y = to_range(y * inverse)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask)


def _launch(
    config: Config,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None,
    out_scale: float | None,
) -> tuple[Tensor | None, Tensor]:
    channels = x.shape[-1]
    rows = x.numel() // channels
    total = None if residual is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape, dtype=x.dtype if out_scale is None else E4M3)
    inverse = None if out_scale is None else 1 / out_scale
    grid = (cdiv(rows, config["ROWS"]),)
    tile = {**config, "LANES": next_power_of_2(channels), "EPS": eps}
    launch(_layer_norm_kernel, grid, x, residual, weight, bias, ahead, inverse, total, out, rows, channels, **tile)
    return total, out


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: float | None = None) -> Tensor:
    config = LAYER_NORM.config(x, weight, bias, eps, out_scale)
    return _launch(config, x, None, weight, bias, eps, None, out_scale)[1]


def add_layer_norm_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    config = ADD_LAYER_NORM.config(x, residual, weight, bias, eps, ahead, out_scale)
    total, out = _launch(config, x, residual, weight, bias, eps, ahead, out_scale)
    assert total is not None
    return total, out


# --------------------------------------------------------------------------------------------------------- ops

LAYER_NORM = Op(
    "layer_norm",
    reference=layer_norm_reference,
    triton=layer_norm_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
)

ADD_LAYER_NORM = Op(
    "add_layer_norm",
    reference=add_layer_norm_reference,
    triton=add_layer_norm_triton,
    supports=add_supports,
    shape_class=add_shape_class,
    cost=add_cost,
    default=default,
    space=SPACE,
    is_candidate=add_is_candidate,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out_scale: float | None = None) -> Tensor:
    """Normalise each row of x (..., C), in x's dtype, or in e4m3 to be multiplied by `out_scale`."""
    return LAYER_NORM(x, weight, bias, eps, out_scale)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    ahead: Tensor | None = None,
    out_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """x + residual, both (..., C), in x's dtype, and each of its rows normalised, as `layer_norm` does.

    ahead (C,): added to the sum that is returned and not to what is normalised: the bias of the product that the sum
    will be the residual of, which then needs no pass of its own.
    """
    return ADD_LAYER_NORM(x, residual, weight, bias, eps, ahead, out_scale)
