"""DeepFloyd IF beside diffusers' pipelines, on the same seeded random weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import deepfloyd
import diffusers
import numpy as np
import pytest
import torch
from command import run
from deepfloyd import EMBEDS, NEGATIVE, PROMPT, Options, both, picture
from judged import judged
from other_networks import network
from pairs import generator
from PIL import Image

from fastldm import Pipeline, Session
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.hub import _needed_files
from fastldm.model import describe
from fastldm.planning import memory

peer, pipe, folder = judged(deepfloyd.first_stage)


CALLS: dict[str, Options] = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "a negative": {"negative_prompt": NEGATIVE, "guidance_scale": 4.0},
    "several prompts": {"prompt": [PROMPT, "a cat"], "negative_prompt": [NEGATIVE, ""], "generator": "list"},
    "several pictures": {"num_images_per_prompt": 2},
    "several pictures of generators": {"num_images_per_prompt": 2, "generator": "list"},
    "a size": {"height": 24, "width": 32},
    "times": {"timesteps": [900, 500, 20]},
    "one step": {"num_inference_steps": 1},
    "embeds": EMBEDS,
    "all embeds": {**EMBEDS, "negative_prompt_embeds": torch.randn(1, 77, 40, generator=generator(2))},
    "no text": {"prompt": ""},
}
FEW = ("plain", "unguided", "several prompts", "a size")


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_first_stage_equals_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    both(pipe, peer, **CALLS[case])


GRID = {
    "prompt": [PROMPT, ["a cat", "a dog"]],
    "negative_prompt": [None, NEGATIVE],
    "guidance_scale": [0.5, 1.0, 7.0],
    "num_images_per_prompt": [1, 2],
    "height": [None, 24],
    "width": [None, 32],
    "timesteps": [None, [900, 500, 20]],
    "generator": [None, "list"],
}


@pytest.mark.full
@pytest.mark.parametrize("scale", GRID["guidance_scale"])
def test_arguments_grid_equals_diffusers(scale: float, peer: Any, pipe: Pipeline) -> None:
    ran = 0
    names = [name for name in GRID if name != "guidance_scale"]
    for values in itertools.product(*(GRID[name] for name in names)):
        options = {**dict(zip(names, values, strict=True)), "guidance_scale": scale}
        several, images = isinstance(options["prompt"], list), options["num_images_per_prompt"]
        if several and isinstance(options["negative_prompt"], str):
            options["negative_prompt"] = [NEGATIVE] * 2  # which diffusers wants
        if options["generator"] == "list" and (1 + several) * images != 2:
            continue
        both(pipe, peer, **{key: value for key, value in options.items() if value is not None})
        ran += 1
    assert ran == 96


SCHEDULERS: dict[str, tuple[str, Options]] = {
    "no thresholds": ("DDPMScheduler", {"thresholding": False, "clip_sample": True}),
    "linear": ("DDPMScheduler", {"beta_schedule": "linear", "timestep_spacing": "trailing"}),
    "a variance that is not read": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "a fixed large variance": ("DDPMScheduler", {"variance_type": "fixed_large"}),
}


@pytest.mark.full
@pytest.mark.parametrize("case", SCHEDULERS)
def test_first_stage_of_other_schedulers_equals_diffusers(case: str) -> None:
    _, options = SCHEDULERS[case]
    theirs = deepfloyd.first_stage(scheduler=deepfloyd.scheduler(**options))
    ours = Pipeline.from_diffusers(theirs)
    for scale in (1.0, 7.0):
        both(ours, theirs, guidance_scale=scale, num_inference_steps=4)


def test_first_stage_of_a_folder_is_the_adopted_one(pipe: Pipeline, folder: Path) -> None:
    loaded = Pipeline.from_pretrained(folder, dtype="float32")
    family = loaded.family
    assert (family.name, family.num_inference_steps, family.guidance_scale) == ("if", 100, 7.0)
    assert loaded.stages.spec.default_size == (16, 16)
    options = {"num_inference_steps": 2, "seed": 4, "output_type": "np"}
    assert np.array_equal(loaded(PROMPT, **options).images, pipe(PROMPT, **options).images)
    text, other = (loaded(prompt, **options).images for prompt in (PROMPT, "a cat"))
    assert np.abs(text - other).max() > 1e-2
    long = loaded("a cat " * 100, **options).images  # in several windows
    assert np.isfinite(long).all()


def test_requests_of_first_stage_share_steps(pipe: Pipeline) -> None:
    queries: list[Options] = [
        {"prompt": PROMPT, "guidance_scale": 7.0, "seed": 1},
        {"prompt": "a cat", "guidance_scale": 1.0, "seed": 2},
        {"prompt": "a cat " * 60, "negative_prompt": NEGATIVE, "seed": 3},
    ]
    more: Options = {"num_inference_steps": 3, "output_type": "np"}
    with Session(pipe, max_batch=4) as session:
        together = [session.submit(**query, **more) for query in queries]
        for future, query in zip(together, queries, strict=True):
            assert np.abs(future.result().images - pipe(**query, **more).images).max() < 1e-4


def test_hub_is_asked_for_spiece(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    needed = {*_needed_files(index, [*names, "tokenizer/spiece.model"], None, False, "a/b")}
    assert {"tokenizer/spiece.model", "text_encoder/config.json", "text_encoder/model.safetensors"} <= needed


def test_spiece_alone_is_a_tokenizer(folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "tokenizer":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer").mkdir()
    deepfloyd.spiece(tmp_path / "tokenizer" / "spiece.model")
    options = {"num_inference_steps": 1, "seed": 4, "output_type": "np"}
    loaded = Pipeline.from_pretrained(tmp_path, dtype="float32")
    assert np.array_equal(loaded(PROMPT, **options).images, pipe(PROMPT, **options).images)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is a UNet2DModel"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder is a CLIPTextModel; fastldm runs T5Enc"),
        ({"text_encoder": [None, None]}, "has no text_encoder"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "has vae"),
        ({"_class_name": "IFSuperResolutionPipeline"}, "has no image_noising_scheduler"),
        ({"_class_name": "IFImg2ImgSuperResolutionPipeline"}, "has no image_noising_scheduler"),
        ({"_class_name": "IFControlNetPipeline"}, "is a IFControlNetPipeline"),
    ],
)
def test_other_parts_are_refused_by_name(replaced: Options, message: str, folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for path in folder.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **replaced}))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


def test_parts_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"reads text of 24 channels \('encoder_hid_dim'\), and 40 come"):
        Pipeline.from_diffusers(deepfloyd.first_stage(unet=network("if-1", encoder_hid_dim=24)))
    with pytest.raises(CheckpointError, match="is no U-Net of a IFPipeline"):
        Pipeline.from_diffusers(deepfloyd.first_stage(unet=network("karlo-decoder", class_embed_type=None)))


def test_what_first_stage_does_not_read_is_named(pipe: Pipeline, tmp_path: Path) -> None:
    refused: dict[str, Options] = {
        "clip_skip is 1: .* T5": {"clip_skip": 1},
        "only SDXL reads it": {"prompt_2": "a dog"},
        "clean_caption is not supported": {"clean_caption": True},
        "noise_level is 3": {"noise_level": 3},
        "original_image was given: only": {"image": picture(), "original_image": picture()},
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, **options)
    with pytest.raises(InputError, match=r"textual inversion is of CLIP's and BERT's text encoders, and this .* is T5"):
        pipe.load_textual_inversion(torch.zeros(deepfloyd.T5_WIDTH), token="<toy>")
    with pytest.raises(InputError, match="whole_picture: this model's U-Net makes a variance"):
        pipe.export(tmp_path / "out", whole_picture=True)


def test_first_stage_is_planned_by_its_configs(peer: Any, folder: Path) -> None:
    spec = describe(folder)
    workload: Options = {"width": 16, "height": 16, "batch": 2, "dtype": torch.float32, "arch": 0}
    plan = memory.plan(memory.Workload.of_spec(spec, **workload))
    parameters = sum(p.numel() for part in (peer.unet, peer.text_encoder) for p in part.parameters())
    assert spec.parameters == parameters
    assert sum(line.bytes for line in plan.weights) == 4 * parameters


def test_command_makes_a_first_stage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate", PROMPT, "-m", str(folder), "--steps", "2", "--seed", "4", "-o", "a.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("a.png").size == (16, 16)
    refused = run("generate", PROMPT, "-m", str(folder), "--embedding", "smiley", "-o", "b.png")
    assert "textual inversion is of CLIP's and BERT's text encoders" in refused.stderr
    planned = run("plan", "-m", str(folder), "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr


# ----------------------------------------------------------------------------------------------- super-resolution


@pytest.fixture(scope="module")
def larger() -> tuple[Any, Pipeline]:
    theirs = deepfloyd.super_resolution()
    return theirs, Pipeline.from_diffusers(theirs)


TENSOR = torch.rand(1, 3, 8, 6, generator=generator(2)) * 2 - 1
ENLARGING: dict[str, Options] = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "a level": {"noise_level": 0},
    "the highest level": {"noise_level": 999, "negative_prompt": NEGATIVE},
    "a tensor": {"image": TENSOR},
    "a size": {"height": 24, "width": 32, "image": picture(1, 5, 9)},
    "several pictures": {"num_images_per_prompt": 2},
    "several pictures of generators": {"num_images_per_prompt": 2, "generator": "list"},
    "several prompts": {"prompt": [PROMPT, "a cat"], "image": [picture(1), picture(2)], "generator": "list"},
    "several of each": {"prompt": [PROMPT, "a cat"], "image": [picture(1), picture(2)], "num_images_per_prompt": 2},
    "embeds": EMBEDS,
    "times": {"timesteps": [900, 500, 20]},
}


@pytest.mark.parametrize(
    "case",
    [case if case in ("plain", "a size") else pytest.param(case, marks=pytest.mark.full) for case in ENLARGING],
)
def test_super_resolution_equals_diffusers(case: str, larger: tuple[Any, Pipeline]) -> None:
    theirs, ours = larger
    both(ours, theirs, **{"image": picture(), **ENLARGING[case]})


@pytest.mark.full
@pytest.mark.parametrize("level", [None, 0, 400])
def test_super_resolutions_grid_equals_diffusers(level: int | None, larger: tuple[Any, Pipeline]) -> None:
    theirs, ours = larger
    grid = {
        "image": [picture(), TENSOR, picture(3, 20, 16)],
        "guidance_scale": [1.0, 4.0],
        "negative_prompt": [None, NEGATIVE],
        "num_images_per_prompt": [1, 2],
        "height": [None, 24],
        "timesteps": [None, [900, 20]],
    }
    for values in itertools.product(*grid.values()):
        options = {**dict(zip(grid, values, strict=True)), "noise_level": level}
        both(ours, theirs, **{key: value for key, value in options.items() if value is not None})


def test_super_resolution_of_a_folder_is_the_adopted_one(
    larger: tuple[Any, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = larger
    theirs.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", dtype="float32")
    family = loaded.family
    assert (family.name, family.num_inference_steps, family.guidance_scale, family.noise_level) == (
        "if-super-resolution",
        50,
        4.0,
        250,
    )
    options: Options = {"image": picture(), "num_inference_steps": 2, "seed": 4, "output_type": "np"}
    expected = ours(PROMPT, **options).images
    assert np.array_equal(loaded(PROMPT, **options).images, expected)
    with Session(loaded, max_batch=4) as session:
        queries = [options, {**options, "noise_level": 10, "seed": 5, "guidance_scale": 1.0}]
        together = [session.submit(PROMPT, **query) for query in queries]
        for future, query in zip(together, queries, strict=True):
            assert np.abs(future.result().images - ours(PROMPT, **query).images).max() < 1e-4
    monkeypatch.chdir(tmp_path)
    picture().save("small.png")
    done = run("generate", PROMPT, "-m", "model", "--image", "small.png", "--steps", "2", "-o", "a.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("a.png").size == (16, 16)
    planned = run("plan", "-m", "model", "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr


def test_what_super_resolution_lacks_is_named(larger: tuple[Any, Pipeline]) -> None:
    _, ours = larger
    refused: dict[str, Options] = {
        "this model enlarges an image: give it image": {},
        "noise_level is 1000: expected at most 999": {"image": picture(), "noise_level": 1000},
        "mask_image was given: .* give original_image": {"image": picture(), "mask_image": picture()},
        "original_image holds 2 pictures for a batch of 1": {"image": picture(), "original_image": [picture()] * 2},
        "padding_mask_crop was given": {
            **{name: picture() for name in ("image", "original_image", "mask_image")},
            "padding_mask_crop": 4,
        },
        "strength is 0.5": {"image": picture(), "strength": 0.5},
        "image holds 3 pictures for a batch of 1": {"image": [picture()] * 3},
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            ours(PROMPT, **options)
    with pytest.raises(CheckpointError, match="class_embed_type"):
        Pipeline.from_diffusers(deepfloyd.super_resolution(unet=network("if-1")))
    with pytest.raises(CheckpointError, match="class_embed_type"):
        Pipeline.from_diffusers(deepfloyd.first_stage(unet=network("if-2")))


def test_diffusers_has_no_other_parts() -> None:
    names = diffusers.IFPipeline.__init__.__code__.co_varnames[1:9]
    assert {"tokenizer", "text_encoder", "unet", "scheduler"} <= set(names)
    assert "vae" not in names


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_half_precision_is_adopted_as_transformers_loads_it(
    dtype: torch.dtype, pipe: Pipeline, folder: Path, tmp_path: Path
) -> None:
    theirs = diffusers.IFPipeline.from_pretrained(folder, torch_dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    kept = {key for key, weight in theirs.text_encoder.state_dict().items() if weight.dtype == torch.float32}
    assert len(kept) == (3 if dtype == torch.float16 else 0)  # T5's `wo`, of each layer
    ours = Pipeline.from_diffusers(theirs)
    wo = ours.text_stages[0].model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").weight
    assert wo.data_ptr() == theirs.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.data_ptr()
    assert ours.precision == str(dtype).removeprefix("torch.")
    options: Options = {"num_inference_steps": 3, "output_type": "np"}
    exact = pipe(PROMPT, **options, generator=generator()).images
    expected = theirs(PROMPT, **options, generator=generator(), clean_caption=False).images
    made = ours(PROMPT, **options, generator=generator()).images
    rounding = np.abs(expected - exact).max()
    assert 0 < rounding < 0.1
    assert np.abs(made - exact).max() < 1.5 * rounding
    assert np.abs(made - expected).max() < 3 * rounding
    theirs.save_pretrained(tmp_path, variant="fp16")
    loaded = Pipeline.from_pretrained(tmp_path, variant="fp16", dtype="float32")
    assert np.abs(loaded(PROMPT, **options, generator=generator()).images - exact).max() < 1.5 * rounding


def test_other_weights_in_float32_are_refused(folder: Path) -> None:
    theirs = diffusers.IFPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    theirs.text_encoder.shared.float()
    with pytest.raises(CheckpointError, match=r"weights in float16 .*, float32 on cpu \(text_encoder\)"):
        Pipeline.from_diffusers(theirs)
