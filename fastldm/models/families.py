"""The families of models, as data. To add one without new networks, add an entry to FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastldm.models.config import LDM_BERT, T5_ENCODER, TextConfig, UNetConfig

NETWORK_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "PixelResidual", "VQModel"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", LDM_BERT),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
"""The supported classes of diffusers and transformers, by pipeline component."""
IMAGE_ENCODER = "image_encoder"
IMAGE_ENCODER_CLASSES = ("CLIPVisionModelWithProjection",)
IMAGE_NORMALIZER = "image_normalizer"
IMAGE_NORMALIZER_CLASSES = ("StableUnCLIPImageNormalizer",)
PRIOR, PRIOR_TEXT_ENCODER = "prior", "prior_text_encoder"
PRIOR_CLASSES = {PRIOR: ("PriorTransformer",), PRIOR_TEXT_ENCODER: ("CLIPTextModelWithProjection",)}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def encoder_names(texts: Sequence[TextConfig]) -> tuple[str, ...]:
    """The components that a model's text encoders are: SDXL's second, which projects, is its refiner's only one."""
    return TEXT_ENCODERS[1:] if [text.with_projection for text in texts] == [True] else TEXT_ENCODERS[: len(texts)]


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint: how it is recognised, and its defaults.

    Its default size is `unet.sample_size` times `vae.factor`.
    """

    name: str
    num_inference_steps: int
    guidance_scale: float  # at most 1: no classifier-free guidance, one pass per step instead of two
    matches: Callable[[UNetConfig, Mapping[str, Any]], bool]  # of the U-Net and the raw scheduler_config.json
    sampler: str | None = None  # None: the one that scheduler_config.json names
    strength: float = 0.8  # of a start from an image
    pipelines: tuple[str, ...] = ()  # diffusers' classes for it, whose arguments fastldm's pipelines take
    noise_level: int = 0  # of the noise that is added to a small picture that is read, or to a picture's vector
    reads_picture: bool = False  # by CLIP's image encoder, in place of a prompt, or as unCLIP beside it
    by_class: bool = False  # whether the class of its pipeline tells it, not its U-Net


def _is_v(scheduler: Mapping[str, Any]) -> bool:
    return scheduler.get("prediction_type") == "v_prediction"


def _is_few_step(scheduler: Mapping[str, Any], *classes: str) -> bool:
    """Adversarially distilled models have Euler with trailing spacing; so do zero-SNR fine-tunes, with many steps."""
    return (
        scheduler.get("_class_name") in classes
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr", False)
    )


_LCM_PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_SD_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipelineLegacy",  # with a network without mask input
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
)
_SDXL_PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
)
_EDIT_PIPELINES = ("StableDiffusionInstructPix2PixPipeline",)
_SDXL_EDIT_PIPELINES = ("StableDiffusionXLInstructPix2PixPipeline",)
UPSCALE_PIPELINE, PIXEL_PIPELINE = "StableDiffusionUpscalePipeline", "PixelUpscalePipeline"
LATENT_UPSCALE_PIPELINE = "StableDiffusionLatentUpscalePipeline"
DEPTH_PIPELINE = "StableDiffusionDepth2ImgPipeline"
WEIGHTLESS = ("PixelResidual",)  # networks without files of weights
LDM_TEXT_PIPELINE = "LDMTextToImagePipeline"
_EULER, _EULER_A = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
_VARIATION_PIPELINES = ("StableDiffusionImageVariationPipeline",)
UNCLIP_PIPELINE, TEXT_UNCLIP_PIPELINE = "StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline"
LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE = "LDMPipeline", "LDMSuperResolutionPipeline"
DDIM_PIPELINE = "DDIMPipeline"
IF_SUPER_RESOLUTION = "IFSuperResolutionPipeline"
IF_PIPELINES = ("IFPipeline", IF_SUPER_RESOLUTION)
KANDINSKY_PIPELINE, KANDINSKY_PRIOR_PIPELINE = "KandinskyV22Pipeline", "KandinskyV22PriorPipeline"
PIXEL_SPACE_PIPELINES = ("DDPMPipeline", DDIM_PIPELINE, "ConsistencyModelPipeline")
UNCONDITIONAL_PIPELINES = (LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE, *PIXEL_SPACE_PIPELINES)
"""Those of diffusers' UNet2DModel, which reads no text."""

# The first match counts; the last entry matches everything.
FAMILIES: tuple[Family, ...] = (
    Family("ldm-text", 50, 6.0, lambda *_: True, pipelines=(LDM_TEXT_PIPELINE,), by_class=True),
    Family("if", 100, 7.0, lambda *_: True, pipelines=IF_PIPELINES[:1], by_class=True),
    Family("if-super-resolution", 50, 4.0, lambda *_: True, pipelines=IF_PIPELINES[1:], noise_level=250, by_class=True),
    Family("ldm", 50, 1.0, lambda *_: True, pipelines=(LDM_PIPELINE,), by_class=True),
    Family("ldm-super-resolution", 100, 1.0, lambda *_: True, pipelines=(SUPER_RESOLUTION_PIPELINE,), by_class=True),
    Family("ddpm", 1000, 1.0, lambda *_: True, pipelines=("DDPMPipeline",), by_class=True),
    Family("ddim", 50, 1.0, lambda *_: True, pipelines=(DDIM_PIPELINE,), by_class=True),
    Family("consistency", 1, 1.0, lambda *_: True, pipelines=("ConsistencyModelPipeline",), by_class=True),
    Family("kandinsky", 100, 4.0, lambda *_: True, pipelines=(KANDINSKY_PIPELINE,), by_class=True),
    Family("sd2-unclip-prior", 20, 10.0, lambda *_: True, pipelines=(TEXT_UNCLIP_PIPELINE,), by_class=True),
    Family("sd2-unclip", 20, 10.0, lambda unet, _: unet.needs_vector, pipelines=(UNCLIP_PIPELINE,), reads_picture=True),
    Family("sd1-variation", 50, 7.5, lambda *_: True, pipelines=_VARIATION_PIPELINES, reads_picture=True),
    Family("sdxl-edit", 30, 5.0, lambda unet, _: unet.edits and unet.needs_added, pipelines=_SDXL_EDIT_PIPELINES),
    Family("sd1-edit", 30, 7.5, lambda unet, _: unet.edits, pipelines=_EDIT_PIPELINES),
    Family("x2-upscaler", 75, 9.0, lambda *_: True, pipelines=(LATENT_UPSCALE_PIPELINE,), by_class=True),
    Family("x4-upscaler", 75, 9.0, lambda unet, _: unet.needs_class, pipelines=(UPSCALE_PIPELINE,), noise_level=20),
    Family("sd2-depth", 30, 7.5, lambda unet, _: unet.reads_depth, pipelines=(DEPTH_PIPELINE,)),
    Family("sdxl-lcm", 4, 8.0, lambda unet, _: unet.needs_guidance and unet.needs_added),
    Family("lcm", 4, 8.5, lambda unet, _: unet.needs_guidance, pipelines=_LCM_PIPELINES),
    # What enlarges the default model's pictures: in more than two steps, noise of its own stays.
    Family("pixel-upscaler", 2, 1.0, lambda unet, _: not unet.cross_widths, pipelines=(PIXEL_PIPELINE,)),
    # An LCM or TCD adapter merged into an ordinary network.
    Family("lcm-merged", 4, 1.0, lambda _, scheduler: scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler")),
    Family("sdxl-refiner", 30, 5.0, lambda unet, _: unet.needs_added and unet.added_ids == 5, strength=0.3),
    Family("sdxl-turbo", 1, 0.0, lambda unet, scheduler: unet.needs_added and _is_few_step(scheduler, _EULER_A)),
    Family("sdxl-lightning", 4, 0.0, lambda unet, scheduler: unet.needs_added and _is_few_step(scheduler, _EULER)),
    Family("sdxl", 30, 5.0, lambda unet, _: unet.needs_added, pipelines=_SDXL_PIPELINES),
    Family("sd-turbo", 1, 0.0, lambda _, scheduler: _is_few_step(scheduler, _EULER, _EULER_A)),
    # The model that ships with fastldm.
    Family(
        "small",
        4,
        2.0,
        lambda unet, scheduler: (
            _is_v(scheduler) and bool(scheduler.get("rescale_betas_zero_snr")) and unet.cross_attention_dim < 768
        ),
    ),
    Family("sd2-v", 30, 7.5, lambda unet, scheduler: unet.linear_projection and _is_v(scheduler)),
    Family("sd2", 30, 7.5, lambda unet, _: unet.linear_projection),
    Family("sd1-inpaint", 30, 7.5, lambda unet, _: unet.inpaints, pipelines=("StableDiffusionInpaintPipeline",)),
    Family("sd1", 30, 7.5, lambda unet, _: True, pipelines=_SD_PIPELINES),
)


_FOLDER_NAMES = {
    LDM_TEXT_PIPELINE: {"vae": "vqvae", "text_encoder": "bert"},
    **{name: {"vae": "vqvae"} for name in (LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE)},
    KANDINSKY_PIPELINE: {"vae": "movq"},
}
"""What components are called by pipelines that have other names for them."""


def folder_name(pipeline: object, component: str) -> str:
    """What a pipeline of diffusers calls a component, and its folder."""
    return _FOLDER_NAMES.get(str(pipeline), {}).get(component, component)


def component_name(pipeline: object, folder: str) -> str:
    """The component that a pipeline of diffusers calls so."""
    names = _FOLDER_NAMES.get(str(pipeline), {})
    return next((component for component, own in names.items() if own == folder), folder)


def recognise(
    unet: UNetConfig, scheduler: Mapping[str, Any], pipeline: object = None, *, reads_picture: bool = False
) -> Family:
    """The family of a checkpoint from its U-Net and the raw scheduler_config.json. pipeline: its class in diffusers.
    reads_picture: whether it has an image encoder."""
    families = [family for family in FAMILIES if family.by_class and pipeline in family.pipelines]
    families += [family for family in FAMILIES if family.reads_picture == reads_picture and not family.by_class]
    return next(family for family in families if family.matches(unet, scheduler))


_NETWORKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_VARIATION_PIPELINES, ("unet", "vae", IMAGE_ENCODER)),
    UNCLIP_PIPELINE: ("unet", "vae", "text_encoder", IMAGE_ENCODER, IMAGE_NORMALIZER),
    TEXT_UNCLIP_PIPELINE: ("unet", "vae", "text_encoder", IMAGE_NORMALIZER, PRIOR, PRIOR_TEXT_ENCODER),
    **dict.fromkeys((PIXEL_PIPELINE, LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE, KANDINSKY_PIPELINE), ("unet", "vae")),
    **dict.fromkeys(PIXEL_SPACE_PIPELINES, ("unet",)),
    **dict.fromkeys(IF_PIPELINES, ("unet", "text_encoder")),
    KANDINSKY_PRIOR_PIPELINE: (PRIOR, "text_encoder", IMAGE_ENCODER),
}
"""The networks of a pipeline of diffusers that are not those of Stable Diffusion."""


def network_classes(pipeline: object) -> dict[str, tuple[str, ...]]:
    """The classes of the networks that a pipeline of diffusers runs, by component."""
    classes = NETWORK_CLASSES | {IMAGE_ENCODER: IMAGE_ENCODER_CLASSES, IMAGE_NORMALIZER: IMAGE_NORMALIZER_CLASSES}
    classes |= PRIOR_CLASSES
    if pipeline in UNCONDITIONAL_PIPELINES:
        classes |= {"unet": ("UNet2DModel",)}
    if pipeline in IF_PIPELINES:
        classes |= {"text_encoder": (T5_ENCODER,)}
    return {name: classes[name] for name in _NETWORKS.get(str(pipeline), tuple(NETWORK_CLASSES))}


def pipeline_classes() -> frozenset[str]:
    """diffusers' classes that fastldm's pipelines replace: they differ only in their arguments."""
    return frozenset(name for family in FAMILIES for name in family.pipelines)
