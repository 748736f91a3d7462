"""The factor by which guidance is multiplied so that it deviates as little as the guided branch alone.

    mixed  = w0 * row0 + w1 * row1 + w2 * row2                      rows of the U-Net, row1 guided; w: as in step.py
    factor = 1 - phi + phi * std(row1) / std(mixed)                 phi: the rescale

Over all C*h*w numbers of a sample. Formula: Lin et al. 2023, arXiv:2305.08891, section 3.4.

The op writes the factor of each slot of a `StepState` (step.py) that rescales, and whose next row has several weights;
the kernel that ends the step multiplies by it. Two deviations over a whole sample come before anything can be
multiplied, so it is a kernel of its own, launched only where a slot rescales. One program takes a slot, so that its
sums have one order, in two passes, so that they do not cancel.

Bytes: all rows of out, read twice, the second time from a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, jit, launch, next_power_of_2, no

if TYPE_CHECKING:
    import triton.language as tl

W0 = 18  # where w0, w1 and w2 lie in a row of a table, see step.py


def rescale_factor(guided: Tensor, mixed: Tensor, rescale: float) -> Tensor:
    """The formula for samples (B, C, h, w): (B, 1, 1, 1)."""
    dims = tuple(range(1, mixed.ndim))
    ratio = guided.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
    return 1 - rescale + rescale * ratio


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def guidance_rescale_reference(
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    steps: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
) -> None:
    """Slot after slot, by the formula."""
    for slot, (i, end) in enumerate(zip(counter.tolist(), steps.tolist(), strict=True)):
        if i >= end or rescale[slot] == 0:
            continue
        weights = table[slot, i, W0 : W0 + 3].tolist()
        if weights[0] == 0 and weights[2] == 0:
            continue
        branches = [at_least_float32(out[r, None]) for r in rows[slot].tolist()]  # one of weight 0 is any
        mixed = sum(w * branch for w, branch in zip(weights, branches, strict=True) if w)
        assert isinstance(mixed, Tensor)
        factor[slot] = rescale_factor(branches[1], mixed, float(rescale[slot])).squeeze()


def pixels_supported(t: Tensor) -> Verdict:
    """What the kernels take of a tensor that the network reads or writes: pixels at one stride, and few channels."""
    if not t.is_floating_point():
        return no(f"dtype {t.dtype}")
    if t.shape[1] > 64:
        return no(f"{t.shape[1]} channels are more than 64: a program takes all of a pixel's")
    if t.stride(2) != t.shape[3] * t.stride(3):
        return no(f"rows of pixels are not adjacent: {tuple(t.shape)} with strides {tuple(t.stride())}")
    return YES


def supports(out: Tensor, *state: Tensor, **named: Tensor) -> Verdict:
    return pixels_supported(out)


def cost(out: Tensor, *_: object, **__: object) -> Cost:
    return Cost(flop=0, bytes=out.numel() * out.element_size())


def example_slots(slots: int, rows: int, steps: int) -> dict[str, Tensor]:
    """Slots at the first of `steps` rows of their tables, guided where the network has two rows for each."""
    row, none = torch.arange(slots) % rows, torch.full((slots,), -1)
    branches = torch.stack((row, row + slots, none) if rows >= 2 * slots else (none, row, none), 1)
    return {"counter": torch.zeros(slots), "steps": torch.full((slots,), steps), "rows": branches}


def example_values(out: Tensor, table: Tensor, *_: Tensor, **__: Tensor) -> dict[str, Tensor]:
    slots, steps, width = table.shape
    values = example_slots(slots, len(out), steps)
    weights = (-6.5, 7.5, 0.0) if len(out) >= 2 * slots else (0.0, 1.0, 0.0)
    row = torch.zeros(width).index_copy_(0, torch.arange(W0, W0 + 3), torch.tensor(weights))
    return values | {"table": row.expand(slots, steps, -1), "rescale": torch.full((slots,), 0.7)}


# ----------------------------------------------------------------------------------------------- configurations

SPACE = [{"PIXELS": pixels, "num_warps": warps} for pixels in (128, 512, 1024, 2048) for warps in (4, 8, 16, 32)]


def is_candidate(config: Config, out: Tensor, *_: object, **__: object) -> bool:
    """4 to 16 elements for each thread, so that 1024 threads have registers for them."""
    return 4 <= config["PIXELS"] * next_power_of_2(out.shape[1]) // (32 * config["num_warps"]) <= 16


def shape_class(out: Tensor, *_: object, **__: object) -> str:
    return f"c{out.shape[1]}"


def default(shape: str, arch: int) -> Config:
    """8 elements a thread: SD1.5's 4096 pixels in 2 blocks, the second pass from the first level of cache."""
    return {"PIXELS": max(8192 // next_power_of_2(int(shape[1:])), 16), "num_warps": 32}


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _row(out, row, weight, at, mask):
    """A row of the U-Net, in float32; where its weight is 0, zeros, and nothing is read."""
    needed = mask & (weight + tl.zeros(mask.shape, tl.float32) != 0.0)
    return tl.load(out + row + at, needed, other=0.0).to(tl.float32)


@jit
def _guidance_rescale_kernel(
    out,
    table,
    counter,
    steps,
    rescale,
    factor,
    rows,
    capacity,
    pixels,
    out_row,
    out_channel,
    OUT_PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    phi = tl.load(rescale + slot)
    i = tl.load(counter + slot)
    if (i >= tl.load(steps + slot)) | (phi == 0.0):
        return
    row = table + (slot * capacity + i) * 32 + 18
    w0 = tl.load(row)
    w1 = tl.load(row + 1)
    w2 = tl.load(row + 2)
    if (w0 == 0.0) & (w2 == 0.0):
        return
    row0 = tl.load(rows + 3 * slot).to(tl.int64) * out_row
    row1 = tl.load(rows + 3 * slot + 1).to(tl.int64) * out_row
    row2 = tl.load(rows + 3 * slot + 2).to(tl.int64) * out_row
    block = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, LANES)[None, :]
    count = CHANNELS * pixels

    guided_sum = tl.zeros((PIXELS, LANES), tl.float32)
    mixed_sum = tl.zeros((PIXELS, LANES), tl.float32)
    for start in range(0, pixels, PIXELS):
        mask = (start + block < pixels) & (channel < CHANNELS)
        at = channel * out_channel + (start + block) * OUT_PIXEL
        guided = tl.load(out + row1 + at, mask, other=0.0).to(tl.float32)
        guided_sum += guided
        mixed_sum += w0 * _row(out, row0, w0, at, mask) + w1 * guided + w2 * _row(out, row2, w2, at, mask)
    guided_mean = tl.sum(guided_sum) / count
    mixed_mean = tl.sum(mixed_sum) / count

    guided_squares = tl.zeros((PIXELS, LANES), tl.float32)
    mixed_squares = tl.zeros((PIXELS, LANES), tl.float32)
    for start in range(0, pixels, PIXELS):
        mask = (start + block < pixels) & (channel < CHANNELS)
        at = channel * out_channel + (start + block) * OUT_PIXEL
        guided = tl.load(out + row1 + at, mask, other=0.0).to(tl.float32)
        mixed = w0 * _row(out, row0, w0, at, mask) + w1 * guided + w2 * _row(out, row2, w2, at, mask)
        guided_deviation = tl.where(mask, guided - guided_mean, 0.0)
        mixed_deviation = tl.where(mask, mixed - mixed_mean, 0.0)
        guided_squares += guided_deviation * guided_deviation
        mixed_squares += mixed_deviation * mixed_deviation
    ratio = tl.sqrt(tl.sum(guided_squares) / tl.sum(mixed_squares))  # both over count - 1
    tl.store(factor + slot, 1.0 - phi + phi * ratio)


def guidance_rescale_triton(
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    steps: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
) -> None:
    config = GUIDANCE_RESCALE.config(out)
    launch(
        _guidance_rescale_kernel,
        (counter.numel(),),
        *(out, table, counter, steps, rescale, factor, rows),
        *(table.shape[1], out.shape[2] * out.shape[3], out.stride(0), out.stride(1)),
        OUT_PIXEL=out.stride(3),
        CHANNELS=out.shape[1],
        LANES=next_power_of_2(out.shape[1]),
        **config,
    )


# ----------------------------------------------------------------------------------------------------------- op

GUIDANCE_RESCALE = Op(
    "guidance_rescale",
    reference=guidance_rescale_reference,
    triton=guidance_rescale_triton,
    supports=supports,
    shape_class=shape_class,
    cost=cost,
    default=default,
    space=SPACE,
    is_candidate=is_candidate,
    mutates=("factor",),
    example_values=example_values,
)
