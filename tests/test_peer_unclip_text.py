"""Text to image by stable unCLIP, whose prior makes the vector of a picture of the prompt, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import picture_readers
import pytest
import torch
from judged import changed_copy, hub_copy, judged

from fastldm import CheckpointError, InputError, Pipeline
from fastldm.model import describe
from fastldm.planning import memory

peer, pipe, folder = judged(picture_readers.unclip_of_text)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BASE: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "a cat"},
    "negative": {"prompt": "a small cat on a mat", "negative_prompt": "bad", "noise_level": 100},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0, "noise_level": 5},
    "several": {"prompt": ["a cat", "a dog of two words"], "num_images_per_prompt": 2, "noise_level": 300},
    "eta": {"prompt": "a cat", "eta": 1.0},
}


@pytest.mark.parametrize(
    "case", [case if case == "several" else pytest.param(case, marks=pytest.mark.full) for case in CALLS]
)
def test_text_unclip_equals_diffusers(case: str, peer: Any, pipe: Pipeline) -> None:
    """With one generator, so that draws have the same order."""
    options = {**BASE, **CALLS[case]}
    theirs, ours = (np.asarray(each(generator=seeded(), **options).images) for each in (peer, pipe))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3


def test_the_vector_is_of_the_prompt(pipe: Pipeline) -> None:
    """It changes the image, and not with who shares the request."""
    options = {**BASE, "num_inference_steps": 2}
    both = np.asarray(pipe(["a cat", "a dog"], seed=[3, 4], **options).images)
    alone = np.asarray(pipe("a dog", seed=4, **options).images)
    assert np.abs(both[1:] - alone).max() < 1e-4
    far = np.asarray(pipe("a dog", seed=4, noise_level=900, **options).images)
    assert np.abs(far - alone).max() > 1e-3


def test_a_folder_has_all_that_is_read(folder: Path, tmp_path: Path, pipe: Pipeline) -> None:
    loaded = Pipeline.from_pretrained(hub_copy(folder, tmp_path), device="cpu", dtype="float32")
    assert (loaded.family.name, loaded.stages.spec.max_noise_level) == ("sd2-unclip-prior", 999)
    assert loaded.stages.weight_bytes == 4 * loaded.stages.spec.parameters
    options = {**BASE, "num_inference_steps": 2}
    ours, adopted = (np.asarray(each("a cat", seed=1, **options).images) for each in (loaded, pipe))
    assert np.abs(ours - adopted).max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "prompt_embeds was given, and this model's prior reads a prompt"),
        ({"prompt": "a cat", "image": np.zeros((64, 64, 3), np.uint8)}, "image was given"),
        ({"prompt": "a cat", "strength": 0.5}, "strength was given"),
        (
            {"prompt": "a cat", "image_embeds": torch.zeros(1, 20)},
            "image_embeds was given, and this model reads prompts",
        ),
        ({"prompt": "a cat", "noise_level": 1000}, "noise_level is 1000"),
    ],
)
def test_what_is_not_read_is_refused(fields: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**fields)


def test_plans_count_the_prior(pipe: Pipeline) -> None:
    spec, size = pipe.stages.spec, {"width": 64, "height": 64, "batch": 1}
    of_spec = memory.Workload.of_spec(spec, **size, dtype=torch.float32, arch=0)
    of_stages = memory.Workload.of_stages(pipe.stages, **size, guided=True)
    for workload in (of_spec, of_stages):
        lines = {line.name: line.bytes for line in memory.plan(workload).weights}
        prior = pipe.stages.prior
        assert prior is not None
        assert lines["prior"] >= 4 * sum(p.numel() for p in prior.model.parameters())
        assert lines["prior's text encoder"] > 0


def test_graphs_of_whole_pictures_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whole_picture: a prior makes what this model's U-Net reads"):
        pipe.export(tmp_path / "bundle", whole_picture=True)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("prior/config.json", {"added_emb_type": "sum"}, "'added_emb_type' is 'sum'"),
        ("prior/config.json", {"embedding_dim": 24}, "its components are not of one model"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 44}, "reads 44 channels"),
        ("model_index.json", {"prior": [None, None]}, "has no prior"),
        ("model_index.json", {"prior_scheduler": [None, None]}, "has no prior_scheduler"),
        ("prior_scheduler/scheduler_config.json", {"_class_name": "UnCLIPScheduler"}, "is an UnCLIPScheduler"),
        ("model_index.json", {"_class_name": "UnCLIPPipeline"}, "is a UnCLIPPipeline and has"),
    ],
)
def test_misfits_are_refused(file: str, values: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe(changed_copy(folder, tmp_path, file, values))
