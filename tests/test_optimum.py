"""A whole bundle as another tool reads it: optimum's pipelines on ONNX Runtime, in an environment of their own, since
optimum-onnx needs a transformers that is older than ours. Opt-in: FASTLDM_TEST_OPTIMUM=1 (installs 1.5 GB once)."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import bundles
import numpy as np
import platformdirs
import pytest
import torch
from filelock import FileLock

from fastldm import Pipeline

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif("FASTLDM_TEST_OPTIMUM" not in os.environ, reason="opt-in: set FASTLDM_TEST_OPTIMUM=1"),
]
PINS = ["optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "diffusers==0.36.0", "onnxruntime==1.31.1"]
TORCH = "torch==2.13.0"
REQUEST = {"negative_prompt": "blue", "height": 16, "width": 24, "num_inference_steps": 4, "guidance_scale": 5.0}
SCRIPT = """
import sys
import numpy, torch
from optimum.onnxruntime import {kind}
folder, latents, out = sys.argv[1:]
pipe = {kind}.from_pretrained(folder, provider="CPUExecutionProvider")
made = pipe("a red apple", latents=torch.from_numpy(numpy.load(latents)), output_type="np", **{request!r})
numpy.save(out, made.images[0])
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """Of an environment that is made once a machine."""
    folder = Path(platformdirs.user_cache_dir("fastldm"), "tests", "optimum-onnx-0.1.0")
    folder.parent.mkdir(parents=True, exist_ok=True)
    matches = folder / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").exists():
            venv.create(folder, clear=True, with_pip=True)
            pip = [matches, "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, TORCH], check=True)
            subprocess.run([*pip, TORCH, *PINS], check=True)
            (folder / "ready").touch()
    return matches


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "ORTStableDiffusionPipeline"), ("sdxl", "ORTStableDiffusionXLPipeline")]
)
def test_optimum_makes_the_same_picture(
    family: str, kind: str, python: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, out = bundles.exported(family, False, bundles.shared(tmp_path_factory))
    latents = torch.randn(1, 4, 8, 12)  # not square
    np.save(tmp_path / "latents.npy", latents.numpy())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [
            *(python, "-c", SCRIPT.format(kind=kind, request=REQUEST), out),
            *(tmp_path / "latents.npy", tmp_path / "picture.npy"),
        ],
        capture_output=True,
        text=True,
        env=clean,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = np.load(tmp_path / "picture.npy") * 255
    pipe = Pipeline.from_pretrained(source, device="cpu", dtype="float32")
    ours = np.asarray(pipe("a red apple", latents=latents, **REQUEST).images[0]).astype(float)
    assert ours.std() > 20  # a picture, not a surface
    assert np.abs(theirs - ours).max() <= 2
