"""ControlNet: a copy of a U-Net's encoder that also reads an image, partially evaluated as the U-Net is.

    hint = network.hint(image)                                            # once per image
    rows = network.time_rows(timesteps, added=added)                      # once per schedule and conditioning
    kv = network.cross_kv(encoder_hidden_states)                          # once per prompt
    residuals = network.step(model_input, rows[i : i + 1], kv, hint)      # each step
    out = unet.step(model_input, ..., residuals=[residuals])

Parameter names are those of diffusers' ControlNetModel. Source: arXiv:2302.05543.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.models.config import UNetConfig
from fastldm.models.interfaces import AddedConditions
from fastldm.models.layers import Conv, Layers, Pending, Pointwise, as_tensor, channels_last, to_image, to_tokens
from fastldm.models.transformer import Text
from fastldm.models.unet import Residuals, UNetEncoder
from fastldm.reading import MAX_CHANNELS, Field, Flag, Integer, ListOf, OneOf, read_fields

_WIDTH = Integer(1, MAX_CHANNELS)
_FIELDS = {
    "_class_name": Field(OneOf("ControlNetModel"), "ControlNetModel"),
    "mid_block_type": Field(OneOf("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "UNetMidBlock2DCrossAttn"),
    "num_class_embeds": Field(OneOf(None), None),
    "class_embed_type": Field(OneOf(None), None),
    "only_cross_attention": Field(OneOf(False), False),
    "conditioning_channels": Field(_WIDTH, 3),
    "conditioning_embedding_out_channels": Field(ListOf(_WIDTH, 1, 12), (16, 32, 96, 256)),
    "controlnet_conditioning_channel_order": Field(OneOf("rgb", "bgr"), "rgb"),
    "global_pool_conditions": Field(Flag(), False),
}


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet (diffusers' ControlNetModel)."""

    unet: UNetConfig
    """A U-Net that has its encoder. What is beyond that is not the file's."""
    image_channels: int
    hint_channels: tuple[int, ...]
    """Of the convolutions that embed the image; each but the last halves its size."""
    bgr: bool
    """Whether the image is read in the order blue, green, red."""
    global_pool: bool
    """Whether residuals are means over all pixels. Such a network acts on conditional rows only."""

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.hint_channels) - 1)

    @property
    def time_channels(self) -> int:
        """Channels of a time row."""
        return sum(level.channels * len(level.depths) for level in (*self.unet.down, self.unet.mid))

    @property
    def cross_widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention, in network order; none in the small ControlNets of SDXL."""
        levels = (*self.unet.down, self.unet.mid)
        return tuple(level.channels for level in levels for _ in range(level.cross_attentions))

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> ControlNetConfig:
        """Read diffusers' config.json of a ControlNet; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _FIELDS, source)
        decoder = ("up_block_types", "reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_dim")
        encoder = {key: value for key, value in cfg.items() if key not in decoder}
        encoder |= {"_class_name": "UNet2DConditionModel", "mid_block_type": values["mid_block_type"]}
        if isinstance(types := cfg.get("down_block_types"), list | tuple):
            encoder["up_block_types"] = [str(kind).replace("Down", "Up") for kind in reversed(types)]
        unet = UNetConfig.from_dict(encoder, source)
        if unet.beyond_standard is not None:
            raise CheckpointError(f"{source}: a ControlNet with {unet.beyond_standard} is not implemented")
        return cls(
            unet=unet,
            image_channels=values["conditioning_channels"],
            hint_channels=values["conditioning_embedding_out_channels"],
            bgr=values["controlnet_conditioning_channel_order"] == "bgr",
            global_pool=values["global_pool_conditions"],
        )

    def to_dict(self) -> dict[str, Any]:
        """As diffusers' config.json, which `from_dict` reads."""
        unet = self.unet
        levels = (*unet.down, unet.mid)
        crosses = [level.depths[0] is not None for level in levels]
        # of a level without, that of the middle block, which is the last level's
        depths = [(level if cross else unet.mid).depths[0] for level, cross in zip(unet.down, crosses, strict=False)]
        added = {
            "addition_time_embed_dim": unet.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": unet.addition_input_dim,
        }
        return {
            "_class_name": "ControlNetModel",
            "in_channels": unet.in_channels,
            "block_out_channels": [level.channels for level in unet.down],
            "down_block_types": [f"{'CrossAttn' * cross}DownBlock2D" for cross in crosses[:-1]],
            "mid_block_type": f"UNetMidBlock2D{'CrossAttn' * crosses[-1]}",
            "layers_per_block": [len(level.depths) for level in unet.down],
            "transformer_layers_per_block": [1 if depth is None else depth for depth in depths],
            "attention_head_dim": [level.heads for level in unet.down],
            "cross_attention_dim": unet.cross_attention_dim,
            "norm_num_groups": unet.norm_groups,
            "norm_eps": unet.norm_eps,
            "use_linear_projection": unet.linear_projection,
            "downsample_padding": unet.downsample_padding,
            "flip_sin_to_cos": unet.flip_sin_to_cos,
            "freq_shift": unet.freq_shift,
            "addition_embed_type": unet.addition_embed_type,
            **(added if unet.needs_added else {}),
            "conditioning_channels": self.image_channels,
            "conditioning_embedding_out_channels": list(self.hint_channels),
            "controlnet_conditioning_channel_order": "bgr" if self.bgr else "rgb",
            "global_pool_conditions": self.global_pool,
        }


class ControlNet(UNetEncoder):
    """From a U-Net's inputs and the embedding of an image to `Residuals`: one for each skip connection (12 in SD 1 and
    2, 9 in XL) and one for the middle block."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.config = config
        skips = config.unet.skip_channels
        self.controlnet_cond_embedding = ImageEmbedding(config.image_channels, config.hint_channels, skips[0])
        self.controlnet_down_blocks: Layers[Pointwise] = Layers(Pointwise(width, width) for width in skips)
        self.controlnet_mid_block = Pointwise(skips[-1], skips[-1])

    def hint(self, image: Tensor) -> Tensor:
        """The embedding of images (B, 3, H, W) in 0..1, red first: (B, C, H / factor, W / factor)."""
        return self.controlnet_cond_embedding(channels_last(image.flip(1) if self.config.bgr else image))

    def time_rows(self, timesteps: Tensor, *, added: AddedConditions | None = None) -> Tensor:
        """As `UNet.time_rows`."""
        return self._rows(self.embed(timesteps, added=added))

    def step(
        self,
        model_input: Tensor,
        temb_row: Tensor,
        cross_kv: Sequence[Tensor],
        hint: Tensor,
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
        deep: int | None = None,
    ) -> Residuals:
        """Evaluate the network: model_input (B, Cin, H, W), temb_row (B, S), cross_kv, kv_len and slots as of
        `UNet.step`, hint (B, C, H, W) -> residuals of B rows, without weights.

        deep: for how many rows, the first ones, also those of the U-Net's deep part are computed, by default all.
        """
        rows, texts = self.inputs(temb_row, [Text(kv, kv_len, slots) for kv in cross_kv], deep)
        x = self.conv_in.pending(channels_last(model_input), residual=channels_last(hint))
        x, skips = self.encode(x, rows, texts, deep=deep)
        added = tuple(
            self._residual(layer, skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=False)
        )
        return Residuals(added, added[-1][:0] if deep == 0 else self._residual(self.controlnet_mid_block, x))

    def _residual(self, layer: Pointwise, x: Tensor | Pending) -> Tensor:
        x = as_tensor(x)
        if self.config.global_pool:  # the mean of a 1x1 convolution is the convolution of the mean
            return to_image(layer(to_tokens(x.mean(dim=(2, 3), keepdim=True))), 1)
        return to_image(layer(to_tokens(x)), x.shape[2])


class ImageEmbedding(nn.Module):
    """Convolutions with SiLU from an image to the size of latents; diffusers' ControlNetConditioningEmbedding."""

    def __init__(self, in_channels: int, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.conv_in = Conv(in_channels, channels[0])
        self.blocks: Layers[Conv] = Layers()
        for width, wider in pairwise(channels):
            self.blocks.append(Conv(width, width))
            self.blocks.append(Conv(width, wider, stride=2))
        self.conv_out = Conv(channels[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)
