"""The description of a U-Net: its levels, and the options that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from fastldm.models.unet_blocks import Layer, Level, layers_of
from fastldm.models.unet_keys import read_unet

TimeNorm = Literal["shift", "scale", "adaptive"]
NOISE_LEVEL_CHANNELS = 128  # of the latent x2 upscaler's embedded noise level, before the pooled text

VECTOR_TOKENS = 32  # of a text, that "image_proj" makes of a picture's vector


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net of diffusers' UNet2DConditionModel or UNet2DModel. The defaults are those of Stable Diffusion's kind."""

    in_channels: int
    out_channels: int
    sample_size: tuple[int, int]  # latent height and width that the model was trained with
    down: tuple[Level, ...]
    mid: Level  # without resnets in distilled networks without middle block
    up: tuple[Level, ...]
    norm_groups: int
    norm_eps: float
    linear_projection: bool
    downsample_padding: int
    flip_sin_to_cos: bool
    freq_shift: float
    time_embedding_dim: int
    time_cond_proj_dim: int | None  # channels of the guidance embedding (LCM), or of what the x2 upscaler has there
    addition_embed_type: str | None
    """What enters the time embedding beside the time: "text_time", pooled text and sizes (SDXL); "text", the text (IF);
    "image" or "image_hint", a picture's vector (Kandinsky)."""
    addition_time_embed_dim: int
    addition_input_dim: int  # total channels of pooled text and embedded sizes
    added_ids: int = 6  # numbers beside the pooled text: SDXL's three sizes; its refiner has 5, one of them a score
    num_class_embeds: int | None = None  # classes, of which each has an embedding; an upscaler's are noise levels
    class_input_dim: int | None = None  # in place of classes, channels of a picture's vector and its noise level's
    class_embed_type: str | None = None
    """How `class_labels` enter the time embedding: by a table (None, if there are classes), as a "timestep", as
    vectors by a "projection", or as they are ("identity")."""
    conditional: bool = True  # whether it is of the class that may read text
    act_fn: str = "silu"  # of the resnets; or "gelu"
    time_norm: TimeNorm = "shift"
    """How time enters a resnet: added between its convolutions; as scale and shift of its second norm; or of both."""
    time_embedding_type: str = "positional"  # or "fourier", by trained frequencies, or "learned", a table
    timesteps: int | None = None  # of that table
    time_embedding_act: str | None = None  # of the whole embedding, beside that of each resnet
    timestep_post_act: str | None = None  # of the time's own embedding
    addition_heads: int = 64  # of the attention that pools the text of "text"
    encoder_hid_dim: int | None = None  # channels of what the text encoder makes, where others are read
    encoder_hid_dim_type: str | None = None  # "text_proj": a projection; "image_proj": tokens of a picture's vector
    cross_attention_norm: str | None = None  # of the text before each of its projections
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    out_norm: bool = True  # whether there is a norm before the last convolution
    skips_between: bool = True  # whether the first convolution's output and those of halvings are skip connections too
    learns_variance: bool = False  # whether the second half of its outputs is the logarithm of the steps' variance
    adds_pooled: bool = False  # whether pooled text is the class that enters the time embedding as it is, as of GLIDE
    resizes_by: str | None = None  # the filter by which a small picture is made as large as the image, as of Karlo
    enlarges_latents: bool = False
    """Whether it is that of the latent x2 upscaler: behind the latents it reads an image's of half their size, and
    pooled text with the time; of its outputs the last is not read, and the others are v with the opposite sign."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, the first that it reads and makes."""
        if self.enlarges_latents:
            return self.out_channels - 1
        return self.out_channels // 2 if self.learns_variance else self.out_channels

    @property
    def step_channels(self) -> int:
        """Channels of what a step of it makes: the latents', and behind them those of a variance that it learns."""
        return self.latent_channels if self.enlarges_latents else self.out_channels

    @property
    def levels(self) -> int:
        return len(self.down)

    @property
    def stride(self) -> int:
        """Latent sizes that are multiples of this are halved evenly; other sizes are allowed too, unless
        `even_sizes`."""
        return 2 ** (self.levels - 1)

    @property
    def even_sizes(self) -> bool:
        """Whether other sizes than multiples of `stride` are not allowed."""
        return any(level.resampling == "blur" for level in self.down)

    @property
    def encoder_layers(self) -> tuple[list[Layer], ...]:
        """The layers of each level of the encoder, and of the middle block."""
        channels, levels = self.down[0].channels, []
        for level in (*self.down, self.mid):
            levels.append(layers_of(level, channels))
            channels = level.out_channels
        return tuple(levels)

    @property
    def decoder_layers(self) -> tuple[list[Layer], ...]:
        """The layers of each level of the decoder, each of which takes the last skip connections that are left."""
        channels, levels, skips = self.mid.out_channels, [], list(self.skip_channels)
        for level in self.up:
            levels.append(layers_of(level, channels, skips))
            channels = level.out_channels
        return tuple(levels)

    @property
    def cross_attention_dim(self) -> int:
        """Channels of the text that the network attends to."""
        return self.down[0].context

    @property
    def text_width(self) -> int:
        """Channels of what the text encoder makes, or of a picture's vector, before a projection."""
        return self.cross_attention_dim if self.encoder_hid_dim_type is None else self.encoder_hid_dim or 0

    @property
    def pools_text(self) -> bool:
        """Whether time rows need the text, all its tokens, as of DeepFloyd IF."""
        return self.addition_embed_type == "text"

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each skip connection: the outputs of the first convolution, and of each resnet and downsampling
        convolution of the encoder."""
        widths = [self.down[0].channels] if self.skips_between else []
        for i, level in enumerate(self.down):
            widths += [level.channels for kept in level.uses_skip if kept]
            widths += [level.channels] if self.skips_between and i < self.levels - 1 else []
        return tuple(widths)

    @property
    def time_channels(self) -> int:
        """Channels of a time row: the sum over all that read it."""
        levels = (*self.down, self.mid, *self.up)
        total = 0
        for level, layers in zip(levels, (*self.encoder_layers, *self.decoder_layers), strict=True):
            for layer in layers:
                total += self._row(layer)
                if layer.depth is not None and level.attention == "adaptive":
                    total += 2 * layer.out_channels * (1 + level.self_attention)
        resampled = [level for level in (*self.down[:-1], *self.up[:-1]) if level.resampling == "resnet"]
        return total + sum(level.channels * (1 if self.time_norm == "shift" else 2) for level in resampled)

    def _row(self, layer: Layer) -> int:
        """What a resnet reads of a time row."""
        if self.time_norm == "adaptive":
            return 2 * (layer.in_channels + layer.skip + layer.channels)
        return layer.channels * (1 if self.time_norm == "shift" else 2)

    @property
    def cross_widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention, in network order."""
        levels = (*self.down, self.mid, *self.up)
        return tuple(
            layer.out_channels
            for level, layers in zip(levels, (*self.encoder_layers, *self.decoder_layers), strict=True)
            if level.cross_attentions
            for layer in layers
            for _ in range((layer.depth or 0) * (2 if level.attention == "transformer" and level.only_cross else 1))
        )

    @property
    def self_attentions(self) -> tuple[str, ...]:
        """The name of the self-attention before each cross-attention, in network order, as diffusers has it; "" where
        there is none, as in all but transformers."""
        blocks = [("down_blocks.{}", self.down), ("mid_block", (self.mid,)), ("up_blocks.{}", self.up)]
        return tuple(
            ""
            if level.only_cross or level.attention != "transformer"
            else f"{name.format(i)}.attentions.{k}.transformer_blocks.{n}.attn1"
            for name, levels in blocks
            for i, level in enumerate(levels)
            if level.cross_attentions
            for k, depth in enumerate(depth for depth in level.depths if depth is not None)
            for n in range(depth)
            for _ in range(2 if level.only_cross and level.attention == "transformer" else 1)
        )

    def reads_text_first(self, module: str) -> bool:
        """Whether a module, by its path, is of a first attention that reads the text (only_cross_attention)."""
        match = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.", module)
        levels = {"down": self.down, "mid": (self.mid,), "up": self.up}
        return match is not None and levels[match[1]][int(match[2] or 0)].only_cross

    @property
    def deep_channels(self) -> int:
        """Of the deep features, which are as large as the latents: what the decoder's last block reads."""
        return self.up[-2].out_channels

    @cached_property
    def beyond_standard(self) -> str | None:
        """What is in it beyond the blocks and embeddings of Stable Diffusion's networks, for errors; None if nothing
        is. What is made for such networks, as adapters, ControlNets and exports, does not know others; nor do their
        channels say what is read."""
        if not self.conditional:
            return "the class UNet2DModel"
        places = {"down_block_types": self.down, "mid_block_type": (self.mid,), "up_block_types": self.up}
        for key, levels in places.items():
            for level in levels:
                for value, standard in ((level.attention, "transformer"), (level.resampling, "convolution")):
                    if value != standard:
                        return f"{key!r} with {value!r} for {standard!r}"
                if level.scale != 1:
                    return f"'mid_block_scale_factor' or 'resnet_out_scale_factor' {level.scale:g}"
        values = {name: getattr(self, name) for name, default in _STANDARD.items() if getattr(self, name) != default}
        if self.addition_embed_type not in (None, "text_time"):
            values["addition_embed_type"] = self.addition_embed_type
        if self.class_embed_type not in (None, "projection"):
            values["class_embed_type"] = self.class_embed_type
        return next((f"{_KEYS.get(name, name)!r} {value!r}" for name, value in values.items()), None)

    @property
    def is_standard(self) -> bool:
        """Whether it is of Stable Diffusion's kind."""
        return self.beyond_standard is None

    @property
    def needs_added(self) -> bool:
        """Whether time rows need pooled text and sizes."""
        return self.addition_embed_type == "text_time"

    @property
    def inpaints(self) -> bool:
        """Whether a mask and the masked image's latents are read behind the latents."""
        return (self.is_standard or self.reads_image_embeds) and self.in_channels == 2 * self.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the latents of an image to edit are read behind the latents, as of InstructPix2Pix."""
        return self.is_standard and self.in_channels == 2 * self.latent_channels and not self.upscales

    @property
    def reads_text(self) -> bool:
        """Whether it attends to a text."""
        return bool(self.cross_widths)

    @property
    def reads_depth(self) -> bool:
        """Whether a depth map is read behind the latents."""
        return self.is_standard and self.in_channels == self.latent_channels + 1

    @property
    def upscales(self) -> bool:
        """Whether a small picture is read behind the latents: at their size, with noise of a level that is a class; or
        without text, in as many channels as they have; or the latents of one."""
        if self.enlarges_latents or self.resizes:
            return True
        if not self.conditional:
            return self.in_channels > self.latent_channels
        return self.is_standard and (self.needs_class or not self.reads_text)

    @property
    def resizes(self) -> bool:
        """Whether that picture may have any size, as of IF, GLIDE and Karlo: it is made as large as the image."""
        reads = self.pools_text or self.adds_pooled
        return self.resizes_by is not None or (reads and self.in_channels == 2 * self.latent_channels)

    @property
    def reads_original(self) -> bool:
        """Whether steps may start from a large picture beside that small one, as of DeepFloyd IF's super-resolution,
        which reads the text states of its first stage too."""
        return self.resizes and self.pools_text

    @property
    def reads_pooled(self) -> bool:
        """Whether time rows need pooled text."""
        return self.needs_added or self.enlarges_latents or self.adds_pooled

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text, if it reads some."""
        if self.enlarges_latents:
            return (self.time_cond_proj_dim or 0) - NOISE_LEVEL_CHANNELS
        if self.adds_pooled:
            return self.time_embedding_dim
        return self.addition_input_dim - self.added_ids * self.addition_time_embed_dim

    @property
    def needs_guidance(self) -> bool:
        """Whether time rows need the guidance scale."""
        return self.is_standard and self.time_cond_proj_dim is not None

    @property
    def needs_class(self) -> bool:
        """Whether time rows need a class."""
        return self.num_class_embeds is not None or self.class_embed_type == "timestep"

    @property
    def needs_label(self) -> bool:
        """Whether that class says what a picture shows; of models that read a text it is a noise level."""
        return self.needs_class and not self.reads_text

    @property
    def needs_vector(self) -> bool:
        """Whether time rows need a picture's vector in place of a class, as of unCLIP."""
        return self.class_input_dim is not None

    @property
    def needs_projection(self) -> bool:
        """Whether a text projection makes what time rows need and attentions read (text_projection.py), as of Karlo."""
        return self.class_embed_type == "identity" and not self.adds_pooled

    @property
    def needs_rows(self) -> bool:
        """Whether time rows are others for each U-Net row."""
        own = self.reads_pooled or self.needs_vector or self.needs_projection or self.needs_label
        return own or self.pools_text or self.reads_image_embeds

    @property
    def reads_image_embeds(self) -> bool:
        """Whether pictures' vectors are all that it reads, with the time and as tokens, as Kandinsky 2.2's decoder."""
        return self.addition_embed_type == "image" and self.encoder_hid_dim_type == "image_proj"

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> UNetConfig:
        """Read diffusers' unet/config.json; CheckpointError if it needs what is not implemented."""
        return cls(**read_unet(cfg, source))


# What is so in every network of Stable Diffusion's kind.
_STANDARD = {
    field.name: field.default
    for field in fields(UNetConfig)
    if field.name in UNetConfig.__dict__
    and field.name
    not in ("added_ids", "num_class_embeds", "class_input_dim", "class_embed_type", "addition_heads", "learns_variance")
}
_KEYS = {
    "time_norm": "resnet_time_scale_shift",
    "time_embedding_act": "time_embedding_act_fn",
    "out_norm": "norm_num_groups",
}
"""The names of fields in files, where they have others."""
