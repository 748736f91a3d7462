"""DeepFloyd IF from a picture and for inpainting, beside diffusers' pipelines, on the same seeded random weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import clients
import deepfloyd
import numpy as np
import pytest
import torch
from command import run
from deepfloyd import EMBEDS, NEGATIVE, PROMPT, Options, both, picture
from judged import judged
from pairs import generator
from PIL import Image

from fastldm import Pipeline, Request, Session

peer, pipe, folder = judged(deepfloyd.first_stage)


@pytest.fixture(scope="module")
def larger() -> tuple[Any, Pipeline]:
    theirs = deepfloyd.super_resolution()
    return theirs, Pipeline.from_diffusers(theirs)


def mask(seed: int = 0, width: int = 20, height: int = 14) -> Image.Image:
    noise = np.random.default_rng(seed + 9).integers(0, 256, (height // 2, width // 2), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


WIDE, TALL = picture(4, 20, 14), picture(5, 14, 30)
LARGE = torch.rand(1, 3, 16, 20, generator=generator(3)) * 2 - 1
TENSOR_MASK = (torch.rand(1, 1, 16, 20, generator=generator(4)) > 0.5).float()
TWO: Options = {"prompt": [PROMPT, "a cat"], "image": [picture(1, 20, 14), picture(2, 20, 14)]}
IMAGES: dict[str, tuple[str, Options]] = {
    "from a picture": ("IFImg2ImgPipeline", {"image": WIDE}),
    "from a tall picture": ("IFImg2ImgPipeline", {"image": TALL, "strength": 0.4, "num_inference_steps": 5}),
    "from a tensor": ("IFImg2ImgPipeline", {"image": LARGE, "strength": 1.0}),
    "from pictures": ("IFImg2ImgPipeline", {**TWO, "num_images_per_prompt": 2}),
    "from pictures of generators": (
        "IFImg2ImgPipeline",
        {**TWO, "generator": "list", "negative_prompt": [NEGATIVE, ""]},
    ),
    "from a picture at times": ("IFImg2ImgPipeline", {"image": WIDE, "timesteps": [900, 500, 20]}),
    "from a picture by embeds": ("IFImg2ImgPipeline", {**EMBEDS, "image": WIDE, "guidance_scale": 1.0}),
    "inpainting": ("IFInpaintingPipeline", {"image": WIDE, "mask_image": mask()}),
    "inpainting a tensor": ("IFInpaintingPipeline", {"image": LARGE, "mask_image": TENSOR_MASK, "strength": 0.7}),
    "inpainting several": (
        "IFInpaintingPipeline",
        {**TWO, "mask_image": [mask(1), mask(2)], "num_images_per_prompt": 2, "strength": 0.7},
    ),
    "inpainting of generators": (
        "IFInpaintingPipeline",
        {"image": WIDE, "mask_image": mask(), "num_images_per_prompt": 2, "generator": "list"},
    ),
}
LARGER: dict[str, tuple[str, Options]] = {
    "from a picture": ("IFImg2ImgSuperResolutionPipeline", {"original_image": WIDE}),
    "from a tall picture": ("IFImg2ImgSuperResolutionPipeline", {"original_image": TALL, "noise_level": 30}),
    "from a tensor": ("IFImg2ImgSuperResolutionPipeline", {"original_image": LARGE, "strength": 1.0}),
    "several": (
        "IFImg2ImgSuperResolutionPipeline",
        {
            "prompt": [PROMPT, "a cat"],
            "image": [picture(1), picture(2)],
            "original_image": TWO["image"],
            "num_images_per_prompt": 2,
        },
    ),
    "inpainting": ("IFInpaintingSuperResolutionPipeline", {"original_image": WIDE, "mask_image": mask()}),
    "inpainting of generators": (
        "IFInpaintingSuperResolutionPipeline",
        {"original_image": LARGE, "mask_image": TENSOR_MASK, "num_images_per_prompt": 2, "generator": "list"},
    ),
}
QUICK = ("from a tall picture", "inpainting several", "inpainting")


def quick(cases: dict[str, Any]) -> list[Any]:
    return [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in cases]


@pytest.mark.parametrize("case", quick(IMAGES))
def test_pictures_and_masks_equal_diffusers(case: str, peer: Any) -> None:
    name, options = IMAGES[case]
    theirs = deepfloyd.of_class(name, peer)
    both(Pipeline.from_diffusers(theirs), theirs, **options)


@pytest.mark.parametrize("case", quick(LARGER))
def test_super_resolution_of_originals_equals_diffusers(case: str, larger: tuple[Any, Pipeline]) -> None:
    name, options = LARGER[case]
    theirs = deepfloyd.of_class(name, larger[0])
    both(Pipeline.from_diffusers(theirs), theirs, **{"image": picture(), **options})


@pytest.mark.full
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("enlarges", [False, True])
def test_grid_from_pictures_equals_diffusers(
    enlarges: bool, masked: bool, peer: Any, larger: tuple[Any, Pipeline]
) -> None:
    kind = "Inpainting" if masked else "Img2Img"
    theirs = deepfloyd.of_class(f"IF{kind}{'SuperResolution' * enlarges}Pipeline", larger[0] if enlarges else peer)
    ours, name = Pipeline.from_diffusers(theirs), "original_image" if enlarges else "image"
    small = {"image": picture()} if enlarges else {}
    grid: dict[str, list[Any]] = {
        name: [WIDE, LARGE],
        "strength": [None, 0.4, 1.0],
        "guidance_scale": [None, 1.0, 4.0],
        "negative_prompt": [None, NEGATIVE],
        "num_images_per_prompt": [1, 2],
        "timesteps": [None, [900, 500, 20]],
        "generator": [None, "list"],
        "noise_level": [None, 999] if enlarges else [None],
    }
    ran = 0
    for values in itertools.product(*grid.values()):
        options = {name: value for name, value in zip(grid, values, strict=True) if value is not None}
        if options.get("generator") == "list" and options["num_images_per_prompt"] != 2:
            continue
        if masked:
            options["mask_image"] = TENSOR_MASK if options[name] is LARGE else mask()
        both(ours, theirs, **small, **options)
        ran += 1
    assert ran == 216 * (1 + enlarges)


def test_defaults_are_those_of_diffusers_pipelines(pipe: Pipeline, larger: tuple[Any, Pipeline]) -> None:
    def defaults(ours: Pipeline, **options: Any) -> tuple[Any, ...]:
        request = ours.stages.complete(Request(PROMPT, **options))
        return request.num_inference_steps, request.guidance_scale, request.strength, request.noise_level

    small = {"image": picture(), "original_image": WIDE}
    assert defaults(pipe) == (100, 7.0, 1.0, None)
    assert defaults(pipe, image=WIDE) == (80, 10.0, 0.7, None)
    assert defaults(pipe, image=WIDE, mask_image=mask()) == (50, 7.0, 1.0, None)
    assert defaults(larger[1], image=picture()) == (50, 4.0, 1.0, 250)
    assert defaults(larger[1], **small) == (50, 4.0, 0.8, 250)
    assert defaults(larger[1], **small, mask_image=mask()) == (100, 4.0, 0.8, 0)


def test_pictures_share_steps_with_text(pipe: Pipeline) -> None:
    queries: list[Options] = [
        {"prompt": PROMPT, "width": 24, "height": 16, "seed": 1},
        {"prompt": "a cat", "image": WIDE, "strength": 0.7, "seed": 2},
        {"prompt": "a cat", "image": WIDE, "mask_image": mask(), "seed": 3, "guidance_scale": 1.0},
    ]
    more: Options = {"num_inference_steps": 4, "output_type": "np"}
    with Session(pipe, max_batch=4) as session:
        together = [session.submit(**query, **more) for query in queries]
        for future, query in zip(together, queries, strict=True):
            assert np.abs(future.result().images - pipe(**query, **more).images).max() < 1e-4


def test_command_repaints_by_both_stages(
    folder: Path, larger: tuple[Any, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    larger[0].save_pretrained("second")
    for name, image in {"small": picture(), "cat": WIDE, "mask": mask()}.items():
        image.save(f"{name}.png")
    shared = ("--mask", "mask.png", "--steps", "2")
    done = run("generate", PROMPT, "-m", str(folder), "--image", "cat.png", *shared, "-o", "a.png")
    assert done.exit_code == 0, done.stderr
    original = ("--image", "small.png", "--original-image", "cat.png")
    done = run("generate", PROMPT, "-m", "second", *original, *shared, "-o", "b.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("a.png").size == Image.open("b.png").size == (24, 16)


def test_server_enlarges_an_original(larger: tuple[Any, Pipeline]) -> None:
    names = {"image": picture(), "original_image": WIDE}
    files = {name: (f"{name}.png", clients.file(image)) for name, image in names.items()}
    fields = {"prompt": PROMPT, "seed": "3", "num_inference_steps": "2", "strength": "0.9"}
    with clients.client(larger[1]) as http:
        answer = http.post("/v1/images/edits", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    made = clients.picture(answer.json()["data"][0]["b64_json"])
    expected = larger[1](PROMPT, **names, seed=3, num_inference_steps=2, strength=0.9).images[0]
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected).astype(int)).max() <= 1
