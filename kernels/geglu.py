"""The gate of a transformer's feed-forward.

    out = a * gelu(b)       (a | b) = x        x (..., 2C) -> (..., C)        gelu(b) = b * (1 + erf(b / sqrt 2)) / 2

The exact GELU, not its tanh approximation. Formula: Shazeer 2020, arXiv:2002.05202.

The kernel computes it from the far side of the normal distribution, F(z) = P(Z < -z) for z = |b| >= 0, which is small
where its error would be multiplied by much:

    gelu(b) = max(b, 0) - z F(z)        F(z) = exp(-z^2 / 2) (a1 t + ... + a5 t^5) / 2        t = 1 / (1 + p z / sqrt 2)

with Hastings' p and a1..a5 (Abramowitz and Stegun 7.1.26), |error of F| < 8e-8: float32's own. That is 28 instructions
an element, against 43 with the library's erf, and leaves memory the slower side: in the time of an element's 6 bytes an
H100 issues 59 instructions, an H200 37.

Bytes: x once, half of it written, nothing between: at any size the floor is 3C elements a row over the bandwidth. A
program takes one block of rows and one block of channels, so that a small feature map fills the chip too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.approximate import exp2, reciprocal
from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, cdiv, dense, jit, launch, no

if TYPE_CHECKING:
    import triton.language as tl


def geglu_reference(x: Tensor) -> Tensor:
    """The formula in PyTorch."""
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def supports(x: Tensor) -> Verdict:
    if not x.is_floating_point():
        return no(f"dtype {x.dtype}")
    if x.shape[-1] % 2:
        return no(f"{x.shape[-1]} channels do not halve")
    return dense(x) and (YES if x.is_contiguous() else no("rows are not contiguous"))


def cost(x: Tensor) -> Cost:
    return Cost(flop=0, bytes=x.numel() * x.element_size() * 3 // 2, exp=x.numel() // 2)


# ---------------------------------------------------------------------------------------------- configurations

SPACE = [
    {"ROWS": rows, "CHANNELS": channels, "num_warps": warps}
    for rows in (1, 2, 4, 8)
    for channels in (256, 512, 1024, 2048)
    for warps in (2, 4, 8)
]


def is_candidate(config: Config, x: Tensor) -> bool:
    """4 to 32 elements for each thread; a block of channels that is not mostly beyond the end."""
    per_thread = config["ROWS"] * config["CHANNELS"] // (32 * config["num_warps"])
    return 4 <= per_thread <= 32 and config["CHANNELS"] < x.shape[-1]


def shape_class(x: Tensor) -> str:
    return f"c{x.shape[-1] // 2}"


def default(shape: str, arch: int) -> Config:
    """16 elements for each thread, and no block of channels beyond the end where C is a multiple of 256."""
    channels = 512 if int(shape[1:]) % 512 == 0 else 256
    return {"ROWS": 2048 // channels, "CHANNELS": channels, "num_warps": 4}


# ----------------------------------------------------------------------------------------------------- kernels


@jit
def gelu(b):
    z = tl.abs(b)
    t = reciprocal(1.0 + 0.23164189 * z)  # p / sqrt 2
    series = t * (0.12741480 + t * (-0.14224837 + t * (0.71070687 + t * (-0.72657601 + t * 0.53070271))))  # a1..a5 / 2
    return tl.maximum(b, 0.0) - z * series * exp2(-0.72134752 * b * b)  # log2(e) / 2


@jit
def _geglu_kernel(x, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = (row < rows) & (channel < channels)
    x += row.to(tl.int64) * (2 * channels) + channel  # 64 bits: rows * 2C exceeds 2^31 at large batches
    a = tl.load(x, mask, other=0.0).to(tl.float32)
    b = tl.load(x + channels, mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * channels + channel, (a * gelu(b)).to(out.dtype.element_ty), mask)


def geglu_triton(x: Tensor) -> Tensor:
    config = GEGLU.config(x)
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    rows = out.numel() // channels
    grid = (cdiv(rows, config["ROWS"]), cdiv(channels, config["CHANNELS"]))
    launch(_geglu_kernel, grid, x, out, rows, channels, **config)
    return out


# ---------------------------------------------------------------------------------------------------------- op

GEGLU = Op(
    "geglu",
    reference=geglu_reference,
    triton=geglu_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
)


def geglu(x: Tensor) -> Tensor:
    """Gate the first half of the channels by the GELU of the second: x (..., 2C) -> (..., C), in x's dtype."""
    return GEGLU(x)
