"""GroupNorm with what stands around it in a diffusion network.

    y = concat(x, skip) + shift                                      skip and shift are optional
    out = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias         mean and var over a group of channels, H and W
    out = out * sigmoid(out)                                         when silu

    x (B, C1, H, W), skip (B, C2, H, W), shift (B, C1 + C2), weight and bias (C1 + C2,) -> (B, C1 + C2, H, W)

`shift` is the time embedding's row for this block, with the bias of the convolution before it folded in. Statistics are
float32 whatever the dtype; a group may straddle the seam between x and skip. Formula: Wu and He 2018, arXiv:1803.08494.

Statistics. A sum of squares loses everything where the mean is large, so none is taken. Of any part of the data its
count n, its mean and M2 = sum (y - mean)^2 are kept, and parts are united by the formula of Chan, Golub and LeVeque
(1979), any number of them at once (`_pool`):

    n = sum n_i        mean = sum n_i mean_i / n        M2 = sum M2_i + n_i (mean_i - mean)^2

Pixel by pixel that is Welford's running mean; then it makes channels of pixels, groups of channels, and a picture of
its pieces. The order of the sums follows from the shape alone: results are the same in every run and in every batch.

Tiles. Memory is channels-last: a pixel's channels lie side by side. A program takes GROUPS whole groups, of SIZE = C /
groups channels each, and walks over pixels with tiles of PIXELS of them. Triton's tiles are powers of two and SIZE is
not (10, 20, 30, 40, 60, 80 in the U-Nets), so a tile's channels are the first GROUPS * SIZE of LANES lanes: 12 groups
of 10 fill 120 lanes of 128, where one would fill 10 of 16. GROUPS * SIZE is a multiple of 8, so a thread loads 16
bytes at once. UNIT = gcd(SIZE, 8) neighbouring lanes share a thread and a group: they are united first, with nothing
exchanged between threads. Which units make which group is a matrix of booleans, which serves any SIZE (`_moments`).

Where a group is small (up to 16,384 numbers: the levels of 8x8 and 16x16) one kernel does it all: `_moments`, then each
pixel once more, from the L1 cache. Such a level is latency and not bandwidth, so it takes one launch of 32 programs a
row and leaves most of the chip idle.

Elsewhere a picture is split into pieces of TILES tiles, so that one row fills the chip: 192 programs for 320 x 64 x 64.
`_statistics_kernel` writes the mean and M2 of each group of each piece. `_normalise_kernel` has the same grid; each of
its programs unites the pieces of its own groups, at most 128 by GROUPS pairs of floats, while its first tile is under
way, and normalises the piece that the program of the same place has read. It walks that piece backwards: what was read
last is in the L2 cache still, even of a tensor that is larger than the cache.

Bytes. The floor is x and skip in and the result out: 10.5 MB for two rows of 320 x 64 x 64 in float16, 3.5 us at 3
TB/s. The second reading of x comes from L2 up to some 30 MB. Beyond that it may come from memory: the autoencoder's
last norm, 128 x 512 x 512, has 67 MB and moves between 134 MB (45 us) and 201 MB, with 256 programs of 16 tiles. What
passes between the kernels is 8 bytes for each piece and group, at most 32 KB a row.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, cdiv, jit, launch, next_power_of_2, no

if TYPE_CHECKING:
    import triton.language as tl


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The formula plainly. PyTorch's group_norm keeps float32 statistics for half types, and channels-last memory."""
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out, inplace=True) if silu else out


def supports(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Verdict:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"dtype {x.dtype}")
    if x.numel() == 0:
        return no(f"{tuple(x.shape)} is empty")
    for image in (x,) if skip is None else (x, skip):
        if pixel_stride(image) is None:
            return no(f"{tuple(image.shape)} with strides {tuple(image.stride())} is not channels-last")
    if skip is not None and skip.dtype != x.dtype:
        return no(f"x is {x.dtype}, skip {skip.dtype}")
    if shift is not None and shift.shape != (x.shape[0], weight.shape[0]):
        return no(f"shift is {tuple(shift.shape)}, not one row of {weight.shape[0]} for each of {x.shape[0]}")
    for vector in (weight, bias) if shift is None else (weight, bias, shift):
        if vector.stride(-1) != 1 and vector.shape[-1] != 1:
            return no(f"a vector of channels has stride {vector.stride(-1)}")
    if (size := weight.shape[0] // groups) > _LARGEST_GROUP:
        return no(f"{size} channels a group are more than {_LARGEST_GROUP}")
    return YES


def pixel_stride(image: Tensor) -> int | None:
    """The distance between pixels of (B, C, H, W), where channels are dense and all pixels equally far apart."""
    _, channels, height, width = image.shape
    _, dense, row, pixel = image.stride()
    if channels > 1 and dense != 1:
        return None
    if width == 1:
        return row if height > 1 else channels
    return pixel if height == 1 or row == width * pixel else None


def cost(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Cost:
    count = x.numel() + (0 if skip is None else skip.numel())
    return Cost(flop=0, bytes=2 * count * x.element_size(), exp=count if silu else 0)


# ---------------------------------------------------------------------------------------------- configurations

_LARGEST_GROUP = 1024  # channels
_ONE_PASS = 16384  # elements of a group that one program takes, in one tile of 16 warps
_PIECES = 128
_MULTIPROCESSORS = 132  # of an H100; other chips of these generations have 82 to 170

SPACE = [
    {"GROUPS": groups, "PIXELS": pixels, "TILES": tiles, "num_warps": warps}
    for groups in (1, 2, 3, 4, 6, 8, 12, 16, 32)
    for pixels in (16, 32, 64, 128, 256, 512, 1024)
    for tiles in (1, 2, 4, 8, 16, 32, 64, 128)
    for warps in (4, 8, 16)
]


def keep(
    config: Config,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> bool:
    """32 elements for each thread. One program for a group, or few idle lanes and enough pieces to fill a chip."""
    pixels, size = x.shape[2] * x.shape[3], weight.shape[0] // groups
    channels = config["GROUPS"] * size
    lanes = next_power_of_2(channels)
    if config["GROUPS"] > groups or config["PIXELS"] * lanes != 1024 * config["num_warps"]:
        return False
    pieces = cdiv(pixels, config["PIXELS"] * config["TILES"])
    if pieces == 1:
        return config["GROUPS"] == 1 and config["PIXELS"] * (config["TILES"] - 1) < pixels
    programs = pieces * cdiv(groups, config["GROUPS"])
    return 64 <= lanes <= 256 and channels > 0.75 * lanes and channels % 8 == 0 and 64 <= programs <= 1024


def shape_class(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> str:
    return f"c{weight.shape[0]} g{groups} p{next_power_of_2(x.shape[2] * x.shape[3])}"


@functools.cache
def default(shape: str, arch: int) -> Config:
    """For each thread 32 elements, four times 16 bytes. One program takes small groups whole, 128 share large ones."""
    channels, groups, pixels = map(int, re.findall(r"\d+", shape))
    size = channels // groups

    def pieces(of: int, count: int, warps: int) -> Config:
        tile = max(1024 * warps // next_power_of_2(count * size), 4)
        return {"GROUPS": count, "PIXELS": tile, "TILES": cdiv(pixels, tile * of), "num_warps": warps}

    if pixels * size <= _ONE_PASS:
        return pieces(1, 1, min(max(next_power_of_2(pixels * size) // 1024, 1), 16))

    def in_use(count: int) -> float:
        return channels / (cdiv(groups, count) * next_power_of_2(count * size))

    aligned = [n for n in range(1, groups + 1) if n * size % 8 == 0 and 64 <= next_power_of_2(n * size) <= 256]
    count = max(aligned, key=in_use, default=1)
    large = pieces(_PIECES, count, 8)
    programs = cdiv(pixels, large["PIXELS"] * large["TILES"]) * cdiv(groups, count)
    return large if programs >= _MULTIPROCESSORS else pieces(_PIECES, count, 4)


# ----------------------------------------------------------------------------------------------------- kernels


@jit
def _pool(mean, m2, count, total, AXIS: tl.constexpr):
    """The mean and M2 of a union from those of its parts, which lie along AXIS."""
    pooled = tl.sum(mean * count, AXIS) / total
    apart = mean - tl.expand_dims(pooled, AXIS)
    return pooled, tl.sum(m2 + count * apart * apart, AXIS)


@jit
def _channels(size, channels, LANES: tl.constexpr):
    """The channels of this program's tiles (1, LANES), and which of the lanes have one. size: channels of a program."""
    lane = tl.arange(0, LANES)[None, :]
    channel = tl.program_id(0) * size + lane
    return channel, (lane < size) & (channel < channels)


@jit
def _load(x, skip, start, place, channel, inside, seam, x_pixel, skip_pixel):
    """A tile of concat(x, skip) from pixel `start` on, zero outside.

    Two loads with masks, of which each lane makes one: with a choice of pointers, 16 bytes at once would be lost.
    """
    start = start.to(tl.int64)  # pixels * channels passes 2^31 in large pictures, a tile does not
    x += start * x_pixel
    if skip is None:
        tile = tl.load(x + (place * x_pixel + channel), inside, other=0.0)
    else:
        skip += start * skip_pixel - seam
        tile = tl.load(x + (place * x_pixel + channel), inside & (channel < seam), other=0.0)
        tile += tl.load(skip + (place * skip_pixel + channel), inside & (channel >= seam), other=0.0)
    return tile


@jit
def _vector(vector, channel, mask):
    return tl.load(vector + channel, mask, other=0.0).to(tl.float32)


@jit
def _moments(
    x, skip, offset, first, last, channel, mask, seam, x_pixel, skip_pixel,
    SIZE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The mean and M2 of each group over the pixels first..last: (SLOTS,)."""
    place = tl.arange(0, ROWS)[:, None]
    mean = tl.zeros((ROWS, LANES), tl.float32)
    m2 = tl.zeros((ROWS, LANES), tl.float32)
    for tile in range(TILES):
        for part in tl.static_range(4):  # unrolled: all four loads are issued before the first is waited for
            seen = 4 * tile + part
            start = first + seen * ROWS
            inside = (start + place < last) & mask
            y = _load(x, skip, start, place, channel, inside, seam, x_pixel, skip_pixel).to(tl.float32)
            apart = tl.where(inside, y - mean, 0.0)
            mean += apart * (1.0 / (seen + 1))
            m2 += apart * (y - mean)
    mean += offset

    # Each place of the tile has seen every ROWS-th pixel from its own on; some none, where pixels are few.
    count = (last - first - place + (ROWS - 1)) // ROWS * 1.0  # (ROWS, 1)
    mean = tl.reshape(mean, (ROWS, LANES // UNIT, UNIT))
    m2 = tl.reshape(m2, (ROWS, LANES // UNIT, UNIT))
    mean, m2 = _pool(mean, m2, count[:, :, None], tl.maximum(count, 1.0) * UNIT, 2)
    mean, m2 = _pool(mean, m2, count * UNIT, (last - first) * 1.0 * UNIT, 0)  # (LANES // UNIT,)

    member = tl.arange(0, LANES // UNIT)[:, None] // (SIZE // UNIT) == tl.arange(0, SLOTS)[None, :]
    mean = tl.where(member, mean[:, None], 0.0)  # selected, not multiplied: an infinity stays in its group
    m2 = tl.where(member, m2[:, None], 0.0)
    count = tl.where(member, (last - first) * 1.0 * UNIT, 0.0)
    return _pool(mean, m2, count, (last - first) * 1.0 * SIZE, 0)


@jit
def _statistics_kernel(
    x, skip, shift, moments, pixels, channels, groups, seam, x_row, x_pixel, skip_row, skip_pixel, shift_row,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """moments (2, B, pieces, groups): the mean and M2 of each group of each piece."""
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, mask = _channels(GROUPS * SIZE, channels, LANES)
    first = piece * (PIXELS * TILES)
    last = tl.minimum(first + PIXELS * TILES, pixels)
    x += row * x_row
    if skip is not None:
        skip += row * skip_row
    offset = 0.0
    if shift is not None:
        offset = _vector(shift + row * shift_row, channel, mask)

    mean, m2 = _moments(
        x, skip, offset, first, last, channel, mask, seam, x_pixel, skip_pixel,
        SIZE, PIXELS // 4, TILES, LANES, SLOTS, UNIT,
    )  # fmt: skip
    slot = tl.arange(0, SLOTS)
    group = tl.program_id(0) * GROUPS + slot
    mask = (slot < GROUPS) & (group < groups)
    moments += (row * tl.num_programs(1) + piece) * groups + group
    tl.store(moments, mean, mask)
    tl.store(moments + tl.num_programs(2) * tl.num_programs(1) * groups, m2, mask)


@jit
def _normalise_kernel(
    x, skip, shift, weight, bias, moments, out, pixels, channels, groups, seam,
    x_row, x_pixel, skip_row, skip_pixel, shift_row,
    EPS: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """From the moments of the pieces, of which there are PIECES or fewer; with PIECES = 1 from x alone."""
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, mask = _channels(GROUPS * SIZE, channels, LANES)
    first = piece * (PIXELS * TILES)
    last = tl.minimum(first + PIXELS * TILES, pixels)
    x += row * x_row
    if skip is not None:
        skip += row * skip_row

    place = tl.arange(0, PIXELS)[:, None]
    start = first + PIXELS * (TILES - 1)
    tile = _load(x, skip, start, place, channel, (start + place < last) & mask, seam, x_pixel, skip_pixel)
    scale, base = _vector(weight, channel, mask), _vector(bias, channel, mask)
    offset = 0.0
    if shift is not None:
        offset = _vector(shift + row * shift_row, channel, mask)
    if PIECES == 1:
        mean, m2 = _moments(
            x, skip, offset, first, last, channel, mask, seam, x_pixel, skip_pixel,
            SIZE, PIXELS // 4, TILES, LANES, SLOTS, UNIT,
        )  # fmt: skip
    else:
        part, group = tl.arange(0, PIECES)[:, None], tl.program_id(0) * GROUPS + tl.arange(0, SLOTS)[None, :]
        known = (part < tl.num_programs(1)) & (group < groups)
        moments += (row * tl.num_programs(1) + part) * groups + group
        mean = tl.load(moments, known, other=0.0)
        m2 = tl.load(moments + tl.num_programs(2) * tl.num_programs(1) * groups, known, other=0.0)
        count = tl.minimum(tl.maximum(pixels - part * (PIXELS * TILES), 0), PIXELS * TILES)
        mean, m2 = _pool(mean, m2, count * 1.0 * SIZE, pixels * 1.0 * SIZE, 0)

    slot = tl.minimum(tl.arange(0, LANES) // SIZE, SLOTS - 1)  # each lane's group; lanes past the last have none
    mean = tl.gather(mean, slot, 0)[None, :] - offset
    scale *= tl.gather(tl.rsqrt(m2 / (pixels * 1.0 * SIZE) + EPS), slot, 0)[None, :]

    out += row * pixels * channels
    for _ in range(TILES):
        pixel = start + place
        before = (pixel >= first + PIXELS) & (pixel < last + PIXELS) & mask
        following = _load(x, skip, start - PIXELS, place, channel, before, seam, x_pixel, skip_pixel)
        y = (tile.to(tl.float32) - mean) * scale + base
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        target = out + start.to(tl.int64) * channels + (place * channels + channel)
        tl.store(target, y.to(out.dtype.element_ty), (pixel < last) & mask)
        tile = following
        start -= PIXELS


def group_norm_triton(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    config = GROUP_NORM.config(x, groups, weight, bias, eps, silu=silu, shift=shift, skip=skip)
    batch, seam, height, width = x.shape
    pixels, channels = height * width, weight.shape[0]
    size = channels // groups
    pieces = cdiv(pixels, config["PIXELS"] * config["TILES"])
    tile = {
        **config,
        "SIZE": size,
        "LANES": next_power_of_2(config["GROUPS"] * size),
        "SLOTS": next_power_of_2(config["GROUPS"]),
        "UNIT": math.gcd(size, 8),
    }
    shape = (
        *(pixels, channels, groups, seam),
        *(x.stride(0), pixel_stride(x)),
        *((0, 0) if skip is None else (skip.stride(0), pixel_stride(skip))),
        0 if shift is None else shift.stride(0),
    )
    grid = (cdiv(groups, config["GROUPS"]), pieces, batch)
    out = x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    moments = None
    if pieces > 1:
        moments = x.new_empty((2, batch, pieces, groups), dtype=torch.float32)
        launch(_statistics_kernel, grid, x, skip, shift, moments, *shape, **tile)
    tile |= {"EPS": eps, "SILU": silu, "PIECES": next_power_of_2(pieces)}
    launch(_normalise_kernel, grid, x, skip, shift, weight, bias, moments, out, *shape, **tile)
    return out


# ---------------------------------------------------------------------------------------------------------- op

GROUP_NORM = Op(
    "group_norm",
    reference=group_norm_reference,
    triton=group_norm_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    keep=keep,
)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Group-normalise concat(x, skip) + shift, then SiLU if asked: (B, C, H, W), in x's dtype and memory format."""
    return GROUP_NORM(x, groups, weight, bias, eps, silu=silu, shift=shift, skip=skip)
