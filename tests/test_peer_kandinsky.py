"""Kandinsky 2.2, whose decoder reads pictures' vectors in place of prompts, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import ip_adapters
import kandinsky
import numpy as np
import pytest
import tiny
import torch
from judged import changed_copy, hub_copy, judged
from PIL import Image

from fastldm import CheckpointError, InputError, KandinskyPrior, Pipeline, Session
from fastldm.model import describe
from fastldm.planning import memory

WIDTH = 40  # of a vector
peer, pipe, folder = judged(kandinsky.decoder)


def vectors(count: int = 1, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, WIDTH, generator=g) for name in ("image_embeds", "negative_image_embeds")}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BASE: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
LATENTS = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(3))
CALLS: dict[str, dict[str, Any]] = {
    "several": {**vectors(2), "num_images_per_prompt": 2, "width": 48},
    "plain": vectors(),
    "unguided": {**vectors(), "guidance_scale": 1.0},
    "list": {name: list(x.split(1)) for name, x in vectors(2).items()},
    "latents": {**vectors(), "latents": LATENTS, "width": 48, "guidance_scale": 7.0},
    "latent": {**vectors(), "output_type": "latent"},
}
SCHEDULERS: dict[str, Any] = {
    "ddpm": lambda: diffusers.DDPMScheduler(**kandinsky.SCHEDULE),
    "ddim": lambda: diffusers.DDIMScheduler(
        **kandinsky.SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ),
}


def difference(ours: Any, theirs: Any, options: dict[str, Any], generators: Any = seeded) -> float:
    made = [np.asarray(each(generator=generators(), **options).images) for each in (ours, theirs)]
    assert made[0].shape == made[1].shape
    return float(np.abs(made[0] - made[1]).max())


@pytest.mark.parametrize(
    "case", [case if case == "several" else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_kandinsky_equals_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    """With one generator, so that draws have the same order."""
    assert difference(pipe, peer, {**BASE, **CALLS[case]}) < 1e-4


@pytest.mark.full
def test_a_generator_each_equals_diffusers(peer: Any, pipe: Pipeline) -> None:
    options = {**BASE, **vectors(2)}
    assert difference(pipe, peer, options, lambda: [seeded(1), seeded(2)]) < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_schedulers_without_its_variance_equal_diffusers(name: str, guidance: float) -> None:
    theirs = kandinsky.decoder(SCHEDULERS[name]())
    ours = Pipeline.from_diffusers(theirs)
    assert difference(ours, theirs, {**BASE, **vectors(), "guidance_scale": guidance}) < 3e-4


def test_requests_of_other_vectors_share_steps(pipe: Pipeline) -> None:
    options = {**BASE, "num_inference_steps": 2}
    queries: list[dict[str, Any]] = [
        {**options, **vectors(2, 5), "seed": [3, 4]},
        {**options, "image_embeds": vectors(1, 6)["image_embeds"], "guidance_scale": 1.0, "seed": 9},
    ]
    alone = [np.asarray(pipe(**query).images) for query in queries]
    with Session(pipe, max_batch=4) as session:
        for future, expected in zip([session.submit(**query) for query in queries], alone, strict=True):
            assert np.abs(np.asarray(future.result().images) - expected).max() < 1e-4
    second = {name: x[1:] for name, x in vectors(2, 5).items()}
    assert np.abs(np.asarray(pipe(**options, **second, seed=4).images) - alone[0][1:]).max() < 1e-4
    assert np.abs(alone[0][0] - alone[0][1]).max() > 1e-2


def test_a_folder_has_all_that_is_read(folder: Path, tmp_path: Path, pipe: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(hub_copy(folder, tmp_path), device="cpu", dtype="float32")
    assert (loaded.family.name, loaded.stages.spec.default_size) == ("kandinsky", (64, 64))
    assert loaded.stages.weight_bytes == 4 * loaded.stages.spec.parameters
    options = {**BASE, **vectors(), "num_inference_steps": 2, "seed": 1}
    ours, adopted = (np.asarray(each(**options).images) for each in (loaded, pipe))
    assert np.abs(ours - adopted).max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a cat"}, "prompt was given, and this model reads image_embeds, .* prior="),
        ({}, "image_embeds is None: this model reads what its prior makes"),
        ({**vectors(), "strength": 0.5}, "strength was given, and this model reads image_embeds"),
        ({**vectors(), "negative_prompt": "bad"}, "negative_prompt was given"),
        ({**vectors(), "candidates": 2}, "candidates was given"),
        ({"image_embeds": vectors()["image_embeds"]}, "negative_image_embeds is None, and guidance_scale is 4"),
        ({**vectors(), "image_embeds": torch.zeros(1, 41)}, "image_embeds has shape"),
        ({**vectors(), "image_embeds": torch.full((1, WIDTH), torch.nan)}, "image_embeds"),
        ({**vectors(3), "negative_image_embeds": torch.zeros(2, WIDTH)}, "has 2 vectors for 3 images"),
        ({**vectors(), "height": 72}, "height is 72: expected a multiple of 16 pixels for this model"),
    ],
)
def test_what_is_not_read_is_refused(fields: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**fields)


def test_other_models_refuse_negative_vectors() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    with pytest.raises(InputError, match="negative_image_embeds was given, and this model"):
        pipe("a cat", negative_image_embeds=torch.zeros(1, WIDTH))


def test_plans_and_trials_know_vectors(pipe: Pipeline) -> None:
    spec, size = pipe.stages.spec, {"width": 64, "height": 64, "batch": 1}
    of_spec = memory.plan(memory.Workload.of_spec(spec, **size, dtype=torch.float32, arch=0))
    of_stages = memory.plan(memory.Workload.of_stages(pipe.stages, **size, guided=True))
    assert sum(line.bytes for line in of_spec.weights) == sum(line.bytes for line in of_stages.weights)
    assert sum(line.bytes for line in of_spec.weights) >= 4 * spec.parameters
    pipe.warmup(sizes=[(64, 64)])


def test_forms_of_bundles_that_are_not_there_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    for options, message in (
        ({"whole_picture": True}, "whole_picture: this model's U-Net makes a variance|has no graph of a whole picture"),
        ({"adapter_rank": 4}, "adapter_rank is 4, and the U-Net has .*: bundles that take adapters"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.export(tmp_path / "bundle", **options)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"addition_embed_type": "image_hint"}, "'addition_embed_type' 'image_hint'"),
        ("movq/config.json", {"norm_type": "layer"}, "'norm_type' is 'layer'"),
        ("movq/config.json", {"latent_channels": 5, "vq_embed_dim": 5}, "has 4 input channels"),
        ("model_index.json", {"movq": [None, None]}, "has no movq"),
        ("model_index.json", {"_class_name": "KandinskyV22ControlnetPipeline"}, "another of Kandinsky's"),
    ],
)
def test_misfits_are_refused(file: str, values: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe(changed_copy(folder, tmp_path, file, values))


# ------------------------------------------------------------------------------------------------------- the prior


@pytest.fixture(scope="module")
def their_prior() -> Any:
    return kandinsky.prior()


@pytest.fixture(scope="module")
def prior(their_prior: Any) -> KandinskyPrior:
    return KandinskyPrior.from_diffusers(their_prior)


PRIOR_CALLS: dict[str, dict[str, Any]] = {
    "negative": {"prompt": ["a cat", "a dog of two words"], "negative_prompt": ["bad", "a mat"]},
    "plain": {"prompt": "a cat"},
    "several": {"prompt": ["a cat", "a small dog"], "num_images_per_prompt": 3},
    "several negatives": {"prompt": "a cat", "negative_prompt": "bad", "num_images_per_prompt": 2},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0, "num_inference_steps": 25},
    "latents": {"prompt": "a cat", "latents": torch.ones(1, ip_adapters.PROJECTED), "guidance_scale": 2.0},
}


def prior_error(ours: Any, theirs: Any, options: dict[str, Any], generators: Any = seeded) -> float:
    scheduler = theirs.scheduler  # whose last step is a ratio of float32's last bits
    bar = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod, scheduler.alphas = bar, bar / torch.cat((torch.ones(1), bar[:-1]))
    scheduler.betas = 1 - scheduler.alphas
    made, expected = (each(**{"num_inference_steps": 4, **options}, generator=generators()) for each in (ours, theirs))
    assert made.image_embeds.shape == expected.image_embeds.shape
    assert made.negative_image_embeds.shape == expected.negative_image_embeds.shape
    own = torch.cat((made.image_embeds, made.negative_image_embeds))
    judge = torch.cat((expected.image_embeds, expected.negative_image_embeds))
    return float((own - judge).abs().max() / judge.abs().max())


@pytest.mark.parametrize(
    "case", [case if case == "negative" else pytest.param(case, marks=pytest.mark.full) for case in PRIOR_CALLS]
)
def test_prior_equals_diffusers(case: str, their_prior: Any, prior: KandinskyPrior) -> None:
    assert prior_error(prior, their_prior, PRIOR_CALLS[case]) < 2e-5


@pytest.mark.full
def test_prior_with_a_generator_each_equals_diffusers(their_prior: Any, prior: KandinskyPrior) -> None:
    for count, options in ((2, {"prompt": ["a cat", "a dog"]}), (4, PRIOR_CALLS["negative"])):
        made = prior_error(prior, their_prior, options, lambda count=count: [seeded(k) for k in range(count)])
        assert made < 2e-5


def test_a_seeds_vector_is_the_one_made_alone(prior: KandinskyPrior) -> None:
    both = prior(["a cat", "a dog"], "bad", seed=3, num_inference_steps=3)
    alone = prior("a dog", "bad", seed=4, num_inference_steps=3)
    for together, one in zip(both, alone, strict=True):
        assert (together[1:] - one).abs().max() < 1e-5
    other = prior("a cat", "bad", seed=4, num_inference_steps=3)
    assert (alone.image_embeds - other.image_embeds).abs().max() > 1e-3


def test_prior_of_a_folder_feeds_a_decoder(their_prior: Any, prior: KandinskyPrior, tmp_path: Path) -> None:
    their_prior.save_pretrained(tmp_path)
    loaded = KandinskyPrior.from_pretrained(tmp_path, device="cpu", dtype="float32")
    made, adopted = (each("a cat", seed=2, num_inference_steps=3) for each in (loaded, prior))
    assert (made.image_embeds - adopted.image_embeds).abs().max() < 1e-5
    decoder = Pipeline.from_diffusers(kandinsky.decoder(encoder_hid_dim=ip_adapters.PROJECTED))
    images = decoder(**made._asdict(), num_inference_steps=2, height=64, width=64, seed=2).images
    assert images[0].size == (64, 64)
    with pytest.raises(CheckpointError, match=r"makes vectors and no picture: load it with fastldm\.KandinskyPrior"):
        describe(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "prior": [None, None]}))
    with pytest.raises(CheckpointError, match="has no prior"):
        KandinskyPrior.from_pretrained(tmp_path)


def test_prior_refuses_bad_arguments(prior: KandinskyPrior, peer: Any, folder: Path) -> None:
    with pytest.raises(InputError, match="generator has 1 generators for 2 vectors"):
        prior("a cat", "bad", generator=[seeded()])
    with pytest.raises(InputError, match="latents has shape"):
        prior("a cat", latents=torch.ones(1, 3))
    with pytest.raises(InputError, match="num_inference_steps"):
        prior("a cat", num_inference_steps=0)
    with pytest.raises(CheckpointError, match="is a KandinskyV22Pipeline, expected a KandinskyV22PriorPipeline"):
        KandinskyPrior.from_diffusers(peer)
    with pytest.raises(CheckpointError, match="is a KandinskyV22Pipeline, expected a KandinskyV22PriorPipeline"):
        KandinskyPrior.from_pretrained(folder)


def test_interpolation_equals_diffusers(their_prior: Any, prior: KandinskyPrior) -> None:
    """Of texts, a picture and the image encoder's own input, with and without negatives."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for case in ({}, {"negative_prompt": "bad"}, {"negative_prior_prompt": "bad", "num_images_per_prompt": 2}):
        options = {"num_inference_steps": 4, **case}
        given = (["a cat", picture, pixels], [0.3, 0.5, -0.2])
        made, expected = (each.interpolate(*given, generator=seeded(), **options) for each in (prior, their_prior))
        for name in ("image_embeds", "negative_image_embeds"):
            own, judge = getattr(made, name), getattr(expected, name)
            assert own.shape == judge.shape
            assert float((own - judge).abs().max() / judge.abs().max()) < 1e-4
    with pytest.raises(InputError, match="weights has 1 numbers for 2 texts and pictures"):
        prior.interpolate(["a cat", "a dog"], [1.0])
    with pytest.raises(InputError, match=r"images_and_prompts\[0\] is a tensor of shape"):
        prior.interpolate([torch.zeros(1, 3, 8, 8)], [1.0])
