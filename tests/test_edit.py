"""Models that edit an image, by its latents and two guidance scales: InstructPix2Pix, held against diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import diffusers
import pipeline_judge as judge
import pytest
import tiny
import torch
from original_layout import ldm_unet, ldm_vae, openai_clip, random_state
from pipeline_judge import Case
from safetensors.torch import save_file

from fastldm import Pipeline, Request
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import spec as loading
from fastldm.runtime.stages import Stages

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

CASES = [
    Case("edit", (("prompt", "list"), ("num_images_per_prompt", "2"))),
    Case("edit", (("image", "latents"), ("image_guidance_scale", "1"))),
    Case("edit", (("image_guidance_scale", "0.5"), ("negative_prompt", "text"))),
    Case("edit", (("generator", "list"), ("eta", "0.5"))),
    Case("edit", (("prompt_embeds", "tensor"), ("negative_prompt_embeds", "tensor"))),
    Case("SDXL edit", (("num_images_per_prompt", "2"), ("image_guidance_scale", "4"))),
    Case("SDXL edit", (("guidance_scale", "1"), ("latents", "tensor"))),
    Case("SDXL edit", (("guidance_rescale", "0.7"), ("original_size", "pair"))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_edits_equal_diffusers(case: Case) -> None:
    verdict = judge.judge(case)
    assert verdict.kind == "agree", verdict.detail


def test_noise_is_the_only_draw_before_the_steps() -> None:
    """The image's latents are the posterior's mode: with the same generator, text and image alike."""
    theirs, ours = tiny.pipeline("sd1-edit"), Pipeline.from_diffusers(tiny.pipeline("sd1-edit"))
    options: dict[str, Any] = {"num_inference_steps": 4, "image": judge.image(), "output_type": "latent"}
    for batch in (1, 2):
        generators = [[torch.Generator().manual_seed(k) for k in range(batch)] for _ in range(2)]
        options |= {"prompt": ["make it snow"] * batch}
        expected = theirs(**options, generator=generators[0]).images
        got = ours(**options, generator=generators[1], literal_prompt=True).images
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        for mine, their in zip(*generators, strict=True):
            assert torch.equal(mine.get_state(), their.get_state())


def test_sizes_are_those_of_diffusers() -> None:
    """SD takes the image's, SDXL its own."""
    image = judge.image().resize((80, 48))
    for family, size in (("sd1-edit", (48, 80)), ("sdxl-edit", (64, 64))):
        pipe = Pipeline.from_diffusers(tiny.pipeline(family))
        request = pipe.stages.complete(Request("make it snow", image=image))
        assert (request.height, request.width) == size
        assert (request.image_guidance_scale, request.strength) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "edits an image: give it image"),
        ({"mask_image": judge.mask()}, "edits all of image"),
        ({"strength": 0.5}, "strength is 0.5: this model edits image from noise"),
        ({"sampler": "euler cfg++"}, "this model has two guidance scales"),
        ({"image_guidance_scale": -1.0}, "image_guidance_scale is -1"),
    ],
)
def test_what_edits_do_not_read_is_refused(options: dict[str, Any], message: str) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1-edit"))
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "make it snow", "image": judge.image(), **options})


def test_other_models_refuse_an_image_guidance_scale() -> None:
    with pytest.raises(InputError, match="only InstructPix2Pix reads it"):
        Pipeline.from_diffusers(tiny.pipeline("sd1"))("a cat", image_guidance_scale=1.5)


def test_graphs_have_the_third_branch(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundles.expect_images("sd1-edit", True, "onnxruntime-graph", tmp_path_factory, whole_picture=True)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "openvino-graph"])
@pytest.mark.parametrize("family", tiny.EDITS)
def test_bundles_make_the_same_images(family: str, backend: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    graph = {"whole_picture": True} if backend.endswith("-graph") else {}
    bundles.expect_images(family, bool(graph), backend, tmp_path_factory, **graph)


def test_folders_and_files_are_recognised(tmp_path: Path) -> None:
    folder = tiny.save_pipeline("sd1-edit", tmp_path / "folder")
    assert loading.describe(folder).family.name == "sd1-edit"
    clip = openai_clip("cond_stage_model.transformer.", 64, 1, vocabulary=99)
    shapes = ldm_unet(64, (1,), (1,), 64, in_channels=8, layers=1) | ldm_vae(32, (1,), layers=1) | clip
    save_file(random_state(shapes), tmp_path / "single.safetensors")
    assert loading.describe(tmp_path / "single.safetensors").family.name == "sd1-edit"
    plain = diffusers.StableDiffusionPipeline(**tiny.pipeline("sd1-edit").components, requires_safety_checker=False)
    with pytest.raises(CheckpointError, match="has 8 input channels: it is Marigold, or another"):
        Pipeline.from_diffusers(plain)


def test_cosxl_edits_scale_the_image() -> None:
    theirs = tiny.pipeline("sdxl-edit")
    theirs.register_to_config(is_cosxl_edit=True)
    theirs.is_cosxl_edit = True
    ours = Pipeline.from_diffusers(theirs)
    options: dict[str, Any] = {"prompt": "make it snow", "image": judge.image(), "num_inference_steps": 3}
    options |= {"height": 64, "width": 64, "output_type": "latent"}
    expected = theirs(**options, generator=torch.Generator().manual_seed(0)).images
    got = ours(**options, generator=torch.Generator().manual_seed(0), literal_prompt=True).images
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_memory_counts_the_third_row() -> None:
    from fastldm.planning.memory import Workload

    stages: Stages = Pipeline.from_diffusers(tiny.pipeline("sd1-edit")).stages
    for scales, rows in (((7.5, 1.5), 6), ((7.5, 0.5), 2), ((1.0, 1.5), 2)):
        options: dict[str, Any] = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
        request = stages.complete(Request(["make it snow"] * 2, image=judge.image(), **options))
        assert Workload.of_request(stages, request).step_rows == rows
