"""The factor by which guidance is multiplied so that it deviates as little as the guided branch alone.

    mixed  = u + g * (c - u)                                        c, u: what the network predicts with and without
    factor = 1 - phi + phi * std(c) / std(mixed)                          the prompt; g: the scale; phi: the rescale

Over all C*h*w numbers of a sample. Formula: Lin et al. 2023, arXiv:2305.08891, section 3.4.

The op writes the factor of each slot of a `StepState` (step.py) that rescales; the kernel that ends the step multiplies
by it. Two deviations over a whole sample come before anything can be multiplied, so it is a kernel of its own, launched
only where a slot rescales. One program takes a slot, so that its sums have one order, in two passes, so that they do
not cancel.

Bytes: both rows of out, read twice, the second time from a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastldm.kernels.dispatch import YES, Config, Cost, Op, Verdict, jit, launch, next_power_of_2, no

if TYPE_CHECKING:
    import triton.language as tl


def rescale_factor(guided: Tensor, mixed: Tensor, rescale: float) -> Tensor:
    """The formula for samples (B, C, h, w): (B, 1, 1, 1)."""
    dims = tuple(range(1, mixed.ndim))
    ratio = guided.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
    return 1 - rescale + rescale * ratio


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def guidance_rescale_reference(
    out: Tensor,
    counter: Tensor,
    steps: Tensor,
    guidance: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
) -> None:
    """Slot after slot, by the formula."""
    for slot, (i, end) in enumerate(zip(counter.tolist(), steps.tolist(), strict=True)):
        unguided_row, guided_row = rows[slot].tolist()
        if i >= end or rescale[slot] == 0 or unguided_row < 0:
            continue
        unguided, guided = at_least_float32(out[[unguided_row, guided_row]]).chunk(2)
        mixed = torch.lerp(unguided, guided, float(guidance[slot]))
        factor[slot] = rescale_factor(guided, mixed, float(rescale[slot])).squeeze()


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
    row = torch.arange(slots) % rows
    pairs = torch.stack((row, row + slots) if rows >= 2 * slots else (torch.full_like(row, -1), row), 1)
    return {"counter": torch.zeros(slots), "steps": torch.full((slots,), steps), "rows": pairs}


def example_values(out: Tensor, counter: Tensor, *_: Tensor, **__: Tensor) -> dict[str, Tensor]:
    slots = len(counter)
    return example_slots(slots, len(out), 1) | {"rescale": torch.full((slots,), 0.7)}


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
def lerp(start, end, weight):
    """torch.lerp: from the nearer end, so that both ends are exact."""
    span = end - start
    return tl.where(weight < 0.5, start + weight * span, end - (1.0 - weight) * span)


@jit
def _guidance_rescale_kernel(
    out,
    counter,
    steps,
    guidance,
    rescale,
    factor,
    rows,
    pixels,
    out_row,
    out_channel,
    OUT_PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    slot = tl.program_id(0)
    phi = tl.load(rescale + slot)
    unguided_row = tl.load(rows + 2 * slot).to(tl.int64)
    guided_row = tl.load(rows + 2 * slot + 1).to(tl.int64)
    if (tl.load(counter + slot) >= tl.load(steps + slot)) | (phi == 0.0) | (unguided_row < 0):
        return
    scale = tl.load(guidance + slot)
    block = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, LANES)[None, :]
    count = CHANNELS * pixels

    guided_sum = tl.zeros((PIXELS, LANES), tl.float32)
    mixed_sum = tl.zeros((PIXELS, LANES), tl.float32)
    for start in range(0, pixels, PIXELS):
        mask = (start + block < pixels) & (channel < CHANNELS)
        at = out + channel * out_channel + (start + block) * OUT_PIXEL
        guided = tl.load(at + guided_row * out_row, mask, other=0.0).to(tl.float32)
        unguided = tl.load(at + unguided_row * out_row, mask, other=0.0).to(tl.float32)
        guided_sum += guided
        mixed_sum += lerp(unguided, guided, scale)
    guided_mean = tl.sum(guided_sum) / count
    mixed_mean = tl.sum(mixed_sum) / count

    guided_squares = tl.zeros((PIXELS, LANES), tl.float32)
    mixed_squares = tl.zeros((PIXELS, LANES), tl.float32)
    for start in range(0, pixels, PIXELS):
        mask = (start + block < pixels) & (channel < CHANNELS)
        at = out + channel * out_channel + (start + block) * OUT_PIXEL
        guided = tl.load(at + guided_row * out_row, mask, other=0.0).to(tl.float32)
        unguided = tl.load(at + unguided_row * out_row, mask, other=0.0).to(tl.float32)
        guided_deviation = tl.where(mask, guided - guided_mean, 0.0)
        mixed_deviation = tl.where(mask, lerp(unguided, guided, scale) - mixed_mean, 0.0)
        guided_squares += guided_deviation * guided_deviation
        mixed_squares += mixed_deviation * mixed_deviation
    ratio = tl.sqrt(tl.sum(guided_squares) / tl.sum(mixed_squares))  # both over count - 1
    tl.store(factor + slot, 1.0 - phi + phi * ratio)


def guidance_rescale_triton(
    out: Tensor,
    counter: Tensor,
    steps: Tensor,
    guidance: Tensor,
    rescale: Tensor,
    factor: Tensor,
    rows: Tensor,
) -> None:
    config = GUIDANCE_RESCALE.config(out)
    launch(
        _guidance_rescale_kernel,
        (counter.numel(),),
        *(out, counter, steps, guidance, rescale, factor, rows),
        *(out.shape[2] * out.shape[3], out.stride(0), out.stride(1)),
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
