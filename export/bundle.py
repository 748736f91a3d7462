"""A model as a folder that other tools read and that proves itself.

    manifest.json                what it is: model, configs, dtype, opset, each network's inputs and outputs, versions,
                                 the sha256 of the weights it was made of and of every other file, and the manifest's
    unet/model.onnx, ...         the networks, each with model.onnx_data and config.json beside it
    goldens/unet.safetensors     inputs of three sizes, what PyTorch made of them in float32, and how far it is off
                                 that in each precision; picture.safetensors: the same of a whole picture
    tokenizer/, scheduler/, model_index.json

The layout is that of optimum's exports. `export.writing` makes one, `export.verify` proves it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.checks import show
from fastldm.errors import BundleError, CheckpointError
from fastldm.export import manifest as manifests
from fastldm.export.cache import hash_files
from fastldm.export.engine import MANIFEST
from fastldm.export.spec import MODEL, NetworkSpec, specs
from fastldm.loading import spec as loading
from fastldm.loading.checkpoint import Checkpoint, Component, TokenizerFiles
from fastldm.loading.formats import TOKENIZER_FILES, TOKENIZERS
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, rescale_for_half

GOLDENS, PICTURE = "goldens", "picture"


@dataclass(frozen=True)
class Bundle:
    """A bundle; one that was opened has the files that were written."""

    folder: Path
    manifest: Mapping[str, Any]
    specs: Mapping[str, NetworkSpec]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest and compare every file with its hash. BundleError for what is missing, differs, or would
        be read without a hash; nothing of the bundle has been executed by then."""
        bundle = cls.read(folder)
        known = bundle.manifest["files"]
        for name in bundle._needed():
            if name not in known:
                raise BundleError(f"{folder / MANIFEST} has no hash of {name}, which is run: export the model again")
        for name, file in known.items():
            path = folder / name
            if folder.resolve() not in path.resolve().parents:
                raise BundleError(f"{folder / MANIFEST} names {show(name)}, which is not in the bundle")
            if not path.is_file():
                raise BundleError(f"{path} is missing: export the model again, or copy the whole folder")
            if path.stat().st_size != file["bytes"]:
                raise BundleError(f"{path} has {path.stat().st_size} bytes, expected {file['bytes']}: it is damaged")
            if hash_files(path) != file["sha256"]:
                raise BundleError(f"{path} is not what was exported (its sha256 differs): it is damaged or was edited")
        return bundle

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the manifest alone: what is to be run has to be opened."""
        manifest = manifests.read(folder)
        bundle = cls(folder, manifest, {n: NetworkSpec.from_dict(one) for n, one in manifest["networks"].items()})
        try:
            model = bundle.model
        except CheckpointError as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from error
        options = {"dtype": manifest["dtype"], "split": manifest["split"]}
        manifests.check_networks(folder, bundle.specs, specs(model.unet, model.vae, model.text, **options))
        return bundle

    def _needed(self) -> set[str]:
        """The files that are read where the bundle is run or proved: networks with all that lies beside them, and may
        be weights that the graph names, and tokenizers."""
        needed = {f"{name}/{MODEL}" for name in self.specs}
        needed |= {f"{GOLDENS}/{name}.safetensors" for name in (*self.specs, PICTURE)}
        for name in (*self.specs, *TOKENIZERS):
            inside = (path for path in (self.folder / name).rglob("*") if not path.is_dir())
            needed |= {path.relative_to(self.folder).as_posix() for path in inside}
        return needed

    @cached_property
    def model(self) -> loading.Spec:
        """What it is a bundle of, as `loading.describe` says it of the model itself."""
        manifest, source = self.manifest, str(self.folder)
        configs = {name: config for name, config in manifest["config"].items() if name != "scheduler"}
        components = {
            name: Component(name, str(config.get("_class_name", name)), config, (), source)
            for name, config in configs.items()
        }
        tokenizers = {name: TokenizerFiles(self.folder / name) for name in TOKENIZERS if (self.folder / name).is_dir()}
        for name in ("unet", "vae", "text_encoder", "scheduler"):
            if name not in manifest["config"]:
                raise CheckpointError(f"'config.{name}' is missing")
        scheduler = manifest["config"]["scheduler"]
        return loading.spec_of(Checkpoint(source, components, scheduler, tokenizers, manifest["index"]))

    def path(self, network: str) -> Path:
        """The ONNX file of a network."""
        return self.folder / network / MODEL

    def goldens(self, network: str) -> Path:
        """What PyTorch made of some inputs of a network, or of a whole picture."""
        return self.folder / GOLDENS / f"{network}.safetensors"

    def hashes(self, network: str) -> dict[str, str]:
        """sha256 of the files of a network, by name."""
        folder = f"{network}/"
        files = self.manifest["files"]
        return {name.removeprefix(folder): files[name]["sha256"] for name in files if name.startswith(folder)}


@dataclass(frozen=True)
class Loaded(Component):
    """A network of a model in memory, whose weights lie in no file."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def state(self, *, to_prepare: bool = False) -> dict[str, Tensor]:
        return dict(self.tensors)


def in_memory(model: loading.Spec, modules: Mapping[str, nn.Module]) -> loading.Spec:
    """A model with the weights that its modules, by their components' names, have now."""
    components: dict[str, Component] = {}
    for name, part in model.checkpoint.components.items():
        module = modules[name]
        if isinstance(module, AutoencoderKL) and module.config.force_upcast and _is_half(module):
            module = copy.deepcopy(module).float()  # it was rescaled for the precision that it runs in
            rescale_for_half(module, -HALF_EXPONENT)
        tensors = module.state_dict()
        components[name] = Loaded(name, part.class_name, part.config, (), f"the {name} in memory", tensors=tensors)
    return replace(model, checkpoint=replace(model.checkpoint, components=components))


def identity(model: loading.Spec) -> dict[str, Any]:
    """All of a model that a picture depends on, so that two models with one identity are the same: weights and
    tokenizers by their sha256, and the configs. InputError where it has no weights."""
    checkpoint = model.checkpoint
    parts = checkpoint.components
    configs = {part: component.config for part, component in parts.items()} | {"scheduler": checkpoint.scheduler}
    return {
        "weights": {part: _hash_weights(one) for part, one in parts.items()},
        "tokenizers": {name: _hash_tokenizer(files) for name, files in checkpoint.tokenizers.items()},
        "config": as_json(configs),
        "index": as_json(checkpoint.index),
    }


def _is_half(module: nn.Module) -> bool:
    return next(module.parameters()).dtype == torch.float16


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of two identities differs, such as "the weights of unet" or "the config of scheduler"."""
    found = []
    for title in ("weights", "tokenizers", "config"):
        mine, theirs = ({name: _told(value) for name, value in given[title].items()} for given in (one, other))
        what = "files" if title == "tokenizers" else title
        found += [f"the {what} of {name}" for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    settings = [
        {key: value for key, value in _told(given["index"]).items() if _is_setting(value)} for given in (one, other)
    ]
    return [*found, *["the index"] * (settings[0] != settings[1])]


def _is_setting(value: Any) -> bool:
    """Whether an entry of a pipeline's index is one: components are lists of library and class."""
    return not isinstance(value, list | tuple)


_NOT_TOLD = ("_diffusers_version", "_name_or_path", "transformers_version", "_commit_hash", "_use_default_values")


def _told(config: Any) -> Any:
    """Without what a config says of who wrote it and where."""
    return {k: v for k, v in config.items() if k not in _NOT_TOLD} if isinstance(config, Mapping) else config


def as_json(config: Any) -> Any:
    """As a file would have it: with lists in place of tuples."""
    return json.loads(json.dumps(config, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _hash_weights(component: Component) -> str:
    if not isinstance(component, Loaded):
        found = [(path, path.stat()) for path in component.files]
        return _hash_unchanged(tuple((path, one.st_size, one.st_mtime_ns, one.st_ino) for path, one in found))
    digest = hashlib.sha256()
    for name, tensor in sorted(component.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _hash_unchanged(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Of files that are what they were by size, time and number: gigabytes, read once a process."""
    return hash_files(*(path for path, *_ in files))


def _hash_tokenizer(files: TokenizerFiles) -> str:
    """Of the files that it is read from, or of what it is otherwise."""
    if files.loaded is not None:
        with TemporaryDirectory() as folder:
            files.loaded.save_pretrained(folder)
            return _hash_tokenizer(TokenizerFiles(Path(folder)))
    digest = hashlib.sha256(repr(files.pad_token).encode())
    for name in TOKENIZER_FILES:
        path = files.folder / name if files.folder is not None else None
        if path is not None and path.is_file():
            digest.update(f"{name} {hash_files(path)}".encode())
    return digest.hexdigest()
