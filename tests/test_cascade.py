"""Cascades beside diffusers' pipelines called one after the other, and what goes across their stages."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from pairs import generator

import fastldm
import fastldm.request
from fastldm import InputError, Pipeline, Request, Session
from fastldm.image import result_parameters
from fastldm.metadata import parse_parameters
from fastldm.runtime import enlarge

OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Cascade:
    """diffusers' base and refiner on tiny weights and one autoencoder, and ours that share them."""

    def __init__(self, base: str = "sdxl") -> None:
        self.base = quiet(tiny.pipeline(base))
        parts = {**tiny.pipeline("sdxl-refiner").components, "vae": self.base.vae}
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
        self.parts = {name: parts[name] for name in names}
        self.refiner = self.refiner_of(diffusers.StableDiffusionXLImg2ImgPipeline)
        self.ours, self.our_refiner = Pipeline.from_diffusers(self.base), Pipeline.from_diffusers(self.refiner)
        self.ours.attach_refiner(self.our_refiner)

    def refiner_of(self, cls: Any) -> Any:
        return quiet(cls(**self.parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False))

    def schedule(self, name: str) -> None:
        """Another scheduler for diffusers' both."""
        for pipe in (self.base, self.refiner):
            clamps = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}  # as of latents here
            pipe.scheduler = getattr(diffusers, name).from_config(tiny.scheduler("sdxl").config, **clamps)


@pytest.fixture(scope="module")
def xl() -> Cascade:
    return Cascade()


def expect_handover(xl: Cascade, sampler: str, switch: float, steps: int = 5, **more: Any) -> None:
    xl.schedule(sampler)
    draws, common = (
        generator(),
        {"num_inference_steps": steps, "guidance_scale": 4.0, "negative_prompt": "dull", **more},
    )
    first = {**common, "height": 64, "width": 64, "denoising_end": switch, "output_type": "latent"}
    latents = xl.base("a cat", **first, generator=draws).images
    common |= {"output_type": "np"}
    expected = xl.refiner("a cat", image=latents, denoising_start=switch, generator=draws, **common).images
    common |= {"height": 64, "width": 64, "sampler": sampler, "refiner_switch_at": switch}
    result = xl.ours("a cat", **common, generator=generator())
    assert np.abs(result.images - expected).max() < 1e-4, (sampler, switch)
    assert result.request.refiner_switch_at == switch


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_handover_is_two_calls_of_diffusers(xl: Cascade, sampler: str) -> None:
    expect_handover(xl, sampler, 0.6)


@pytest.mark.full
@pytest.mark.parametrize("switch", [0.3, 0.8])
@pytest.mark.parametrize(
    "sampler",
    # But LMS, whose second part diffusers weighs by the coefficients of steps that it has not taken.
    ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete", "KDPM2Discrete", "DDPM"],
)
def test_handover_of_all_samplers(xl: Cascade, sampler: str, switch: float) -> None:
    expect_handover(xl, f"{sampler}Scheduler", switch, steps=8, num_images_per_prompt=2, guidance_rescale=0.5)


def test_inpainting_hands_over_like_diffusers(xl: Cascade) -> None:
    """Both stages repaint under the mask."""
    xl.schedule("EulerDiscreteScheduler")
    noise = np.random.default_rng(1).random((1, 64, 64, 3), np.float32)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 8:40] = 1
    cls, draws = diffusers.StableDiffusionXLInpaintPipeline, generator()
    parts = {name: value for name, value in xl.base.components.items() if name in xl.parts}
    base, refiner = quiet(cls(**parts)), xl.refiner_of(cls)
    base.scheduler = refiner.scheduler = xl.base.scheduler
    common = {"mask_image": mask, "num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64}
    latents = base(
        "a cat", image=noise, strength=0.9, denoising_end=0.6, output_type="latent", generator=draws, **common
    ).images
    expected = refiner(
        "a cat", image=latents, denoising_start=0.6, output_type="np", generator=draws, strength=0.9, **common
    ).images
    options = {**common, "image": noise, "strength": 0.9, "refiner_switch_at": 0.6, "output_type": "np"}
    result = xl.ours("a cat", **options, sampler="euler", generator=generator())
    assert np.abs(result.images - expected).max() < 1e-4


def test_perturbed_guidance_goes_across_stages(xl: Cascade) -> None:
    xl.schedule("EulerDiscreteScheduler")
    parts = {name: value for name, value in xl.base.components.items() if name in xl.parts}
    base = quiet(diffusers.StableDiffusionXLPAGPipeline(**parts))
    refiner = xl.refiner_of(diffusers.StableDiffusionXLPAGImg2ImgPipeline)
    base.scheduler = refiner.scheduler = xl.base.scheduler
    common: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "pag_scale": 2.5}
    size, draws = {"height": 64, "width": 64}, generator()
    latents = base("a cat", **common, **size, denoising_end=0.6, output_type="latent", generator=draws).images
    expected = refiner("a cat", **common, image=latents, denoising_start=0.6, output_type="np", generator=draws).images
    options = {**common, **size, "sampler": "euler", "refiner_switch_at": 0.6, "output_type": "np"}
    assert np.abs(xl.ours("a cat", **options, generator=generator()).images - expected).max() < 1e-4


def test_projected_guidance_goes_across_stages(xl: Cascade) -> None:
    common = {**OPTIONS, "sampler": "euler", "output_type": "latent", "seed": 1}
    options = {**common, "apg_momentum": -0.5, "apg_eta": 0.2, "use_original_formulation": True}
    latents = xl.ours("a cat", **options, denoising_end=0.6).images
    expected = xl.our_refiner("a cat", **options, image=latents, denoising_start=0.6).images
    got = xl.ours("a cat", **options, refiner_switch_at=0.6).images
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, xl.ours("a cat", **common, refiner_switch_at=0.6).images, atol=1e-3)


def hires(upscaler: str, **more: Any) -> dict[str, Any]:
    return {"hires_scale": 1.5, "hires_upscaler": upscaler, "hires_strength": 0.6, "hires_steps": 3, **more}


@pytest.fixture(scope="module")
def sd() -> tuple[Any, Any, Pipeline]:
    parts = tiny.pipeline("sd1").components
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(parts["scheduler"].config, clip_sample=False)
    text = quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
    image = quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))
    return text, image, Pipeline.from_diffusers(text)


LATENT = {
    "Latent": {"mode": "bilinear", "antialias": False},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest-exact)": {"mode": "nearest-exact"},
}


@pytest.mark.parametrize("upscaler", [*LATENT, "Lanczos"])
def test_high_resolution_is_two_calls_of_diffusers(sd: tuple[Any, Any, Pipeline], upscaler: str) -> None:
    from PIL import Image

    text, image, ours = sd
    draws = generator()
    kind = "latent" if upscaler in LATENT else "np"
    made = text("a cat", **OPTIONS, output_type=kind, generator=draws).images
    if kind == "latent":
        large = torch.nn.functional.interpolate(made, (12, 12), **LATENT[upscaler])
    else:
        planes = [Image.fromarray(plane, "F").resize((96, 96), Image.Resampling.LANCZOS) for plane in made[0].T]
        large = torch.from_numpy(np.stack(planes).transpose(0, 2, 1))[None].clamp(0, 1)
    again = {"num_inference_steps": 5, "strength": 0.6, "guidance_scale": 4.0, "output_type": "np"}  # of which 3 run
    expected = image("a cat", image=large, generator=draws, **again).images
    result = ours("a cat", **OPTIONS, **hires(upscaler), output_type="np", generator=generator())
    assert result.images.shape == (1, 96, 96, 3)
    assert len(result.timings.steps) == 5 + 3
    assert np.abs(result.images - expected).max() < 1e-4


def test_both_passes_and_the_refiner_are_one_request(xl: Cascade) -> None:
    options = {**OPTIONS, **hires("Latent"), "refiner_switch_at": 0.7, "output_type": "latent", "seed": 3}
    generation = xl.ours.session.submit("a cat", **options)
    steps = [step.step for step in generation.progress()]
    result = generation.result()
    assert steps == list(range(len(steps)))
    assert len(steps) == len(result.timings.steps)
    assert tuple(result.images.shape) == (1, 4, 12, 12)
    assert torch.equal(result.images, xl.ours("a cat", **options).images)


def test_progress_counts_all_stages(xl: Cascade) -> None:
    generation = xl.ours.session.submit("a cat", **OPTIONS, refiner_switch_at=0.6, seed=1, preview=True)
    progress = list(generation.progress())
    assert {step.steps for step in progress} == {len(progress)}
    assert all(step.preview for step in progress)
    times = [step.timestep for step in progress]
    assert times == sorted(times, reverse=True)
    assert generation.steps_left == 0


def test_an_image_of_a_batch_is_the_one_alone(xl: Cascade) -> None:
    """Its own generator goes across: fresh noise of the second stage too."""
    options = {**OPTIONS, "sampler": "euler a", "refiner_switch_at": 0.6, "output_type": "latent"}
    both = xl.ours(["a cat", "a dog"], seed=[4, 9], **options).images
    alone = xl.ours("a dog", seed=9, **options).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_cascades_share_the_batches_of_each_stage(xl: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"base": [], "refiner": []}
    for name, pipe in (("base", xl.ours), ("refiner", xl.our_refiner)):
        step, own = pipe.unet.step, sizes[name]
        monkeypatch.setattr(
            pipe.unet, "step", lambda x, *args, step=step, own=own, **more: own.append(len(x)) or step(x, *args, **more)
        )
    gate = threading.Event()
    with Session(xl.ours) as session:
        held = threading.Thread(target=lambda: session.call(gate.wait))
        held.start()
        options = {**OPTIONS, "refiner_switch_at": 0.6}
        waiting = [session.submit("a cat", seed=seed, **options) for seed in range(2)]
        direct = xl.our_refiner.session.submit("a cat", seed=5, **OPTIONS, image=np.zeros((64, 64, 3), np.uint8))
        gate.set()
        held.join()
        for generation in (*waiting, direct):
            generation.result(timeout=120)
    assert max(sizes["base"]) == 4  # two images, guided
    assert max(sizes["refiner"]) >= 4


def test_interrupting_decodes_what_there_is(sd: tuple[Any, Any, Pipeline]) -> None:
    ours = sd[2]

    def stop(pipe: Any, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    result = ours("a cat", **OPTIONS, **hires("Latent"), output_type="np", seed=1, callback_on_step_end=stop)
    assert result.images.shape == (1, 64, 64, 3)
    assert len(result.timings.steps) == 2


@pytest.mark.parametrize("at", [1, 6])
def test_cancelling_works_in_every_stage(sd: tuple[Any, Any, Pipeline], at: int) -> None:
    def stop(pipe: Any, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise fastldm.Cancelled("enough")
        return {}

    with pytest.raises(fastldm.Cancelled):
        sd[2]("a cat", **OPTIONS, **hires("Latent"), seed=1, callback_on_step_end=stop)
    assert sd[2]("a cat", **OPTIONS, seed=1).images
    assert sd[2].session.stats().running == 0


def test_a_deadline_is_that_of_the_whole(sd: tuple[Any, Any, Pipeline]) -> None:
    generation = sd[2].session.submit("a cat", **OPTIONS, **hires("Latent"), deadline=1e-6)
    with pytest.raises(fastldm.DeadlineExceeded):
        generation.result()


def test_parameters_make_the_image_again(xl: Cascade) -> None:
    result = xl.ours("a cat", **OPTIONS, **hires("Lanczos"), refiner_switch_at=0.7, seed=8)
    request, rest = parse_parameters(result_parameters(result, "tiny")[0])
    assert rest["Refiner"] == xl.our_refiner.name
    assert (request.hires_scale, request.hires_upscaler, request.refiner_switch_at) == (1.5, "Lanczos", 0.7)
    again = xl.ours(request)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))


def test_a_refiner_is_left_out_on_request(xl: Cascade) -> None:
    alone = Pipeline.from_diffusers(xl.base)("a cat", **OPTIONS, seed=2, output_type="latent").images
    assert torch.equal(xl.ours("a cat", **OPTIONS, seed=2, refiner_switch_at=1, output_type="latent").images, alone)
    assert not torch.equal(xl.ours("a cat", **OPTIONS, seed=2, output_type="latent").images, alone)


def test_a_refiner_has_to_fit(xl: Cascade, sd: tuple[Any, Any, Pipeline]) -> None:
    with pytest.raises(InputError, match=r"latents are not this model's: scaling_factor is 0.13025, expected 0.18215"):
        sd[2].attach_refiner(xl.our_refiner)
    with pytest.raises(InputError, match="the refiner is the model itself"):
        sd[2].attach_refiner(sd[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refiner_switch_at": 0.8}, "no refiner is attached: attach_refiner attaches one"),
        ({"hires_scale": 2, "image": np.zeros((64, 64, 3), np.uint8)}, "image was given with a high-resolution pass"),
        ({"hires_scale": 2, "denoising_end": 0.5}, "denoising_end was given with a high-resolution pass"),
        ({"hires_width": 32}, "the high-resolution pass is of 32x32 pixels, less than 64x64"),
        ({"hires_width": 128, "hires_height": 96}, "are 128x96: expected 64x64 in proportion"),
    ],
)
def test_what_no_stage_can_run_is_refused(sd: tuple[Any, Any, Pipeline], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sd[2].session.submit("a cat", **OPTIONS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires_scale": 2, "hires_width": 64}, "hires_scale was given with hires_height or hires_width"),
        ({"hires_steps": 4}, "hires_steps was given without hires_scale"),
        ({"hires_scale": 2, "hires_upscaler": "R-ESRGAN 4x+"}, "is a network that fastldm does not have"),
        ({"hires_scale": 2, "hires_upscaler": "magic"}, "'magic': expected one of Latent"),
        ({"refiner_switch_at": 0}, "refiner_switch_at is 0: expected a fraction above 0"),
    ],
)
def test_fields_of_cascades_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request("a cat", **options)


def test_upscalers_go_by_their_names() -> None:
    assert Request("", hires_scale=2, hires_upscaler="latent bicubic").hires_upscaler == "Latent (bicubic)"
    for name in fastldm.request.UPSCALERS:
        upscaler = enlarge.wanted(Request("", hires_scale=2, hires_upscaler=name))
        assert upscaler is not None
        assert upscaler.enlarge(torch.rand(1, 3, 5, 4), (10, 8)).shape == (1, 3, 10, 8)


@pytest.mark.full
def test_example_of_the_page_makes_an_apple(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    from command import run
    from conftest import ROOT
    from PIL import Image

    page = (ROOT / "docs" / "cascades.md").read_text("utf-8")
    line = next(span for span in page.split("`") if span.startswith("fastldm generate") and "--hires-scale" in span)
    monkeypatch.chdir(tmp_path)
    done = run(*shlex.split(line)[1:], "--device", "cpu")
    assert done.exit_code == 0, done.output
    with Image.open("apple.png") as picture:
        assert picture.size == (128, 128)
        red, green, _ = picture.convert("RGB").getpixel((64, 70))
        assert red > green + 80
        assert "Hires upscaler: Lanczos" in picture.info["parameters"]
