"""The bundles in fastldm's cache that `fastldm prepare` made of models, and which model each is of.

    bundles/NAME-DIGEST/     a bundle
    prepared/DIGEST.json     for a model as users name it: its bundle, and what its files were then

A model whose files have another size or time since, or whose configs differ, is no longer the one that was prepared.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastldm.errors import BundleError, CheckpointError
from fastldm.export import auto
from fastldm.export.bundle import Bundle, as_json, identity
from fastldm.export.engine import is_bundle
from fastldm.export.manifest import write_json
from fastldm.loading import spec as loading
from fastldm.loading.spec import Spec
from fastldm.system import cache_root

logger = logging.getLogger("fastldm")

PICTURES = 10
"""Whoever prepares a model wants many of them: loading counts once in so many."""


def source_of(model: str) -> str:
    """The name by which a model is found again: "default", a hub id, or an absolute path."""
    return str(Path(model).absolute()) if model != "default" and Path(model).exists() else model


def folder_for(spec: Spec, source: str) -> Path:
    """Where the bundle of a model goes."""
    digest = hashlib.sha256(json.dumps(identity(spec), sort_keys=True).encode()).hexdigest()
    return cache_root() / "bundles" / f"{Path(source).name[:60]}-{digest[:12]}"


def remember(spec: Spec, model: str, options: Mapping[str, Any], bundle: Path) -> None:
    """Have `find` find a bundle for a model."""
    path = _entry(model, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"bundle": str(bundle), "model": source_of(model), "stamp": _stamp(spec)})


def find(
    model: str, options: Mapping[str, Any], device: torch.device, dtype: str | torch.dtype | None = None
) -> tuple[Path, str] | None:
    """The bundle that was prepared for a model, and its fastest backend here. None where there is none, or where the
    model itself, on PyTorch, was fastest."""
    path = _entry(model, options)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        folder = Path(data["bundle"])
        spec = loading.describe(model, **{**options, "local_files_only": True})
        if data["stamp"] != _stamp(spec):
            logger.warning("%s has changed since it was prepared: `fastldm prepare` prepares it once more", model)
            return None
        backend = auto.fastest(Bundle.read(folder), device, dtype, pictures=PICTURES) if is_bundle(folder) else None
    except (OSError, ValueError, KeyError, TypeError, CheckpointError, BundleError) as error:
        logger.warning("what was prepared of %s cannot be used (%s): it runs on PyTorch", model, error)
        return None
    return None if backend in (None, "torch") else (folder, str(backend))


def _entry(model: str, options: Mapping[str, Any]) -> Path:
    given = {name: str(value) for name, value in options.items() if value and name != "local_files_only"}
    digest = hashlib.sha256(json.dumps([source_of(model), given], sort_keys=True).encode()).hexdigest()
    return cache_root() / "prepared" / f"{digest[:40]}.json"


def _stamp(spec: Spec) -> dict[str, Any]:
    """What tells whether a model is another by now, without reading its weights."""
    checkpoint = spec.checkpoint
    files = [path for component in checkpoint.components.values() for path in component.files]
    for tokenizer in checkpoint.tokenizers.values():
        files += sorted(tokenizer.folder.iterdir()) if tokenizer.folder is not None else []
    stats = [(path, path.stat()) for path in files]
    configs = {name: component.config for name, component in checkpoint.components.items()}
    configs |= {"preprocessor": checkpoint.preprocessor} if checkpoint.preprocessor else {}
    return as_json(
        {
            "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "config": {**configs, **checkpoint.schedulers},
            "index": checkpoint.index,
        }
    )
