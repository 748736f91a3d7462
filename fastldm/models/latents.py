"""Latents as an autoencoder has them, and as its U-Net has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.device import send
from fastldm.models.config import AutoencoderConfig


def scaled(config: AutoencoderConfig, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) of an autoencoder as its U-Net has them: z * scaling_factor, or
    (z - latents_mean) * scaling_factor / latents_std where the configuration has those."""
    if not config.latents_std:
        return z * config.scaling_factor
    mean, std = (_by_channel(numbers, z) for numbers in (config.latents_mean, config.latents_std))
    return (z - mean) * config.scaling_factor / std


def unscaled(config: AutoencoderConfig, latents: Tensor) -> Tensor:
    """The inverse of `scaled`."""
    if not config.latents_std:
        return latents / config.scaling_factor
    mean, std = (_by_channel(numbers, latents) for numbers in (config.latents_mean, config.latents_std))
    return latents * std / config.scaling_factor + mean


def _by_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return send(torch.tensor(numbers), like.device, like.dtype).view(1, -1, 1, 1)
