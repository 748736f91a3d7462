"""The families of models, as data. To add one without new networks, add an entry to FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
TEXT_PROJECTION = "text_proj"
SUPER_RESOLUTION = ("super_res_first", "super_res_last")
"""Networks that enlarge what the U-Net makes, and of which the second takes the last step."""
PRIOR, PRIOR_TEXT_ENCODER = "prior", "prior_text_encoder"
PRIOR_CLASSES = {PRIOR: ("PriorTransformer",), PRIOR_TEXT_ENCODER: ("CLIPTextModelWithProjection",)}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def encoder_names(texts: Sequence[TextConfig]) -> tuple[str, ...]:
    """The components that a model's text encoders are: SDXL's second, which projects, is its refiner's only one."""
    return TEXT_ENCODERS[1:] if [text.with_projection for text in texts] == [True] else TEXT_ENCODERS[: len(texts)]


class Defaults(NamedTuple):
    """What a request that starts from a picture has in place of its family's defaults; None is the family's."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    noise_level: int | None = None


_NONE, _REPAINTS_ALL = Defaults(), Defaults(strength=1.0)


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
    label: str = "Stable Diffusion 1, 2 and XL"  # what it is called where errors say what runs; several may share one
    unet_keys: Mapping[str, str] = field(default_factory=dict)  # of its U-Net's config, beyond Stable Diffusion's
    of_image: Defaults = _NONE  # of a start from a picture
    of_mask: Defaults = _REPAINTS_ALL  # and of repainting a part of one

    def defaults(self, *, image: bool, mask: bool) -> Family:
        """With the defaults of a start from a picture, or of repainting a part of one."""
        own = self.of_mask if mask else self.of_image if image else _NONE
        return replace(self, **{name: value for name, value in own._asdict().items() if value is not None})


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
IF_FIRST_PIPELINES = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
IF_SUPER_RESOLUTIONS = tuple(f"IF{kind}SuperResolutionPipeline" for kind in ("", "Img2Img", "Inpainting"))
IF_PIPELINES = (*IF_FIRST_PIPELINES, *IF_SUPER_RESOLUTIONS)
GLIDE_PIPELINE, GLIDE_UPSAMPLER = "GlidePipeline", "GlideUpsamplerPipeline"
GLIDE_PIPELINES = (GLIDE_PIPELINE, GLIDE_UPSAMPLER)
"""Of single files, which no class of diffusers runs."""
KARLO_PIPELINE, KARLO_VARIATION_PIPELINE = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
KARLO_PIPELINES = (KARLO_PIPELINE, KARLO_VARIATION_PIPELINE)
KANDINSKY_PIPELINES = tuple(f"KandinskyV22{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
KANDINSKY_PRIOR_PIPELINE = "KandinskyV22PriorPipeline"
KANDINSKY_COMBINED = tuple(f"KandinskyV22{kind}CombinedPipeline" for kind in ("", "Img2Img", "Inpaint"))
"""Of a decoder and a prior."""
PIXEL_SPACE_PIPELINES = ("DDPMPipeline", DDIM_PIPELINE, "ConsistencyModelPipeline")
UNCONDITIONAL_PIPELINES = (LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE, *PIXEL_SPACE_PIPELINES)
"""Those of diffusers' UNet2DModel, which reads no text."""

_UNCLIP_KEYS = {"class_embed_type": "projection"}
_KARLO_KEYS = {"class_embed_type": "identity"}
_IF_KEYS = {"addition_embed_type": "text", "encoder_hid_dim_type": "text_proj"}
_IF_NOISED_KEYS = {**_IF_KEYS, "class_embed_type": "timestep"}
_GLIDE_KEYS = {"class_embed_type": "identity"}
_KANDINSKY_KEYS = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}


def _of_class(name: str, steps: int, scale: float, *pipelines: str, label: str, **more: Any) -> Family:
    """A family that the class of its pipeline tells."""
    return Family(name, steps, scale, lambda *_: True, pipelines=pipelines, by_class=True, label=label, **more)


# The first match counts; the last entry matches everything.
FAMILIES: tuple[Family, ...] = (
    _of_class("ldm-text", 50, 6.0, LDM_TEXT_PIPELINE, label="latent diffusion's text to image"),
    _of_class(
        "if",
        100,
        7.0,
        *IF_FIRST_PIPELINES,
        label="DeepFloyd IF",
        unet_keys=_IF_KEYS,
        of_image=Defaults(80, 10.0, 0.7),
        of_mask=Defaults(50, 7.0, 1.0),
    ),
    _of_class(
        "if-super-resolution",
        50,
        4.0,
        *IF_SUPER_RESOLUTIONS,
        label="DeepFloyd IF",
        noise_level=250,
        unet_keys=_IF_NOISED_KEYS,
        of_mask=Defaults(100, 4.0, 0.8, 0),
    ),
    _of_class("ldm", 50, 1.0, LDM_PIPELINE, label="latent diffusion without a prompt"),
    _of_class("ldm-super-resolution", 100, 1.0, SUPER_RESOLUTION_PIPELINE, label="latent diffusion's super-resolution"),
    _of_class("ddpm", 1000, 1.0, "DDPMPipeline", label="DDPM"),
    _of_class("ddim", 50, 1.0, DDIM_PIPELINE, label="DDIM"),
    _of_class("consistency", 1, 1.0, "ConsistencyModelPipeline", label="consistency models"),
    _of_class("glide", 100, 3.0, GLIDE_PIPELINE, label="GLIDE", unet_keys=_GLIDE_KEYS),
    _of_class("glide-upsampler", 27, 1.0, GLIDE_UPSAMPLER, label="GLIDE", unet_keys=_GLIDE_KEYS),
    _of_class("karlo", 25, 8.0, KARLO_PIPELINE, label="Karlo", unet_keys=_KARLO_KEYS),
    _of_class(
        "karlo-variation",
        25,
        8.0,
        KARLO_VARIATION_PIPELINE,
        label="Karlo",
        reads_picture=True,
        unet_keys=_KARLO_KEYS,
    ),
    _of_class(
        "kandinsky",
        100,
        4.0,
        *KANDINSKY_PIPELINES,
        label="Kandinsky 2.2",
        unet_keys=_KANDINSKY_KEYS,
        of_image=Defaults(100, 4.0, 0.3),
        of_mask=Defaults(100, 4.0, 1.0),
    ),
    _of_class("sd2-unclip-prior", 20, 10.0, TEXT_UNCLIP_PIPELINE, label="stable unCLIP", unet_keys=_UNCLIP_KEYS),
    Family(
        name="sd2-unclip",
        num_inference_steps=20,
        guidance_scale=10.0,
        matches=lambda unet, _: unet.needs_vector,
        pipelines=(UNCLIP_PIPELINE,),
        reads_picture=True,
        label="stable unCLIP",
        unet_keys=_UNCLIP_KEYS,
    ),
    Family(
        name="sd1-variation",
        num_inference_steps=50,
        guidance_scale=7.5,
        matches=lambda *_: True,
        pipelines=_VARIATION_PIPELINES,
        reads_picture=True,
        label="image variations",
    ),
    Family(
        name="sdxl-edit",
        num_inference_steps=30,
        guidance_scale=5.0,
        matches=lambda unet, _: unet.edits and unet.needs_added,
        pipelines=_SDXL_EDIT_PIPELINES,
        label="InstructPix2Pix",
    ),
    Family("sd1-edit", 30, 7.5, lambda unet, _: unet.edits, pipelines=_EDIT_PIPELINES, label="InstructPix2Pix"),
    _of_class("x2-upscaler", 75, 9.0, LATENT_UPSCALE_PIPELINE, label="the latent x2 upscaler"),
    Family(
        name="x4-upscaler",
        num_inference_steps=75,
        guidance_scale=9.0,
        matches=lambda unet, _: unet.needs_class,
        pipelines=(UPSCALE_PIPELINE,),
        noise_level=20,
        label="the x4 upscaler",
    ),
    Family(
        name="sd2-depth",
        num_inference_steps=30,
        guidance_scale=7.5,
        matches=lambda unet, _: unet.reads_depth,
        pipelines=(DEPTH_PIPELINE,),
        label="depth to image",
    ),
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


SUPER_RESOLUTION_FAMILY = _of_class("karlo-super-resolution", 7, 1.0, label="Karlo")
"""That of SUPER_RESOLUTION, which have no pipeline of their own."""

_FOLDER_NAMES = {
    LDM_TEXT_PIPELINE: {"vae": "vqvae", "text_encoder": "bert"},
    **{name: {"vae": "vqvae"} for name in (LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE)},
    **{name: {"vae": "movq"} for name in KANDINSKY_PIPELINES},
    KANDINSKY_PRIOR_PIPELINE: {"feature_extractor": "image_processor"},
    **{name: {"unet": "decoder", "scheduler": "decoder_scheduler"} for name in KARLO_PIPELINES},
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
    **dict.fromkeys((PIXEL_PIPELINE, LDM_PIPELINE, SUPER_RESOLUTION_PIPELINE, *KANDINSKY_PIPELINES), ("unet", "vae")),
    **dict.fromkeys(PIXEL_SPACE_PIPELINES, ("unet",)),
    **dict.fromkeys((*IF_PIPELINES, *GLIDE_PIPELINES), ("unet", "text_encoder")),
    KANDINSKY_PRIOR_PIPELINE: (PRIOR, "text_encoder", IMAGE_ENCODER),
    KARLO_PIPELINE: ("unet", "text_encoder", TEXT_PROJECTION, PRIOR, *SUPER_RESOLUTION),
    KARLO_VARIATION_PIPELINE: ("unet", "text_encoder", TEXT_PROJECTION, IMAGE_ENCODER, *SUPER_RESOLUTION),
}
"""The networks of a pipeline of diffusers that are not those of Stable Diffusion."""


def network_classes(pipeline: object) -> dict[str, tuple[str, ...]]:
    """The classes of the networks that a pipeline of diffusers runs, by component."""
    classes = NETWORK_CLASSES | {IMAGE_ENCODER: IMAGE_ENCODER_CLASSES, IMAGE_NORMALIZER: IMAGE_NORMALIZER_CLASSES}
    classes |= PRIOR_CLASSES | {TEXT_PROJECTION: ("UnCLIPTextProjModel",)}
    classes |= dict.fromkeys(SUPER_RESOLUTION, ("UNet2DModel",))
    if pipeline in UNCONDITIONAL_PIPELINES:
        classes |= {"unet": ("UNet2DModel",)}
    if pipeline in IF_PIPELINES:
        classes |= {"text_encoder": (T5_ENCODER,)}
    if pipeline in KARLO_PIPELINES:
        classes |= {"text_encoder": PRIOR_CLASSES[PRIOR_TEXT_ENCODER]}
    return {name: classes[name] for name in _NETWORKS.get(str(pipeline), tuple(NETWORK_CLASSES))}


def pipeline_classes() -> frozenset[str]:
    """diffusers' classes that fastldm's pipelines replace: they differ only in their arguments."""
    return frozenset(name for family in FAMILIES for name in family.pipelines).difference(GLIDE_PIPELINES)


def what_runs() -> str:
    """All families, in a sentence without its full stop, for errors about another."""
    labels = dict.fromkeys(family.label for family in reversed(FAMILIES))  # Stable Diffusion first
    return f"fastldm runs {', '.join(labels)}"
