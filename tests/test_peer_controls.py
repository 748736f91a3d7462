"""Controlled pictures beside diffusers' ControlNet and T2I-Adapter pipelines, on tiny random models in float32."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import controls
import diffusers
import lora
import numpy as np
import pytest
import tiny
import torch
from controls import BASE, picture
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import CheckpointError

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

ALLOWED = 1e-3  # 2e-6 was the most seen
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@functools.cache
def mask() -> Image.Image:
    array = np.zeros((64, 64), np.uint8)
    array[16:48, 8:40] = 255
    return Image.fromarray(array)


@functools.cache
def base(family: str) -> Any:
    """SD 1 with DDIM: image to image by PNDM differs without a control too."""
    ddim = (
        {"scheduler": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)}
        if family.startswith("sd1")
        else {}
    )
    return tiny.pipeline(family, **ddim)


@functools.cache
def network(kind: str, name: str, seed: int) -> Any:
    return (controls.controlnet if kind == "controlnet" else controls.t2i_adapter)(name, seed)


@functools.cache
def ours(family: str, kind: str, names: tuple[str, ...]) -> Pipeline:
    pipe = Pipeline.from_diffusers(base(family))
    for k, name in enumerate(names):
        pipe.attach_control(network(kind, name, 10 + k), f"{name}-{k}")
    return pipe


def theirs(cls: str, family: str, kind: str, names: tuple[str, ...]) -> Any:
    nets = [network(kind, name, 10 + k) for k, name in enumerate(names)]
    components = dict(base(family).components)
    components["scheduler"] = type(components["scheduler"]).from_config(components["scheduler"].config)
    own = getattr(diffusers, cls)
    given: Any = nets[0] if len(nets) == 1 else nets
    if kind == "adapter" and len(nets) > 1:
        given = diffusers.MultiAdapter(nets)
    accepted = inspect.signature(own.__init__).parameters
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
    pipe = own(**{k: v for k, v in components.items() if k in accepted}, **{kind: given}, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(cls: str, family: str, kind: str, names: tuple[str, ...], **arguments: Any) -> None:
    """Both calls have the same arguments, but for the names of `image` and `control_image` in text to image."""
    arguments = BASE | arguments
    renamed = dict(arguments)
    if "control_image" not in inspect.signature(getattr(diffusers, cls).__call__).parameters:
        renamed["image"] = renamed.pop("control_image")
    generator = torch.Generator().manual_seed(0)
    expected = theirs(cls, family, kind, names)(**renamed, generator=generator).images
    pipe = ours(family, kind, names)
    actual = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < ALLOWED
    # ... and it is the control that made it
    plain = pipe(**arguments | {"control_image": {}}, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(plain - expected).max() > 3 * ALLOWED


SD, SDXL = "StableDiffusion", "StableDiffusionXL"
ONE, TWO = ("sd1",), ("sd1", "sd1-bgr")
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "SD 1": ("ControlNetPipeline", "sd1", ONE, {}),
    "SD 2": ("ControlNetPipeline", "sd2", ("sd2",), {}),
    "LCM": ("ControlNetPipeline", "lcm", ONE, {"guidance_scale": 8.0, "control_guidance_end": 0.6}),
    "bgr": ("ControlNetPipeline", "sd1", ("sd1-bgr",), {}),
    "small": ("ControlNetPipeline", "small", ("small",), {}),
    "without guidance": ("ControlNetPipeline", "sd1", ONE, {"guidance_scale": 1.0}),
    "scale": ("ControlNetPipeline", "sd1", ONE, {"controlnet_conditioning_scale": 0.4}),
    "guess": ("ControlNetPipeline", "sd1", ONE, {"guess_mode": True, "controlnet_conditioning_scale": 0.8}),
    "guess, unguided": ("ControlNetPipeline", "sd1", ONE, {"guess_mode": True, "guidance_scale": 1.0}),
    "pooled": ("ControlNetPipeline", "sd1", ("sd1-pooled",), {}),
    "start and end": (
        "ControlNetPipeline",
        "sd1",
        ONE,
        {"control_guidance_start": 0.2, "control_guidance_end": 0.8, "num_inference_steps": 5},
    ),
    "image to image": (
        "ControlNetImg2ImgPipeline",
        "sd1",
        ONE,
        {"image": picture(3), "strength": 0.7, "num_inference_steps": 6, "control_guidance_end": 0.6},
    ),
    "inpainting": (
        "ControlNetInpaintPipeline",
        "sd1",
        ONE,
        {"image": picture(3), "mask_image": mask(), "strength": 0.8, "num_inference_steps": 5},
    ),
    "inpainting, 9 channels": (
        "ControlNetInpaintPipeline",
        "sd1-inpaint",
        ONE,
        {"image": picture(3), "mask_image": mask(), "strength": 1.0},
    ),
    "two": (
        "ControlNetPipeline",
        "sd1",
        TWO,
        {
            "control_image": [picture(1), picture(2)],
            "controlnet_conditioning_scale": [0.7, 0.5],
            "control_guidance_start": [0.0, 0.3],
            "control_guidance_end": [0.6, 1.0],
        },
    ),
    "two, guess": (
        "ControlNetPipeline",
        "sd1",
        TWO,
        {"control_image": [picture(1), picture(2)], "guess_mode": True},
    ),
    "two, image to image": (
        "ControlNetImg2ImgPipeline",
        "sd1",
        TWO,
        {"control_image": [picture(1), picture(2)], "image": picture(3), "strength": 0.6},
    ),
    "pooled first of two": (
        "ControlNetPipeline",
        "sd1",
        ("sd1-pooled", "sd1"),
        {"control_image": [picture(), picture(2)]},
    ),
    "two prompts": (
        "ControlNetPipeline",
        "sd1",
        ONE,
        {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "control_image": [picture(1), picture(2)]},
    ),
    "two of two prompts": (
        "ControlNetPipeline",
        "sd1",
        TWO,
        {"prompt": ["a cat", "a dog"], "control_image": [[picture(1), picture(2)], [picture(4), picture(5)]]},
    ),
    "SDXL": (f"{SDXL}ControlNetPipeline", "sdxl", ("sdxl",), {"negative_prompt": "ugly"}),
    "SDXL mid": (f"{SDXL}ControlNetPipeline", "sdxl", ("sdxl-mid",), {}),
    "SDXL small": (f"{SDXL}ControlNetPipeline", "sdxl", ("sdxl-small",), {"controlnet_conditioning_scale": 0.5}),
    "SDXL guess": (f"{SDXL}ControlNetPipeline", "sdxl", ("sdxl",), {"guess_mode": True}),
    "SDXL two": (
        f"{SDXL}ControlNetPipeline",
        "sdxl",
        ("sdxl", "sdxl-small"),
        {"control_image": [picture(1), picture(2)]},
    ),
    "SDXL image to image": (
        f"{SDXL}ControlNetImg2ImgPipeline",
        "sdxl",
        ("sdxl",),
        {"image": picture(3), "strength": 0.7, "num_inference_steps": 6},
    ),
    "SDXL inpainting": (
        f"{SDXL}ControlNetInpaintPipeline",
        "sdxl",
        ("sdxl",),
        {"image": picture(3), "mask_image": mask(), "strength": 0.8},
    ),
}


# What differs from another in its numbers alone.
FULL = {"SD 2", "bgr", "scale", "without guidance", "two, guess", "two, image to image", "pooled first of two"}
FULL |= {"SDXL mid", "SDXL guess", "SDXL image to image"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in CASES]
)
def test_controlled_pictures_equal_diffusers(name: str) -> None:
    cls, family, names, arguments = CASES[name]
    cls = cls if cls.startswith(SD) else SD + cls
    compare(cls, family, "controlnet", names, **{"control_image": picture(), **arguments})


T2I: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "full": (SD, "sd1", ("full",), {}),
    "light": (SD, "sd1", ("light",), {"adapter_conditioning_scale": 0.6}),
    "grey": (SD, "sd1", ("full-grey",), {"control_image": picture().convert("L")}),
    "without guidance": (SD, "sd1", ("full",), {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
    "two": (
        SD,
        "sd1",
        ("full", "light"),
        {"control_image": [picture(1), picture(2)], "adapter_conditioning_scale": [0.7, 0.4]},
    ),
    "two prompts": (SD, "sd1", ("full",), {"prompt": ["a cat", "a dog"], "control_image": [picture(1), picture(2)]}),
    "SDXL": (SDXL, "sdxl", ("xl",), {"negative_prompt": "ugly"}),
    "SDXL factor": (SDXL, "sdxl", ("xl",), {"adapter_conditioning_factor": 0.5, "num_inference_steps": 5}),
}


@pytest.mark.parametrize("name", T2I)
def test_adapted_pictures_equal_diffusers(name: str) -> None:
    cls, family, names, arguments = T2I[name]
    compare(f"{cls}AdapterPipeline", family, "adapter", names, **{"control_image": picture(), **arguments})


SCHEDULERS = {
    "euler a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++ 2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_kind_of_sampler_is_controlled(sampler: str) -> None:
    """Rows of second order count as steps of start and end."""
    pipe = theirs(f"{SD}ControlNetPipeline", "sd1", "controlnet", ONE)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    arguments = BASE | {"control_guidance_start": 0.15, "control_guidance_end": 0.8, "num_inference_steps": 5}
    expected = pipe(**arguments, image=picture(), generator=torch.Generator().manual_seed(0)).images
    adopted = base("sd1").__class__(
        **{**base("sd1").components, "scheduler": pipe.scheduler}, requires_safety_checker=False
    )
    mine = Pipeline.from_diffusers(adopted)
    mine.attach_control(network("controlnet", "sd1", 10))
    actual = mine(**arguments, control_image=picture(), generator=torch.Generator().manual_seed(0)).images
    assert np.abs(actual - expected).max() < ALLOWED


def test_control_and_lora_go_together(tmp_path: Path) -> None:
    """A LoRA changes the U-Net and the text that both networks read, not the ControlNet."""
    tiny.peer("peft")
    file = lora.write(tmp_path / "a.safetensors", "sd1", unet=lora.ALL)
    parts = {**tiny.pipeline("sd1").components, "scheduler": base("sd1").components["scheduler"]}
    theirs = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=network("controlnet", "sd1", 10), requires_safety_checker=False
    )
    mine = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=parts["scheduler"]))
    mine.attach_control(network("controlnet", "sd1", 10))
    controlled = mine(**BASE, control_image=picture(), generator=torch.Generator().manual_seed(0)).images
    for pipe in (theirs, mine):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")
    expected = theirs(**BASE, image=picture(), generator=torch.Generator().manual_seed(0)).images
    actual = mine(**BASE, control_image=picture(), generator=torch.Generator().manual_seed(0)).images
    assert np.abs(actual - expected).max() < ALLOWED
    assert np.abs(controlled - expected).max() > 10 * ALLOWED


def test_prompt_of_a_callback_reaches_the_controlnet() -> None:
    def other(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(1) * 1.5
        return tensors

    wants = {"callback_on_step_end": other, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    compare(f"{SD}ControlNetPipeline", "sd1", "controlnet", ONE, control_image=picture(), **wants)


@pytest.mark.parametrize(
    ("cls", "family", "kind", "names"),
    [
        (f"{SD}ControlNetPipeline", "sd1", "controlnet", TWO),
        (f"{SD}ControlNetInpaintPipeline", "sd1-inpaint", "controlnet", ONE),
        (f"{SDXL}ControlNetImg2ImgPipeline", "sdxl", "controlnet", ("sdxl",)),
        (f"{SD}AdapterPipeline", "sd1", "adapter", ("full", "light")),
        (f"{SDXL}AdapterPipeline", "sdxl", "adapter", ("xl",)),
    ],
)
def test_adopted_pipeline_brings_its_controls(cls: str, family: str, kind: str, names: tuple[str, ...]) -> None:
    """And its own call works as it is, but for `control_image` where there are several."""
    pipe = theirs(cls, family, kind, names)
    adopted = Pipeline.from_diffusers(pipe)
    assert list(adopted.controls) == [kind, f"{kind}-2"][: len(names)]
    assert adopted.unet.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()
    wants = inspect.signature(type(pipe).__call__).parameters
    given: Any = picture() if len(names) == 1 else [picture(1), picture(2)]
    arguments = BASE | {"control_image" if "control_image" in wants else "image": given}
    arguments |= {"image": picture(3), "strength": 0.7} if "strength" in wants else {}
    arguments |= {"mask_image": mask()} if "mask_image" in wants else {}
    if kind == "adapter" and len(names) > 1:  # where diffusers takes no number
        arguments["adapter_conditioning_scale"] = [0.7, 0.4]
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    actual = adopted(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(actual - expected).max() < ALLOWED


def test_changed_controlled_pipeline_is_refused() -> None:
    pipe = theirs(f"{SD}ControlNetPipeline", "sd1", "controlnet", ONE)
    pipe.prepare_latents = lambda *args, **kwargs: None
    with pytest.raises(CheckpointError, match="prepare_latents"):
        Pipeline.from_diffusers(pipe)
