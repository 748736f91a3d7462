"""IP-Adapter: pictures as prompts, by keys and values of their own in each cross-attention of a U-Net.

    out = attention(q, k, v) + sum_i scale_i * attention(q, k_i, v_i)        i: the adapters, each with its own softmax

Source: Ye et al. 2023, arXiv:2308.06721. Parameter names are those of diffusers' ImageProjection,
IPAdapterPlusImageProjection, IPAdapterFullImageProjection and IPAdapterAttnProcessor.

All of it is computed once a request. The scale is part of the values, of which attention is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.layers import LayerNorm, Layers, Linear, attention, parameter, project

HEAD = 64
"""Channels of a head of the resampler."""

Kind = Literal["base", "plus", "full"]


@dataclass(frozen=True)
class IPAdapterConfig:
    """The sizes of an IP-Adapter."""

    kind: Kind
    image_channels: int
    """Of the image encoder's output: base reads the projected vector (N, D), plus and full the hidden states (N, L, D)
    before the last layer."""
    context: int
    """Channels of tokens: the U-Net's cross_attention_dim."""
    widths: tuple[int, ...]
    """Of the U-Net's cross-attentions, in network order."""
    tokens: int = 4
    """For a picture; "full" makes one of each hidden state."""
    hidden: int = 0  # the rest is of "plus" alone
    heads: int = 0
    depth: int = 0
    feed_forward: int = 0


class IPAdapter(nn.Module):
    """The image encoder's output -> tokens -> keys and values."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        projections = {"base": ImageProjection, "plus": Resampler, "full": FullProjection}
        self.image_proj = projections[config.kind](config)
        self.attentions: Layers[ImageKV] = Layers(ImageKV(config.context, width) for width in config.widths)

    def tokens(self, image_embeds: Tensor) -> Tensor:
        """Of N pictures: (N, D), or (N, L, D) -> (N, T, context)."""
        return self.image_proj(image_embeds.to(next(self.image_proj.parameters()).dtype))

    def kv(self, tokens: Tensor, scales: Sequence[float]) -> tuple[Tensor | None, ...]:
        """Keys | values of tokens (B, T, context): a tensor (B, T, 2C) per cross-attention, in network order, None
        where the scale is 0. scales: one each, which multiply the values."""
        return tuple(
            None if scale == 0 else layer(tokens, scale) for layer, scale in zip(self.attentions, scales, strict=True)
        )


class ImageKV(nn.Module):
    def __init__(self, context: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = Linear(context, channels, bias=False)
        self.to_v_ip = Linear(context, channels, bias=False)

    def forward(self, tokens: Tensor, scale: float) -> Tensor:
        keys, values = project(tokens, (self.to_k_ip, self.to_v_ip)).chunk(2, dim=-1)
        return torch.cat((keys, values * scale), dim=-1)


class ImageProjection(nn.Module):
    """(N, D) -> (N, T, context)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.image_embeds = Linear(config.image_channels, config.tokens * config.context)
        self.norm = LayerNorm(config.context)
        self.count = config.tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.image_embeds(x).unflatten(-1, (self.count, -1)))


class FullProjection(nn.Module):
    """(N, L, D) -> (N, L, context)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.ff = GELUFeedForward(config.image_channels, config.image_channels, config.context)
        self.norm = LayerNorm(config.context)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.ff(x))


class Resampler(nn.Module):
    """(N, L, D) -> (N, T, context): learned queries that attend to the hidden states and to each other."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.latents = parameter(1, config.tokens, config.hidden)
        self.proj_in = Linear(config.image_channels, config.hidden)
        self.layers: Layers[ResamplerLayer] = Layers(ResamplerLayer(config) for _ in range(config.depth))
        self.proj_out = Linear(config.hidden, config.context)
        self.norm_out = LayerNorm(config.context)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(x.shape[0], -1, -1).contiguous()
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class ResamplerLayer(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.ln0, self.ln1 = LayerNorm(config.hidden), LayerNorm(config.hidden)
        self.attn = ResamplerAttention(config.hidden, config.heads)
        feed_forward = GELUFeedForward(config.hidden, config.feed_forward, config.hidden, bias=False)
        self.ff = nn.ModuleList([LayerNorm(config.hidden), feed_forward])

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        queries = self.ln1(latents)
        latents = self.attn(queries, torch.cat((self.ln0(x), queries), dim=1)) + latents
        return self.ff[1](self.ff[0](latents)) + latents


class ResamplerAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.to_q = Linear(channels, HEAD * heads, bias=False)
        self.to_k = Linear(channels, HEAD * heads, bias=False)
        self.to_v = Linear(channels, HEAD * heads, bias=False)
        self.to_out = nn.ModuleList([Linear(HEAD * heads, channels, bias=False)])
        self.heads = heads

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        keys, values = project(context, (self.to_k, self.to_v)).chunk(2, dim=-1)
        return self.to_out[0](attention(self.to_q(x), keys, values, self.heads))


class GELUFeedForward(nn.Module):
    def __init__(self, in_channels: int, hidden: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": Linear(in_channels, hidden, bias)})
        self.net = nn.ModuleDict({"0": first, "2": Linear(hidden, out_channels, bias)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x)))  # type: ignore[index]
