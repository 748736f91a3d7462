"""DeepFloyd IF's stages as one request, beside diffusers' pipelines called one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clients
import deepfloyd
import numpy as np
import pytest
import tiny
import torch
from command import run
from deepfloyd import NEGATIVE, PROMPT, Options, picture
from other_networks import network
from pairs import generator
from PIL import Image

from fastldm import Pipeline, Request, Session
from fastldm.errors import CheckpointError, InputError
from fastldm.image import result_parameters
from fastldm.loading.spec import Spec
from fastldm.metadata import parse_parameters
from fastldm.planning import warm
from fastldm.serving.bucket import Bucket

WIDE = picture(4, 12, 8)
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((4, 6), np.uint8)))
STEPS: list[Options] = [{"num_inference_steps": 3, "noise_level": 100}, {"num_inference_steps": 2}]


class Cascade:
    """diffusers' three pipelines on tiny weights, the second without a text encoder, and ours of them."""

    def __init__(self) -> None:
        self.first = deepfloyd.first_stage(unet=network("if-1", sample_size=8))
        self.second = deepfloyd.super_resolution(text_encoder=None, tokenizer=None)
        self.third = tiny.pipeline("x4-upscaler")
        self.third.set_progress_bar_config(disable=True)
        self.ours = Pipeline.from_diffusers(self.first)
        for each in (self.second, self.third):
            self.ours.attach_upscaler(Pipeline.from_diffusers(each))

    def in_turn(self, kind: str, draws: Any, count: int, **options: Any) -> np.ndarray:
        """diffusers' pipelines of a kind, "", "Img2Img" or "Inpainting", one after the other."""
        first = deepfloyd.of_class(f"IF{kind}Pipeline", self.first)
        second = deepfloyd.of_class(f"IF{kind}SuperResolutionPipeline", self.second)
        states, negatives = first.encode_prompt(PROMPT, negative_prompt=options.get("negative_prompt"))
        common = {"generator": draws, "output_type": "pt"}
        made = first(PROMPT, **options, **common, num_images_per_prompt=count, clean_caption=False).images
        again = {"prompt_embeds": states.repeat(count, 1, 1), "negative_prompt_embeds": negatives.repeat(count, 1, 1)}
        if "image" in options:
            again["original_image"] = [options["image"]] * count
        if "mask_image" in options:
            again["mask_image"] = options["mask_image"]
        made = second(image=made, **again, **STEPS[0], **common).images
        last = {"image": made, "negative_prompt": None, "generator": draws, "output_type": "np"}
        if "negative_prompt" in options:
            last["negative_prompt"] = [options["negative_prompt"]] * count
        return np.asarray(self.third([PROMPT] * count, **last, **STEPS[1]).images)


@pytest.fixture(scope="module")
def stages() -> Cascade:
    return Cascade()


@pytest.fixture(scope="module")
def folders(stages: Cascade, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the three; the second's index names a text encoder that is not there, as of a partial download."""
    root = tmp_path_factory.mktemp("cascade")
    for name in ("first", "second", "third"):
        getattr(stages, name).save_pretrained(root / name)
    index = json.loads((root / "second" / "model_index.json").read_text())
    named = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    (root / "second" / "model_index.json").write_text(json.dumps({**index, **named}))
    return [str(root / name) for name in ("first", "second", "third")]


CALLS: dict[str, tuple[str, Options]] = {
    "text": ("", {}),
    "unguided": ("", {"guidance_scale": 1.0}),
    "a negative": ("", {"negative_prompt": NEGATIVE}),
    "a picture": ("Img2Img", {"image": WIDE, "strength": 0.7}),
    "inpainting": ("Inpainting", {"image": WIDE, "mask_image": MASK}),
}


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("text", 2),
        *(pytest.param(case, n, marks=pytest.mark.full) for case in CALLS for n in (1, 2) if (case, n) != ("text", 2)),
    ],
)
def test_three_stages_equal_diffusers_in_turn(case: str, count: int, stages: Cascade) -> None:
    kind, options = CALLS[case]
    options = {"num_inference_steps": 4, **options}

    def draws() -> Any:
        return generator() if count == 1 else [generator(k) for k in range(count)]

    more: Options = {"num_images_per_prompt": count, "upscaler_options": STEPS, "output_type": "np"}
    result = stages.ours(PROMPT, **options, **more, generator=draws())
    expected = stages.in_turn(kind, draws(), count, **options)
    assert result.images.shape == expected.shape
    assert np.abs(result.images - expected).max() < 1e-4
    assert result.upscalers == ("IFSuperResolutionPipeline", "StableDiffusionUpscalePipeline")


def test_one_seed_is_a_generator_through_all_stages(stages: Cascade) -> None:
    options: Options = {"num_inference_steps": 2, "upscaler_options": STEPS, "output_type": "np"}
    made = stages.ours(PROMPT, seed=5, num_images_per_prompt=2, **options).images
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert np.abs(made - stages.in_turn("", own, 2, num_inference_steps=2)).max() < 1e-4
    assert np.abs(stages.ours(PROMPT, seed=6, **options).images - made[1:]).max() < 1e-4


def test_folders_are_the_adopted_cascade(folders: list[str], stages: Cascade) -> None:
    loaded = Pipeline.from_pretrained(folders[0], upscaler=folders[1:], dtype="float32")
    second = loaded.upscalers[0]
    assert second.text_stages is loaded.text_stages
    options: Options = {"num_inference_steps": 2, "upscaler_options": STEPS, "seed": 3, "output_type": "np"}
    assert np.array_equal(loaded(PROMPT, **options).images, stages.ours(PROMPT, **options).images)
    loaded.detach_upscalers()
    assert loaded(PROMPT, num_inference_steps=1).images[0].size == (8, 8)


def test_cascades_share_steps_of_each_stage(stages: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    together: dict[str, int] = {}
    step = Bucket._step_together

    def spied(bucket: Bucket, generations: list[Any]) -> None:
        together[bucket.stages.name] = max(len(generations), together.get(bucket.stages.name, 0))
        step(bucket, generations)

    monkeypatch.setattr(Bucket, "_step_together", spied)
    queries: list[Options] = [
        {"prompt": PROMPT, "seed": 1},
        {"prompt": "a cat", "negative_prompt": NEGATIVE, "seed": 2},
        {"prompt": "a dog", "guidance_scale": 1.0, "seed": 3},
    ]
    more: Options = {"num_inference_steps": 3, "output_type": "np", "upscaler_options": STEPS}
    with Session(stages.ours, max_batch=4) as session:
        futures = [session.submit(**query, **more) for query in queries]
        made = [future.result().images for future in futures]
    assert [*together] == ["IFPipeline", *(each.name for each in stages.ours.upscalers)]
    assert min(together.values()) >= 2  # of the last stage the first request may be over when the last one comes
    for images, query in zip(made, queries, strict=True):
        assert np.abs(images - stages.ours(**query, **more).images).max() < 1e-4


def test_sizes_go_on_in_proportion(stages: Cascade) -> None:
    options: Options = {"num_inference_steps": 1, "upscaler_options": {"num_inference_steps": 2}, "seed": 0}
    assert stages.ours(PROMPT, width=16, height=8, **options).images[0].size == (128, 64)
    assert stages.ours(PROMPT, image=WIDE, strength=1.0, **options).images[0].size == (96, 64)


def test_settings_are_in_the_picture(stages: Cascade) -> None:
    options = ({"noise_level": 9, "num_inference_steps": 1}, {"num_inference_steps": 1, "prompt": "a dog, red"})
    result = stages.ours(PROMPT, num_inference_steps=1, seed=0, upscaler_options=options)
    request, rest = parse_parameters(result_parameters(result, "if")[0])
    assert request.upscaler_options == options
    assert rest["Upscalers"] == "IFSuperResolutionPipeline, StableDiffusionUpscalePipeline"


def test_what_a_cascade_lacks_is_named(stages: Cascade, folders: list[str]) -> None:
    ours, second = stages.ours, stages.ours.upscalers[0]
    states = torch.zeros(1, 77, deepfloyd.T5_WIDTH)
    refused: dict[str, Options] = {
        r"upscaler_options has 'steps': expected some of prompt": {"upscaler_options": {"steps": 3}},
        r"upscaler_options\[1\]\['noise_level'\] is -1": {"upscaler_options": [{}, {"noise_level": -1}]},
        "upscaler_options are of 1 upscalers, and 2 upscalers are attached": {"upscaler_options": [{}]},
        "noise_level is 400: expected at most 350": {"upscaler_options": [{}, {"noise_level": 400}]},
        "StableDiffusionUpscalePipeline cannot read: give prompt": {"prompt": None, "prompt_embeds": states},
        "padding_mask_crop was given, and upscalers": {"image": WIDE, "mask_image": MASK, "padding_mask_crop": 2},
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            ours(**{"prompt": PROMPT, **options})
    alone = Pipeline.from_diffusers(stages.first)
    with pytest.raises(InputError, match="of 1 upscalers, and no upscaler is attached"):
        alone(PROMPT, upscaler_options={"noise_level": 3})
    with pytest.raises(InputError, match="enlarges no picture"):
        alone.attach_upscaler(Pipeline.from_diffusers(stages.first))
    with pytest.raises(InputError, match="the upscaler is the model itself"):
        second.attach_upscaler(second)
    wide = deepfloyd.super_resolution(text_encoder=None, tokenizer=None, unet=network("if-2", encoder_hid_dim=24))
    with pytest.raises(InputError, match="reads text of 24 channels; IFPipeline has 40"):
        alone.attach_upscaler(Pipeline.from_diffusers(wide))
    lone = Pipeline.from_pretrained(folders[1], text_encoder=None, dtype="float32")
    with pytest.raises(InputError, match="prompt_embeds is None, and second has no text encoder"):
        lone(PROMPT, image=WIDE)
    with pytest.raises(CheckpointError, match="text_encoder"):
        Pipeline.from_pretrained(folders[1])
    with pytest.raises(InputError, match="text_encoder is None: only DeepFloyd IF's super-resolution"):
        Pipeline.from_pretrained(folders[2], text_encoder=None)
    with pytest.raises(InputError, match="text_encoder is 3: expected None"):
        Pipeline.from_pretrained(folders[1], text_encoder=3)


def test_second_stage_without_encoder_reads_states(stages: Cascade, folders: list[str]) -> None:
    lone = Pipeline.from_pretrained(folders[1], text_encoder=None, dtype="float32")
    states, negatives = stages.first.encode_prompt(PROMPT)
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": negatives}
    more: Options = {"image": picture(), "num_inference_steps": 3, "output_type": "np"}
    expected = stages.second(**embeds, **more, generator=generator()).images
    assert np.abs(lone(**embeds, **more, generator=generator()).images - expected).max() < 1e-4


def test_command_makes_plans_and_warms_a_cascade(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cascade = ("-m", folders[0], "--upscaler", folders[1], "--upscaler", folders[2])
    levels = ("--upscaler-noise-level", "100", "--upscaler-noise-level", "20")
    done = run("generate", PROMPT, *cascade, "--steps", "2", "--upscaler-steps", "2", *levels, "-o", "a.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("a.png").size == (64, 64)
    planned = run("plan", *cascade, "--device", "cpu", "--json")
    assert planned.exit_code == 0, planned.stderr
    record = json.loads(planned.stdout)
    assert [stage["model"] for stage in record["stages"]] == folders
    assert "text encoder" in str(record["stages"][0])
    refused = run("generate", PROMPT, "-m", folders[0], "--upscaler-steps", "2")
    assert "--upscaler-steps was given without --upscaler" in refused.stderr


def test_warm_is_of_all_stages(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[str, list[tuple[int, int]], int]] = []

    def spied(spec: Spec, arch: str, *, sizes: list[tuple[int, int]], **options: Any) -> int:
        warmed.append((spec.family.name, sizes, len(spec.text)))
        return 1

    monkeypatch.setattr(warm, "warm", spied)
    done = run("warm", "-m", folders[0], "--arch", "sm_90", "--upscaler", folders[1], "--upscaler", folders[2])
    assert done.exit_code == 0, done.stderr
    assert warmed == [("if", [(8, 8)], 1), ("if-super-resolution", [(16, 16)], 0), ("x4-upscaler", [(64, 64)], 1)]
    refused = run("warm", "-m", folders[0], "--arch", "sm_90", "--upscaler", folders[0])
    assert "enlarges no picture" in refused.stderr


def test_requests_keep_a_copy_of_options() -> None:
    options = {"noise_level": 3}
    request = Request("a cat", upscaler_options=options)
    options["noise_level"] = 4
    assert request.upscaler_options == {"noise_level": 3}


def test_server_enlarges_by_its_models(folders: list[str], stages: Cascade) -> None:
    models = {"first": folders[0], "third": folders[2]}
    body: Options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "model": "first"}
    cascade: Options = {"upscalers": ["third"], "upscaler_options": {"num_inference_steps": 2}}
    with clients.client(models=models, dtype="float32", max_pixels=2000) as http:
        answer = http.post("/v1/images/generations", json={**body, **cascade})
        too_many = http.post("/v1/images/generations", json={**body, "upscalers": ["third"] * 2})
        unknown = http.post("/v1/images/generations", json={**body, "upscalers": ["fourth"]})
        steps = http.post(
            "/v1/images/generations", json={**body, **cascade, "upscaler_options": {"num_inference_steps": 900}}
        )
    assert answer.status_code == 200, answer.text
    alone = Pipeline.from_diffusers(stages.first)
    alone.attach_upscaler(Pipeline.from_diffusers(stages.third))
    expected = alone(PROMPT, seed=3, num_inference_steps=2, upscaler_options={"num_inference_steps": 2}).images[0]
    made = clients.picture(answer.json()["data"][0]["b64_json"])
    assert made.size == (32, 32)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert "width times height is 16384" in too_many.text
    assert "there is no model 'fourth'" in unknown.text
    assert "num_inference_steps of third is 900" in steps.text
