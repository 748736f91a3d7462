"""Attention over heads that are side by side in the channels, as projections write them.

    out[b, n, h] = sum_m softmax_m(scale * q[b, n, h] . k[s, m, h]) v[s, m, h]        m < kv_len[s], s = slots[b]

    q (B, N, H*D), k and v (S, M, H*D), kv_len (S,), slots (B,) -> (B, N, H*D)        scale = D ** -0.5

Flash attention (Dao 2023, arXiv:2307.08691), forward: a program holds BLOCK_M queries of one head and walks over the
keys BLOCK_N at a time. The scores (N, M) never leave the chip. It keeps, for each query, the largest score so far and
the sum of exponentials relative to it; when a block raises the peak, the sums so far are rescaled:

    s     = scale * log2(e) * q k^T                 in base 2, the exponential of the hardware
    peak' = max(peak, max_m s)      a = 2 ** (peak - peak')      p = 2 ** (s - peak')
    total = a total + sum_m p       acc = a acc + p v            at the end: out = acc / total

**Layout.** Rows may have any stride of a multiple of 16 bytes, so q, k and v can be thirds or halves of one packed
projection, and nothing is transposed or copied. Each program reads `slots` and `kv_len` from device memory: prompts of
different length share a batch, and rows share a prompt, with no copy of its keys and no synchronisation with the host.
Keys beyond kv_len are not even loaded, so they may be NaN. A slot without keys gives 0.

**Head dims without padding.** Tile widths are powers of two, and SD1.5's heads have 40, 80 and 160 channels. A head has
one tile or two, the second narrower: 80 = 64 + 16 and 160 = 128 + 32, where one tile would be 128 and 256 wide. Tensor
cores sum over 16 channels at a time, so scores of D = 40 take 32 + 16, of which the last 8 are zero; their output has
8 columns at least (32 + 8) where warps multiply, 16 where warpgroups do. Those of Hopper and Blackwell take D = 40 in
one tile of 64: it multiplies a third more, in the shadow of the exponentials, and where two products follow each other
the compiler has the second wait until the first is done, one more wait for all of a warpgroup's work in each block.

**Floors**, for the largest call of SD1.5 at 512x512 (guided, so B*H = 16; N = M = 4096; D = 40) on an H100:

    matrix products   4 B H N M D = 42.9 GFLOP        at 800 TFLOP/s                       54 us
    exponentials      B H N M = 268 M                 132 SMs x 16 a cycle x 1.755 GHz     72 us
    memory            q, k, v and out once = 21 MB    at 3 TB/s                             7 us

The special-function units are the floor. (From D = 56 on the matrix products are; on GeForce cards at any D.) In the
compiled loop for sm_90, a warp's 32 rows of 128 x 64 scores, 64 a thread, take 544 cycles of special-function unit, 512
of tensor core (384 in two tiles), and 504 instructions at one a cycle. All three must overlap. So registers are
budgeted for two programs or more on a multiprocessor, one of which multiplies while the other exponentiates, and the
count of instructions decides the rest:

    sums of exponentials by column, 8 a query, added     no exchange between threads in the loop: 23 fewer; done
      up at the end (FlashAttention-2)
    some of the exponentials by a polynomial on the      7 more for each of 64: no gain; FMA_EIGHTHS, 0 by default
      FMA units (FlashAttention-4)
    rescaling only when a peak grew by 2 ** 8 (the same) 52 fewer, but 38 and two barriers for all warps to agree; no
    the next block's scores before this block's softmax  15% more, for Triton copies the tile, which spills; no
      (FlashAttention-3)
    tensor descriptors (TMA) instead of cp.async, built  43 registers fewer at D = 40, 47 at 64, and fewer
      by the host at each launch                         instructions; TMA, a configuration to be measured
    warp_specialize                                      compiles for sm_100 with Triton 3.9, fails with 3.6; no

**Short keys** (77 or 154 tokens of text): all in one block or two, 77 = 64 + 16. Nothing is rescaled, and K and V stay
on the chip while the program walks over its queries. The floor there is memory: q and out, once.

**One head of 512** (the VAE): a float32 accumulator of 128 x 512 is all the registers of a multiprocessor, so two
programs share a head's queries, each with half of v's channels. The scores are computed twice, 1.5 times the
operations. That takes 224 KiB of shared memory and 224 registers, which only sm_90 has; elsewhere PyTorch's runs.

Over 500 lines, for an op is a file, however long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import float32
from fastldm.kernels.dispatch import (
    Config,
    Cost,
    Op,
    Verdict,
    capability,
    cdiv,
    dense,
    jit,
    launch,
    next_power_of_2,
    no,
)

if TYPE_CHECKING:
    import triton.language as tl

LOG2_E = 1.4426950408889634


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """PyTorch's scaled dot product, whose softmax is float32 for 16-bit dtypes."""
    mask = None
    if kv_len is not None:
        valid = torch.arange(k.shape[1], device=k.device) < kv_len[:, None]  # (S, M)
        k, v = (t.masked_fill(~valid[..., None], 0) for t in (k, v))  # values there may be NaN
        mask = (valid if slots is None else valid[slots])[:, None, None]  # (B, 1, 1, M)
        if causal:
            mask = mask & mask.new_ones(q.shape[1], k.shape[1]).tril()
    if slots is not None:
        k, v = k[slots], v[slots]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N or M, D)
    with float32.products(q):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal and mask is None)
    return out.transpose(1, 2).flatten(2)  # (B, N, H*D)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> Verdict:
    dim = q.shape[-1] // heads
    if q.dtype not in (torch.float16, torch.bfloat16) and (q.dtype != torch.float32 or q.is_cuda or q.is_meta):
        return no(f"dtype {q.dtype}: tensor cores take float16 and bfloat16")
    if causal:
        return no("causal: only text encoders are, once a prompt")
    if scale is not None and scale <= 0:
        return no(f"scale {scale} is not positive")
    if dim % 8 or (dim > 256 and dim != 512):
        return no(f"head dim {dim}: neither a multiple of 8 up to 256 nor 512")
    if dim == 512 and capability(q) != 90:
        return no(f"head dim 512 needs the shared memory and the registers of sm_90, sm_{capability(q)} spills")
    if slots is None and q.shape[0] != k.shape[0]:
        return no(f"{q.shape[0]} rows, {k.shape[0]} slots and no map between them")
    for name, integers in (("kv_len", kv_len), ("slots", slots)):
        if integers is not None and (integers.dtype != torch.int32 or integers.stride() != (1,)):
            return no(f"{name} is {integers.dtype} with strides {integers.stride()}, not dense int32")
    if 0 in q.shape or 0 in k.shape:
        return no("an empty tensor")
    return dense(q) and dense(k) and dense(v)


def cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> Cost:
    scores = q.shape[0] * heads * q.shape[1] * k.shape[1] // (2 if causal else 1)
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    return Cost(flop=4 * scores * (q.shape[-1] // heads), bytes=moved, exp=scores)


def example_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> dict[str, Tensor]:
    """All keys in every slot, as in a prompt that is padded to the window; row i reads slot i % S. Valid values are 0
    to M keys, and slots below S.
    """
    count = k.shape[0]
    return {"kv_len": torch.full((count,), k.shape[1]), "slots": torch.arange(q.shape[0]) % count}


# ---------------------------------------------------------------------------------------------- configurations
# A configuration with BLOCK_N walks over the keys. One without holds them all, and PROGRAMS programs share the queries
# of a head. SPLIT: a head has two tiles where those are narrower than one.

LONG = [
    {"BLOCK_M": m, "BLOCK_N": n, "SPLIT": split, "FMA_EIGHTHS": 0, "num_warps": warps, "num_stages": stages}
    for m in (64, 128)
    for n in (16, 32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
    for split in (True, False)
]
LONG += [LONG[-1] | {"BLOCK_N": 64, "SPLIT": True, "FMA_EIGHTHS": eighths, "num_warps": 4} for eighths in (1, 2)]
# The bulk copy engine of Hopper and later, from descriptors: fewer registers, and one thread issues all loads.
LONG += [
    {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "SPLIT": split,
        "FMA_EIGHTHS": 0,
        "TMA": True,
        "num_warps": warps,
        "num_stages": stages,
    }
    for m, warps in ((64, 4), (128, 4), (128, 8))
    for n, stages in ((64, 2), (64, 3), (128, 2))
    for split in (True, False)
]
SHORT = [
    {"BLOCK_M": m, "PROGRAMS": programs, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    for m in (64, 128)
    for programs in (16, 32, 64)
    for warps in (4, 8)
    for stages in (1, 2)
    for split in (True, False)
]
SPACE = [*LONG, *SHORT]


def tiles(size: int, minimum: int) -> tuple[int, int]:
    """Widths of one tile or two (0: one is enough), powers of two and none under `least`, that hold `size`.

    Two where they are narrower than one, or one would be wider than 128. 40 -> (32, 8), 64 -> (64, 0), 56 -> (64, 0).
    """
    single = max(next_power_of_2(size), minimum)
    high = single // 2
    low = max(next_power_of_2(size - high), minimum)
    return (high, low) if high + low < single or single > 128 else (single, 0)


def is_short(dim: int, keys: int) -> bool:
    """Whether all keys are held at once: up to 160, if K and V fit into registers."""
    keys = sum(tiles(keys, 16))
    return keys <= 160 and keys * sum(tiles(dim, 16)) <= 12800


def is_candidate(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> bool:
    """For long or short keys as needed, accumulator and scores in at most 160 registers of a thread, no option without
    effect.
    """
    dim, queries, keys = q.shape[-1] // heads, q.shape[1], k.shape[1]
    rows, split, short = config["BLOCK_M"], config["SPLIT"], "BLOCK_N" not in config
    width = sum(tiles(dim, 16)) if split else next_power_of_2(dim)
    columns = sum(tiles(keys, 16)) if short else config["BLOCK_N"]
    idle = [
        short != is_short(dim, keys),
        rows * (min(width, 256) + columns) > 160 * 32 * config["num_warps"],
        rows > 64 and queries <= 64,
        not split and (dim > 128 or width == sum(tiles(dim, 16))),
        config.get("PROGRAMS", 32) != 32 and queries <= rows * config["PROGRAMS"],
        config.get("FMA_EIGHTHS", 0) > 0 and dim > 64,  # the exponentials do not take longest
        config.get("TMA", False) and capability(q) < 90,
        columns < 32 and dim <= 64,
    ]
    return not any(idle)


def shape_class(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> str:
    """Head dim, queries to the next power of two, and keys: as the tiles that hold them where one pass does."""
    dim, keys = q.shape[-1] // heads, k.shape[1]
    keys = sum(tiles(keys, 16)) if is_short(dim, keys) else next_power_of_2(keys)
    return f"d{dim}-n{next_power_of_2(q.shape[1])}-m{keys}"


# Where a head's tiles are no wider than the first number: queries and keys of a block, warps, stages. Chosen by the
# compiled code. Nothing spills. Up to 80 channels there are registers for two programs or more on each
# multiprocessor, so that one multiplies while the other exponentiates. Each warp of sm_80 reads all of K and V from
# shared memory, so it takes 32 queries where registers allow; GeForce multiplies so slowly that 16 are enough.
_GEFORCE = ((96, 64, 64, 4, 2), (128, 128, 16, 8, 2), (192, 64, 16, 4, 2), (256, 128, 16, 8, 1))
_BLOCKS = {
    80: (
        *((32, 64, 64, 4, 2), (64, 128, 64, 4, 3), (80, 128, 32, 4, 3), (96, 64, 64, 4, 2)),
        *((128, 128, 64, 8, 3), (192, 128, 32, 8, 3), (256, 128, 32, 8, 2)),
    ),
    86: _GEFORCE,
    89: _GEFORCE,
    90: ((80, 128, 64, 4, 3), (192, 128, 64, 8, 3), (256, 128, 64, 8, 2), (512, 128, 32, 8, 2)),
    100: ((256, 128, 64, 8, 2),),
    120: _GEFORCE,
}
# For up to 1024 queries, of which 128 at a time would leave multiprocessors idle at a guided batch.
_FEW_QUERIES = {
    80: ((96, 64, 64, 4, 2),),
    90: ((192, 64, 64, 4, 3), (256, 64, 32, 4, 2)),
    100: ((256, 64, 64, 4, 2),),
}


def family(arch: int) -> int:
    """The compute capability of the table that applies to this one: 86 to sm_87, 100 to sm_103, 120 to sm_121."""
    return max(sm for sm in _BLOCKS if sm <= arch)


def default(shape: str, arch: int) -> Config:
    dim, queries, keys = (int(part[1:]) for part in shape.split("-"))
    arch = family(arch)
    width = sum(tiles(dim, 16))
    split = arch not in (90, 100) or dim > 64  # where warpgroups multiply, one product of 64 is as fast as of 32 and 16
    if is_short(dim, keys):
        m, warps = (64, 4) if width <= 80 or arch in (90, 100) else (128, 8)
        return {"BLOCK_M": m, "PROGRAMS": 32, "SPLIT": split, "num_warps": warps, "num_stages": 1}
    blocks = _BLOCKS[arch]
    if queries <= 1024:
        blocks = _FEW_QUERIES.get(arch, ()) + blocks
    m, n, warps, stages = next(rest for widest, *rest in blocks if width <= widest)
    return {"BLOCK_M": m, "BLOCK_N": n, "SPLIT": split, "FMA_EIGHTHS": 0, "num_warps": warps, "num_stages": stages}


# ------------------------------------------------------------------------------------------------------- tiles
# A tile is (rows, channels). Those of one head are a tuple of one or two.


@jit
def _tile(
    pointer,
    rows,
    stride,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """WIDTH channels from START, 0 from channel DIM on and, with MASK, from row `rows` on."""
    row = tl.arange(0, BLOCK)[:, None]
    channel = START + tl.arange(0, WIDTH)[None, :]
    valid = tl.full((1, 1), True, tl.int1)
    if MASK:
        valid &= row < rows
    if START + WIDTH > DIM:
        valid &= channel < DIM
    return tl.load(pointer + row * stride + channel, valid, other=0.0)


@jit
def _load(pointer, rows, stride, like, DIM: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """BLOCK rows of one head, in tiles of the widths of those of `like`."""
    WIDTH: tl.constexpr = like[0].shape[1]
    high = _tile(pointer, rows, stride, 0, WIDTH, DIM, MASK, BLOCK)
    return (high, _tile(pointer, rows, stride, WIDTH, like[1].shape[1], DIM, MASK, BLOCK)) if len(like) > 1 else (high,)


@jit
def _bulk(high, low, slot, row, head, BLOCK: tl.constexpr):
    """BLOCK rows of one head by the bulk copy engine, from descriptors (see `_descriptors`) of one tile or two."""
    first = tl.reshape(high.load([slot, row, head, 0]), (BLOCK, high.block_shape[3]))
    return (first,) if low is None else (first, tl.reshape(low.load([slot, row, head, 0]), (BLOCK, low.block_shape[3])))


@jit
def _store(pointer, rows, stride, acc, DIM: tl.constexpr):
    row = tl.arange(0, acc[0].shape[0])[:, None]
    pointer += row * stride
    channel = tl.arange(0, acc[0].shape[1])[None, :]
    tl.store(pointer + channel, acc[0].to(pointer.dtype.element_ty), (row < rows) & (channel < DIM))
    if len(acc) > 1:
        channel = acc[0].shape[1] + tl.arange(0, acc[1].shape[1])[None, :]
        tl.store(pointer + channel, acc[1].to(pointer.dtype.element_ty), (row < rows) & (channel < DIM))


@jit
def _zeros(ROWS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    high = tl.zeros((ROWS, HIGH), tl.float32)
    return (high, tl.zeros((ROWS, LOW), tl.float32)) if LOW else (high,)


@jit
def _times(acc, factor):
    """Row i of acc times factor[i]."""
    high = acc[0] * factor[:, None]
    return (high, acc[1] * factor[:, None]) if len(acc) > 1 else (high,)


@jit
def _scores(q, k):
    """q k^T."""
    s = tl.dot(q[0], tl.trans(k[0]))
    if len(q) > 1:
        s = tl.dot(q[1], tl.trans(k[1]), s)
    return s


@jit
def _weigh(p, v, acc):
    """acc + p v."""
    p = p.to(v[0].dtype)
    high = tl.dot(p, v[0], acc[0])
    return (high, tl.dot(p, v[1], acc[1])) if len(v) > 1 else (high,)


@jit
def _exp2_by_fma(x):
    """2 ** x for x <= 0 without the special-function unit: round(x) goes into the exponent's bits, and for the rest of
    x there is the cubic of least relative error, 7.5e-5. (Rounding p to float16 loses up to 4.9e-4.)
    """
    x = tl.maximum(x, -126.0)  # the least power of two that float32 holds in full
    rounded = x + 12582912.0  # 1.5 * 2 ** 23: the low bits are now x to the nearest integer
    x -= rounded - 12582912.0
    y = ((0.0551716703 * x + 0.242611125) * x + 0.693260985) * x + 0.999928073
    return (y.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@jit
def _exp2(x, FMA_EIGHTHS: tl.constexpr):
    """2 ** x, in FMA_EIGHTHS of each 8 blocks of 8 columns by _exp2_by_fma.

    A thread has the same columns of every such block, so the choice is made when the kernel is compiled, and an element
    is computed one way only.
    """
    y = tl.exp2(x)
    if FMA_EIGHTHS:
        column = tl.arange(0, x.shape[1])[None, :]
        y = tl.where(column // 8 % 8 < FMA_EIGHTHS, _exp2_by_fma(x), y)
    return y


# ----------------------------------------------------------------------------------------------------- kernels


@jit
def _locate(
    q, k, v, out, kv_len, slots, queries, keys, q_batch, k_slot, v_slot, DIM: tl.constexpr, V_DIM: tl.constexpr
):
    """The start of this program's rows in q, k, v and out, their count of keys, the stride of out's rows, and the slot,
    the head and the slice of values that it computes.
    """
    value_slice = tl.program_id(1)  # a head, or a slice of its values
    head = value_slice // (DIM // V_DIM)
    batch = tl.program_id(2).to(tl.int64)  # 64 bits: rows * N * H * D may exceed 2^31
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
    if kv_len is not None:
        keys = tl.minimum(tl.load(kv_len + slot), keys)
    stride = tl.num_programs(1) * V_DIM
    q += batch * q_batch + head * DIM
    k += slot * k_slot + head * DIM
    v += slot * v_slot + value_slice * V_DIM
    out += batch * queries * stride + value_slice * V_DIM
    return q, k, v, out, keys, stride, slot.to(tl.int32), head, value_slice


@jit
def _block(
    q,
    k,
    v,
    peak,
    total,
    acc,
    keys,
    k_row,
    v_row,
    scale,
    k_high,
    k_low,
    v_high,
    v_low,
    slot,
    row,
    head,
    value_slice,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FMA_EIGHTHS: tl.constexpr,
    MASK: tl.constexpr,
):
    """One block of keys, with MASK only `keys` of them; with descriptors, the rows of a slot from `row` on."""
    if k_high is None:
        k_tiles = _load(k, keys, k_row, q, DIM, BLOCK_N, MASK)
    else:
        k_tiles = _bulk(k_high, k_low, slot, row, head, BLOCK_N)
    s = _scores(q, k_tiles)
    if MASK:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    rescale = tl.exp2(peak - new_peak)
    p = _exp2(s * scale - new_peak[:, None], FMA_EIGHTHS)
    total = total * rescale[:, None] + tl.sum(tl.reshape(p, (p.shape[0], BLOCK_N // 8, 8)), 1)
    if v_high is None:
        v_tiles = _load(v, keys, v_row, acc, V_DIM, BLOCK_N, MASK)
    else:
        v_tiles = _bulk(v_high, v_low, slot, row, value_slice, BLOCK_N)
    acc = _weigh(p, v_tiles, _times(acc, rescale))
    return new_peak, total, acc


@jit
def _long_kernel(
    q,
    k,
    v,
    out,
    kv_len,
    slots,
    scale,
    queries,
    keys,
    q_batch,
    q_row,
    k_slot,
    k_row,
    v_slot,
    v_row,
    k_high,
    k_low,
    v_high,
    v_low,
    DIM: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    V_DIM: tl.constexpr,
    V_HIGH: tl.constexpr,
    V_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FMA_EIGHTHS: tl.constexpr,
):
    UNIT: tl.constexpr = (
        128 // q.dtype.element_ty.primitive_bitwidth
    )  # strides count 16 bytes, which tells the compiler
    q_row, k_row, v_row = q_row * UNIT, k_row * UNIT, v_row * UNIT
    q, k, v, out, keys, stride, slot, head, value_slice = _locate(
        q, k, v, out, kv_len, slots, queries, keys, q_batch * UNIT, k_slot * UNIT, v_slot * UNIT, DIM, V_DIM
    )
    first = tl.program_id(0) * BLOCK_M
    q += first.to(tl.int64) * q_row
    out += first.to(tl.int64) * stride
    q = _load(q, queries - first, q_row, _zeros(BLOCK_M, HIGH, LOW), DIM, BLOCK_M, True)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 8), tl.float32)  # the sums of columns 0, 8, ..., of 1, 9, ..., and so on
    acc = _zeros(BLOCK_M, V_HIGH, V_LOW)
    full_length = keys // BLOCK_N * BLOCK_N
    for row in tl.range(0, full_length, BLOCK_N):
        peak, total, acc = _block(
            *(q, k, v, peak, total, acc, BLOCK_N, k_row, v_row, scale),
            *(k_high, k_low, v_high, v_low, slot, row, head, value_slice),
            *(DIM, V_DIM, BLOCK_N, FMA_EIGHTHS, False),
        )
        if k_high is None:
            k += BLOCK_N * k_row
            v += BLOCK_N * v_row
    if full_length < keys:  # by pointers: nothing behind the last key is loaded
        if k_high is not None:
            k += full_length.to(tl.int64) * k_row
            v += full_length.to(tl.int64) * v_row
        peak, total, acc = _block(
            *(q, k, v, peak, total, acc, keys - full_length, k_row, v_row, scale),
            *(None, None, None, None, slot, full_length, head, value_slice),
            *(DIM, V_DIM, BLOCK_N, FMA_EIGHTHS, True),
        )
    acc = _times(acc, 1 / tl.maximum(tl.sum(total, 1), 1e-30))  # 0 where there is no key
    _store(out, queries - first, stride, acc, V_DIM)


@jit
def _short_kernel(
    q,
    k,
    v,
    out,
    kv_len,
    slots,
    scale,
    queries,
    keys,
    q_batch,
    q_row,
    k_slot,
    k_row,
    v_slot,
    v_row,
    DIM: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    V_DIM: tl.constexpr,
    V_HIGH: tl.constexpr,
    V_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    MORE: tl.constexpr,
):
    """All keys at once, in a block of KEYS and, unless 0, one of MORE."""
    UNIT: tl.constexpr = 128 // q.dtype.element_ty.primitive_bitwidth
    q_row, k_row, v_row = q_row * UNIT, k_row * UNIT, v_row * UNIT
    q, k, v, out, keys, stride, _, _, _ = _locate(
        q, k, v, out, kv_len, slots, queries, keys, q_batch * UNIT, k_slot * UNIT, v_slot * UNIT, DIM, V_DIM
    )
    like, v_like = _zeros(BLOCK_M, HIGH, LOW), _zeros(BLOCK_M, V_HIGH, V_LOW)
    k_0 = _load(k, keys, k_row, like, DIM, KEYS, True)
    v_0 = _load(v, keys, v_row, v_like, V_DIM, KEYS, True)
    if MORE:
        k_1 = _load(k + KEYS * k_row, keys - KEYS, k_row, like, DIM, MORE, True)
        v_1 = _load(v + KEYS * v_row, keys - KEYS, v_row, v_like, V_DIM, MORE, True)
    q_step, out_step = q_row.to(tl.int64) * BLOCK_M, stride.to(tl.int64) * BLOCK_M
    for block in tl.range(tl.program_id(0), tl.cdiv(queries, BLOCK_M), tl.num_programs(0)):
        remaining = queries - block * BLOCK_M
        q_block = _load(q + block * q_step, remaining, q_row, like, DIM, BLOCK_M, True)
        s_0 = tl.where(tl.arange(0, KEYS)[None, :] < keys, _scores(q_block, k_0), float("-inf"))
        peak = tl.max(s_0, 1)
        if MORE:
            s_1 = tl.where(tl.arange(0, MORE)[None, :] < keys - KEYS, _scores(q_block, k_1), float("-inf"))
            peak = tl.maximum(peak, tl.max(s_1, 1))
        peak = tl.maximum(peak * scale, -1e30)  # finite where there is no key
        p = tl.exp2(s_0 * scale - peak[:, None])
        total = tl.sum(p, 1)
        acc = _weigh(p, v_0, v_like)
        if MORE:
            p = tl.exp2(s_1 * scale - peak[:, None])
            total += tl.sum(p, 1)
            acc = _weigh(p, v_1, acc)
        acc = _times(acc, 1 / tl.maximum(total, 1e-30))
        _store(out + block * out_step, remaining, stride, acc, V_DIM)


# ---------------------------------------------------------------------------------------------------------- op


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    config = ATTENTION.config(q, k, v, heads)
    rows, queries, channels = q.shape
    keys, dim = k.shape[1], channels // heads
    arch = family(capability(q))
    value_slices = 1 if dim <= (256 if arch == 90 else 192) else 2  # of a head's values, a program each
    if config.pop("SPLIT"):
        high, low = tiles(dim, 16)
        # A warp multiplies by 8 columns or more; a warpgroup too, but not in every Triton from 3.6 on; tcgen05 by 16.
        v_high, v_low = tiles(dim // value_slices, 16 if arch in (90, 100) else 8)
    else:
        high = v_high = max(16, next_power_of_2(dim))
        low = v_low = 0
    blocks = cdiv(queries, config["BLOCK_M"])
    kernel = _long_kernel
    if "BLOCK_N" not in config:
        kernel = _short_kernel
        config["KEYS"], config["MORE"] = tiles(keys, 16)
        blocks = min(blocks, config.pop("PROGRAMS"))
    out = q.new_empty(q.shape)
    unit = 16 // q.element_size()
    strides = [t.stride(i) // unit for t in (q, k, v) for i in (0, 1)]
    descriptors: list[object] = []
    if kernel is _long_kernel:
        descriptors = [None] * 4
        if config.pop("TMA", False):
            block = config["BLOCK_N"]
            descriptors = [
                *_descriptors(k, heads, block, high, low),
                *_descriptors(v, heads * value_slices, block, v_high, v_low),
            ]
    launch(
        kernel,
        (blocks, heads * value_slices, rows),
        *(q, k, v, out, kv_len, slots, (dim**-0.5 if scale is None else scale) * LOG2_E, queries, keys, *strides),
        *descriptors,
        DIM=dim,
        HIGH=high,
        LOW=low,
        V_DIM=dim // value_slices,
        V_HIGH=v_high,
        V_LOW=v_low,
        **config,
    )
    return out


def _descriptors(x: Tensor, heads: int, rows: int, high: int, low: int) -> tuple[object, object]:
    """Descriptors for the bulk copy engine of x (S, M, heads * D): `rows` rows of a head at a time, in a tile of the
    first `high` channels and, unless 0, one of the `low` next. Beyond D it reads zeros. Built by the host at each
    launch, so that the kernel needs no memory for them.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    dim = x.shape[2] // heads
    shape, strides = [*x.shape[:2], heads, dim], [x.stride(0), x.stride(1), dim, 1]
    first = TensorDescriptor(x, shape, strides, [1, rows, 1, high])
    if not low:
        return first, None
    rest = x.as_strided((*x.shape[:2], x.shape[2] - high), x.stride(), x.storage_offset() + high)
    return first, TensorDescriptor(rest, [*shape[:3], dim - high], strides, [1, rows, 1, low])


ATTENTION = Op(
    "attention",
    reference=attention_reference,
    triton=attention_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    example_values=example_values,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Multi-head attention: q (B, N, H*D), k and v (S, M, H*D) -> (B, N, H*D), in q's dtype.

    `scale` multiplies the scores (D ** -0.5 when None); `causal` lets query n see keys 0 to n only (text encoders).
    `kv_len` (S,) int32: the keys of each slot, those beyond are not seen (all M when None; 0 keys give 0). `slots`
    (B,) int32: the slot whose keys and values each row of q attends to (its own when None, then S = B). Both are read
    on the device.
    """
    return ATTENTION(q, k, v, heads, scale=scale, causal=causal, kv_len=kv_len, slots=slots)
