"""Stable unCLIP, whose U-Net reads the noised vector of a picture beside a prompt, against diffusers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import bundles
import clients
import numpy as np
import picture_readers
import pytest
import torch
from judged import changed_copy, hub_copy, judged
from original_layout import as_open_clip, quick_gelu, random_state, small
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.loading.single_file import open_single_file
from fastldm.model import describe
from fastldm.planning import memory
from fastldm.runtime.slots import Slots


def photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 56), Image.Resampling.BICUBIC)


peer, pipe, folder = judged(picture_readers.unclip)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"image": photo(1)},
    "a prompt": {"image": photo(1), "prompt": "a cat", "negative_prompt": "bad", "noise_level": 100},
    "unguided": {"image": photo(1), "prompt": "a cat", "guidance_scale": 1.0, "noise_level": 5},
    "several images": {"image": photo(1), "prompt": "a cat", "num_images_per_prompt": 3, "noise_level": 700},
    "several prompts": {"image": photo(1), "prompt": ["a cat", "a dog"], "noise_level": 300},
    "several pictures": {"image": [photo(1), photo(2)], "num_images_per_prompt": 2, "noise_level": 999},
    "each its own": {"image": [photo(1), photo(2)], "prompt": ["a cat", "a dog"], "noise_level": 50},
    "the encoder's input": {"image": randn(2, 3, 32, 32), "prompt": ["a cat", "a dog"]},
    "vectors": {"image_embeds": randn(2, 20), "prompt": ["a cat", "a dog"], "num_images_per_prompt": 2},
    "embeds": {
        "image": photo(2),
        "prompt_embeds": randn(1, 77, 32),
        "negative_prompt_embeds": randn(1, 77, 32, seed=1),
    },
    "eta and clip skip": {"image": photo(3), "prompt": "a cat", "eta": 1.0, "guidance_scale": 3.0},
    "the model's size": {"image": photo(2), "height": None, "width": None, "num_inference_steps": 2},
    "latents": {"image": photo(2), "latents": randn(1, 4, 8, 8, seed=2), "noise_level": 400},
}
FEW = ("several images", "each its own", "embeds")


def both(peer: Any, pipe: Pipeline, generators: Any, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    options = {**BASE, **options, "output_type": "np"}
    theirs, ours = (np.asarray(each(generator=generators(), **options).images) for each in (peer, pipe))
    assert ours.shape == theirs.shape
    return ours, theirs


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_unclip_equals_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    """With one generator, so that draws have the same order."""
    ours, theirs = both(peer, pipe, lambda: torch.Generator().manual_seed(7), CALLS[case])
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.parametrize("pictures", [[photo(1), photo(2)], photo(1)], ids=["each its own", "one"])
def test_a_list_of_generators_equals_diffusers(pictures: Any, peer: Any, pipe: Pipeline) -> None:
    options = {"image": pictures, "prompt": ["a cat", "a dog"], "noise_level": 500}
    ours, theirs = both(peer, pipe, lambda: [torch.Generator().manual_seed(k) for k in (3, 9)], options)
    assert np.abs(ours - theirs).max() < 1e-3


def test_picture_and_noise_level_show(pipe: Pipeline) -> None:
    def image(k: int, **options: Any) -> np.ndarray:
        return np.asarray(pipe("a cat", image=photo(k), seed=0, output_type="np", **BASE, **options).images)

    first = image(1)
    assert min(np.abs(first - image(2)).max(), np.abs(first - image(1, noise_level=600)).max()) > 1e-2


def test_a_seed_has_the_same_image_in_any_batch(pipe: Pipeline) -> None:
    options = {"image": photo(1), "noise_level": 500, "output_type": "np", **BASE}
    together = pipe(["a cat", "a dog"], seed=[4, 5], **options).images
    alone = [pipe(prompt, seed=seed, **options).images[0] for prompt, seed in (("a cat", 4), ("a dog", 5))]
    assert np.abs(together - np.stack(alone)).max() < 1e-3


def test_requests_with_different_pictures_share_steps(pipe: Pipeline) -> None:
    options = [
        {"prompt": f"{k} cats", "image": photo(k), "noise_level": 90 * k, "seed": k, "output_type": "np", **BASE}
        for k in range(3)
    ]
    options[2]["guidance_scale"] = 1.0
    alone = [pipe(**each).images for each in options]
    with Session(pipe, max_batch=4) as session:
        futures = [session.submit(**each) for each in options]
        for future, expected in zip(futures, alone, strict=True):
            assert np.abs(future.result().images - expected).max() < 1e-3
    stages = pipe.stages
    runs = [stages.prepare(stages.complete(Request(**each))) for each in options]
    batch = stages.new_batch(runs[0], 4)
    for run in runs:
        batch.admit(run)
    while not runs[0].done:
        batch.step(runs)
    for run, each in zip(runs, options, strict=True):
        expected = pipe(**{**each, "output_type": "latent"}).images
        assert (batch.latents(run) - expected).abs().max() < 1e-3


def test_batch_invariant_runs_read_each_picture_alone(pipe: Pipeline) -> None:
    stages = pipe.stages
    request = stages.complete(Request(prompt=("a", "b"), image=photo(0), seed=0, **BASE))
    run = stages.prepare(request, batch_invariant=True)
    assert [own.vectors.shape for own in run.images] == [(1, 40)] * 2  # type: ignore[union-attr]
    assert not isinstance(stages.new_batch(run, 4), Slots)


def test_a_folder_is_read(folder: Path, pipe: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert (loaded.family.name, loaded.stages.spec.max_noise_level) == ("sd2-unclip", 999)
    options = {"image": photo(1), "noise_level": 100, "seed": 0, "output_type": "np", **BASE}
    assert np.abs(loaded("a cat", **options).images - pipe("a cat", **options).images).max() < 1e-5
    loaded.warmup(sizes=[(64, 64)])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"prompt": "a cat"}, "makes variations of a picture: give image"),
    "both": ({"image": photo(1), "image_embeds": randn(1, 20)}, "give image, or image_embeds in its place"),
    "a mask": ({"image": photo(1), "mask_image": photo(1)}, "mask_image was given, and this model reads what `image`"),
    "strength": ({"image": photo(1), "strength": 0.5}, "strength was given"),
    "a high level": ({"image": photo(1), "noise_level": 1000}, "noise_level is 1000: expected at most 999"),
    "wide": ({"image_embeds": randn(1, 21)}, r"image_embeds .*expected \(any, 20\)"),
    "pictures": ({"image": [photo(1), photo(2)], "prompt": "a cat"}, "image holds 2 pictures for 1 prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(case: str, pipe: Pipeline) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        pipe(**{**BASE, **options})


def test_bundles_make_the_same_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundles.expect_images("sd2-unclip", True, "onnxruntime", tmp_path_factory)


def test_plans_count_the_image_encoder(folder: Path) -> None:
    spec = describe(folder)
    workload = memory.Workload.of_spec(spec, width=32, height=32, batch=1, dtype=torch.float32, arch=0)
    names = [line.name for line in memory.plan(workload).weights]
    assert [any(kind in name for name in names) for kind in ("image encoder", "text encoder")] == [True, True]


MISFITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vector": ("unet/config.json", {"projection_class_embeddings_input_dim": 44}, "reads 44 channels"),
    "no vector": ("unet/config.json", {"class_embed_type": None}, "reads the vector of a picture"),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "'num_class_embeds' is 10, expected one of them"),
    "timestep": ("unet/config.json", {"class_embed_type": "timestep"}, "'class_embed_type' 'timestep'"),
    "identity": ("unet/config.json", {"class_embed_type": "identity"}, "'class_embed_type' 'identity'"),
    "class": ("model_index.json", {"_class_name": "StableUnCLIPPipeline"}, "is a StableUnCLIPPipeline and has"),
    "no schedule": ("model_index.json", {"image_noising_scheduler": [None, None]}, "has no image_noising_scheduler"),
    "no normalizer": ("model_index.json", {"image_normalizer": [None, None]}, "has no image_normalizer"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    file, values, message = MISFITS[case]
    with pytest.raises(CheckpointError, match=message):
        describe(changed_copy(folder, tmp_path, file, values))


def test_a_hub_sends_all_that_is_read(folder: Path, tmp_path: Path) -> None:
    loaded = Pipeline.from_pretrained(hub_copy(folder, tmp_path), device="cpu", dtype="float32")
    assert loaded.stages.image_encoder is not None
    assert loaded.stages.image_encoder.preprocessing.crop == 32


def test_high_resolution_passes_read_the_picture_too(pipe: Pipeline) -> None:
    options = {"prompt": "a cat", "hires_scale": 1.5, "seed": 0, "output_type": "np", **BASE}
    first, second = (pipe(image=photo(k), **options).images for k in (1, 2))
    assert first.shape == (1, 96, 96, 3)
    assert np.abs(first - second).max() > 1e-2


def test_servers_read_the_picture(pipe: Pipeline) -> None:
    """By OpenAI's variations, and by AUTOMATIC1111's img2img, whose front ends send a strength whatever the model."""
    content = clients.file(photo(1))

    def expected(prompt: str, **options: Any) -> np.ndarray:
        size = {"num_inference_steps": 2, "height": 64, "width": 64}
        return np.asarray(pipe(prompt, image=photo(1), seed=3, **size, **options).images[0]).astype(int)

    with clients.client(pipe, models={"unclip": "default"}) as http:
        fields = {"noise_level": 400, "seed": 3, "num_inference_steps": 2, "size": "64x64"}
        answer = http.post("/v1/images/variations", data=fields, files={"image": content}).json()
        made = np.asarray(clients.picture(answer["data"][0]["b64_json"])).astype(int)
        assert np.abs(made - expected("", noise_level=400)).max() <= 1
        assert np.abs(made - expected("")).max() > 1
        encoded = base64.b64encode(content).decode()
        body = {"init_images": [encoded], "prompt": "a cat", "seed": 3, "steps": 2, "width": 64, "height": 64}
        answer = http.post("/sdapi/v1/img2img", json={**body, "cfg_scale": 10}).json()
        assert np.abs(np.asarray(clients.picture(answer["images"][0])).astype(int) - expected("a cat")).max() <= 1


@pytest.mark.parametrize("openai", [False, True])
def test_unclip_file_has_open_clips_image_encoder(openai: bool, tmp_path: Path) -> None:
    """OpenAI's CLIP comes with its text half, and its statistics, without which it is refused."""
    state = {
        key: x / max(1, x[0].numel()) ** 0.5 for key, x in random_state(small("sd2-unclip", 49408)).items() if x.ndim
    }
    if openai:
        state["embedder.model.transformer.resblocks.0.ln_1.weight"] = torch.ones(24)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"OpenAI's CLIP, and has no noise_augmentor\.data_mean"):
            open_single_file(tmp_path / "model.safetensors")
        state |= {f"noise_augmentor.data_{name}": torch.rand(1, 24) + 1 for name in ("mean", "std")}
    save_file(state, tmp_path / "model.safetensors")
    loaded = Pipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu", dtype="float32")
    assert (loaded.family.name, loaded.stages.schedule.prediction_type) == ("sd2-unclip", "v_prediction")
    assert loaded.stages.spec.checkpoint.schedulers["image_noising_scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    encoder = loaded.stages.image_encoder
    assert encoder is not None
    assert encoder.normalizer is not None
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    act = quick_gelu if openai else nn.functional.gelu
    expected = as_open_clip(state, pixels, 160 // (64 if openai else 80), act)
    torch.testing.assert_close(encoder.embeds(pixels), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    if openai:
        assert torch.equal(encoder.normalizer.std, state["noise_augmentor.data_std"])
    size = 8 * loaded.vae.config.factor
    image = loaded("a cat", image=pixels[:1], num_inference_steps=2, seed=0, output_type="np", height=size, width=size)
    assert np.isfinite(image.images).all()
