"""What attends in a U-Net after a resnet, over the pixels, by `Level.attention`.

    transformer   Transformer: self-attention, cross-attention to the text, and a feed-forward
    pixels        PixelAttention: self-attention
    added         AddedAttention: attention to [pixels | text] in one softmax, or to the text alone
    adaptive      AdaptiveAttention: self-attention, if there is one, and attention to the text, each after a norm whose
                  weight and bias are of the time

Each takes an image, the text of each cross-attention that is left, and the parts of a time row that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.kernels.linear import fast_library
from fastldm.models.config import Level, UNetConfig
from fastldm.models.layers import (
    GEGLU,
    Attention,
    GroupNorm,
    LayerNorm,
    Layers,
    Linear,
    Pending,
    PictureKV,
    Pointwise,
    as_tensor,
    project,
    to_image,
    to_tokens,
)
from fastldm.models.resnet import AdaptiveNorm
from fastldm.models.unet_blocks import GROUP_SIZE, Layer


class Text(NamedTuple):
    """The text inputs of one cross-attention, and the rows whose self-attention before it is perturbed."""

    kv: Tensor  # (texts, T, 2C), keys | values
    kv_len: Tensor | None  # (texts,) int32
    slots: Tensor | None  # (B,) int32
    pictures: tuple[PictureKV, ...] = ()
    perturbed: Tensor | None = None  # (B,) bool

    def first(self, rows: int) -> Text:
        """That of the first rows."""
        ends = [(own, own.rows.start, min(own.rows.stop, rows)) for own in self.pictures]
        pictures = [
            PictureKV(*_first(end - start, own.kv, own.kv_len, own.slots), slice(start, end))
            for own, start, end in ends
            if start < end
        ]
        perturbed = None if self.perturbed is None else self.perturbed[:rows]
        return Text(*_first(rows, self.kv, self.kv_len, self.slots), tuple(pictures), perturbed)


def _first(
    rows: int, kv: Tensor, kv_len: Tensor | None, slots: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the first rows read of keys and values: by slot, or their own."""
    if slots is not None:
        return kv, kv_len, slots[:rows]
    return kv[:rows], kv_len if kv_len is None else kv_len[:rows], None


class Transformer(nn.Module):
    """Transformer layers over the pixels of (B, C, H, W), with a residual; diffusers' Transformer2DModel."""

    def __init__(self, config: UNetConfig, level: Level, layer: Layer) -> None:
        super().__init__()
        channels = layer.out_channels
        projection = Linear if config.linear_projection else Pointwise
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks: Layers[TransformerLayer] = Layers(
            TransformerLayer(level) for _ in range(layer.depth or 0)
        )
        self.proj_out = projection(channels, channels)

    @property
    def cross_attentions(self) -> tuple[Attention, ...]:
        """Those that read the text, in the order in which they do."""
        return tuple(attention for layer in self.transformer_blocks for attention in layer.cross_attentions)

    def forward(self, x: Tensor | Pending, texts: Iterator[Text], rows: Iterator[Tensor] | None = None) -> Tensor:
        ahead = isinstance(x, Pending) or fast_library(x)  # as in TransformerLayer
        x, h = self.norm.add(x, ahead=self.proj_out.bias) if ahead else (as_tensor(x), self.norm(x))
        tokens = self.proj_in(to_tokens(h))
        for layer in self.transformer_blocks:
            tokens = layer(tokens, texts)
        out = self.proj_out.add_to(to_tokens(x), tokens) if ahead else self.proj_out(tokens, residual=to_tokens(x))
        return to_image(out, x.shape[2])


class TransformerLayer(nn.Module):
    """x (B, N, C) and the text's keys and values -> (B, N, C); diffusers' BasicTransformerBlock.

    only_cross: the first attention reads the text too, in place of the pixels.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        channels = level.channels
        self.only_cross = level.only_cross
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, level.heads, level.context if level.only_cross else channels)
        self.attn1.by_qkv = not level.only_cross
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, level.heads, level.context)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    @property
    def cross_attentions(self) -> tuple[Attention, ...]:
        """Those that read the text, in the order in which they do."""
        return (self.attn1, self.attn2) if self.only_cross else (self.attn2,)

    def forward(self, x: Tensor, texts: Iterator[Text]) -> Tensor:
        h = self.norm1(x, self.attn1.to_q)
        if self.only_cross:
            attended, text = _read(self.attn1, h, next(texts)), next(texts)
        else:
            text = next(texts)
            attended = self.attn1(*self.attn1.qkv(h), perturbed=text.perturbed)
        x, h = self.norm2.add(attended, x, then=self.attn2.to_q)
        attended = _read(self.attn2, h, text)
        if fast_library(x):  # cuBLAS adds a residual in its own pass where there is no bias left to add
            x, h = self.norm3.add(attended, x, self.ff.last.bias, self.ff.first)
            return self.ff.add_to(x, h)
        x, h = self.norm3.add(attended, x, then=self.ff.first)
        return self.ff(h, residual=x)


def _read(attention: Attention, x: Tensor, text: Text, residual: Tensor | None = None) -> Tensor:
    """A cross-attention of x (B, N, C) to a text."""
    q, (k, v) = attention.to_q(x), text.kv.chunk(2, dim=-1)
    return attention(q, k, v, residual, kv_len=text.kv_len, slots=text.slots, pictures=text.pictures)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": GEGLU(channels, 4 * channels), "2": Linear(4 * channels, channels)})

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.last(self.net["0"](x, self.last), residual)

    @property
    def first(self) -> Linear:
        return self.net["0"].proj  # type: ignore[return-value]

    @property
    def last(self) -> Linear:
        return self.net["2"]  # type: ignore[return-value]

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """As `forward`, but for the last layer's bias, possibly in the residual's memory."""
        return self.last.add_to(residual, self.net["0"](x, self.last))


class PixelAttention(Attention):
    """Self-attention over all pixels of (B, C, H, W), after a norm, with a residual; diffusers' Attention of an image.

    groups: of the norm; None: there is none. scale: divides the output, with the residual.
    """

    cross_attentions: tuple[Attention, ...] = ()
    by_qkv = True

    def __init__(self, channels: int, heads: int, groups: int | None, eps: float, scale: float = 1.0) -> None:
        super().__init__(channels, heads, context=channels, bias=True)
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)
        self.scale = scale

    @classmethod
    def of_level(cls, config: UNetConfig, level: Level, layer: Layer) -> PixelAttention:
        return cls(layer.out_channels, level.heads, level.attention_groups, config.norm_eps, level.scale)

    def forward(  # type: ignore[override]
        self, x: Tensor | Pending, texts: Iterator[Text] | None = None, rows: Iterator[Tensor] | None = None
    ) -> Tensor:
        h = as_tensor(x) if self.group_norm is None else self.group_norm(x)
        return self.attended(h, as_tensor(x))

    def attended(self, h: Tensor, x: Tensor) -> Tensor:
        """Attention of h, which is x after a norm, with the residual x."""
        q, k, v = self.qkv(to_tokens(h))
        out = to_image(super().forward(q, k, v, residual=to_tokens(x)), x.shape[2])
        return out if self.scale == 1 else out / self.scale


class AddedAttention(Attention):
    """Attention of the pixels of (B, C, H, W), after a norm, to themselves and to keys that the text adds, with a
    residual; or to the text alone. diffusers' Attention with AttnAddedKVProcessor."""

    def __init__(self, config: UNetConfig, level: Level, layer: Layer) -> None:
        channels = layer.out_channels
        super().__init__(channels, level.heads, context=channels, bias=True)
        self.group_norm = GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.add_k_proj, self.add_v_proj = Linear(level.context, channels), Linear(level.context, channels)
        grouped = config.cross_attention_norm == "group_norm"
        self.norm_cross = GroupNorm(32, level.context, eps=1e-5) if grouped else None
        self.only_cross = level.only_cross
        self.by_qkv = not self.only_cross
        if self.only_cross:
            del self.to_k, self.to_v

    @property
    def cross_attentions(self) -> tuple[Attention, ...]:
        return (self,)

    @property
    def packed(self) -> tuple[str, ...]:
        return ("add_k_proj", "add_v_proj") if self.only_cross else super().packed

    def kv(self, context: Tensor) -> Tensor:
        """Keys | values of context (S, M, D), normalised over all its tokens: (S, M, 2 * channels)."""
        if self.norm_cross is not None:
            context = to_tokens(self.norm_cross(to_image(context, context.shape[1])))
        return project(context, (self.add_k_proj, self.add_v_proj))

    def forward(  # type: ignore[override]
        self, x: Tensor | Pending, texts: Iterator[Text], rows: Iterator[Tensor] | None = None
    ) -> Tensor:
        tokens, text = to_tokens(self.group_norm(x)), next(texts)
        x = as_tensor(x)
        added, kv_len, slots = text.kv, text.kv_len, text.slots
        if self.only_cross:
            q, (k, v) = self.to_q(tokens), added.chunk(2, dim=-1)
        else:
            if slots is not None:
                added, kv_len, slots = added[slots], None if kv_len is None else kv_len[slots], None
            if kv_len is not None:
                kv_len = kv_len + tokens.shape[1]
            q, *own = self.qkv(tokens)
            # The pixels come first, so that what is not visible of a text is at the end.
            k, v = (torch.cat(pair, dim=1) for pair in zip(own, added.chunk(2, dim=-1), strict=True))
        out = super().forward(q, k, v, residual=to_tokens(x), kv_len=kv_len, slots=slots)
        return to_image(out, x.shape[2])


class NormedAttention(Attention):
    """Attention to a text that is normalised for it; diffusers' Attention with `cross_attention_norm` layer_norm."""

    def __init__(self, channels: int, heads: int, context: int) -> None:
        super().__init__(channels, heads, context, bias=True)
        self.norm_cross = LayerNorm(context)

    def kv(self, context: Tensor) -> Tensor:
        return super().kv(self.norm_cross(context))


class AdaptiveAttention(nn.Module):
    """Self-attention of the pixels of (B, C, H, W), if the level has it, and attention to the text, each after an
    AdaptiveNorm and with a residual; diffusers' KAttentionBlock."""

    reads_activated = False  # as of TimedResnet

    def __init__(self, config: UNetConfig, level: Level, layer: Layer) -> None:
        super().__init__()
        channels = layer.out_channels
        heads, groups = channels * level.heads // level.channels, max(1, channels // GROUP_SIZE)
        if level.self_attention:
            self.norm1 = AdaptiveNorm(groups, channels, 1e-5, config.time_embedding_dim)
            self.attn1 = Attention(channels, heads, channels, bias=True)
            self.attn1.by_qkv = True
        self.norm2 = AdaptiveNorm(groups, channels, 1e-5, config.time_embedding_dim)
        self.attn2 = NormedAttention(channels, heads, level.context)
        self.norms = ("norm1", "norm2") if level.self_attention else ("norm2",)
        self.row_channels = 2 * channels * len(self.norms)

    @property
    def cross_attentions(self) -> tuple[Attention, ...]:
        return (self.attn2,)

    def row(self, embedding: Tensor, activated: Tensor) -> Tensor:
        """Its part (R, row_channels) of rows, of embeddings (R, time_channels)."""
        return torch.cat([getattr(self, name).row(embedding) for name in self.norms], dim=1)

    def forward(self, x: Tensor | Pending, texts: Iterator[Text], rows: Iterator[Tensor]) -> Tensor:
        x = as_tensor(x)
        height, parts = x.shape[2], list(next(rows).chunk(len(self.norms), dim=1))
        if len(parts) == 2:
            tokens = to_tokens(self.norm1(x, affine=parts.pop(0)))
            x = to_image(self.attn1(*self.attn1.qkv(tokens), residual=to_tokens(x)), height)
        tokens = to_tokens(self.norm2(x, affine=parts[0]))
        return to_image(_read(self.attn2, tokens, next(texts), to_tokens(x)), height)


SpatialAttention = Transformer | PixelAttention | AddedAttention | AdaptiveAttention
