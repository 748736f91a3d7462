"""Writing a model as a bundle, each network compared with PyTorch.

A bundle gets its name when all of it is on disk and was compared. Until then it is written to .NAME.partial beside it,
where an interrupted export continues. If NAME is already an empty folder, such as a mounted volume, the bundle is
written to .partial in it, and its files are moved up at the end, the manifest, which makes it a bundle, last.
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

import torch
from safetensors import SafetensorError

from fastldm import checks, openmp
from fastldm.adapters.control import Control
from fastldm.adapters.packing import layouts
from fastldm.conditioning import depth
from fastldm.conditioning.tokenizer import BOS, CLIP_WINDOW, EOS, clip_vocabulary
from fastldm.errors import BundleError, CheckpointError, InputError
from fastldm.export import manifest as manifests
from fastldm.export.bundle import GOLDENS, PICTURE, Bundle, as_json, control_identity, differing, identity
from fastldm.export.cache import hash_files
from fastldm.export.engine import MANIFEST
from fastldm.export.graphs import FILES, WHOLE_PICTURE, graph_specs
from fastldm.export.manifest import write_json
from fastldm.export.private import locked
from fastldm.export.reference import ReferenceNetworks, component
from fastldm.export.spec import DType, named_controls, specs
from fastldm.export.verify import check_network, goldens_of, goldens_of_image, goldens_of_whole_picture
from fastldm.kernels.columns import COLUMNS
from fastldm.loading.checkpoint import Loaded, TokenizerFiles
from fastldm.loading.formats import PREPROCESSOR, TOKENIZER_FILES
from fastldm.loading.spec import Spec
from fastldm.models.config import PIXEL_SPACE, PixelResidualConfig
from fastldm.models.families import WEIGHTLESS
from fastldm.reading import check_path
from fastldm.samplers.table import COLUMNS as TABLE
from fastldm.samplers.table import make_table
from fastldm.version import __version__

_VERSIONS = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
_PARTIAL, _DONE = ".partial", "done.json"
_OF_DEPTH = (("transformers", "DPTForDepthEstimation"), ("transformers", "DPTImageProcessor"))
_IGNORED = (_PARTIAL, f"{_PARTIAL}.lock", "lost+found")  # in a folder that counts as empty


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
    adapters: Sequence[str] = (),
    adapter_rank: int = 0,
    controls: Mapping[str, Control] | None = None,
    whole_picture: bool = False,
    on_network: Callable[[str], object] = lambda network: None,
) -> Bundle:
    """Write a model as a bundle, each network compared with PyTorch.

    source: where the model is from, see `prepared.source_of`; None for one in memory, which PyTorch cannot load again.
        options: of `loading.describe`, with which the model was opened. name: of the model, by default from its source.
    split: the U-Net as three networks, see `export.spec`. fused_ops: fastldm's ops as single nodes, see `export.fused`.
    adapters: what is merged into the weights, a line for each, for the manifest.
    adapter_rank: of the LoRAs that the bundle takes after it was written, together, see `adapters.packing`; 0 for none.
        Implies split.
    controls: ControlNets and T2I-Adapters, by the names by which requests know them, to be exported with the model.
        Imply split.
    whole_picture: several steps, and a whole picture, as one graph each too, see `export.graphs`. Implies split; not
        with fused_ops, adapter_rank and controls.
    on_network: called with the name of the network that is next.

    An interrupted export of the same model with the same options continues, and a finished one is opened. Raises
    InputError if `out` is neither new nor an empty folder, is no valid name, or is being written by another process;
    BundleError if a network does not compute what PyTorch does or the disk is full; EngineError if ONNX Runtime cannot
    run it.
    """
    if model.not_exported is not None:
        raise InputError(f"{model.checkpoint.source}: {model.not_exported}")
    if getattr(model.vae, "conditioned", False):
        raise InputError("the VAE is asymmetric, and its decoder reads what is repainted: no bundle holds it")
    controls = controls or {}
    for reason, given in (("fused_ops", fused_ops), ("adapter_rank", adapter_rank), ("controls", controls)):
        if checks.flag("whole_picture", whole_picture) and given:
            raise InputError(f"whole_picture does not go with {reason}: leave one of them out")
    if whole_picture and (lacking := lacks_whole_picture(model)):
        raise InputError(f"whole_picture: {lacking}: leave it out")
    adapter_rank = checks.whole("adapter_rank", adapter_rank, 0, manifests.MAX_RANK, "a rank")
    if adapter_rank and (beyond := model.unet.beyond_standard) is not None:
        raise InputError(
            f"adapter_rank is {adapter_rank}, and the U-Net has {beyond}: bundles that take adapters are of Stable "
            "Diffusion's networks; merge them into the weights"
        )
    split = bool(split or whole_picture or adapter_rank or controls)
    out, partial = _paths(out)
    form: dict[str, Any] = {"dtype": dtype, "opset": opset, "split": split, "adapter_rank": adapter_rank}
    head = _head(model, source=source, options=options, name=name, controls=controls, **form)
    head |= {"fused_ops": fused_ops, "adapters": list(adapters)}
    if whole_picture:
        networks = specs(model.unet, model.vae, model.text, dtype=dtype, split=True, vision=model.vision)
        graphs = graph_specs(networks, dtype, edits=model.unet.edits)
        head |= {"graphs": {name: spec.to_dict() for name, spec in graphs.items()}, "columns": list(COLUMNS)}
    if (out / MANIFEST).is_file():
        return _open_existing(out, head)
    _check_free(out, partial)
    try:
        with locked(partial.with_name(f"{partial.name}.lock"), timeout=0, remove=True):
            if (out / MANIFEST).is_file():
                return _open_existing(out, head)
            _check_free(out, partial)
            _export(model, partial, on_network, head, [control.network for control in controls.values()])
            _publish(partial, out)
    except TimeoutError:
        raise InputError(f"another process is writing {out}: wait for it, or give the bundle another name") from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise BundleError(
            f"{out} could not be written ({error}): finished files are in {partial}, "
            "and the same command continues there"
        ) from error
    return Bundle.open(out)


def lacks_whole_picture(model: Spec) -> str | None:
    """Why there is no graph of a model's whole picture; None where there is one."""
    family = f"the family {model.family.name}"
    if model.unet.enlarges_latents or (isinstance(model.vae, PixelResidualConfig) and model.vae != PIXEL_SPACE):
        return f"{family} reads a small picture in a way that the graph does not know"
    if model.unet.learns_variance:
        return (
            "this model's U-Net makes a variance beside its prediction ('learned_range'), which the graph of a whole "
            "picture does not read"
        )
    if model.prior is not None:
        return "a prior makes what this model's U-Net reads, in steps of its own that no graph of a whole picture takes"
    if not model.encoders:  # whose own sampler may be the only one that the network knows
        table = make_table(model.schedule, model.family.num_inference_steps, sampler=model.family.sampler)
        columns = zip(TABLE, table.rows.T, strict=True)
        if used := [name for name, own in columns if name in ("clip", "o", "d_ratio") and own.any()]:
            return f"{family} has a sampler whose {used[0]!r} the graph does not know"
    return None


# ------------------------------------------------------------------------------------------------------ paths


def _paths(path: Path) -> tuple[Path, Path]:
    """The path of a bundle, and of the folder in which it is written. InputError if it cannot be written there."""
    try:
        out = check_path(path, "out").absolute()
        if out.is_symlink():
            out = Path(os.path.realpath(out))
            if not out.exists():
                raise InputError(
                    f"{path} is a link to {out}, which does not exist: create that folder, or remove the link"
                )
        if not out.name:
            raise InputError(f"{path} cannot be a bundle: give the name of a new folder")
        exists, is_folder = out.exists(), out.is_dir()
        if not exists and not out.parent.is_dir():
            raise InputError(f"there is no folder {out.parent} to write {out.name} into")
        partial = out / _PARTIAL if is_folder else out.with_name(f".{out.name}{_PARTIAL}")
        limit = os.pathconf(out.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a loop of links, or a path that is too long
        raise InputError(
            f"{str(path)[:100]!r} cannot be a bundle's name: {getattr(error, 'strerror', error)}"
        ) from error
    room = limit - len(os.fsencode(f".{_PARTIAL}.lock"))
    if not is_folder and len(os.fsencode(out.name)) > room:
        raise InputError(
            f"the name {out.name[:40]}... has {len(os.fsencode(out.name))} bytes, at most {room} are possible"
        )
    return out, partial


def _check_free(out: Path, partial: Path) -> None:
    """InputError if `out` exists and has other content than the finished files of `partial`."""
    if not os.path.lexists(out):
        return
    if out.is_dir():
        finished = {path.name for path in partial.iterdir()} if (partial / MANIFEST).is_file() else set()
        files = json.loads((partial / MANIFEST).read_bytes())["files"] if finished else ()
        finished |= {name.split("/")[0] for name in files}
        if {path.name for path in out.iterdir()} <= {*_IGNORED, *finished}:
            return
    raise InputError(f"{out} exists and is no bundle: give the bundle another name, or remove it")


def _publish(partial: Path, out: Path) -> None:
    """Move a finished bundle to its path."""
    if partial.parent != out:
        partial.rename(out)
        return
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        path.rename(out / path.name)
    partial.rmdir()


def _open_existing(out: Path, head: Mapping[str, Any]) -> Bundle:
    """Open a bundle that exists already. InputError if it is not the one that would be written."""
    existing = Bundle.open(out)
    expected = json.loads(json.dumps(head))  # with lists in place of tuples
    # The same model may have another source.
    names = ("family", "dtype", "opset", "split", "fused_ops", "adapter_rank")
    differs = [name for name in names if existing.manifest.get(name) != expected.get(name)]
    controls = [
        [(control["name"], control["weights"], control["config"]) for control in manifest.get("controls", ())]
        for manifest in (existing.manifest, expected)
    ]
    differs += ["controls"] * (controls[0] != controls[1])
    differs += ["whole_picture"] * (existing.manifest.get("columns", []) != expected.get("columns", []))
    if differs := differs or differing(existing.manifest, expected):
        raise InputError(
            f"{out} exists and is a bundle of another model or of other options ({', '.join(differs)} differ): "
            "give the bundle another name, or remove it"
        )
    return existing


# --------------------------------------------------------------------------------------------------------- content


def _head(
    model: Spec,
    *,
    source: str | None,
    options: Mapping[str, Any] | None,
    name: str | None,
    dtype: DType,
    opset: int,
    split: bool,
    adapter_rank: int,
    controls: Mapping[str, Control],
) -> dict[str, Any]:
    """The manifest's fields for model and options: bundles with equal heads are the same."""
    components = model.checkpoint.components.values()
    if not all(part.files or isinstance(part, Loaded) for part in components if part.class_name not in WEIGHTLESS):
        raise InputError(f"{source} has no weights for PyTorch, as a bundle: give the model that it was exported from")
    configs = [control.network.config for control in controls.values()]
    form: dict[str, Any] = {"split": split, "adapter_rank": adapter_rank, "controls": configs}
    networks = specs(model.unet, model.vae, model.text, dtype=dtype, vision=model.vision, prior=model.prior, **form)
    taken: dict[str, Any] = {}
    if controls:
        taken["controls"] = [control_identity(name, control) for name, control in controls.items()]
    if adapter_rank:
        inputs = manifests.adapter_inputs(layouts(model.unet, model.text, adapter_rank))
        taken |= {"adapter_rank": adapter_rank, "adapter_inputs": inputs}
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
        **taken,
    }


def _export(
    model: Spec,
    partial: Path,
    on_network: Callable[[str], object],
    head: Mapping[str, Any],
    control_networks: Sequence[Any],
) -> None:
    # They need packages that running a bundle does not need.
    from fastldm.export import onnx
    from fastldm.export.onnxruntime import ONNXRuntimeEngine

    # From the modules: onnxruntime has different distributions for CPUs and GPUs.
    versions = {name: str(importlib.import_module(name).__version__) for name in _VERSIONS}
    content: dict[str, Any] = {
        **head,
        "versions": {"fastldm": __version__, "python": platform.python_version(), **versions},
    }
    dtype: DType = head["dtype"]
    form: dict[str, Any] = {"split": head["split"], "adapter_rank": head.get("adapter_rank", 0)}
    form |= {"controls": [network.config for network in control_networks], "control_networks": control_networks}
    form |= {"whole_picture": "graphs" in head}
    networks = stored = reference = ReferenceNetworks(model, "float32", **form)
    if dtype != "float32":
        networks, stored = ReferenceNetworks(model, dtype, **form), ReferenceNetworks(model, dtype, exact=True, **form)

    # Finished files count if weights, options and versions are the same.
    key = json.dumps(content, sort_keys=True)
    finished = _finished(partial, key)
    if (partial / MANIFEST).is_file() and finished:
        return  # it was interrupted while it was moved to its path
    if not finished:
        _clear(partial)
        (partial / GOLDENS).mkdir(parents=True)

    def write_once(name: str, write: Callable[[], None]) -> None:
        """Write the files of a network or of the image, unless they are finished."""
        if not finished.get(name) or finished[name] != _hashes(partial, name):
            on_network(name)
            _clear(partial / FILES.get(name, name))
            write()
            finished[name] = _hashes(partial, name)
            write_json(partial / _DONE, {"key": key, "networks": finished})

    bundle = Bundle(partial, content, networks.specs, networks.graphs)

    def check(network: str) -> None:
        for held in (networks, reference, stored):  # ONNX Runtime maps the same weights
            held.release()
        spec, threads = bundle.spec(network), openmp.threads()
        engine = ONNXRuntimeEngine(bundle.path(network), spec, torch.device("cpu"), threads, in_place=True)
        for each in check_network(bundle, network, engine=engine):
            if each.problem:
                raise BundleError(f"exported, but not as PyTorch computes it: {each.problem}")

    taken = zip(named_controls(form["controls"]), head.get("controls", ()), strict=True)
    configs = head["config"] | {name: control["config"] for name, control in taken}
    for network, spec in networks.specs.items():

        def write(network: str = network, spec: Any = spec) -> None:
            onnx.write(networks, network, partial / network, opset=head["opset"], fused_ops=head["fused_ops"])
            write_json(partial / network / "config.json", configs[component(network)])
            bundle.goldens(network).write_bytes(goldens_of(spec, reference, stored).to_bytes())
            check(network)

        write_once(network, write)
    for title, tokenizer in model.checkpoint.tokenizers.items():
        _write_tokenizer(tokenizer, partial / title)
    for title in model.checkpoint.schedulers:
        (partial / title).mkdir(exist_ok=True)
        write_json(partial / title / "scheduler_config.json", head["config"][title])
    if model.checkpoint.preprocessor:
        path = partial.joinpath(*PREPROCESSOR)
        path.parent.mkdir(exist_ok=True)
        write_json(path, head["config"][path.parent.name])
    if model.checkpoint.depth is not None:
        model.checkpoint.depth.save(partial)
    write_json(partial / "model_index.json", _index(model, networks.specs))

    def write_image() -> None:
        bundle.goldens(PICTURE).write_bytes(goldens_of_image(bundle, reference, stored).to_bytes())

    write_once(PICTURE, write_image)
    for graph, spec in networks.graphs.items():

        def write_graph(graph: str = graph, spec: Any = spec) -> None:
            from fastldm.export import whole_picture

            whole_picture.write(bundle, graph)
            if graph == WHOLE_PICTURE:
                found = goldens_of_whole_picture(bundle, reference, stored)
            else:
                found = goldens_of(spec, reference, stored)
            bundle.goldens(graph).write_bytes(found.to_bytes())
            check(graph)

        write_once(graph, write_graph)
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files = {name: file for name, file in _hashes(partial, "").items() if name != _DONE}
    manifests.write(partial, {**content, "files": files})
    (partial / _DONE).unlink()


def _finished(partial: Path, key: str) -> dict[str, dict[str, Any]]:
    """The files that an interrupted export with the same key has finished, by network."""
    if (partial / MANIFEST).is_file():
        with contextlib.suppress(BundleError):
            manifest = manifests.read(partial)
            content = {name: value for name, value in manifest.items() if name not in ("files", "sha256", "format")}
            return manifest["files"] if json.dumps(content, sort_keys=True) == key else {}
        return {}
    try:
        done = json.loads((partial / _DONE).read_bytes())
        networks = done["networks"] if done["key"] == key else {}
        return networks if isinstance(networks, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _clear(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hashes(folder: Path, network: str) -> dict[str, dict[str, Any]]:
    """Size and sha256 of a network's files, or of all files for "", by their path in the bundle."""
    paths = [path for path in (folder / network).rglob("*") if path.is_file()]
    if network:
        beside = [folder / GOLDENS / f"{network}.safetensors"]
        beside += [folder / FILES[network]] if network in FILES else []
        paths += [path for path in beside if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_files(path)}
        for path in sorted(paths)
    }


def _index(model: Spec, networks: Iterable[str]) -> dict[str, Any]:
    """The bundle's model_index.json, for optimum and diffusers' ONNX pipelines: the settings of the model's index, and
    each network as an ONNX model."""
    index = as_json(model.checkpoint.index)
    settings = {key: value for key, value in index.items() if not isinstance(value, list | tuple)}
    reads_picture = bool(model.checkpoint.preprocessor)
    components: dict[str, tuple[str | None, str | None]] = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None)),
        **({PREPROCESSOR[0]: ("transformers", "CLIPImageProcessor")} if reads_picture else {}),
        **(dict(zip(depth.FOLDERS, _OF_DEPTH, strict=True)) if model.checkpoint.depth is not None else {}),
        **{
            name: ("diffusers", config.get("_class_name", "PNDMScheduler"))
            for name, config in model.checkpoint.schedulers.items()
        },
        **{
            name: ("transformers", model.checkpoint.tokenizer_kind(name).class_name)
            for name in model.checkpoint.tokenizers
        },
        **dict.fromkeys(networks, ("diffusers", "OnnxRuntimeModel")),
    }
    return {
        **settings,
        "requires_safety_checker": False,
        **{name: list(classes) for name, classes in components.items()},
    }


def _write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """Write any tokenizer as a folder."""
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
        special_tokens = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": files.pad_token or EOS}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_WINDOW, **special_tokens}
        write_json(folder / "tokenizer_config.json", config)
    if not any((folder / name).exists() for name in ("vocab.json", "vocab.txt", "spiece.model")):
        # transformers 5 writes one file, 4 reads two; of BERT and T5 it reads that one
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if "merges" not in model:
            return
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        _write_vocabulary(folder, model["vocab"], pairs)


def _write_vocabulary(folder: Path, vocab: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
