"""Image variations, which read a picture in place of a prompt, against diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bundles
import ip_adapters
import numpy as np
import picture_readers
import pytest
import torch
from PIL import Image

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.image import read_parameters, save_result
from fastldm.model import describe
from fastldm.planning import memory
from fastldm.runtime.slots import Slots


def photo(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def peer() -> Any:
    return picture_readers.variations()


@pytest.fixture(scope="module")
def pipe(peer: Any) -> Pipeline:
    return Pipeline.from_diffusers(peer)


@pytest.fixture(scope="module")
def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variations")
    peer.save_pretrained(path)
    return path


BASE: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"image": photo(1)},
    "unguided": {"image": photo(1), "guidance_scale": 1.0},
    "several images": {"image": photo(1), "num_images_per_prompt": 3},
    "several pictures": {"image": [photo(1), photo(2)], "num_images_per_prompt": 2},
    "the encoder's input": {"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    "eta": {"image": photo(3), "eta": 1.0, "guidance_scale": 3.0},
    "the model's size": {"image": photo(2), "height": None, "width": None, "num_inference_steps": 2},
    "latents": {"image": photo(2), "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))},
}


@pytest.mark.parametrize("case", CALLS)
def test_pictures_equal_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    """With one generator, so that draws have the same order."""
    options = {**BASE, **CALLS[case], "output_type": "np"}
    theirs, ours = (
        np.asarray(each(generator=torch.Generator().manual_seed(7), **options).images) for each in (peer, pipe)
    )
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3


def test_a_list_of_generators_equals_diffusers(peer: Any, pipe: Pipeline) -> None:
    options = {**BASE, "image": [photo(1), photo(2)], "output_type": "np"}
    theirs, ours = (
        each(generator=[torch.Generator().manual_seed(k) for k in (3, 9)], **options).images for each in (peer, pipe)
    )
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-3


def test_another_picture_gives_another(pipe: Pipeline) -> None:
    first, second = (pipe(image=photo(k), output_type="np", seed=0, **BASE).images for k in (1, 2))
    assert np.abs(first - second).max() > 1e-2


def test_a_folder_is_read(folder: Path, pipe: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert (loaded.family.name, loaded.stages.image_encoder.preprocessing.mean[0]) == ("sd1-variation", 0.5)
    expected = pipe(image=photo(1), seed=0, output_type="np", **BASE).images
    assert np.abs(loaded(image=photo(1), seed=0, output_type="np", **BASE).images - expected).max() < 1e-5
    loaded.warmup(sizes=[(32, 32)])


def test_vectors_stand_in_for_pictures(pipe: Pipeline) -> None:
    encoder = pipe.stages.image_encoder
    assert encoder is not None
    embeds = encoder.embeds(encoder.pixels([photo(1), photo(2)], "image"))
    expected = pipe(image=[photo(1), photo(2)], seed=0, output_type="np", **BASE).images
    made = pipe(image_embeds=embeds, seed=0, output_type="np", **BASE).images
    assert np.abs(made - expected).max() < 1e-5


def test_requests_share_a_batch(pipe: Pipeline) -> None:
    alone = [pipe(image=photo(k), seed=k, output_type="np", **BASE).images for k in range(3)]
    with Session(pipe, max_batch=4) as session:
        futures = [session.submit(image=photo(k), seed=k, output_type="np", **BASE) for k in range(3)]
        for future, expected in zip(futures, alone, strict=True):
            assert np.abs(future.result().images - expected).max() < 1e-3
    stages = pipe.stages
    request = stages.complete(Request(image=[photo(0), photo(1)], seed=0, **BASE))
    run = stages.prepare(request, batch_invariant=True)
    assert not isinstance(stages.new_batch(run, 4), Slots)
    assert [own.tokens for own in run.images] == [1, 1]


def test_callbacks_see_vectors_as_text(peer: Any, pipe: Pipeline) -> None:
    shapes = []

    def callback(pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        shapes.append(tuple(tensors["prompt_embeds"].shape))

    names = ["prompt_embeds"]
    pipe(image=photo(1), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **BASE)
    assert shapes[0][1:] == (1, ip_adapters.PROJECTED)


def test_metadata_has_no_prompt(pipe: Pipeline, tmp_path: Path) -> None:
    save_result(pipe(image=photo(1), seed=5, **BASE), [tmp_path / "a.png"], "variations")
    request, _ = read_parameters(tmp_path / "a.png")
    assert (request.prompt, request.seed, request.strength) == ("", 5, None)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "makes variations of a picture: give image"),
    "a prompt": ({"image": photo(1), "prompt": "a cat"}, "prompt was given, and this model reads `image` in its place"),
    "a negative": ({"image": photo(1), "negative_prompt": "bad"}, "negative_prompt was given"),
    "a mask": ({"image": photo(1), "mask_image": photo(1)}, "mask_image was given"),
    "strength": ({"image": photo(1), "strength": 0.5}, "strength was given"),
    "candidates": ({"image": photo(1), "candidates": 4}, "candidates was given"),
    "both": ({"image": photo(1), "image_embeds": torch.zeros(1, 20)}, "give image, or image_embeds in its place"),
    "wide": ({"image_embeds": torch.zeros(1, 21)}, r"image_embeds .*expected \(any, 20\)"),
    "NaN": ({"image_embeds": torch.full((1, 20), float("nan"))}, "image_embeds holds NaN"),
    "a small tensor": ({"image": torch.zeros(1, 3, 8, 8)}, r"image is a tensor of shape \(1, 3, 8, 8\)"),
    "none": ({"image": []}, "image has 0 pictures"),
    "seeds": ({"image": [photo(1), photo(2)], "seed": [1, 2, 3]}, "seed is a list of 3 for 2 images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(case: str, pipe: Pipeline) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        pipe(**{**BASE, **options})


def test_other_models_refuse_vectors() -> None:
    with pytest.raises(InputError, match="image_embeds was given, and this model reads prompts"):
        Pipeline.default(device="cpu")("a cat", image_embeds=torch.zeros(1, 20))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("family", picture_readers.FAMILIES)
def test_bundles_make_the_same_images(
    family: str, split: bool, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundles.expect_images(family, split, backend, tmp_path_factory)


def test_plans_count_the_image_encoder(folder: Path) -> None:
    spec = describe(folder)
    workload = memory.Workload.of_spec(spec, width=32, height=32, batch=1, dtype=torch.float32, arch=0)
    weights = {line.name: line.bytes for line in memory.plan(workload).weights}
    encoder = ip_adapters.image_encoder()
    assert weights["image encoder 1"] >= 4 * sum(parameter.numel() for parameter in encoder.parameters())


def test_misfits_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "image_encoder" / "config.json").read_text())
    (copy / "image_encoder" / "config.json").write_text(json.dumps({**config, "projection_dim": 24}))
    with pytest.raises(CheckpointError, match=r"the U-Net reads 20 channels .* the image encoder makes 24"):
        describe(copy)
    index = json.loads((copy / "model_index.json").read_text())
    del index["image_encoder"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no image_encoder"):
        describe(copy)
