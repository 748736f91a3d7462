"""Models on disk or on a hub, and their weights into networks.

    path or id -> resolve -> open_diffusers or open_single_file -> Checkpoint -> Component.state -> load_module

`Checkpoint` is what a model is before any weight is read; `Component.state` maps the weights into memory, and
`load_module` gives them to a network that was built on the meta device. All that is wrong with what lies outside (a
missing folder, a git-lfs pointer, another family's shapes) ends here as one CheckpointError that says so.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastldm.checks import show
from fastldm.conditioning.text import Tokenizer
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import relatives, single_file
from fastldm.loading.tensors import read_shapes, read_tensors
from fastldm.reading import (
    Field,
    MapOf,
    Maybe,
    Text,
    check_path,
    read_fields,
    read_json,
)

logger = logging.getLogger("fastldm")

PathLike = str | os.PathLike[str]
Config = dict[str, Any]
Module = TypeVar("Module", bound=nn.Module)

INDEX = "model_index.json"
NETWORK_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
_REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its raw config, and where its weights lie."""

    name: str
    class_name: str
    config: Config
    files: tuple[Path, ...]
    source: str
    """What errors call it: the path of its weights."""
    names: Mapping[str, single_file.Names] | None = field(default=None, repr=False)
    """For a single file: the keys that are this component's, and the name or names each gets."""
    allow_pickle: bool = False

    def state(self, *, to_prepare: bool = False) -> dict[str, Tensor]:
        """The weights by diffusers' and transformers' names: views of the mapped files, read as they are used.

        to_prepare: those that `fastldm.loading.prepare` moves are copies, so that their pages of the file are not held:
            convolutions' weights, in channels-last memory, and the projections to queries, keys and values.

        CheckpointError where there are none: a bundle holds engines' weights, not PyTorch's.
        """
        if not self.files:
            raise CheckpointError(
                f"{self.source} is an exported bundle, which PyTorch cannot read: give the model that it was made of"
            )
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors.update(read_tensors(file, self.names, self.allow_pickle, to_prepare))
        return self._own(tensors) if self.names is None else single_file.convert(tensors, self.names)

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without what else lies in a component's file: a prefix before all keys, and the rest of a whole CLIP."""
        for prefix in (f"{self.name}.", f"{self.name.removesuffix('_2')}.", "transformer."):
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
        if not self.class_name.startswith("CLIPTextModel"):
            return tensors
        rest: tuple[str, ...] = ("vision_model.", "visual_projection.", "logit_scale")
        if not self.class_name.endswith("WithProjection"):
            rest = (*rest, "text_projection.")
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(rest)}


@dataclass(frozen=True)
class TokenizerFiles:
    """Where a tokenizer comes from: `folder`, or CLIP's own vocabulary, which ships with fastldm, if that is None."""

    folder: Path | None
    pad_token: str | None = None
    """In place of the one that the tokenizer's own settings name."""
    loaded: Any = field(default=None, repr=False)
    """Of a loaded pipeline: transformers' tokenizer, in place of both."""

    def open(self) -> Tokenizer:
        """The tokenizer. CheckpointError where its files are missing or damaged."""
        if self.loaded is None:
            return Tokenizer(self.folder, pad_token=self.pad_token)
        with TemporaryDirectory() as folder:
            self.loaded.save_pretrained(folder)
            return Tokenizer(folder)


@dataclass(frozen=True)
class Checkpoint:
    """What a model is, before any of its weights are read."""

    source: str
    components: dict[str, Component]
    """By name: "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2"."""
    scheduler: Config
    tokenizers: dict[str, TokenizerFiles]
    """By name: "tokenizer" and, for SDXL, "tokenizer_2"."""
    index: Config
    """model_index.json as it is: the pipeline's class, and settings such as `force_zeros_for_empty_prompt`."""
    loaded: bool = False
    """Whether it was a pipeline in memory: diffusers has changed by then what it changes of the files' values."""

    def config_source(self, name: str) -> str:
        """What errors call the config of a component, or of "scheduler": its file, where it has one."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        path = Path(self.source) / name / file
        return str(path) if not self.loaded and path.is_file() else f"{self.source}: {name}"

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer "tokenizer" or "tokenizer_2"; each call reads it anew."""
        return self.tokenizers[name].open()


def open_checkpoint(
    path_or_id: PathLike,
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
) -> Checkpoint:
    """A diffusers folder, a hub id, or a single file, whichever `path_or_id` is. Reads no weights.

    Arguments and errors are those of `resolve`, `open_diffusers` and `open_single_file`; `prediction_type` is for
    single files, which do not say it.
    """
    path = resolve(
        path_or_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        variant=variant,
        allow_pickle=allow_pickle,
    )
    if path.is_dir():
        if prediction_type is not None:
            raise InputError(f"prediction_type is for single files; {path} says it in its scheduler_config.json.")
        return open_diffusers(path, variant, allow_pickle=allow_pickle)
    return open_single_file(path, prediction_type=prediction_type, allow_pickle=allow_pickle)


# --- A hub id or a path to a path ---


def resolve(
    path_or_id: PathLike,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """The local path of a model. What exists locally is returned as it is, and no network is touched.

    Otherwise "owner/name" is a hub id: what fastldm needs of that repository (configs, tokenizers, and each network's
    weights in one variant and one format) is fetched into huggingface_hub's cache, or only looked up there when
    `local_files_only` or HF_HUB_OFFLINE is set.

    Raises CheckpointError for a path that does not exist, and for all that can go wrong with a hub.
    """
    path = check_path(path_or_id, "path_or_id")
    if path.exists():
        return path
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link that leads nowhere, or to itself.")
    text = str(path_or_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) or text.endswith((".safetensors", ".ckpt", ".bin", ".pt")):
        raise CheckpointError(
            f"{text} does not exist here. Give a model folder, a .safetensors file, or a hub id (owner/name)."
        )
    return _from_hub(text, revision, cache_dir, local_files_only, variant, allow_pickle)


def _from_hub(
    repo: str,
    revision: str | None,
    cache_dir: PathLike | None,
    local_files_only: bool,
    variant: str | None,
    allow_pickle: bool,
) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    cache = None if cache_dir is None else os.fspath(cache_dir)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    with _hub_errors(repo, revision, offline):
        found = huggingface_hub.hf_hub_download(
            repo, INDEX, revision=revision, cache_dir=cache, local_files_only=offline
        )
    snapshot = Path(found).parent
    index, commit = read_json(snapshot / INDEX), snapshot.name  # the commit pins what follows to the same state
    if not offline:
        try:
            siblings = huggingface_hub.model_info(repo, revision=commit, timeout=10).siblings or []
            names = [file.rfilename for file in siblings]
        except Exception as error:  # as in _hub_errors
            logger.warning("%s: the hub cannot be asked (%s); trying what is in the local cache", repo, error)
            offline = True
    if offline:
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.glob("*/*")]
        _wanted(index, names, variant, allow_pickle, source=f"{repo} in the local hub cache")
        return snapshot
    wanted = _wanted(index, names, variant, allow_pickle, source=repo)
    with _hub_errors(repo, revision, offline):
        return Path(huggingface_hub.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=wanted))


def _wanted(index: Config, names: Collection[str], variant: str | None, allow_pickle: bool, source: str) -> list[str]:
    """The files of a repository that loading will read."""
    classes = component_classes(index, source)
    inside = {
        name: {path.removeprefix(f"{name}/") for path in names if path.startswith(f"{name}/") and path.count("/") == 1}
        for name in classes
    }
    networks = {name: inside[name] for name in classes if name in NETWORK_CLASSES}
    chosen = _choose_weights(networks, variant, allow_pickle, source)
    wanted = [INDEX, "scheduler/scheduler_config.json"]
    for name in classes:
        if name in NETWORK_CLASSES:
            wanted += [f"{name}/{file}" for file in ("config.json", *chosen[name].names)]
        elif name in TOKENIZERS:
            wanted += [f"{name}/{file}" for file in TOKENIZER_FILES if file in inside[name]]
    return wanted


@contextmanager
def _hub_errors(repo: str, revision: str | None, offline: bool) -> Iterator[None]:
    """The hub client's errors as a CheckpointError. Those of its HTTP library differ by version: hence `Exception`."""
    from huggingface_hub import errors

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        why = f"{repo} asks for its conditions to be accepted: do so on its page, then log in with `hf auth login`."
        raise CheckpointError(why) from error
    except errors.RepositoryNotFoundError as error:
        why = f"There is no folder {repo} here and no such model on the hub; if it is private, log in: `hf auth login`."
        raise CheckpointError(why) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the hub.") from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            why = "the hub was not asked, as local_files_only or HF_HUB_OFFLINE is set"
        else:
            why = "the hub cannot be reached"
        raise CheckpointError(f"{at} is neither a folder here nor in the local hub cache, and {why}.") from error
    except errors.EntryNotFoundError as error:
        why = f"{at} has no {INDEX}: it is not a diffusers pipeline. A file in it can be downloaded and given by path."
        raise CheckpointError(why) from error
    except Exception as error:
        raise CheckpointError(f"{at} cannot be fetched from the hub: {error}") from error


# --- A diffusers folder ---


def open_diffusers(folder: PathLike, variant: str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """A folder as diffusers' `save_pretrained` writes it. Reads no weights.

    variant: the precision in the weights' file names, such as "fp16". A network that has no such file is taken plain
        as long as another has one.
    allow_pickle: also take pickled weights, and then only tensors from them.
    Raises CheckpointError for a folder that is no such model or one that fastldm cannot run, naming what it is.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    source = str(folder)
    index = read_json(folder / INDEX)
    classes = component_classes(index, source)
    left = [name for name in _NOT_NEEDED if name in _listed(index)]
    if left:
        logger.info("%s: not needed and left alone: %s", source, ", ".join(left))
    networks = {name: _listing(folder / name) for name in classes if name in NETWORK_CLASSES}
    chosen = _choose_weights(networks, variant, allow_pickle, source)
    components = {}
    for name, weights in chosen.items():
        files = _weight_files(folder / name, weights)
        config = named_config(read_json(folder / name / "config.json"), classes[name])
        shown = str(folder / name / weights.entry)
        components[name] = Component(name, classes[name], config, files, shown, allow_pickle=allow_pickle)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizers = {name: folder / name for name in TOKENIZERS if name in classes}
    for path in tokenizers.values():
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing, though {folder / INDEX} names it.")
    return Checkpoint(
        source,
        components,
        {"_class_name": classes["scheduler"], **scheduler},
        {name: TokenizerFiles(path) for name, path in tokenizers.items()},
        index,
    )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file, not a folder: open it as a single file" if folder.exists() else "not there"
        raise CheckpointError(f"{folder} is {what}.")
    if (folder / INDEX).is_file():
        return
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        raise CheckpointError(f"{folder} is empty; a model folder with a {INDEX} was expected.")
    raise CheckpointError(f"{folder} has no {INDEX}: {_what_folder_is(folder, names)}")


def _what_folder_is(folder: Path, names: list[str]) -> str:
    """A sentence on a folder that is no diffusers pipeline."""
    singles = [name for name in names if name.endswith(".safetensors")]
    if "config.json" in names:
        config = read_json(folder / "config.json")
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else "a model of unknown class"
        return f"it holds {config.get('_class_name') or first} alone. Give the folder of a whole pipeline."
    for name in singles:
        if what := single_file.recognise_adapter(read_shapes(folder / name, allow_pickle=False)[0]):
            return f"{name} in it is {what}, which fastldm does not load yet."
    if singles:
        return f"to load one of its files, give that file ({', '.join(singles[:3])})."
    return f"it holds {', '.join(names[:5])}. Give the folder of a diffusers pipeline."


_CLASS = {"_class_name": Field(Maybe(Text(100)), None)}


def _listed(index: Config) -> dict[str, str]:
    """Component name to class name, of all that a pipeline has; it lists [null, null] for what it was saved without."""
    components = {name: value for name, value in index.items() if not name.startswith("_")}
    pairs = {name: value for name, value in components.items() if isinstance(value, list | tuple) and len(value) == 2}
    return {_word(name): _word(class_name) for name, (_, class_name) in pairs.items() if class_name is not None}


def _word(value: Any) -> str:
    """A name as it is, or what stands in its place as an error may say it."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else show(value)


def component_classes(index: Config, source: str) -> dict[str, str]:
    """Component name to class name, of those that fastldm reads. Raises CheckpointError for a model it cannot run."""
    pipeline, listed = read_fields(index, _CLASS, f"{source}: {INDEX}")["_class_name"], _listed(index)
    relatives.check_class(pipeline, source)
    if "text_encoder" not in listed and ("text_encoder_2" in listed or index.get("requires_aesthetics_score")):
        raise CheckpointError(f"{source} is the Stable Diffusion XL refiner, which fastldm does not run.")
    known = (*NETWORK_CLASSES, *TOKENIZERS, "scheduler")
    strange = [f"{name} ({listed[name]})" for name in listed if name not in known and name not in _NOT_NEEDED]
    required = (*_REQUIRED, *(["tokenizer_2"] if "text_encoder_2" in listed else []))
    lacking = [name for name in required if name not in listed]
    if strange or lacking:
        why = f"has {', '.join(strange)}" if strange else f"has no {', no '.join(lacking)}"
        raise CheckpointError(
            f"{source} is a {pipeline or 'pipeline'} and {why}: fastldm cannot run it. {relatives.RUNS}."
        )
    for name, classes in NETWORK_CLASSES.items():
        if name in listed and listed[name] not in classes:
            raise CheckpointError(
                f"{source}: {name} is a {listed[name]}; fastldm runs {' or '.join(classes)} in its place."
            )
    relatives.check_known(pipeline, source)
    return {name: listed[name] for name in known if name in listed}


def named_config(config: Config, class_name: str) -> Config:
    """A component's config with the class that the pipeline's index gives it, whose word counts in diffusers too."""
    inner = config.get("text_config")
    if class_name.startswith("CLIPText") and config.get("model_type") == "clip" and isinstance(inner, dict):
        config = inner  # of a whole CLIP, as transformers reads it
    key, value = ("architectures", [class_name]) if class_name.startswith("CLIP") else ("_class_name", class_name)
    return {**config, key: value}


# --- Which files hold a component's weights ---


@dataclass(frozen=True)
class _Weights:
    """One complete set of weights in a component's folder: a single file, or an index and its shards."""

    variant: str | None
    pickled: bool
    entry: str
    shards: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.entry, *self.shards)


_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', transformers', transformers' pickles
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?:\.(?P<early>\w+))?(?P<shard>-\d{{5}}-of-\d{{5}})?(?:\.(?P<late>\w+))?"
    r"\.(?P<type>safetensors|bin)(?:(?:\.(?P<mid>\w+))?(?P<index>\.index)(?:\.(?P<last>\w+))?\.json)?"
)


def _weight_sets(names: Collection[str]) -> list[_Weights]:
    """All sets of weights among file names, safetensors first. A shard belongs to the index of its stem and variant."""
    entries: dict[tuple[bool, int, str], str] = {}
    shards: dict[tuple[bool, int, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = next((match[k] for k in ("early", "late", "mid", "last") if match[k]), "")
            key = (match["type"] == "bin", _STEMS.index(match["stem"]), variant)
            if match["shard"]:
                shards.setdefault(key, []).append(name)
            elif key not in entries or match["index"] is None:  # a whole file goes before shards
                entries[key] = name
    sets = []
    for key, name in sorted(entries.items()):
        pickled, _, variant = key
        sets.append(
            _Weights(variant or None, pickled, name, tuple(shards.get(key, ())) if name.endswith("json") else ())
        )
    return sets


def _choose_weights(
    networks: Mapping[str, Collection[str]], variant: str | None, allow_pickle: bool, source: str
) -> dict[str, _Weights]:
    """For each network, given the names of the files in its folder, the weights to load."""
    sets = {name: _weight_sets(names) for name, names in networks.items()}
    usable = {name: [w for w in found if allow_pickle or not w.pickled] for name, found in sets.items()}
    anywhere = any(w.variant == variant for found in usable.values() for w in found)
    chosen = {}
    for name, found in usable.items():
        match = next((w for w in found if w.variant == variant), None)
        if match is None and anywhere:
            match = next((w for w in found if w.variant is None), None)
            if match is not None:
                logger.warning("%s/%s has no variant %r: its plain weights are used", source, name, variant)
        if match is None:
            raise CheckpointError(_no_weights(f"{source}/{name}", networks[name], sets[name], found, variant))
        chosen[name] = match
    return chosen


def _no_weights(
    where: str, names: Collection[str], found: list[_Weights], usable: list[_Weights], variant: str | None
) -> str:
    if usable:
        variants = sorted({w.variant or "" for w in usable})
        calls = " or ".join(f'variant="{name}"' if name else "no variant" for name in variants)
        wanted = f'variant "{variant}"' if variant else "plain weights (no variant)"
        return f"{where} has no {wanted}. What is there loads with {calls}."
    if found:
        return (
            f"{where} has only pickled weights ({found[0].entry}), which can run any code when loaded. Look for "
            "safetensors, or pass allow_pickle=True to take nothing but tensors from them."
        )
    there = ", ".join(sorted(names)[:5]) or "nothing"
    return f"{where} has no weights: expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors, found {there}."


def _listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


_SHARDS = {"weight_map": Field(MapOf(Text(255), 1))}


def _weight_files(folder: Path, weights: _Weights) -> tuple[Path, ...]:
    """The files that hold the tensors: those that the index names, where there is one."""
    if not weights.entry.endswith(".json"):
        return (folder / weights.entry,)
    index = folder / weights.entry
    files = sorted(set(read_fields(read_json(index), _SHARDS, str(index))["weight_map"].values()))
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not in {folder}: fetch all {len(files)} files.")
    return tuple(folder / name for name in files)


# --- A single file ---


def open_single_file(path: PathLike, *, prediction_type: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """One file in the original Stability layout: SD 1, SD 2, SDXL, or an inpainting form of them. Reads no weights.

    prediction_type: "epsilon", "v_prediction" or "sample", which such a file seldom says. The default is diffusers':
        v-prediction for SD 2 (so give "epsilon" for SD 2 base and SD-Turbo), epsilon for all others.
    Raises CheckpointError for a file that is something else or damaged, naming what it is.
    """
    path = Path(path).expanduser()
    source = str(path)
    shapes, metadata = read_shapes(path, allow_pickle)
    layout = single_file.read_layout(shapes, source=source, metadata=metadata, prediction_type=prediction_type)
    if layout.ignored:
        averaged = sum(key.startswith("model_ema.") for key in layout.ignored)
        logger.info(
            "%s: left alone %d keys that no network needs (%d of them moving averages)",
            source,
            len(layout.ignored),
            averaged,
        )
    components = {
        name: Component(name, part.class_name, part.config, (path,), source, part.names, allow_pickle)
        for name, part in layout.parts.items()
    }
    tokenizers = {name: TokenizerFiles(None, pad) for name, pad in layout.pad_tokens.items()}
    return Checkpoint(source, components, layout.scheduler, tokenizers, layout.index)


# --- Weights into networks ---


def load_module(
    module: Module,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    source: str,
) -> Module:
    """Give `module`, built on the meta device, the weights `state`; it comes back in eval mode, without gradients.

    A tensor of the right dtype and device is taken as it is, so a mapped file stays mapped: pages are read when first
    used and are private to the process once written. Others are converted one at a time.

    Strict: each parameter must be there in its shape and nothing may be left over, save what older files have:
    `position_ids`, the names query, key, value and proj_attn in a VAE's attention, a `text_model.` prefix more or
    less, and linear layers as convolutions of one pixel. Raises CheckpointError, naming `source`, the first few names
    and the likely cause; `module` is then unchanged.
    """
    fitted = fit_names(module, state, source)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    ready = {
        name: (state[key] if state[key].shape == shapes[name] else state[key].flatten(1)).to(device, dtype)
        for name, key in fitted.items()
    }
    module.load_state_dict(ready, assign=True)
    return module.requires_grad_(False).eval()


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def fit_names(module: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """The module's names, each with the key of `state` that is its tensor."""
    expected = module.state_dict()
    fitted: dict[str, str] = {}
    unexpected = []
    for key in state:
        name = next((name for name in _spellings(key) if name in expected), None)
        if name is not None and name not in fitted:
            fitted[name] = key
        elif not key.endswith("position_ids"):
            unexpected.append(key)
    missing = [name for name in expected if name not in fitted]
    shapes = [
        f"{name} is {tuple(state[key].shape)}, expected {tuple(expected[name].shape)}"
        for name, key in fitted.items()
        if tuple(state[key].shape) not in (tuple(expected[name].shape), (*expected[name].shape, 1, 1))
    ]
    integers = [key for name, key in fitted.items() if not state[key].is_floating_point()]
    if not (missing or unexpected or shapes or integers):
        return fitted

    faults = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
            (integers, "not floating point"),
        )
        if names
    ]
    adapter = single_file.recognise_adapter({key: tuple(tensor.shape) for key, tensor in state.items()})
    if adapter:
        cause = f"It is {adapter} or contains one, which fastldm does not load yet."
    elif integers or any(key.endswith((".absmax", ".scale_weight", ".weight_scale", ".qweight")) for key in unexpected):
        cause = "They look quantised: use weights in a floating-point format."
    elif not fitted:
        cause = "They are of another kind of model altogether."
    else:
        cause = "They belong to another model or version than the config beside them."
    raise CheckpointError(f"The weights in {source} do not fit: {'; '.join(faults)}. {cause}")


def _spellings(key: str) -> Iterator[str]:
    """A key's names today: transformers 5.6 writes CLIP without `text_model.`, old diffusers a VAE's q as `query`."""
    yield key
    yield f"text_model.{key}"
    yield key.removeprefix("text_model.")
    head, _, end = key.rpartition(".")
    stem, _, last = head.rpartition(".")
    if last in _OLD_VAE_ATTENTION:
        yield f"{stem}.{_OLD_VAE_ATTENTION[last]}.{end}"
