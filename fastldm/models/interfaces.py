"""Protocols of a pipeline's networks: PyTorch's modules, or engines that replace them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastldm.models.config import AutoencoderConfig, TextConfig, UNetConfig
from fastldm.models.layers import Beside

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AddedConditions:
    """SDXL's conditions in the time embedding, one row per U-Net row."""

    text_embeds: Tensor  # (R, P) pooled text
    time_ids: Tensor  # (R, 6) original height and width, crop top and left, target height and width, in pixels


class TextEncoder(Protocol):
    """See models.clip.CLIPText."""

    @property
    def config(self) -> TextConfig: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, input_ids: Tensor, skip: int = 0, final_norm: bool = True) -> tuple[Tensor, Tensor | None]: ...


class Denoiser(Protocol):
    """See models.unet.UNet."""

    beside: Beside

    @property
    def config(self) -> UNetConfig: ...

    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor: ...

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]: ...

    def step(
        self, model_input: Tensor, temb_row: Tensor, cross_kv: Sequence[Tensor], *, kv_len: Tensor | None = None
    ) -> Tensor: ...


class Autoencoder(Protocol):
    """See models.vae.AutoencoderKL."""

    @property
    def config(self) -> AutoencoderConfig: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def decoding(self) -> list[Layer]: ...


class VectorNormalizer(Protocol):
    """See models.clip_vision.Normalizer."""

    def __call__(self, embeds: Tensor, noise: Tensor, rates: Tensor, level: Tensor) -> Tensor: ...
