"""Device memory, planned: the buffers of a size bucket, named and allocated before its first step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.config import UNetConfig
from fastldm.kernels.step import StepState


class StaticBuffers(NamedTuple):
    """All that the steps of a bucket read and write: S slots, R rows of the U-Net, texts of up to T tokens.

    Allocated once, written in place and never replaced: captured steps go on reading them. A slot has two texts, the
    negative prompt's (2 * slot) and the prompt's (2 * slot + 1).
    """

    step: StepState  # latents, anchor, history, model input, noise, tables, counters, guidance, row maps
    temb: Tensor  # (2S, steps, channels) the network's dtype: `UNet.time_rows` of each text and step
    text: tuple[Tensor, ...]  # of each cross-attention (2S, T, 2C): `UNet.cross_kv`
    kv_len: Tensor  # (2S,) int32: the tokens of each text
    maps: Tensor  # (3, R) int32: of each U-Net row its text, its slot, and the first of its text's rows in temb

    @staticmethod
    def empty(
        config: UNetConfig,
        *,
        slots: int,
        rows: int,
        height: int,
        width: int,
        tokens: int,
        steps: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> StaticBuffers:
        """height, width: of the latents. steps: the most that a slot's table has, and the most that it draws."""
        channels = config.out_channels
        return StaticBuffers(
            step=StepState.empty(
                slots=slots,
                rows=rows,
                channels=channels,
                height=height,
                width=width,
                steps=steps,
                draws=steps,
                extra_channels=config.in_channels - channels,
                masked=True,
                dtype=dtype,
                device=device,
            ),
            temb=torch.zeros(2 * slots, steps, config.time_channels, dtype=dtype, device=device),
            text=tuple(
                torch.zeros(2 * slots, tokens, 2 * width, dtype=dtype, device=device) for width in config.cross_widths
            ),
            kv_len=torch.zeros(2 * slots, dtype=torch.int32, device=device),
            maps=torch.zeros(3, rows, dtype=torch.int32, device=device),
        )
