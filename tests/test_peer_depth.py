"""Depth to image beside diffusers' pipeline on the same seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import tiny
import torch
from pairs import Pairs, close, generator
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import InputError
from fastldm.loading import spec as loading


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs("sd2-v")  # whose scheduler repeats no step, as PNDM does in diffusers


def picture(width: int = 64, height: int = 64, seed: int = 1) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def depth(count: int = 1, height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(count, height, width, generator=generator(4)) * 30


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image": picture(70, 49)},
        {"depth_map": depth(), "strength": 1.0, "guidance_scale": 1.0},
        {
            "prompt": ["a cat", "two dogs"],
            "image": [picture(), picture(seed=2)],
            "depth_map": depth(2),
            "generator": "list",
        },
        {"num_images_per_prompt": 2, "generator": "list"},
        {"prompt": ["a cat", "two dogs"], "image": [picture(), picture(seed=2)], "num_images_per_prompt": 2},
        {"eta": 1.0, "negative_prompt": "blurry", "strength": 0.6},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_depth_to_image_matches_diffusers(pipes: Any, options: dict[str, Any]) -> None:
    theirs, ours = pipes("sd2-depth")
    options = {"prompt": "a cat", "image": picture(), "num_inference_steps": 3, "output_type": "np", **options}
    many = options.pop("generator", None) == "list"

    def draws() -> Any:
        return [generator(1), generator(2)] if many else generator()

    close(ours(**options, generator=draws()).images, theirs(**options, generator=draws()).images)


def test_folder_has_its_depth_estimator(pipes: Any, tmp_path: Path) -> None:
    _, ours = pipes("sd2-depth")
    loaded = Pipeline.from_pretrained(tiny.save_pipeline("sd2-depth", tmp_path), dtype="float32")
    assert loaded.family.name == "sd2-depth"
    options = {"image": picture(), "num_inference_steps": 2, "sampler": "ddim", "output_type": "np", "seed": 3}
    assert np.array_equal(loaded("a cat", **options).images, loaded("a cat", **options).images)
    estimate = loaded.stages.spec.checkpoint.depth([picture()], torch.device("cpu"))  # type: ignore[misc]
    own = ours.stages.spec.checkpoint.depth([picture()], torch.device("cpu"))  # type: ignore[misc]
    assert torch.allclose(estimate, own, atol=1e-5)
    given = loaded("a cat", **options, depth_map=estimate).images
    assert np.abs(given - loaded("a cat", **options).images).max() < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("split", [True, False])
def test_bundle_takes_the_estimator_with_it(split: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of a folder, and of an adopted pipeline."""
    bundles.expect_images("sd2-depth", split, "onnxruntime", tmp_path_factory)
    source, bundle = bundles.exported("sd2-depth", split, bundles.shared(tmp_path_factory))
    options: dict[str, Any] = {"image": picture(16, 16), "num_inference_steps": 2, "output_type": "np", "seed": 3}
    folders = [source, bundle]
    if split:
        adopted = Pipeline.from_diffusers(tiny.peer("diffusers").DiffusionPipeline.from_pretrained(source))
        folders.append(adopted.export(tmp_path_factory.mktemp("adopted") / "bundle", split=True))
    expected, *made = (
        Pipeline.from_pretrained(path, backend=backend, device="cpu", dtype="float32")("a cat", **options).images
        for path, backend in zip(folders, ("torch", "onnxruntime", "onnxruntime"), strict=False)
    )
    assert max(np.abs(images - expected).max() for images in made) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "reads the depth of an image"),
        ({"mask_image": picture()}, "mask_image was given"),
        ({"depth_map": torch.ones(1, 8, 8)}, "depth_map is flat"),
        ({"depth_map": depth(2)}, "holds 2 maps for a batch of 1"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "image is latents, whose depth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_depth_to_image_lacks_is_named(pipes: Any, options: dict[str, Any], message: str) -> None:
    _, ours = pipes("sd2-depth")
    with pytest.raises(InputError, match=message):
        ours("a cat", **{"image": picture(), **options})


def test_depth_map_is_refused_elsewhere(pipes: Any) -> None:
    _, ours = pipes("sd1")
    with pytest.raises(InputError, match="only models of depth to image"):
        ours("a cat", image=picture(), depth_map=depth())


def test_single_file_of_depth_to_image_is_known(tmp_path: Path) -> None:
    from original_layout import full_size, write_sparse

    write_sparse(tmp_path / "model.safetensors", full_size("sd2-depth"))
    spec = loading.describe(tmp_path / "model.safetensors")
    assert (spec.family.name, spec.schedule.prediction_type, spec.unet.in_channels) == ("sd2-depth", "epsilon", 5)
    assert spec.checkpoint.depth is None
