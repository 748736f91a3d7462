"""U-Nets beyond Stable Diffusion's kind: small ones of diffusers, by family, and arguments for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import tiny
import torch
from torch import nn

RESNET_DOWN, RESNET_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
ATTN_DOWN, ATTN_UP = "AttnDownBlock2D", "AttnUpBlock2D"
SIMPLE_DOWN, SIMPLE_UP, SIMPLE = (
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnUpBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
)
K_DOWN, K_UP, K_CROSS_DOWN, K_CROSS_UP = "KDownBlock2D", "KUpBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnUpBlock2D"

_PIXELS: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "down_block_types": (tiny.DOWN, ATTN_DOWN, tiny.DOWN),
    "up_block_types": (tiny.UP, ATTN_UP, tiny.UP),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
_ADM = {
    **_PIXELS,
    "down_block_types": (RESNET_DOWN, ATTN_DOWN, ATTN_DOWN),
    "up_block_types": (ATTN_UP, ATTN_UP, RESNET_UP),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "num_class_embeds": 10,
    "out_channels": 6,
}
_SIMPLE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (16, 32, 48),
    "down_block_types": (RESNET_DOWN, SIMPLE_DOWN, SIMPLE_DOWN),
    "mid_block_type": SIMPLE,
    "up_block_types": (SIMPLE_UP, SIMPLE_UP, RESNET_UP),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
}
_IF = {
    **_SIMPLE,
    "act_fn": "gelu",
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 40,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}
_KANDINSKY = {
    **_SIMPLE,
    "in_channels": 4,
    "out_channels": 8,
    "encoder_hid_dim": 40,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
NETWORKS: dict[str, dict[str, Any]] = {
    # Ho et al.'s: one head, frequencies in the order of the paper, padding as of TensorFlow.
    "ddpm": {
        **_PIXELS,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 1.5,
    },
    # Unconditional latent diffusion, whose early files have the names of blocks that went before.
    "ldm": {
        **_PIXELS,
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
        "time_embedding_dim": 24,
    },
    "learned": {**_PIXELS, "time_embedding_type": "learned", "num_train_timesteps": 1000},
    "no-middle": {**_PIXELS, "mid_block_type": None},
    "adm": _ADM,
    # What its first versions were: without a norm before the middle's attention. A class in place of a table's row.
    "adm-timestep": {
        **_ADM,
        "attn_norm_num_groups": None,
        "num_class_embeds": None,
        "class_embed_type": "timestep",
        "act_fn": "gelu",
    },
    "karlo-super-resolution": {
        **_PIXELS,
        "in_channels": 6,
        "down_block_types": (RESNET_DOWN,) * 3,
        "up_block_types": (RESNET_UP,) * 3,
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": False,
    },
    "karlo-decoder": {**_SIMPLE, "class_embed_type": "identity"},
    "if-1": _IF,
    "if-2": {
        **_IF,
        "in_channels": 6,
        "class_embed_type": "timestep",
        "only_cross_attention": True,
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142,
        "mid_block_scale_factor": 1.4142,
    },
    "kandinsky": _KANDINSKY,
    "kandinsky-hint": {**_KANDINSKY, "in_channels": 8, "addition_embed_type": "image_hint"},
    "x2-upscaler": {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 5,
        "act_fn": "gelu",
        "attention_head_dim": 16,
        "block_out_channels": (32, 32, 64, 64),
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": 24,
        "cross_attention_norm": "layer_norm",
        "down_block_types": (K_DOWN, *[K_CROSS_DOWN] * 3),
        "mid_block_type": None,
        "up_block_types": (*[K_CROSS_UP] * 3, K_UP),
        "layers_per_block": 3,
        "norm_num_groups": None,
        "resnet_time_scale_shift": "scale_shift",
        "time_cond_proj_dim": 20,
        "time_embedding_dim": 64,
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
    },
}
PIXEL_NETWORKS = tuple(name for name, config in NETWORKS.items() if "cross_attention_dim" not in config)
"""Those of UNet2DModel."""


def network(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """diffusers' network."""
    make = getattr(tiny.peer("diffusers"), "UNet2DModel" if name in PIXEL_NETWORKS else "UNet2DConditionModel")
    return tiny.seeded(lambda: make(**{**NETWORKS[name], **changes}), seed)


@cache
def judge(name: str) -> nn.Module:
    """A network that no test changes."""
    return network(name)


def inputs(theirs: Any, height: int = 32, width: int = 16, seed: int = 0) -> dict[str, Any]:
    """Two rows that differ in all they hold, with diffusers' names of arguments."""
    g, config = torch.Generator().manual_seed(seed), theirs.config
    hinted = config.get("addition_embed_type") == "image_hint"
    arguments: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels - 4 * hinted, height, width, generator=g),
        "timestep": torch.tensor([999, 20 + seed]),
    }
    if config.get("time_embedding_type") == "fourier":  # a quarter of the logarithm of sigma
        arguments["timestep"] = torch.tensor([0.6, -0.2 + seed])
    if config.class_embed_type == "identity":
        arguments["class_labels"] = torch.randn(2, theirs.time_embedding.linear_2.out_features, generator=g)
    elif config.class_embed_type or config.num_class_embeds:
        arguments["class_labels"] = torch.tensor([3, 7 + seed])
    if config.get("cross_attention_dim") is None:
        return arguments
    context = config.encoder_hid_dim or config.cross_attention_dim
    arguments["encoder_hidden_states"] = None
    if config.encoder_hid_dim_type == "image_proj":
        arguments["added_cond_kwargs"] = {"image_embeds": torch.randn(2, context, generator=g)}
        if hinted:
            arguments["added_cond_kwargs"]["hint"] = torch.randn(2, 3, 8 * height, 8 * width, generator=g)
    else:
        arguments["encoder_hidden_states"] = torch.randn(2, 11, context, generator=g)
    if config.time_cond_proj_dim:
        arguments["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim, generator=g)
    return arguments


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def latent_upscaler(**replaced: Any) -> Any:
    """diffusers' pipeline of the latent x2 upscaler. replaced: components to use instead, by name."""
    diffusers, text = tiny.peer("diffusers"), tiny.text_encoder("l", 2)
    width = text.config.hidden_size
    components = {
        "vae": tiny.vae("sd1", 1),
        "text_encoder": text,
        "tokenizer": tiny.tokenizer(),
        "unet": network("x2-upscaler", cross_attention_dim=width, time_cond_proj_dim=128 + width),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="sample"),
    }
    pipe = diffusers.StableDiffusionLatentUpscalePipeline(**{**components, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe
