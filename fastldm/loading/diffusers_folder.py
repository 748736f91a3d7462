"""Opening a diffusers folder: `model_index.json`, each component's config, and its weight files."""

from __future__ import annotations

import logging
from pathlib import Path

from fastldm.conditioning.depth import DepthEstimator
from fastldm.errors import CheckpointError
from fastldm.loading.checkpoint import Checkpoint, Component, TokenizerFiles
from fastldm.loading.formats import (
    DEPTH,
    INDEX,
    NOISING,
    NOT_NEEDED,
    PREPROCESSOR,
    PRIOR_SCHEDULER,
    SCHEDULERS,
    SUPER_RESOLUTION_SCHEDULER,
    TOKENIZERS,
    Config,
    PathLike,
    WeightSet,
    choose_weights,
    component_classes,
    listed_classes,
    named_config,
    without_text,
)
from fastldm.loading.relatives import adapter_advice, adapter_label
from fastldm.loading.tensors import read_shapes
from fastldm.models.families import IMAGE_ENCODER, WEIGHTLESS, folder_name, network_classes
from fastldm.reading import Field, MapOf, Text, read_fields, read_json

logger = logging.getLogger("fastldm")


def open_diffusers(
    folder: PathLike, variant: str | None = None, *, allow_pickle: bool = False, text_encoder: bool | None = True
) -> Checkpoint:
    """Open a folder as diffusers' `save_pretrained` writes it. Reads no weights.

    variant: the precision in the names of weight files, such as "fp16". A network without such a file is loaded without
        a variant, as long as another network has one.
    allow_pickle: also accept pickled weights, of which only tensors are read.
    text_encoder: None leaves out that of DeepFloyd IF's super-resolution, whose files need not be there then.
    Raises CheckpointError for a folder that is no such model or one that fastldm cannot run, saying what it is.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    source = str(folder)
    index = read_json(folder / INDEX)
    index = without_text(index) if text_encoder is None else index
    classes = component_classes(index, source)
    ignored = [name for name in NOT_NEEDED if name in listed_classes(index) and name not in classes]
    if ignored:
        logger.info("%s: not needed and ignored: %s", source, ", ".join(ignored))
    known = network_classes(index.get("_class_name"))
    weighty = [name for name in classes if name in known and classes[name] not in WEIGHTLESS]
    folders = {name: folder / folder_name(index.get("_class_name"), name) for name in classes}
    networks = {name: _listing(folders[name]) for name in weighty}
    selected = choose_weights(networks, variant, allow_pickle, source)
    components = {}
    for name, weights in selected.items():
        files = weight_files(folders[name], weights)
        config = named_config(read_json(folders[name] / "config.json"), classes[name])
        path = str(folders[name] / weights.entry)
        components[name] = Component(name, classes[name], config, files, path, allow_pickle=allow_pickle)
    for name in classes:
        if classes[name] in WEIGHTLESS:
            config = named_config(read_json(folders[name] / "config.json"), classes[name])
            components[name] = Component(name, classes[name], config, (), str(folders[name]))
    schedulers = {
        name: {"_class_name": classes[name], **read_json(folders[name] / "scheduler_config.json")}
        for name in SCHEDULERS
        if name in classes
    }
    tokenizers = {name: folder / name for name in TOKENIZERS if name in classes}
    for tokenizer in tokenizers.values():
        if not tokenizer.is_dir():
            raise CheckpointError(f"{tokenizer} is missing, though {folder / INDEX} names it.")
    return Checkpoint(
        source,
        components,
        schedulers["scheduler"],
        {name: TokenizerFiles(tokenizer) for name, tokenizer in tokenizers.items()},
        index,
        next((schedulers[name] for name in NOISING if name in schedulers), None),
        DepthEstimator(folder) if DEPTH in listed_classes(index) else None,
        preprocessor=_preprocessor(folder, index) if IMAGE_ENCODER in classes else {},
        prior_scheduler=schedulers.get(PRIOR_SCHEDULER),
        super_res_scheduler=schedulers.get(SUPER_RESOLUTION_SCHEDULER),
    )


def _preprocessor(folder: Path, index: Config) -> Config:
    path = folder / folder_name(index.get("_class_name"), PREPROCESSOR[0]) / PREPROCESSOR[1]
    return read_json(path) if path.exists() else {}


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        reason = "is a file, not a folder: open it as a single file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {reason}.")
    if (folder / INDEX).is_file():
        return
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        raise CheckpointError(f"{folder} is empty; a model folder with a {INDEX} was expected.")
    raise CheckpointError(f"{folder} has no {INDEX}: {_describe_folder(folder, names)}")


def _describe_folder(folder: Path, names: list[str]) -> str:
    """A sentence that says what a folder holds that is no diffusers pipeline."""
    files = [name for name in names if name.endswith(".safetensors")]
    if "config.json" in names:
        config = read_json(folder / "config.json")
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else "a model of unknown class"
        return f"it holds {config.get('_class_name') or first} alone. Give the folder of a full pipeline."
    for name in files:
        if adapter := adapter_label(read_shapes(folder / name, allow_pickle=False)[0]):
            return f"{name} in it is {adapter}. {adapter_advice(adapter)}"
    if files:
        return f"to load one of its files, give that file ({', '.join(files[:3])})."
    return f"it holds {', '.join(names[:5])}. Give the folder of a diffusers pipeline."


def _listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


_SHARDS = {"weight_map": Field(MapOf(Text(255), 1))}


def weight_files(folder: Path, weights: WeightSet) -> tuple[Path, ...]:
    """The files that hold the tensors: those in the index if there is one."""
    if not weights.entry.endswith(".json"):
        return (folder / weights.entry,)
    index = folder / weights.entry
    files = sorted(set(read_fields(read_json(index), _SHARDS, str(index))["weight_map"].values()))
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not in {folder}: fetch all {len(files)} files.")
    return tuple(folder / name for name in files)
