"""Pictures with reuse between steps, beside diffusers' pipelines that reuse (support/reusing.py)."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import controls
import diffusers
import ip_adapters
import lora
import numpy as np
import pytest
import tiny
import torch
from controls import picture
from PIL import Image
from reusing import reusing

from fastldm import Pipeline

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

ALLOWED = 2e-5  # 2.1e-6 was the most seen; reuse makes 2e-3 and more
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "euler a": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "dpm2": lambda: diffusers.KDPM2DiscreteScheduler(**BETAS),
    "dpm++ 2m": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
    "lcm": diffusers.LCMScheduler,
}
BASE: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "ugly",
    "num_inference_steps": 5,
    "guidance_scale": 5.0,
    "output_type": "np",
}
SD, SDXL = "StableDiffusion", "StableDiffusionXL"


def mask() -> Image.Image:
    array = np.zeros((64, 64), np.uint8)
    array[16:48, 8:40] = 255
    return Image.fromarray(array)


@functools.cache
def pair(cls: str, family: str, scheduler: str, *extra: str) -> tuple[Any, Pipeline]:
    """A pipeline of diffusers, and ours of the same weights. extra: names of a ControlNet or T2I-Adapters."""
    components = {**tiny.pipeline(family).components, "scheduler": SCHEDULERS[scheduler]()}
    if "ControlNet" in cls:
        components["controlnet"] = controls.controlnet(*extra)
    if "Adapter" in cls:
        components["adapter"] = controls.t2i_adapter(*extra)
    own = getattr(diffusers, cls)
    accepted = inspect.signature(own.__init__).parameters
    safety = {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
    theirs = own(**{name: value for name, value in components.items() if name in accepted}, **safety)
    theirs.set_progress_bar_config(disable=True)
    return theirs, Pipeline.from_diffusers(theirs)


def compare(theirs: Any, ours: Pipeline, every: int = 2, **arguments: Any) -> None:
    arguments = {**BASE, **arguments}
    wants = inspect.signature(type(theirs).__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in wants}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    with reusing(theirs.unet, every):
        expected = theirs(**arguments, generator=generator()).images
    actual = ours(**arguments, generator=generator(), reuse=every).images
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < ALLOWED
    plain = ours(**arguments, generator=generator()).images
    assert np.abs(plain - expected).max() > 50 * ALLOWED, "reuse is what made it"


IMAGE = {"image": picture(3), "strength": 0.7, "num_inference_steps": 6}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "SD 1": ((f"{SD}Pipeline", "sd1", "ddim"), {}),
    "every third": ((f"{SD}Pipeline", "sd1", "ddim"), {"every": 3, "num_inference_steps": 7}),
    "two prompts": (
        (f"{SD}Pipeline", "sd1", "ddim"),
        {"prompt": ["a cat", "a dog"], "negative_prompt": None, "num_images_per_prompt": 2},
    ),
    "without guidance": ((f"{SD}Pipeline", "sd1", "ddim"), {"guidance_scale": 1.0}),
    "odd sizes": ((f"{SD}Pipeline", "sd1", "ddim"), {"width": 72, "height": 56}),
    "heun": ((f"{SD}Pipeline", "sd1", "heun"), {"every": 3}),
    "dpm2": ((f"{SD}Pipeline", "sd1", "dpm2"), {}),
    "dpm++ 2m": ((f"{SD}Pipeline", "sd1", "dpm++ 2m"), {}),
    "SD 2, noise": ((f"{SD}Pipeline", "sd2", "euler a"), {}),
    "no middle": ((f"{SD}Pipeline", "bk-sdm", "ddim"), {}),
    "tiny-sd": ((f"{SD}Pipeline", "tiny-sd", "ddim"), {}),
    "LCM": (("LatentConsistencyModelPipeline", "lcm", "lcm"), {"guidance_scale": 8.0}),
    "SDXL": ((f"{SDXL}Pipeline", "sdxl", "euler a"), {}),
    "SSD-1B": ((f"{SDXL}Pipeline", "ssd-1b", "ddim"), {}),
    "image to image": ((f"{SD}Img2ImgPipeline", "sd1", "ddim"), IMAGE),
    "inpainting": ((f"{SD}InpaintPipeline", "sd1", "ddim"), {**IMAGE, "mask_image": mask()}),
    "inpainting, 9 channels": ((f"{SD}InpaintPipeline", "sd1-inpaint", "ddim"), {**IMAGE, "mask_image": mask()}),
    "ControlNet": ((f"{SD}ControlNetPipeline", "sd1", "ddim", "sd1"), {"image": picture()}),
    "ControlNet in part": (
        (f"{SD}ControlNetPipeline", "sd1", "ddim", "sd1"),
        {"image": picture(), "control_guidance_start": 0.2, "control_guidance_end": 0.6},
    ),
    "ControlNet, guess": ((f"{SD}ControlNetPipeline", "sd1", "ddim", "sd1"), {"image": picture(), "guess_mode": True}),
    "SDXL, ControlNet": ((f"{SDXL}ControlNetPipeline", "sdxl", "euler a", "sdxl"), {"image": picture()}),
    "T2I-Adapter": ((f"{SD}AdapterPipeline", "sd1", "ddim", "full"), {"image": picture()}),
    "SDXL, T2I-Adapter": (
        (f"{SDXL}AdapterPipeline", "sdxl", "euler a", "xl"),
        {"image": picture(), "adapter_conditioning_factor": 0.5},
    ),
}
SHORT = ("SD 1", "SDXL", "image to image", "ControlNet in part")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_pictures_equal_diffusers_that_reuses(name: str) -> None:
    which, arguments = CASES[name]
    compare(*pair(*which), **arguments)


@pytest.mark.full
def test_adapters_and_reuse_go_together(tmp_path: Path) -> None:
    tiny.peer("peft")
    file = lora.write(tmp_path / "a.safetensors", "sd1", unet=lora.ALL)
    theirs = tiny.pipeline("sd1", scheduler=SCHEDULERS["ddim"]())
    ours = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=SCHEDULERS["ddim"]()))
    for pipe in (theirs, ours):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")
    theirs.set_progress_bar_config(disable=True)
    compare(theirs, ours)


@pytest.mark.full
def test_picture_prompts_and_reuse_go_together(tmp_path: Path) -> None:
    theirs = tiny.pipeline("sd1", scheduler=SCHEDULERS["ddim"](), image_encoder=ip_adapters.image_encoder())
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=SCHEDULERS["ddim"]()))
    folder = ip_adapters.folder(tmp_path, theirs.unet, "base")
    for pipe in (theirs, ours):
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name="base.safetensors")
    compare(theirs, ours, ip_adapter_image=picture())
