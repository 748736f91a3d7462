"""Matrix products, with bias, residual and gate.

    linear         out = x weight^T + bias + residual               weight (O, I), bias (O,), residual (..., O)
    linear_geglu   out = a * gelu(b)   (a | b) = x weight^T + bias  weight (2O, I), bias (2O,)
                                                                    x (..., I) -> out (..., O)

With M rows of x, N = O and K = I a product is 2MNK float operations over MK + NK + MN elements. A multiprocessor of an
H100 does 2048 float16 multiply-adds a cycle, and its fraction of the bandwidth is 13 bytes in that time, so products
with less than about 300 operations a byte are bound by memory: those of the 8x8 level of a U-Net (M = 128 at batch 2)
and the time embedding, which read their weights once and do little with them. The rest is bound by the matrix units.

The kernel. A program computes a tile of the output, BLOCK_M x BLOCK_N, in float32 registers, and walks along K in steps
of BLOCK_K. A step loads BLOCK_M + BLOCK_N rows of BLOCK_K to multiply BLOCK_M * BLOCK_N * BLOCK_K pairs: large tiles
load least, 128 x 256 takes 85 operations from each byte. `num_stages` steps are in flight, copied asynchronously to
shared memory while the matrix units work on an earlier one.

    width      Triton's tiles are powers of two and the channels of these networks multiples of 320: tiles of 128 or 256
               columns do a quarter or more for nothing (N = 320 takes 384 or 512). 160 = 128 + MORE_N, 32, is half of
               320: two accumulators of the same rows of x, in 128 registers, so that two programs fit a multiprocessor.
    order      Programs start in the order of their index, so those that run together should share their loads. A group
               of 8 rows of tiles is walked column by column: the 132 programs of an H100 read about 8 blocks of x and
               17 of weight, where row by row they would read 1 or 2 of x and 132 of weight.
    epilogue   Bias and residual are added to the accumulators in float32 and rounded once. For linear_geglu a program
               accumulates the tile of a and the tile of b from the same loads of x, and the packed product, 2MN
               elements written, read and gated in a kernel of its own, never exists.
    split K    A small output makes few tiles: M = 128, N = 1280 is 10 of 128 x 128 for 132 multiprocessors. Then each
               tile takes SPLIT programs, each with a fraction of K, which write float32 partial sums to a workspace;
               a second kernel adds them in a fixed order and runs the epilogue. No atomics: the result is the same in
               every run. It costs 8 * SPLIT * M * N bytes, mostly in L2, and a launch.

Tile and splits are those of the least estimated time (`estimate`), unless a measured table has an entry.

PyTorch's own product is cuBLAS. Without bias it is one call; with bias, cublasLt adds it in its epilogue (ATen takes
that path for a one-dimensional bias on a two-dimensional view). A residual is a second pass, in place, 3MN elements;
but without bias, where the residual may be overwritten, cuBLAS adds to it as it writes.
That runs by default: the kernel of `linear` is taken where the table of measurements says so. That of `linear_geglu` is
taken unless it says otherwise: it saves the packed product's way to memory and back, half a gigabyte a step of SD1.5,
and by benchmarks/predict.py 0.16 of the 0.52 ms that cuBLAS and a kernel for the gate take.

Over 500 lines, for both ops are one kernel.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import float32, onednn
from fastldm.kernels.compile import SHARED_MEMORY
from fastldm.kernels.dispatch import (
    YES,
    Config,
    Cost,
    Op,
    Verdict,
    capability,
    cdiv,
    dense,
    device_type,
    interpreting,
    jit,
    launch,
    needs_gradient,
    no,
)
from fastldm.kernels.dispatch import next_power_of_2 as power_of_2
from fastldm.kernels.geglu import geglu, geglu_reference, gelu

if TYPE_CHECKING:
    import triton.language as tl

INTERPRETED = False  # set when a kernel is first launched: dispatch.Kernel


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """PyTorch's linear, then the sum: in place, for nothing else refers to the product."""
    with float32.products(x):
        out = F.linear(x, weight, bias)
    return out if residual is None else out.add_(residual)


def linear_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """PyTorch's fastest way: on a GPU the reference, or cuBLAS's sum into a residual that may be overwritten; on a CPU
    onednn.py where it applies."""
    if overwrite and bias is None and residual is not None and residual.is_contiguous() and fast_library(x):
        residual.view(-1, weight.shape[0]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
        return residual
    out = onednn.product(x, weight, bias) if x.device.type == "cpu" else None
    if out is None:
        return linear_reference(x, weight, bias, residual)
    return out if residual is None else out.add_(residual)


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return geglu_reference(linear_reference(x, weight, bias))


def linear_geglu_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's fastest way: on a GPU cuBLAS, then the kernel of the gate; on a CPU linear_torch, then the gate."""
    if fast_library(x):
        return geglu(linear(x, weight, bias))
    return geglu_reference(linear_torch(x, weight, bias))


def fast_library(x: Tensor) -> bool:
    """Whether the torch path is the one that is optimised for GPUs.

    float32 is for comparisons and takes the references; so does a traced call, for torch.compile and torch.export fuse
    simple ops better than ops that are fused already, and one that autograd records, which writes nothing in place.
    """
    return (
        device_type(x) != "cpu"
        and x.element_size() == 2
        and not torch.compiler.is_compiling()
        and not needs_gradient(x)
    )


# ----------------------------------------------------------------------- where the kernel applies, and its cost


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, overwrite: bool = False
) -> Verdict:
    verdict = supports_dtypes(x, weight, bias, residual)
    if not verdict:
        return verdict
    if weight.shape[1] % 8:
        return no(f"{weight.shape[1]} input channels are no multiple of 8: rows are not 16 bytes aligned")
    for matrix in (x, weight):
        if not (verdict := dense(matrix)):
            return verdict
    if residual is not None and not residual.is_contiguous():
        return no("the residual is not contiguous")
    return YES


def linear_geglu_supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Verdict:
    return no(f"{weight.shape[0]} outputs do not halve") if weight.shape[0] % 2 else supports(x, weight, bias)


def supports_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Verdict:
    """Whether the kernels of matrix products and convolutions take these dtypes."""
    if x.dtype not in (torch.float16, torch.bfloat16) and not (x.dtype == torch.float32 and interpreting()):
        rounds = ": the matrix units would round its operands to 10 bits" if x.dtype == torch.float32 else ""
        return no(f"dtype {x.dtype}{rounds}")
    for tensor in (weight, bias, residual):
        if tensor is not None and tensor.dtype != x.dtype:
            return no(f"x is {x.dtype}, another argument {tensor.dtype}")
    return YES if x.numel() else no(f"x {tuple(x.shape)} is empty")


def cost(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, overwrite: bool = False
) -> Cost:
    rows = x.numel() // x.shape[-1]
    out = rows * weight.shape[0]
    elements = x.numel() + weight.numel() + out * (1 if residual is None else 2)
    return Cost(flop=2 * rows * weight.numel(), bytes=elements * x.element_size())


def linear_geglu_cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    rows = x.numel() // x.shape[-1]
    out = rows * weight.shape[0] // 2
    return Cost(flop=2 * rows * weight.numel(), bytes=(x.numel() + weight.numel() + out) * x.element_size(), exp=out)


# ----------------------------------------------------------------------------------------------- configurations


def _tile(m: int, n: int, warps: int, stages: int, registers: int, more: int = 0) -> dict[str, Any]:
    """more: columns besides n, in an accumulator of their own. registers: the most that a thread may take, 65536 over
    the threads that share a multiprocessor. Without the limit the assembler sometimes spills some to make room for one
    more program.
    """
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64} | ({"MORE_N": more} if more else {})
    return blocks | {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


_TILES = [
    _tile(128, 256, 8, 3, 255),
    _tile(256, 128, 8, 3, 255),
    _tile(128, 128, 8, 3, 128, more=32),
    _tile(128, 128, 8, 3, 255),
    _tile(128, 64, 8, 4, 128),
    _tile(64, 128, 4, 4, 255),
    _tile(64, 64, 4, 4, 168),
    _tile(128, 16, 4, 4, 168),  # convolutions to 3 or 4 channels
]
SPACE = [tile | {"SPLIT": split} for tile in _TILES for split in (1, 2, 3, 4, 6, 8, 12, 16)]
GEGLU_SPACE = [  # two accumulators for each tile of the output
    _tile(128, 128, 8, 3, 255),
    _tile(128, 64, 8, 3, 255),
    _tile(64, 128, 8, 3, 255),
    _tile(64, 64, 4, 4, 255),
]

_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


def estimate(config: Config, m: int, n: int, k: int, arch: int, accumulators: int = 1) -> float:
    """The time of a product (m, k) x (k, n), in multiply-adds of one multiprocessor; infinite where it does not fit.

    Each row and column of a tile that is loaded costs about as much as 64 pairs: that is what large tiles save. Below
    64 columns the matrix units wait for shared memory and gain nothing. Filling the pipeline and writing the tile count
    as 128 more of k. All multiprocessors wait for the last round of tiles. A split writes and reads float32 sums (a
    chip moves about one byte in the time that a multiprocessor takes for one multiply-add, from Ampere to Blackwell)
    and launches a second kernel. None of this is measured: it only has to order the configurations.
    """
    chip = max(sm for sm in _MULTIPROCESSORS if sm <= arch)
    block_m, block_n, split = config["BLOCK_M"], columns_of(config) * accumulators, config.get("SPLIT", 1)
    shared = (block_m + block_n) * config["BLOCK_K"] * 2 * config["num_stages"]
    # Accumulators a thread. Hopper and Blackwell multiply from shared memory; the rest hold operands in registers too.
    max_accumulators = 128 if chip in (90, 100) else 64
    if shared > SHARED_MEMORY[chip] * 1024 or block_m * block_n > max_accumulators * 32 * config["num_warps"]:
        return float("inf")
    rounds = cdiv(cdiv(m, block_m) * cdiv(accumulators * n, block_n) * split, _MULTIPROCESSORS[chip])
    product = rounds * (block_m * max(block_n, 64) + 64 * (block_m + block_n)) * (cdiv(k, split) + 128)
    return product if split == 1 else product + 8 * m * n * split + 5e6


def columns_of(config: Config) -> int:
    """Columns of the output that a program computes."""
    return int(config["BLOCK_N"] + config.get("MORE_N", 0))


def is_competitive(
    config: Config, space: list[dict[str, Any]], m: int, n: int, k: int, arch: int, accumulators: int = 1
) -> bool:
    """Whether the estimated time is at most 1.5 times that of the best configuration."""
    times = (estimate(candidate, m, n, k, arch, accumulators) for candidate in space)
    return estimate(config, m, n, k, arch, accumulators) <= 1.5 * min(times)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[-1], weight.shape[0], weight.shape[1]


def is_candidate(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> bool:
    return is_competitive(config, SPACE, *_sizes(x, weight), capability(x))


def linear_geglu_is_candidate(config: Config, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    m, n, k = _sizes(x, weight)
    return is_competitive(config, GEGLU_SPACE, m, n // 2, k, capability(x), accumulators=2)


def shape_class(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, overwrite: bool = False
) -> str:
    m, n, k = _sizes(x, weight)
    return f"m{power_of_2(m)} n{n} k{k}"


def linear_geglu_shape_class(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    return shape_class(x, weight)


@functools.cache
def default(shape: str, arch: int) -> Config:
    m, n, k = map(int, re.findall(r"\d+", shape))
    return min(SPACE, key=lambda config: estimate(config, m, n, k, arch))


@functools.cache
def linear_geglu_default(shape: str, arch: int) -> Config:
    """On Hopper no tile that takes all registers, for while its program gates, the matrix units wait; for few rows the
    smallest."""
    m, n, k = map(int, re.findall(r"\d+", shape))
    most = 128 * 128 if arch != 90 else 128 * 64 if m > 512 else 64 * 64
    space = [tile for tile in GEGLU_SPACE if tile["BLOCK_M"] * tile["BLOCK_N"] <= most]
    return min(space, key=lambda config: estimate(config, m, n // 2, k, arch, accumulators=2))


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def tile_of(program, rows, columns):
    """Row and column of a program's tile, of rows x columns tiles: column by column through 8 rows, then the next 8."""
    first = program // (8 * columns) * 8
    height = tl.minimum(rows - first, 8)
    index = program % (8 * columns)  # within the group of 8 rows
    return first + index % height, index // height


@jit
def column_of(first, columns, WIDTH: tl.constexpr):
    """(1, WIDTH): the columns from `first` on, beyond the last those from the beginning."""
    return ((first + tl.arange(0, WIDTH)) % columns)[None, :]


@jit
def finish(
    tile, gate, scale, bias, residual, inverse, out, row, row_mask, first, columns, M: tl.constexpr, N: tl.constexpr
):
    """Multiply the columns of a float32 tile (M, N) by `scale`, add bias and residual, where there are any, or gate it
    by another, and write it, for 8-bit outputs times `inverse`.

    row: (M, 1), 64 bits, rows of residual and out. row_mask: those that exist. first: the tile's first column. Large
    tiles are finished in two halves: loading and rearranging a full one takes more registers than are free.
    """
    if gate is None and M * N > 8192:
        left, right = halves(tile, M, N)
        _finish(left, None, scale, bias, residual, inverse, out, row, row_mask, first, columns, N // 2)
        _finish(right, None, scale, bias, residual, inverse, out, row, row_mask, first + N // 2, columns, N // 2)
    elif gate is not None and 2 * M * N > 16384:
        left, right = halves(tile, M, N)
        gate_left, gate_right = halves(gate, M, N)
        _finish(left, gate_left, scale, bias, residual, inverse, out, row, row_mask, first, columns, N // 2)
        _finish(right, gate_right, scale, bias, residual, inverse, out, row, row_mask, first + N // 2, columns, N // 2)
    else:
        _finish(tile, gate, scale, bias, residual, inverse, out, row, row_mask, first, columns, N)


@jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@jit
def _finish(tile, gate, scale, bias, residual, inverse, out, row, row_mask, first, columns, N: tl.constexpr):
    column = first + tl.arange(0, N)[None, :]
    mask = row_mask & (column < columns)
    if scale is not None:
        tile *= tl.load(scale + column, column < columns, other=0.0)
        if gate is not None:
            gate *= tl.load(scale + columns + column, column < columns, other=0.0)
    if bias is not None:
        tile += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    if gate is not None:
        if bias is not None:
            gate += tl.load(bias + columns + column, column < columns, other=0.0).to(tl.float32)
        tile *= gelu(gate)
    if residual is not None:
        tile += tl.load(residual + row * columns + column, mask, other=0.0).to(tl.float32)
    if inverse is not None:
        tile = to_range(tile * inverse)
    tl.store(out + row * columns + column, tile.to(out.dtype.element_ty), mask)


@jit
def to_range(x):
    """x within the range of e4m3, whose largest number is 448: the conversion may give NaN beyond it."""
    x = tl.clamp(x, -448.0, 448.0)
    if INTERPRETED:  # that conversion rounds ties away and loses carries: it gets numbers that need no rounding
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 2**-6, (x + 24576.0) - 24576.0, rounded)  # below, multiples of 2 ** -9
    return x


@jit
def linear_kernel(
    x,
    weight,
    scale,
    bias,
    residual,
    inverse,
    out,
    m,
    n,
    k,
    x_row,
    weight_row,
    EVEN_K: tl.constexpr,
    GEGLU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MORE_N: tl.constexpr = 0,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N + MORE_N))
    first = column_tile * (BLOCK_N + MORE_N)
    inner = tl.arange(0, BLOCK_K)

    # Rows beyond the end load the last, columns those at the beginning, and are not written: loads without a mask.
    # Distances in a tile and in a weight fit 32 bits, half the registers of addresses.
    top = row_tile * BLOCK_M
    x += top.to(tl.int64) * x_row
    rows = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - top)[:, None] * x_row + inner[None, :]  # (BLOCK_M, BLOCK_K)
    columns = inner[:, None] + column_of(first, n, BLOCK_N) * weight_row  # (BLOCK_K, BLOCK_N)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GEGLU:
        second_weight, second_columns = weight + n * weight_row, columns
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    elif MORE_N:
        second_weight = weight
        second_columns = inner[:, None] + column_of(first + BLOCK_N, n, MORE_N) * weight_row  # (BLOCK_K, MORE_N)
        second = tl.zeros((BLOCK_M, MORE_N), tl.float32)

    split = tl.program_id(1)
    steps = tl.cdiv(k, BLOCK_K)
    for step in range(split * steps // SPLIT, (split + 1) * steps // SPLIT):
        at = step * BLOCK_K
        if EVEN_K:
            a = tl.load(x + at + rows)
            b = tl.load(weight + at + columns)
        else:
            a = tl.load(x + at + rows, (inner < k - at)[None, :], other=0.0)
            b = tl.load(weight + at + columns, (inner < k - at)[:, None], other=0.0)
        tile = tl.dot(a, b, tile)
        if GEGLU or MORE_N:
            if EVEN_K:
                b = tl.load(second_weight + at + second_columns)
            else:
                b = tl.load(second_weight + at + second_columns, (inner < k - at)[:, None], other=0.0)
            second = tl.dot(a, b, second)

    row = top + tl.arange(0, BLOCK_M)
    out_row = row.to(tl.int64) + split.to(tl.int64) * m  # with splits, out is the workspace (SPLIT, m, n)
    out_row, row_mask = out_row[:, None], (row < m)[:, None]
    if GEGLU:
        finish(tile, second, scale, bias, None, inverse, out, out_row, row_mask, first, n, BLOCK_M, BLOCK_N)
    else:
        if MORE_N:  # first, for its registers
            more = first + BLOCK_N
            finish(second, None, scale, bias, residual, inverse, out, out_row, row_mask, more, n, BLOCK_M, MORE_N)
        finish(tile, None, scale, bias, residual, inverse, out, out_row, row_mask, first, n, BLOCK_M, BLOCK_N)


@jit
def sum_kernel(
    partials, scale, bias, residual, inverse, out, rows, columns,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (rows, columns) = scale * sum of partials (PARTS, rows, columns) + bias + residual, for 8-bit outputs times
    `inverse`. partials may be out itself."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for index in tl.static_range(PARTS):
        tile += tl.load(partials + (index * rows + row) * columns + column, mask, other=0.0).to(tl.float32)
    finish(tile, None, scale, bias, residual, inverse, out, row, row < rows, first, columns, ROWS, COLUMNS)


def sum_splits(
    partials: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    inverse: float | None,
    out: Tensor,
) -> None:
    """The kernel's sum of the partial sums (SPLIT, rows, columns), for the kernels that split K."""
    split, rows, columns = partials.shape
    grid = (cdiv(rows, 16), cdiv(columns, 64))  # 64 columns: rows of 256 bytes; 16 rows: enough programs for M = 128
    tile = {"PARTS": split, "ROWS": 16, "COLUMNS": 64, "num_warps": 4}
    launch(sum_kernel, grid, partials, scale, bias, residual, inverse, out, rows, columns, **tile)


def multiply(
    config: Config,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gated: bool = False,
    inverse: float | None = None,
) -> Tensor:
    """Launch the kernel, and the sum of its splits. x (..., I), weight (O, I), or (2O, I) where gated, out (..., O).

    scale: of each row of the weight, for operands of 8 bits. inverse: what an output of 8 bits is multiplied by.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K), a view unless the rows are not evenly spaced
    (m, k), n, split = rows.shape, out.shape[-1], config.get("SPLIT", 1)
    target, epilogue = out, (scale, bias, residual, inverse)
    if split > 1:
        target, epilogue = x.new_empty((split, m, n), dtype=torch.float32), (None, None, None, None)
    grid = (cdiv(m, config["BLOCK_M"]) * cdiv(n, columns_of(config)), split)
    sizes = (m, n, k, rows.stride(0), weight.stride(0))
    shape = {"EVEN_K": k % config["BLOCK_K"] == 0, "GEGLU": gated, "SPLIT": split}
    launch(linear_kernel, grid, rows, weight, *epilogue, target, *sizes, **{**config, **shape})
    if split > 1:
        sum_splits(target, scale, bias, residual, inverse, out)
    return out


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return multiply(LINEAR.config(x, weight, bias, residual, overwrite), x, weight, None, bias, residual, out)


def linear_geglu_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    return multiply(LINEAR_GEGLU.config(x, weight, bias), x, weight, None, bias, None, out, gated=True)


# ---------------------------------------------------------------------------------------------------------- ops

LINEAR = Op(
    "linear",
    reference=linear_torch,
    triton=linear_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    prefer="torch",  # until a measured table says where the kernel is faster than cuBLAS
)

LINEAR_GEGLU = Op(
    "linear_geglu",
    reference=linear_geglu_torch,
    triton=linear_geglu_triton,
    supports=linear_geglu_supports,
    shape_class=linear_geglu_shape_class,
    cost=linear_geglu_cost,
    default=linear_geglu_default,
    space=GEGLU_SPACE,
    is_candidate=linear_geglu_is_candidate,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Multiply x (..., I) by weight (O, I), then add bias (O,) and residual (..., O), in x's dtype.

    overwrite: whether the result may take the residual's place, which saves cuBLAS a pass if there is no bias.
    """
    return LINEAR(x, weight, bias, residual, overwrite)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """geglu(linear(x, weight, bias)): x (..., I), weight (2O, I), bias (2O,) -> (..., O), in x's dtype."""
    return LINEAR_GEGLU(x, weight, bias)
