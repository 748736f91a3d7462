"""The U-Net of Stable Diffusion 1, 2, XL and their distilled relatives, partially evaluated.

Everything that depends only on the schedule and the conditioning is computed once, by `time_rows` and `cross_kv`; the
denoising loop only calls `step`. Parameter names are those of diffusers' UNet2DConditionModel.

Its first half, `UNetEncoder`, is that of a ControlNet too (controlnet.py), whose outputs the U-Net adds to its skip
connections: `Residuals`. `Features` are what a T2I-Adapter adds inside that half.

What lies between the first level, before it is halved, and the last block of the decoder is the deep part. Its output
changes slowly from step to step, so that rows may take that of an earlier step: `Reuse`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels.dispatch import is_batch_invariant
from fastldm.models.config import Level, UNetConfig
from fastldm.models.interfaces import AddedConditions
from fastldm.models.layers import (
    Beside,
    Conv,
    Downsample,
    GroupNorm,
    Layers,
    Linear,
    Pending,
    PictureKV,
    Resnet,
    Upsample,
    as_tensor,
    channels_last,
    parameter,
)
from fastldm.models.transformer import Text, Transformer


class Pictures(NamedTuple):
    """What an IP-Adapter adds to R consecutive rows of a U-Net, in each cross-attention."""

    kv: tuple[Tensor | None, ...]  # (P, T, 2C), of P rows or slots: `IPAdapter.kv`; None adds nothing
    rows: int  # R
    first: int = 0  # of the rows
    kv_len: Tensor | None = None  # (P,) int32: the tokens of each; 0 adds nothing
    slots: Tensor | None = None  # (R,) int32: which of P each row reads, by default its own


class Residuals(NamedTuple):
    """What a ControlNet adds to R consecutive rows of a U-Net: to its skip connections and to the output of its middle
    block. For rows that reuse deep features there is nothing in the deep part: its tensors have fewer rows, and where
    there are none it has no skip connections."""

    skips: tuple[Tensor, ...]  # of each skip connection (R, C, h, w), or (R, C, 1, 1) for all pixels alike
    mid: Tensor  # the same of the middle block's output
    weights: Tensor | None = None  # (skips + 1, R) in the network's dtype; None: 1
    first: int | None = 0  # of the rows; None: all rows, out of place, as exported networks read them


class Features(NamedTuple):
    """What a T2I-Adapter adds to R consecutive rows of a U-Net: at the end of each level, then to the middle block's
    output."""

    levels: tuple[Tensor, ...]  # (R, C, h, w); there may be fewer than levels
    first: int | None = 0  # as of `Residuals`


class Reuse(NamedTuple):
    """Of the rows of a U-Net, the first `rows` compute all, and the rest reuse the deep features of an earlier step."""

    rows: int
    exchange: Callable[[Tensor | None], Tensor]
    """Takes the deep features of the first rows (rows, C, H, W), None where there are none; returns those of all, of
    which the first are these, and that nobody writes. C: `UNetConfig.deep_channels`."""


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
        self.needs_class = config.needs_class or config.needs_vector
        self.class_embedding: nn.Module
        if config.num_class_embeds is not None:
            self.class_embedding = ClassEmbedding(config.num_class_embeds, config.time_embedding_dim)
        elif config.class_input_dim is not None:
            self.class_embedding = TimeEmbedding(config.class_input_dim, config.time_embedding_dim)
        self.down_blocks: Layers[Block] = Layers()
        for i, level in enumerate(config.down):
            block = Block(config, level, channels)
            channels = level.channels
            if i < config.levels - 1:
                block.downsamplers.append(Downsample(channels, config.downsample_padding))
            self.down_blocks.append(block)
        self.mid_block = Block(config, config.mid, channels)

    def encode(
        self,
        x: Tensor | Pending,
        rows: Iterator[Tensor],
        texts: Iterator[Text],
        features: Sequence[Features] = (),
        deep: int | None = None,
    ) -> tuple[Tensor | Pending, list[Tensor | Pending]]:
        """The output of conv_in (B, C, H, W) -> that of the middle block, and all skip connections.

        deep: how many rows, the first ones, go on into the deep part, by default all; if none, the skip connections end
        there. rows and texts are those of `inputs`.
        """
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
            if deep is not None and block is self.down_blocks[0]:
                x = as_tensor(x)[:deep]
                if not deep:
                    return x, skips
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

    def inputs(
        self, temb_row: Tensor, texts: Sequence[Text], deep: int | None = None
    ) -> tuple[Iterator[Tensor], Iterator[Text]]:
        """A row (B, S) of `time_rows` as the shifts of each resnet, and the text of each cross-attention, in network
        order. deep: how many rows, the first ones, run the deep part, by default all."""
        rows: Sequence[Tensor] = temb_row.split([resnet.conv2.weight.shape[0] for resnet in self.resnets()], dim=1)
        if deep is not None:
            deep_blocks = self.deep_blocks()
            in_deep = [block in deep_blocks for block in self.blocks() for _ in block.resnets]
            rows = [
                row[:deep] if is_deep else row
                for row, is_deep in zip(rows, in_deep, strict=True)
                if deep or not is_deep
            ]
            in_deep = [block in deep_blocks for block in self.blocks() for _ in range(block.cross_attentions)]
            texts = [
                text.first(deep) if is_deep else text
                for text, is_deep in zip(texts, in_deep, strict=True)
                if deep or not is_deep
            ]
        return iter(rows), iter(texts)

    def _time_rows(
        self,
        timesteps: Tensor,
        added: AddedConditions | None,
        condition: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        dtype = self.conv_in.weight.dtype
        embedding = self.time_embedding(self.time_proj(timesteps).to(dtype), condition)
        if self.needs_class:
            if class_labels is None:
                raise InputError(
                    "this network reads a class (an upscaler's noise level, or unCLIP's picture): class_labels is None"
                )
            embedding = embedding + self.class_embedding(class_labels)
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
            attention.kv(encoder_hidden_states)
            for block in self.blocks()
            for transformer in block.attentions
            for layer in transformer.transformer_blocks
            for attention in layer.cross_attentions
        )

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block]

    def deep_blocks(self) -> list[Block]:
        """Those in which all is deep."""
        return self.blocks()[1:]

    def resnets(self) -> list[Resnet]:
        """All resnets in network order."""
        return [resnet for block in self.blocks() for resnet in block.resnets]


def add_rows(x: Tensor, value: Tensor, first: int, weight: Tensor | None = None) -> None:
    """x[first : first + R] += weight * value in place: x (B, C, h, w), value (R, C, h, w) or (R, C, 1, 1), weight (R,).

    The other rows are not touched, for what is NaN elsewhere is so times zero too. Rows that x does not have are left
    out.
    """
    rows = x[first : first + value.shape[0]]
    value = value[: rows.shape[0]]
    if not rows.shape[0]:
        return
    if weight is None:
        rows += value
    else:
        rows.addcmul_(value, weight[: rows.shape[0], None, None, None])


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
        reuse: Reuse | None = None,
        perturbed: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Evaluate the network: model_input (B, Cin, H, W), temb_row (B, S) of time_rows, cross_kv of B texts ->
        (B, Cout, H, W).

        kv_len (texts,) int32: the number of visible tokens of each text, by default all. slots (B,) int32: the text in
        cross_kv that each row reads, by default its own. Both stay on the device.
        residuals: of ControlNets. features: of T2I-Adapters. pictures: of IP-Adapters. reuse: which rows compute all of
        the network, by default all do; the levels are two or more where it is given. perturbed: by place in
        `UNetConfig.self_attentions`, (B,) bool, the rows in which each pixel attends to itself alone.

        Computes only what changes in each step. All H and W are allowed, as in diffusers: upsampling goes to the size
        of the skip connection.
        """
        deep = None if reuse is None else reuse.rows
        every_text = [
            Text(
                kv,
                kv_len,
                slots,
                tuple(
                    PictureKV(own, each.kv_len, each.slots, slice(each.first, each.first + each.rows))
                    for each in pictures
                    if (own := each.kv[i]) is not None
                ),
                None if perturbed is None else perturbed.get(i),
            )
            for i, kv in enumerate(cross_kv)
        ]
        rows, texts = self.inputs(temb_row, every_text, deep)
        x, skips = self.encode(self.conv_in.pending(channels_last(model_input)), rows, texts, features, deep)
        if residuals:  # which are added in place
            x, skips = as_tensor(x), [as_tensor(skip) for skip in skips]
            if not self.mid_block.resnets:
                x = x.clone()  # also the last skip connection
        for control in residuals:
            if control.first is None:
                x = as_tensor(x) + control.mid
                skips = [as_tensor(skip) + value for skip, value in zip(skips, control.skips, strict=True)]
                continue
            weights = (None,) * (len(skips) + 1) if control.weights is None else control.weights.unbind()
            for skip, value, weight in zip(skips, control.skips, weights, strict=False):
                add_rows(as_tensor(skip), value, control.first, weight)
            add_rows(as_tensor(x), control.mid, control.first, weights[-1])

        for block in self.up_blocks:
            if reuse is not None and block is self.up_blocks[-1]:
                x = reuse.exchange(as_tensor(x) if deep else None)
            elif deep == 0:
                continue
            for resnet, transformer in block.layers():
                x = resnet.pending(x, next(rows), skip=as_tensor(skips.pop()))
                if transformer is not None:
                    x = transformer(x, texts)
            for upsample in block.upsamplers:
                height, width = as_tensor(skips[-1]).shape[2:]
                x = upsample(as_tensor(x), (height, width))

        return self.conv_out(self.conv_norm_out(x, silu=True))

    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The resnets' inputs from time and conditioning: timesteps (R,) -> (R, S), one row per step and U-Net row.

        A row is time_emb_proj(silu(embedding)) of all resnets, concatenated in network order, plus the biases of the
        convolutions to whose outputs it is added. timesteps may be fractional. SDXL needs `added`, with R rows, LCM
        `guidance` (R,), the guidance scale, and an upscaler `class_labels` (R,) whole numbers, the noise level,
        unCLIP (R, class_input_dim), a picture's vector and its noise level's: InputError if they are missing.
        """
        condition = None
        if self.config.time_cond_proj_dim is not None:
            if guidance is None:
                raise InputError("this U-Net (LCM) reads the guidance scale: guidance is None, expected (R,) numbers")
            condition = self.guidance_proj(guidance)
        return self._time_rows(timesteps, added, condition, class_labels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The full network with diffusers' arguments: sample (B, Cin, H, W), timestep () or (B,) -> (B, Cout, H, W).

        timestep_cond (B, time_cond_proj_dim) is LCM's embedded guidance; added_cond_kwargs has SDXL's text_embeds and
        time_ids; class_labels (B,) whole numbers.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        added = None
        if added_cond_kwargs:
            added = AddedConditions(added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        rows = self._time_rows(timesteps, added, timestep_cond, class_labels)
        return self.step(sample, rows, self.cross_kv(encoder_hidden_states))

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def deep_blocks(self) -> list[Block]:
        return self.blocks()[1:-1]


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

    @property
    def cross_attentions(self) -> int:
        """How many there are."""
        return sum(
            len(layer.cross_attentions) for transformer in self.attentions for layer in transformer.transformer_blocks
        )

    def layers(self) -> Iterator[tuple[Resnet, Transformer | None]]:
        """Each resnet with the transformer after it, if there is one."""
        return zip_longest(self.resnets, self.attentions)


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


class ClassEmbedding(nn.Module):
    """A vector for each class; torch's Embedding without its initialisation."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = parameter(classes, channels)

    def forward(self, class_labels: Tensor) -> Tensor:
        return F.embedding(class_labels.int(), self.weight)


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
