"""adapters/locate.py: which file a path, a folder or a hub id means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastldm.adapters.locate import find_shipped, find_weights, shipped
from fastldm.errors import CheckpointError, InputError

FILES = ("a.safetensors", "deep/b.safetensors", "deep/c.bin", "two/x.safetensors", "two/y.safetensors", "two/notes.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """huggingface_hub's own, with "acme/adapter" in it."""
    repository = tmp_path / "hub" / "models--acme--adapter"
    for name in FILES:
        path = repository / "snapshots" / ("a" * 40) / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return tmp_path / "hub"


CHOICES: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "a.safetensors"),
    ({"weight_name": "deep/c.bin"}, "deep/c.bin"),
    ({"subfolder": "deep"}, "deep/b.safetensors"),
    ({"subfolder": "deep", "weight_name": "c.bin"}, "deep/c.bin"),
    ({"subfolder": "two", "preferred": ("none", "y.safetensors")}, "two/y.safetensors"),
    ({"subfolder": "deep", "preferred": ("c.bin",), "allow_pickle": True}, "deep/c.bin"),
)


@pytest.mark.parametrize(("options", "file"), CHOICES)
def test_files_in_folders(options: dict[str, Any], file: str, folder: Path) -> None:
    assert find_weights(folder, **options) == folder / file
    assert find_weights(folder / file) == folder / file


@pytest.mark.parametrize(("options", "file"), CHOICES)
def test_files_in_the_local_hub_cache(options: dict[str, Any], file: str, cache: Path) -> None:
    got = find_weights("acme/adapter", **options, cache_dir=cache, local_files_only=True)
    assert got == cache / "models--acme--adapter" / "snapshots" / ("a" * 40) / file


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"subfolder": "two"}, r"has 2 files \(x\.safetensors, y\.safetensors\): give weight_name"),
    ({"subfolder": "deep", "allow_pickle": True}, r"has 2 files"),
    ({"subfolder": "none"}, r"has no \.safetensors file: give weight_name"),
    ({"weight_name": "none.bin"}, r"there is no file 'none\.bin' in"),
)


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_is_not_there_is_named(options: dict[str, Any], message: str, folder: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_weights(folder, **options)
    with pytest.raises(CheckpointError, match=message):
        find_weights("acme/adapter", **options, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../b", "a\0b", "", 3, "x" * 300])
def test_names_that_lead_elsewhere(name: Any, folder: Path) -> None:
    for argument in ("weight_name", "subfolder"):
        with pytest.raises(InputError, match=f"{argument} is"):
            find_weights(folder / "deep", **{argument: name})


def test_what_does_not_exist(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist here\. Give a file, a folder"):
        find_weights(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="nor in the local hub cache"):
        find_weights("acme/other", cache_dir=cache, local_files_only=True)


def test_files_and_folders_are_found(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    assert find_weights(file) == find_weights(tmp_path) == find_weights(tmp_path, weight_name=file.name) == file
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has 2 files .*: give weight_name"):
        find_weights(tmp_path)
    preferred = tmp_path / "pytorch_lora_weights.safetensors"
    preferred.touch()
    assert find_weights(tmp_path) == preferred


def test_pickles_count_only_where_allowed(tmp_path: Path) -> None:
    (tmp_path / "old.pt").touch()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        find_weights(tmp_path)
    assert find_weights(tmp_path, allow_pickle=True) == tmp_path / "old.pt"


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="there is no file 'b'"):
        find_weights(tmp_path, weight_name="b")
    with pytest.raises(InputError, match="weight_name is for a folder"):
        find_weights(file, weight_name="b")
    with pytest.raises(CheckpointError, match="does not exist here"):
        find_weights(tmp_path / "nothing")


def test_shipped_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {*shipped("lora")} >= {"sketch", "pixel"}
    for kind in ("lora", "embedding"):
        for name, file in shipped(kind).items():
            assert find_weights(name, kind=kind) == file == find_shipped(kind, name)
    for kind, name in (("lora", "../lora/sketch"), ("embedding", "sketch"), ("control", "sketch"), (None, "sketch")):
        with pytest.raises(CheckpointError, match="does not exist here"):
            find_weights(name, kind=kind)
    (tmp_path / "sketch").touch()
    assert find_weights("sketch", kind="lora") == Path("sketch"), "what is here comes first"
