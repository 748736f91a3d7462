"""Configs of networks, read from a checkpoint's config.json files.

The quirks of the files are resolved here, so that the networks in fastldm/models read a regular description. Each file
has a table of the keys that are read (see reading.py). A key that changes the network in a way that is not implemented
is an error that names it; a key that does not change it (dropout, options for training and loading) is ignored.

Over 500 lines, for the tables of keys are read beside each other, and beside what they become.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastldm.errors import CheckpointError
from fastldm.reading import (
    MAX_CHANNELS,
    Either,
    Field,
    Flag,
    Integer,
    Kind,
    ListOf,
    Maybe,
    Number,
    OneOf,
    Text,
    read_fields,
)

_WIDTH = Integer(1, MAX_CHANNELS)  # channels, heads, groups
_LAYERS = Integer(1, 64)
_EPSILON = Number(0, 1)
_MAX_LEVELS = 12
_MAX_BLOCKS = 1500  # resnets and transformer blocks of a U-Net; SDXL's has 87


def _only(values: Mapping[str, tuple[Any, ...]]) -> dict[str, Field]:
    """Keys with their implemented values. A missing key has the first."""
    return {key: Field(OneOf(*allowed), allowed[0]) for key, allowed in values.items()}


def _per_level(kind: Kind, levels: int, scalar: bool = True) -> ListOf:
    """A value per level; a scalar is the value of all levels."""
    return ListOf(kind, levels, levels, scalar, each="level")


def _channels(cfg: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """Channels per level; their number is the length of other keys' lists."""
    fields = {"block_out_channels": Field(ListOf(_WIDTH, 1, _MAX_LEVELS))}
    return read_fields(cfg, fields, source)["block_out_channels"]


def heads_of(values: Mapping[str, Any], source: str) -> tuple[int, int]:
    """'hidden_size' and 'num_attention_heads' of a transformer of transformers; CheckpointError if they do not fit."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % heads:
        raise CheckpointError(f"{source}: 'hidden_size' {hidden} does not divide into 'num_attention_heads' {heads}")
    return hidden, heads


def _check_divides(channels: int, into: int, key: str, source: str, what: str = "channels") -> None:
    if channels % into:
        raise CheckpointError(f"{source}: {channels} {what} do not divide into {key!r} {into}")


# ---------------------------------------------------------------------------------------------------------- U-Net

_CROSS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
_PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}

# `upcast_attention` is left out: it means a float32 softmax, which all attention here has; and so is
# `mid_block_only_cross_attention`, which middle blocks of these types do not read.
_UNET_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1, 0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


_DEPTH = Integer(0, 64)  # transformer blocks after a resnet


def _unet_fields(levels: int) -> dict[str, Field]:
    usual = levels == 4  # defaults of diffusers' class
    down = (*[_CROSS["down"]] * 3, _PLAIN["down"]) if usual else ...
    up = (_PLAIN["up"], *[_CROSS["up"]] * 3) if usual else ...
    depths = _per_level(Either(_DEPTH, ListOf(_DEPTH, 1, _LAYERS.max + 1)), levels)
    return _only(_UNET_ONLY) | {
        "sample_size": Field(Maybe(Either(_WIDTH, ListOf(_WIDTH, 2, 2))), None),
        "in_channels": Field(_WIDTH, 4),
        "out_channels": Field(_WIDTH, 4),
        "down_block_types": Field(_per_level(OneOf(_CROSS["down"], _PLAIN["down"]), levels, scalar=False), down),
        "up_block_types": Field(_per_level(OneOf(_CROSS["up"], _PLAIN["up"]), levels, scalar=False), up),
        "only_cross_attention": Field(_per_level(Flag(), levels), (False,) * levels),
        "num_class_embeds": Field(Maybe(Integer(1, 2**20)), None),
        # The number of heads: a misnomer that diffusers keeps for compatibility.
        "attention_head_dim": Field(_per_level(_WIDTH, levels), (8,) * levels),
        "cross_attention_dim": Field(_per_level(_WIDTH, levels), (1280,) * levels),
        "layers_per_block": Field(_per_level(_LAYERS, levels), (2,) * levels),
        "transformer_layers_per_block": Field(depths, (1,) * levels),
        "reverse_transformer_layers_per_block": Field(Maybe(depths), None),
        "norm_num_groups": Field(_WIDTH, 32),
        "norm_eps": Field(_EPSILON, 1e-5),
        "use_linear_projection": Field(Flag(), False),
        "flip_sin_to_cos": Field(Flag(), True),
        "freq_shift": Field(Number(-1, 1), 0.0),
        "time_embedding_dim": Field(Maybe(_WIDTH), None),
        "time_cond_proj_dim": Field(Maybe(Integer(4, MAX_CHANNELS)), None),
    }


_PROJECTION = {"projection_class_embeddings_input_dim": Field(_WIDTH)}
_TEXT_TIME = {"addition_time_embed_dim": Field(_WIDTH), **_PROJECTION}


@dataclass(frozen=True)
class Level:
    """One block of a U-Net: a resnet for each of `depths`, followed by a transformer of that depth, or none (None)."""

    channels: int
    heads: int
    context: int  # channels of the text
    depths: tuple[int | None, ...]
    only_cross: bool = False  # whether the first attention of each transformer layer reads the text too, not itself

    @property
    def cross_attentions(self) -> int:
        """How many there are."""
        return sum(depth or 0 for depth in self.depths) * (2 if self.only_cross else 1)


@dataclass(frozen=True)
class UNetConfig:
    """A text-conditioned U-Net of Stable Diffusion's kind (diffusers' UNet2DConditionModel)."""

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
    time_cond_proj_dim: int | None  # channels of the guidance embedding (LCM)
    addition_embed_type: str | None  # "text_time": pooled text and sizes enter the time embedding (SDXL)
    addition_time_embed_dim: int
    addition_input_dim: int  # total channels of pooled text and embedded sizes
    added_ids: int = 6  # numbers beside the pooled text: SDXL's three sizes; its refiner has 5, one of them a score
    num_class_embeds: int | None = None  # classes, of which each has an embedding; an upscaler's are noise levels
    class_input_dim: int | None = None  # in place of classes, channels of a picture's vector and its noise level's

    @property
    def levels(self) -> int:
        return len(self.down)

    @property
    def stride(self) -> int:
        """Latent sizes that are multiples of this are halved evenly; other sizes are allowed too."""
        return 2 ** (self.levels - 1)

    @property
    def cross_attention_dim(self) -> int:
        """Channels of the text that the network attends to."""
        return self.down[0].context

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each skip connection: the outputs of the first convolution, and of each resnet and downsampling
        convolution of the encoder."""
        last = self.levels - 1
        widths = [[level.channels] * (len(level.depths) + (i < last)) for i, level in enumerate(self.down)]
        return (self.down[0].channels, *(width for level in widths for width in level))

    @property
    def time_channels(self) -> int:
        """Channels of a time row: the sum over all resnets."""
        return sum(level.channels * len(level.depths) for level in (*self.down, self.mid, *self.up))

    @property
    def cross_widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention, in network order."""
        levels = (*self.down, self.mid, *self.up)
        return tuple(level.channels for level in levels for _ in range(level.cross_attentions))

    @property
    def self_attentions(self) -> tuple[str, ...]:
        """The name of the self-attention before each cross-attention, in network order, as diffusers has it; "" where
        there is none."""
        blocks = [("down_blocks.{}", self.down), ("mid_block", (self.mid,)), ("up_blocks.{}", self.up)]
        return tuple(
            "" if level.only_cross else f"{name.format(i)}.attentions.{k}.transformer_blocks.{n}.attn1"
            for name, levels in blocks
            for i, level in enumerate(levels)
            for k, depth in enumerate(depth for depth in level.depths if depth is not None)
            for n in range(depth)
            for _ in range(2 if level.only_cross else 1)
        )

    def reads_text_first(self, module: str) -> bool:
        """Whether a module, by its path, is of a first attention that reads the text (only_cross_attention)."""
        match = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.", module)
        levels = {"down": self.down, "mid": (self.mid,), "up": self.up}
        return match is not None and levels[match[1]][int(match[2] or 0)].only_cross

    @property
    def deep_channels(self) -> int:
        """Of the deep features, which are as large as the latents: what the decoder's last block reads."""
        return self.up[-2].channels

    @property
    def needs_added(self) -> bool:
        """Whether time rows need pooled text and sizes."""
        return self.addition_embed_type is not None

    @property
    def inpaints(self) -> bool:
        """Whether a mask and the masked image's latents are read behind the latents."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the latents of an image to edit are read behind the latents, as of InstructPix2Pix."""
        return self.in_channels == 2 * self.out_channels and not self.upscales

    @property
    def reads_depth(self) -> bool:
        """Whether a depth map is read behind the latents."""
        return self.in_channels == self.out_channels + 1

    @property
    def upscales(self) -> bool:
        """Whether a small picture is read behind the latents: at their size, with noise of a level that is a class; or
        without text, in as many channels as they have."""
        return self.needs_class or not self.cross_widths

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text, if it needs some."""
        return self.addition_input_dim - self.added_ids * self.addition_time_embed_dim

    @property
    def needs_guidance(self) -> bool:
        """Whether time rows need the guidance scale."""
        return self.time_cond_proj_dim is not None

    @property
    def needs_class(self) -> bool:
        """Whether time rows need a class."""
        return self.num_class_embeds is not None

    @property
    def needs_vector(self) -> bool:
        """Whether time rows need a picture's vector in place of a class, as of unCLIP."""
        return self.class_input_dim is not None

    @property
    def needs_rows(self) -> bool:
        """Whether time rows are others for each U-Net row."""
        return self.needs_added or self.needs_vector

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> UNetConfig:
        """Read diffusers' unet/config.json; CheckpointError if it needs what is not implemented."""
        channels = _channels(cfg, source)
        levels, last = len(channels), len(channels) - 1
        values = read_fields(cfg, _unet_fields(levels), source)
        text_time = values["addition_embed_type"] == "text_time"
        added = read_fields(cfg, _TEXT_TIME, source) if text_time else dict.fromkeys(_TEXT_TIME, 0)

        class_input_dim = None
        if values["class_embed_type"] == "projection":
            if values["num_class_embeds"] is not None:
                raise CheckpointError(
                    f"{source}: 'class_embed_type' is 'projection' and 'num_class_embeds' is "
                    f"{values['num_class_embeds']}, expected one of them"
                )
            class_input_dim = read_fields(cfg, _PROJECTION, source)["projection_class_embeddings_input_dim"]

        heads, layers, groups = values["attention_head_dim"], values["layers_per_block"], values["norm_num_groups"]
        depths, up_depths = values["transformer_layers_per_block"], values["reverse_transformer_layers_per_block"]
        if up_depths is None:
            up_depths = depths[::-1]
            if not all(isinstance(depth, int) for depth in depths):
                raise CheckpointError(
                    f"{source}: 'transformer_layers_per_block' is {list(depths)}, "
                    "and such nested lists need 'reverse_transformer_layers_per_block' too"
                )
        down_types, up_types = values["down_block_types"], values["up_block_types"]
        by_level = zip(down_types, values["cross_attention_dim"], strict=True)
        contexts = {channels for kind, channels in by_level if kind == _CROSS["down"]} or {
            values["cross_attention_dim"][last]
        }
        if len(contexts) > 1:
            raise CheckpointError(
                f"{source}: 'cross_attention_dim' is {list(values['cross_attention_dim'])}, "
                "expected one width: all levels read one text"
            )
        context = contexts.pop()

        only_cross = values["only_cross_attention"]

        def level(i: int, crosses: bool, resnets: int, depth: Any) -> Level:
            _check_divides(channels[i], groups, "norm_num_groups", source)
            if not crosses:
                return Level(channels[i], heads[i], context, (None,) * resnets)
            _check_divides(channels[i], heads[i], "attention_head_dim", source)
            depths = (depth,) * resnets if isinstance(depth, int) else depth
            if len(depths) != resnets:
                raise CheckpointError(f"{source}: transformer depths {depths} for a block of {resnets} resnets")
            return Level(channels[i], heads[i], context, depths, only_cross[i])

        down = tuple(level(i, down_types[i] == _CROSS["down"], layers[i], depths[i]) for i in range(levels))
        up = tuple(
            level(last - i, up_types[i] == _CROSS["up"], layers[last - i] + 1, up_depths[i]) for i in range(levels)
        )
        mid_depth = (
            depths[last] if isinstance(depths[last], int) else depths[last][0]
        )  # the middle block has one transformer
        mid_depths: dict[str | None, tuple[int | None, ...]] = {
            "UNetMidBlock2DCrossAttn": (mid_depth, None),
            "UNetMidBlock2D": (None,),
            None: (),
        }
        if values["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            _check_divides(channels[last], heads[last], "attention_head_dim", source)
        mid = Level(channels[last], heads[last], context, mid_depths[values["mid_block_type"]])
        blocks = sum(1 + (depth or 0) for block in (*down, mid, *up) for depth in block.depths)
        if blocks > _MAX_BLOCKS:
            raise CheckpointError(
                f"{source}: its 'layers_per_block' and 'transformer_layers_per_block' make {blocks:,} blocks, "
                f"expected at most {_MAX_BLOCKS:,}"
            )

        shift = values["freq_shift"]  # subtracted from the number of frequencies, half the channels
        if min(channels[0] // 2, added["addition_time_embed_dim"] // 2 if text_time else channels[0]) <= shift:
            raise CheckpointError(
                f"{source}: 'freq_shift' is {shift:g}, expected less than half of the embedding's channels"
            )
        size = values["sample_size"] or (128 if text_time else 64)  # defaults of diffusers' pipelines
        return cls(
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            sample_size=(size, size) if isinstance(size, int) else size,
            down=down,
            mid=mid,
            up=up,
            norm_groups=groups,
            norm_eps=values["norm_eps"],
            linear_projection=values["use_linear_projection"],
            downsample_padding=values["downsample_padding"],
            flip_sin_to_cos=values["flip_sin_to_cos"],
            freq_shift=shift,
            time_embedding_dim=values["time_embedding_dim"] or 4 * channels[0],
            time_cond_proj_dim=values["time_cond_proj_dim"],
            addition_embed_type=values["addition_embed_type"],
            addition_time_embed_dim=added["addition_time_embed_dim"],
            addition_input_dim=added["projection_class_embeddings_input_dim"],
            num_class_embeds=values["num_class_embeds"],
            class_input_dim=class_input_dim,
        )


# --------------------------------------------------------------------------------------------------- autoencoders

# `shift_factor` is left out: diffusers' pipelines of Stable Diffusion 1, 2 and XL ignore it.
_VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL", "AsymmetricAutoencoderKL"),
    "act_fn": ("silu", "swish"),
}
_STATISTICS = {  # of the latents' channels, by which diffusers' pipelines of XL normalize them
    "latents_mean": Field(Maybe(ListOf(Number(-1e6, 1e6), 1, MAX_CHANNELS)), None),
    "latents_std": Field(Maybe(ListOf(Number(1e-6, 1e6), 1, MAX_CHANNELS)), None),
}


_LATENTS = {
    "in_channels": Field(_WIDTH, 3),
    "out_channels": Field(_WIDTH, 3),
    "latent_channels": Field(_WIDTH, 4),
}
_VAE = {
    "layers_per_block": Field(_LAYERS, 1),
    "norm_num_groups": Field(_WIDTH, 32),
    "mid_block_add_attention": Field(Flag(), True),
    "use_quant_conv": Field(Flag(), True),
    "use_post_quant_conv": Field(Flag(), True),
    "scaling_factor": Field(Number(1e-6, 1e6), 0.18215),
    "force_upcast": Field(Flag(), True),
}
_TINY_VAE = {
    "num_encoder_blocks": Field(ListOf(_LAYERS, 1, _MAX_LEVELS), (1, 3, 3, 3)),
    "num_decoder_blocks": Field(ListOf(_LAYERS, 1, _MAX_LEVELS), (3, 3, 3, 1)),
    "scaling_factor": Field(Number(1e-6, 1e6), 1.0),
}
_TINY_VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderTiny",),
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


@dataclass(frozen=True)
class VAEConfig:
    """A KL autoencoder (diffusers' AutoencoderKL). Latents for the U-Net are those of `models.latents.scaled`."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scaling_factor: float
    force_upcast: bool  # activations overflow in float16: see models.vae.rescale_for_half
    latents_mean: tuple[float, ...] = ()  # (latent_channels,), or none of both
    latents_std: tuple[float, ...] = ()
    decoder_channels: tuple[int, ...] = ()  # the decoder's own, of as many levels
    decoder_layers: int = 1
    conditioned: bool = False  # whether the decoder reads a repainted picture (diffusers' AsymmetricAutoencoderKL)

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> VAEConfig:
        """Read diffusers' vae/config.json; CheckpointError if it needs what is not implemented."""
        conditioned, decoder = cfg.get("_class_name") == "AsymmetricAutoencoderKL", {}
        if conditioned:
            decoder = _asymmetric(cfg, source)
            cfg = {**cfg, **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), True)}
            cfg |= {"block_out_channels": decoder.pop("channels"), "layers_per_block": decoder.pop("layers")}
            cfg |= {"force_upcast": False}
        channels = _channels(cfg, source)
        types = {
            key: Field(_per_level(OneOf(kind), len(channels), scalar=False), None)
            for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"))
        }
        values = read_fields(cfg, _only(_VAE_ONLY) | types | _LATENTS | _VAE | _STATISTICS, source)
        statistics = [tuple(values[key] or ()) for key in _STATISTICS]
        for key, numbers in zip(_STATISTICS, statistics, strict=True):
            if len(numbers) != (values["latent_channels"] if any(statistics) else 0):
                raise CheckpointError(
                    f"{source}: {key!r} has {len(numbers)} numbers, expected {values['latent_channels']}, one for each "
                    "channel of the latents ('latent_channels'), or neither 'latents_mean' nor 'latents_std'"
                )
        decoder = decoder or {"decoder_channels": channels, "decoder_layers": values["layers_per_block"]}
        for width in (*channels, *decoder["decoder_channels"]):
            _check_divides(width, values["norm_num_groups"], "norm_num_groups", source)
        return cls(
            **decoder,
            conditioned=conditioned,
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            latent_channels=values["latent_channels"],
            channels=channels,
            layers_per_block=values["layers_per_block"],
            norm_groups=values["norm_num_groups"],
            mid_attention=values["mid_block_add_attention"],
            quant_conv=values["use_quant_conv"],
            post_quant_conv=values["use_post_quant_conv"],
            scaling_factor=values["scaling_factor"],
            force_upcast=values["force_upcast"],
            latents_mean=statistics[0],
            latents_std=statistics[1],
        )


def _asymmetric(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Channels and layers of encoder and decoder of an AsymmetricAutoencoderKL."""
    sides: dict[str, Any] = {}
    for side, prefix in (("down", ""), ("up", "decoder_")):
        fields = {
            f"{side}_block_out_channels": Field(ListOf(_WIDTH, 4, 4)),  # diffusers' condition encoder has five layers
            f"layers_per_{side}_block": Field(_LAYERS, 1),
        }
        channels, layers = read_fields(cfg, fields, source).values()
        sides |= {f"{prefix}channels": channels, f"{prefix}layers": layers}
    first, most = sides["decoder_channels"][0], sides["decoder_channels"][-1]
    expected = [min(first * 2**k, most) for k in range(4)]
    if list(sides["decoder_channels"]) != expected:
        raise CheckpointError(
            f"{source}: 'up_block_out_channels' is {list(sides['decoder_channels'])}, expected {expected}: a "
            "repainted picture's features have so many channels"
        )
    return sides


@dataclass(frozen=True)
class TinyVAEConfig:
    """A distilled autoencoder in TAESD's layout (diffusers' AutoencoderTiny), for a U-Net's scaled latents."""

    in_channels: int
    out_channels: int
    latent_channels: int
    encoder_width: int
    decoder_width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scaling_factor: float
    latents_mean: tuple[float, ...] = ()  # none, as of `latents_std`: it was distilled for the U-Net's latents
    latents_std: tuple[float, ...] = ()

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.decoder_blocks) - 1)

    @property
    def force_upcast(self) -> bool:
        """Always False: it was distilled to stay in range (diffusers ignores the file's value too)."""
        return False

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TinyVAEConfig:
        """Read an AutoencoderTiny's config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _only(_TINY_VAE_ONLY) | _LATENTS | _TINY_VAE, source)
        blocks = {side: values[f"num_{side}_blocks"] for side in ("encoder", "decoder")}
        if len(blocks["encoder"]) != len(blocks["decoder"]):
            raise CheckpointError(
                f"{source}: 'num_encoder_blocks' is {list(blocks['encoder'])} and 'num_decoder_blocks' "
                f"{list(blocks['decoder'])}, expected the same number of levels"
            )
        widths = {}
        for side, levels in blocks.items():
            key = f"{side}_block_out_channels"
            channels = read_fields(cfg, {key: Field(_per_level(_WIDTH, len(levels)), (64,) * len(levels))}, source)[key]
            if len(set(channels)) != 1:  # the layout has no convolution that could change it
                raise CheckpointError(f"{source}: {key!r} is {list(channels)}, expected one width for all blocks")
            widths[side] = channels[0]
        return cls(
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            latent_channels=values["latent_channels"],
            encoder_width=widths["encoder"],
            decoder_width=widths["decoder"],
            encoder_blocks=blocks["encoder"],
            decoder_blocks=blocks["decoder"],
            scaling_factor=values["scaling_factor"],
        )


_PIXELS = {
    "patch_size": Field(Integer(1, 64), 4),
    "upscale_factor": Field(Integer(2, 16), 2),
    "scaling_factor": Field(Number(1e-6, 1e6), 1.0),
}


@dataclass(frozen=True)
class PixelResidualConfig:
    """An autoencoder without weights, of a model that enlarges pictures: latents are the pixels of a patch, of what a
    picture has beyond a small one that was enlarged by bicubic interpolation."""

    patch_size: int  # of `pixel_unshuffle`
    upscale_factor: int  # how many times as wide the picture is as the small one
    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    force_upcast: bool = False
    latents_mean: tuple[float, ...] = ()  # none, as of `latents_std`
    latents_std: tuple[float, ...] = ()

    @property
    def latent_channels(self) -> int:
        """Three colours of every pixel of a patch."""
        return 3 * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return self.patch_size

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> PixelResidualConfig:
        """Read its config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _only({"_class_name": ("PixelResidual",)}) | _PIXELS, source)
        _check_divides(
            values["patch_size"], values["upscale_factor"], "upscale_factor", source, "pixels of 'patch_size'"
        )
        return cls(values["patch_size"], values["upscale_factor"], values["scaling_factor"])


AutoencoderConfig = VAEConfig | TinyVAEConfig | PixelResidualConfig
AUTOENCODERS: dict[str, type[VAEConfig] | type[TinyVAEConfig] | type[PixelResidualConfig]] = {
    "AutoencoderKL": VAEConfig,
    "AsymmetricAutoencoderKL": VAEConfig,
    "AutoencoderTiny": TinyVAEConfig,
    "PixelResidual": PixelResidualConfig,
}
"""By the class that config.json names."""


# ----------------------------------------------------------------------------------------------------------- text

_PROJECTED = "CLIPTextModelWithProjection"
_TEXT = _only({"model_type": ("clip_text_model",), "use_attention_mask": (None, False)}) | {
    "architectures": Field(Maybe(ListOf(Text(), 0, 16)), None),
    "hidden_act": Field(OneOf("quick_gelu", "gelu"), "quick_gelu"),
    "vocab_size": Field(Integer(3, 2**22), 49408),
    "hidden_size": Field(_WIDTH),
    "num_hidden_layers": Field(Integer(1, 256)),
    "num_attention_heads": Field(_WIDTH),
    "intermediate_size": Field(Integer(1, 2**20)),
    "max_position_embeddings": Field(Integer(3, MAX_CHANNELS), 77),
    "layer_norm_eps": Field(_EPSILON, 1e-5),
    "eos_token_id": Field(Integer(0), 49407),
}


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text encoder (transformers' CLIPTextModel and CLIPTextModelWithProjection)."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    max_position: int
    act: str  # "quick_gelu" or "gelu"
    norm_eps: float
    eos_token_id: int
    projection_dim: int | None
    with_projection: bool

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TextConfig:
        """Read transformers' text_encoder/config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _TEXT, source)
        architectures = values["architectures"] or ("CLIPTextModel",)
        if architectures[0] not in ("CLIPTextModel", _PROJECTED):
            raise CheckpointError(
                f"{source}: 'architectures' is {list(architectures)}; "
                f"fastldm implements 'CLIPTextModel' and {_PROJECTED!r}"
            )
        hidden, heads = heads_of(values, source)
        with_projection = architectures[0] == _PROJECTED
        projection = {"projection_dim": Field(_WIDTH, 512)} if with_projection else {}
        return cls(
            vocab=values["vocab_size"],
            hidden=hidden,
            layers=values["num_hidden_layers"],
            heads=heads,
            intermediate=values["intermediate_size"],
            max_position=values["max_position_embeddings"],
            act=values["hidden_act"],
            norm_eps=values["layer_norm_eps"],
            eos_token_id=values["eos_token_id"],
            projection_dim=read_fields(cfg, projection, source).get("projection_dim"),
            with_projection=with_projection,
        )
