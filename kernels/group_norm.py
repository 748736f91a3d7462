"""GroupNorm with the ops around it in a diffusion network: concatenation and shift before, SiLU after; alone or with
the sum before it.

    group_norm:
    y = concat(x, skip) + shift                                      skip and shift are optional
    out = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias         mean and var over a group of channels, H and W
    out = out * sigmoid(out)                                         when silu

    add_group_norm:
    total = x + x_bias + residual, rounded to x's dtype              each is optional
    out = group_norm(total, skip)                                    returns total + ahead and out

    x, residual (B, C1, H, W), x_bias, ahead (C1,), skip (B, C2, H, W), shift (B, C1 + C2), weight and bias (C1 + C2,)
    or (B, C1 + C2), each row's own -> (B, C1 + C2, H, W)

`shift` is the time embedding's row for this block, with the bias of the convolution before it folded in. Where the time
scales what is normalised (FiLM, adaptive norms), weight and bias of each row have that folded in. Statistics are
float32 whatever the dtype; a group may have channels of both x and skip. Formula: Wu and He 2018, arXiv:1803.08494.

Statistics. A sum of squares loses all precision where the mean is large, so none is computed. Each subset of the data
has its count n, its mean and M2 = sum (y - mean)^2, and subsets are merged by the formula of Chan, Golub and LeVeque
(1979), any number of them at once (`_pool`):

    n = sum n_i        mean = sum n_i mean_i / n        M2 = sum M2_i + n_i (mean_i - mean)^2

Pixel by pixel that is Welford's running mean; then pixels are merged into channels, channels into groups, and the
pieces of an image into the image. The order of the sums depends on the shape alone: results are the same in every run
and in every batch.

Tiles. Memory is channels-last: a pixel's channels lie side by side. A program takes GROUPS whole groups, of SIZE = C /
groups channels each, and walks over pixels with tiles of PIXELS of them. Triton's tiles are powers of two and SIZE is
not (10, 20, 30, 40, 60, 80 in the U-Nets), so a tile's channels are the first GROUPS * SIZE of LANES lanes: 12 groups
of 10 fill 120 lanes of 128, where one would fill 10 of 16. GROUPS * SIZE is a multiple of 8, so a thread loads 16
bytes at once. UNIT = gcd(SIZE, 8) neighbouring lanes share a thread and a group: they are merged first, with nothing
exchanged between threads. Which units make which group is a matrix of booleans, which serves any SIZE (`_moments`).

Where a group is small (up to 16,384 numbers: the levels of 8x8 and 16x16) one kernel does it all: `_moments`, then each
pixel once more, from the L1 cache. Such a level is latency and not bandwidth, so it takes one launch of 32 programs a
row and leaves most of the chip idle.

Elsewhere an image is split into pieces of TILES tiles, so that one row fills the chip: 192 programs for 320 x 64 x 64.
`_statistics_kernel` writes the mean and M2 of each group of each piece. `_normalise_kernel` has the same grid; each of
its programs merges the pieces of its own groups, at most 128 by GROUPS pairs of floats, while its first tile loads, and
normalises the piece that the program of the same index has read. It walks that piece backwards: the pixels that were
read last are still in the L2 cache, even of a tensor that is larger than the cache.

Bytes. The floor is x and skip in and the result out: 10.5 MB for two rows of 320 x 64 x 64 in float16, 3.5 us at 3
TB/s. The second reading of x comes from L2 up to some 30 MB. Beyond that it may come from memory: the autoencoder's
last norm, 128 x 512 x 512, has 67 MB and moves between 134 MB (45 us) and 201 MB, with 256 programs of 16 tiles. From
kernel to kernel go 8 bytes for each piece and group, at most 32 KB a row.

The sum. A convolution of cuDNN leaves its bias and the residual to add, a pass of its own over three images. The norm
that reads the sum next computes it as it loads; the first of its kernels writes it for the second. x may also be
partial sums of a convolution that is split (conv_group_norm.py). `ahead` is the bias of the product that the sum will
be the residual of, which then needs no pass of its own either: cuBLAS adds to it in place. It is not part of what is
normalised.

Moments that are known. A convolution's kernel can write the mean and M2 of each channel of a tile's pixels: then the
second kernel runs alone, and each of its programs merges those (BLOCKS).

Over 500 lines, for both ops are one pair of kernels.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.approximate import silu
from fastldm.kernels.dispatch import (
    YES,
    Config,
    Cost,
    Op,
    Verdict,
    cdiv,
    is_batch_invariant,
    jit,
    launch,
    needs_gradient,
    next_power_of_2,
    no,
    traced,
)

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
    """PyTorch's group_norm, which has float32 statistics for 16-bit dtypes and keeps channels-last memory; of large
    images that by `_by_lines`."""
    if skip is not None:
        x = torch.cat((x, skip), dim=1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    if _is_large(x):
        out = _by_lines(x, groups, weight, bias, eps)
    elif weight.ndim == 1:
        out = F.group_norm(x, groups, weight, bias, eps)
    else:
        normalised = F.group_norm(x, groups, eps=eps)
        out = torch.addcmul(bias[:, :, None, None], normalised, weight[:, :, None, None])
    return F.silu(out, inplace=True) if silu else out


def _is_large(x: Tensor) -> bool:
    """Whether PyTorch's group_norm would sum so many float32 values of channels-last memory one by one that its results
    have relative errors above 1e-6: 4e-5 for 512x512 pixels of 128 channels, and in proportion."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or needs_gradient(x) or traced():
        return False
    return x.shape[-2] * x.shape[-1] >= _MANY_PIXELS and pixel_stride(x) is not None and not x.is_contiguous()


def _by_lines(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """group_norm with the statistics of each line of pixels joined: relative errors below 1e-6."""
    batch, channels, height, width = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(batch * height, 1, width, channels).permute(0, 3, 1, 2)
    sizes = (batch * height, channels, width, groups)
    out, mean, inverse = torch.native_group_norm(lines, None, None, *sizes, _LEAST_VARIANCE)
    means = mean.view(batch, height, groups)
    variance = (inverse.view_as(means) ** -2 + (means - means.mean(1, keepdim=True)) ** 2).mean(1)  # (B, G)
    scale = (variance + eps).rsqrt()[..., None] * weight.unflatten(-1, (groups, -1))  # (B, G, C / G)
    shift = bias.unflatten(-1, (groups, -1)) - means.mean(1)[..., None] * scale
    whole = (batch, channels, 1, 1)
    out = out.permute(0, 2, 3, 1).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return torch.addcmul(shift.reshape(whole), x, scale.reshape(whole), out=out)


def add_group_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum, then PyTorch's group_norm of it."""
    total = x if x_bias is None else x + x_bias[:, None, None]
    total = total if residual is None else total + residual
    out = group_norm_reference(total, groups, weight, bias, eps, silu, skip=skip)
    return total if ahead is None else total + ahead[:, None, None], out


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
    channels = weight.shape[-1]
    if shift is not None and shift.shape != (x.shape[0], channels):
        return no(f"shift is {tuple(shift.shape)}, not one row of {channels} for each of {x.shape[0]}")
    if weight.shape != bias.shape or (weight.ndim == 2 and weight.shape[0] != x.shape[0]):
        return no(
            f"weight is {tuple(weight.shape)} and bias {tuple(bias.shape)}, not alike for each of {x.shape[0]} rows"
        )
    for vector in (weight, bias) if shift is None else (weight, bias, shift):
        if vector.stride(-1) != 1 and vector.shape[-1] != 1:
            return no(f"a vector of channels has stride {vector.stride(-1)}")
    if (size := channels // groups) > _LARGEST_GROUP:
        return no(f"{size} channels a group are more than {_LARGEST_GROUP}")
    return YES


def add_supports(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Verdict:
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return no(f"x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} {tuple(residual.shape)}")
    for name, image in (("x", x), ("residual", residual)):
        if image is not None and not image.is_contiguous(memory_format=torch.channels_last):
            return no(f"{name} {tuple(image.shape)} with strides {tuple(image.stride())} is not channels-last")
    for name, vector in (("x_bias", x_bias), ("ahead", ahead)):
        if vector is not None and not (vector.shape == x.shape[1:2] and vector.is_contiguous()):
            return no(f"{name} is {tuple(vector.shape)} with strides {vector.stride()}, not {x.shape[1]} numbers")
    return supports(x, groups, weight, bias, eps, silu, None, skip)


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


def add_cost(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> Cost:
    """That of the norm, the residual read and the sum written."""
    norm = cost(x, groups, weight, bias, eps, silu, None, skip)
    return norm._replace(bytes=norm.bytes + x.numel() * x.element_size() * (1 if residual is None else 2))


# ---------------------------------------------------------------------------------------------- configurations

_LARGEST_GROUP = 1024  # channels
_MANY_PIXELS = 2**15
_LEAST_VARIANCE = 1e-12  # of a line, so that its inverse is finite
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


def is_candidate(
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
    """32 elements for each thread. One program for a group, or few idle lanes and enough pieces to fill a GPU."""
    pixels, size = x.shape[2] * x.shape[3], weight.shape[-1] // groups
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
    return f"c{weight.shape[-1]} g{groups} p{next_power_of_2(x.shape[2] * x.shape[3])}"


def add_is_candidate(
    config: Config,
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> bool:
    return is_candidate(config, x, groups, weight, bias, eps)


def add_shape_class(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> str:
    return shape_class(x, groups, weight, bias, eps)


@functools.cache
def default(shape: str, arch: int) -> Config:
    """For each thread 32 elements, four times 16 bytes. A small group takes one program, a large one 128."""
    channels, groups, pixels = map(int, re.findall(r"\d+", shape))
    size = channels // groups

    def config(pieces: int, count: int, warps: int) -> Config:
        tile = max(1024 * warps // next_power_of_2(count * size), 4)
        return {"GROUPS": count, "PIXELS": tile, "TILES": cdiv(pixels, tile * pieces), "num_warps": warps}

    if pixels * size <= _ONE_PASS:
        return config(1, 1, min(max(next_power_of_2(pixels * size) // 1024, 1), 16))

    def in_use(count: int) -> float:
        return channels / (cdiv(groups, count) * next_power_of_2(count * size))

    aligned = [n for n in range(1, groups + 1) if n * size % 8 == 0 and 64 <= next_power_of_2(n * size) <= 256]
    count = max(aligned, key=in_use, default=1)
    large = config(_PIECES, count, 8)
    programs = cdiv(pixels, large["PIXELS"] * large["TILES"]) * cdiv(groups, count)
    return large if programs >= _MULTIPROCESSORS else config(_PIECES, count, 4)


# ----------------------------------------------------------------------------------------------------- kernels


@jit
def _pool(mean, m2, count, total, AXIS: tl.constexpr):
    """The mean and M2 of a union from those of its subsets, which lie along AXIS."""
    pooled = tl.sum(mean * count, AXIS) / total
    deviation = mean - tl.expand_dims(pooled, AXIS)
    return pooled, tl.sum(m2 + count * deviation * deviation, AXIS)


@jit
def _channels(size, channels, LANES: tl.constexpr):
    """The channels of this program's tiles (1, LANES), and the mask of the lanes that have one.

    size: channels of a program.
    """
    lane = tl.arange(0, LANES)[None, :]
    channel = tl.program_id(0) * size + lane
    return channel, (lane < size) & (channel < channels)


@jit
def _load(x, skip, start, tile_pixel, channel, mask, split_channel, part, x_pixel, skip_pixel, PARTS: tl.constexpr):
    """A tile of concat(x, skip) from pixel `start` on, zero outside. `split_channel` is the first channel of skip.

    x may be partial sums, PARTS of them, each `part` numbers after the other. Two masked loads, of which each lane
    makes one: selected pointers would not load 16 bytes at once.
    """
    start = start.to(tl.int64)  # pixels * channels exceeds 2^31 in large images, a tile does not
    x += start * x_pixel
    x_mask = mask
    if skip is not None:
        x_mask = mask & (channel < split_channel)
    tile = tl.load(x + (tile_pixel * x_pixel + channel), x_mask, other=0.0)
    for _ in tl.static_range(PARTS - 1):
        x += part
        tile += tl.load(x + (tile_pixel * x_pixel + channel), x_mask, other=0.0)
    if skip is not None:
        skip += start * skip_pixel - split_channel
        tile += tl.load(skip + (tile_pixel * skip_pixel + channel), mask & (channel >= split_channel), other=0.0)
    return tile


@jit
def _vector(vector, channel, channel_mask):
    return tl.load(vector + channel, channel_mask, other=0.0).to(tl.float32)


@jit
def _load_residual(residual, start, tile_pixel, channel, mask, split_channel):
    """As `_load`, of the image that is added to x, whose pixels lie side by side; None if there is none."""
    if residual is None:
        tile = None
    else:
        residual += start.to(tl.int64) * split_channel
        tile = tl.load(residual + (tile_pixel * split_channel + channel), mask & (channel < split_channel), other=0.0)
    return tile


@jit
def _total(tile, residual_tile, x_bias_row, like):
    """A tile of the sum, rounded to the dtype of what `like` points to; the tile itself where that is None."""
    if like is not None:
        total = tile.to(tl.float32)
        if x_bias_row is not None:
            total += x_bias_row
        if residual_tile is not None:
            total += residual_tile.to(tl.float32)
        tile = total.to(like.dtype.element_ty)
    return tile


@jit
def _x_vector(vector, channel, channel_mask, split_channel):
    """A number for each channel of x, 0 for those of skip; None if there are none."""
    if vector is None:
        row = None
    else:
        row = _vector(vector, channel, channel_mask & (channel < split_channel))
    return row


@jit
def _store(image, start, tile_pixel, channel, tile, mask, channels):
    """Write a tile of an image whose pixels lie side by side."""
    image += start.to(tl.int64) * channels
    tl.store(image + (tile_pixel * channels + channel), tile.to(image.dtype.element_ty), mask)


@jit
def _moments(
    x, skip, residual, x_bias_row, like, total, offset, first, last, channel, channel_mask, split_channel,
    part, x_pixel, skip_pixel, SIZE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, UNIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The mean and M2 of each group over the pixels first..last: (SLOTS,). total: where the sum is written."""
    tile_pixel = tl.arange(0, ROWS)[:, None]
    mean = tl.zeros((ROWS, LANES), tl.float32)
    m2 = tl.zeros((ROWS, LANES), tl.float32)
    for tile in range(TILES):
        for step in tl.static_range(4):  # unrolled: all four loads are issued before the first is waited for
            index = 4 * tile + step
            start = first + index * ROWS
            mask = (start + tile_pixel < last) & channel_mask
            tile_x = _load(x, skip, start, tile_pixel, channel, mask, split_channel, part, x_pixel, skip_pixel, PARTS)
            tile_residual = _load_residual(residual, start, tile_pixel, channel, mask, split_channel)
            y = _total(tile_x, tile_residual, x_bias_row, like)
            if total is not None:
                _store(total, start, tile_pixel, channel, y, mask & (channel < split_channel), split_channel)
            y = y.to(tl.float32)
            deviation = tl.where(mask, y - mean, 0.0)
            mean += deviation * (1.0 / (index + 1))
            m2 += deviation * (y - mean)
    mean += offset

    # Each row of the tile has summed every ROWS-th pixel from its own on; some rows none, where pixels are few.
    count = (last - first - tile_pixel + (ROWS - 1)) // ROWS * 1.0  # (ROWS, 1)
    mean = tl.reshape(mean, (ROWS, LANES // UNIT, UNIT))
    m2 = tl.reshape(m2, (ROWS, LANES // UNIT, UNIT))
    mean, m2 = _pool(mean, m2, count[:, :, None], tl.maximum(count, 1.0) * UNIT, 2)
    mean, m2 = _pool(mean, m2, count * UNIT, (last - first) * 1.0 * UNIT, 0)  # (LANES // UNIT,)
    return _pool_units(mean, m2, (last - first) * 1.0, SIZE, LANES, SLOTS, UNIT)


@jit
def _pool_units(
    mean, m2, pixels, SIZE: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """From units of channels (LANES // UNIT,) to groups (SLOTS,)."""
    member = tl.arange(0, LANES // UNIT)[:, None] // (SIZE // UNIT) == tl.arange(0, SLOTS)[None, :]
    mean = tl.where(member, mean[:, None], 0.0)  # selected, not multiplied: an infinity stays in its group
    m2 = tl.where(member, m2[:, None], 0.0)
    return _pool(mean, m2, tl.where(member, pixels * UNIT, 0.0), pixels * SIZE, 0)


@jit
def _statistics_kernel(
    x, skip, residual, x_bias, shift, total, moments, pixels, channels, groups, split_channel,
    part, x_row, x_pixel, skip_row, skip_pixel, shift_row,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """moments (2, B, pieces, groups): the mean and M2 of each group of each piece. total: where the sum is written, if
    there is one."""
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, channel_mask = _channels(GROUPS * SIZE, channels, LANES)
    first = piece * (PIXELS * TILES)
    last = tl.minimum(first + PIXELS * TILES, pixels)
    x += row * x_row
    if skip is not None:
        skip += row * skip_row
    if residual is not None:
        residual += row * pixels * split_channel
    x_bias_row = _x_vector(x_bias, channel, channel_mask, split_channel)
    offset = 0.0
    if shift is not None:
        offset = _vector(shift + row * shift_row, channel, channel_mask)

    if total is not None:
        total += row * pixels * split_channel
    mean, m2 = _moments(
        x, skip, residual, x_bias_row, total, total, offset, first, last, channel, channel_mask, split_channel,
        part, x_pixel, skip_pixel, SIZE, PIXELS // 4, TILES, LANES, SLOTS, UNIT, PARTS,
    )  # fmt: skip
    slot = tl.arange(0, SLOTS)
    group = tl.program_id(0) * GROUPS + slot
    group_mask = (slot < GROUPS) & (group < groups)
    moments += (row * tl.num_programs(1) + piece) * groups + group
    tl.store(moments, mean, group_mask)
    tl.store(moments + tl.num_programs(2) * tl.num_programs(1) * groups, m2, group_mask)


@jit
def _normalise_kernel(
    x, skip, residual, x_bias, ahead, shift, weight, bias, moments, total, out, pixels, channels, groups, split_channel,
    part, x_row, x_pixel, skip_row, skip_pixel, shift_row, weight_row, bias_row,
    EPS: tl.constexpr, SILU: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr, PARTS: tl.constexpr,
    PIECES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Normalise one piece by the moments of at most PIECES pieces; with PIECES = 1 by those of x; with BLOCKS by those
    of each channel of so many equal blocks of pixels. total: where the sum, if x is not it, is written with `ahead`."""
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, channel_mask = _channels(GROUPS * SIZE, channels, LANES)
    first = piece * (PIXELS * TILES)
    last = tl.minimum(first + PIXELS * TILES, pixels)
    x += row * x_row
    if skip is not None:
        skip += row * skip_row
    if residual is not None:
        residual += row * pixels * split_channel
    x_bias_row = _x_vector(x_bias, channel, channel_mask, split_channel)
    like = None
    if (PARTS > 1) or (residual is not None) or (x_bias is not None):
        like = out

    tile_pixel = tl.arange(0, PIXELS)[:, None]
    start = first + PIXELS * (TILES - 1)
    mask = (start + tile_pixel < last) & channel_mask
    tile = _load(x, skip, start, tile_pixel, channel, mask, split_channel, part, x_pixel, skip_pixel, PARTS)
    residual_tile = _load_residual(residual, start, tile_pixel, channel, mask, split_channel)
    if weight_row is not None:  # each row's own
        weight += row * weight_row
        bias += row * bias_row
    scale, added = _vector(weight, channel, channel_mask), _vector(bias, channel, channel_mask)
    offset = 0.0
    if shift is not None:
        offset = _vector(shift + row * shift_row, channel, channel_mask)
    if BLOCKS:
        source = tl.arange(0, PIECES)[:, None]
        valid = channel_mask
        if PIECES != BLOCKS:
            valid = (source < BLOCKS) & channel_mask
        moments += row * BLOCKS * channels
        place = source * channels + channel  # 32 bits: half the instructions of 64
        block_mean = tl.load(moments + place, valid, other=0.0)
        block_m2 = tl.load(moments + tl.num_programs(2) * BLOCKS * channels + place, valid, other=0.0)
        mean = tl.sum(block_mean, 0) / BLOCKS  # `_pool` of equal blocks
        deviation = block_mean - mean[None, :]
        if PIECES != BLOCKS:
            deviation = tl.where(source < BLOCKS, deviation, 0.0)
        m2 = tl.sum(block_m2 + (pixels // BLOCKS * 1.0) * deviation * deviation, 0)
        mean += tl.reshape(offset + tl.zeros((1, LANES), tl.float32), (LANES,))
        mean, m2 = tl.reshape(mean, (LANES // UNIT, UNIT)), tl.reshape(m2, (LANES // UNIT, UNIT))
        mean, m2 = _pool(mean, m2, pixels * 1.0, pixels * 1.0 * UNIT, 1)
        mean, m2 = _pool_units(mean, m2, pixels * 1.0, SIZE, LANES, SLOTS, UNIT)
    elif PIECES == 1:
        mean, m2 = _moments(
            x, skip, residual, x_bias_row, like, None, offset, first, last, channel, channel_mask, split_channel,
            part, x_pixel, skip_pixel, SIZE, PIXELS // 4, TILES, LANES, SLOTS, UNIT, PARTS,
        )  # fmt: skip
    else:
        source, group = tl.arange(0, PIECES)[:, None], tl.program_id(0) * GROUPS + tl.arange(0, SLOTS)[None, :]
        valid = (source < tl.num_programs(1)) & (group < groups)
        moments += (row * tl.num_programs(1) + source) * groups + group
        mean = tl.load(moments, valid, other=0.0)
        m2 = tl.load(moments + tl.num_programs(2) * tl.num_programs(1) * groups, valid, other=0.0)
        count = tl.minimum(tl.maximum(pixels - source * (PIXELS * TILES), 0), PIXELS * TILES)
        mean, m2 = _pool(mean, m2, count * 1.0 * SIZE, pixels * 1.0 * SIZE, 0)

    slot = tl.minimum(tl.arange(0, LANES) // SIZE, SLOTS - 1)  # each lane's group; lanes past the last have none
    mean = tl.gather(mean, slot, 0)[None, :] - offset
    scale *= tl.gather(tl.rsqrt(m2 / (pixels * 1.0 * SIZE) + EPS), slot, 0)[None, :]

    out += row * pixels * channels
    if total is not None:
        total += row * pixels * split_channel
    for _ in range(TILES):
        pixel = start + tile_pixel
        next_mask = (pixel >= first + PIXELS) & (pixel < last + PIXELS) & channel_mask
        next_tile = _load(
            x, skip, start - PIXELS, tile_pixel, channel, next_mask, split_channel, part, x_pixel, skip_pixel, PARTS
        )
        next_residual = _load_residual(residual, start - PIXELS, tile_pixel, channel, next_mask, split_channel)
        y = _total(tile, residual_tile, x_bias_row, like)
        mask = (pixel < last) & channel_mask
        if total is not None:
            later = _total(y, None, _x_vector(ahead, channel, channel_mask, split_channel), total)
            _store(total, start, tile_pixel, channel, later, mask & (channel < split_channel), split_channel)
        y = (y.to(tl.float32) - mean) * scale + added
        if SILU:
            y = silu(y)
        _store(out, start, tile_pixel, channel, y, mask, channels)
        tile = next_tile
        if residual is not None:
            residual_tile = next_residual
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
    return normalise(config, x, groups, weight, bias, eps, silu, shift=shift, skip=skip)


def add_group_norm_triton(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    config = ADD_GROUP_NORM.config(x, residual, x_bias, groups, weight, bias, eps, silu, skip, ahead)
    total = like_pixels(x)
    terms = {"residual": residual, "x_bias": x_bias, "ahead": ahead, "total": total}
    return total, normalise(config, x, groups, weight, bias, eps, silu, skip=skip, **terms)


def like_pixels(x: Tensor) -> Tensor:
    """Memory for an image (B, C, H, W) whose pixels lie side by side."""
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def normalise(
    config: Config,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    *,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    ahead: Tensor | None = None,
    total: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Launch the kernels, of both ops and of conv_group_norm.py.

    x: the image, or partial sums of it (parts, B, C1, H, W) in float32. total: where the sum is written. moments
    (2, B, blocks, C1): mean and M2 of each channel of equal blocks of pixels, if whoever wrote x knows them.
    """
    parts, part = 1, 0
    if x.dim() == 5:
        (parts, part), x = (x.shape[0], x.stride(0)), x[0]
    batch, split_channel, height, width = x.shape
    pixels, channels = height * width, weight.shape[-1]
    size = channels // groups
    if moments is not None:  # which every program merges: no more of them than fill a GPU
        rows = 1 if is_batch_invariant() else batch
        pieces = max(_MULTIPROCESSORS // (cdiv(groups, config["GROUPS"]) * rows), 1)
        config = {**config, "TILES": cdiv(pixels, config["PIXELS"] * pieces)}
    pieces = cdiv(pixels, config["PIXELS"] * config["TILES"])
    if parts > 1 and pieces == 1:  # tiles of float32, from several loads, take more registers
        rows = max(config["PIXELS"] // 4, 4)
        config = {"GROUPS": 1, "PIXELS": rows, "TILES": cdiv(pixels, rows), "num_warps": min(config["num_warps"], 8)}
    tile = {
        **config,
        "SIZE": size,
        "LANES": next_power_of_2(config["GROUPS"] * size),
        "SLOTS": next_power_of_2(config["GROUPS"]),
        "UNIT": math.gcd(size, 8),
    }
    shape = (
        *(pixels, channels, groups, split_channel),
        *(part, x.stride(0), pixel_stride(x)),
        *((0, 0) if skip is None else (skip.stride(0), pixel_stride(skip))),
        0 if shift is None else shift.stride(0),
    )
    grid = (cdiv(groups, config["GROUPS"]), pieces, batch)
    like = x if total is None else total
    out = like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    blocks = 0
    if moments is not None:
        blocks = pieces = moments.shape[2]
    elif pieces > 1:
        written = None  # the sum, by the first kernel, if x is not it
        if parts > 1 or residual is not None or x_bias is not None:
            written, total = (total, None) if ahead is None else (like_pixels(like), total)
        moments = x.new_empty((2, batch, pieces, groups), dtype=torch.float32)
        terms = (x, skip, residual, x_bias, shift, written)
        launch(_statistics_kernel, grid, *terms, moments, *shape, **tile, PARTS=parts)
        if written is not None:
            x, parts, residual, x_bias = written, 1, None, None
    tile |= {"EPS": eps, "SILU": silu, "PARTS": parts, "PIECES": next_power_of_2(pieces), "BLOCKS": blocks}
    terms = (x, skip, residual, x_bias, ahead, shift)
    own = (None, None) if weight.ndim == 1 else (weight.stride(0), bias.stride(0))
    launch(_normalise_kernel, grid, *terms, weight, bias, moments, total, out, *shape, *own, **tile)
    return out


# --------------------------------------------------------------------------------------------------------- ops

GROUP_NORM = Op(
    "group_norm",
    reference=group_norm_reference,
    triton=group_norm_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
)


ADD_GROUP_NORM = Op(
    "add_group_norm",
    reference=add_group_norm_reference,
    triton=add_group_norm_triton,
    supports=add_supports,
    shape_class=add_shape_class,
    cost=add_cost,
    default=default,
    space=SPACE,
    is_candidate=add_is_candidate,
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
    """Group-normalise concat(x, skip) + shift, then SiLU if `silu`: (B, C, H, W), in x's dtype and memory format."""
    return GROUP_NORM(x, groups, weight, bias, eps, silu=silu, shift=shift, skip=skip)


def add_group_norm(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    skip: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + x_bias + residual, both images (B, C1, H, W), in x's dtype, and that, with skip, group-normalised, as
    `group_norm` does.

    ahead (C1,): added to the sum that is returned and not to what is normalised: the bias of the product that the sum
    will be the residual of.
    """
    return ADD_GROUP_NORM(x, residual, x_bias, groups, weight, bias, eps, silu, skip, ahead)
