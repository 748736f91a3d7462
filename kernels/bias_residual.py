"""What is left to add when cuDNN has convolved: a bias for each channel and another image, in one pass and in place.

    out[b, o, h, w] += bias[o] + residual[b, o, h, w]

    out and residual (B, O, H, W), channels-last, bias (O,); either may be None

ATen adds a bias in a pass of its own after cuDNN, and a residual in another. The kernel is linear.py's `sum_kernel`,
which adds up the partial sums of a product and then both of these, with out itself as the only part.

Bytes: out read and written, residual read: 3 B O H W elements, where two passes move 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, cdiv, launch, next_power_of_2, no
from fastldm.kernels.linear import sum_kernel


def bias_residual_reference(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Add both to out (B, O, H, W), in place."""
    if bias is not None:
        out += bias[:, None, None]
    if residual is not None:
        out += residual


def supports(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Verdict:
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"dtype {out.dtype}")
    for image in (out,) if residual is None else (out, residual):
        if not image.is_contiguous(memory_format=torch.channels_last):
            return no(f"{tuple(image.shape)} with strides {tuple(image.stride())} is not channels-last")
    return YES if out.numel() else no(f"{tuple(out.shape)} is empty")


def cost(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Cost:
    return Cost(flop=0, bytes=out.numel() * out.element_size() * (2 if residual is None else 3))


# ----------------------------------------------------------------------------------------------- configurations

SPACE = [
    {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    for rows in (4, 8, 16, 32, 64)
    for columns in (32, 64, 128)
    for warps in (2, 4, 8)
]


def is_candidate(config: Config, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """8 to 32 elements for each thread: one to four loads of 16 bytes of each tensor."""
    return 8 <= config["ROWS"] * config["COLUMNS"] // (32 * config["num_warps"]) <= 32


def shape_class(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> str:
    return f"p{next_power_of_2(out.numel() // out.shape[1])} n{out.shape[1]}"


def default(shape: str, arch: int) -> Config:
    """64 channels, which divide those of the networks: 128 bytes a pixel, 16 elements a thread."""
    return {"ROWS": 32, "COLUMNS": 64, "num_warps": 4}


# ----------------------------------------------------------------------------------------------------- launcher


def bias_residual_triton(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    config = BIAS_RESIDUAL.config(out, bias, residual)
    columns = out.shape[1]
    rows = out.numel() // columns
    grid = (cdiv(rows, config["ROWS"]), cdiv(columns, config["COLUMNS"]))
    launch(sum_kernel, grid, out, None, bias, residual, None, out, rows, columns, PARTS=1, **config)


# ----------------------------------------------------------------------------------------------------------- op

BIAS_RESIDUAL = Op(
    "bias_residual",
    reference=bias_residual_reference,
    triton=bias_residual_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    mutates=("out",),
)


def bias_residual(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Add bias (O,) and residual (B, O, H, W), where there is one, to out (B, O, H, W), in place, and return it."""
    if bias is not None or residual is not None:
        BIAS_RESIDUAL(out, bias, residual)
    return out
