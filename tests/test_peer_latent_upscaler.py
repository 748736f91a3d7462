"""The latent x2 upscaler beside diffusers' StableDiffusionLatentUpscalePipeline, on the same seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from both_ways import both_ways
from other_networks import BETAS, latent_upscaler, network
from pairs import close, generator
from PIL import Image

from fastldm import Pipeline, Request
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import spec as loading
from fastldm.planning import memory


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Pipeline]:
    theirs = latent_upscaler()
    return theirs, Pipeline.from_diffusers(theirs)


def picture(width: int = 0, height: int = 0, seed: int = 1) -> Image.Image:
    """width, height: beyond a size that the network takes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIDE + width, SIDE + height), Image.Resampling.BICUBIC)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


SIDE = 64
LATENTS = torch.randn(2, 4, 8, 12, generator=generator(3))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0},  # which reads no prompt
    {"image": LATENTS[:1], "negative_prompt": "blurry"},
    {"image": LATENTS, "prompt": ["a cat", "two dogs"], "generator": "list"},
    {"image": picture(3, 1), "num_inference_steps": 1},
    {"image": np.asarray(picture(), dtype=np.float32) / 255},
    {"image": torch.rand(1, 3, SIDE + 32, SIDE, generator=generator(2)) * 2 - 1},
    {"prompt": ["a cat", "two dogs"], "image": [picture(), picture(seed=2)]},
    {"prompt": ["a cat", "two dogs"], "image": [picture(), picture(seed=2)], "generator": "list"},
    {"latents": torch.randn(1, 4, 16, 16, generator=generator(4))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_latent_upscaler_matches_diffusers(pair: Any, options: dict[str, Any]) -> None:
    theirs, ours = pair
    options = {"prompt": "a cat", "image": picture(), "num_inference_steps": 3, "output_type": "np", **options}
    many = options.pop("generator", None) == "list"

    def draws() -> Any:
        return [generator(1), generator(2)] if many else generator()

    close(ours(**options, generator=draws()).images, theirs(**options, generator=draws()).images)
    options["output_type"] = "latent"
    made, expected = ours(**options, generator=draws()).images, theirs(**options, generator=draws()).images
    assert error(made, expected) < 1e-5


def test_text_enters_by_attention_and_time(pair: Any) -> None:
    """A tensor for each, as the judge reads them, negatives among them; and each has an effect."""
    theirs, ours = pair
    width = theirs.text_encoder.config.hidden_size
    embeds = {"prompt_embeds": (1, 77, width), "pooled_prompt_embeds": (1, width)}
    embeds |= {f"negative_{name}": shape for name, shape in embeds.items()}
    tensors = {name: torch.randn(shape, generator=generator(k)) for k, (name, shape) in enumerate(embeds.items())}
    options = {"image": LATENTS[:1], "num_inference_steps": 2, "output_type": "latent"}
    expected = theirs(**tensors, **options, generator=generator()).images
    assert error(ours(**tensors, **options, generator=generator()).images, expected) < 1e-5
    for name, tensor in tensors.items():
        changed = ours(**{**tensors, name: tensor.flip(-1)}, **options, generator=generator()).images
        assert error(changed, expected) > 1e-4, name


@pytest.mark.parametrize(
    "config", [{"use_karras_sigmas": True}, {"timestep_spacing": "leading"}, {"prediction_type": "original_sample"}]
)
def test_schedulers_options_match_diffusers(config: dict[str, Any]) -> None:
    theirs = latent_upscaler(
        scheduler=diffusers.EulerDiscreteScheduler(**{**BETAS, "prediction_type": "sample", **config})
    )
    options = {"prompt": "a cat", "image": LATENTS[:1], "num_inference_steps": 3, "output_type": "latent"}
    made = Pipeline.from_diffusers(theirs)(**options, generator=generator()).images
    assert error(made, theirs(**options, generator=generator()).images) < 1e-5


def test_sigmas_are_the_networks_times() -> None:
    theirs = latent_upscaler()
    table = Pipeline.from_diffusers(theirs).stages.table(
        Request("a cat", sampler="euler", sigmas=[9.0, 2.0, 0.0], num_inference_steps=2)
    )
    assert np.allclose(table.timesteps, np.log([9.0, 2.0]) / 4)


def test_two_calls_enlarge_a_text_to_image(pair: Any, tmp_path: Path) -> None:
    """A folder's is the adopted one, and latents of another pipeline are as in diffusers."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, dtype="float32")
    assert loaded.family.name == "x2-upscaler"
    base = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    low = base("a cat", num_inference_steps=2, width=64, height=96, seed=1, output_type="latent").images
    options = {"image": low, "num_inference_steps": 2, "guidance_scale": 0, "output_type": "np"}
    made = loaded("a cat", **options, generator=generator()).images
    assert made.shape == (1, 192, 128, 3)
    assert np.array_equal(made, ours("two dogs", **options, generator=generator()).images)
    close(made, theirs("a cat", **options, generator=generator()).images)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_enlarged_image_is_the_one_made_alone(pair: Any, batch_invariant: bool) -> None:
    stages = pair[1].stages
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    both = Request(("a cat", "two dogs"), image=[picture(), picture(seed=2)], seed=[7, 9], **options)
    run = stages.prepare(stages.complete(both), batch_invariant=batch_invariant)
    batch = stages.new_batch(run, 2)
    batch.admit(run)
    while not run.done:
        batch.step([run])
    alone = pair[1]("two dogs", image=picture(seed=2), seed=9, **options).images
    difference = error(batch.latents(run)[1:], alone)
    assert difference == 0 if batch_invariant else difference < 1e-5


def test_slots_make_the_same_latents(pair: Any) -> None:
    stages = pair[1].stages
    request = stages.complete(Request("a cat", image=LATENTS[:1], seed=3, num_inference_steps=2))
    assert error(*both_ways(stages, request, rows=2, tokens=77)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "this model enlarges an image: give it image"),
        ({"noise_level": 10}, "enlarges a picture without noise"),
        ({"strength": 0.5}, "enlarges image from noise alone"),
        ({"width": 256}, "2 times the picture, 128x128"),
        ({"image": torch.zeros(1, 4, 10, 8)}, "image is latents of 8x10: expected multiples of 4 for this model"),
        ({"image": torch.zeros(1, 4, 4, 8)}, "at least 8"),
        ({"image": LATENTS}, "image holds 2 pictures for a batch of 1"),
        ({"sampler": "dpm++ 2m"}, "only EulerDiscreteScheduler has continuous timesteps"),
        ({"prompt_2": "a dog"}, "only SDXL reads it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_do_is_named(pair: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair[1](**{"prompt": "a cat", "image": picture(), **options})


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"scheduler": diffusers.EulerDiscreteScheduler(**BETAS)}, "'prediction_type' 'epsilon': a StableDiff"),
        ({"scheduler": diffusers.DDIMScheduler(**BETAS, prediction_type="sample")}, "is 'DDIMScheduler' with"),
        ({"unet": tiny.unet("sd1")}, "reads pooled text by 'time_cond_proj_dim'"),
        ({"unet": network("x2-upscaler", in_channels=7)}, "has 7 input channels: a StableDiffusionLatentUp.* has 8"),
        ({"unet": network("x2-upscaler", cross_attention_dim=32)}, "20 channels with the time .* 128 .* and 32 of"),
        (
            {"unet": network("x2-upscaler", cross_attention_dim=32, time_cond_proj_dim=160, out_channels=4)},
            "the U-Net makes 4 channels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_components_that_do_not_fit_are_named(component: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Pipeline.from_diffusers(latent_upscaler(**component))


def test_it_is_planned_and_warmed(pair: Any, tmp_path: Path) -> None:
    spec = loading.describe(Path(pair[0].save_pretrained(tmp_path / "x2") or tmp_path / "x2"))
    assert (spec.enlarges, spec.default_size) == (2, (128, 128))
    for arch in (0, 90):
        memory.plan(memory.Workload.of_spec(spec, width=128, height=128, batch=2, dtype=torch.float16, arch=arch))
    pair[1].warmup([(128, 128)])
