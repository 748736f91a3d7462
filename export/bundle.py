"""A bundle: an exported model as a folder that other tools can read, with reference outputs to verify it.

    manifest.json                model, configs, dtype, opset, each network's inputs and outputs, versions, the sha256
                                 of the original weights and of every other file, and its own sha256
    unet/model.onnx, ...         the networks, each with model.onnx_data and config.json beside it
    goldens/unet.safetensors     inputs of three sizes, PyTorch's outputs in float32, and its error in each precision;
                                 picture.safetensors has the same for a full image
    tokenizer/, scheduler/, model_index.json

The layout is that of optimum's exports. `export.writing` writes bundles, `export.verify` verifies them.
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
from torch import nn

from fastldm.adapters.control import Config, Control, check_fits, read_config
from fastldm.adapters.packing import Layout, layouts
from fastldm.checks import show
from fastldm.conditioning import depth
from fastldm.conditioning.depth import DepthEstimator
from fastldm.conditioning.text import TextStage
from fastldm.errors import BundleError, CheckpointError
from fastldm.export import manifest as manifests
from fastldm.export.cache import hash_files
from fastldm.export.engine import MANIFEST
from fastldm.export.graphs import FILES, graph_specs, weight_files
from fastldm.export.spec import MODEL, NetworkSpec, specs
from fastldm.kernels.columns import COLUMNS as GRAPH_COLUMNS
from fastldm.loading import spec as loading
from fastldm.loading.checkpoint import Checkpoint, Component, Loaded, TokenizerFiles
from fastldm.loading.formats import NOISING, PREPROCESSOR, PRIOR_SCHEDULER, SCHEDULERS, TOKENIZER_FILES, TOKENIZERS
from fastldm.models.clip import CLIPText
from fastldm.models.controlnet import ControlNetConfig
from fastldm.models.families import TEXT_ENCODERS, network_classes
from fastldm.models.vae import HALF_EXPONENT, AutoencoderKL, rescale_for_half
from fastldm.samplers.table import COLUMNS

GOLDENS, PICTURE, QUANTIZED = "goldens", "picture", "quantized"


@dataclass(frozen=True)
class Bundle:
    """A bundle. After `open`, its files are known to be unchanged."""

    folder: Path
    manifest: Mapping[str, Any]
    specs: Mapping[str, NetworkSpec]
    graphs: Mapping[str, NetworkSpec] = field(default_factory=dict)
    """Several steps and a whole picture as one network each, see `export.graphs`; empty where there are none."""

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest and compare every file with its hash, without executing anything. BundleError for files
        that are missing, differ, or would be read but have no hash."""
        bundle = cls.read(folder)
        files = bundle.manifest["files"]
        for name in bundle._needed():
            if name not in files:
                raise BundleError(f"{folder / MANIFEST} has no hash of {name}, which is run: export the model again")
        for name, file in files.items():
            path = folder / name
            if folder.resolve() not in path.resolve().parents:
                raise BundleError(f"{folder / MANIFEST} names {show(name)}, which is not in the bundle")
            if not path.is_file():
                raise BundleError(f"{path} is missing: export the model again, or copy the full folder")
            if path.stat().st_size != file["bytes"]:
                raise BundleError(f"{path} has {path.stat().st_size} bytes, expected {file['bytes']}: it is damaged")
            if hash_files(path) != file["sha256"]:
                raise BundleError(f"{path} is not what was exported (its sha256 differs): it is damaged or was edited")
        return bundle

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read only the manifest. A bundle that is to be run must be opened."""
        manifest = manifests.read(folder)
        found = [
            {n: NetworkSpec.from_dict(spec) for n, spec in manifest.get(key, {}).items()}
            for key in ("networks", "graphs")
        ]
        bundle = cls(folder, manifest, *found)
        try:
            model = bundle.model
        except CheckpointError as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from error
        rank = bundle.adapter_rank
        if (rank or manifest.get("controls")) and not manifest["split"]:
            raise BundleError(f"{folder / MANIFEST}: it has adapters or controls, and its model is not split")
        try:
            controls = bundle.controls
        except CheckpointError as error:
            raise BundleError(f"{folder / MANIFEST}: {error}") from error
        form = {"split": manifest["split"], "adapter_rank": rank, "controls": controls}
        options = {"dtype": manifest["dtype"], **form}
        networks = specs(model.unet, model.vae, model.text, vision=model.vision, prior=model.prior, **options)
        manifests.check_networks(folder, bundle.specs, networks)
        bundle.check_graphs()
        manifests.check_adapters(folder, manifest, bundle.layouts)
        return bundle

    def check_graphs(self) -> None:
        """BundleError if its graphs are not those of its networks."""
        if not self.graphs:
            return
        path, columns = self.folder / MANIFEST, self.manifest.get("columns", [])
        if not self.manifest["split"] or self.adapter_rank or self.manifest.get("controls"):
            raise BundleError(f"{path}: it has graphs, and is not split, or has adapters or controls")
        if len(columns) < len(GRAPH_COLUMNS) or tuple(columns) != COLUMNS[: len(columns)]:
            raise BundleError(f"{path}: 'columns' are {' '.join(columns)}, and samplers here have {' '.join(COLUMNS)}")
        expected = graph_specs(self.specs, self.manifest["dtype"], columns, edits=self.model.unet.edits)
        manifests.check_networks(self.folder, self.graphs, expected)

    @property
    def adapter_rank(self) -> int:
        """Of the adapters that it takes together; 0 where it takes none."""
        return self.manifest.get("adapter_rank", 0)

    @property
    def quantized(self) -> list[str]:
        """Its networks in eight bits, see `export.quantize`."""
        return self.manifest[QUANTIZED]["networks"] if QUANTIZED in self.manifest else []

    @cached_property
    def controls(self) -> tuple[Config, ...]:
        """The configs of the controls that it has networks of. CheckpointError for those that are for another model."""
        entries = self.manifest.get("controls", [])
        configs = tuple(read_config(entry["config"], f"'controls.{k}'") for k, entry in enumerate(entries))
        for k, config in enumerate(configs):
            check_fits(config, self.model, f"'controls.{k}'")
        return configs

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Where its networks read the factors of adapters."""
        return layouts(self.model.unet, self.model.text, self.adapter_rank) if self.adapter_rank else {}

    def _needed(self) -> set[str]:
        """The files that are read to run or verify the bundle: networks, all files beside them, which may be weights of
        the graph, and tokenizers."""
        needed = {f"{name}/{MODEL}" for name in self.specs} | {FILES[name] for name in self.graphs}
        needed |= {f"{GOLDENS}/{name}.safetensors" for name in (*self.specs, *self.graphs, PICTURE)}
        needed |= {f"{GOLDENS}/{QUANTIZED}.safetensors"} if self.quantized else set()
        for name in (*self.specs, *TOKENIZERS, *depth.FOLDERS):
            paths = (path for path in (self.folder / name).rglob("*") if not path.is_dir())
            needed |= {path.relative_to(self.folder).as_posix() for path in paths}
        return needed

    @cached_property
    def model(self) -> loading.Spec:
        """The exported model, as `loading.describe` describes the original."""
        manifest, source = self.manifest, str(self.folder)
        others = (*SCHEDULERS, PREPROCESSOR[0])
        configs = {name: config for name, config in manifest["config"].items() if name not in others}
        components = {
            name: Component(name, str(config.get("_class_name", name)), config, (), source)
            for name, config in configs.items()
        }
        tokenizers = {name: TokenizerFiles(self.folder / name) for name in TOKENIZERS if (self.folder / name).is_dir()}
        for name in ("unet", "scheduler", *network_classes(manifest["index"].get("_class_name"))):
            if name not in manifest["config"] and name not in TEXT_ENCODERS:
                raise CheckpointError(f"'config.{name}' is missing")
        schedulers = {name: manifest["config"].get(name) for name in SCHEDULERS}
        return loading.spec_of(
            Checkpoint(
                source,
                components,
                schedulers["scheduler"],
                tokenizers,
                manifest["index"],
                next((config for name in NOISING if (config := schedulers[name]) is not None), None),
                depth=DepthEstimator(self.folder) if (self.folder / depth.FOLDERS[0]).is_dir() else None,
                preprocessor=manifest["config"].get(PREPROCESSOR[0], {}),
                prior_scheduler=schedulers[PRIOR_SCHEDULER],
            )
        )

    def path(self, network: str) -> Path:
        """The ONNX file of a network."""
        return self.folder / FILES[network] if network in FILES else self.folder / network / MODEL

    def spec(self, network: str) -> NetworkSpec:
        """The spec of a network or graph."""
        return self.graphs[network] if network in FILES else self.specs[network]

    def goldens(self, network: str) -> Path:
        """The file with PyTorch's outputs of a network, or of a full image."""
        return self.folder / GOLDENS / f"{network}.safetensors"

    def hashes(self, network: str) -> dict[str, str]:
        """The sha256 of a network's files, by name."""
        files, folder = self.manifest["files"], f"{network}/"
        if network in FILES:
            paths = [self.path(network), *weight_files(self.path(network), network)[:1]]
            return {path.name: files[path.relative_to(self.folder).as_posix()]["sha256"] for path in paths}
        return {name.removeprefix(folder): files[name]["sha256"] for name in files if name.startswith(folder)}


def in_memory(model: loading.Spec, modules: Mapping[str, nn.Module]) -> loading.Spec:
    """A model with the current weights of its modules, which are given by component name."""
    components: dict[str, Component] = {}
    for name, component in model.checkpoint.components.items():
        module = modules[name]
        in_float16 = any(parameter.dtype == torch.float16 for parameter in module.parameters())
        if isinstance(module, AutoencoderKL) and module.config.force_upcast and in_float16:
            module = copy.deepcopy(module).float()  # undo the rescaling for float16
            rescale_for_half(module, -HALF_EXPONENT)
        tensors = module.state_dict()
        components[name] = Loaded(
            name, component.class_name, component.config, (), f"the {name} in memory", tensors=tensors
        )
    return replace(model, checkpoint=replace(model.checkpoint, components=components))


def with_tokens(model: loading.Spec, name: str, stage: TextStage) -> tuple[loading.Spec, CLIPText]:
    """A model whose text encoder `name` and tokenizer know the tokens of textual inversion that its stage knows: the
    table has their vectors as rows. And that text encoder, which shares the rest of its weights."""
    module = stage.model
    assert isinstance(module, CLIPText)  # others take no tokens
    key = "text_model.embeddings.token_embedding.weight"
    state = module.state_dict()
    table = state[key][: stage.first_added]
    vectors = [own.to(table.device, table.dtype) for own in stage.added.values()]
    state[key] = torch.cat([table, *vectors])
    config = replace(module.config, vocab=len(state[key]))
    with torch.device("meta"):
        extended = CLIPText(config)
    extended.load_state_dict(state, assign=True)
    checkpoint = model.checkpoint
    component = checkpoint.components[name]
    components = {
        **checkpoint.components,
        name: replace(component, config={**component.config, "vocab_size": config.vocab}),
    }
    tokenizers = {
        **checkpoint.tokenizers,
        name.replace("text_encoder", "tokenizer"): TokenizerFiles(None, loaded=stage.tokenizer),
    }
    names = [other for other in ("text_encoder", "text_encoder_2") if other in components]
    text = tuple(config if other == name else own for other, own in zip(names, model.text, strict=True))
    checkpoint = replace(checkpoint, components=components, tokenizers=tokenizers)
    return replace(model, text=text, checkpoint=checkpoint), extended.requires_grad_(False).eval()


def identity(model: loading.Spec) -> dict[str, Any]:
    """Everything of a model that its images depend on: the sha256 of weights and tokenizers, and the configs. Models
    with equal identities are the same. InputError if it has no weights."""
    checkpoint = model.checkpoint
    components = checkpoint.components
    configs = {name: component.config for name, component in components.items()} | checkpoint.schedulers
    configs |= {PREPROCESSOR[0]: checkpoint.preprocessor} if checkpoint.preprocessor else {}
    return {
        "weights": {name: _hash_weights(component) for name, component in components.items()},
        "tokenizers": {name: _hash_tokenizer(files) for name, files in checkpoint.tokenizers.items()},
        "config": as_json(configs),
        "index": as_json(checkpoint.index),
    }


def control_identity(name: str, control: Control) -> dict[str, Any]:
    """A control's entry in a manifest. CheckpointError if its config cannot be written as diffusers' is."""
    network, config = control.network, control.network.config
    written = as_json(config.to_dict())
    try:
        same = _own(read_config(written, control.source)) == _own(config)
    except CheckpointError:
        same = False
    if not same:
        raise CheckpointError(f"{control.source} has a layout that no config of diffusers describes")
    weights = _hash_weights(Loaded(name, "", {}, (), control.source, tensors=network.state_dict()))
    source = control.source if Path(control.source).exists() else None
    hashed = {"short_hash": control.short_hash, "weights": weights, "config": written}
    return {"name": name, "source": source, **hashed}


def _own(config: Config) -> Config:
    """A config without what of a U-Net is not the control's."""
    if not isinstance(config, ControlNetConfig):
        return config
    fixed: dict[str, Any] = {"up": (), "out_channels": 0, "sample_size": (0, 0), "time_cond_proj_dim": None}
    return replace(config, unet=replace(config.unet, **fixed))


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The differences of two identities, such as "the weights of unet" or "the config of scheduler"."""
    differences = []
    for title in ("weights", "tokenizers", "config"):
        a, b = ({name: _without_origin(x) for name, x in model[title].items()} for model in (first, second))
        label = "files" if title == "tokenizers" else title
        differences += [f"the {label} of {name}" for name in {**a, **b} if a.get(name) != b.get(name)]
    settings = [  # components are lists of library and class
        {key: value for key, value in _without_origin(model["index"]).items() if not isinstance(value, list | tuple)}
        for model in (first, second)
    ]
    return [*differences, *["the index"] * (settings[0] != settings[1])]


_ORIGIN_KEYS = ("_diffusers_version", "_name_or_path", "transformers_version", "_commit_hash", "_use_default_values")


def _without_origin(config: Any) -> Any:
    """A config without the keys that say which library wrote it, and where."""
    return {k: v for k, v in config.items() if k not in _ORIGIN_KEYS} if isinstance(config, Mapping) else config


def as_json(config: Any) -> Any:
    """A value as it is read back from a JSON file: with lists in place of tuples."""
    return json.loads(json.dumps(config, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)))


def _hash_weights(component: Component) -> str:
    if not isinstance(component, Loaded):
        files = [(path, path.stat()) for path in component.files]
        return _hash_unchanged(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in files))
    digest = hashlib.sha256()
    for name, tensor in sorted(component.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _hash_unchanged(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """The hash of files, which may have gigabytes, read once per process while size, time and inode stay the same."""
    return hash_files(*(path for path, *_ in files))


def _hash_tokenizer(files: TokenizerFiles) -> str:
    """The hash of a tokenizer's files, or of its pad token if it is CLIP's own."""
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
