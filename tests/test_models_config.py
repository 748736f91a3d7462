"""Configs of networks: what is not implemented is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from fastldm.errors import CheckpointError
from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig

UNET, VAE = dict(tiny.unet("sd1").config), dict(tiny.vae().config)


TINY_VAE, TEXT = dict(tiny.tiny_vae().config), tiny.text_encoder("l").config.to_dict()


@pytest.mark.parametrize(
    ("read", "config", "key", "value"),
    [
        (UNetConfig, UNET, "_class_name", "UNet3DConditionModel"),
        (UNetConfig, UNET, "act_fn", "mish"),
        (UNetConfig, UNET, "addition_embed_type", "text_image"),
        (UNetConfig, UNET, "attention_type", "gated"),
        (UNetConfig, UNET, "center_input_sample", True),
        (UNetConfig, UNET, "class_embed_type", "simple_projection"),
        (UNetConfig, UNET, "conv_in_kernel", 5),
        (UNetConfig, UNET, "cross_attention_norm", "layer_norm"),
        (UNetConfig, UNET, "dual_cross_attention", True),
        (UNetConfig, UNET, "down_block_types", ["SkipDownBlock2D"] * 4),
        (UNetConfig, UNET, "encoder_hid_dim_type", "text_image_proj"),
        (UNetConfig, UNET, "mid_block_scale_factor", 0),
        (UNetConfig, UNET, "mid_block_type", "UNetMidBlock3D"),
        (UNetConfig, UNET, "num_attention_heads", 8),
        (UNetConfig, UNET, "resnet_time_scale_shift", "spatial"),
        (UNetConfig, UNET, "time_embedding_type", "learned"),
        (UNetConfig, UNET, "timestep_post_act", "mish"),
        (VAEConfig, VAE, "_class_name", "AutoencoderKLTemporalDecoder"),
        (VAEConfig, VAE, "act_fn", "mish"),
        (VAEConfig, VAE, "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        (TinyVAEConfig, TINY_VAE, "act_fn", "gelu"),
        (TinyVAEConfig, TINY_VAE, "upsampling_scaling_factor", 3),
        (TinyVAEConfig, TINY_VAE, "encoder_block_out_channels", [16, 16, 32, 32]),
        (TextConfig, TEXT, "hidden_act", "gelu_new"),
        (TextConfig, TEXT, "model_type", "t5"),
        (TextConfig, TEXT, "architectures", ["CLIPVisionModel"]),
        (TextConfig, TEXT, "use_attention_mask", True),
    ],
)
def test_unsupported_values_are_refused_by_name(read: Any, config: dict[str, Any], key: str, value: Any) -> None:
    read.from_dict(config)
    with pytest.raises(CheckpointError) as refused:
        read.from_dict({**config, key: value}, source="somewhere/config.json")
    report = value[0] if isinstance(value, list) else value
    assert "somewhere/config.json" in str(refused.value)
    assert key in str(refused.value)
    assert str(report) in str(refused.value)


def test_irrelevant_keys_are_ignored_missing_ones_named() -> None:
    config = {**UNET, "dropout": 0.3, "upcast_attention": True, "_diffusers_version": "9", "something_new": 1}
    assert UNetConfig.from_dict(config) == UNetConfig.from_dict(UNET)
    for read, key in (
        (UNetConfig, "block_out_channels"),
        (VAEConfig, "block_out_channels"),
        (TextConfig, "hidden_size"),
    ):
        with pytest.raises(CheckpointError, match=key):
            read.from_dict({})
    with pytest.raises(CheckpointError, match=r"'hidden_size' 32 .* 'num_attention_heads' 5"):
        TextConfig.from_dict({**TEXT, "num_attention_heads": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": [2, 2]}, "'layers_per_block' has 2 entries, expected 4"),
        ({"attention_head_dim": 5}, "16 channels do not divide into 'attention_head_dim' 5"),
        ({"norm_num_groups": 5}, "16 channels do not divide into 'norm_num_groups' 5"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": [[1], 1, 1, 1], "reverse_transformer_layers_per_block": [1] * 4},
            "2 resnets",
        ),
    ],
)
def test_contradictory_unet_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        UNetConfig.from_dict({**UNET, **changes})
