"""The U-Net of Stable Diffusion 1, 2, XL and their distilled relatives, partially evaluated.

Everything that depends only on the schedule and the conditioning is computed once, by `time_rows` and `cross_kv`; the
denoising loop only calls `step`. Parameter names are those of diffusers' UNet2DConditionModel.

Its first half, `UNetEncoder`, is that of a ControlNet too (controlnet.py), whose outputs the U-Net adds to its skip
connections: `Residuals`. `Features` are what a T2I-Adapter adds inside that half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels.dispatch import is_batch_invariant
from fastldm.kernels.linear import fast_library
from fastldm.models.config import Level, UNetConfig
from fastldm.models.interfaces import AddedConditions
from fastldm.models.layers import (
    GEGLU,
    Attention,
    Beside,
    Conv,
    Downsample,
    GroupNorm,
    LayerNorm,
    Layers,
    Linear,
    Pending,
    PictureKV,
    Pointwise,
    Resnet,
    Upsample,
    as_tensor,
    channels_last,
    to_image,
    to_tokens,
)


class Text(NamedTuple):
    """The text inputs of one cross-attention."""

    kv: Tensor  # (texts, T, 2C), keys | values
    kv_len: Tensor | None  # (texts,) int32
    slots: Tensor | None  # (B,) int32
    pictures: tuple[PictureKV, ...] = ()


class Pictures(NamedTuple):
    """What an IP-Adapter adds to R consecutive rows of a U-Net, in each cross-attention."""

    kv: tuple[Tensor | None, ...]  # (P, T, 2C), of P rows or slots: `IPAdapter.kv`; None adds nothing
    rows: int  # R
    first: int = 0  # of the rows
    kv_len: Tensor | None = None  # (P,) int32: the tokens of each; 0 adds nothing
    slots: Tensor | None = None  # (R,) int32: which of P each row reads, by default its own


class Residuals(NamedTuple):
    """What a ControlNet adds to R consecutive rows of a U-Net: to its skip connections and to the output of its middle
    block."""

    skips: tuple[Tensor, ...]  # of each skip connection (R, C, h, w), or (R, C, 1, 1) for all pixels alike
    mid: Tensor  # the same of the middle block's output
    weights: Tensor | None = None  # (skips + 1, R) in the network's dtype; None: 1
    first: int | None = 0  # of the rows; None: all rows, out of place, as exported networks read them


class Features(NamedTuple):
    """What a T2I-Adapter adds to R consecutive rows of a U-Net: at the end of each level, then to the middle block's
    output."""

    levels: tuple[Tensor, ...]  # (R, C, h, w); there may be fewer than levels
    first: int | None = 0  # as of `Residuals`


class UNetEncoder(nn.Module):
    """The half of a U-Net up to its middle block, with the embeddings of time and conditioning."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.down[0].channels
        self.conv_in = Conv(config.in_channels, channels)
        self.time_proj = Sinusoids(channels, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimeEmbedding(channels, config.time_embedding_dim, config.time_cond_proj_dim)
        self.needs_added = config.needs_added
        if config.needs_added:
            self.add_time_proj = Sinusoids(config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            self.add_embedding = TimeEmbedding(config.addition_input_dim, config.time_embedding_dim)
        self.down_blocks: Layers[Block] = Layers()
        for i, level in enumerate(config.down):
            block = Block(config, level, channels)
            channels = level.channels
            if i < config.levels - 1:
                block.downsamplers.append(Downsample(channels, config.downsample_padding))
            self.down_blocks.append(block)
        self.mid_block = Block(config, config.mid, channels)

    def encode(
        self, x: Tensor | Pending, rows: Iterator[Tensor], texts: Iterator[Text], features: Sequence[Features] = ()
    ) -> tuple[Tensor | Pending, list[Tensor | Pending]]:
        """The output of conv_in (B, C, H, W) -> that of the middle block, and all skip connections."""
        added = [(iter(feature.levels), feature.first) for feature in features]

        def add_feature() -> None:
            nonlocal x
            if is_batch_invariant():
                as_tensor(x)  # whether or not a row has something added: what is pending rounds otherwise
            for levels, first in added:
                if (value := next(levels, None)) is None:
                    continue
                if first is not None:
                    add_rows(as_tensor(x), value, first)
                    continue
                is_skip, x = x is skips[-1], as_tensor(x) + value
                if is_skip:
                    skips[-1] = x

        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet.pending(x, next(rows))
                if transformer is not None:
                    x = transformer(x, texts)
                skips.append(x)
            # As diffusers: before a level with transformers is halved, and after a level without is. Either way, the
            # last skip connection is the same tensor.
            if block.attentions:
                add_feature()
            for downsample in block.downsamplers:
                x = downsample.pending(as_tensor(x))
                skips.append(x)
            if not block.attentions:
                add_feature()

        for resnet, transformer in self.mid_block.layers():
            x = resnet.pending(x, next(rows))
            if transformer is not None:
                x = transformer(x, texts)
        add_feature()
        return x, skips

    def split_rows(self, temb_row: Tensor) -> Iterator[Tensor]:
        """A row (B, S) of `time_rows` as the shifts of each resnet, in network order."""
        return iter(temb_row.split([resnet.conv2.weight.shape[0] for resnet in self.resnets()], dim=1))

    def _time_rows(self, timesteps: Tensor, added: AddedConditions | None, condition: Tensor | None = None) -> Tensor:
        dtype = self.conv_in.weight.dtype
        embedding = self.time_embedding(self.time_proj(timesteps).to(dtype), condition)
        if self.needs_added:
            if added is None:
                raise InputError("this network (SDXL) reads pooled text and sizes: got None, expected R rows of each")
            sizes = self.add_time_proj(added.time_ids.flatten())
            sizes = sizes.unflatten(0, added.time_ids.shape).flatten(1)  # (R, 6 * addition_time_embed_dim)
            embedding = embedding + self.add_embedding(torch.cat((added.text_embeds, sizes), dim=1).to(dtype))
        h = F.silu(embedding)
        return torch.cat([resnet.time_emb_proj(h) + resnet.conv1.bias for resnet in self.resnets()], dim=1)

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of texts (B, T, D): a tensor (B, T, 2C) = (k | v) per cross-attention, in network order."""
        return tuple(
            layer.attn2.kv(encoder_hidden_states)
            for block in self.blocks()
            for transformer in block.attentions
            for layer in transformer.transformer_blocks
        )

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block]

    def resnets(self) -> list[Resnet]:
        """All resnets in network order."""
        return [resnet for block in self.blocks() for resnet in block.resnets]


def add_rows(x: Tensor, value: Tensor, first: int, weight: Tensor | None = None) -> None:
    """x[first : first + R] += weight * value in place: x (B, C, h, w), value (R, C, h, w) or (R, C, 1, 1), weight (R,).

    The other rows are not touched, for what is NaN elsewhere is so times zero too.
    """
    rows = x[first : first + value.shape[0]]
    if weight is None:
        rows += value
    else:
        rows.addcmul_(value, weight[:, None, None, None])


class UNet(UNetEncoder):
    """From noisy latents, a timestep and a text to noise, v or sample, as the checkpoint was trained.

    Used in parts:
        rows = unet.time_rows(timesteps)            # once per schedule and conditioning, (steps, S)
        kv = unet.cross_kv(encoder_hidden_states)   # once per prompt
        out = unet.step(x, rows[i : i + 1], kv)     # each step
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.config = config
        self.beside = Beside()
        channels = config.down[-1].channels
        if config.time_cond_proj_dim is not None:
            self.guidance_proj = GuidanceSinusoids(config.time_cond_proj_dim)
        skips = list(config.skip_channels)  # each resnet of the decoder takes the last remaining one
        self.up_blocks: Layers[Block] = Layers()
        for i, level in enumerate(config.up):
            block = Block(config, level, channels, [skips.pop() for _ in level.depths])
            channels = level.channels
            if i < config.levels - 1:
                block.upsamplers.append(Upsample(channels))
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.conv_out = Conv(channels, config.out_channels)

    def step(
        self,
        model_input: Tensor,
        temb_row: Tensor,
        cross_kv: Sequence[Tensor],
        *,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
        residuals: Sequence[Residuals] = (),
        features: Sequence[Features] = (),
        pictures: Sequence[Pictures] = (),
    ) -> Tensor:
        """Evaluate the network: model_input (B, Cin, H, W), temb_row (B, S) of time_rows, cross_kv of B texts ->
        (B, Cout, H, W).

        kv_len (texts,) int32: the number of visible tokens of each text, by default all. slots (B,) int32: the text in
        cross_kv that each row reads, by default its own. Both stay on the device.
        residuals: of ControlNets. features: of T2I-Adapters. pictures: of IP-Adapters.

        Computes only what changes in each step. All H and W are allowed, as in diffusers: upsampling goes to the size
        of the skip connection.
        """
        rows = self.split_rows(temb_row)
        texts = iter(
            Text(
                kv,
                kv_len,
                slots,
                tuple(
                    PictureKV(own, each.kv_len, each.slots, slice(each.first, each.first + each.rows))
                    for each in pictures
                    if (own := each.kv[i]) is not None
                ),
            )
            for i, kv in enumerate(cross_kv)
        )
        x, skips = self.encode(self.conv_in.pending(channels_last(model_input)), rows, texts, features)
        if residuals:  # which are added in place
            x, skips = as_tensor(x), [as_tensor(skip) for skip in skips]
            if not self.mid_block.resnets:
                x = x.clone()  # also the last skip connection
        for control in residuals:
            if control.first is None:
                x = as_tensor(x) + control.mid
                skips = [as_tensor(skip) + value for skip, value in zip(skips, control.skips, strict=True)]
                continue
            weights = control.weights if control.weights is None else control.weights.unbind()
            for k, (skip, value) in enumerate(zip((*skips, x), (*control.skips, control.mid), strict=True)):
                add_rows(as_tensor(skip), value, control.first, None if weights is None else weights[k])

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = resnet.pending(x, next(rows), skip=as_tensor(skips.pop()))
                if transformer is not None:
                    x = transformer(x, texts)
            for upsample in block.upsamplers:
                height, width = as_tensor(skips[-1]).shape[2:]
                x = upsample(as_tensor(x), (height, width))

        return self.conv_out(self.conv_norm_out(x, silu=True))

    def time_rows(
        self, timesteps: Tensor, *, added: AddedConditions | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The resnets' inputs from time and conditioning: timesteps (R,) -> (R, S), one row per step and U-Net row.

        A row is time_emb_proj(silu(embedding)) of all resnets, concatenated in network order, plus the biases of the
        convolutions to whose outputs it is added. timesteps may be fractional. SDXL needs `added`, with R rows, and LCM
        `guidance` (R,), the guidance scale: InputError if they are missing.
        """
        condition = None
        if self.config.time_cond_proj_dim is not None:
            if guidance is None:
                raise InputError("this U-Net (LCM) reads the guidance scale: guidance is None, expected (R,) numbers")
            condition = self.guidance_proj(guidance)
        return self._time_rows(timesteps, added, condition)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The full network with diffusers' arguments: sample (B, Cin, H, W), timestep () or (B,) -> (B, Cout, H, W).

        timestep_cond (B, time_cond_proj_dim) is LCM's embedded guidance; added_cond_kwargs has SDXL's text_embeds and
        time_ids.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        added = None
        if added_cond_kwargs:
            added = AddedConditions(added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        rows = self._time_rows(timesteps, added, timestep_cond)
        return self.step(sample, rows, self.cross_kv(encoder_hidden_states))

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]


class Block(nn.Module):
    """The layers of one level. The U-Net runs them, since it distributes time rows, text and skip connections."""

    def __init__(self, config: UNetConfig, level: Level, in_channels: int, skips: Sequence[int] = ()) -> None:
        super().__init__()
        self.resnets: Layers[Resnet] = Layers()
        self.attentions: Layers[Transformer] = Layers()
        self.downsamplers: Layers[Downsample] = Layers()
        self.upsamplers: Layers[Upsample] = Layers()
        for depth, skip in zip(level.depths, skips or [0] * len(level.depths), strict=True):
            resnet_channels = in_channels + skip
            self.resnets.append(
                Resnet(resnet_channels, level.channels, config.norm_groups, config.norm_eps, config.time_embedding_dim)
            )
            if depth is not None:
                self.attentions.append(Transformer(config, level, depth))
            in_channels = level.channels

    def layers(self) -> Iterator[tuple[Resnet, Transformer | None]]:
        """Each resnet with the transformer after it, if there is one."""
        return zip_longest(self.resnets, self.attentions)


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
            tokens = layer(tokens, next(texts))
        out = self.proj_out.add_to(to_tokens(x), tokens) if ahead else self.proj_out(tokens, residual=to_tokens(x))
        return to_image(out, x.shape[2])


class TransformerLayer(nn.Module):
    """x (B, N, C) and the text's keys and values -> (B, N, C); diffusers' BasicTransformerBlock."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        channels = level.channels
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, level.heads, channels)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, level.heads, level.context)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        h = self.norm1(x, self.attn1.to_q)
        x, h = self.norm2.add(self.attn1(*self.attn1.qkv(h)), x, then=self.attn2.to_q)
        q, (k, v) = self.attn2.to_q(h), text.kv.chunk(2, dim=-1)
        attended = self.attn2(q, k, v, kv_len=text.kv_len, slots=text.slots, pictures=text.pictures)
        if fast_library(x):  # cuBLAS adds a residual in its own pass where there is no bias left to add
            x, h = self.norm3.add(attended, x, self.ff.last.bias, self.ff.first)
            return self.ff.add_to(x, h)
        x, h = self.norm3.add(attended, x, then=self.ff.first)
        return self.ff(h, residual=x)


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


class TimeEmbedding(nn.Module):
    """Two linear layers over an embedded number; diffusers' TimestepEmbedding."""

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = Linear(in_channels, out_channels)
        self.linear_2 = Linear(out_channels, out_channels)
        self.cond_proj = None if condition_channels is None else Linear(condition_channels, in_channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition.to(x.dtype))
        return self.linear_2(F.silu(self.linear_1(x)))


class Sinusoids(nn.Module):
    """`timestep_embedding` as a module; float32 in networks of any dtype."""

    def __init__(self, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.channels, self.flip_sin_to_cos, self.freq_shift = channels, flip_sin_to_cos, freq_shift

    def forward(self, x: Tensor) -> Tensor:
        return timestep_embedding(x, self.channels, self.flip_sin_to_cos, self.freq_shift)


class GuidanceSinusoids(nn.Module):
    """`guidance_embedding` as a module; float32 too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, guidance: Tensor) -> Tensor:
        return guidance_embedding(guidance, self.channels)


# Both embeddings have diffusers' order of operations: at an angle of 1,000, the last bit of a frequency makes 1e-4.


def timestep_embedding(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of (N,) numbers: (N, channels) in float32. Formula: Ho et al. 2020, arXiv:2006.11239."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(pair, dim=1), (0, channels % 2))


def guidance_embedding(guidance: Tensor, channels: int) -> Tensor:
    """Sinusoids of (N,) guidance scales: (N, channels) in float32. Formula: diffusers' LCM pipeline."""
    half = channels // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=guidance.device) * -step)
    angle = ((guidance.float() - 1) * 1000)[:, None] * frequency
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, channels % 2))
