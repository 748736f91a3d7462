"""Relatives of Stable Diffusion that fastldm does not run, as data: their pipeline classes, channels, config keys, and
keys in weight files.

A relative's networks may load as Stable Diffusion's do, and then crash or give a wrong image. So all ways to open a
model (a folder, a single file, an adopted pipeline) check here and refuse it by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fastldm.errors import CheckpointError
from fastldm.loading.tensors import Shapes
from fastldm.models.config import UNetConfig
from fastldm.models.families import (
    DEPTH_PIPELINE,
    FAMILIES,
    GLIDE_PIPELINES,
    GLIDE_UPSAMPLER,
    IF_PIPELINES,
    IF_SUPER_RESOLUTIONS,
    KANDINSKY_PIPELINES,
    KANDINSKY_PRIOR_PIPELINE,
    KARLO_PIPELINES,
    LATENT_UPSCALE_PIPELINE,
    PIXEL_PIPELINE,
    SUPER_RESOLUTION_PIPELINE,
    UNCONDITIONAL_PIPELINES,
    pipeline_classes,
    what_runs,
)


class Relative(NamedTuple):
    """A kind of pipeline that is refused."""

    class_pattern: str
    label: str
    same_networks: bool = False
    """Whether its networks are Stable Diffusion's, so that a standard pipeline can run them without its additions."""


RELATIVES = (  # the first match counts
    Relative(r"Onnx|^(ORT|OV|TRT|Neuron|Gaudi|Optimum)", "an export for another runtime"),
    Relative(r"ControlNet", "Stable Diffusion with a ControlNet, which attach_control takes", same_networks=True),
    Relative(r"Adapter", "Stable Diffusion with a T2I-Adapter, which attach_control takes", same_networks=True),
    Relative(r"AnimateDiff|PIA|Video|I2VGen", "a model for video"),
    Relative(r"Depth2Img", "depth to image, whose U-Net reads a depth map"),
    Relative(r"Upscale|SuperResolution", "an upscaler, whose U-Net reads a small image"),
    Relative(r"UnCLIP", "another of unCLIP's than Karlo, UnCLIPPipeline, and stable unCLIP, StableUnCLIPPipeline"),
    Relative(
        r"Kandinsky",
        "another of Kandinsky's than those of 2.2 without a ControlNet; of a combined pipeline save decoder and prior",
    ),
    Relative(r"ImageVariation", "image variation by Versatile Diffusion"),
    Relative(r"PaintByExample", "Paint by Example, which reads an image in place of a prompt"),
    Relative(r"Marigold", "Marigold, which estimates depth, normals or materials of an image"),
    Relative(r"LDM3D", "LDM3D, whose autoencoder holds depth beside colour"),
    Relative(r"GLIGEN", "GLIGEN, whose U-Net reads boxes"),
    Relative(r"PAG", "perturbed-attention guidance of a kind of model that is not there"),
    Relative(r"SAG", "Stable Diffusion with self-attention guidance", same_networks=True),
    Relative(r"Safe$", "Stable Diffusion with safe guidance", same_networks=True),
    Relative(r"Panorama", "MultiDiffusion panoramas with Stable Diffusion", same_networks=True),
    Relative(r"AttendAndExcite", "Attend-and-Excite, which optimises its latents", same_networks=True),
    Relative(
        r"LEdits|DiffEdit|Pix2PixZero|CycleDiffusion|Semantic|ModelEditing",
        "a way of editing with Stable Diffusion",
        same_networks=True,
    ),
    Relative(r"ScoreSde", "score SDE (NCSN++), whose corrector takes steps by the norms of score and noise, no table"),
    Relative(r"KarrasVe", "Karras et al.'s stochastic sampler of a network that reads half the noise level"),
    Relative(r"KDiffusion|Paradigms", "Stable Diffusion with samplers of its own", same_networks=True),
)

INPUT_CHANNELS = {
    5: "depth to image, without its pipeline's name",
    7: "an upscaler without noise levels ('num_class_embeds')",
    8: "Marigold, or another that reads an image",
}
"""Models by the number of their U-Net's input channels; Stable Diffusion has 4, 9 for inpainting, and 8 to edit images
by InstructPix2Pix' pipelines."""

_UNET_KEYS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("addition_embed_type", ("image", "image_hint", "text_image"), "Kandinsky"),
    ("addition_embed_type", ("text",), "DeepFloyd IF"),
    ("attention_type", ("gated", "gated-text-image"), "GLIGEN, whose U-Net reads boxes"),
    ("class_embed_type", ("timestep",), "a model whose class is a time"),
    ("class_embed_type", ("identity", "projection", "simple_projection"), "unCLIP, whose U-Net reads an embedding"),
    ("encoder_hid_dim_type", ("image_proj", "text_image_proj"), "Kandinsky"),
    ("encoder_hid_dim_type", ("ip_image_proj",), "Stable Diffusion with an IP-Adapter"),
    ("encoder_hid_dim_type", ("text_proj",), "Kolors or DeepFloyd IF"),
)


_LONGEST = 100  # characters of a class's name


def _known() -> frozenset[str]:
    """Pipelines whose components are read."""
    return pipeline_classes() | {KANDINSKY_PRIOR_PIPELINE}


def check_class(name: Any, source: str) -> None:
    """CheckpointError if `name`, the `_class_name` of a pipeline, is that of a relative."""
    for relative in RELATIVES:
        if isinstance(name, str) and name not in _known() and re.search(relative.class_pattern, name):
            advice = " To run its networks alone, load them as a StableDiffusionPipeline or StableDiffusionXLPipeline."
            text = f"{source} is a {name}: {relative.label}. {what_runs()}."
            raise CheckpointError(text + advice if relative.same_networks else text)


def check_known(name: Any, source: str) -> None:
    """CheckpointError if `name` is not the pipeline class of a family: an unknown class may do anything."""
    if not isinstance(name, str) or name not in _known():
        problem = "has no _class_name" if name is None else f"is a {name}, a pipeline that fastldm does not know"
        nearest = difflib.get_close_matches(str(name)[:_LONGEST], sorted(_known()), n=3)
        advice = f" Classes of like names: {', '.join(nearest)}." if nearest else ""
        raise CheckpointError(f"{source} {problem}. {what_runs()}.{advice}")


def check_unet_keys(config: Mapping[str, Any], source: str, pipeline: Any = None) -> None:
    """CheckpointError if the raw config of a U-Net has a value that only a relative has. pipeline: the class's name."""
    runs = next((family.unet_keys for family in FAMILIES if pipeline in family.pipelines), {})
    for key, values, label in _UNET_KEYS:
        if config.get(key) in values and config[key] != runs.get(key):
            raise CheckpointError(f"{source} has {key!r} {config[key]!r}: it is {label}. {what_runs()}.")


def check_standard(unet: UNetConfig, source: str, pipeline: Any = None) -> None:
    """CheckpointError if a U-Net is beyond Stable Diffusion's kind, and its pipeline is none that is there. pipeline:
    the class's name."""
    if not unet.conditional and pipeline in UNCONDITIONAL_PIPELINES:
        if unet.class_embed_type is not None:
            raise CheckpointError(
                f"{source} has 'class_embed_type' {unet.class_embed_type!r}: a {pipeline} with a table of classes runs"
            )
        return
    if pipeline in KANDINSKY_PIPELINES:
        if not unet.reads_image_embeds:
            raise CheckpointError(
                f"{source} is no U-Net of a {pipeline}, which reads pictures' vectors by 'addition_embed_type' 'image' "
                "and 'encoder_hid_dim_type' 'image_proj'"
            )
        return
    if pipeline in KARLO_PIPELINES:
        if not (unet.needs_projection and unet.reads_text and unet.addition_embed_type is None):
            raise CheckpointError(
                f"{source} is no decoder of a {pipeline}, which reads text, and the vector of a picture by "
                "'class_embed_type' 'identity', and has no 'addition_embed_type'"
            )
        return
    if pipeline in GLIDE_PIPELINES:  # whose config is of its file's keys
        return
    if pipeline == LATENT_UPSCALE_PIPELINE:
        if unet.time_cond_proj_dim is None or unet.needs_added or unet.encoder_hid_dim_type is not None:
            raise CheckpointError(
                f"{source} is no U-Net of a {pipeline}, which reads pooled text by 'time_cond_proj_dim', and has "
                "neither 'addition_embed_type' nor 'encoder_hid_dim_type'"
            )
        return
    if pipeline in IF_PIPELINES:
        if not unet.pools_text or unet.encoder_hid_dim_type != "text_proj":
            raise CheckpointError(
                f"{source} is no U-Net of a {pipeline}, which has 'addition_embed_type' 'text' and "
                "'encoder_hid_dim_type' 'text_proj'"
            )
        if (unet.class_embed_type == "timestep") != (pipeline in IF_SUPER_RESOLUTIONS):
            raise CheckpointError(
                f"{source} is no U-Net of a {pipeline}, for 'class_embed_type' is {unet.class_embed_type!r}: "
                "'timestep' is of super-resolution, which reads a noise level"
            )
        return
    if unet.beyond_standard is not None:
        kind = f"of a {pipeline}, " * isinstance(pipeline, str)
        raise CheckpointError(
            f"{source} is {kind}with {unet.beyond_standard}, a pipeline that is not there. {what_runs()}."
        )


def check_channels(
    channels: int,
    source: str,
    latents: int = 4,
    pipeline: Any = None,
    *,
    needs_class: bool = False,
    reads_text: bool = True,
) -> None:
    """CheckpointError if a U-Net with this number of input channels belongs to a relative.

    Stable Diffusion reads the C channels of latents, and for inpainting also a mask and C channels of the masked image.
    InstructPix2Pix reads C channels of the image that it edits, as others do: pipeline, the name of the class, tells.
    Depth to image reads a map, by its pipeline's name. The x4 upscaler reads a picture, and a noise level as its class:
    needs_class. What reads no text reads latents alone, or by its pipeline's name C channels of a picture too.
    """
    if not reads_text:
        enlarges = pipeline in (PIXEL_PIPELINE, SUPER_RESOLUTION_PIPELINE)
        if channels != (2 * latents if enlarges else latents):
            expected = f"{2 * latents}, latents and as many of a picture" if enlarges else f"{latents}, the latents'"
            raise CheckpointError(
                f"{source} has {channels} input channels and reads no text: a {pipeline} has {expected}."
            )
        return
    if needs_class:
        if channels != latents + 3:
            raise CheckpointError(
                f"{source} has 'num_class_embeds' and {channels} input channels: it reads classes. {what_runs()}. "
                f"Classes of the x4 upscaler are noise levels, and it has {latents + 3} channels."
            )
        return
    if pipeline in (LATENT_UPSCALE_PIPELINE, GLIDE_UPSAMPLER):
        if channels != 2 * latents:
            raise CheckpointError(
                f"{source} has {channels} input channels: a {pipeline} has {2 * latents}, those of latents and those "
                "of the image that it enlarges."
            )
        return
    if pipeline == DEPTH_PIPELINE and channels == latents + 1:
        return
    edits = isinstance(pipeline, str) and "InstructPix2Pix" in pipeline
    if edits and channels != 2 * latents:
        raise CheckpointError(
            f"{source} has {channels} input channels: a {pipeline} has {2 * latents}, those of latents and those of "
            "the image that it edits."
        )
    if not edits and channels not in (latents, 2 * latents + 1):
        label = INPUT_CHANNELS.get(channels, "a model of an unknown kind")
        raise CheckpointError(
            f"{source} has {channels} input channels: it is {label}. {what_runs()}, with {latents} channels, as the "
            f"VAE's latents have ('latent_channels'), or {2 * latents + 1} for inpainting."
        )


# --- Weight files that are not a full model ---

_ADAPTERS = (
    (
        r"^lora_|[._]lora_(up|down|A|B|embedding_A|embedding_B)\b|\.lora\.(up|down)\.|\.hada_w1_|\.lokr_w1|\.oft_blocks|\.dora_scale",
        "a LoRA",
    ),
    (r"^ip_adapter\.|^image_proj\.|\.to_k_ip\b", "an IP-Adapter"),
    (
        r"^control_model\.|^controlnet_(cond_embedding|down_blocks|mid_block)|(^|\.)input_hint_block\.",
        "a ControlNet",
    ),
    (r"^emb_params$|^string_to_param\b|^string_to_token\b", "a textual inversion embedding"),
    (r"^adapter\.body\.\d|^body\.\d+\.(body\.\d+\.)?block1\.", "a T2I-Adapter"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
)
_METHODS = {
    "a LoRA": "load_lora_weights",
    "a ControlNet": "attach_control",
    "a T2I-Adapter": "attach_control",
    "a textual inversion embedding": "load_textual_inversion",
}
OTHER_MODELS = (
    (r"(^|\.)double_blocks\.\d+\.img_", "a FLUX transformer or one of its relatives"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 transformer"),
    (r"^edm_mean$", "Playground v2.5, which needs latent statistics and EDM scaling"),
    (r"^edm_vpred\.sigma_max$", "a CosXL model, which needs EDM scaling"),
    (r"\.position_net\.|\.transformer_blocks\.\d+\.fuser\.", "GLIGEN, whose U-Net reads boxes"),
    (r"^cc_projection\.", "Zero123, which turns objects"),
    (r"^learnable_vector$|^cond_stage_model\.(mapper|transformer\.vision_model)\.", "Paint by Example"),
    (r"^cond_stage_model\.(roberta|transformer\.roberta)\.", "AltDiffusion"),
    (
        r"^cond_stage_model\.transformer\.token_emb\.|^first_stage_model\.quantize\.",
        "one of latent diffusion's first models in its original layout, whose diffusers folder fastldm runs",
    ),
    (r"\.time_stack\.|\.time_mixer\.|\.temopral_conv\.", "a model for video"),
)
LONE_COMPONENTS = (
    (r"^(encoder\.down|decoder\.up)\.\d|^first_stage_model\.", "a VAE alone"),
    (r"^(encoder\.down_blocks|decoder\.up_blocks)\.\d", "a VAE alone, in diffusers' layout"),
    (r"^(encoder|decoder)\.layers\.\d+\.conv\.|^taesd_", "a tiny autoencoder alone"),
    (r"^(input_blocks|output_blocks)\.\d|^model\.diffusion_model\.", "a U-Net alone"),
    (r"^(down_blocks|up_blocks)\.\d", "a U-Net alone, in diffusers' layout"),
    (r"^(text_model|transformer\.resblocks|cond_stage_model|conditioner)\.", "a text encoder alone"),
)


def first_match(table: tuple[tuple[str, str], ...], keys: Collection[str]) -> str | None:
    """The label of the first pattern of a table that matches a key, or None."""
    for pattern, label in table:
        search = re.compile(pattern).search
        if any(search(key) for key in keys):
            return label
    return None


def adapter_advice(label: str) -> str:
    """How a kind of adapter is loaded, in a sentence."""
    method = _METHODS.get(label)
    return f"A loaded pipeline takes it: pipe.{method}(path)." if method else "fastldm does not load those."


def adapter_label(shapes: Shapes) -> str | None:
    """The kind of adapter that a file holds ("a LoRA", "a ControlNet" ...), or None."""
    if label := first_match(_ADAPTERS, shapes):
        return label
    # Embeddings are saved under the token's name or, for SDXL, as clip_l and clip_g, as wide as its embeddings.
    rows = 0 < len(shapes) <= 2 and all(1 <= len(shape) <= 2 and shape[-1] >= 64 for shape in shapes.values())
    named = any(key.endswith((".weight", ".bias")) for key in shapes)
    return "a textual inversion embedding" if rows and not named else None
