"""Where the loop starts: which picture goes to which, and whose noise is whose. Generators: see test_peer_pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pipeline_judge as judge
import pytest

from fastldm import InputError, Pipeline

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return judge.pair("inpainting")[1]


@pytest.mark.parametrize("mask", [False, True])
def test_batched_starts_match_single_starts(pipe: Pipeline, mask: bool) -> None:
    """With seeds: picture k starts from image k modulo n, and draws what it would alone."""
    images, masks = [judge.image(1), judge.image(2)], [judge.mask(8), judge.mask(24)]

    def inputs(k: int | None) -> dict[str, Any]:
        image = images if k is None else images[k % 2]
        mask_image = {"mask_image": masks if k is None else masks[k % 2]} if mask else {}
        return {"image": image, **mask_image, **OPTIONS}

    batch = pipe(["a cat", "a dog"], num_images_per_prompt=2, seed=5, strength=0.6, **inputs(None)).images
    for k, prompt in ((1, "a cat"), (2, "a dog")):
        alone = pipe(prompt, seed=5 + k, strength=0.6, **inputs(k)).images
        np.testing.assert_allclose(batch[k], alone[0], atol=1e-3)
    assert np.abs(batch[0] - batch[1]).max() > 0.1


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_image_counts_must_divide_the_batch(pipe: Pipeline, name: str) -> None:
    images = {"image": judge.image(), "mask_image": judge.mask()}
    images[name] = [images[name]] * 3
    with pytest.raises(InputError, match=f"^{name} holds 3 pictures for a batch of 4"):
        pipe(["a", "b"], num_images_per_prompt=2, **images, **OPTIONS)


def test_latents_beside_an_image_are_the_start(pipe: Pipeline) -> None:
    start = judge.noise(1, 4, 8, 8)
    first, second = (
        pipe("a cat", latents=start, image=judge.image(k), strength=0.5, **OPTIONS, seed=0).images for k in (1, 2)
    )
    assert np.array_equal(first, second), "of the image the size is all that counts"
