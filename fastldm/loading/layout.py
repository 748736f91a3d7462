"""What is known of a single file from its keys and shapes: `Layout`, and what all ways to find it out share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.loading.formats import Config
from fastldm.loading.key_names import Names
from fastldm.loading.tensors import Shapes


@dataclass(frozen=True)
class OriginalComponent:
    """One component of a single file: class and config as in diffusers or transformers, and each original key with the
    new name or names of its tensor."""

    class_name: str
    config: Config
    names: dict[str, Names]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Weights that the file does not have, since they are the same in all."""


@dataclass(frozen=True)
class Layout:
    """A single file: its components, scheduler configs, each tokenizer's pad token, model_index, and ignored keys."""

    components: dict[str, OriginalComponent]
    scheduler: Config
    low_res_scheduler: Config | None
    pad_tokens: Mapping[str, str | None]
    """By tokenizer. None: its files lie beside the single file; else it is CLIP's."""
    index: Config
    ignored: list[str]


def stripped(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Those with a prefix, without it."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def count(keys: Collection[str], pattern: str) -> int:
    """One more than the highest number that the pattern's group matches, or 0."""
    return 1 + max((int(match[1]) for key in keys if (match := re.match(pattern, key))), default=-1)


def component(
    config: Config,
    shapes: Shapes,
    prefix: str,
    rename: Callable[[str], Names | None],
    source: str,
    class_name: str | None = None,
    family: str = "Stable Diffusion",
) -> OriginalComponent:
    """The component of all keys with a prefix. CheckpointError for one that no file of a family has."""
    targets = {key: rename(key[len(prefix) :]) for key in shapes if key.startswith(prefix)}
    unknown = [key for key, names in targets.items() if names is None]
    if unknown:
        raise CheckpointError(
            f"{source} holds {unknown[0]}, which no {family} checkpoint has (and {len(unknown) - 1} more such "
            "keys); it belongs to another family, or is quantised."
        )
    if class_name is None:
        class_name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
    return OriginalComponent(class_name, config, {key: names for key, names in targets.items() if names})
