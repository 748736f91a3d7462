"""States of kernels/step.py in which every term counts."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import ops
import torch
from torch import Tensor

from fastldm.kernels import dispatch
from fastldm.kernels.columns import COLUMNS, EXTRA, RARE
from fastldm.kernels.step import BRANCHES, StepState

SHAPES = {
    "sd15-like": {"height": 8, "width": 8},
    "odd": {"slots": 3, "height": 5, "width": 3},  # pixels no multiple of a block
    "one-pixel": {"slots": 1, "height": 1, "width": 1},
    "sixteen-channels": {"channels": 16},  # Stable Diffusion 3's latents
    "three-channels": {"channels": 3},  # a lane of each pixel is beyond the end
    "one-channel": {"channels": 1},
    "inpainting": {"extra_channels": 5},  # channels of u that are not the kernel's, at odd strides
}


# Columns behind COLUMNS: of most samplers, and with all that a row may have.
PLAIN = {"w0": -3.0, "w1": 4.0, "w2": 0.0, "masked": 1.0, "keep": 1.0, "draw": 2.0}
PLAIN |= dict.fromkeys(RARE, 0.0)
FULL = {**PLAIN, "w2": 0.7, "clip": 1.5, "o": -0.4, "d_ratio": 0.8, "gx": 0.3}


def in_blocks_of(pixels: int) -> AbstractContextManager[None]:
    """Programs of so many pixels, so that small images have several."""
    return dispatch.forced("end_step", {"PIXELS": pixels, "num_warps": 1})


def full_state(
    slots: int = 2,
    channels: int = 4,
    height: int = 5,
    width: int = 3,
    dtype: torch.dtype = torch.float32,
    extra_channels: int = 0,
    channels_last: bool = True,
    rare: bool = False,
) -> StepState:
    """Slots at different steps of tables that have no zero: everything is read, and everything is written.
    rare: what few samplers have, too."""
    branches = BRANCHES if rare else 2
    state = StepState.empty(
        slots=slots,
        rows=branches * slots,
        channels=channels,
        height=height,
        width=width,
        steps=6,
        draws=3,
        extra_channels=extra_channels,
        masked=True,
        channels_last=channels_last,
        dtype=dtype,
        device=ops.DEVICE,
    )
    for t in (state.u, state.x, state.y, state.history, state.noise, state.init, state.init_noise, state.table):
        t.normal_()
    state.mask.uniform_()
    behind = state.table[:, :, len(COLUMNS) :]
    behind[..., len(EXTRA) :] = math.nan
    for name, value in (FULL if rare else PLAIN).items():
        behind[..., EXTRA.index(name)] = value
    state.counter.copy_(torch.arange(slots) % 5)
    state.steps.fill_(6)
    state.rescale.fill_(0.5)
    state.factor.uniform_(0.8, 1.0)
    for rows in (state.rows, state.next_rows):  # each slot's rows are anywhere, and elsewhere in the next step
        rows[:, :branches] = torch.randperm(branches * slots).view(branches, slots).t().int()
    return state


def output_for(state: StepState, memory_format: torch.memory_format = torch.channels_last, channels: int = 0) -> Tensor:
    """channels: as many as the latents have if 0."""
    shape = (len(state.u), channels or state.x.shape[1], *state.x.shape[2:])
    return torch.randn(shape, device=ops.DEVICE).to(state.u.dtype).to(memory_format=memory_format)


def rescale_arguments(state: StepState, out: Tensor) -> dict[str, Tensor]:
    names = ("table", "counter", "steps", "rescale", "factor", "rows")
    return {"out": out, **{name: getattr(state, name) for name in names}}
