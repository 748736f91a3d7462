"""How the config.json of diffusers' two classes describes a U-Net.

UNet2DConditionModel    reads text, or what stands for it: Stable Diffusion, Karlo's decoder, DeepFloyd IF,
                        Kandinsky 2.2, the latent x2 upscaler
UNet2DModel             reads none: DDPM, unconditional latent diffusion, ADM, consistency models, super-resolution

`read_unet` resolves the keys of either class into levels, and into the options that all levels share. A key that
changes the network in a way that is not implemented is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastldm.errors import CheckpointError
from fastldm.models.config_fields import EPSILON, LAYERS, WIDTH, channels_of, check_divides, only, per_level
from fastldm.models.unet_blocks import GROUP_SIZE, AttentionKind, Level, Resampling
from fastldm.reading import MAX_CHANNELS, Either, Field, Flag, Integer, ListOf, Maybe, Number, OneOf, read_fields

_MAX_BLOCKS = 1500  # resnets and transformer blocks of a U-Net; SDXL's has 87

# ---------------------------------------------------------------------------------------------- kinds of blocks


class _Block(NamedTuple):
    attention: AttentionKind | None  # None: resnets alone
    resampling: Resampling


_BLOCKS = {  # by the name of the encoder's block; the decoder's has Up for Down, and Upsample for Downsample
    "DownBlock2D": _Block(None, "convolution"),
    "CrossAttnDownBlock2D": _Block("transformer", "convolution"),
    "AttnDownBlock2D": _Block("pixels", "convolution"),
    "ResnetDownsampleBlock2D": _Block(None, "resnet"),
    "SimpleCrossAttnDownBlock2D": _Block("added", "resnet"),
    "KDownBlock2D": _Block(None, "blur"),
    "KCrossAttnDownBlock2D": _Block("adaptive", "blur"),
}
_TEXT_BLOCKS = tuple(name for name in _BLOCKS if name != "AttnDownBlock2D")
_PIXEL_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


def _up(name: str) -> str:
    return name.replace("Downsample", "Upsample").replace("Down", "Up")


def _block_types(
    cfg: Mapping[str, Any], source: str, names: Sequence[str], levels: int, usual: tuple[str, ...]
) -> tuple[list[_Block], list[_Block]]:
    """The blocks of encoder and decoder. usual: those of the encoder of four levels that names none."""
    old = {}
    for key in ("down_block_types", "up_block_types"):  # early files have UNetResDownBlock2D and the like
        if isinstance(types := cfg.get(key), list | tuple):
            old[key] = [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in types]
    down = usual if levels == len(usual) else ...
    up = tuple(map(_up, reversed(usual))) if levels == len(usual) else ...
    fields = {
        "down_block_types": Field(per_level(OneOf(*names), levels, scalar=False), down),
        "up_block_types": Field(per_level(OneOf(*map(_up, names)), levels, scalar=False), up),
    }
    values = read_fields({**cfg, **old}, fields, source)
    ups = {_up(name): block for name, block in _BLOCKS.items()}
    return [_BLOCKS[name] for name in values["down_block_types"]], [ups[name] for name in values["up_block_types"]]


# ------------------------------------------------------------------------------------------- keys of both classes

_ACTIVATIONS = ("silu", "swish", "gelu")


def _shared_fields(default_channels: int) -> dict[str, Field]:
    return only(
        {
            "act_fn": _ACTIVATIONS,
            "center_input_sample": (False,),
            "downsample_padding": (1, 0),
            "resnet_time_scale_shift": ("default", "scale_shift"),
        }
    ) | {
        "sample_size": Field(Maybe(Either(WIDTH, ListOf(WIDTH, 2, 2))), None),
        "in_channels": Field(WIDTH, default_channels),
        "out_channels": Field(WIDTH, default_channels),
        "num_class_embeds": Field(Maybe(Integer(1, 2**20)), None),
        "mid_block_scale_factor": Field(Number(1e-3, 1e3), 1.0),
        "norm_eps": Field(EPSILON, 1e-5),
        "flip_sin_to_cos": Field(Flag(), True),
        "freq_shift": Field(Number(-1, 1), 0.0),
        "time_embedding_dim": Field(Maybe(WIDTH), None),
    }


def _shared(values: Mapping[str, Any], channels: Sequence[int], default_size: int) -> dict[str, Any]:
    """Fields of UNetConfig from the keys that both classes have."""
    size = values["sample_size"] or default_size
    same = ("in_channels", "out_channels", "norm_eps", "downsample_padding", "flip_sin_to_cos", "freq_shift")
    return {name: values[name] for name in same} | {
        # Other kinds of class embeddings have no table.
        "num_class_embeds": values["num_class_embeds"] if values["class_embed_type"] is None else None,
        "sample_size": (size, size) if isinstance(size, int) else size,
        "time_embedding_dim": values["time_embedding_dim"] or 4 * channels[0],
        "act_fn": _activation(values["act_fn"]),
        "time_norm": "shift" if values["resnet_time_scale_shift"] == "default" else "scale",
    }


def _activation(name: str | None) -> str | None:
    return "silu" if name == "swish" else name


def _check_class(values: Mapping[str, Any], source: str) -> None:
    kind, classes = values["class_embed_type"], values["num_class_embeds"]
    if kind == "projection" and classes is not None:
        raise CheckpointError(
            f"{source}: 'class_embed_type' is 'projection' and 'num_class_embeds' is {classes}, expected one of them"
        )


def _check_frequencies(channels: int, shift: float, source: str) -> None:
    """freq_shift is subtracted from the number of frequencies, half the channels."""
    if channels // 2 <= shift:
        raise CheckpointError(
            f"{source}: 'freq_shift' is {shift:g}, expected less than half of the embedding's channels"
        )


def _check_count(levels: Sequence[Level], source: str) -> None:
    blocks = sum(1 + (depth or 0) for level in levels for depth in level.depths)
    if blocks > _MAX_BLOCKS:
        raise CheckpointError(
            f"{source}: its 'layers_per_block' and 'transformer_layers_per_block' make {blocks:,} blocks, "
            f"expected at most {_MAX_BLOCKS:,}"
        )


# ------------------------------------------------------------------------------------------ UNet2DConditionModel

# `upcast_attention` is left out: it means a float32 softmax, which all attention here has.
_TEXT_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "addition_embed_type": (None, "text_time", "text", "image", "image_hint"),
    "attention_type": ("default",),
    "class_embed_type": (None, "projection", "timestep", "identity"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3, 1),
    "conv_out_kernel": (3, 1),
    "cross_attention_norm": (None, "group_norm", "layer_norm"),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj", "image_proj"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None),
    "num_attention_heads": (None,),
    "time_embedding_act_fn": (None, *_ACTIVATIONS),
    "time_embedding_type": ("positional", "fourier"),
    "timestep_post_act": (None, *_ACTIVATIONS),
}
_DEPTH = Integer(0, 64)  # transformer blocks after a resnet
_PROJECTION = {"projection_class_embeddings_input_dim": Field(WIDTH)}
_TEXT_TIME = {"addition_time_embed_dim": Field(WIDTH), **_PROJECTION}


def _text_fields(levels: int) -> dict[str, Field]:
    depths = per_level(Either(_DEPTH, ListOf(_DEPTH, 1, LAYERS.max + 1)), levels)
    return (
        only(_TEXT_ONLY)
        | _shared_fields(4)
        | {
            "only_cross_attention": Field(per_level(Flag(), levels), (False,) * levels),
            "mid_block_only_cross_attention": Field(Maybe(Flag()), None),
            # The number of heads: a misnomer that diffusers keeps for compatibility. Of other blocks than transformers
            # it is indeed the channels of a head.
            "attention_head_dim": Field(per_level(WIDTH, levels), (8,) * levels),
            "cross_attention_dim": Field(per_level(WIDTH, levels), (1280,) * levels),
            "encoder_hid_dim": Field(Maybe(WIDTH), None),
            "layers_per_block": Field(per_level(LAYERS, levels), (2,) * levels),
            "transformer_layers_per_block": Field(depths, (1,) * levels),
            "reverse_transformer_layers_per_block": Field(Maybe(depths), None),
            "norm_num_groups": Field(Maybe(WIDTH), 32),
            "use_linear_projection": Field(Flag(), False),
            "time_cond_proj_dim": Field(Maybe(Integer(4, MAX_CHANNELS)), None),
            "resnet_out_scale_factor": Field(Number(1e-3, 1e3), 1.0),
            "resnet_skip_time_act": Field(Flag(), False),
            "addition_embed_type_num_heads": Field(WIDTH, 64),
        }
    )


def _read_text_unet(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    channels = channels_of(cfg, source)
    levels, last = len(channels), len(channels) - 1
    values = read_fields(cfg, _text_fields(levels), source)
    usual = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    down_blocks, up_blocks = _block_types(cfg, source, _TEXT_BLOCKS, levels, usual)
    _check_class(values, source)
    text_time = values["addition_embed_type"] == "text_time"
    added = read_fields(cfg, _TEXT_TIME, source) if text_time else dict.fromkeys(_TEXT_TIME, 0)
    projects = values["class_embed_type"] == "projection"
    fields = _shared(values, channels, 128 if text_time else 64) | {  # sizes: defaults of diffusers' pipelines
        "linear_projection": values["use_linear_projection"],
        "time_cond_proj_dim": values["time_cond_proj_dim"],
        "addition_embed_type": values["addition_embed_type"],
        "addition_time_embed_dim": added["addition_time_embed_dim"],
        "addition_input_dim": added["projection_class_embeddings_input_dim"],
        "addition_heads": values["addition_embed_type_num_heads"],
        "class_embed_type": values["class_embed_type"],
        "class_input_dim": (
            read_fields(cfg, _PROJECTION, source)["projection_class_embeddings_input_dim"] if projects else None
        ),
        "conv_in_kernel": values["conv_in_kernel"],
        "conv_out_kernel": values["conv_out_kernel"],
        "time_embedding_type": values["time_embedding_type"],
        "time_embedding_act": _activation(values["time_embedding_act_fn"]),
        "timestep_post_act": _activation(values["timestep_post_act"]),
    }
    if values["time_embedding_type"] == "fourier":
        fields["time_embedding_dim"] = values["time_embedding_dim"] or 2 * channels[0]
        check_divides(fields["time_embedding_dim"], 2, "time_embedding_dim", source)
    else:
        frequencies = min(channels[0], added["addition_time_embed_dim"] if text_time else 2 * channels[0])
        _check_frequencies(frequencies, values["freq_shift"], source)
    fields |= _hidden_projection(values, source)

    kinds = {block.attention for block in (*down_blocks, *up_blocks)}
    adaptive = {block.resampling == "blur" for block in (*down_blocks, *up_blocks)}
    if len(adaptive) > 1:
        raise CheckpointError(f"{source}: its 'down_block_types' and 'up_block_types' have K blocks beside others")
    norm = values["cross_attention_norm"]
    if norm not in ((None, "group_norm", "layer_norm") if True in adaptive else (None, "group_norm")) or (
        norm is not None and not kinds & {"added", "adaptive"}
    ):
        raise CheckpointError(
            f"{source}: 'cross_attention_norm' is {norm!r}; fastldm implements 'group_norm' of added keys, and "
            "'layer_norm' of K blocks"
        )
    fields["cross_attention_norm"] = norm if "added" in kinds else None

    by_level = zip(down_blocks, values["cross_attention_dim"], strict=True)
    contexts = {width for block, width in by_level if block.attention} or {values["cross_attention_dim"][last]}
    if len(contexts) > 1:
        raise CheckpointError(
            f"{source}: 'cross_attention_dim' is {list(values['cross_attention_dim'])}, "
            "expected one width: all levels read one text"
        )
    if True in adaptive:
        return fields | _k_levels(values, channels, contexts.pop(), down_blocks, up_blocks, source)
    return fields | _text_levels(cfg, values, channels, contexts.pop(), down_blocks, up_blocks, source)


def _hidden_projection(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """How what the text encoder makes becomes what attention reads."""
    kind, width = values["encoder_hid_dim_type"], values["encoder_hid_dim"]
    if width is not None and kind is None:
        kind = "text_proj"
    if width is None and (kind is not None or values["addition_embed_type"] in ("image", "image_hint")):
        key = "encoder_hid_dim_type" if kind else "addition_embed_type"
        raise CheckpointError(f"{source}: {key!r} is {values[key]!r} and there is no 'encoder_hid_dim', which it reads")
    return {"encoder_hid_dim": width, "encoder_hid_dim_type": kind}


def _text_levels(
    cfg: Mapping[str, Any],
    values: Mapping[str, Any],
    channels: Sequence[int],
    context: int,
    down_blocks: Sequence[_Block],
    up_blocks: Sequence[_Block],
    source: str,
) -> dict[str, Any]:
    last = len(channels) - 1
    heads, layers, groups = values["attention_head_dim"], values["layers_per_block"], values["norm_num_groups"]
    if groups is None:
        raise CheckpointError(f"{source}: 'norm_num_groups' is null, which only K blocks can do without")
    depths, up_depths = values["transformer_layers_per_block"], values["reverse_transformer_layers_per_block"]
    if up_depths is None:
        up_depths = depths[::-1]
        if not all(isinstance(depth, int) for depth in depths):
            raise CheckpointError(
                f"{source}: 'transformer_layers_per_block' is {list(depths)}, "
                "and such nested lists need 'reverse_transformer_layers_per_block' too"
            )
    only_cross = values["only_cross_attention"]

    def level(i: int, block: _Block, resnets: int, depth: Any) -> Level:
        check_divides(channels[i], groups, "norm_num_groups", source)
        options: dict[str, Any] = {"resampling": block.resampling}
        if block.resampling == "resnet":
            options |= {"scale": values["resnet_out_scale_factor"], "skip_time_act": values["resnet_skip_time_act"]}
        if block.attention is None:
            return Level(channels[i], heads[i], context, (None,) * resnets, **options)
        check_divides(channels[i], heads[i], "attention_head_dim", source)
        if block.attention == "added":
            options |= {"attention": "added"}
            return Level(channels[i], channels[i] // heads[i], context, (1,) * resnets, only_cross[i], **options)
        depths = (depth,) * resnets if isinstance(depth, int) else depth
        if len(depths) != resnets:
            raise CheckpointError(f"{source}: transformer depths {depths} for a block of {resnets} resnets")
        return Level(channels[i], heads[i], context, depths, only_cross[i], **options)

    down = tuple(level(i, down_blocks[i], layers[i], depths[i]) for i in range(last + 1))
    up = tuple(level(last - i, up_blocks[i], layers[last - i] + 1, up_depths[i]) for i in range(last + 1))
    mid = _text_middle(cfg, values, channels[last], context, source)
    _check_count((*down, mid, *up), source)
    return {"down": down, "mid": mid, "up": up, "norm_groups": groups}


def _text_middle(cfg: Mapping[str, Any], values: Mapping[str, Any], channels: int, context: int, source: str) -> Level:
    kind, heads, depth = (
        values["mid_block_type"],
        values["attention_head_dim"][-1],
        values["transformer_layers_per_block"][-1],
    )
    scale = {"scale": values["mid_block_scale_factor"]}
    if kind is None:
        return Level(channels, heads, context, ())
    if kind == "UNetMidBlock2D":
        return Level(channels, heads, context, (None,), **scale)
    check_divides(channels, heads, "attention_head_dim", source)
    if kind == "UNetMidBlock2DCrossAttn":  # which has one transformer
        return Level(channels, heads, context, (depth if isinstance(depth, int) else depth[0], None), **scale)
    only_cross = values["mid_block_only_cross_attention"]
    if only_cross is None:  # as in diffusers: a value for all levels is that of the middle too
        only_cross = cfg.get("only_cross_attention") is True
    options: dict[str, Any] = {"attention": "added", "skip_time_act": values["resnet_skip_time_act"], **scale}
    return Level(channels, channels // heads, context, (1, None), only_cross, **options)


def _k_levels(
    values: Mapping[str, Any],
    channels: Sequence[int],
    context: int,
    down_blocks: Sequence[_Block],
    up_blocks: Sequence[_Block],
    source: str,
) -> dict[str, Any]:
    """Of K blocks, which a level's last resnet alone gives a skip connection, and in the decoder its first reads."""
    last = len(channels) - 1
    head, layers = values["attention_head_dim"], values["layers_per_block"]
    if values["mid_block_type"] is not None:
        raise CheckpointError(f"{source}: 'mid_block_type' is {values['mid_block_type']!r}, expected null of K blocks")
    if values["norm_num_groups"] is not None:
        raise CheckpointError(f"{source}: 'norm_num_groups' is {values['norm_num_groups']}, expected null of K blocks")
    time = values["time_embedding_dim"] or (2 if values["time_embedding_type"] == "fourier" else 4) * channels[0]

    def level(i: int, block: _Block, **options: Any) -> Level:
        check_divides(channels[i], GROUP_SIZE, "a norm's groups of channels", source)
        depth = None
        if block.attention:
            depth = 1
            check_divides(channels[i], head[i], "attention_head_dim", source)
            check_divides(options.get("last_channels", channels[i]), head[i], "attention_head_dim", source)
        heads = max(channels[i] // head[i], 1)
        kind: dict[str, Any] = {"attention": "adaptive", "resampling": "blur", **options}
        return Level(channels[i], heads, context, (depth,) * layers[i], **kind)

    down = []
    for i, block in enumerate(down_blocks):
        attends = block.attention is not None
        keeps = i < last or not attends
        skips = (*[False] * (layers[i] - 1), keeps)
        down.append(level(i, block, self_attention=attends and i == last, skips=skips))
    up = []
    for k, block in enumerate(up_blocks):
        i = last - k
        narrower = channels[max(i - 1, 0)]
        first = block.attention is not None and narrower == channels[i] == time
        if first == down[i].skips[-1]:
            raise CheckpointError(
                f"{source}: 'up_block_types' has a block {k} that reads {'no' if first else 'a'} skip connection, and "
                f"'down_block_types' a block {i} that makes {'one' if first else 'none'}"
            )
        skips = (not first, *[False] * (layers[i] - 1))
        up.append(level(i, block, last_channels=narrower, self_attention=first, skips=skips))
    mid = Level(channels[last], down[-1].heads, context, ())
    _check_count((*down, *up), source)
    return {
        "down": tuple(down),
        "mid": mid,
        "up": tuple(up),
        "norm_groups": GROUP_SIZE,
        "time_norm": "adaptive",
        "out_norm": False,
        "skips_between": False,
    }


# ---------------------------------------------------------------------------------------------------- UNet2DModel

_PIXELS_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "class_embed_type": (None, "timestep", "identity"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "mid_block_type": ("UNetMidBlock2D", None),
    # "fourier" is NCSN++'s, whose blocks and sampler are not there
    "time_embedding_type": ("positional", "learned"),
}
_PIXELS = {
    "attention_head_dim": Field(Maybe(WIDTH), 8),  # channels of a head; null: one head
    "layers_per_block": Field(LAYERS, 2),
    "norm_num_groups": Field(WIDTH, 32),
    "attn_norm_num_groups": Field(Maybe(WIDTH), None),
    "add_attention": Field(Flag(), True),
}


def _read_pixel_unet(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    channels = channels_of(cfg, source)
    last = len(channels) - 1
    values = read_fields(cfg, only(_PIXELS_ONLY) | _shared_fields(3) | _PIXELS, source)
    usual = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    down_blocks, up_blocks = _block_types(cfg, source, _PIXEL_BLOCKS, last + 1, usual)
    learned = values["time_embedding_type"] == "learned"
    timesteps = read_fields(cfg, {"num_train_timesteps": Field(Integer(1, 2**20))}, source) if learned else {}
    if not learned:
        _check_frequencies(channels[0], values["freq_shift"], source)
    groups, layers = values["norm_num_groups"], values["layers_per_block"]

    def heads(width: int) -> int:
        head = values["attention_head_dim"] or width
        check_divides(width, head, "attention_head_dim", source)
        return width // head

    def level(i: int, block: _Block, key: str, resnets: int) -> Level:
        check_divides(channels[i], groups, "norm_num_groups", source)
        if block.attention is None:
            return Level(channels[i], 1, 0, (None,) * resnets, resampling=block.resampling)
        resampling: Resampling = "convolution" if values[key] == "conv" else "resnet"
        options: dict[str, Any] = {"attention": "pixels", "attention_groups": groups, "resampling": resampling}
        return Level(channels[i], heads(channels[i]), 0, (1,) * resnets, **options)

    down = tuple(level(i, down_blocks[i], "downsample_type", layers) for i in range(last + 1))
    up = tuple(level(last - i, up_blocks[i], "upsample_type", layers + 1) for i in range(last + 1))
    mid_groups = values["attn_norm_num_groups"]
    if mid_groups is None and values["resnet_time_scale_shift"] == "default":
        mid_groups = groups
    middle: dict[str, Any] = {"scale": values["mid_block_scale_factor"]}
    depths: tuple[int | None, ...] = (None, None)
    if values["mid_block_type"] is None:
        depths = ()
    elif values["add_attention"]:
        depths = (1, None)
        middle |= {"attention": "pixels", "attention_groups": mid_groups}
        check_divides(channels[last], mid_groups or 1, "attn_norm_num_groups", source)
    mid = Level(channels[last], heads(channels[last]) if depths[:1] == (1,) else 1, 0, depths, **middle)
    _check_count((*down, mid, *up), source)
    return _shared(values, channels, 32) | {
        "down": down,
        "mid": mid,
        "up": up,
        "norm_groups": groups,
        "linear_projection": False,
        "time_cond_proj_dim": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": 0,
        "addition_input_dim": 0,
        "class_embed_type": values["class_embed_type"],
        "time_embedding_type": values["time_embedding_type"],
        "timesteps": timesteps.get("num_train_timesteps"),
        "conditional": False,
    }


_CLASSES: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "UNet2DConditionModel": _read_text_unet,
    "UNet2DModel": _read_pixel_unet,
}


def read_unet(cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of a UNetConfig from config.json; CheckpointError if it needs what is not implemented."""
    name = cfg.get("_class_name", "UNet2DConditionModel")
    if not isinstance(name, str) or name not in _CLASSES:
        read_fields(cfg, {"_class_name": Field(OneOf(*_CLASSES))}, source)
    return _CLASSES[name](cfg, source)
