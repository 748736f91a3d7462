"""CLIP's text encoder: OpenAI's ViT-L/14, OpenCLIP's H/14 and bigG/14; and LDMBert, that of latent diffusion's text to
image, whose layers are the same without a causal mask.

Parameter names are those of the checkpoints on the hub and of transformers' CLIPTextModelWithProjection. (Its
CLIPTextModel has omitted the prefix `text_model.` since version 5, and LDMBert has names of its own: loading/state.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.config import TextConfig
from fastldm.models.layers import LayerNorm, Layers, Linear, attention, parameter, project


class CLIPText(nn.Module):
    """Token ids to hidden states, and with a projection to a pooled vector of the text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = (
            Linear(config.hidden, config.projection_dim, bias=False) if config.projection_dim is not None else None
        )

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.text_model.final_layer_norm.weight.device

    def forward(
        self, input_ids: Tensor, embeds: Tensor | None = None, skip: int = 0, final_norm: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """input_ids (B, T) integers -> hidden (B, T, D), pooled (B, P).

        embeds: (B, T, D) in place of the table's rows, for ids beyond it: see `embed`.

        hidden is the output of all layers except the last `skip`, with final_norm normalised. pooled is the projected
        state of the first end-of-text token after all layers, independent of `skip`; None without a projection, where
        no U-Net reads it, unless `TextConfig.pools`: the state itself.
        """
        text = self.text_model
        depth = self.config.layers - skip
        x = text.encoder(text.embeddings(input_ids, embeds), skip)
        hidden = text.final_layer_norm(x) if final_norm else x
        if self.text_projection is None and not self.config.pools:
            return hidden, None

        for layer in text.encoder.layers[depth:]:
            x = layer(x)
        last = x[torch.arange(len(x), device=x.device), self.ends(input_ids)]
        last = text.final_layer_norm(last)
        return hidden, last if self.text_projection is None else self.text_projection(last)

    def embed(self, input_ids: Tensor, vectors: Tensor, first: int) -> Tensor:
        """The embeddings (B, T, D) of input_ids (B, T), before positions: rows of the table, and of vectors (V, D) for
        ids from `first` on."""
        table = self.text_model.embeddings.token_embedding.weight
        embeds = F.embedding(input_ids.clamp(max=first - 1), table)
        added = F.embedding((input_ids - first).clamp(min=0), vectors.to(table.dtype))
        return torch.where((input_ids < first)[..., None], embeds, added)

    def ends(self, input_ids: Tensor) -> Tensor:
        """`ends` of this encoder."""
        return ends(self.config, input_ids)


def ends(config: TextConfig, input_ids: Tensor) -> Tensor:
    """The index of the first end-of-text token of each text in input_ids (B, T): (B,)."""
    # In configs from before transformers 4.31, eos_token_id = 2 means the highest id: CLIP's end of text.
    eos = config.eos_token_id
    return (input_ids if eos == 2 else (input_ids == eos).int()).argmax(dim=1)  # the first of equals


class TextTransformer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden, config.norm_eps)


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab, config.hidden)
        self.position_embedding = Embedding(config.max_position, config.hidden)

    def forward(self, input_ids: Tensor, embeds: Tensor | None = None) -> Tensor:
        positions = self.position_embedding.weight[: input_ids.shape[1]]
        return (F.embedding(input_ids, self.token_embedding.weight) if embeds is None else embeds) + positions


class Embedding(nn.Module):
    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.weight = parameter(count, channels)


class EncoderConfig(Protocol):
    """What the layers of CLIP's encoders, and of LDMBert, read."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def act(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def attention_width(self) -> int: ...
    @property
    def qkv_bias(self) -> bool: ...


class Encoder(nn.Module):
    """The layers of CLIP's text encoder or image encoder, or of LDMBert."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers: Layers[EncoderLayer] = Layers(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """x (B, T, D) through all layers but the last `skip`."""
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron; transformers' CLIPEncoderLayer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(self.layer_norm1(x), residual=x)
        return self.mlp(self.layer_norm2(x), residual=x)


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(config.hidden, config.attention_width, config.qkv_bias) for _ in range(3)
        )
        self.out_proj = Linear(config.attention_width, config.hidden)
        self.heads, self.causal = config.heads, config.causal

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj)).chunk(3, dim=-1)
        out = attention(q, k, v, self.heads, causal=self.causal)
        return self.out_proj(out, residual=residual)


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden, config.intermediate)
        self.fc2 = Linear(config.intermediate, config.hidden)
        self.act: Callable[[Tensor], Tensor] = quick_gelu if config.act == "quick_gelu" else F.gelu

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)), residual=residual)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)
