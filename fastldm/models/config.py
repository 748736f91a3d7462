"""Configs of networks, read from a checkpoint's config.json files.

The quirks of the files are resolved here, so that the networks in fastldm/models read a regular description. Each file
has a table of the keys that are read (see reading.py). A key that changes the network in a way that is not implemented
is an error that names it; a key that does not change it (dropout, options for training and loading) is ignored. A
U-Net's is in unet_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastldm.errors import CheckpointError
from fastldm.models.config_fields import EPSILON, LAYERS, MAX_LEVELS, WIDTH, channels_of, check_divides, only, per_level
from fastldm.models.unet_blocks import Level as Level
from fastldm.models.unet_config import UNetConfig as UNetConfig
from fastldm.reading import MAX_CHANNELS, Field, Flag, Integer, ListOf, Maybe, Number, OneOf, Text, read_fields


def heads_of(values: Mapping[str, Any], source: str) -> tuple[int, int]:
    """'hidden_size' and 'num_attention_heads' of a transformer of transformers; CheckpointError if they do not fit."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % heads:
        raise CheckpointError(f"{source}: 'hidden_size' {hidden} does not divide into 'num_attention_heads' {heads}")
    return hidden, heads


# --------------------------------------------------------------------------------------------------- autoencoders

# `shift_factor` is left out: diffusers' pipelines of Stable Diffusion 1, 2 and XL ignore it.
_VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL", "AsymmetricAutoencoderKL", "VQModel"),
    "act_fn": ("silu", "swish"),
}
SPATIAL_GROUPS = 32  # of MoVQ's norms ('norm_type' "spatial"), whatever 'norm_num_groups' is
# `lookup_from_codebook` is left out: it is of a decoder that is given codes, and no pipeline of latents gives it some.
_CODEBOOK = {
    "num_vq_embeddings": Field(Integer(1, 2**20), 256),
    "vq_embed_dim": Field(Maybe(WIDTH), None),
    "norm_type": Field(OneOf("group", "spatial"), "group"),
}
_STATISTICS = {  # of the latents' channels, by which diffusers' pipelines of XL normalize them
    "latents_mean": Field(Maybe(ListOf(Number(-1e6, 1e6), 1, MAX_CHANNELS)), None),
    "latents_std": Field(Maybe(ListOf(Number(1e-6, 1e6), 1, MAX_CHANNELS)), None),
}


_LATENTS = {
    "in_channels": Field(WIDTH, 3),
    "out_channels": Field(WIDTH, 3),
    "latent_channels": Field(WIDTH, 4),
}
_VAE = {
    "layers_per_block": Field(LAYERS, 1),
    "norm_num_groups": Field(WIDTH, 32),
    "mid_block_add_attention": Field(Flag(), True),
    "use_quant_conv": Field(Flag(), True),
    "use_post_quant_conv": Field(Flag(), True),
    "scaling_factor": Field(Number(1e-6, 1e6), 0.18215),
    "force_upcast": Field(Flag(), True),
}
_TINY_VAE = {
    "num_encoder_blocks": Field(ListOf(LAYERS, 1, MAX_LEVELS), (1, 3, 3, 3)),
    "num_decoder_blocks": Field(ListOf(LAYERS, 1, MAX_LEVELS), (3, 3, 3, 1)),
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
    """A KL autoencoder (diffusers' AutoencoderKL), or one of VQ-GAN (VQModel). Latents for the U-Net are those of
    `models.latents.scaled`."""

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
    inner_channels: int = 0  # that the encoder makes, before quant_conv, and the decoder reads
    codes: int = 0  # vectors of a codebook, of which the decoder takes the nearest to each latent; 0: there is none
    spatial: bool = False  # whether the decoder's norms read the latents (MoVQ)
    takes_nearest: bool = True  # whether the decoder does that; else it decodes latents as they are
    attends: tuple[bool, bool] = (False, False)
    """Whether attention follows each resnet at the latents' resolution, of the encoder, and of the decoder."""

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.channels) - 1)

    @property
    def moments(self) -> bool:
        """Whether `encode` makes latents' mean and log variance, to be drawn from, not the latents."""
        return not self.codes

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> VAEConfig:
        """Read diffusers' vae/config.json; CheckpointError if it needs what is not implemented."""
        conditioned, decoder = cfg.get("_class_name") == "AsymmetricAutoencoderKL", {}
        if conditioned:
            decoder = _asymmetric(cfg, source)
            cfg = {**cfg, **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), True)}
            cfg |= {"block_out_channels": decoder.pop("channels"), "layers_per_block": decoder.pop("layers")}
            cfg |= {"force_upcast": False}
        quantizes = cfg.get("_class_name") == "VQModel"
        codebook = read_fields(cfg, _CODEBOOK if quantizes else only({"norm_type": ("group",)}), source)
        spatial = codebook["norm_type"] == "spatial"
        if quantizes:  # with diffusers' defaults of that class
            cfg = {"latent_channels": 3, "force_upcast": False, **cfg}
            cfg |= {"use_quant_conv": True, "use_post_quant_conv": True}
        channels = channels_of(cfg, source)
        types = {
            key: Field(per_level(OneOf(kind, f"Attn{kind}"), len(channels), scalar=False), None)
            for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D"))
        }
        values = read_fields(cfg, only(_VAE_ONLY) | types | _LATENTS | _VAE | _STATISTICS, source)
        attends = _attends(values, conditioned, source)
        statistics = [tuple(values[key] or ()) for key in _STATISTICS]
        for key, numbers in zip(_STATISTICS, statistics, strict=True):
            if len(numbers) != (values["latent_channels"] if any(statistics) else 0):
                raise CheckpointError(
                    f"{source}: {key!r} has {len(numbers)} numbers, expected {values['latent_channels']}, one for each "
                    "channel of the latents ('latent_channels'), or neither 'latents_mean' nor 'latents_std'"
                )
        if spatial and codebook["vq_embed_dim"] not in (None, values["latent_channels"]):
            raise CheckpointError(
                f"{source}: 'vq_embed_dim' is {codebook['vq_embed_dim']} and 'latent_channels' "
                f"{values['latent_channels']}: with 'norm_type' 'spatial' they are equal"
            )
        decoder = decoder or {"decoder_channels": channels, "decoder_layers": values["layers_per_block"]}
        for width in (*channels, *decoder["decoder_channels"]):
            check_divides(width, values["norm_num_groups"], "norm_num_groups", source)
            if spatial and width % SPATIAL_GROUPS:
                raise CheckpointError(
                    f"{source}: 'block_out_channels' has {width}, expected multiples of {SPATIAL_GROUPS}, the groups "
                    "of 'norm_type' 'spatial'"
                )
        return cls(
            **decoder,
            spatial=spatial,
            attends=attends,
            conditioned=conditioned,
            in_channels=values["in_channels"],
            out_channels=values["out_channels"],
            latent_channels=codebook.get("vq_embed_dim") or values["latent_channels"],
            inner_channels=values["latent_channels"],
            codes=codebook.get("num_vq_embeddings", 0),
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


def _attends(values: Mapping[str, Any], conditioned: bool, source: str) -> tuple[bool, bool]:
    """`VAEConfig.attends`. CheckpointError for attention at another resolution, which no published model has."""
    found = []
    for key, inner in (("down_block_types", -1), ("up_block_types", 0)):
        kinds = [str(kind).startswith("Attn") for kind in values[key] or ()]
        own = bool(kinds) and kinds[inner]
        if any(kinds) and (sum(kinds) > own or conditioned):
            level = kinds.index(True)
            raise CheckpointError(
                f"{source}: '{key}[{level}]' is {values[key][level]!r}; fastldm implements it at the resolution of the "
                "latents alone, of networks whose decoder reads them alone"
            )
        found.append(own)
    return found[0], found[1]


def _asymmetric(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Channels and layers of encoder and decoder of an AsymmetricAutoencoderKL."""
    sides: dict[str, Any] = {}
    for side, prefix in (("down", ""), ("up", "decoder_")):
        fields = {
            f"{side}_block_out_channels": Field(ListOf(WIDTH, 4, 4)),  # diffusers' condition encoder has five layers
            f"layers_per_{side}_block": Field(LAYERS, 1),
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
    def moments(self) -> bool:
        """Always False: `encode` makes the latents."""
        return False

    @property
    def force_upcast(self) -> bool:
        """Always False: it was distilled to stay in range (diffusers ignores the file's value too)."""
        return False

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TinyVAEConfig:
        """Read an AutoencoderTiny's config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, only(_TINY_VAE_ONLY) | _LATENTS | _TINY_VAE, source)
        blocks = {side: values[f"num_{side}_blocks"] for side in ("encoder", "decoder")}
        if len(blocks["encoder"]) != len(blocks["decoder"]):
            raise CheckpointError(
                f"{source}: 'num_encoder_blocks' is {list(blocks['encoder'])} and 'num_decoder_blocks' "
                f"{list(blocks['decoder'])}, expected the same number of levels"
            )
        widths = {}
        for side, levels in blocks.items():
            key = f"{side}_block_out_channels"
            channels = read_fields(cfg, {key: Field(per_level(WIDTH, len(levels)), (64,) * len(levels))}, source)[key]
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
    picture has beyond a small one that was enlarged by bicubic interpolation. With patches of one pixel and nothing to
    enlarge it is that of a model whose latents are pixels, `PIXEL_SPACE`."""

    patch_size: int  # of `pixel_unshuffle`
    upscale_factor: int  # how many times as wide the picture is as the small one
    scaling_factor: float
    in_channels: int = 3
    out_channels: int = 3
    force_upcast: bool = False
    moments: bool = False  # `encode` makes the latents
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
        values = read_fields(cfg, only({"_class_name": ("PixelResidual",)}) | _PIXELS, source)
        check_divides(
            values["patch_size"], values["upscale_factor"], "upscale_factor", source, "pixels of 'patch_size'"
        )
        return cls(values["patch_size"], values["upscale_factor"], values["scaling_factor"])


PIXEL_SPACE = PixelResidualConfig(patch_size=1, upscale_factor=1, scaling_factor=1.0)
"""Of pipelines without an autoencoder, whose U-Net makes pixels."""
AutoencoderConfig = VAEConfig | TinyVAEConfig | PixelResidualConfig
AUTOENCODERS: dict[str, type[VAEConfig] | type[TinyVAEConfig] | type[PixelResidualConfig]] = {
    "AutoencoderKL": VAEConfig,
    "AsymmetricAutoencoderKL": VAEConfig,
    "VQModel": VAEConfig,
    "AutoencoderTiny": TinyVAEConfig,
    "PixelResidual": PixelResidualConfig,
}
"""By the class that config.json names."""


# ----------------------------------------------------------------------------------------------------------- text

_PROJECTED, LDM_BERT, T5_ENCODER = "CLIPTextModelWithProjection", "LDMBertModel", "T5EncoderModel"
GLIDE_TEXT = "GlideTextModel"
_ARCHITECTURES = {"architectures": Field(Maybe(ListOf(Text(), 0, 16)), None)}
_TEXT = only({"model_type": ("clip_text_model",), "use_attention_mask": (None, False)}) | {
    "hidden_act": Field(OneOf("quick_gelu", "gelu"), "quick_gelu"),
    "vocab_size": Field(Integer(3, 2**22), 49408),
    "hidden_size": Field(WIDTH),
    "num_hidden_layers": Field(Integer(1, 256)),
    "num_attention_heads": Field(WIDTH),
    "intermediate_size": Field(Integer(1, 2**20)),
    "max_position_embeddings": Field(Integer(3, MAX_CHANNELS), 77),
    "layer_norm_eps": Field(EPSILON, 1e-5),
    "eos_token_id": Field(Integer(0), 49407),
}


_LDM_BERT = only({"model_type": ("ldmbert",), "activation_function": ("gelu", "quick_gelu")}) | {
    "vocab_size": Field(Integer(3, 2**22), 30522),
    "d_model": Field(WIDTH, 1280),
    "encoder_layers": Field(Integer(1, 256), 32),
    "encoder_attention_heads": Field(WIDTH, 8),
    "head_dim": Field(WIDTH, 64),
    "encoder_ffn_dim": Field(Integer(1, 2**20), 5120),
    "max_position_embeddings": Field(Integer(3, MAX_CHANNELS), 77),
}


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text encoder (transformers' CLIPTextModel and CLIPTextModelWithProjection), or LDMBert (diffusers'
    LDMBertModel), whose layers are the same with other sizes and without a causal mask."""

    kind: ClassVar[str] = ""
    """Of encoders whose last layers cannot be skipped, their name for errors."""

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
    causal: bool = True
    qkv_bias: bool = True
    head_dim: int = 0  # channels of a head, if all heads' are not `hidden`
    pools: bool = False  # whether without a projection too a pooled vector is read, and the states before the last norm

    @property
    def attention_width(self) -> int:
        """Channels of queries, keys and values."""
        return self.heads * self.head_dim or self.hidden

    @property
    def final_norm(self) -> bool:
        """Whether a U-Net reads its states after the last norm."""
        return not (self.with_projection or self.pools)

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TextConfig:
        """Read transformers' text_encoder/config.json; CheckpointError if it needs what is not implemented."""
        architectures = read_fields(cfg, _ARCHITECTURES, source)["architectures"] or ("CLIPTextModel",)
        if architectures[0] == LDM_BERT:
            return cls._of_ldm_bert(cfg, source)
        values = read_fields(cfg, _TEXT, source)
        if architectures[0] not in ("CLIPTextModel", _PROJECTED):
            raise CheckpointError(
                f"{source}: 'architectures' is {list(architectures)}; "
                f"fastldm implements 'CLIPTextModel' and {_PROJECTED!r}"
            )
        hidden, heads = heads_of(values, source)
        with_projection = architectures[0] == _PROJECTED
        projection = {"projection_dim": Field(WIDTH, 512)} if with_projection else {}
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

    @classmethod
    def _of_ldm_bert(cls, cfg: Mapping[str, Any], source: str) -> TextConfig:
        values = read_fields(cfg, _LDM_BERT, source)
        return cls(
            vocab=values["vocab_size"],
            hidden=values["d_model"],
            layers=values["encoder_layers"],
            heads=values["encoder_attention_heads"],
            intermediate=values["encoder_ffn_dim"],
            max_position=values["max_position_embeddings"],
            act=values["activation_function"],
            norm_eps=1e-5,  # of PyTorch's LayerNorm
            eos_token_id=0,  # whose state nothing reads
            projection_dim=None,
            with_projection=False,
            causal=False,
            qkv_bias=False,
            head_dim=values["head_dim"],
        )
