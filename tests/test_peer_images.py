"""Images as diffusers' pipelines make them, on the same seeded random weights: text, image to image, inpainting."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pairs import Pairs, close, generator
from PIL import Image


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs()


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask_array = np.zeros((64, 64), np.uint8)
    mask_array[16:48, 8:40] = 255
    return Image.fromarray(mask_array)


PROMPTS = {"prompt": ["a cat", "two dogs, with a hat"], "negative_prompt": ["blurry", ""]}


GUIDANCE = {"sd-turbo": 0.0, "sdxl-turbo": 0.0, "sdxl-lightning": 0.0, "lcm": 6.0, "sdxl-lcm": 6.0}


@pytest.mark.parametrize(
    "family", [family for family in tiny.FAMILIES if family not in ("sd1-inpaint", "sdxl-refiner")]
)
def test_text_to_image_matches_diffusers(pipes: Any, family: str) -> None:
    theirs, ours = pipes(family)
    size = 16 * ours.vae.config.factor
    options = {
        "num_inference_steps": 2,
        "guidance_scale": GUIDANCE.get(family, 5.0),
        "output_type": "np",
        "height": size,
        "width": size + 2 * ours.vae.config.factor,
    }
    prompts = dict(PROMPTS)
    if family == "lcm":
        del prompts["negative_prompt"]  # diffusers' pipeline takes none
    close(
        ours(**prompts, **options, generator=generator()).images,
        theirs(**prompts, **options, generator=generator()).images,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"generator": "list"},
        {"eta": 1.0, "sampler": "DDIMScheduler"},  # draws noise at every step, after that of the start
        {"sampler": "EulerAncestralDiscreteScheduler"},
        {"sampler": "UniPCMultistepScheduler"},
    ],
    ids=str,
)
def test_options_match_diffusers(pipes: Any, options: dict[str, Any]) -> None:
    theirs, ours = pipes("sd1")
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", **options}
    many = options.pop("generator", None) == "list"
    theirs_options = dict(options)
    sampler = theirs_options.pop("sampler", None)
    if sampler:
        # a new pipeline, since it is the constructor that switches clip_sample off
        scheduler = getattr(diffusers, sampler).from_config(theirs.scheduler.config)
        components = {**theirs.components, "scheduler": scheduler}
        theirs = diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)

    def draws() -> Any:
        return [generator(1), generator(2)] if many else generator()

    close(
        ours(**PROMPTS, **options, generator=draws()).images,
        theirs(**PROMPTS, **theirs_options, generator=draws()).images,
    )


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def with_ddim(pipe: Any) -> dict[str, Any]:
    """A pipeline's parts, with DDIM: PNDM in diffusers repeats a step that a picture leaves out, see below."""
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return {**pipe.components, "scheduler": scheduler}


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_matches_diffusers(pipes: Any, image: Image.Image, strength: float) -> None:
    theirs, ours = pipes("sd1")
    peer = diffusers.StableDiffusionImg2ImgPipeline(**with_ddim(theirs), requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 4,
        "strength": strength,
        "guidance_scale": 4.0,
        "image": image,
        "output_type": "np",
    }
    close(
        ours("a cat", sampler="ddim", **options, generator=generator()).images,
        peer("a cat", **options, generator=generator()).images,
    )


class RepeatsItsFirstStep(diffusers.PNDMScheduler):
    """diffusers' PLMS takes a step a second time, with the output at its end, on its second call. Its list of timesteps
    repeats the first step of all, which a picture leaves out: the second call then is for the step after, on a latent
    that has taken it already, and each further call is on a latent one step noisier than it is told. Here the list
    repeats the first step that is run."""

    skipped = 2

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        once = torch.cat([self.timesteps[:1], self.timesteps[2:]])
        self.timesteps = torch.cat([once[: self.skipped + 2], once[self.skipped + 1 :]])


def test_plms_after_an_image_repeats_its_first_step(pipes: Any, image: Image.Image) -> None:
    theirs, ours = pipes("sd1")
    options = {"num_inference_steps": 6, "strength": 0.7, "guidance_scale": 4.0, "image": image, "output_type": "np"}
    mine = ours("a cat", sampler="plms", **options, generator=generator()).images
    differences = []
    for scheduler in (RepeatsItsFirstStep, diffusers.PNDMScheduler):
        parts = {**theirs.components, "scheduler": scheduler.from_config(theirs.scheduler.config)}
        peer = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        peer.set_progress_bar_config(disable=True)
        differences.append(np.abs(mine - peer("a cat", **options, generator=generator()).images).max())
    assert differences[0] < 1e-4 < 1e-2 < differences[1]


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (8, 0.3), (3, 1.0)])
def test_consistency_image_to_image_matches_diffusers(
    pipes: Any, image: Image.Image, steps: int, strength: float
) -> None:
    """All steps run, inside the strength."""
    theirs, ours = pipes("lcm")
    peer = diffusers.LatentConsistencyModelImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": steps,
        "strength": strength,
        "guidance_scale": 6.0,
        "image": image,
        "output_type": "np",
    }
    close(
        ours("a cat", **options, generator=generator()).images, peer("a cat", **options, generator=generator()).images
    )


@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_matches_diffusers(
    pipes: Any, image: Image.Image, mask: Image.Image, family: str, strength: float
) -> None:
    theirs, ours = pipes(family)
    peer = diffusers.StableDiffusionInpaintPipeline(**with_ddim(theirs), requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 4,
        "strength": strength,
        "guidance_scale": 4.0,
        "image": image,
        "mask_image": mask,
        "height": 64,
        "width": 64,
        "output_type": "np",
    }
    close(
        ours("a cat", sampler="ddim", **options, generator=generator()).images,
        peer("a cat", **options, generator=generator()).images,
    )


@pytest.mark.parametrize("as_list", [False, True])
def test_latents_as_image_match_diffusers(pipes: Any, as_list: bool) -> None:
    theirs, ours = pipes("sd1")
    peer = diffusers.StableDiffusionImg2ImgPipeline(**with_ddim(theirs), requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 12, generator=generator(5))
    options = {
        "prompt": ["a cat", "a dog"],
        "num_inference_steps": 4,
        "strength": 0.6,
        "image": list(latents) if as_list else latents,
        "output_type": "np",
    }
    images = ours(sampler="ddim", **options, generator=generator()).images
    assert images.shape == (2, 64, 96, 3)
    close(images, peer(**options, generator=generator()).images)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainted_latents_match_diffusers(pipes: Any, mask: Image.Image, strength: float) -> None:
    theirs, ours = pipes("sdxl")
    peer = diffusers.StableDiffusionXLInpaintPipeline(**theirs.components)
    peer.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 4,
        "strength": strength,
        "guidance_scale": 4.0,
        "image": torch.randn(1, 4, 8, 8, generator=generator(5)),
        "mask_image": mask,
        "output_type": "np",
    }
    theirs_images = peer("a cat", **options, height=64, width=64, generator=generator()).images
    close(ours("a cat", **options, generator=generator()).images, theirs_images)
