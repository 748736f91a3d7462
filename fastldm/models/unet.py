"""The U-Net of diffusion models in pixels and in latents, partially evaluated.

Everything that depends only on the schedule and the conditioning is computed once, by `time_rows` and `cross_kv`; the
denoising loop only calls `step`. What its blocks are is data, a `UNetConfig`. Parameter names are those of diffusers'
UNet2DConditionModel and UNet2DModel.

Its first half, `UNetEncoder`, is that of a ControlNet too (controlnet.py), whose outputs the U-Net adds to its skip
connections: `Residuals`. `Features` are what a T2I-Adapter adds inside that half.

What lies between the first level, before it is halved, and the last block of the decoder is the deep part. Its output
changes slowly from step to step, so that rows may take that of an earlier step: `Reuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels.dispatch import is_batch_invariant
from fastldm.models.config import Level, UNetConfig
from fastldm.models.embeddings import ACTIVATIONS, Conditions, GuidanceSinusoids, HintEmbedding
from fastldm.models.interfaces import AddedConditions
from fastldm.models.layers import (
    Attention,
    Beside,
    Conv,
    Downsample,
    GroupNorm,
    Layers,
    Pending,
    PictureKV,
    Upsample,
    as_tensor,
    channels_last,
)
from fastldm.models.resnet import Blur, TimedResnet
from fastldm.models.transformer import (
    AdaptiveAttention,
    AddedAttention,
    PixelAttention,
    SpatialAttention,
    Text,
    Transformer,
)
from fastldm.models.unet_blocks import Layer


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


class UNetEncoder(Conditions):
    """The half of a U-Net up to its middle block, with the embeddings of time and conditioning."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.act_fn, self.skips_between = config.act_fn, config.skips_between
        self.conv_in = Conv(config.in_channels, config.down[0].channels, config.conv_in_kernel)
        *levels, middle = config.encoder_layers
        self.down_blocks: Layers[Block] = Layers()
        for i, (level, layers) in enumerate(zip(config.down, levels, strict=True)):
            self.down_blocks.append(Block(config, level, layers, "down" if i < config.levels - 1 else None))
        self.mid_block = Block(config, config.mid, middle)

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

        skips = [x] if self.skips_between else []
        for block in self.down_blocks:
            for (resnet, attention), is_skip in zip(block.layers(), block.uses_skip, strict=True):
                x = resnet.pending(x, next(rows))
                if attention is not None:
                    x = attention(x, texts, rows)
                if is_skip:
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
                x = block.resize(downsample, x, rows)
                if self.skips_between:
                    skips.append(x)
            if not block.attentions:
                add_feature()

        for resnet, attention in self.mid_block.layers():
            x = resnet.pending(x, next(rows))
            if attention is not None:
                x = attention(x, texts, rows)
        add_feature()
        return x, skips

    def inputs(
        self, temb_row: Tensor, texts: Sequence[Text], deep: int | None = None
    ) -> tuple[Iterator[Tensor], Iterator[Text]]:
        """A row (B, S) of `time_rows` as the parts of all that read it, and the text of each cross-attention, in
        network order. deep: how many rows, the first ones, run the deep part, by default all."""
        rows: Sequence[Tensor] = temb_row.split(self.row_widths, dim=1)
        if deep is not None:
            deep_blocks = self.deep_blocks()
            deep_readers = {reader for block in deep_blocks for reader in block.row_readers()}
            first, *_ = self.down_blocks
            deep_readers.update(first.row_readers(layers=False))
            in_deep = [reader in deep_readers for reader in self.row_readers()]
            rows = [
                row[:deep] if is_deep else row
                for row, is_deep in zip(rows, in_deep, strict=True)
                if deep or not is_deep
            ]
            in_deep = [block in deep_blocks for block in self.blocks() for _ in block.cross_attentions]
            texts = [
                text.first(deep) if is_deep else text
                for text, is_deep in zip(texts, in_deep, strict=True)
                if deep or not is_deep
            ]
        return iter(rows), iter(texts)

    def _rows(self, embedding: Tensor) -> Tensor:
        """Rows (R, S) of embeddings (R, time_embedding_dim)."""
        readers = self.row_readers()
        activated = embedding
        if any(reader.reads_activated for reader in readers):
            activated = ACTIVATIONS[self.act_fn](embedding)
        return torch.cat([reader.row(embedding, activated) for reader in readers], dim=1)

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of texts (B, T, D): a tensor (B, T, 2C) = (k | v) per cross-attention, in network order; none
        in networks without. Where the config has `encoder_hid_dim`, of texts (B, T, encoder_hid_dim), or for
        "image_proj" of vectors of pictures (B, encoder_hid_dim)."""
        text = self.read(encoder_hidden_states)
        return tuple(attention.kv(text) for block in self.blocks() for attention in block.cross_attentions)

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block]

    def deep_blocks(self) -> list[Block]:
        """Those in which all is deep."""
        return self.blocks()[1:]

    def row_readers(self) -> list[TimedResnet | AdaptiveAttention]:
        """All that read a part of a time row, in network order."""
        return [reader for block in self.blocks() for reader in block.row_readers()]

    @cached_property
    def row_widths(self) -> list[int]:
        """Channels of each part."""
        return [reader.row_channels for reader in self.row_readers()]


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
        if config.needs_guidance and config.time_cond_proj_dim is not None:
            self.guidance_proj = GuidanceSinusoids(config.time_cond_proj_dim)
        self.up_blocks: Layers[Block] = Layers()
        for i, (level, layers) in enumerate(zip(config.up, config.decoder_layers, strict=True)):
            self.up_blocks.append(Block(config, level, layers, "up" if i < config.levels - 1 else None))
        channels = config.up[-1].out_channels
        self.conv_norm_out = GroupNorm(config.norm_groups, channels, config.norm_eps) if config.out_norm else None
        self.out_act = config.act_fn if config.conditional else "silu"
        self.conv_out = Conv(channels, config.out_channels, config.conv_out_kernel)

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
        of the skip connection. Only a network of `UNetConfig.even_sizes` takes multiples of its stride alone:
        InputError.
        """
        stride = self.config.stride if self.config.even_sizes else 1
        if any(size % stride for size in model_input.shape[2:]):
            height, width = model_input.shape[2:]
            raise InputError(f"model_input is {height}x{width}: this network takes multiples of {stride}")
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
            for (resnet, attention), reads_skip in zip(block.layers(), block.uses_skip, strict=True):
                x = resnet.pending(x, next(rows), skip=as_tensor(skips.pop()) if reads_skip else None)
                if attention is not None:
                    x = attention(x, texts, rows)
            for upsample in block.upsamplers:
                height, width = as_tensor(skips[-1]).shape[2:]
                x = block.resize(upsample, x, rows, (height, width))

        if self.conv_norm_out is None:
            out = self.conv_out(as_tensor(x))
            return -out[:, : self.config.latent_channels] if self.config.enlarges_latents else out
        if self.out_act == "silu":
            return self.conv_out(self.conv_norm_out(x, silu=True))
        return self.conv_out(ACTIVATIONS[self.out_act](self.conv_norm_out(x)))

    def time_rows(
        self,
        timesteps: Tensor,
        *,
        added: AddedConditions | None = None,
        guidance: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        text_embedding: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """What the network reads of time and conditioning: timesteps (R,) -> (R, S), one row per step and U-Net row.

        A row has a part for each resnet (see resnet.py), and each attention with an adaptive norm, in network order.
        timesteps may be fractional. InputError for what the config says and is missing: `added`, with R rows (SDXL);
        `guidance` (R,), the guidance scale (LCM); `class_labels`, (R,) whole numbers (an upscaler's noise level, ADM's
        class), (R,) timesteps, or vectors (R, class_input_dim) (unCLIP: a picture's, and its noise level's) or (R,
        time_embedding_dim); `timestep_cond` (R, time_cond_proj_dim) (the x2 upscaler); `encoder_hidden_states`
        (R, T, D), before its projection, or those of one step, which are those of all, or `text_embedding` of them
        (R, time_embedding_dim) (IF); `image_embeds` (R, encoder_hid_dim) (Kandinsky).
        """
        condition = timestep_cond
        if self.config.needs_guidance and condition is None:
            if guidance is None:
                raise InputError("this U-Net (LCM) reads the guidance scale: guidance is None, expected (R,) numbers")
            condition = self.guidance_proj(guidance)
        if condition is None and self.config.time_cond_proj_dim is not None:
            raise InputError(
                f"this network (the x2 upscaler) reads timestep_cond: it is None, expected "
                f"(R, {self.config.time_cond_proj_dim})"
            )
        embedding = self.embed(
            timesteps,
            added=added,
            condition=condition,
            class_labels=class_labels,
            encoder_hidden_states=encoder_hidden_states,
            text_embedding=text_embedding,
            image_embeds=image_embeds,
        )
        return self._rows(embedding)

    def hint(self, image: Tensor) -> Tensor:
        """A map (B, 3, H, W) as the channels that are read behind the latents (B, 4, H / 8, W / 8), of a network whose
        `addition_embed_type` is "image_hint"."""
        embedding = getattr(self, "add_embedding", None)
        if not isinstance(embedding, HintEmbedding):
            raise InputError("this network reads no hint ('addition_embed_type')")
        return embedding.hint(image)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The full network with diffusers' arguments: sample (B, Cin, H, W), timestep () or (B,) -> (B, Cout, H, W).

        timestep_cond (B, time_cond_proj_dim) is LCM's embedded guidance; added_cond_kwargs has SDXL's text_embeds and
        time_ids, or Kandinsky's image_embeds and hint; class_labels as of `time_rows`.
        """
        if encoder_hidden_states is not None and not self.config.conditional:
            raise InputError("this network (UNet2DModel) reads no text: got encoder_hidden_states, expected None")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        given = added_cond_kwargs or {}
        added = AddedConditions(given["text_embeds"], given["time_ids"]) if self.needs_added and given else None
        # Its text is a row each, where a trace would divide the two numbers of rows.
        pooled = self.config.pools_text and encoder_hidden_states is not None
        embedding = self.embed(
            timesteps,
            added=added,
            condition=timestep_cond,
            class_labels=class_labels,
            text_embedding=self.text_embedding(encoder_hidden_states) if pooled else None,  # type: ignore[arg-type]
            image_embeds=given.get("image_embeds"),
        )
        if "hint" in given:
            sample = torch.cat((sample, self.hint(given["hint"]).to(sample.dtype)), dim=1)
        text = given.get("image_embeds") if self.config.encoder_hid_dim_type == "image_proj" else encoder_hidden_states
        if text is None and self.config.cross_widths:
            raise InputError("this network reads text: encoder_hidden_states is None")
        return self.step(sample, self._rows(embedding), () if text is None else self.cross_kv(text))

    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def deep_blocks(self) -> list[Block]:
        return self.blocks()[1:-1]


_ATTENTIONS: dict[str, Callable[[UNetConfig, Level, Layer], SpatialAttention]] = {
    "transformer": Transformer,
    "pixels": PixelAttention.of_level,
    "added": AddedAttention,
    "adaptive": AdaptiveAttention,
}


class Block(nn.Module):
    """The layers of one level. The U-Net runs them, since it distributes time rows, text and skip connections.

    resize: "down" or "up", if the level is halved or enlarged at its end.
    """

    def __init__(
        self, config: UNetConfig, level: Level, layers: Sequence[Layer], resize: Literal["down", "up"] | None = None
    ) -> None:
        super().__init__()
        self.uses_skip = level.uses_skip
        self.resnets: Layers[TimedResnet] = Layers()
        self.attentions: Layers[SpatialAttention] = Layers()
        self.downsamplers: Layers[Downsample | TimedResnet | Blur] = Layers()
        self.upsamplers: Layers[Upsample | TimedResnet | Blur] = Layers()
        for layer in layers:
            self.resnets.append(TimedResnet(config, level, layer))
            if layer.depth is not None:
                self.attentions.append(_ATTENTIONS[level.attention](config, level, layer))
        if resize is None:
            return
        last, resizer = level.out_channels, self.downsamplers if resize == "down" else self.upsamplers
        if level.resampling == "resnet":
            resizer.append(TimedResnet(config, level, Layer(last, 0, last, last, None), resize))
        elif level.resampling == "blur":
            resizer.append(Blur(resize))
        else:
            resizer.append(Downsample(last, config.downsample_padding) if resize == "down" else Upsample(last))

    @property
    def cross_attentions(self) -> list[Attention]:
        """Those that read the text, in the order in which they do."""
        return [each for attention in self.attentions for each in attention.cross_attentions]

    def layers(self) -> Iterator[tuple[TimedResnet, SpatialAttention | None]]:
        """Each resnet with the attention after it, if there is one."""
        return zip_longest(self.resnets, self.attentions)

    def row_readers(self, layers: bool = True) -> list[TimedResnet | AdaptiveAttention]:
        """Those that read a part of a time row, in the order in which they do. layers: or of what resizes alone."""
        inner = [layer for pair in self.layers() for layer in pair] if layers else []
        readers = (*inner, *self.downsamplers, *self.upsamplers)
        return [layer for layer in readers if isinstance(layer, TimedResnet | AdaptiveAttention)]

    def resize(
        self,
        layer: Downsample | Upsample | TimedResnet | Blur,
        x: Tensor | Pending,
        rows: Iterator[Tensor],
        size: tuple[int, int] | None = None,
    ) -> Tensor | Pending:
        """Halve or enlarge x by one of its layers. size: of the output, where it enlarges."""
        if isinstance(layer, TimedResnet):
            return layer.pending(x, next(rows), size=size)
        if isinstance(layer, Downsample):
            return layer.pending(as_tensor(x))
        return layer(as_tensor(x), size) if isinstance(layer, Upsample) else layer(as_tensor(x))
