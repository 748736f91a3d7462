"""What a checkpoint's config.json says about its network, as plain data, and what each model family wants by default.

The quirks of the files end here: the networks in fastldm/models read one regular description. A key that would change
the network in a way that is not implemented is an error that names it; a key that does not change it (dropout, options
for training and loading) is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastldm.errors import CheckpointError


def _only(cfg: Mapping[str, Any], source: str, accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a key whose value is not among those implemented. A missing key stands for a default that is."""
    for key, values in accepted.items():
        if key in cfg and cfg[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{source}: {key!r} is {cfg[key]!r}; fastldm implements {expected}")


def _required(cfg: Mapping[str, Any], source: str, key: str) -> Any:
    if cfg.get(key) is None:
        raise CheckpointError(f"{source}: {key!r} is missing; is this the config.json of a model of this kind?")
    return cfg[key]


def _per_level(value: Any, levels: int, source: str, key: str) -> tuple[Any, ...]:
    """A scalar stands for every level."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,) * levels
    if len(value) != levels:
        raise CheckpointError(f"{source}: {key!r} has {len(value)} entries, expected {levels} (one a level)")
    return tuple(value)


# ---------------------------------------------------------------------------------------------------------- U-Net

_CROSS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
_PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}

# Not here on purpose: `upcast_attention` asks for a float32 softmax, which every attention here has.
_UNET_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1, 0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class Level:
    """One block of a U-Net: a resnet for each of `depths`, followed by a transformer so deep, or by none (None)."""

    channels: int
    heads: int
    context: int  # channels of the text
    depths: tuple[int | None, ...]


@dataclass(frozen=True)
class UNetConfig:
    """A text-conditioned U-Net of Stable Diffusion's kind (diffusers' UNet2DConditionModel)."""

    in_channels: int
    out_channels: int
    sample_size: int  # latent height and width that the model was trained at
    down: tuple[Level, ...]
    mid: Level  # without resnets in distilled networks that have no middle
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
    addition_input_dim: int  # channels of the pooled text and all embedded sizes together

    @property
    def levels(self) -> int:
        return len(self.down)

    @property
    def stride(self) -> int:
        """Latent sizes that are multiples of this halve evenly; others run too."""
        return 2 ** (self.levels - 1)

    @property
    def cross_attention_dim(self) -> int:
        """Channels of the text that the network attends to."""
        return self.down[0].context

    @property
    def time_channels(self) -> int:
        """Channels of a time row: those of every resnet."""
        return sum(level.channels * len(level.depths) for level in (*self.down, self.mid, *self.up))

    @property
    def cross_widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention, in network order."""
        levels = (*self.down, self.mid, *self.up)
        return tuple(level.channels for level in levels for depth in level.depths for _ in range(depth or 0))

    @property
    def needs_added(self) -> bool:
        """Whether time rows need pooled text and sizes."""
        return self.addition_embed_type is not None

    @property
    def needs_guidance(self) -> bool:
        """Whether time rows need the guidance scale."""
        return self.time_cond_proj_dim is not None

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> UNetConfig:
        """Read diffusers' unet/config.json; CheckpointError where it asks for what is not implemented."""
        _only(cfg, source, _UNET_ACCEPTED)
        channels = tuple(_required(cfg, source, "block_out_channels"))
        levels = len(channels)

        def per_level(key: str, default: Any) -> tuple[Any, ...]:
            return _per_level(cfg.get(key, default), levels, source, key)

        only_cross = cfg.get("only_cross_attention", False)
        if any(_per_level(only_cross, levels, source, "only_cross_attention")):
            raise CheckpointError(f"{source}: 'only_cross_attention' is {only_cross!r}; fastldm implements False")
        # `attention_head_dim` is the number of heads: a misnomer that diffusers keeps since so many files have it.
        heads = per_level("attention_head_dim", 8)
        context = per_level("cross_attention_dim", 1280)
        layers = per_level("layers_per_block", 2)
        depths = per_level("transformer_layers_per_block", 1)
        up_depths = cfg.get("reverse_transformer_layers_per_block")
        if up_depths is None:
            up_depths = depths[::-1]
            if not all(isinstance(depth, int) for depth in depths):
                raise CheckpointError(
                    f"{source}: 'transformer_layers_per_block' is {cfg['transformer_layers_per_block']!r}, "
                    "and such nested lists need 'reverse_transformer_layers_per_block' too"
                )
        else:
            up_depths = _per_level(up_depths, levels, source, "reverse_transformer_layers_per_block")

        groups = _required({"norm_num_groups": 32, **cfg}, source, "norm_num_groups")

        def check_divides(i: int, into: int, key: str) -> None:
            if channels[i] % into:
                raise CheckpointError(f"{source}: {channels[i]} channels do not divide into {key!r} {into}")

        def level(i: int, kind: str, where: str, resnets: int, depth: Any) -> Level:
            if kind not in (_CROSS[where], _PLAIN[where]):
                raise CheckpointError(
                    f"{source}: '{where}_block_types' has {kind!r}; "
                    f"fastldm implements {_CROSS[where]!r} and {_PLAIN[where]!r}"
                )
            check_divides(i, groups, "norm_num_groups")
            if kind == _PLAIN[where]:
                return Level(channels[i], heads[i], context[i], (None,) * resnets)
            check_divides(i, heads[i], "attention_head_dim")
            each = (depth,) * resnets if isinstance(depth, int) else tuple(depth)
            if len(each) != resnets:
                raise CheckpointError(f"{source}: transformer depths {each} for a block of {resnets} resnets")
            return Level(channels[i], heads[i], context[i], each)

        down_types = per_level("down_block_types", (*[_CROSS["down"]] * 3, _PLAIN["down"]))
        up_types = per_level("up_block_types", (_PLAIN["up"], *[_CROSS["up"]] * 3))
        down = tuple(level(i, down_types[i], "down", layers[i], depths[i]) for i in range(levels))
        last = levels - 1
        up = tuple(level(last - i, up_types[i], "up", layers[last - i] + 1, up_depths[i]) for i in range(levels))
        mid_depth = depths[last] if isinstance(depths[last], int) else depths[last][0]  # one transformer, so the first
        mid_depths: dict[str | None, tuple[int | None, ...]] = {
            "UNetMidBlock2DCrossAttn": (mid_depth, None),
            "UNetMidBlock2D": (None,),
            None: (),
        }
        mid_type = cfg.get("mid_block_type", "UNetMidBlock2DCrossAttn")

        text_time = cfg.get("addition_embed_type") == "text_time"
        sample_size = cfg.get("sample_size") or (128 if text_time else 64)  # diffusers' pipelines fall back to these
        return cls(
            in_channels=cfg.get("in_channels", 4),
            out_channels=cfg.get("out_channels", 4),
            sample_size=sample_size if isinstance(sample_size, int) else sample_size[0],
            down=down,
            mid=Level(channels[last], heads[last], context[last], mid_depths[mid_type]),
            up=up,
            norm_groups=groups,
            norm_eps=cfg.get("norm_eps", 1e-5),
            linear_projection=cfg.get("use_linear_projection", False),
            downsample_padding=cfg.get("downsample_padding", 1),
            flip_sin_to_cos=cfg.get("flip_sin_to_cos", True),
            freq_shift=cfg.get("freq_shift", 0),
            time_embedding_dim=cfg.get("time_embedding_dim") or 4 * channels[0],
            time_cond_proj_dim=cfg.get("time_cond_proj_dim"),
            addition_embed_type=cfg.get("addition_embed_type"),
            addition_time_embed_dim=_required(cfg, source, "addition_time_embed_dim") if text_time else 0,
            addition_input_dim=_required(cfg, source, "projection_class_embeddings_input_dim") if text_time else 0,
        )


# --------------------------------------------------------------------------------------------------- autoencoders

_VAE_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def _one_width(cfg: Mapping[str, Any], source: str, key: str, levels: int) -> int:
    """A tiny VAE's blocks all have one width: its layout has no convolution that could change it."""
    widths = _per_level(cfg.get(key, 64), levels, source, key)
    if len(set(widths)) != 1:
        raise CheckpointError(f"{source}: {key!r} is {list(widths)}, expected one width for all blocks")
    return widths[0]


_TINY_VAE_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderTiny",),
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


@dataclass(frozen=True)
class VAEConfig:
    """A KL autoencoder (diffusers' AutoencoderKL). Latents for the U-Net are (z - shift_factor) * scaling_factor."""

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
    shift_factor: float
    force_upcast: bool  # trained with activations beyond float16's range: see models.vae.rescale_for_half

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> VAEConfig:
        """Read diffusers' vae/config.json; CheckpointError where it asks for what is not implemented."""
        _only(cfg, source, _VAE_ACCEPTED)
        channels = tuple(_required(cfg, source, "block_out_channels"))
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = _per_level(cfg.get(key, (kind,)), len(channels), source, key)
            if set(types) != {kind}:
                raise CheckpointError(f"{source}: {key!r} is {list(types)}; fastldm implements {kind!r}")
        return cls(
            in_channels=cfg.get("in_channels", 3),
            out_channels=cfg.get("out_channels", 3),
            latent_channels=cfg.get("latent_channels", 4),
            channels=channels,
            layers_per_block=cfg.get("layers_per_block", 1),
            norm_groups=_required({"norm_num_groups": 32, **cfg}, source, "norm_num_groups"),
            mid_attention=cfg.get("mid_block_add_attention", True),
            quant_conv=cfg.get("use_quant_conv", True),
            post_quant_conv=cfg.get("use_post_quant_conv", True),
            scaling_factor=cfg.get("scaling_factor", 0.18215),
            shift_factor=cfg.get("shift_factor") or 0.0,
            force_upcast=cfg.get("force_upcast", True),
        )


@dataclass(frozen=True)
class TinyVAEConfig:
    """A distilled autoencoder in TAESD's layout (diffusers' AutoencoderTiny), made for a U-Net's scaled latents."""

    in_channels: int
    out_channels: int
    latent_channels: int
    encoder_width: int
    decoder_width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scaling_factor: float
    shift_factor: float

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.decoder_blocks) - 1)

    @property
    def force_upcast(self) -> bool:
        """Never: it was distilled to stay in range (diffusers overrules the file here as well)."""
        return False

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TinyVAEConfig:
        """Read an AutoencoderTiny's config.json; CheckpointError where it asks for what is not implemented."""
        _only(cfg, source, _TINY_VAE_ACCEPTED)
        encoder = tuple(cfg.get("num_encoder_blocks", (1, 3, 3, 3)))
        decoder = tuple(cfg.get("num_decoder_blocks", (3, 3, 3, 1)))
        return cls(
            in_channels=cfg.get("in_channels", 3),
            out_channels=cfg.get("out_channels", 3),
            latent_channels=cfg.get("latent_channels", 4),
            encoder_width=_one_width(cfg, source, "encoder_block_out_channels", len(encoder)),
            decoder_width=_one_width(cfg, source, "decoder_block_out_channels", len(decoder)),
            encoder_blocks=encoder,
            decoder_blocks=decoder,
            scaling_factor=cfg.get("scaling_factor", 1.0),
            shift_factor=cfg.get("shift_factor") or 0.0,
        )


# ----------------------------------------------------------------------------------------------------------- text

_TEXT_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "model_type": ("clip_text_model",),
    "use_attention_mask": (False, None),
}
_PROJECTED = "CLIPTextModelWithProjection"


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
        """Read transformers' text_encoder/config.json; CheckpointError where it asks for what is not implemented."""
        _only(cfg, source, _TEXT_ACCEPTED)
        architectures = cfg.get("architectures") or ["CLIPTextModel"]
        if architectures[0] not in ("CLIPTextModel", _PROJECTED):
            raise CheckpointError(
                f"{source}: 'architectures' is {architectures}; fastldm implements 'CLIPTextModel' and {_PROJECTED!r}"
            )
        eos = cfg.get("eos_token_id", 49407)
        if not isinstance(eos, int):
            raise CheckpointError(f"{source}: 'eos_token_id' is {eos!r}, expected one integer")
        hidden, heads = _required(cfg, source, "hidden_size"), _required(cfg, source, "num_attention_heads")
        if hidden % heads:
            raise CheckpointError(
                f"{source}: 'hidden_size' {hidden} does not divide into 'num_attention_heads' {heads}"
            )
        with_projection = architectures[0] == _PROJECTED
        projection = _required({"projection_dim": 512, **cfg}, source, "projection_dim") if with_projection else None
        return cls(
            vocab=cfg.get("vocab_size", 49408),
            hidden=hidden,
            layers=_required(cfg, source, "num_hidden_layers"),
            heads=heads,
            intermediate=_required(cfg, source, "intermediate_size"),
            max_position=cfg.get("max_position_embeddings", 77),
            act=cfg.get("hidden_act", "quick_gelu"),
            norm_eps=cfg.get("layer_norm_eps", 1e-5),
            eos_token_id=eos,
            projection_dim=projection,
            with_projection=with_projection,
        )


# ------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What a kind of checkpoint wants by default. Its height and width are `unet.sample_size * vae.factor`."""

    name: str
    num_inference_steps: int
    guidance_scale: float  # classifier-free guidance at most 1 means none: one pass a step, not two
    matches: Callable[[UNetConfig, Mapping[str, Any]], bool]  # of the U-Net and the raw scheduler_config.json
    sampler: str | None = None  # None: the one that scheduler_config.json names


def _is_v(scheduler: Mapping[str, Any]) -> bool:
    return scheduler.get("prediction_type") == "v_prediction"


def _is_few_step(scheduler: Mapping[str, Any], *classes: str) -> bool:
    """Adversarially distilled models ship Euler with trailing spacing; so do zero-SNR fine-tunes, which need steps."""
    return (
        scheduler.get("_class_name") in classes
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr", False)
    )


_EULER, _EULER_A = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"

# The first that matches wins; the last matches everything.
FAMILIES: tuple[Family, ...] = (
    Family("sdxl-lcm", 4, 8.0, lambda unet, _: unet.needs_guidance and unet.needs_added),
    Family("lcm", 4, 8.5, lambda unet, _: unet.needs_guidance),
    # An LCM or TCD adapter merged into an ordinary network.
    Family("lcm-merged", 4, 1.0, lambda _, scheduler: scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler")),
    Family("sdxl-turbo", 1, 0.0, lambda unet, scheduler: unet.needs_added and _is_few_step(scheduler, _EULER_A)),
    Family("sdxl-lightning", 4, 0.0, lambda unet, scheduler: unet.needs_added and _is_few_step(scheduler, _EULER)),
    Family("sdxl", 30, 5.0, lambda unet, _: unet.needs_added),
    Family("sd-turbo", 1, 0.0, lambda _, scheduler: _is_few_step(scheduler, _EULER, _EULER_A)),
    # The model that ships with fastldm.
    Family(
        "small",
        8,
        2.0,
        lambda unet, scheduler: (
            _is_v(scheduler) and bool(scheduler.get("rescale_betas_zero_snr")) and unet.cross_attention_dim < 768
        ),
    ),
    Family("sd2-v", 30, 7.5, lambda unet, scheduler: unet.linear_projection and _is_v(scheduler)),
    Family("sd2", 30, 7.5, lambda unet, _: unet.linear_projection),
    Family("sd1-inpaint", 30, 7.5, lambda unet, _: unet.in_channels == 9),
    Family("sd1", 30, 7.5, lambda unet, _: True),
)


def recognise(unet: UNetConfig, scheduler: Mapping[str, Any]) -> Family:
    """The family of a checkpoint from its U-Net and the raw scheduler_config.json."""
    return next(family for family in FAMILIES if family.matches(unet, scheduler))
