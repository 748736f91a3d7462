"""A model as a folder that other tools read and that proves itself.

    manifest.json                what it is: model, configs, dtype, opset, each network's inputs and outputs, versions,
                                 the sha256 of the weights it was made of and of every other file, and the manifest's
    unet/model.onnx, ...         the networks, each with model.onnx_data and config.json beside it
    goldens/unet.safetensors     inputs of three sizes, and what PyTorch made of them in float32
    tokenizer/, scheduler/, model_index.json

The layout is that of optimum's exports. A bundle takes its name by one rename when all of it is on the disk and has
been compared with PyTorch. Until then it grows in .NAME.partial, from where an export that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fastldm import __version__
from fastldm.engine import MANIFEST, open_engine
from fastldm.errors import BundleError, CheckpointError, EngineError, InputError
from fastldm.export.cache import hash_files
from fastldm.export.parity import TOLERANCES, Difference, gate
from fastldm.export.reference import Networks
from fastldm.export.spec import MODEL, Axis, DType, NetworkSpec, sample, specs
from fastldm.loading import Spec
from fastldm.text import BOS, CLIP_WINDOW, EOS, clip_vocabulary
from fastldm.weights import TokenizerFiles

_FORMAT = 1
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_VERSIONS = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


@dataclass(frozen=True)
class Bundle:
    """A bundle; one that was opened has the files that were written."""

    folder: Path
    manifest: Mapping[str, Any]
    specs: Mapping[str, NetworkSpec]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest and compare every file with its hash. BundleError for what is missing or differs; nothing
        of the bundle has been executed by then."""
        bundle = cls.read(folder)
        for name, known in bundle.manifest["files"].items():
            path = folder / name
            if folder.resolve() not in path.resolve().parents:
                raise BundleError(f"{folder / MANIFEST} names {name!r}, which is not in the bundle")
            if not path.is_file():
                raise BundleError(f"{path} is missing: export the model again, or copy the whole folder")
            if path.stat().st_size != known["bytes"]:
                raise BundleError(f"{path} has {path.stat().st_size} bytes, expected {known['bytes']}: it is damaged")
            if hash_files(path) != known["sha256"]:
                raise BundleError(f"{path} is not what was exported (its sha256 differs): it is damaged or was edited")
        return bundle

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the manifest alone: what is to be run has to be opened."""
        manifest = _read_manifest(folder)
        specs = {name: NetworkSpec.from_dict(one) for name, one in manifest["networks"].items()}
        return cls(folder, manifest, specs)

    def path(self, network: str) -> Path:
        """The ONNX file of a network."""
        return self.folder / network / MODEL

    def hashes(self, network: str) -> dict[str, str]:
        """sha256 of the files of a network, by name."""
        folder = f"{network}/"
        files = self.manifest["files"]
        return {name.removeprefix(folder): files[name]["sha256"] for name in files if name.startswith(folder)}

    def goldens(self, network: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Inputs, and what PyTorch made of them in float32."""
        cases: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for key, tensor in load_file(_goldens(self.folder, network)).items():
            case, side, name = key.split(":")
            cases.setdefault(case, ({}, {}))[side == "out"][name] = tensor
        return [cases[case] for case in sorted(cases)]


@dataclass(frozen=True)
class Check:
    """One network, run at one size."""

    network: str
    origin: Literal["golden", "fresh"]  # of what it was compared with: stored in the bundle, or computed just now
    sizes: str
    difference: Difference | None
    problem: str = ""  # what is wrong, where something is


def verify(
    bundle: Bundle, backend: str = "onnxruntime", device: torch.device | str = "cpu", model: Spec | None = None
) -> Iterator[Check]:
    """Run every network on a backend at three sizes and compare with what PyTorch made of the same inputs.

    model: what the bundle was exported from. With it, PyTorch computes the networks in float32 at three other sizes
        too, of which the bundle knows nothing.

    Raises EngineError where the backend is not installed or cannot load a network, BundleError where the model is not
    of the bundle's kind.
    """
    reference = None if model is None else Networks(model, "float32", split=bundle.manifest["split"])
    if reference is not None and reference.specs.keys() != bundle.specs.keys():
        raise BundleError(
            f"the bundle has {', '.join(bundle.specs)}, the model it is to be compared with "
            f"{', '.join(reference.specs)}: give -m the model that it was exported from"
        )
    for network, spec in bundle.specs.items():
        engine = open_engine(backend, bundle.path(network), spec, device=device)
        for origin, inputs, wanted in _cases(bundle, network, reference):
            sizes = "  ".join(f"{port.name} {tuple(inputs[port.name].shape)}" for port in spec.inputs[:1])
            try:
                got = engine({name: tensor.to(device) for name, tensor in inputs.items()})
                yield Check(network, origin, sizes, gate(network, got, wanted, bundle.manifest["tolerance"]))
            except (BundleError, EngineError) as error:
                yield Check(network, origin, sizes, None, str(error))
        engine.close()


def _cases(
    bundle: Bundle, network: str, reference: Networks | None
) -> Iterator[tuple[Literal["golden", "fresh"], dict[str, Tensor], dict[str, Tensor]]]:
    for inputs, wanted in bundle.goldens(network):
        yield "golden", inputs, wanted
    if reference is not None:
        spec = bundle.specs[network]
        for case, sizes in enumerate(fresh_sizes(spec)):
            yield "fresh", *_computed(spec, reference, sizes, seed=100 + case)


def source_of(model: str) -> str:
    """How a manifest names a model so that it is found again: "default", a hub id, or an absolute path."""
    return str(Path(model).absolute()) if model != "default" and Path(model).exists() else model


def export(
    model: Spec,
    out: Path,
    *,
    source: str,
    dtype: DType = "float32",
    opset: int = 21,
    split: bool = False,
    fused_ops: bool = False,
    on_network: Callable[[str], object] = lambda network: None,
) -> Bundle:
    """Write a model as a bundle, each network compared with PyTorch before it counts.

    source: where the model is from, see `source_of`. split: the U-Net in three, see `export.spec`. fused_ops: our own
        ops as single nodes, see `export.fused`. on_network: told which is next.

    An export of the same model with the same options that was stopped goes on where it was, and one that is there is
    opened. Raises InputError where `out` is anything else or another process writes it, BundleError where a network is
    not what PyTorch computes or the disk is full, EngineError where ONNX Runtime cannot run it.
    """
    if not out.absolute().name:
        raise InputError(f"{out} cannot be a bundle: give the name of a folder that is not there yet")
    if not out.absolute().parent.is_dir():
        raise InputError(f"there is no folder {out.absolute().parent} to write {out.name} into")
    head = _head(model, source=source, dtype=dtype, opset=opset, split=split, fused_ops=fused_ops)
    work = out.absolute().with_name(f".{out.absolute().name}.partial")
    lock = FileLock(work.with_name(f"{work.name}.lock"), timeout=0)
    try:
        with lock:
            if out.exists():
                return _there(out, head)
            _export(model, work, on_network, head)
            work.rename(out)
    except Timeout:
        raise InputError(f"another process is writing {out}: wait for it, or give the bundle another name") from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise BundleError(
            f"{out} could not be written ({error}): what is done is in {work}, and the same command goes on from there"
        ) from error
    finally:
        if not work.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
    return Bundle.open(out)


def _head(model: Spec, *, source: str, dtype: DType, opset: int, split: bool, fused_ops: bool) -> dict[str, Any]:
    """What a manifest says of model and options: two bundles with one head are the same."""
    parts = model.checkpoint.components
    if not all(component.files for component in parts.values()):
        raise InputError(f"{source} has no weights for PyTorch, as a bundle: give the model that it was made of")
    networks = specs(model.unet, model.vae, model.text, dtype=dtype, split=split)
    return {
        "format": _FORMAT,
        "model": Path(source).name,
        "source": source,
        "family": model.family.name,
        "dtype": dtype,
        "opset": opset,
        "split": split,
        "fused_ops": fused_ops,
        "tolerance": TOLERANCES[dtype],
        "weights": weights_of(model),
        "config": {part: component.config for part, component in parts.items()}
        | {"scheduler": model.checkpoint.scheduler},
        "index": model.checkpoint.index,
        "networks": {network: spec.to_dict() for network, spec in networks.items()},
    }


def weights_of(model: Spec) -> dict[str, str]:
    """sha256 of the files of each component's weights."""
    parts = model.checkpoint.components
    hashes = {files: hash_files(*files) for files in {component.files for component in parts.values()}}
    return {part: hashes[component.files] for part, component in parts.items()}


def _there(out: Path, head: Mapping[str, Any]) -> Bundle:
    """The bundle that stands where one is to be written, if it is the same. InputError if it is not."""
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is no bundle: give the bundle another name, or remove what is there")
    found = Bundle.open(out)
    wanted = json.loads(json.dumps(head))  # with lists in place of tuples
    # By its weights, not by where they lie, it is the same model.
    differs = [name for name in wanted if name not in ("source", "model") and found.manifest.get(name) != wanted[name]]
    if differs:
        raise InputError(
            f"{out} exists and is a bundle of another model or of other options (its {', '.join(differs)} differ): "
            "give the bundle another name, or remove what is there"
        )
    return found


def _export(model: Spec, work: Path, on_network: Callable[[str], object], head: Mapping[str, Any]) -> None:
    from fastldm.export import onnx  # what traces, and takes packages that running a bundle does not need

    # Asked of the modules: onnxruntime is one distribution for CPUs and another for GPUs.
    versions = {name: str(importlib.import_module(name).__version__) for name in _VERSIONS}
    manifest: dict[str, Any] = {
        **head,
        "versions": {"fastldm": __version__, "python": platform.python_version(), **versions},
    }
    dtype, split = head["dtype"], head["split"]
    networks, reference = Networks(model, dtype, split=split), Networks(model, "float32", split=split)

    # What is there counts if it is of the same weights, options and versions.
    key = json.dumps(manifest, sort_keys=True)
    done = work / "done.json"
    finished: dict[str, dict[str, Any]] = {}
    if done.is_file():
        before = json.loads(done.read_text())
        finished = before["networks"] if before["key"] == key else {}
    if not finished:
        shutil.rmtree(work, ignore_errors=True)
        (work / "goldens").mkdir(parents=True)

    for network in networks.specs:
        on_network(network)
        if finished.get(network) is None or finished[network] != _hashes(work, network):
            shutil.rmtree(work / network, ignore_errors=True)
            onnx.write(networks, network, work / network, opset=head["opset"], fused_ops=head["fused_ops"])
            _write_json(work / network / "config.json", model.checkpoint.components[Networks.part(network)].config)
            _write_goldens(networks.specs[network], reference, work)
            _compare(networks.specs[network], work, TOLERANCES[dtype])
            finished[network] = _hashes(work, network)
            _write_json(done, {"key": key, "networks": finished})

    for title, tokenizer in model.checkpoint.tokenizers.items():
        _write_tokenizer(tokenizer, work / title)
    (work / "scheduler").mkdir(exist_ok=True)
    _write_json(work / "scheduler" / "scheduler_config.json", model.checkpoint.scheduler)
    _write_json(work / "model_index.json", model.checkpoint.index)
    done.unlink()
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    manifest["files"] = _hashes(work, "")
    manifest["sha256"] = _manifest_hash(manifest)
    _write_json(work / MANIFEST, manifest)


def _write_goldens(spec: NetworkSpec, reference: Networks, work: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for case, sizes in enumerate(golden_sizes(spec)):
        inputs, outputs = _computed(spec, reference, sizes, seed=case)
        tensors |= {f"{case}:in:{name}": x for name, x in inputs.items()}
        tensors |= {f"{case}:out:{name}": x.contiguous() for name, x in outputs.items()}
    _goldens(work, spec.name).write_bytes(save(tensors))


def _computed(
    spec: NetworkSpec, reference: Networks, sizes: Mapping[str, int], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a network, and what PyTorch makes of them in float32."""
    inputs = sample(spec, sizes, seed)
    # The reference is given what the network is given, rounded to its dtype.
    exact = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    return inputs, reference.run(spec.name, exact)


def golden_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three sizes that a network is judged at: one picture of the best size, and two upright and three broad ones of an
    eighth of its pixels (at full size it is PyTorch's time that counts), with a timestep for all and one for each."""
    axes = spec.axes

    def sides(**parts: int) -> dict[str, int]:
        return {name: _share(axes[name], 1, whole) for name, whole in parts.items() if name in axes}

    long = {"tokens": min(2 * axes["tokens"].best, axes["tokens"].most)} if "tokens" in axes else {}
    return [
        {"batch": 1},
        {"batch": 2, "steps": 2, "rows": 1, **sides(height=2, width=4)},
        {"batch": 3, "rows": 7, **long, **sides(height=4, width=2)},
    ]


def fresh_sizes(spec: NetworkSpec) -> list[dict[str, int]]:
    """Three sizes that a network is judged at where the model is at hand, none of them a golden's: the smallest
    picture with the shortest text, a picture that is neither square nor a half of the best, and four of a quarter."""
    axes = spec.axes
    return [
        {**{name: axis.least for name, axis in axes.items()}, "rows": 2},
        {"batch": 1, "rows": 3, **{name: _share(axes[name], 3, 4) for name in ("height", "tokens") if name in axes}},
        {
            **{"batch": 4, "steps": 4, "rows": 50},
            **{name: _share(axes[name], 1, 4) for name in ("height", "width", "tokens") if name in axes},
        },
    ]


def _share(axis: Axis, part: int, whole: int) -> int:
    """A part of the best size, as the axis allows it."""
    return max(axis.least, axis.best * part // whole // axis.multiple_of * axis.multiple_of)


def _compare(spec: NetworkSpec, work: Path, tolerance: float) -> None:
    bundle = Bundle(work, {"tolerance": tolerance}, {spec.name: spec})
    for check in verify(bundle):
        if check.problem:
            raise BundleError(f"exported, but not as PyTorch computes it: {check.problem}")


# ------------------------------------------------------------------------------------------------------------- files


def _goldens(folder: Path, network: str) -> Path:
    return folder / "goldens" / f"{network}.safetensors"


def _hashes(folder: Path, network: str) -> dict[str, dict[str, Any]]:
    """Of a network's files, or of all; by their path in the bundle."""
    paths = [path for path in (folder / network).rglob("*") if path.is_file()]
    if network:
        paths += [path for path in [_goldens(folder, network)] if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_files(path)}
        for path in sorted(paths)
    }


def _write_json(path: Path, data: Any) -> None:
    """In one go: a reader finds all of it or none."""
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; `fastldm export -m MODEL {folder}` makes one")
    try:
        manifest = json.loads(path.read_text())
        known, version = manifest["sha256"], manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not a bundle's manifest ({error!r}): export the model again") from error
    if version != _FORMAT:
        raise BundleError(f"{path} is of format {version}, this fastldm reads {_FORMAT}: export the model again")
    if known != _manifest_hash(manifest):
        raise BundleError(f"{path} was edited or is damaged (its sha256 differs): export the model again")
    return manifest


def _write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """A tokenizer as a folder, from wherever it comes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if files.loaded is not None:
        files.loaded.save_pretrained(folder)
    elif files.folder is not None:
        for name in _TOKENIZER_FILES:
            if (files.folder / name).is_file():
                shutil.copyfile(files.folder / name, folder / name)
    else:
        _write_vocabulary(folder, *clip_vocabulary())
        named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": files.pad_token or EOS}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_WINDOW, **named}
        _write_json(folder / "tokenizer_config.json", config)
    if not (folder / "vocab.json").exists():  # transformers 5 writes one file, 4 reads these two
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        _write_vocabulary(folder, model["vocab"], pairs)


def _write_vocabulary(folder: Path, vocab: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
