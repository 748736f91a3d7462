"""2-D convolutions, alone or after nearest upsampling.

    conv2d            out[o, h, w] = sum_cij weight[o, c, i, j] x[c, stride h + i - padding, stride w + j - padding]
                                     + bias[o] + residual[o, h, w]
    upsample_conv2d   x enlarged to (height, width) by nearest neighbour, then a 3x3 convolution with padding 1

    x (B, C, H, W), weight (O, C, K, K), bias (O,), residual as out -> out (B, O, H', W')

All memory is channels-last: a pixel's channels lie side by side, x is a matrix (B*H*W, C), weight is (O, K, K, C). Then
a convolution is the product of a matrix (B*H'*W', K*K*C), each of whose rows is K*K pixels of x, with weight's
transpose. It is 2 B H' W' O C K^2 float operations over B H W C + O C K^2 + B H' W' O elements: 3x3 on 320 channels at
64x64 and batch 2 does 15.1 GFLOP on 12 MB, 1,230 operations a byte, and is bound by the matrix units. At 8x8 with 1280
channels 3.8 GFLOP read 29 MB of weights, 128 operations a byte, and are bound by memory.

PyTorch's fastest way, which GPUs take by default, but Hopper for the shapes of `faster` (`conv2d_torch`):

    plan        cuDNN times its plans for a shape at the first call and keeps the fastest. The usual switch for that is
                torch.backends.cudnn.benchmark, which is global; here it is an argument of each call (`_convolve`).
    1x1         is a matrix product, which cuBLAS does faster.
    channels    3, 4 and 9 are padded to a multiple of 8 with zeros: the tensor cores need rows of 16 bytes. Images are
                padded at each call, weights unless they are a corner of padded memory (`pad_to_eights`).
    bias        ATen adds it in a pass of its own after cuDNN. One kernel adds bias and residual in place of both passes
                (bias_residual.py). The U-Net's first convolution of a block has none: its bias is in the time row.

Upsampling. Each row of x becomes two rows of the enlarged image. Of the three rows that a 3x3 kernel covers two are
therefore equal, and their weights can be added first: where the output's row is even, the first row is the single one,

    out[2h]     = w0 x[h-1] + (w1 + w2) x[h]            out[2h + 1] = (w0 + w1) x[h] + w2 x[h+1]

and the same for columns. So each of the four phases (parity of row, of column) is a 2x2 convolution of the small
image: 16 products for four outputs instead of 36, and the enlarged image is never written. Together they are
one transposed convolution of stride 2 and padding 1, whose kernel along one axis is (w2, w1 + w2, w0 + w1, w0), the
mirrored sums of neighbours of w: the full convolution of w with a 2x2 box, which is what enlarging is
(`upsample_phases`). Exact but for the rounding of the sums, which are float32. It is faster where the image is large
enough to outweigh the sums, see _PHASES_FROM; other sizes than the double are enlarged, then convolved.

The kernel (`_conv_kernel`) is the product described above without the large matrix in memory ("implicit GEMM"): a
program computes BLOCK_M pixels x BLOCK_N channels of the output as the kernel of linear.py does, with its order of
tiles, split of K and epilogue, and walks along K tap by tap, BLOCK_K channels at a time. A tap moves all pixels by the
same distance in memory, so an address is a number for each pixel, computed once, plus a number for the step; loads
beyond the edge are masked to zero. Upsampling is four such products, one a phase, in one launch, each reading its 2x2
taps of the 4x4 kernel and writing every other pixel: the output is written once, interleaved, and needs no further
pass.

Where it is taken. cuDNN's tiles are 64, 128 and 256 wide: 8192 x 320 is 192 tiles of 128 x 128, two rounds of the 132
multiprocessors of a Hopper, and 128 of 128 x 160, one. By benchmarks/predict.py a 3x3 of 320 channels at 64x64, with
bias and residual, takes 29.6 us, by cuDNN and a pass 40.3: the model lets the kernel's one program of a multiprocessor
overlap nothing, which is more than the 0.70 that it takes off cuDNN's products would cost (25.3). `faster` has what was
found so in all shapes of SD1.5: a wide tile pays from 22 steps of K on. That is a prediction and for Hopper alone;
`make gpu-first` times it, and a table of measurements overrules it.

Over 500 lines, for both ops are one kernel.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import float32, onednn
from fastldm.kernels.bias_residual import bias_residual
from fastldm.kernels.dispatch import (
    YES,
    Config,
    Cost,
    Op,
    Verdict,
    capability,
    cdiv,
    is_batch_invariant,
    jit,
    launch,
    no,
)
from fastldm.kernels.dispatch import next_power_of_2 as power_of_2
from fastldm.kernels.linear import (
    SPACE,
    column_of,
    columns_of,
    default,
    estimate,
    fast_library,
    finish,
    halves,
    is_competitive,
    linear,
    sum_splits,
    supports_dtypes,
    tile_of,
)

if TYPE_CHECKING:
    import triton.language as tl

# Steps of K that a program takes at least where the kernel is faster than cuDNN, see `faster`.
_STEPS_FROM = 22
# Pixels (B*H*W of the small image) from which the phases are faster, though they are summed anew at each call. They
# save 5/9 of 18 C O float operations for each of 4 pixels, and cost some 64 C O bytes to sum and to read: on an H100 at
# 500 TFLOP/s and 3 TB/s that balances at 270 pixels, and with PyTorch's unfused kernels at three times as many. On a
# CPU's core 64 to 512 channels at 64x64 take half the time of enlarging first, 640 at 8x8 more than twice as much.
_PHASES_FROM = 2048


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """PyTorch's convolution, then the sum: in place, for nothing else refers to the output."""
    out = float32.convolve(x, weight, bias, stride, padding)
    return out if residual is None else out.add_(residual)


def conv2d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """PyTorch's fastest way: on a GPU as described at the top of this file, on a CPU onednn.py where it applies."""
    if not fast_library(x):
        out = onednn.convolve(x, weight, bias, stride, padding)
        if out is None:
            return conv2d_reference(x, weight, bias, residual, stride, padding)
        return out if residual is None else out.add_(residual)
    if weight.shape[2:] == (1, 1) and (stride, padding) == (1, 0):
        pixels = None if residual is None else residual.permute(0, 2, 3, 1)
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias, residual=pixels).permute(0, 3, 1, 2)
    filters, missing = weight.shape[0], -weight.shape[1] % 8
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    out = _convolve(x, pad_to_eights(weight), stride, padding)
    if out.shape[1] > filters:
        out = _channels_last(out[:, :filters])
    return bias_residual(out, bias, residual)


def pad_to_eights(weight: Tensor) -> Tensor:
    """weight (O, C, K, K), padded with zeros to multiples of 8 filters and channels.

    Nothing is copied where weight is a corner of such a tensor in channels-last memory, as loading/prepare.py allocates
    it: its strides and the size of its storage show that.
    """
    filters, channels, height, width = weight.shape
    o, c = filters + -filters % 8, channels + -channels % 8
    if (o, c) == (filters, channels):
        return weight
    strides, numbers = (height * width * c, 1, width * c, c), o * height * width * c
    if weight.stride() == strides and weight.untyped_storage().nbytes() == numbers * weight.element_size():
        return weight.as_strided((o, c, height, width), strides)
    return _channels_last(F.pad(weight, (0, 0, 0, 0, 0, c - channels, 0, o - filters)))


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Enlarge, then convolve."""
    return conv2d_reference(F.interpolate(x, size=(height, width), mode="nearest"), weight, bias, padding=1)


def upsample_conv2d_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, phases: Tensor | None = None
) -> Tensor:
    """PyTorch's fastest way: a transposed convolution by the phases where that is faster, else enlarge and convolve."""
    batch, _, h, w = x.shape
    exporting = torch.compiler.is_compiling()  # what is exported would sum the phases at each call
    if (height, width) != (2 * h, 2 * w) or exporting or (phases is None and batch * h * w < _PHASES_FROM):
        return conv2d_torch(F.interpolate(x, size=(height, width), mode="nearest"), weight, bias, padding=1)
    if phases is None:
        phases = upsample_phases(weight)
    if not fast_library(x):
        return float32.convolve(x, phases, bias, 2, 1, transposed=True)
    return bias_residual(_convolve(x, phases, 2, 1, transposed=True), bias, None)


def upsample_phases(weight: Tensor) -> Tensor:
    """The 4x4 kernel (C, O, 4, 4) of the transposed convolution that is upsampling and then weight (O, C, 3, 3).

    Sums over 2x2 boxes, mirrored. Pooling sums in float32 and rounds once, whatever the dtype. Channels-last, as
    `upsample_conv2d` takes them. A caller may cache them, and must compute them again when the weight changes.
    """
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (O, C, 4, 4)
    return _channels_last(sums.flip(2, 3).transpose(0, 1))


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool = False) -> Tensor:
    """PyTorch's convolution without a bias, by cuDNN's fastest plan for this shape; 16-bit dtypes.

    The settings that F.conv2d reads from torch.backends.cudnn are arguments here. cuDNN reuses the plan that it has for
    a shape, from a search or not, so a search at the first call serves all later ones of this thread. The capture of a
    CUDA graph cannot contain a search: run each shape once before, or it gets the plan that cuDNN guesses.
    """
    strides, paddings, dilation = (stride, stride), (padding, padding), (1, 1)
    if x.is_meta:  # `_convolution` has no meta function before torch 2.12
        return _channels_last(torch.convolution(x, weight, None, strides, paddings, dilation, transposed, (0, 0), 1))
    cudnn = torch.backends.cudnn
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    search = not (capturing or deterministic)  # another search may find another plan, which rounds differently
    out = torch._convolution(
        x, weight, None, strides, paddings, dilation, transposed, (0, 0), 1, search, deterministic, cudnn.enabled, True
    )
    return _channels_last(out)  # no copy, if cuDNN ran


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------- where the kernel applies, and its cost


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Verdict:
    if not (verdict := supports_dtypes(x, weight, bias, residual)):
        return verdict
    if weight.shape[1] % 8:
        return no(f"{weight.shape[1]} input channels are no multiple of 8: pixels are not 16 bytes aligned")
    for name, image in (("x", x), ("weight", weight), ("residual", residual)):
        if image is not None and not image.is_contiguous(memory_format=torch.channels_last):
            return no(f"{name} {tuple(image.shape)} with strides {tuple(image.stride())} is not channels-last")
    return YES


def upsample_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, phases: Tensor | None = None
) -> Verdict:
    if (height, width) != (2 * x.shape[2], 2 * x.shape[3]):
        return no(f"{x.shape[2]}x{x.shape[3]} to {height}x{width} does not double height and width")
    if phases is not None and not phases.is_contiguous(memory_format=torch.channels_last):
        return no("the phases are not channels-last")
    return supports(x, weight, bias)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Cost:
    batch, height, width = out_size(x, weight, stride, padding)
    pixels = batch * height * width
    elements = x.numel() + weight.numel() + pixels * weight.shape[0] * (1 if residual is None else 2)
    return Cost(flop=2 * pixels * weight.numel(), bytes=elements * x.element_size())


def upsample_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, phases: Tensor | None = None
) -> Cost:
    """With phases where they apply: 4 taps for each pixel of the output and 16 for each pair of channels."""
    doubles = (height, width) == (2 * x.shape[2], 2 * x.shape[3])
    pairs, pixels = weight.shape[0] * weight.shape[1], x.shape[0] * height * width
    elements = x.numel() + pairs * (16 if phases is not None else 9) + pixels * weight.shape[0]
    return Cost(flop=2 * pixels * pairs * (4 if doubles else 9), bytes=elements * x.element_size())


def out_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int]:
    """Batch, height and width of the output."""
    batch, _, height, width = x.shape
    reach = 2 * padding - weight.shape[2]
    return batch, (height + reach) // stride + 1, (width + reach) // stride + 1


# ----------------------------------------------------------------------------------------------- configurations


def _sizes(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int]:
    """M, N and K of the matrix product."""
    batch, height, width = out_size(x, weight, stride, padding)
    return batch * height * width, weight.shape[0], weight[0].numel()


def is_candidate(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> bool:
    return is_competitive(config, SPACE, *_sizes(x, weight, stride, padding), capability(x))


def upsample_is_candidate(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    phases: Tensor | None = None,
) -> bool:
    pixels, filters, channels = x.shape[0] * height * width, weight.shape[0], weight.shape[1]
    return is_competitive(config, UPSAMPLE_SPACE, pixels, filters, 4 * channels, capability(x))


def shape_class(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> str:
    m, n, k = _sizes(x, weight, stride, padding)
    return f"m{power_of_2(m)} n{n} k{k}" + ("" if stride == 1 else " strided")


def upsample_shape_class(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, phases: Tensor | None = None
) -> str:
    return f"m{power_of_2(x.shape[0] * height * width)} n{weight.shape[0]} k{4 * weight.shape[1]}"


# A phase's pixels take more registers: with two accumulators and the bounds of a split some would spill.
UPSAMPLE_SPACE = [config for config in SPACE if not ("MORE_N" in config and config["SPLIT"] > 1)]


@functools.cache
def upsample_default(shape: str, arch: int) -> Config:
    """The default of the matrix product; the four phases count as one product with all pixels of the output."""
    m, n, k = map(int, re.findall(r"\d+", shape))
    return min(UPSAMPLE_SPACE, key=lambda config: estimate(config, m, n, k, arch))


def faster(shape: str, arch: int) -> bool:
    """Whether the kernel is predicted to be faster than cuDNN and a pass for bias and residual; see the top."""
    return _is_faster(default(shape, arch), shape, arch)


def upsample_faster(shape: str, arch: int) -> bool:
    return _is_faster(upsample_default(shape, arch), shape, arch)


def _is_faster(config: Config, shape: str, arch: int) -> bool:
    """On Hopper, with a tile that libraries lack: of 160 columns, walking far enough along K; or of 16."""
    k = int(re.findall(r"\d+", shape)[2])
    wide = "MORE_N" in config and cdiv(k, config["SPLIT"]) >= _STEPS_FROM * config["BLOCK_K"]
    return arch == 90 and (wide or config["BLOCK_N"] == 16)


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _conv_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    moments,
    m,
    filters,
    channels,
    height,
    width,
    out_height,
    out_width,
    weight_filter,
    weight_channel,
    weight_tap,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MORE_N: tl.constexpr = 0,
):
    """m pixels of the output, or of one phase of it, times `filters` channels. TAPS: on one side of the kernel.

    moments: where mean and M2 of each channel of a tile are written, for tiles that are full: (2, tiles, filters).
    """
    program = tl.program_id(0)
    if UPSAMPLE:  # the phases of a tile run side by side, for they read the same pixels
        down = program % 4 // 2
        right = program % 2
        program = program // 4
    row_tile, column_tile = tile_of(program, tl.cdiv(m, BLOCK_M), tl.cdiv(filters, BLOCK_N + MORE_N))
    pixel = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_tile * (BLOCK_N + MORE_N)
    inner = tl.arange(0, BLOCK_K)

    # A pixel's position in its image, the pixel of x under the kernel's first tap, and the row of the output.
    image_x = pixel % out_width
    image_y = pixel // out_width % out_height
    image = pixel // (out_width * out_height)
    if UPSAMPLE:  # out_height and out_width are those of x: a phase has as many pixels
        top = image_y + down - 1
        left = image_x + right - 1
    else:
        top = image_y * STRIDE - PADDING
        left = image_x * STRIDE - PADDING
    origin = (image * height + top) * width + left
    top = tl.where(pixel < m, top, -height - TAPS)  # no tap of a pixel beyond the end is inside
    x += origin.to(tl.int64)[:, None] * channels + inner[None, :]  # (BLOCK_M, BLOCK_K)
    along = inner[:, None] * weight_channel  # distances in a weight fit 32 bits, half the registers of addresses
    columns = along + column_of(first, filters, BLOCK_N) * weight_filter  # (BLOCK_K, BLOCK_N)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MORE_N:
        more_columns = along + column_of(first + BLOCK_N, filters, MORE_N) * weight_filter  # (BLOCK_K, MORE_N)
        more = tl.zeros((BLOCK_M, MORE_N), tl.float32)

    split = tl.program_id(1)
    blocks = tl.cdiv(channels, BLOCK_K)
    steps = TAPS * TAPS * blocks
    for step in range(split * steps // SPLIT, (split + 1) * steps // SPLIT):
        tap = step // blocks
        channel = (step - tap * blocks) * BLOCK_K
        i = tap // TAPS
        j = tap % TAPS
        valid = (top + i).to(tl.uint32) < height  # negative numbers are large ones
        if PADDING:
            valid &= (left + j).to(tl.uint32) < width
        if UPSAMPLE:  # every other tap of the 4x4 kernel, last to first
            tap = (3 - 2 * i - down) * 4 + 3 - 2 * j - right
        source = x + ((i * width + j) * channels + channel)
        factors = weight + (tap * weight_tap + channel * weight_channel)
        if EVEN_K:
            a = tl.load(source, valid[:, None], other=0.0)
            b = tl.load(factors + columns)
        else:
            a = tl.load(source, valid[:, None] & (inner < channels - channel)[None, :], other=0.0)
            b = tl.load(factors + columns, (inner < channels - channel)[:, None], other=0.0)
        tile = tl.dot(a, b, tile)
        if MORE_N:
            if EVEN_K:
                b = tl.load(factors + more_columns)
            else:
                b = tl.load(factors + more_columns, (inner < channels - channel)[:, None], other=0.0)
            more = tl.dot(a, b, more)

    row, rows = pixel, m
    if UPSAMPLE:  # every other pixel; from those under the first tap, which are at hand
        row = (image * 2 * height + 2 * (top + 1) - down) * 2 * width + 2 * (left + 1) - right
        rows = 4 * m
    out_row = row.to(tl.int64) + split.to(tl.int64) * rows  # with splits, out is the workspace (SPLIT, rows, filters)
    out_row, row_mask = out_row[:, None], (pixel < m)[:, None]
    second = first + BLOCK_N
    if moments is not None:
        square = tl.cdiv(m, BLOCK_M) * filters  # from the means to the M2
        moments += row_tile * filters
        if MORE_N:  # first, for its registers
            _finish_half(more, bias, residual, out, moments, square, out_row, second, filters, BLOCK_M, MORE_N)
        if BLOCK_M * BLOCK_N > 8192:  # as `finish` does
            left, right = halves(tile, BLOCK_M, BLOCK_N)
            middle = first + BLOCK_N // 2
            _finish_half(left, bias, residual, out, moments, square, out_row, first, filters, BLOCK_M, BLOCK_N // 2)
            _finish_half(right, bias, residual, out, moments, square, out_row, middle, filters, BLOCK_M, BLOCK_N // 2)
        else:
            _finish_half(tile, bias, residual, out, moments, square, out_row, first, filters, BLOCK_M, BLOCK_N)
    else:
        if MORE_N:
            finish(more, None, None, bias, residual, None, out, out_row, row_mask, second, filters, BLOCK_M, MORE_N)
        finish(tile, None, None, bias, residual, None, out, out_row, row_mask, first, filters, BLOCK_M, BLOCK_N)


@jit
def _finish_half(
    tile, bias, residual, out, moments, square, row, first, filters, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Add bias and residual to a float32 tile (M, N), write it, and the moments of each of its columns as written."""
    column = first + tl.arange(0, N)
    mask = column < filters
    if bias is not None:
        tile += tl.load(bias + column, mask, other=0.0).to(tl.float32)[None, :]
    place = row * filters + column[None, :]
    if residual is not None:
        tile += tl.load(residual + place, mask[None, :], other=0.0).to(tl.float32)
    written = tile.to(out.dtype.element_ty)
    tl.store(out + place, written, mask[None, :])
    tile = written.to(tl.float32)
    mean = tl.sum(tile, 0) / M
    deviation = tile - mean[None, :]
    tl.store(moments + column, mean, mask)
    tl.store(moments + square + column, tl.sum(deviation * deviation, 0), mask)


def conv2d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    config = CONV2D.config(x, weight, bias, residual, stride, padding)
    out = x.new_empty((*out_size(x, weight, stride, padding), weight.shape[0]))
    convolve(x, weight, bias, residual, stride, padding, out, config)
    return out.permute(0, 3, 1, 2)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: int,
    out: Tensor,
    config: Config,
    moments: Tensor | None = None,
    summed: bool = True,
) -> Tensor | None:
    """Launch the kernels of `conv2d` for out (B, H', W', O). moments (2, B * H' * W' / BLOCK_M, O), float32, of each
    channel of that many pixels: written where a tile is one image's and the product is not split.

    Where the product is split and not to be `summed`, nothing but the partial sums (SPLIT, B, H', W', O) is written:
    they are returned, in float32, without bias and residual.
    """
    taps, channels = weight.shape[2], weight.shape[1]
    shape = {"TAPS": taps, "STRIDE": stride, "PADDING": padding, "UPSAMPLE": False}
    strides = (taps * taps * channels, 1, channels)
    return _launch(x, weight, bias, residual, out, strides, shape, config, moments, summed)


def upsample_conv2d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, phases: Tensor | None = None
) -> Tensor:
    config = UPSAMPLE_CONV2D.config(x, weight, bias, height, width, phases)
    if phases is None:
        phases = upsample_phases(weight)
    filters = weight.shape[0]
    out = x.new_empty((x.shape[0], height, width, filters))
    shape = {"TAPS": 2, "STRIDE": 1, "PADDING": 1, "UPSAMPLE": True}
    _launch(x, phases, bias, None, out, (1, 16 * filters, filters), shape, config)
    return out.permute(0, 3, 1, 2)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,  # (B, H', W', O)
    weight_strides: tuple[int, int, int],  # between filters, channels, taps
    shape: dict[str, int],
    config: Config,
    moments: Tensor | None = None,
    summed: bool = True,
) -> Tensor | None:
    _, channels, height, width = x.shape
    _, out_height, out_width, filters = out.shape
    phases = 4 if shape["UPSAMPLE"] else 1
    rows = out.numel() // filters
    m, split = rows // phases, config["SPLIT"]
    if phases == 4:
        out_height, out_width = height, width
    if split == 1:
        target, epilogue = out, (bias, residual)
    else:
        target, epilogue = x.new_empty((split, rows, filters), dtype=torch.float32), (None, None)
    grid = (phases * cdiv(m, config["BLOCK_M"]) * cdiv(filters, columns_of(config)), split)
    sizes = (m, filters, channels, height, width, out_height, out_width, *weight_strides)
    even = channels % config["BLOCK_K"] == 0
    launch(_conv_kernel, grid, x, weight, *epilogue, target, moments, *sizes, **shape, EVEN_K=even, **config)
    if split > 1 and summed:
        sum_splits(target, None, bias, residual, None, out)
    return None if split == 1 or summed else target.view(split, *out.shape)


# ---------------------------------------------------------------------------------------------------------- ops

CONV2D = Op(
    "conv2d",
    reference=conv2d_torch,
    triton=conv2d_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    prefer="torch",  # elsewhere, until a measured table says where the kernel is faster than cuDNN
    faster=faster,
)

UPSAMPLE_CONV2D = Op(
    "upsample_conv2d",
    reference=upsample_conv2d_torch,
    triton=upsample_conv2d_triton,
    supports=upsample_supports,
    shape_class=upsample_shape_class,
    cost=upsample_cost,
    default=upsample_default,
    space=UPSAMPLE_SPACE,
    is_candidate=upsample_is_candidate,
    prefer="torch",
    faster=upsample_faster,
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve x (B, C, H, W) with weight (O, C, K, K), add bias (O,) and residual (B, O, H', W'), in x's dtype."""
    return CONV2D(*in_eights(x, weight), bias, residual, stride, padding)


def in_eights(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight with channels that the kernel takes, where nothing else may be taken: 8 for a latent's 4."""
    missing = -x.shape[1] % 8
    if missing and is_batch_invariant():
        x, weight = F.pad(x, (0, 0, 0, 0, 0, missing)), pad_to_eights(weight)[: weight.shape[0]]
    return x, weight


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int], *, phases: Tensor | None = None
) -> Tensor:
    """Enlarge x (B, C, H, W) to `size` (height, width), convolve with weight (O, C, 3, 3): (B, O, *size).

    phases: upsample_phases(weight) of the current weight, if the caller has cached them.
    """
    if is_batch_invariant() and size != (2 * x.shape[2], 2 * x.shape[3]):  # the kernel doubles
        return conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)
    return UPSAMPLE_CONV2D(x, weight, bias, *size, phases)
