"""A model to a bundle, each network compared with PyTorch before it counts.

A bundle takes its name when all of it is on the disk and has been compared. Until then it grows in .NAME.partial beside
it, from where an export that was stopped goes on. Where NAME is an empty folder already, such as a mounted volume, it
grows in .partial in there, and then its parts take their places, the manifest, without which it is no bundle, last.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastldm.conditioning.tokenizer import BOS, CLIP_WINDOW, EOS, clip_vocabulary
from fastldm.errors import BundleError, CheckpointError, InputError
from fastldm.export import manifest as manifests
from fastldm.export.bundle import GOLDENS, PICTURE, Bundle, Loaded, as_json, differing, identity
from fastldm.export.cache import hash_files
from fastldm.export.engine import MANIFEST
from fastldm.export.manifest import write_json
from fastldm.export.private import locked
from fastldm.export.reference import ReferenceNetworks
from fastldm.export.spec import DType, specs
from fastldm.export.verify import check_network, goldens_of, goldens_of_picture
from fastldm.loading.checkpoint import TokenizerFiles
from fastldm.loading.formats import TOKENIZER_FILES
from fastldm.loading.spec import Spec
from fastldm.reading import check_path
from fastldm.version import __version__

_VERSIONS = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
_PARTIAL, _DONE = ".partial", "done.json"
_NOTHING = (_PARTIAL, f"{_PARTIAL}.lock", "lost+found")  # what a folder may have and be empty


def source_of(model: str) -> str:
    """How a manifest names a model so that it is found again: "default", a hub id, or an absolute path."""
    return str(Path(model).absolute()) if model != "default" and Path(model).exists() else model


def export(
    model: Spec,
    out: Path,
    *,
    source: str | None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    dtype: DType = "float32",
    opset: int = 21,
    split: bool = False,
    fused_ops: bool = False,
    on_network: Callable[[str], object] = lambda network: None,
) -> Bundle:
    """Write a model as a bundle, each network compared with PyTorch before it counts.

    source: where the model is from, see `source_of`; None for one in memory, which PyTorch cannot load again. options:
        of `loading.describe`, with which it was found there. name: what the model is called, else by its source.
    split: the U-Net in three, see `export.spec`. fused_ops: our own ops as single nodes, see `export.fused`.
    on_network: told which is next.

    An export of the same model with the same options that was stopped goes on where it was, and one that is there is
    opened. Raises InputError where `out` is anything else than an empty folder, cannot be a name, or is written by
    another process; BundleError where a network is not what PyTorch computes or the disk is full, EngineError where
    ONNX Runtime cannot run it.
    """
    out, work = _places(out)
    head = _head(model, source=source, options=options, name=name, dtype=dtype, opset=opset, split=split)
    head["fused_ops"] = fused_ops
    if (out / MANIFEST).is_file():
        return _there(out, head)
    _check_free(out, work)
    try:
        with locked(work.with_name(f"{work.name}.lock"), timeout=0, remove=True):
            if (out / MANIFEST).is_file():
                return _there(out, head)
            _check_free(out, work)
            _export(model, work, on_network, head)
            _publish(work, out)
    except TimeoutError:
        raise InputError(f"another process is writing {out}: wait for it, or give the bundle another name") from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise BundleError(
            f"{out} could not be written ({error}): what is done is in {work}, and the same command goes on from there"
        ) from error
    return Bundle.open(out)


# ------------------------------------------------------------------------------------------------------ where it goes


def _places(given: Path) -> tuple[Path, Path]:
    """Where a bundle is to stand, and where it grows. InputError where none can stand there."""
    try:
        out = check_path(given, "out").absolute()
        if out.is_symlink():
            out = Path(os.path.realpath(out))
            if not out.exists():
                raise InputError(
                    f"{given} is a link to {out}, which is not there: make that folder, or remove the link"
                )
        if not out.name:
            raise InputError(f"{given} cannot be a bundle: give the name of a folder that is not there yet")
        exists, inside = out.exists(), out.is_dir()
        if not exists and not out.parent.is_dir():
            raise InputError(f"there is no folder {out.parent} to write {out.name} into")
        work = out / _PARTIAL if inside else out.with_name(f".{out.name}{_PARTIAL}")
        most = os.pathconf(out.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a loop of links, a path that is too long as a whole
        raise InputError(
            f"{str(given)[:100]!r} cannot be a bundle's name: {getattr(error, 'strerror', error)}"
        ) from error
    room = most - len(os.fsencode(f".{_PARTIAL}.lock"))
    if not inside and len(os.fsencode(out.name)) > room:
        raise InputError(
            f"the name {out.name[:40]}... has {len(os.fsencode(out.name))} bytes, at most {room} are possible"
        )
    return out, work


def _check_free(out: Path, work: Path) -> None:
    """InputError where something else than what `work` will become stands in its place."""
    if not os.path.lexists(out):
        return
    if out.is_dir():
        begun = {path.name for path in work.iterdir()} if (work / MANIFEST).is_file() else set()
        known = json.loads((work / MANIFEST).read_bytes())["files"] if begun else ()
        begun |= {name.split("/")[0] for name in known}
        if {path.name for path in out.iterdir()} <= {*_NOTHING, *begun}:
            return
    raise InputError(f"{out} exists and is no bundle: give the bundle another name, or remove what is there")


def _publish(work: Path, out: Path) -> None:
    """Give a whole bundle its name."""
    if work.parent != out:
        work.rename(out)
        return
    for path in sorted(work.iterdir(), key=lambda path: path.name == MANIFEST):
        path.rename(out / path.name)
    work.rmdir()


def _there(out: Path, head: Mapping[str, Any]) -> Bundle:
    """The bundle that stands where one is to be written, if it is the same. InputError if it is not."""
    found = Bundle.open(out)
    wanted = json.loads(json.dumps(head))  # with lists in place of tuples
    # By what it is, not by where it lies, it is the same model.
    ours = ("family", "dtype", "opset", "split", "fused_ops")
    differs = [name for name in ours if found.manifest.get(name) != wanted[name]] or differing(found.manifest, wanted)
    if differs:
        raise InputError(
            f"{out} exists and is a bundle of another model or of other options ({', '.join(differs)} differ): "
            "give the bundle another name, or remove what is there"
        )
    return found


# --------------------------------------------------------------------------------------------------------- its content


def _head(
    model: Spec,
    *,
    source: str | None,
    options: Mapping[str, Any] | None,
    name: str | None,
    dtype: DType,
    opset: int,
    split: bool,
) -> dict[str, Any]:
    """What a manifest says of model and options: two bundles with one head are the same."""
    parts = model.checkpoint.components
    if not all(component.files or isinstance(component, Loaded) for component in parts.values()):
        raise InputError(f"{source} has no weights for PyTorch, as a bundle: give the model that it was made of")
    networks = specs(model.unet, model.vae, model.text, dtype=dtype, split=split)
    return {
        "model": name or Path(source or "model").name,
        "source": source,
        "options": {key: value for key, value in (options or {}).items() if value},
        "family": model.family.name,
        "dtype": dtype,
        "opset": opset,
        "split": split,
        **identity(model),
        "networks": {network: spec.to_dict() for network, spec in networks.items()},
    }


def _export(model: Spec, work: Path, on_network: Callable[[str], object], head: Mapping[str, Any]) -> None:
    from fastldm.export import onnx  # what traces, and takes packages that running a bundle does not need

    # Asked of the modules: onnxruntime is one distribution for CPUs and another for GPUs.
    versions = {name: str(importlib.import_module(name).__version__) for name in _VERSIONS}
    about: dict[str, Any] = {
        **head,
        "versions": {"fastldm": __version__, "python": platform.python_version(), **versions},
    }
    dtype, split = head["dtype"], head["split"]
    networks, reference = ReferenceNetworks(model, dtype, split=split), ReferenceNetworks(model, "float32", split=split)
    stored = reference if dtype == "float32" else ReferenceNetworks(model, dtype, split=split, exact=True)

    # What is there counts if it is of the same weights, options and versions.
    key = json.dumps(about, sort_keys=True)
    finished = _finished(work, key)
    if (work / MANIFEST).is_file() and finished:
        return  # it was stopped while it took its name
    if not finished:
        _clear(work)
        (work / GOLDENS).mkdir(parents=True)

    def made(part: str, make: Callable[[], None]) -> None:
        """A part, unless it is there already."""
        if not finished.get(part) or finished[part] != _hashes(work, part):
            on_network(part)
            _clear(work / part)
            make()
            finished[part] = _hashes(work, part)
            write_json(work / _DONE, {"key": key, "networks": finished})

    grown = Bundle(work, about, networks.specs)
    for network, spec in networks.specs.items():

        def write(network: str = network, spec: Any = spec) -> None:
            onnx.write(networks, network, work / network, opset=head["opset"], fused_ops=head["fused_ops"])
            write_json(work / network / "config.json", head["config"][ReferenceNetworks.part(network)])
            grown.goldens(network).write_bytes(goldens_of(spec, reference, stored).to_bytes())
            for check in check_network(grown, network):
                if check.problem:
                    raise BundleError(f"exported, but not as PyTorch computes it: {check.problem}")

        made(network, write)
    for title, tokenizer in model.checkpoint.tokenizers.items():
        _write_tokenizer(tokenizer, work / title)
    (work / "scheduler").mkdir(exist_ok=True)
    write_json(work / "scheduler" / "scheduler_config.json", head["config"]["scheduler"])
    write_json(work / "model_index.json", _index(model, networks.specs))

    def write_picture() -> None:
        grown.goldens(PICTURE).write_bytes(goldens_of_picture(grown, reference, stored).to_bytes())

    made(PICTURE, write_picture)
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files = {name: known for name, known in _hashes(work, "").items() if name != _DONE}
    manifests.write(work, {**about, "files": files})
    (work / _DONE).unlink()


def _finished(work: Path, key: str) -> dict[str, dict[str, Any]]:
    """What an export of the same has finished in there: of each part, its files."""
    if (work / MANIFEST).is_file():
        with contextlib.suppress(BundleError):
            manifest = manifests.read(work)
            about = {name: value for name, value in manifest.items() if name not in ("files", "sha256", "format")}
            return manifest["files"] if json.dumps(about, sort_keys=True) == key else {}
        return {}
    try:
        before = json.loads((work / _DONE).read_bytes())
        found = before["networks"] if before["key"] == key else {}
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _clear(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hashes(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    """Of a network's files, or of all; by their path in the bundle."""
    paths = [path for path in (folder / part).rglob("*") if path.is_file()]
    if part:
        paths += [path for path in [folder / GOLDENS / f"{part}.safetensors"] if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_files(path)}
        for path in sorted(paths)
    }


def _index(model: Spec, networks: Iterable[str]) -> dict[str, Any]:
    """model_index.json of what is in the folder, as optimum and diffusers' pipelines for ONNX read it: the settings of
    the model's own, each network as one of ONNX, and nothing that is not there."""
    given, scheduler = as_json(model.checkpoint.index), model.checkpoint.scheduler
    settings = {key: value for key, value in given.items() if not isinstance(value, list | tuple)}
    parts: dict[str, tuple[str | None, str | None]] = {
        "scheduler": ("diffusers", scheduler.get("_class_name", "PNDMScheduler")),
        **dict.fromkeys(model.checkpoint.tokenizers, ("transformers", "CLIPTokenizer")),
        **dict.fromkeys(networks, ("diffusers", "OnnxRuntimeModel")),
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None)),
    }
    return {**settings, "requires_safety_checker": False, **{name: list(part) for name, part in parts.items()}}


def _write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """A tokenizer as a folder, from wherever it comes."""
    _clear(folder)
    folder.mkdir()
    if files.loaded is not None:
        files.loaded.save_pretrained(folder)
    elif files.folder is not None:
        for name in TOKENIZER_FILES:
            if (files.folder / name).is_file():
                shutil.copyfile(files.folder / name, folder / name)
    else:
        _write_vocabulary(folder, *clip_vocabulary())
        named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": files.pad_token or EOS}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_WINDOW, **named}
        write_json(folder / "tokenizer_config.json", config)
    if not (folder / "vocab.json").exists():  # transformers 5 writes one file, 4 reads these two
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        _write_vocabulary(folder, model["vocab"], pairs)


def _write_vocabulary(folder: Path, vocab: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
