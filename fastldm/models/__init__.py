"""The networks, each built from its config (config.py) on any device, meta included, with uninitialised weights."""

from __future__ import annotations

from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder, rescale_for_half

__all__ = ["AddedConditions", "AutoencoderKL", "CLIPText", "TinyAutoencoder", "UNet", "rescale_for_half"]
