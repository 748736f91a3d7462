"""Candidates of a request, which a CLIP model ranks: against transformers' CLIPModel."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ip_adapters
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.image import read_parameters, save_result
from fastldm.loading.ranker import describe_ranker, find_ranker
from fastldm.loading.spec import DEFAULT_MODEL

BASE: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "seed": 5}
LONG = "a cat on a mat " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ip_adapters.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    peer = tiny.pipeline("sd1", unet=tiny.unet("sd1", layers_per_block=1), vae=tiny.vae("small", sample_size=32))
    pipe = Pipeline.from_diffusers(peer)
    pipe.load_ranker(folder)
    return pipe


def judged(folder: Path, pictures: list[Image.Image], texts: list[str]) -> np.ndarray:
    """The cosines of transformers' CLIPModel: its logits without their factor."""
    clip = tiny.peer("transformers")
    model = clip.CLIPModel.from_pretrained(folder).eval()
    inputs = clip.CLIPTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    pixels = clip.CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixels, **inputs).logits_per_image / model.logit_scale.exp()
    return logits.diagonal().numpy()


def test_scores_equal_transformers(pipe: Pipeline, folder: Path) -> None:
    prompts = ["a cat", LONG, "a (red:1.3) [car]"]
    result = pipe(prompts, candidates=2, keep=2, **BASE)
    texts = [text for text in ("a cat", LONG, "a red car") for _ in range(2)]
    assert np.abs(np.array(result.scores) - judged(folder, list(result.images), texts)).max() < 1e-5


@pytest.mark.parametrize("max_batch", [1, 4, 16])
def test_the_best_of_all_come_back_best_first(max_batch: int, pipe: Pipeline) -> None:
    prompts = ["a cat", "a dog"]
    seeds = [(prompt, 5 + 6 * p + k) for p, prompt in enumerate(prompts) for k in range(6)]
    alone = [pipe(prompt, candidates=1, **{**BASE, "seed": seed}) for prompt, seed in seeds]
    with Session(pipe, max_batch=max_batch) as session:
        generation = session.submit(prompts, candidates=6, keep=2, **BASE)
        steps = list(generation.progress())
        result = generation.result()
    assert [step.step for step in steps] == list(range(steps[0].steps))
    assert len(result.timings.steps) == len(steps)
    assert min(result.timings.steps) > 0
    for p in range(2):
        order = sorted(range(6), key=lambda k: -alone[6 * p + k].scores[0])[:2]
        assert result.seeds[2 * p : 2 * p + 2] == tuple(5 + 6 * p + k for k in order)
        for own, k in zip(result.images[2 * p : 2 * p + 2], order, strict=True):
            assert np.abs(np.asarray(own, int) - np.asarray(alone[6 * p + k].images[0], int)).max() <= 1
        expected = [alone[6 * p + k].scores[0] for k in order]
        assert np.abs(np.array(result.scores[2 * p : 2 * p + 2]) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_other_types_of_output_have_the_same_scores(kind: str, pipe: Pipeline) -> None:
    expected = pipe("a cat", candidates=4, keep=3, **BASE)
    result = pipe("a cat", candidates=4, keep=3, output_type=kind, **BASE)
    assert result.seeds == expected.seeds
    assert np.abs(np.subtract(result.scores, expected.scores)).max() < 1e-6
    assert len(result.images) == 3


def test_metadata_makes_each_again_alone(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe(["a cat", "a dog"], negative_prompt=["worse", "bad"], candidates=5, keep=2, **BASE)
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    save_result(result, paths, "tiny")
    for path, image, score, prompt in zip(
        paths, result.images, result.scores, ["a cat", "a cat", "a dog", "a dog"], strict=True
    ):
        request, rest = read_parameters(path)
        assert float(rest["Score"]) == pytest.approx(score, abs=1e-4)
        assert (request.prompt, request.candidates) == (prompt, None)
        again = pipe(request)
        assert np.abs(np.asarray(again.images[0], int) - np.asarray(image, int)).max() <= 1


def test_the_request_comes_back_as_it_was(pipe: Pipeline) -> None:
    result = pipe("a cat", candidates=5, keep=2, **BASE)
    assert (result.request.candidates, result.request.keep) == (5, 2)
    assert pipe(result.request).seeds == result.seeds


def test_an_interrupted_request_keeps_what_there_is(pipe: Pipeline) -> None:
    with Session(pipe, max_batch=2) as session:
        generation = session.submit("a cat", candidates=40, keep=3, **BASE)
        for step in generation.progress():
            if step.step == 0:
                generation.interrupt()
        result = generation.result()
    assert len(result.images) == 3
    assert len(result.timings.steps) < 40


def test_a_cancelled_request_stops_between_parts(pipe: Pipeline) -> None:
    with Session(pipe, max_batch=1) as session:
        generation = session.submit("a cat", candidates=100, **BASE)
        for _ in generation.progress():
            generation.cancel()
        with pytest.raises(Exception, match="cancelled after"):
            generation.result()
        assert session.submit("a cat", **BASE).result().images


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"candidates": 2, "keep": 3}, "keep is 3 of 2 candidates"),
    "keep alone": ({"keep": 2}, "keep is 2 without candidates"),
    "both": ({"candidates": 4, "num_images_per_prompt": 2}, "num_images_per_prompt is 2, and there are candidates"),
    "generator": ({"candidates": 4, "generator": torch.Generator()}, "generator does not go with candidates"),
    "latents": ({"candidates": 1, "latents": torch.zeros(1, 4, 4, 4)}, "latents does not go with candidates"),
    "latent": ({"candidates": 4, "output_type": "latent"}, "output_type is 'latent', and candidates are ranked"),
    "none": ({"candidates": 0}, "candidates is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        Request("a cat", **options)


def test_several_first_pictures_are_refused(pipe: Pipeline) -> None:
    pictures = [Image.new("RGB", (32, 32))] * 2
    with pytest.raises(InputError, match="image holds 2 pictures, and there are candidates"):
        pipe("a cat", image=pictures, candidates=4, **BASE)


def test_a_model_without_image_encoder_says_so(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    with pytest.raises(
        InputError, match=r"this model has none: give one, .* as --ranker openai/clip-vit-large-patch14"
    ):
        pipe("a cat", candidates=2, **BASE)
    vision = tmp_path / "vision"
    ip_adapters.image_encoder().save_pretrained(vision)
    with pytest.raises(CheckpointError, match="has an image encoder alone"):
        pipe.load_ranker(vision)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pipe.load_ranker(tmp_path)


def in_cache(folder: Path, cache: Path) -> Path:
    """huggingface_hub's own cache with "acme/clip" in it; that one's files."""
    repository = cache / "models--acme--clip"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_hub_id_is_read_from_the_local_cache(folder: Path, tmp_path: Path) -> None:
    snapshot, where = in_cache(folder, tmp_path), {"cache_dir": tmp_path, "local_files_only": True}
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.load_ranker("acme/clip", **where)
    result = pipe("a cat", candidates=2, keep=2, **BASE)
    assert np.abs(np.array(result.scores) - judged(folder, list(result.images), ["a cat"] * 2)).max() < 1e-5
    with pytest.raises(CheckpointError, match="acme/other is neither a folder here nor in the local hub cache"):
        pipe.load_ranker("acme/other", **where)
    with pytest.raises(CheckpointError, match=r"clip does not exist here\. Give a file, a folder, or a hub id"):
        pipe.load_ranker("clip", **where)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="acme/clip has no weights"):
        pipe.load_ranker("acme/clip", **where)
    (snapshot / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"acme/clip has no config\.json"):
        pipe.load_ranker("acme/clip", **where)


def test_a_missing_ranker_is_found_before_loading(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"acme/clip is neither"):
        Pipeline.from_pretrained(tmp_path / "none", ranker="acme/clip", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_sends_only_what_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    files = [path.name for path in folder.iterdir()]
    others = ["pytorch_model.bin", "tf_model.h5", "README.md", "onnx/model.onnx", "model.fp16.safetensors"]
    siblings = [SimpleNamespace(rfilename=name) for name in (*files, *others)]
    fetched = []

    def download(repo: str, name: str, **_: Any) -> str:
        fetched.append(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert find_ranker("acme/clip") == folder
    tokenizer = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"} & {*files}
    assert tokenizer
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} | tokenizer <= {*fetched}
    assert not {*others} & {*fetched}


def test_sizes_are_read_without_weights(folder: Path, pipe: Pipeline) -> None:
    assert describe_ranker(folder) == pipe.stages.ranking.need(pipe.text_stages, "torch").config
    own = Pipeline.default(dtype="float32").stages
    ranker = own.ranking.need(own.text_stages, "torch")
    assert describe_ranker(DEFAULT_MODEL / "image_encoder") == ranker.config
    assert ranker.config.text is None
