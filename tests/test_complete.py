"""Requests against a model's configs, of all families beside Stable Diffusion: what is taken, and what is refused
before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import all_families
import numpy as np
import pytest
from command import run
from PIL import Image

from fastldm import InputError, Pipeline, Request
from fastldm.model import describe
from fastldm.profiling import profile
from fastldm.runtime.complete import check, sample_request, sampled

FEW = ("ddim", "ldm-super-resolution", "if-super-resolution")
EACH = [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in all_families.MAKERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> all_families.Folders:
    return all_families.Folders(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", EACH)
def test_sample_request_is_what_a_model_reads(name: str, folders: all_families.Folders) -> None:
    """Of its own size and of another, for one picture and for two, by warm-up and by a profile."""
    spec = describe(folders(name))
    check(Request(**sample_request(spec)), spec)
    pipe = Pipeline.from_pretrained(folders(name), device="cpu", dtype="float32")
    width, height = spec.default_size
    other = width * (1 if spec.follows else 2)  # pictures that go on through other networks have one size
    pipe.warmup([(other, height)], batches=(2,))
    taken = profile.profile(pipe, rounds=1, num_inference_steps=2)
    assert taken.about["model"] == name
    assert (taken.about["width"], taken.about["height"]) == spec.default_size


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "vectors are none": ("kandinsky", {"prompt": ""}, "image_embeds is None"),
    "a prompt for vectors": ("kandinsky", {"prompt": "a cat"}, "this model reads image_embeds"),
    "a prompt": ("ddim", {"prompt": "a cat"}, "this model reads no text, leave it out"),
    "guidance": ("ddpm", {"guidance_scale": 4.0}, "this model reads no text to be guided by"),
    "candidates": ("ldm", {"candidates": 2}, "ranked by a prompt, and this model reads none"),
    "a class that there is not": ("consistency", {"class_labels": 10}, "expected classes from 0 to 9"),
    "a class of another": ("ldm", {"class_labels": 1}, "only class-conditional models read it"),
    "no picture": ("ldm-super-resolution", {}, "this model enlarges an image: give it image"),
    "a picture for a prior": (
        "sd2-unclip-prior",
        {"prompt": "a", "image": "a.png"},
        "this model's prior reads a prompt",
    ),
    "a size": ("ldm", {"width": 17}, "width is 17"),
    "no prompt": ("if", {}, "prompt is None"),
    "another size": ("karlo", {"prompt": "a", "width": 64}, "width is 64: expected 16"),
    "a negative prompt": ("karlo", {"prompt": "a", "negative_prompt": "b"}, "guides away from an empty one"),
    "T5's layers": ("if", {"prompt": "a", "clip_skip": 1}, "text encoder is T5"),
}


@pytest.mark.parametrize("case", BAD)
def test_configs_alone_refuse(case: str, folders: all_families.Folders) -> None:
    name, fields, message = BAD[case]
    with pytest.raises(InputError, match=message):
        check(Request(**fields), describe(folders(name)))


def test_command_says_so_before_weights_are_read(
    folders: all_families.Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fastldm.loading.spec.load", read)
    for arguments in (["a cat", "-m", str(folders("kandinsky"))], ["a cat", "-m", str(folders("ddim"))]):
        done = run("generate", *arguments)
        assert (done.exit_code, "prompt" in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_request_keeps_what_is_given(folders: all_families.Folders) -> None:
    spec = describe(folders("if-super-resolution"))
    picture = np.zeros((8, 8, 3), np.float32)
    request = sampled(spec, "a dog", {"image": picture, "seed": 3})
    assert (request.prompt, request.image is picture, request.seed) == ("a dog", True, 3)
    assert sampled(spec, Request(prompt="b"), {}).image is None
    assert sampled(describe(folders("ddim")), None, {}).prompt == ""


def test_batches_of_models_without_a_prompt(folders: all_families.Folders, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "small.png")
    (tmp_path / "lines.jsonl").write_text('{"num_inference_steps": 1}\n{"class_labels": 3}\n{"prompt": "a cat"}\n')
    out = tmp_path / "out"
    done = run("batch", str(tmp_path / "lines.jsonl"), "-m", str(folders("consistency")), "-o", str(out), "--grid")
    assert "2 of 3 lines are in" in done.stdout, done.stderr
    assert "line 3: prompt is 'a cat': this model reads no text, leave it out" in done.stderr
    assert len([*out.glob("0*.png")]) == 2
    (tmp_path / "lines.jsonl").write_text('{"image": "small.png", "num_inference_steps": 1}\n{"seed": 3}\n')
    model = str(folders("ldm-super-resolution"))
    done = run("batch", str(tmp_path / "lines.jsonl"), "-m", model, "-o", str(tmp_path / "large"))
    assert "line 2: this model enlarges an image: give it image" in done.stderr
    (made,) = (tmp_path / "large").glob("0*.png")
    assert Image.open(made).size == (128, 128)


def test_bench_names_what_it_does_not_compare(folders: all_families.Folders) -> None:
    for name in ("ddim", "ldm-super-resolution"):
        done = run("bench", "-m", str(folders(name)))
        assert (done.exit_code, f"is {name}, and what is compared are pictures of a prompt" in done.stderr) == (2, True)
        assert f"`fastldm profile -m {folders(name)}`" in done.stderr
