"""The components and weight files of a diffusers folder, by class names and file names, here or on a hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastldm.checks import show
from fastldm.errors import CheckpointError
from fastldm.loading import relatives
from fastldm.models.config import LDM_BERT, T5_ENCODER
from fastldm.models.families import (
    DEPTH_PIPELINE,
    IF_SUPER_RESOLUTIONS,
    KARLO_PIPELINE,
    KARLO_VARIATION_PIPELINE,
    TEXT_ENCODERS,
    TEXT_UNCLIP_PIPELINE,
    UNCLIP_PIPELINE,
    UPSCALE_PIPELINE,
    component_name,
    folder_name,
    network_classes,
    what_runs,
)
from fastldm.reading import Field, Maybe, Text, read_fields

logger = logging.getLogger("fastldm")

PathLike = str | os.PathLike[str]
Config = dict[str, Any]

INDEX = "model_index.json"
NOISING = ("low_res_scheduler", "image_noising_scheduler")
"""Those of noise that is added to what is read: to the x4 upscaler's small picture; to unCLIP's vector of a picture,
and to the small picture of DeepFloyd IF."""
PRIOR_SCHEDULER, PRIOR_TOKENIZER = "prior_scheduler", "prior_tokenizer"
SUPER_RESOLUTION_SCHEDULER = "super_res_scheduler"
SCHEDULERS = ("scheduler", *NOISING, PRIOR_SCHEDULER, SUPER_RESOLUTION_SCHEDULER)
DEPTH = "depth_estimator"
TOKENIZERS = ("tokenizer", "tokenizer_2", PRIOR_TOKENIZER)
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
PREPROCESSOR = ("feature_extractor", "preprocessor_config.json")
"""The folder and the file that say how an image encoder's pictures are prepared."""
TOKENIZER_FILES = (
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


_CLASS = {"_class_name": Field(Maybe(Text(100)), None)}


def listed_classes(index: Config) -> dict[str, str]:
    """Component name to class name, of all components; [null, null] is one that the pipeline was saved without."""
    components = {name: value for name, value in index.items() if not name.startswith("_")}
    pairs = {name: value for name, value in components.items() if isinstance(value, list | tuple) and len(value) == 2}
    return {
        _printable(name): _printable(class_name) for name, (_, class_name) in pairs.items() if class_name is not None
    }


def _printable(value: Any) -> str:
    """A name unchanged, or as an error message shows it if it is not printable."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else show(value)


def component_classes(index: Config, source: str) -> dict[str, str]:
    """Component name to class name, of components that fastldm reads. CheckpointError for a model it cannot run.

    Names are those of Stable Diffusion's pipelines: `families.folder_name` is what this one calls them.
    """
    pipeline = read_fields(index, _CLASS, f"{source}: {INDEX}")["_class_name"]
    listed = {component_name(pipeline, name): class_name for name, class_name in listed_classes(index).items()}
    relatives.check_class(pipeline, source)
    others: dict[str, tuple[str, ...]] = {UPSCALE_PIPELINE: NOISING[:1]}
    others |= dict.fromkeys((UNCLIP_PIPELINE, *IF_SUPER_RESOLUTIONS), NOISING[1:])
    others[TEXT_UNCLIP_PIPELINE] = (*NOISING[1:], PRIOR_SCHEDULER, PRIOR_TOKENIZER)
    others[KARLO_PIPELINE] = (PRIOR_SCHEDULER, SUPER_RESOLUTION_SCHEDULER)
    others[KARLO_VARIATION_PIPELINE] = (SUPER_RESOLUTION_SCHEDULER,)
    networks = network_classes(pipeline)
    alone = (name for name in networks if name not in TEXT_ENCODERS)
    needed = (*alone, "scheduler", *others.get(str(pipeline), ()))
    of_text = (*TEXT_ENCODERS, *TOKENIZERS[:2]) if "text_encoder" in networks else ()
    names = [name for name in (*networks, *TOKENIZERS, *SCHEDULERS) if name in (*needed, *of_text)]
    not_needed = (*NOT_NEEDED, *([DEPTH] if pipeline == DEPTH_PIPELINE else []))  # a request brings a map, or not
    unknown = [f"{name} ({listed[name]})" for name in listed if name not in names and name not in not_needed]
    texts = [name for name in TEXT_ENCODERS if name in listed]  # the refiner has the second alone
    if not texts and of_text and pipeline not in IF_SUPER_RESOLUTIONS:  # which may read another model's text states
        texts = ["text_encoder"]
    required = (*needed, *(name for text in texts for name in (text, text.replace("text_encoder", "tokenizer"))))
    missing = [folder_name(pipeline, name) for name in required if name not in listed]
    if unknown or missing:
        reason = f"has {', '.join(unknown)}" if unknown else f"has no {', no '.join(missing)}"
        raise CheckpointError(
            f"{source} is a {pipeline or 'pipeline'} and {reason}: fastldm cannot run it. {what_runs()}."
        )
    for name, classes in networks.items():
        if name in listed and listed[name] not in classes:
            raise CheckpointError(
                f"{source}: {folder_name(pipeline, name)} is a {listed[name]}; fastldm runs {' or '.join(classes)} in "
                "its place."
            )
    relatives.check_known(pipeline, source)
    return {name: listed[name] for name in names if name in listed}


def without_text(index: Config) -> Config:
    """Of DeepFloyd IF's super-resolution the index without its text encoder, and of any other model as it is."""
    left_out = {name: [None, None] for name in ("text_encoder", "tokenizer")}
    return {**index, **left_out} if index.get("_class_name") in IF_SUPER_RESOLUTIONS else index


def named_config(config: Config, class_name: str) -> Config:
    """A component's config with the class from the pipeline's index, which diffusers uses too."""
    if class_name.startswith("CLIPVision"):
        return config
    inner = config.get("text_config")
    if class_name.startswith("CLIPText") and config.get("model_type") == "clip" and isinstance(inner, dict):
        config = inner  # the text half of a full CLIP, as transformers reads it
    of_text = class_name.startswith("CLIP") or class_name in (LDM_BERT, T5_ENCODER)
    key, value = ("architectures", [class_name]) if of_text else ("_class_name", class_name)
    return {**config, key: value}


@dataclass(frozen=True)
class WeightSet:
    """One complete set of weights in a component's folder: a file, or an index and its shards."""

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


def _weight_sets(names: Collection[str]) -> list[WeightSet]:
    """All sets of weights among file names, safetensors first. A shard belongs to the index of its stem and variant."""
    entries: dict[tuple[bool, int, str], str] = {}
    shards: dict[tuple[bool, int, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = next((match[k] for k in ("early", "late", "mid", "last") if match[k]), "")
            key = (match["type"] == "bin", _STEMS.index(match["stem"]), variant)
            if match["shard"]:
                shards.setdefault(key, []).append(name)
            elif key not in entries or match["index"] is None:  # a single file is preferred to shards
                entries[key] = name
    sets = []
    for key, name in sorted(entries.items()):
        pickled, _, variant = key
        sets.append(
            WeightSet(variant or None, pickled, name, tuple(shards.get(key, ())) if name.endswith("json") else ())
        )
    return sets


def choose_weights(
    networks: Mapping[str, Collection[str]], variant: str | None, allow_pickle: bool, source: str
) -> dict[str, WeightSet]:
    """The weights to load for each network, from the names of the files in its folder.

    CheckpointError if a network has no usable weights."""
    sets = {name: _weight_sets(names) for name, names in networks.items()}
    usable = {name: [w for w in found if allow_pickle or not w.pickled] for name, found in sets.items()}
    any_has_variant = any(w.variant == variant for candidates in usable.values() for w in candidates)
    selected = {}
    for name, candidates in usable.items():
        match = next((w for w in candidates if w.variant == variant), None)
        if match is None and any_has_variant:
            match = next((w for w in candidates if w.variant is None), None)
            if match is not None:
                logger.warning("%s/%s has no variant %r: its weights without a variant are used", source, name, variant)
        if match is None:
            raise CheckpointError(_no_weights(f"{source}/{name}", networks[name], sets[name], candidates, variant))
        selected[name] = match
    return selected


def _no_weights(
    location: str, names: Collection[str], sets: list[WeightSet], usable: list[WeightSet], variant: str | None
) -> str:
    if usable:
        variants = sorted({w.variant or "" for w in usable})
        calls = " or ".join(f'variant="{name}"' if name else "no variant" for name in variants)
        expected = f'variant "{variant}"' if variant else "weights without a variant"
        return f"{location} has no {expected}. Its weights load with {calls}."
    if sets:
        return (
            f"{location} has only pickled weights ({sets[0].entry}), which can run any code when loaded. Look for "
            "safetensors, or pass allow_pickle=True to load only tensors from them."
        )
    present = ", ".join(sorted(names)[:5]) or "nothing"
    return f"{location} has no weights: expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors, found {present}."
