"""The transformers of a U-Net: self-attention, cross-attention to the text, and a feed-forward, over the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
    to_image,
    to_tokens,
)


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

    def __init__(self, config: UNetConfig, level: Level, depth: int) -> None:
        super().__init__()
        channels = level.channels
        projection = Linear if config.linear_projection else Pointwise
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks: Layers[TransformerLayer] = Layers(TransformerLayer(level) for _ in range(depth))
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor | Pending, texts: Iterator[Text]) -> Tensor:
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


def _read(attention: Attention, x: Tensor, text: Text) -> Tensor:
    """A cross-attention of x (B, N, C) to a text."""
    q, (k, v) = attention.to_q(x), text.kv.chunk(2, dim=-1)
    return attention(q, k, v, kv_len=text.kv_len, slots=text.slots, pictures=text.pictures)


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
