"""Bundles of models beyond Stable Diffusion's: without a prompt, with classes, and the latent x2 upscaler. Their
pictures are held against diffusers'."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command import run
from other_networks import latent_upscaler
from pairs import close
from PIL import Image

from fastldm import InputError, Pipeline
from fastldm.export.bundle import Bundle
from fastldm.loading import spec as loading

pytest.importorskip("fastldm.export.onnx", reason="exporting needs fastldm[onnx]", exc_type=ImportError)
writing: Any = pytest.importorskip("fastldm.export.writing")
BACKENDS = ["onnxruntime", "openvino"]


def photo(seed: int = 1, side: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


X2 = "StableDiffusionLatentUpscalePipeline"
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "DDPMPipeline": [{"batch_size": 2}],
    "DDIMPipeline": [{"batch_size": 2, "eta": 0.7}],
    "ConsistencyModelPipeline": [{"class_labels": [3, 9], "batch_size": 2}],
    "LDMPipeline": [{"batch_size": 2, "eta": 0.5}],
    "LDMSuperResolutionPipeline": [{"image": photo(), "eta": 1.0}],
    X2: [{"prompt": "a cat", "image": photo(side=64)}, {"prompt": "a cat", "image": photo(2, 64), "guidance_scale": 0}],
}


def judge(name: str) -> Any:
    return latent_upscaler() if name == X2 else tiny.plain(name)


def bundle(name: str, split: bool, folder: Path) -> tuple[Path, Path]:
    """The model's folder, and that of its bundle."""
    source, out = folder / name, folder / f"{name} {split}"
    judge(name).save_pretrained(source)
    writing.export(loading.describe(source), out, source=str(source), split=split)
    return source, out


@pytest.mark.full
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", [*REQUESTS])
def test_bundle_makes_diffusers_pictures(name: str, split: bool, tmp_path: Path) -> None:
    """Also where the model that it was exported from is gone."""
    source, out = bundle(name, split, tmp_path)
    verified = run("verify", str(out), "--dtype", "float32")
    assert verified.exit_code == 0, verified.stderr
    shutil.rmtree(source)
    theirs = judge(name)
    for backend in BACKENDS:
        pytest.importorskip(backend)
        ours = Pipeline.from_pretrained(out, backend=backend, device="cpu", dtype="float32")
        for request in REQUESTS[name]:
            images = []
            for each in (ours, theirs):
                torch.manual_seed(3)
                call = {"num_inference_steps": 3, "output_type": "np", **request}
                images.append(each(**call, generator=torch.default_generator).images)
            close(*images)


@pytest.mark.full
def test_bundle_has_classes_and_a_learned_variance(tmp_path: Path) -> None:
    """As of ADM: resnets that scale and resize, classes, and twice the channels. PyTorch is the judge."""
    changes = {"num_class_embeds": 7, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}
    changes |= {"downsample_type": "resnet", "upsample_type": "resnet", "out_channels": 6}
    scheduler = tiny.peer("diffusers").DDPMScheduler(variance_type="learned_range")
    tiny.plain("DDPMPipeline", unet=tiny.plain_unet(**changes), scheduler=scheduler).save_pretrained(tmp_path / "adm")
    expected = None
    for split in (None, False, True):
        path = tmp_path / "adm"
        if split is not None:
            path = tmp_path / f"out {split}"
            writing.export(loading.describe(tmp_path / "adm"), path, source=str(tmp_path / "adm"), split=split)
        backend = "torch" if split is None else "onnxruntime"
        pipe = Pipeline.from_pretrained(path, backend=backend, device="cpu", dtype="float32")
        made = pipe(class_labels=[6, 2], batch_size=2, seed=4, num_inference_steps=3, output_type="np").images
        expected = made if expected is None else expected
        close(made, expected)
        other = pipe(class_labels=[6, 3], batch_size=2, seed=4, num_inference_steps=3, output_type="np").images
        assert np.abs(other[0] - expected[0]).max() < 1e-3 < np.abs(other[1] - expected[1]).max()


@pytest.mark.full
def test_what_a_plain_bundle_is_not_is_named(tmp_path: Path) -> None:
    _, out = bundle("DDPMPipeline", True, tmp_path)
    written = Bundle.open(out)
    assert [*written.specs] == ["time_rows", "unet_step"]
    assert set(written.manifest["config"]) == {"unet", "scheduler"}
    pipe = Pipeline.from_pretrained(out, backend="onnxruntime", device="cpu")
    for options, message in (
        ({"prompt": "a cat"}, "reads no text"),
        ({"width": 12, "height": 7}, "this bundle runs 4x4 to 32x32"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(num_inference_steps=1, **options)
    made = pipe(batch_size=2, seed=[3, 4], num_inference_steps=2, output_type="np").images
    assert np.abs(made[1] - pipe(seed=4, num_inference_steps=2, output_type="np").images[0]).max() < 1e-3
    done = run("generate", "-m", str(out), "--backend", "onnxruntime", "--steps", "2", "-o", str(tmp_path / "a.png"))
    assert done.exit_code == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_browsers_run_what_reads_text_alone(tmp_path: Path) -> None:
    for name in ("DDPMPipeline", X2):
        judge(name).save_pretrained(tmp_path / name)
        done = run("export", "--to", "web", "-m", str(tmp_path / name), str(tmp_path / "out"))
        assert done.exit_code
        assert "--to web runs" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "reason"), [("DDPMPipeline", "'clip'"), (X2, "reads a small picture")])
def test_graphs_that_would_lack_something_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    judge(name).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=f"whole_picture: the family .*{reason}.*: leave it out"):
        writing.export(loading.describe(tmp_path / name), tmp_path / "out", source=None, whole_picture=True)


@pytest.mark.full
@pytest.mark.parametrize("name", ["LDMPipeline", "LDMSuperResolutionPipeline", "DDIMPipeline"])
def test_whole_pictures_equal_diffusers(name: str, tmp_path: Path) -> None:
    """Of DDIM's pixels with a sampler that clamps nothing: the graph needs neither text nor decoder."""
    diffusers = tiny.peer("diffusers")
    replaced = {"scheduler": diffusers.DDIMScheduler(clip_sample=False)} if name == "DDIMPipeline" else {}
    theirs = tiny.plain(name, **replaced)
    theirs.save_pretrained(tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "out"
    writing.export(loading.describe(source), out, source=str(source), whole_picture=True)
    for backend in BACKENDS:
        pytest.importorskip(backend)
        verified = run("verify", str(out), "--dtype", "float32", "--backend", backend)
        assert verified.exit_code == 0, verified.stderr
        ours = Pipeline.from_pretrained(out, backend=f"{backend}-graph", device="cpu", dtype="float32")
        images = []
        for each in (ours, theirs):
            torch.manual_seed(3)
            call = {"num_inference_steps": 3, "output_type": "np", **REQUESTS[name][0]}
            images.append(each(**call, generator=torch.default_generator).images)
        close(*images)
