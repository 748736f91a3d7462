"""CLIP's image encoder: OpenAI's ViT-L/14, OpenCLIP's H/14 and bigG/14.

A picture is cut into square patches, whose embeddings a transformer reads after that of a class token; its last state
is projected to a vector that is comparable with the text encoder's. Source: Radford et al. 2021, arXiv:2103.00020.
Parameter names are those of transformers' CLIPVisionModelWithProjection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.models.clip import Embedding, Encoder
from fastldm.models.config import heads_of
from fastldm.models.embeddings import Sinusoids
from fastldm.models.layers import LayerNorm, Linear, linear, parameter
from fastldm.reading import MAX_CHANNELS, Field, Integer, Number, Object, OneOf, read_fields

_WIDTH = Integer(1, MAX_CHANNELS)
_VISION = {
    "model_type": Field(OneOf("clip_vision_model"), "clip_vision_model"),
    "num_channels": Field(OneOf(3), 3),
    "hidden_act": Field(OneOf("quick_gelu", "gelu"), "quick_gelu"),
    "hidden_size": Field(_WIDTH, 768),
    "intermediate_size": Field(Integer(1, 2**20), 3072),
    "num_hidden_layers": Field(Integer(1, 256), 12),
    "num_attention_heads": Field(_WIDTH, 12),
    "image_size": Field(Integer(1, 4096), 224),
    "patch_size": Field(Integer(1, 4096), 32),
    "layer_norm_eps": Field(Number(0, 1), 1e-5),
    "projection_dim": Field(_WIDTH, 512),
}
_WHOLE = {"vision_config": Field(Object({})), "projection_dim": Field(_WIDTH, 512)}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP image encoder (transformers' CLIPVisionModelWithProjection, or that half of a CLIPModel)."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    image_size: int  # height and width of its input in pixels
    patch_size: int
    act: str  # "quick_gelu" or "gelu"
    norm_eps: float
    projection_dim: int
    causal: bool = False  # its layers are CLIP's text encoder's otherwise
    qkv_bias: bool = True

    @property
    def attention_width(self) -> int:
        """Channels of queries, keys and values."""
        return self.hidden

    @property
    def patches(self) -> int:
        """How many patches a picture has."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> VisionConfig:
        """Read transformers' config.json, of the image encoder or of a whole CLIPModel; CheckpointError if it is of
        another kind, or needs what is not implemented."""
        if cfg.get("model_type") == "clip":
            whole = read_fields(cfg, _WHOLE, source)
            cfg = {**cfg["vision_config"], "projection_dim": whole["projection_dim"]}
        values = read_fields(cfg, _VISION, source)
        hidden, heads = heads_of(values, source)
        if values["patch_size"] > values["image_size"]:
            raise CheckpointError(
                f"{source}: 'patch_size' is {values['patch_size']}, more than 'image_size' {values['image_size']}"
            )
        return cls(
            hidden=hidden,
            layers=values["num_hidden_layers"],
            heads=heads,
            intermediate=values["intermediate_size"],
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            act=values["hidden_act"],
            norm_eps=values["layer_norm_eps"],
            projection_dim=values["projection_dim"],
        )


class Normalizer(nn.Module):
    """Mean and deviation of projected vectors (N, P), by which unCLIP adds noise to them; diffusers'
    StableUnCLIPImageNormalizer, and `noise_image_embeddings` of its pipeline."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean, self.std = parameter(1, channels), parameter(1, channels)
        self.sinusoids = Sinusoids(channels, flip_sin_to_cos=True, freq_shift=0)

    def forward(self, embeds: Tensor, noise: Tensor, rates: Tensor, level: Tensor) -> Tensor:
        """Vectors (N, P) with noise (N, P), and its level as sinusoids, as the U-Net reads them: (N, 2P) float32.

        rates: (N, 2) float32, what vector and noise are multiplied by at the level (N,), a timestep.
        """
        mean, std = self.mean.float(), self.std.float()
        normal = rates[:, :1] * ((embeds.float() - mean) / std) + rates[:, 1:] * noise
        return torch.cat((normal * std + mean, self.sinusoids(level)), dim=1)


class CLIPVision(nn.Module):
    """Pixels to the projected vector of a picture, or to hidden states."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = Linear(config.hidden, config.projection_dim, bias=False)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.visual_projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.visual_projection.weight.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S), prepared as `conditioning.image_encoder` does -> projected vectors (N, P)."""
        vision = self.vision_model
        x = vision.encoder(vision.start(pixels.to(self.dtype)))
        return self.visual_projection(vision.post_layernorm(x[:, 0].contiguous()))

    def hidden(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> the states before the last layer (N, 1 + patches, D), of the class token first."""
        vision = self.vision_model
        return vision.encoder(vision.start(pixels.to(self.dtype)), skip=1)


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden, config.norm_eps)  # a misspelling that transformers keeps
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden, config.norm_eps)

    def start(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> the first layer's input (N, 1 + patches, D)."""
        return self.pre_layrnorm(self.embeddings(pixels))


class PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = parameter(config.hidden)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(1 + config.patches, config.hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class PatchEmbedding(nn.Module):
    """A convolution in the checkpoint, whose steps are as long as its kernel: a linear layer of each patch's pixels."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = parameter(config.hidden, 3, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patch = self.weight.shape[-1]
        side = pixels.shape[-1] // patch
        cut = pixels[:, :, : side * patch, : side * patch]  # what is left over belongs to no patch
        patches = cut.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # (N, 3, side, patch, side, patch)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, side * side, 3 * patch * patch)
        return linear(rows.contiguous(), self.weight.flatten(1))
