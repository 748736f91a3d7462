"""Adapters of low rank beside a weight: each row of a batch its own, none of them merged.

    shrink       z = s x down^T                                          down (P, J, 16, I), z (J, B, N, K * 16)
    lora_linear  out = x weight^T + z up^T + bias + residual             weight (J * O, I), up (P, J * O, 16)
    lora_geglu   out = a * gelu(b)   (a | b) = x weight^T + z up^T + bias
                                                                         x (B, N, I) -> out (B, N, J * O)

A page has a rank of 16 of one adapter, for J layers that read the same x and whose weights are stacked (queries, keys
and values). Row b has the pages `pages[b]` (K,), with scales, and 0 is none: an index, not a mask, for zero times
another adapter's overflow would be NaN in somebody else's image. Both are read on the device, so that a captured graph
serves every mix of adapters.

The kernels. A program of `shrink` multiplies a tile of a row's tokens by one page of one layer; it writes 16 K numbers
for each token and layer. The expansion goes on from the main product: to the accumulators of a tile K more products of
depth 16 are added before gate, bias and residual (linear.py), so no output is passed over twice. A tile has tokens of
one row, so that its pages are the same, and columns of one layer, so that its z is.

On a CPU the rows of a run, which have the same pages, are multiplied together, and added to the product in place.
Convolutions are always so: they are beside their weights only while requests with different adapters share a batch.

Over 500 lines, for the functions of an op repeat its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.dispatch import Config, Cost, Op, Verdict, cdiv, dense, jit, launch, no
from fastldm.kernels.geglu import geglu
from fastldm.kernels.linear import column_of, finish, linear, supports_dtypes, tile_of

if TYPE_CHECKING:
    import triton.language as tl

RANK = 16
"""Of a page."""


ScaledPages = tuple[tuple[int, float], ...]
"""Pages, each with its scale."""


class Group(NamedTuple):
    """Consecutive rows with the same pages, as the host knows them."""

    start: int
    stop: int
    pages: ScaledPages


class Rows(NamedTuple):
    """The adapters of the rows of a batch."""

    pages: Tensor  # (B, K) int32, 0 for none
    scales: Tensor  # (B, K) float32
    groups: tuple[Group, ...] | None = None
    """The same on the host, for a CPU."""

    def of(self, x: Tensor) -> Rows:
        """Those of x, which may be the first rows of the batch only."""
        count = len(x)
        if self.groups is None:
            return self if count == len(self.pages) else Rows(self.pages[:count], self.scales[:count])
        if self.groups[-1].stop <= count:
            return self
        groups = tuple(Group(start, min(stop, count), pages) for start, stop, pages in self.groups if start < count)
        return self._replace(groups=groups)


class Places:
    """The adapters of the rows of an exported network, whose factors are inputs: a rank of R that all rows read."""

    def __init__(self, scales: Tensor | None) -> None:
        """scales: (B, R); at 0, a row has nothing of what is there, not even what overflows. None: all have all."""
        self._scales = scales
        self._shaped: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # once in a graph, for all layers

    def scaled(self, z: Tensor, layers: int = 1) -> Tensor:
        """z (B, N, J * R) or (B, R, H, W) by row, J: layers."""
        if self._scales is None:
            return z
        key = (z.ndim, layers)
        if key not in self._shaped:
            scales = self._scales.repeat(1, layers)
            scales = scales[:, None] if z.ndim == 3 else scales[:, :, None, None]
            self._shaped[key] = (scales, scales != 0)
        scales, present = self._shaped[key]
        return torch.where(present, z * scales, 0.0)


# ------------------------------------------------------------------------------------------------- references


def shrink_reference(x: Tensor, down: Tensor, pages: Tensor, scales: Tensor) -> Tensor:
    """In float32 at least, then in x's dtype."""
    own = _wide(down[pages.long()]) * scales[:, :, None, None, None]  # (B, K, J, 16, I)
    return torch.einsum("bni,bkjri->jbnkr", _wide(x), own).flatten(3).to(x.dtype)


def expand_reference(out: Tensor, z: Tensor, up: Tensor, pages: Tensor) -> Tensor:
    """out (B, N, J * O) + z up^T, in out's dtype."""
    own = _wide(up[pages.long()].unflatten(2, (z.shape[0], -1)))  # (B, K, J, O, 16)
    added = torch.einsum("jbnkr,bkjor->bnjo", _wide(z).unflatten(3, (-1, RANK)), own)
    return (_wide(out) + added.flatten(2)).to(out.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
) -> Tensor:
    """PyTorch's linear, and the same for the adapters' pages."""
    out = linear(x, weight, bias, residual=residual)
    return expand_reference(out, SHRINK(x, down, pages, scales), up, pages)


def lora_geglu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, pages: Tensor, scales: Tensor
) -> Tensor:
    return geglu(lora_linear_reference(x, weight, bias, None, down, up, pages, scales))


# ------------------------------------------------------------------------------------------------------- a CPU


def add_groups(out: Tensor, x: Tensor, down: Tensor, up: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Add to out (B, N, J * O), in place, what the adapters of each group of rows add for x (B, N, I)."""
    layers, channels = down.shape[1], x.shape[-1]
    width = out.shape[-1] // layers
    for start, stop, pages in groups:
        if not pages:
            continue
        a = _joined([down[page] for page, _ in pages], dim=1)  # (J, r, I)
        b = _joined([_times(up[page], scale) for page, scale in pages], dim=1)  # (J * O, r)
        rank = a.shape[1]
        z = x[start:stop].reshape(-1, channels) @ a.flatten(0, 1).t()  # (tokens, J * r)
        rows = out[start:stop].view(-1, layers * width)
        for j in range(layers):
            columns = slice(j * width, (j + 1) * width)
            rows[:, columns].addmm_(z[:, j * rank : (j + 1) * rank], b[columns].t())
    return out


def add_lora(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Rows | Places) -> Tensor:
    """Add to out (B, N, J * O), possibly in place, what the adapters of each row add for x (B, N, I)."""
    if isinstance(rows, Places):
        return add_places(out, x, down, up, rows)
    rows = rows.of(x)
    if rows.groups is not None:
        return add_groups(out, x, down, up, rows.groups)
    return expand_reference(out, SHRINK(x, down, rows.pages, rows.scales), up, rows.pages)


def add_places(out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Places) -> Tensor:
    """out (..., J * O) plus what places add for x (..., I), with scales (B, N, I): down (J, R, I), up (J * O, R)."""
    layers, rank = down.shape[:2]
    z = rows.scaled(F.linear(x, down.flatten(0, 1)), layers)  # (..., J * R)
    if layers == 1:
        return out + F.linear(z, up)
    parts = zip(z.split(rank, dim=-1), up.chunk(layers), strict=True)
    return out + torch.cat([F.linear(own, columns) for own, columns in parts], dim=-1)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


# ------------------------------------------------------------------------------------------------ convolutions


def add_conv(
    out: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Rows | Places, stride: int, padding: int
) -> Tensor:
    """Add to out (B, O, H', W'), possibly in place, what the adapters of a convolution of x (B, C, H, W) add. down (P,
    16, C, kh, kw), up (P, O, 16); of places (R, C, kh, kw) and (O, R)."""
    if isinstance(rows, Places):
        z = rows.scaled(F.conv2d(x, down, stride=stride, padding=padding))  # (B, R, H', W')
        return out + F.conv2d(z, up[:, :, None, None])
    rows = rows.of(x)
    tokens = out.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, O), a view of channels-last memory
    assert tokens.data_ptr() == out.data_ptr(), "the output is not channels-last"
    if rows.groups is not None:
        for start, stop, pages in rows.groups:
            if pages:
                a = _joined([down[page] for page, _ in pages], dim=0)  # (r, C, kh, kw)
                b = _joined([_times(up[page], scale) for page, scale in pages], dim=1)  # (O, r)
                z = F.conv2d(x[start:stop], a, stride=stride, padding=padding)  # (rows, r, H', W')
                tokens[start:stop].baddbmm_(z.flatten(2).mT, b.t().expand(stop - start, -1, -1))
        return out
    count, indices = len(x), rows.pages.long()
    own = down[indices].flatten(0, 2)  # (B * K * 16, C, kh, kw): a convolution of each row, as groups of one
    z = F.conv2d(x.reshape(1, -1, *x.shape[2:]), own, stride=stride, padding=padding, groups=count)
    wide = (up[indices] * rows.scales[:, :, None, None].to(up.dtype)).transpose(1, 2).flatten(2)  # (B, O, K * 16)
    tokens.baddbmm_(z.view(count, -1, tokens.shape[1]).mT, wide.mT)
    return out


# ------------------------------------------------------------------------------- where the kernels apply, and cost


def shrink_supports(x: Tensor, down: Tensor, pages: Tensor, scales: Tensor) -> Verdict:
    if not (verdict := supports_dtypes(x, down, None, None)):
        return verdict
    if x.shape[-1] % 8:
        return no(f"{x.shape[-1]} input channels are no multiple of 8: rows are not 16 bytes aligned")
    if not down.is_contiguous() or x.ndim != 3:
        return no("pages are not contiguous, or x is not (B, N, I)")
    return dense(x)


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
) -> Verdict:
    if not (verdict := supports_dtypes(x, weight, bias, residual)):
        return verdict
    if not (verdict := dense(weight)):
        return verdict
    if not up.is_contiguous() or (residual is not None and not residual.is_contiguous()):
        return no("pages or residual are not contiguous")
    return shrink_supports(x, down, pages, scales)


def lora_geglu_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, pages: Tensor, scales: Tensor
) -> Verdict:
    return supports(x, weight, bias, None, down, up, pages, scales)


def shrink_cost(x: Tensor, down: Tensor, pages: Tensor, scales: Tensor) -> Cost:
    rank = pages.shape[1] * RANK * down.shape[1]
    tokens = x.numel() // x.shape[-1]
    read = x.numel() + pages.numel() * down[0].numel()
    return Cost(flop=2 * x.numel() * rank, bytes=(read + tokens * rank) * x.element_size())


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
) -> Cost:
    tokens, rank = x.numel() // x.shape[-1], pages.shape[1] * RANK
    out = tokens * weight.shape[0]
    flop = 2 * tokens * weight.numel() + 2 * x.numel() * rank * down.shape[1] + 2 * out * rank
    factors = pages.numel() * (down[0].numel() + up[0].numel())
    elements = x.numel() + weight.numel() + factors + out * (1 if residual is None else 2)
    return Cost(flop=flop, bytes=elements * x.element_size())


def lora_geglu_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, pages: Tensor, scales: Tensor
) -> Cost:
    whole = cost(x, weight, bias, None, down, up, pages, scales)
    gated = x.numel() // x.shape[-1] * weight.shape[0] // 2
    return Cost(flop=whole.flop, bytes=whole.bytes - gated * x.element_size(), exp=gated)


# ------------------------------------------------------------------------------------------------ configurations


def _tile(m: int, n: int, warps: int, stages: int, registers: int) -> dict[str, Any]:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": 64,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
    }


SPACE = [_tile(128, 128, 8, 3, 255), _tile(128, 64, 8, 4, 128), _tile(64, 128, 4, 4, 255), _tile(64, 64, 4, 4, 168)]
GEGLU_SPACE = [_tile(128, 128, 8, 3, 255), _tile(128, 64, 8, 3, 255), _tile(64, 64, 4, 4, 255)]


def shape_class(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
) -> str:
    return f"b{len(x)} m{x.shape[1]} n{weight.shape[0]} k{x.shape[2]} r{RANK * pages.shape[1]} j{down.shape[1]}"


def default(shape: str, arch: int) -> Config:
    """Tiles as large as a row's tokens and a layer's columns fill, and small ones where those would be few."""
    rows, tokens, columns = (int(part[1:]) for part in shape.split()[:3])
    programs = rows * cdiv(tokens, 128) * cdiv(columns, 128)
    if arch not in (90, 100):  # less shared memory, and operands in registers
        return SPACE[3]
    return SPACE[0] if tokens >= 128 and programs >= 100 else SPACE[3]


def geglu_default(shape: str, arch: int) -> Config:
    config = default(shape, arch)
    return GEGLU_SPACE[0] if config is SPACE[0] else GEGLU_SPACE[2]


def shrink_shape_class(x: Tensor, down: Tensor, pages: Tensor, scales: Tensor) -> str:
    return f"b{len(x)} m{x.shape[1]} k{x.shape[2]} r{RANK * pages.shape[1]} j{down.shape[1]}"


def shrink_default(shape: str, arch: int) -> Config:
    """Small tiles: there are few of them, and each waits for its tokens."""
    return {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def shrink_kernel(
    x,
    down,
    pages,
    scales,
    z,
    tokens,
    k,
    x_row,
    x_batch,
    layers,
    PAGES: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of tokens of one row times one page of one layer. Nothing is written for no page."""
    batch, layer, slot = tl.program_id(1), tl.program_id(2) // PAGES, tl.program_id(2) % PAGES
    page = tl.load(pages + batch * PAGES + slot)
    if page > 0:
        token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        inner, rank = tl.arange(0, BLOCK_K), tl.arange(0, RANK)
        x += batch.to(tl.int64) * x_batch
        rows = tl.minimum(token, tokens - 1)[:, None] * x_row + inner[None, :]  # (BLOCK_M, BLOCK_K)
        down += (page.to(tl.int64) * layers + layer) * RANK * k
        columns = inner[:, None] + rank[None, :] * k  # (BLOCK_K, RANK)
        tile = tl.zeros((BLOCK_M, RANK), tl.float32)
        for at in range(0, k, BLOCK_K):
            if EVEN_K:
                a = tl.load(x + at + rows)
                b = tl.load(down + at + columns)
            else:
                a = tl.load(x + at + rows, (inner < k - at)[None, :], other=0.0)
                b = tl.load(down + at + columns, (inner < k - at)[:, None], other=0.0)
            tile = tl.dot(a, b, tile)
        tile *= tl.load(scales + batch * PAGES + slot)
        at = (layer * tl.num_programs(1) + batch).to(tl.int64) * tokens + token
        to = z + at[:, None] * (PAGES * RANK) + slot * RANK + rank[None, :]
        tl.store(to, tile.to(z.dtype.element_ty), (token < tokens)[:, None])


@jit
def lora_linear_kernel(
    x,
    weight,
    bias,
    residual,
    z,
    up,
    pages,
    out,
    tokens,
    n,
    k,
    x_row,
    x_batch,
    weight_row,
    layers,
    PAGES: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As linear_kernel, for tokens of one row and columns of one layer of n columns; then on over the row's pages."""
    batch = tl.program_id(1)
    across = tl.cdiv(n, BLOCK_N)
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), layers * across)
    layer, first = column_tile // across, column_tile % across * BLOCK_N
    top = row_tile * BLOCK_M
    inner = tl.arange(0, BLOCK_K)
    token = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - top)
    x += batch.to(tl.int64) * x_batch + top.to(tl.int64) * x_row
    rows = token[:, None] * x_row + inner[None, :]  # (BLOCK_M, BLOCK_K)
    column = column_of(first, n, BLOCK_N)  # (1, BLOCK_N)
    columns = inner[:, None] + column * weight_row  # (BLOCK_K, BLOCK_N)
    weight += (layer * n).to(tl.int64) * weight_row
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GEGLU:
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(x + at + rows)
            b = tl.load(weight + at + columns)
        else:
            a = tl.load(x + at + rows, (inner < k - at)[None, :], other=0.0)
            b = tl.load(weight + at + columns, (inner < k - at)[:, None], other=0.0)
        tile = tl.dot(a, b, tile)
        if GEGLU:
            if EVEN_K:
                b = tl.load(weight + n * weight_row + at + columns)
            else:
                b = tl.load(weight + n * weight_row + at + columns, (inner < k - at)[:, None], other=0.0)
            second = tl.dot(a, b, second)

    rank = tl.arange(0, RANK)
    z += ((layer * tl.num_programs(1) + batch).to(tl.int64) * tokens + top) * (PAGES * RANK)
    z_rows = token[:, None] * (PAGES * RANK) + rank[None, :]  # (BLOCK_M, RANK)
    for slot in range(PAGES):
        page = tl.load(pages + batch * PAGES + slot)
        if page > 0:
            a = tl.load(z + slot * RANK + z_rows)
            if GEGLU:
                from_page = up + page.to(tl.int64) * (2 * n * RANK)
                second = tl.dot(a, tl.load(from_page + n * RANK + rank[:, None] + column * RANK), second)
            else:
                from_page = up + (page.to(tl.int64) * layers + layer) * (n * RANK)
            tile = tl.dot(a, tl.load(from_page + rank[:, None] + column * RANK), tile)

    row = top + tl.arange(0, BLOCK_M)
    out_row, row_mask = (batch.to(tl.int64) * tokens + row)[:, None], (row < tokens)[:, None]
    if GEGLU:
        finish(tile, second, None, bias, None, None, out, out_row, row_mask, first, n, BLOCK_M, BLOCK_N)
    else:
        # The output's rows are those of all layers: the layer's own columns start at layer * n.
        start = layer * n
        total = layers * n
        if bias is not None:
            bias += start
        if residual is not None:
            residual += start
        _finish_columns(tile, bias, residual, out + start, out_row, row_mask, first, n, total, BLOCK_N)


@jit
def _finish_columns(tile, bias, residual, out, row, row_mask, first, columns, total, N: tl.constexpr):
    """Add bias and residual and write `columns` of the `total` of each row."""
    column = first + tl.arange(0, N)[None, :]
    mask = row_mask & (column < columns)
    if bias is not None:
        tile += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    if residual is not None:
        tile += tl.load(residual + row * total + column, mask, other=0.0).to(tl.float32)
    tl.store(out + row * total + column, tile.to(out.dtype.element_ty), mask)


def shrink_triton(x: Tensor, down: Tensor, pages: Tensor, scales: Tensor) -> Tensor:
    config = SHRINK.config(x, down, pages, scales)
    (batch, tokens, k), layers, count = x.shape, down.shape[1], pages.shape[1]
    z = x.new_empty((layers, batch, tokens, count * RANK))
    grid = (cdiv(tokens, config["BLOCK_M"]), batch, layers * count)
    sizes = (tokens, k, x.stride(1), x.stride(0), layers)
    shape = {"PAGES": count, "RANK": RANK, "EVEN_K": k % config["BLOCK_K"] == 0}
    launch(shrink_kernel, grid, x, down, pages, scales, z, *sizes, **{**config, **shape})
    return z


def _expand(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
    *,
    gated: bool,
) -> Tensor:
    z = SHRINK.triton(x, down, pages, scales)
    (batch, tokens, k), layers, count = x.shape, down.shape[1], pages.shape[1]
    width = weight.shape[0] // layers // (2 if gated else 1)  # of a layer's output
    out = x.new_empty((batch, tokens, layers * width))
    across = cdiv(width, config["BLOCK_N"])
    grid = (cdiv(tokens, config["BLOCK_M"]) * layers * across, batch)
    sizes = (tokens, width, k, x.stride(1), x.stride(0), weight.stride(0), layers)
    shape = {"PAGES": count, "RANK": RANK, "EVEN_K": k % config["BLOCK_K"] == 0, "GEGLU": gated}
    launch(lora_linear_kernel, grid, x, weight, bias, residual, z, up, pages, out, *sizes, **{**config, **shape})
    return out


def lora_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    pages: Tensor,
    scales: Tensor,
) -> Tensor:
    args = (x, weight, bias, residual, down, up, pages, scales)
    return _expand(LORA_LINEAR.config(*args), *args, gated=False)


def lora_geglu_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, pages: Tensor, scales: Tensor
) -> Tensor:
    config = LORA_GEGLU.config(x, weight, bias, down, up, pages, scales)
    return _expand(config, x, weight, bias, None, down, up, pages, scales, gated=True)


# ---------------------------------------------------------------------------------------------------------- ops


def _example_pages(pages: Tensor, count: int) -> dict[str, Tensor]:
    """Every row its own pages, all of them used."""
    numbers = torch.arange(pages.numel()) % max(count - 1, 1) + min(1, count - 1)
    return {"pages": numbers.view(pages.shape).to(torch.int32)}


SHRINK = Op(
    "lora_shrink",
    reference=shrink_reference,
    triton=shrink_triton,
    supports=shrink_supports,
    shape_class=shrink_shape_class,
    cost=shrink_cost,
    default=shrink_default,
    example_values=lambda x, down, pages, scales: _example_pages(pages, len(down)),
)

LORA_LINEAR = Op(
    "lora_linear",
    reference=lora_linear_reference,
    triton=lora_linear_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    example_values=lambda x, weight, bias, residual, down, up, pages, scales: _example_pages(pages, len(down)),
)

LORA_GEGLU = Op(
    "lora_geglu",
    reference=lora_geglu_reference,
    triton=lora_geglu_triton,
    supports=lora_geglu_supports,
    shape_class=lambda x, weight, bias, down, up, pages, scales: shape_class(
        x, weight, bias, None, down, up, pages, scales
    ),
    cost=lora_geglu_cost,
    default=geglu_default,
    space=GEGLU_SPACE,
    example_values=lambda x, weight, bias, down, up, pages, scales: _example_pages(pages, len(down)),
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    rows: Rows | Places,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """linear(x, weight, bias, residual), plus what the adapters of each row add: x (B, N, I), weight (J * O, I), down
    (P, J, 16, I), up (P, J * O, 16) -> (B, N, J * O), in x's dtype."""
    if isinstance(rows, Places) or rows.groups is not None:
        return add_lora(linear(x, weight, bias, residual=residual), x, down, up, rows)
    rows = rows.of(x)
    return LORA_LINEAR(x, weight, bias, residual, down, up, rows.pages, rows.scales)


def lora_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, rows: Rows | Places) -> Tensor:
    """geglu(lora_linear(x, weight, bias, down, up, rows)): weight (2O, I), down (P, 1, 16, I), up (P, 2O, 16)."""
    if isinstance(rows, Places) or rows.groups is not None:
        return geglu(lora_linear(x, weight, bias, down, up, rows))
    rows = rows.of(x)
    return LORA_GEGLU(x, weight, bias, down, up, rows.pages, rows.scales)
