"""The gate of a transformer's feed-forward.

    out = a * gelu(b)       (a | b) = x        x (..., 2C) -> (..., C)        gelu(b) = b * (1 + erf(b / sqrt 2)) / 2

The exact GELU, not its tanh approximation. Formula: Shazeer 2020, arXiv:2002.05202.

Bytes: x once, half of it written, nothing between: at any size the floor is 3C elements a row over the bandwidth. A
program takes one block of rows and one block of channels, so that a small feature map fills the chip too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, cdiv, dense, jit, launch, no
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl


def geglu_reference(x: Tensor) -> Tensor:
    """The formula written plainly."""
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


def keep(config: Config, x: Tensor) -> bool:
    """4 to 32 elements for each thread; a block of channels that is not mostly beyond the end."""
    per_thread = config["ROWS"] * config["CHANNELS"] // (32 * config["num_warps"])
    return 4 <= per_thread <= 32 and config["CHANNELS"] < x.shape[-1]


def shape_class(x: Tensor) -> str:
    return f"c{x.shape[-1] // 2}"


def default(shape: str, arch: int) -> Config:
    return {"ROWS": 2, "CHANNELS": 512, "num_warps": 4}


# ------------------------------------------------------------------------------------------------------ kernel


@jit
def _geglu_kernel(x, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = (row < rows) & (channel < channels)
    x += row.to(tl.int64) * (2 * channels) + channel  # 64 bits: rows * 2C passes 2^31 elements at large batches
    a = tl.load(x, mask, other=0.0).to(tl.float32)
    b = tl.load(x + channels, mask, other=0.0).to(tl.float32)
    gelu = 0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476))  # 1 / sqrt 2
    tl.store(out + row.to(tl.int64) * channels + channel, (a * gelu).to(out.dtype.element_ty), mask)


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
    keep=keep,
)


def geglu(x: Tensor) -> Tensor:
    """Gate the first half of the channels by the GELU of the second: x (..., 2C) -> (..., C), in x's dtype."""
    return GEGLU(x)
