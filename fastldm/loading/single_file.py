"""Opening a single file: its family and configs, from its keys and shapes.

The original Stability layout keeps U-Net, VAE and text encoders in one file (`model.diffusion_model.`,
`first_stage_model.`, `cond_stage_model.` or `conditioner.embedders.N.`) and no configuration. `read_layout` recognises
the family, derives each component's config and maps every key to diffusers' name for it (key_names.py).

Over 500 lines, for configs are derived from the same shapes that tell the families apart.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastldm.checks import show
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import relatives
from fastldm.loading.checkpoint import Checkpoint, Component, Loaded, TokenizerFiles
from fastldm.loading.formats import Config, PathLike
from fastldm.loading.glide import glide_layout, is_glide
from fastldm.loading.key_names import (
    Names,
    is_dropped_layer,
    open_clip_name,
    open_clip_vision_name,
    transformers_clip_name,
    unet_name,
    vae_name,
)
from fastldm.loading.layout import Layout, OriginalComponent, component, count, stripped
from fastldm.loading.tensors import Shapes, read_shapes
from fastldm.models.families import (
    DEPTH_PIPELINE,
    IMAGE_ENCODER,
    IMAGE_ENCODER_CLASSES,
    IMAGE_NORMALIZER,
    IMAGE_NORMALIZER_CLASSES,
)

logger = logging.getLogger("fastldm")

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_VISION = "embedder.model."
_FIRST_CONV = f"{_UNET}input_blocks.0.0.weight"


# --- Configs from shapes ---


def _unet_config(shapes: Shapes, sample_size: int, *, linear: bool) -> Config:
    """UNet2DConditionModel's config from the shapes of a U-Net's keys without prefix.

    linear: True for SD2 and SDXL, with heads of 64 channels and linear projections (1x1 convolutions in some files),
        False for SD1, with 8 heads per level.
    KeyError or ValueError if it is not built like Stable Diffusion's.
    """

    def depth(block: str) -> int:
        return count(shapes, rf"{re.escape(block)}\.1\.transformer_blocks\.(\d+)\.")

    levels: list[list[tuple[int, int]]] = [[]]  # (channels, transformer depth) of each layer of each level
    for i in range(1, count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append((shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0], depth(f"input_blocks.{i}")))
    layers_per_block = len(levels[0])
    if any(len(level) != layers_per_block or len(set(level)) != 1 for level in levels):
        raise ValueError("its levels differ in layers")
    channels, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    if not any(depths):
        raise ValueError("it has no cross-attention")
    up_depths = [depth(f"output_blocks.{i}") for i in range(count(shapes, r"output_blocks\.(\d+)\."))]
    if up_depths != [d for d in reversed(depths) for _ in range(layers_per_block + 1)]:
        raise ValueError("its decoder does not mirror its encoder")
    mid = depth("middle_block")
    if not mid or mid != (depths[-1] or mid):
        raise ValueError("its middle block is not as deep as the last level")
    attentions = [f"input_blocks.{1 + i * (layers_per_block + 1)}.1.transformer_blocks.0" for i in range(len(depths))]
    first = next(level for level, d in enumerate(depths) if d)
    reads_text = [  # twice, with no self-attention, as far as shapes tell
        bool(d) and shapes[f"{attention}.attn1.to_k.weight"][1] != width
        for attention, width, d in zip(attentions, channels, depths, strict=True)
    ]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [c // 64 for c in channels] if linear else 8,  # "dim" in name only: the number of heads
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": shapes[f"{attentions[first]}.attn2.to_k.weight"][1],
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "layers_per_block": layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "num_class_embeds": shapes.get("label_emb.weight", (None,))[0],
        "only_cross_attention": reads_text if any(reads_text) else False,
        "out_channels": shapes["out.2.weight"][0],
        "sample_size": sample_size,
        # The middle block is as deep as the last level, which in SDXL's refiner has no transformer of its own.
        "transformer_layers_per_block": [*(d or 1 for d in depths[:-1]), mid] if max(*depths, mid) > 1 else 1,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "use_linear_projection": linear,
    }


def _vae_config(shapes: Shapes, sample_size: int, scaling_factor: float) -> Config:
    """AutoencoderKL's config from the shapes of a VAE's keys without prefix; `sample_size` is in latents."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "norm_num_groups": 32,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "sample_size": sample_size * 2 ** (levels - 1),
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_config(state: Shapes, text: _Text) -> Config:
    """CLIPTextModel's config from the shapes of the original keys without prefix."""
    if text.open_clip_names:
        embeddings, positions = "token_embedding.weight", "positional_embedding"
        layer, fc1, projection = r"transformer\.resblocks", "transformer.resblocks.0.mlp.c_fc.weight", "text_projection"
    else:
        inner = "text_model." if "text_model.final_layer_norm.weight" in state else ""
        embeddings, positions = (f"{inner}embeddings.{name}_embedding.weight" for name in ("token", "position"))
        layer, fc1 = rf"{re.escape(inner)}encoder\.layers", f"{inner}encoder.layers.0.mlp.fc1.weight"
        projection = "text_projection.weight"
    vocabulary, hidden = state[embeddings]
    remaining = [key for key in state if not (text.drops_last and is_dropped_layer(key))]
    projected = state[projection][1 if text.open_clip_names else 0] if text.with_projection else hidden
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.with_projection else "CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu" if text.open_clip else "quick_gelu",
        "hidden_size": hidden,
        "intermediate_size": state[fc1][0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": state[positions][0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, hidden // 64),
        "num_hidden_layers": count(remaining, rf"{layer}\.(\d+)\."),
        "pad_token_id": 1,
        "projection_dim": projected,
        "vocab_size": vocabulary,
    }


def _vision_config(shapes: Shapes) -> Config:
    """CLIPVisionModelWithProjection's config from the shapes of the original keys, `visual.*` and beside them, where it
    is of OpenAI's whole CLIP, those of its text encoder."""
    state, openai = stripped(shapes, "visual."), any(key.startswith("transformer.") for key in shapes)
    (hidden, _, patch, _), (positions, _) = state["conv1.weight"], state["positional_embedding"]
    return {
        "hidden_act": "quick_gelu" if openai else "gelu",
        "hidden_size": hidden,
        "image_size": patch * math.isqrt(positions - 1),
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": max(1, hidden // (64 if openai else 80)),  # of L/14, and of OpenCLIP's H/14
        "num_hidden_layers": count(state, r"transformer\.resblocks\.(\d+)\."),
        "patch_size": patch,
        "projection_dim": state["proj"][1],
    }


def _scheduler_config(
    class_name: str, prediction_type: str, betas: tuple[float, float], *, zero_terminal_snr: bool = False
) -> Config:
    """The scheduler_config.json of the family's diffusers repository."""
    config: Config = {
        "_class_name": class_name,
        "beta_end": betas[1],
        "beta_schedule": "scaled_linear",
        "beta_start": betas[0],
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
    return config | {"rescale_betas_zero_snr": True} if zero_terminal_snr else config


# --- The full file ---


@dataclass(frozen=True)
class _Text:
    """A text encoder in a single file: its kind, and the naming of its keys."""

    prefix: str
    open_clip_names: bool  # False: transformers' names
    open_clip: bool  # trained by OpenCLIP, which pads with id 0 ("!"); OpenAI pads with the end token
    with_projection: bool = False

    @property
    def drops_last(self) -> bool:
        """Whether the last layer is dropped: see `is_dropped_layer`."""
        return self.open_clip and not self.with_projection

    @property
    def pad_token(self) -> str:
        return "!" if self.open_clip else "<|endoftext|>"

    def name(self, key: str) -> Names | None:
        rename = open_clip_name if self.open_clip_names else transformers_clip_name
        return rename(key, with_projection=self.with_projection, drops_last=self.drops_last)


@dataclass(frozen=True)
class _Family:
    """Values of a family's diffusers repository that cannot be derived from keys and shapes."""

    title: str
    sample_size: int
    scaling_factor: float
    scheduler: str
    pipeline: str
    betas: tuple[float, float] = (0.00085, 0.012)
    heads: int = 0  # of every level; 0: heads of 64 channels with linear projections, else 8


_SD1 = _Family("Stable Diffusion 1", 64, 0.18215, "PNDMScheduler", "StableDiffusion")
_SD2 = replace(_SD1, title="Stable Diffusion 2")
_X4 = _Family("the x4 upscaler", 128, 0.08333, "DDIMScheduler", "StableDiffusionUpscale", betas=(0.0001, 0.02), heads=8)
_SDXL = _Family("Stable Diffusion XL", 128, 0.13025, "EulerDiscreteScheduler", "StableDiffusionXL")
_UNCLIP = replace(_SD2, title="stable unCLIP", pipeline="StableUnCLIPImg2Img")
_REFINER = replace(_SDXL, title="the Stable Diffusion XL refiner", pipeline="StableDiffusionXLImg2Img")


def read_layout(
    shapes: Shapes, *, source: str, metadata: Mapping[str, str] | None = None, prediction_type: str | None = None
) -> Layout:
    """The layout of the single file `source`, from its keys' shapes and its safetensors metadata.

    Families: SD1, SD2, SDXL and its refiner, each with 4 latent channels, the 9 of inpainting or the 8 of
    InstructPix2Pix, which other models that read an image are taken for, the x4 upscaler, stable unCLIP, and SD2's
    depth to image, of which the estimator is not read, at any width and depth.
    Whether a network predicts noise or v is not visible in its shapes: `prediction_type` decides if set, else what the
    file states (ModelSpec metadata, or the marker key `v_pred`), else v for SD2 text to image and for the upscaler, as
    in diffusers, and epsilon for all others.

    Raises CheckpointError if the file is something else, saying what if known; InputError for an unknown
    `prediction_type`.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction_type is {show(prediction_type)}; expected one of {', '.join(PREDICTION_TYPES)}.")
    if is_glide(shapes):
        return glide_layout(shapes, source=source, prediction_type=prediction_type)
    family, texts = _family(shapes, source)
    is_sdxl, is_sd2, is_x4 = family in (_SDXL, _REFINER), family in (_SD2, _UNCLIP), family is _X4
    is_unclip = family is _UNCLIP
    ids = 5 if family is _REFINER else 6
    inpainting, edits, reads_depth = (shapes[_FIRST_CONV][1] == channels for channels in (9, 8, 5))
    reads = "Inpaint" if inpainting else "InstructPix2Pix" if edits else "Depth2Img" if reads_depth else ""
    prediction = prediction_type or _stated_prediction_type(shapes, metadata or {})
    if prediction is None:
        of_images = inpainting or edits or reads_depth
        prediction = "v_prediction" if is_x4 or (is_sd2 and not of_images) else "epsilon"
        if is_sd2:
            logger.info(
                "%s does not state its prediction type: using %s (set prediction_type= to change it)",
                source,
                prediction,
            )
    sample_size = 96 if is_sd2 and prediction == "v_prediction" else family.sample_size

    unet, vae = stripped(shapes, _UNET), stripped(shapes, _VAE)
    try:
        unet_config = _unet_config(unet, sample_size, linear=family is not _SD1)
        if is_unclip:
            channels = unet["label_emb.0.0.weight"][1]
            unet_config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": channels}
            vision_config = _vision_config(stripped(shapes, _VISION))
        vae_config = _vae_config(vae, sample_size, family.scaling_factor)
        text_configs = {name: _text_config(stripped(shapes, text.prefix), text) for name, text in texts.items()}
    except (KeyError, IndexError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{source} looks like {family.title} but is built differently: {reason}. "
            "If it is a distilled or pruned model, load its diffusers folder instead."
        ) from error
    if is_sd2:
        unet_config["upcast_attention"] = prediction == "v_prediction"  # SD2.1's attention scores overflow float16
    if family.heads:
        unet_config["attention_head_dim"] = family.heads
    if is_sdxl:
        pooled, channels = text_configs["text_encoder_2"]["projection_dim"], unet["label_emb.0.0.weight"][1]
        unet_config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (channels - pooled) // ids,  # original size, crop, target size or a score
            "projection_class_embeddings_input_dim": channels,
        }
        vae_config["force_upcast"] = True

    layers_per_block, levels = unet_config["layers_per_block"], len(vae_config["block_out_channels"])
    label = "class_embedding" if is_unclip else "add_embedding"
    components = {
        "unet": component(unet_config, shapes, _UNET, lambda key: unet_name(key, layers_per_block, label), source),
        "vae": component(vae_config, shapes, _VAE, lambda key: vae_name(key, levels), source),
    }
    for name, text in texts.items():
        components[name] = component(text_configs[name], shapes, text.prefix, text.name, source)
    if is_unclip:
        name = IMAGE_ENCODER_CLASSES[0]
        components[IMAGE_ENCODER] = component(vision_config, shapes, _VISION, open_clip_vision_name, source, name)
        components[IMAGE_NORMALIZER] = _normalizer(shapes, vision_config, source)
    used = {key for component in components.values() for key in component.names}
    is_sd2_v = is_sd2 and prediction == "v_prediction"
    noise = _scheduler_config("DDPMScheduler", "epsilon", family.betas) if is_x4 or is_unclip else None
    if noise is not None and is_unclip:
        noise["beta_schedule"] = "squaredcos_cap_v2"
    return Layout(
        components=components,
        scheduler=_scheduler_config(
            "DDIMScheduler" if is_sd2_v else family.scheduler,
            prediction,
            family.betas,
            zero_terminal_snr="ztsnr" in shapes,
        ),
        low_res_scheduler=noise,
        pad_tokens={name.replace("text_encoder", "tokenizer"): text.pad_token for name, text in texts.items()},
        index={"_class_name": f"{family.pipeline}{reads}Pipeline"}
        | ({"force_zeros_for_empty_prompt": True} if family is _SDXL else {})
        | ({"requires_aesthetics_score": True} if family is _REFINER else {})
        | ({"max_noise_level": 350} if is_x4 else {}),
        ignored=[key for key in shapes if key not in used],
    )


def _family(shapes: Shapes, source: str) -> tuple[_Family, dict[str, _Text]]:
    """The family of a file, and its text encoders by component.

    CheckpointError if the file is no model of a family that fastldm runs, saying what it is instead."""
    if label := relatives.adapter_label(shapes):
        raise CheckpointError(f"{source} is {label}, not a model. {relatives.adapter_advice(label)}")
    if label := relatives.first_match(relatives.OTHER_MODELS, shapes):
        raise CheckpointError(f"{source} is {label}; fastldm runs Stable Diffusion 1, 2 and XL.")

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in shapes)

    present = {
        "U-Net (model.diffusion_model.*)": len(shapes.get(_FIRST_CONV, ())) == 4,
        "VAE (first_stage_model.*)": has(_VAE),
        "text encoder (cond_stage_model.* or conditioner.*)": has("cond_stage_model.") or has("conditioner."),
    }
    missing = [component for component, is_present in present.items() if not is_present]
    if len(missing) == 1:
        raise CheckpointError(f"{source} has no {missing[0]}; a file with U-Net, VAE and text encoder was expected.")
    if missing and (label := relatives.first_match(relatives.LONE_COMPONENTS, shapes)):
        raise CheckpointError(f"{source} is {label}; a file with U-Net, VAE and text encoder was expected.")
    if missing:
        raise CheckpointError(
            f"{source} is no Stable Diffusion checkpoint: its keys are like {min(shapes, default='(none)')}, "
            f"where {_FIRST_CONV} was expected."
        )
    channels, has_label_embedding = shapes[_FIRST_CONV][1], f"{_UNET}label_emb.0.0.weight" in shapes
    if has(f"{_VISION}visual.") and (only := _text_keys(shapes, "cond_stage_model.")):
        relatives.check_channels(channels, f"{source}: its U-Net")
        return _UNCLIP, {"text_encoder": _Text(*only, open_clip=True)}
    is_x4, reads_depth = f"{_UNET}label_emb.weight" in shapes, has("depth_model.")
    if channels != 8 or is_x4:  # InstructPix2Pix: others with as many are not published as such files
        pipeline = DEPTH_PIPELINE if reads_depth else None
        relatives.check_channels(channels, f"{source}: its U-Net", pipeline=pipeline, needs_class=is_x4)
    first, second = (_text_keys(shapes, f"conditioner.embedders.{i}.") for i in (0, 1))
    if has_label_embedding and first and not second:
        return _REFINER, {"text_encoder_2": _Text(*first, open_clip=True, with_projection=True)}
    if has_label_embedding and first and second:
        encoder = _Text(*first, open_clip=first[1])
        return _SDXL, {"text_encoder": encoder, "text_encoder_2": _Text(*second, open_clip=True, with_projection=True)}
    only = _text_keys(shapes, "cond_stage_model.") or first
    if has_label_embedding or second or only is None:
        raise CheckpointError(f"{source} pairs a Stable Diffusion U-Net with text encoders that fastldm does not know.")
    if is_x4:
        return _X4, {"text_encoder": _Text(*only, open_clip=True)}
    # Transformers' names are ambiguous: SD2's U-Net reads the 1024 channels of OpenCLIP H and has linear projections.
    unet = {key: shape for key, shape in shapes.items() if key.startswith(_UNET)}
    linear = any(len(shape) == 2 for key, shape in unet.items() if key.endswith(".1.proj_in.weight"))
    reads_open_clip = any(shape[1:] == (1024,) for key, shape in unet.items() if key.endswith(".0.attn2.to_k.weight"))
    is_sd2 = only[1] or linear or reads_open_clip
    return _SD2 if is_sd2 else _SD1, {"text_encoder": _Text(*only, open_clip=is_sd2)}


def _text_keys(shapes: Shapes, root: str) -> tuple[str, bool] | None:
    """The prefix of a text encoder's keys under a root, and whether they have OpenCLIP's names (else transformers').
    None if there is no text encoder."""
    for prefix in (f"{root}transformer.", f"{root}model.", root):
        if f"{prefix}token_embedding.weight" in shapes:
            return prefix, True
        if any(f"{prefix}{inner}embeddings.token_embedding.weight" in shapes for inner in ("text_model.", "")):
            return prefix, False
    return None


def _stated_prediction_type(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """The prediction type in ModelSpec's metadata, or by the marker key that trainers of v-predicting models write."""
    stated = metadata.get("modelspec.prediction_type")
    if stated in ("v", "v_prediction") or "v_pred" in shapes:
        return "v_prediction"
    return "epsilon" if stated == "epsilon" else None


def _normalizer(shapes: Shapes, vision: Config, source: str) -> OriginalComponent:
    """The mean and deviation of a picture's vectors, which few files have: OpenCLIP's H/14 goes without, OpenAI's L/14
    has a file of its own for them."""
    names: dict[str, Names] = {f"noise_augmentor.data_{name}": (name,) for name in ("mean", "std")}
    channels = vision["projection_dim"]
    if names.keys() <= shapes.keys():
        tensors = {}
    elif vision["hidden_act"] == "gelu":
        names, tensors = {}, {"mean": torch.zeros(1, channels), "std": torch.ones(1, channels)}
    else:
        raise CheckpointError(
            f"{source} is stable unCLIP with OpenAI's CLIP, and has no noise_augmentor.data_mean and data_std, the "
            "mean and deviation of its vectors (ViT-L-14_stats.th): load its diffusers folder instead."
        )
    return OriginalComponent(IMAGE_NORMALIZER_CLASSES[0], {"embedding_dim": channels}, names, tensors)


def open_single_file(path: PathLike, *, prediction_type: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Open a file in the original Stability layout: SD 1, SD 2, SDXL, their inpainting models, or another family of
    `read_layout`. Reads no weights.

    prediction_type: "epsilon", "v_prediction" or "sample", which such files seldom state. The default is diffusers':
        v-prediction for SD 2 (so give "epsilon" for SD 2 base and SD-Turbo) and the upscaler, epsilon for all others.
    Raises CheckpointError for a file that is something else or damaged, saying what it is.
    """
    path = Path(path).expanduser()
    source = str(path)
    shapes, metadata = read_shapes(path, allow_pickle)
    layout = read_layout(shapes, source=source, metadata=metadata, prediction_type=prediction_type)
    if layout.ignored:
        averaged = sum(key.startswith("model_ema.") for key in layout.ignored)
        logger.info(
            "%s: ignored %d keys that no network needs (%d of them moving averages)",
            source,
            len(layout.ignored),
            averaged,
        )
    components = {
        name: Component(name, original.class_name, original.config, (path,), source, original.names, allow_pickle)
        if original.names
        else Loaded(name, original.class_name, original.config, (), source, tensors=original.tensors)
        for name, original in layout.components.items()
    }
    pads = layout.pad_tokens
    tokenizers = {name: TokenizerFiles(path.parent if pads[name] is None else None, pads[name]) for name in pads}
    schedulers = layout.scheduler, layout.low_res_scheduler
    return Checkpoint(source, components, schedulers[0], tokenizers, layout.index, schedulers[1])
