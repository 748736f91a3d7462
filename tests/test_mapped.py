"""fastldm/loading/mapped.py: files that change under a model that was loaded from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from fastldm import CheckpointError, Pipeline
from fastldm.loading.spec import DEFAULT_MODEL

SMALL = {"prompt": "a cat", "num_inference_steps": 1, "seed": 0, "height": 32, "width": 32, "output_type": "np"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in float32: as it is loaded, nothing of it is copied."""
    folder = tmp_path_factory.mktemp("model") / "float32"
    shutil.copytree(DEFAULT_MODEL, folder)
    for file in folder.rglob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def weights_of(folder: Path) -> Path:
    return next((folder / "unet").glob("*.safetensors"))


def overwrite(file: Path) -> None:
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(len(content) // 2)
        opened.write(bytes(64))


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


CHANGES: dict[str, Callable[[Path], object]] = {
    "written into": overwrite,
    "saved again": lambda file: file.write_bytes(file.read_bytes()),
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": append,
}


@pytest.mark.parametrize("change", CHANGES)
def test_next_request_refuses_overwritten_file(folder: Path, change: str) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype="float32", device="cpu")
    file = weights_of(folder)
    CHANGES[change](file)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"^{file} was overwritten after the model was loaded[^\n]*$"):
            pipe.session.submit(**SMALL)


def test_replaced_and_removed_files_do_not_matter(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype="float32", device="cpu")
    before = pipe(**SMALL).images
    file = weights_of(folder)
    new = tmp_path / "new.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, new)
    new.replace(file)
    assert (pipe(**SMALL).images == before).all()
    shutil.rmtree(folder)
    assert (pipe(**SMALL).images == before).all()


def test_converted_weights_do_not_depend_on_files(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, dtype="bfloat16", device="cpu")
    before = pipe(**SMALL).images
    os.truncate(weights_of(folder), 100)
    assert (pipe(**SMALL).images == before).all()


def test_server_survives_truncated_file(folder: Path) -> None:
    """It would be killed by SIGBUS if it read on."""
    code = f"""
import os
from fastldm import CheckpointError, Pipeline
pipe = Pipeline.from_pretrained({str(folder)!r}, dtype="float32", device="cpu")
os.truncate({str(weights_of(folder))!r}, 4096)
try:
    pipe("a cat", num_inference_steps=1)
except CheckpointError as error:
    print("refused")
pipe.session.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
