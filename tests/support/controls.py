"""Tiny seeded ControlNets and T2I-Adapters of diffusers for the U-Nets of tiny.py, and ours with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tiny
import torch
from peer_networks import give
from PIL import Image
from torch import Tensor

from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig

_CROSS, _PLAIN = tiny.CROSS_DOWN, tiny.DOWN
_XL_SMALL = {"down_block_types": (_PLAIN,) * 3, "mid_block_type": "UNetMidBlock2D"}
_XL_MID = {"transformer_layers_per_block": (0, 0, 1)}
# By name: the family, and how the ControlNet differs from its U-Net's encoder.
CONTROLNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", {}),
    "sd1-bgr": ("sd1", {"controlnet_conditioning_channel_order": "bgr", "conditioning_channels": 3}),
    "sd1-pooled": ("sd1", {"global_pool_conditions": True}),
    "sd2": ("sd2", {}),
    "sdxl": ("sdxl", {}),
    "sdxl-mid": ("sdxl", _XL_MID),
    "sdxl-small": ("sdxl", _XL_SMALL),
    "small": ("small", {"conditioning_embedding_out_channels": (4, 6, 8)}),
}
_ENCODER = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "use_linear_projection"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "upcast_attention"),
)


def controlnet(name: str, seed: int = 10, **changes: Any) -> Any:
    """diffusers' ControlNetModel, its zero convolutions random too."""
    family, own = CONTROLNETS[name]
    config = {key: value for key, value in tiny.UNETS[family].items() if key in _ENCODER}
    config |= {"conditioning_embedding_out_channels": (4, 6, 8, 8)} | own | changes

    def make() -> Any:
        network = tiny.peer("diffusers").ControlNetModel(**config)
        for conv in (
            *network.controlnet_down_blocks,
            network.controlnet_mid_block,
            network.controlnet_cond_embedding.conv_out,
        ):
            torch.nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
        return network

    return tiny.seeded(make, seed)


def ours_of(theirs: Any) -> ControlNet:
    with torch.device("meta"):
        ours = ControlNet(ControlNetConfig.from_dict(theirs.config))
    return give(ours, theirs.state_dict())


# By name: the family that it fits, and its config.
T2I_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sd1", {"channels": [16, 32, 48, 48]}),
    "full-grey": ("sd1", {"channels": [16, 32, 48, 48], "in_channels": 1, "num_res_blocks": 1}),
    "light": ("sd1", {"channels": [16, 32, 48], "num_res_blocks": 2, "adapter_type": "light_adapter"}),
    "xl": ("sdxl", {"channels": [16, 32, 48, 48], "adapter_type": "full_adapter_xl", "downscale_factor": 16}),
}


def t2i_adapter(name: str, seed: int = 20) -> Any:
    """diffusers' T2IAdapter."""
    _, config = T2I_ADAPTERS[name]
    return tiny.seeded(lambda: tiny.peer("diffusers").T2IAdapter(**config), seed)


def our_adapter_of(theirs: Any) -> T2IAdapter:
    with torch.device("meta"):
        ours = T2IAdapter(T2IAdapterConfig.from_dict(theirs.config))
    return give(ours, theirs.state_dict())


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}


@functools.cache
def picture(seed: int = 1, side: int = 64) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def make(pipe: Any, **options: Any) -> Any:
    return pipe(**{**BASE, "seed": 0, **options}).images
