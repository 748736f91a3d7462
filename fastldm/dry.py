"""A model's run on tensors without storage: what it would launch and cost, known before a weight is read.

The networks are built on the meta device and run there as a request would run them. Whoever watches learns the rest:
`kernels.dispatch.observe` sees each op with its shapes, `kernels.dispatch.targeting` compiles each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastldm.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
from fastldm.kernels.step import StepState, end_step
from fastldm.loading import autoencoder
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet


@torch.no_grad()
def run_unet(config: UNetConfig, *, height: int, width: int, rows: int, tokens: int, dtype: torch.dtype) -> None:
    """All of one step for `rows` U-Net rows (2 for one guided picture): time rows, text keys and values, the network,
    the sampler.

    height, width: of the latents. tokens: the text's length, a multiple of the window where it has several.
    """
    with torch.device("meta"):
        unet = UNet(config).to(dtype)
        text = torch.empty(rows, tokens, config.cross_attention_dim, dtype=dtype)
        added = None
        if config.needs_added:
            pooled = config.addition_input_dim - 6 * config.addition_time_embed_dim
            added = AddedConditions(torch.empty(rows, pooled, dtype=dtype), torch.empty(rows, 6))
        guidance = torch.empty(rows) if config.needs_guidance else None
        temb = unet.time_rows(torch.empty(rows), added=added, guidance=guidance)
        out = unet.step(torch.empty(rows, config.in_channels, height, width, dtype=dtype), temb, unet.cross_kv(text))
    end_step(out, _slots(config, rows, height, width, dtype), rescales=True)


def _slots(config: UNetConfig, rows: int, height: int, width: int, dtype: torch.dtype) -> StepState:
    channels = config.out_channels
    return StepState.empty(
        slots=rows,
        rows=rows,
        channels=channels,
        height=height,
        width=width,
        steps=1,
        extra_channels=config.in_channels - channels,
        dtype=dtype,
        device="meta",
    )


@torch.no_grad()
def run_decoder(config: VAEConfig | TinyVAEConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> None:
    """Latents of height x width to pictures."""
    with torch.device("meta"):
        network = autoencoder(config).to(dtype)
        network.decode(torch.empty(batch, config.latent_channels, height, width, dtype=dtype))


@torch.no_grad()
def run_encoder(config: VAEConfig | TinyVAEConfig, *, height: int, width: int, batch: int, dtype: torch.dtype) -> None:
    """Pictures to latents of height x width."""
    with torch.device("meta"):
        network = autoencoder(config).to(dtype)
        factor = config.factor
        network.encode(torch.empty(batch, config.in_channels, height * factor, width * factor, dtype=dtype))


@torch.no_grad()
def run_text(configs: Sequence[TextConfig], *, batch: int, dtype: torch.dtype) -> None:
    """One window of text for each of `batch` prompts, through all encoders."""
    with torch.device("meta"):
        for config in configs:
            CLIPText(config).to(dtype)(torch.empty(batch, config.max_position, dtype=torch.long))
