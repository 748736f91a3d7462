"""What a model is before any of its weights are read (`Checkpoint`), and how they are (`Component.state`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import CheckpointError
from fastldm.loading.formats import Config
from fastldm.loading.key_names import Names, convert
from fastldm.loading.tensors import read_tensors


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its raw config, and where its weights lie."""

    name: str
    class_name: str
    config: Config
    files: tuple[Path, ...]
    source: str
    """What errors call it: the path of its weights."""
    names: Mapping[str, Names] | None = field(default=None, repr=False)
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
        return self._own(tensors) if self.names is None else convert(tensors, self.names)

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
