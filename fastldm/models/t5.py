"""T5's encoder (arXiv:1910.10683, and its version 1.1), the text encoder of DeepFloyd IF.

Parameter names are those of transformers' T5EncoderModel.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.models.clip import Embedding
from fastldm.models.config import TextConfig
from fastldm.models.config_fields import EPSILON, WIDTH, only
from fastldm.models.layers import Layers, Linear, parameter
from fastldm.reading import Field, Integer, OneOf, read_fields

T5_WINDOW = 77
"""Tokens that IF was trained with; the encoder itself has no limit."""

_T5 = only({"model_type": ("t5",), "is_decoder": (None, False)}) | {
    "vocab_size": Field(Integer(3, 2**22), 32128),
    "d_model": Field(WIDTH, 512),
    "d_kv": Field(WIDTH, 64),
    "d_ff": Field(Integer(1, 2**20), 2048),
    "num_layers": Field(Integer(1, 256), 6),
    "num_heads": Field(WIDTH, 8),
    "relative_attention_num_buckets": Field(Integer(4, 1024), 32),
    "relative_attention_max_distance": Field(Integer(4, 2**20), 128),
    "layer_norm_epsilon": Field(EPSILON, 1e-6),
    "feed_forward_proj": Field(OneOf("relu", "gated-gelu"), "relu"),
    "eos_token_id": Field(Integer(0), 1),
    "pad_token_id": Field(Integer(0), 0),
}


@dataclass(frozen=True)
class T5Config(TextConfig):
    """T5's encoder: no positions are embedded, but a distance's bucket has a bias for each head."""

    kind: ClassVar[str] = "T5"
    buckets: int = 32
    max_distance: int = 128
    pad_token_id: int = 0

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> T5Config:
        """Read transformers' text_encoder/config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _T5, source)
        buckets, distance = values["relative_attention_num_buckets"], values["relative_attention_max_distance"]
        if distance <= buckets // 4:
            raise CheckpointError(
                f"{source}: 'relative_attention_max_distance' is {distance}, expected more than {buckets // 4}, the "
                "distances that have a bucket of their own ('relative_attention_num_buckets')"
            )
        return cls(
            vocab=values["vocab_size"],
            hidden=values["d_model"],
            layers=values["num_layers"],
            heads=values["num_heads"],
            intermediate=values["d_ff"],
            max_position=T5_WINDOW,
            act=values["feed_forward_proj"],
            norm_eps=values["layer_norm_epsilon"],
            eos_token_id=values["eos_token_id"],
            projection_dim=None,
            with_projection=False,
            causal=False,
            qkv_bias=False,
            head_dim=values["d_kv"],
            buckets=buckets,
            max_distance=distance,
            pad_token_id=values["pad_token_id"],
        )


class T5Text(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab, config.hidden)
        self.encoder = T5Stack(config)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.shared.weight.device

    def forward(self, input_ids: Tensor, skip: int = 0, final_norm: bool = True) -> tuple[Tensor, None]:
        """input_ids (B, T) integers -> hidden (B, T, D) of all layers except the last `skip`, with final_norm
        normalised; and no pooled vector. Padding is not attended to."""
        visible = input_ids != self.config.pad_token_id
        x = F.embedding(input_ids, self.shared.weight)
        return self.encoder(x, visible, skip, final_norm), None


class T5Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block: Layers[T5Block] = Layers(T5Block(config, first=k == 0) for k in range(config.layers))
        self.final_layer_norm = RMSNorm(config.hidden, config.norm_eps)
        self.buckets, self.max_distance = config.buckets, config.max_distance

    def forward(self, x: Tensor, visible: Tensor, skip: int, final_norm: bool) -> Tensor:
        """x (B, T, D), visible (B, T): whether a token is read. What the layers add up is in float32, which float16
        does not hold."""
        dtype, blocks = x.dtype, [*self.block]
        attention, _ = blocks[0].layer
        table = attention.SelfAttention.relative_attention_bias
        index = distance_buckets(x.shape[1], self.buckets, self.max_distance, x.device)  # (T, T)
        bias = F.embedding(index, table.weight).permute(2, 0, 1)[None]  # (1, heads, T, T)
        bias = bias.masked_fill(~visible[:, None, None], torch.finfo(dtype).min)  # (B, heads, T, T)
        x = x.float()
        for block in blocks[: len(blocks) - skip]:
            for layer in block.layer:
                x = x + layer(x, bias)
        return self.final_layer_norm(x) if final_norm else x.to(dtype)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.layer: Layers[Any] = Layers([AttentionLayer(config, first), PerceptronLayer(config)])


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, first)
        self.layer_norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.SelfAttention(self.layer_norm(x), bias)


class T5Attention(nn.Module):
    """Attention whose scores are not scaled: the initial weights are."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (Linear(config.hidden, config.attention_width, bias=False) for _ in range(3))
        self.o = Linear(config.attention_width, config.hidden, bias=False)
        if first:  # whose bias all layers share
            self.relative_attention_bias = Embedding(config.buckets, config.heads)
        self.heads = config.heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2)).float()


class PerceptronLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = Perceptron(config)
        self.layer_norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.DenseReluDense(self.layer_norm(x))


class Perceptron(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.act == "gated-gelu"
        if self.gated:
            self.wi_0, self.wi_1 = (Linear(config.hidden, config.intermediate, bias=False) for _ in range(2))
        else:
            self.wi = Linear(config.hidden, config.intermediate, bias=False)
        self.wo = Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        else:
            x = F.relu(self.wi(x))
        # In float16 the products of version 1.1 overflow: transformers keeps these weights in float32 then.
        if x.dtype == torch.float16 or x.dtype != self.wo.weight.dtype:
            return F.linear(x.float(), self.wo.weight.float())
        return self.wo(x).float()


class RMSNorm(nn.Module):
    """x (..., C) in float32 by its root mean square, in the weights' dtype."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(channels)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


def distance_buckets(length: int, count: int, max_distance: int, device: torch.device) -> Tensor:
    """The bucket (T, T) of the distance from each token to each other: half of `count` for those before it, half for
    those after it; of those half one for each of the nearest, and the others logarithmically up to max_distance."""
    places = torch.arange(length, device=device)
    offset = places[None] - places[:, None]
    bucket = (offset > 0) * (count // 2)
    # Compared, not computed: the last bit of a logarithm would be another bucket where another library computes it.
    for least in least_distances(count, max_distance):
        bucket = bucket + (offset.abs() >= least)
    return bucket


@functools.cache
def least_distances(count: int, max_distance: int) -> tuple[int, ...]:
    """The least distance in each bucket of a half but the first: transformers' formula, whose numbers are float32."""
    half = count // 2
    exact = half // 2

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        growth = np.float32(math.log(np.float32(distance) / np.float32(exact))) / np.float32(
            math.log(max_distance / exact)
        )
        return exact + int(growth * np.float32(half - exact))

    return tuple(bisect.bisect_left(range(max_distance + 1), k, key=bucket) for k in range(1, half))
