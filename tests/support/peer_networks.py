"""Networks of diffusers and transformers, and ours with the same weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fastldm.kernels import linear
from fastldm.models import AutoencoderKL, CLIPText, UNet, layers, transformer
from fastldm.models.config import TextConfig, UNetConfig, VAEConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TOLERANCE = 1e-5  # of 1e-4 allowed; 2e-6 was the most seen. A wrong eps in a norm shows only below 2e-5


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def give(network: nn.Module, weights: dict[str, Tensor]) -> Any:
    return network.load_state_dict(weights, strict=True, assign=True) and network.eval()


@cache
def judge(name: str) -> UNet2DConditionModel:
    """A U-Net that no test changes."""
    return tiny.unet(name)


def config_of(theirs: Any, **changes: Any) -> UNetConfig:
    """Our config of a U-Net of diffusers, as of its file."""
    return UNetConfig.from_dict({**theirs.config, "_class_name": type(theirs).__name__, **changes})


def unet_of(theirs: nn.Module) -> UNet:
    """Our U-Net, built on meta, with the same weights."""
    with torch.device("meta"):
        ours = UNet(config_of(theirs))
    return give(ours, theirs.state_dict())


def text_of(theirs: nn.Module) -> CLIPText:
    config = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    with torch.device("meta"):
        ours = CLIPText(TextConfig.from_dict(config))
    prefix = "" if hasattr(theirs, "text_model") else "text_model."
    return give(ours, {prefix + name: value for name, value in theirs.state_dict().items()})


def vae_of(theirs: nn.Module) -> AutoencoderKL:
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig.from_dict({**theirs.config, "_class_name": type(theirs).__name__}))
    return give(ours, theirs.state_dict())


def inputs(theirs: UNet2DConditionModel, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two rows that differ in all they hold: latents, time step, text, pooled text, sizes, guidance."""
    g = torch.Generator().manual_seed(seed)
    config = theirs.config
    context = config.cross_attention_dim
    arguments = {
        "sample": torch.randn(2, config.in_channels, height, width, generator=g),
        "timestep": torch.tensor([999, 20 + seed]),
        "encoder_hidden_states": torch.randn(2, 11, context, generator=g),
    }
    if config.addition_embed_type:
        ids = (config.projection_class_embeddings_input_dim - 24) // config.addition_time_embed_dim  # the refiner has 5
        sizes = torch.randint(0, 2048, (2, ids), generator=g).float()
        arguments["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 24, generator=g), "time_ids": sizes}
    if config.num_class_embeds:
        arguments["class_labels"] = torch.tensor([20, 7 + seed])
    if config.time_cond_proj_dim:
        scale = torch.tensor([8.5, 2.0])  # a guidance scale of 8.5 enters the embedding as 7.5
        embed = tiny.peer("diffusers").LatentConsistencyModelPipeline.get_guidance_scale_embedding
        arguments["timestep_cond"] = embed(None, scale - 1, embedding_dim=config.time_cond_proj_dim)
    return arguments


def go_as_gpus_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks take the way that is made for GPUs, with the references of its ops."""
    for module in (layers, linear, transformer):
        monkeypatch.setattr(module, "fast_library", lambda x: True)
