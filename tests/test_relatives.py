"""What is built like Stable Diffusion and is another model is refused by name, whichever way it comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from original_layout import SD_INDEX, ldm_unet, ldm_vae, openai_clip, random_state
from safetensors.torch import save_file

from fastldm import Pipeline
from fastldm.errors import CheckpointError
from fastldm.loading import spec as loading
from fastldm.loading.formats import component_classes
from fastldm.models.families import (
    IF_FIRST_PIPELINES,
    IF_SUPER_RESOLUTIONS,
    PIXEL_SPACE_PIPELINES,
    UNCONDITIONAL_PIPELINES,
    pipeline_classes,
)

XL_INDEX = {
    **SD_INDEX,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
OTHER_CLASSES = sorted(
    name
    for name in dir(diffusers)
    if ("Pipeline" in name or name.startswith("StableDiffusion")) and not name.endswith("Output")
    if name not in pipeline_classes()
)


def test_supported_classes_are_accepted() -> None:
    assert len(pipeline_classes()) > 12
    own: dict[str, Any] = {"StableDiffusionUpscalePipeline": {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}}
    own["StableDiffusionDepth2ImgPipeline"] = {"depth_estimator": ["transformers", "DPTForDepthEstimation"]}
    vision = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    own["StableDiffusionImageVariationPipeline"] = {**vision, "text_encoder": [None, None], "tokenizer": [None, None]}
    own["StableUnCLIPImg2ImgPipeline"] = {
        **vision,
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    }
    own["StableUnCLIPPipeline"] = {
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "prior": ["diffusers", "PriorTransformer"],
        "prior_text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "prior_tokenizer": ["transformers", "CLIPTokenizer"],
        "prior_scheduler": ["diffusers", "DDPMScheduler"],
    }
    none: Any = [None, None]
    codes: Any = {"vae": none, "vqvae": ["diffusers", "VQModel"]}
    own["LDMTextToImagePipeline"] = {**codes, "text_encoder": none, "bert": ["latent_diffusion", "LDMBertModel"]}
    none_of_text: Any = {"text_encoder": none, "tokenizer": none}
    plain: Any = {**none_of_text, "unet": ["diffusers", "UNet2DModel"]}
    own |= {name: {**plain, "vae": none} for name in PIXEL_SPACE_PIPELINES}
    for kind in ("", "Img2Img", "Inpaint"):
        own[f"KandinskyV22{kind}Pipeline"] = {**none_of_text, "vae": none, "movq": ["diffusers", "VQModel"]}
    own |= {name: {**plain, **codes} for name in ("LDMPipeline", "LDMSuperResolutionPipeline")}
    of_if: Any = {"vae": none, "text_encoder": ["transformers", "T5EncoderModel"]}
    own |= dict.fromkeys(IF_FIRST_PIPELINES, of_if)
    karlo: Any = {
        **{"unet": none, "vae": none, "scheduler": none, "decoder": ["diffusers", "UNet2DConditionModel"]},
        **{f"super_res_{which}": ["diffusers", "UNet2DModel"] for which in ("first", "last")},
        **{f"{name}_scheduler": ["diffusers", "UnCLIPScheduler"] for name in ("decoder", "super_res")},
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_proj": ["unclip", "UnCLIPTextProjModel"],
    }
    own["UnCLIPImageVariationPipeline"] = {**karlo, **vision}
    own["UnCLIPPipeline"] = {
        **karlo,
        "prior": ["diffusers", "PriorTransformer"],
        "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    }
    noising = {"image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
    own |= {name: {**of_if, **noising} for name in IF_SUPER_RESOLUTIONS}
    for name in pipeline_classes() - {"PixelUpscalePipeline"}:  # which is fastldm's own
        index = {**(XL_INDEX if "XL" in name else SD_INDEX), **own.get(name, {})}
        expected = "UNet2DModel" if name in UNCONDITIONAL_PIPELINES else "UNet2DConditionModel"
        assert component_classes({**index, "_class_name": name}, "here")["unet"] == expected
        assert hasattr(diffusers, name) or name.endswith("Legacy")  # diffusers dropped that one


def test_other_classes_are_refused_by_name() -> None:
    assert len(OTHER_CLASSES) > 250
    for name in OTHER_CLASSES:
        with pytest.raises(CheckpointError, match=f"^here is a {name}") as caught:
            component_classes({**SD_INDEX, "_class_name": name}, "here")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionXXLUpscalePipeline", "an upscaler"),
        ("VersatileDiffusionImageVariationPipeline", "image variation by Versatile Diffusion"),
        ("KandinskyV22ControlnetPipeline", "another of Kandinsky's than those of 2.2"),
        ("MarigoldDepthPipeline", "Marigold"),
        ("LEditsPPPipelineStableDiffusionXL", "a way of editing .* load them as a StableDiffusionPipeline"),
        ("HunyuanDiTPAGPipeline", "perturbed-attention guidance of a kind"),
        ("StableDiffusionControlNetPAGPipeline", "Stable Diffusion with a ControlNet"),
        ("StableDiffusionXLAdapterPipeline", "T2I-Adapter"),
        ("StableDiffusionGLIGENTextImagePipeline", "GLIGEN"),
        ("StableDiffusionLDM3DPipeline", "LDM3D"),
        ("AnimateDiffSDXLPipeline", "a model for video"),
        ("ORTStableDiffusionPipeline", "an export for another runtime"),
        ("MyPipeline", "a pipeline that fastldm does not know"),
        (["my_pipeline", "MyPipeline"], r"'_class_name' is \['my_pipeline', 'MyPipeline'\], expected a text"),
        (None, "has no _class_name"),
    ],
)
def test_invalid_class_names_are_refused(name: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        component_classes({**SD_INDEX, "_class_name": name}, "here")


CHANNELS = [(5, "depth to image, without"), (7, "an upscaler without noise levels"), (3, "a model of an unknown kind")]


@pytest.mark.parametrize(("channels", "label"), CHANNELS)
def test_relative_is_recognised_by_channels(tmp_path: Path, channels: int, label: str) -> None:
    theirs: Any = tiny.pipeline("sd1", unet=tiny.unet("sd1", in_channels=channels))
    theirs.save_pretrained(tmp_path / "folder")
    clip = openai_clip("cond_stage_model.transformer.", 64, 1, vocabulary=99)
    shapes = ldm_unet(64, (1,), (1,), 64, in_channels=channels, layers=1) | ldm_vae(32, (1,), layers=1) | clip
    save_file(random_state(shapes), tmp_path / "single.safetensors")
    message = f"has {channels} input channels: it is {label}"
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_diffusers(theirs)
    for path in (tmp_path / "folder", tmp_path / "single.safetensors"):
        with pytest.raises(CheckpointError, match=message) as caught:
            loading.describe(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "label"),
    [
        ("class_embed_type", "projection", "unCLIP"),
        ("class_embed_type", "timestep", "a model whose class is a time"),
        ("attention_type", "gated", "GLIGEN"),
        ("addition_embed_type", "image", "Kandinsky"),
        ("encoder_hid_dim_type", "ip_image_proj", "Stable Diffusion with an IP-Adapter"),
    ],
)
def test_relative_is_recognised_by_config_keys(tmp_path: Path, key: str, value: Any, label: str) -> None:
    folder = tiny.save_pipeline("sd1", tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=f"config.json has '{key}'.*it is {label}"):
        loading.describe(folder)


def test_adopted_relative_is_refused_by_class() -> None:
    components = tiny.pipeline("sd1").components
    panorama = diffusers.StableDiffusionPanoramaPipeline(**components, requires_safety_checker=False)
    with pytest.raises(CheckpointError, match="is a StableDiffusionPanoramaPipeline: MultiDiffusion"):
        Pipeline.from_diffusers(panorama)


def test_pipelines_that_edit_need_a_unet_that_does() -> None:
    """Diffusers notices when it is called. A U-Net that reads an image is refused in any other pipeline."""
    components = tiny.pipeline("sd1").components
    editing = diffusers.StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)
    message = "unet has 4 input channels: a StableDiffusionInstructPix2PixPipeline has 8"
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_diffusers(editing)
