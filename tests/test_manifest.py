"""export/manifest.py: each field of a bundle's manifest is of its type, or the bundle is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import pytest

from fastldm.errors import BundleError
from fastldm.export.bundle import Bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.smallest("sd1", tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.split(model, tmp_path_factory)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        parent: Any = manifest
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = to

    return change


def _rename_network(manifest: dict[str, Any]) -> None:
    network = manifest["networks"].pop("unet_step")
    manifest["networks"]["../../unet_step"] = network


_STEP = ("networks", "unet_step")


TYPES = {
    "format": _set("format", to="2"),
    "sha256": _set("files", "scheduler/scheduler_config.json", "sha256", to="z" * 64),
    "bytes": _set("files", "scheduler/scheduler_config.json", "bytes", to=-1),
    "files": _set("files", to=[]),
    "source": _set("source", to=3),
    "options": _set("options", to={"variant": 3}),
    "dtype": _set("dtype", to="int8"),
    "opset": _set("opset", to=True),
    "split": _set("split", to="yes"),
    "weights": _set("weights", to={"unet": None}),
    "tokenizers": _set("tokenizers", to="x"),
    "config": _set("config", to=[1]),
    "config.unet": _set("config", "unet", to="x"),
    "no config.vae": lambda manifest: manifest["config"].pop("vae"),
    "channels": _set("config", "unet", "block_out_channels", to="many"),
    "index": _set("index", to=None),
    "versions": _set("versions", to={"torch": 2}),
    "networks": _set("networks", to={}),
    "a network": _set(*_STEP, to=None),
    "a network's name": _set(*_STEP, "name", to="unet"),
    "a key with ..": _rename_network,
    "inputs": _set(*_STEP, "inputs", to=[]),
    "an input": _set(*_STEP, "inputs", 0, to=1),
    "an input's name": _set(*_STEP, "inputs", 0, "name", to="smaple"),
    "an input's dtype": _set(*_STEP, "inputs", 0, "dtype", to="int32"),
    "a shape": _set(*_STEP, "inputs", 0, "shape", to=[2]),
    "a size": _set(*_STEP, "inputs", 0, "shape", 1, to=5),
    "an axis": _set(*_STEP, "inputs", 0, "shape", 0, to={"name": "batch"}),
    "an axis's least": _set(*_STEP, "inputs", 0, "shape", 0, "least", to=0),
    "an axis's order": _set(*_STEP, "inputs", 0, "shape", 0, "most", to=1),
    "an unknown network": lambda manifest: manifest["networks"].update(unet=manifest["networks"]["unet_step"]),
}


@pytest.mark.parametrize("change", TYPES.values(), ids=TYPES.keys())
def test_every_field_of_a_manifest_is_of_its_type(change: Callable[[dict[str, Any]], None], copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    bundles.sign(copy, manifest)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(copy)


def test_invalid_manifest_json_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, "[]", "{}", "\xff"):
        path.write_text(text)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Bundle.open(copy)
