"""A pipeline of diffusers, the one that adopts it, and its folder, as fixtures of a file of tests:

    peer, pipe, folder = judged(picture_readers.unclip)

And copies of such folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastldm import Pipeline
from fastldm.loading.hub import _needed_files


def judged(make: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """make: a pipeline of diffusers. They are made once a file, and no test changes them."""

    @pytest.fixture(scope="module", name="peer")
    def peer() -> Any:
        return make()

    @pytest.fixture(scope="module", name="pipe")
    def pipe(peer: Any) -> Pipeline:
        return Pipeline.from_diffusers(peer)

    @pytest.fixture(scope="module", name="folder")
    def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp(type(peer).__name__)
        peer.save_pretrained(path)
        return path

    return peer, pipe, folder


def hub_copy(folder: Path, to: Path) -> Path:
    """A folder of what a hub is asked for, `to`."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text())
    for name in _needed_files(index, names, None, False, "here"):
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, to / name)
    return to


def changed_copy(folder: Path, to: Path, file: str, values: dict[str, Any]) -> Path:
    """A folder in which a JSON file has other values, to/copy: its other folders are links."""
    copy = to / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_dir() and path.name != Path(file).parent.name:
            (copy / path.name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, copy / path.name)
        else:
            shutil.copy(path, copy / path.name)
    changed = copy / file
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **values}))
    return copy
