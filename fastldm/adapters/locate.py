"""Where an adapter's file is: a path, a file in a folder, one that ships, or a file of a hub repository."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastldm import checks
from fastldm.checks import show
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import hub
from fastldm.loading.spec import check_options
from fastldm.reading import check_path

Kind = Literal["lora", "embedding", "control"]
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "adapters"
"""What ships for the default model: lora/NAME.safetensors, embedding/NAME.safetensors, and the folders control/NAME."""
PREFERRED = ("pytorch_lora_weights.safetensors",)
"""What diffusers calls the file, where a folder has several."""


def shipped(kind: Kind) -> dict[str, Path]:
    """What ships of a kind, by name."""
    return {path.stem: path for path in sorted((SHIPPED / kind).glob("*"))}


def find_shipped(kind: Kind, path_or_id: str | os.PathLike[str]) -> Path:
    """What ships under a name. CheckpointError for any other, which no file or folder here has either."""
    found = shipped(kind)
    if str(path_or_id) in found:
        return found[str(path_or_id)]
    names = f", or the name of one that ships for the default model: {', '.join(found)}" if found else ""
    raise CheckpointError(f"{path_or_id} does not exist here. Give a file, a folder, a hub id (owner/name){names}.")


def find_weights(
    path_or_id: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    kind: Kind | None = None,
    preferred: Sequence[str] = PREFERRED,
    allow_pickle: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file of an adapter. weight_name: its name in a folder or repository, or in a subfolder there; else there has
    to be only one, or one of the preferred, which diffusers would have written. kind: of what ships, which is found by
    name where nothing here has it.

    CheckpointError for what does not exist, or holds several files. InputError for a name that leaves the folder.
    """
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    check_options({"allow_pickle": allow_pickle, **where})
    path = check_path(path_or_id, "path_or_id")
    for name, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        if value is not None:
            name_inside(name, value, path_or_id)
    if path.is_file():
        if weight_name is not None:
            raise InputError(f"{path} is a file: weight_name is for a folder or a hub id")
        return path
    if kind is not None and not path.exists() and not hub.is_id(str(path_or_id)):
        return find_shipped(kind, path_or_id)
    if path.is_dir():
        return _in_folder(path / (subfolder or ""), weight_name, preferred, allow_pickle)
    prefix = "" if subfolder is None else f"{Path(subfolder).as_posix()}/"

    def choose(files: list[str]) -> list[str]:
        inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        return [prefix + _choose(inside, weight_name, preferred, allow_pickle, f"{path_or_id}/{prefix}".rstrip("/"))]

    return hub.find_files(str(path_or_id), choose, **where)[0]


def name_inside(name: str, value: str, path_or_id: str | os.PathLike[str]) -> str:
    """The name of a file or folder in a folder or repository, with "/" between its parts. InputError for one that
    leaves it."""
    checks.short_text(name, value, "a name in the folder")
    parts = Path(value).parts
    if not parts or Path(value).is_absolute() or ".." in parts or not value.isprintable():
        raise InputError(f"{name} is {show(value)}: expected a name in {path_or_id}")
    return Path(value).as_posix()


def _in_folder(folder: Path, weight_name: str | None, preferred: Sequence[str], allow_pickle: bool) -> Path:
    if weight_name is not None:
        file = folder / weight_name
        if not file.is_file():
            raise CheckpointError(f"there is no file {show(weight_name)} in {folder}.")
        return file
    files = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return folder / _choose(files, None, preferred, allow_pickle, str(folder))


def _choose(
    files: list[str], weight_name: str | None, preferred: Sequence[str], allow_pickle: bool, source: str
) -> str:
    if weight_name is not None:
        if weight_name not in files:
            raise CheckpointError(f"there is no file {show(weight_name)} in {source}.")
        return weight_name
    endings = (".safetensors", *((".bin", ".pt") if allow_pickle else ()))
    found = sorted(name for name in files if name.endswith(endings) and "/" not in name)
    for name in preferred:
        if name in found:
            return name
    if len(found) != 1:
        some = "no .safetensors file" if not found else f"{len(found)} files ({', '.join(found[:5])})"
        raise CheckpointError(f"{source} has {some}: give weight_name, the name of the adapter's file.")
    return found[0]
