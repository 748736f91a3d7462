"""A model's raw configs and files (`Checkpoint`), and reading its weights (`Component.state`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from fastldm.conditioning.depth import DepthEstimator
from fastldm.conditioning.tokenizer import BertTokenizer, GlideTokenizer, T5Tokenizer, Tokenizer
from fastldm.errors import CheckpointError
from fastldm.loading.formats import NOISING, PRIOR_SCHEDULER, SUPER_RESOLUTION_SCHEDULER, Config
from fastldm.loading.key_names import Names, convert
from fastldm.loading.tensors import read_tensors
from fastldm.models.config import GLIDE_TEXT, LDM_BERT, T5_ENCODER
from fastldm.models.families import IMAGE_NORMALIZER, folder_name


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its raw config and the files with its weights."""

    name: str
    class_name: str
    config: Config
    files: tuple[Path, ...]
    source: str
    """Its name in error messages: the path of its weights."""
    names: Mapping[str, Names] | None = field(default=None, repr=False)
    """For a single file: the keys of this component, each with its new name or names."""
    allow_pickle: bool = False

    def state(self, *, to_prepare: bool = False) -> dict[str, Tensor]:
        """The weights by diffusers' and transformers' names: views of the mapped files, read on first use.

        to_prepare: copy the weights that `fastldm.loading.prepare` moves, so that their pages of the file are not held:
            convolution weights, in channels-last memory, and query, key and value projections.

        CheckpointError for a component of a bundle, which has no PyTorch weights.
        """
        if not self.files:
            raise CheckpointError(
                f"{self.source} is an exported bundle, which PyTorch cannot read: give the model it was exported from"
            )
        tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors.update(read_tensors(file, self.names, self.allow_pickle, to_prepare))
        return self._own(tensors) if self.names is None else convert(tensors, self.names)

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without a prefix that all keys have, and without the other weights of a full CLIP."""
        for prefix in (f"{self.name}.", f"{self.name.removesuffix('_2')}.", "transformer."):
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
        if self.class_name.startswith("CLIPVisionModel"):
            others = ("text_model.", "text_projection.", "logit_scale")
            return {key: tensor for key, tensor in tensors.items() if not key.startswith(others)}
        if not self.class_name.startswith("CLIPTextModel"):
            return tensors
        rest: tuple[str, ...] = ("vision_model.", "visual_projection.", "logit_scale")
        if not self.class_name.endswith("WithProjection"):
            rest = (*rest, "text_projection.")
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(rest)}


@dataclass(frozen=True)
class Loaded(Component):
    """A network whose weights are in no file, but in memory."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def state(self, *, to_prepare: bool = False) -> dict[str, Tensor]:
        return dict(self.tensors)


@dataclass(frozen=True)
class TokenizerFiles:
    """Where a tokenizer comes from: `folder`, or if that is None CLIP's vocabulary, which ships with fastldm."""

    folder: Path | None
    pad_token: str | None = None
    """Overrides the pad token of the tokenizer's config."""
    loaded: Any = field(default=None, repr=False)
    """transformers' tokenizer of a loaded pipeline, used in place of both."""

    def open(self, kind: type[Tokenizer] = Tokenizer) -> Tokenizer:
        """The tokenizer. CheckpointError if its files are missing or damaged, or of another kind."""
        if self.loaded is not None:
            with TemporaryDirectory() as folder:
                self.loaded.save_pretrained(folder)
                return kind(folder)
        if self.folder is not None and self.pad_token is None:
            return kind(self.folder)
        return Tokenizer(self.folder, pad_token=self.pad_token)


@dataclass(frozen=True)
class Checkpoint:
    """A model's raw configs, tokenizers and weight files, before any weights are read."""

    source: str
    components: dict[str, Component]
    """By name: "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2"."""
    scheduler: Config
    tokenizers: dict[str, TokenizerFiles]
    """By name: "tokenizer" and, for SDXL, "tokenizer_2"."""
    index: Config
    """The content of model_index.json: the pipeline's class, and settings such as `force_zeros_for_empty_prompt`."""
    low_res_scheduler: Config | None = None
    """Of an upscaler: the schedule of the noise that is added to the small picture; of unCLIP, to a vector."""
    depth: DepthEstimator | None = None
    """Of depth to image: what estimates a picture's depth, if the checkpoint has it."""
    loaded: bool = False
    """Whether it was a pipeline in memory, where diffusers has already replaced values of the config files."""
    preprocessor: Config = field(default_factory=dict)
    """Of a model that reads pictures, how they are prepared: the content of preprocessor_config.json."""
    prior_scheduler: Config | None = None
    """Of text to image by unCLIP."""
    super_res_scheduler: Config | None = None
    """Of unCLIP whose pictures are enlarged by networks of its own."""

    @property
    def schedulers(self) -> dict[str, Config]:
        """All of them, by component name."""
        own = {"scheduler": self.scheduler}
        if self.prior_scheduler is not None:
            own[PRIOR_SCHEDULER] = self.prior_scheduler
        if self.super_res_scheduler is not None:
            own[SUPER_RESOLUTION_SCHEDULER] = self.super_res_scheduler
        noising = NOISING[IMAGE_NORMALIZER in self.components or "vae" not in self.components]
        return own if self.low_res_scheduler is None else {**own, noising: self.low_res_scheduler}

    def config_source(self, name: str) -> str:
        """The name in error messages of the config of a component or of a scheduler: its file if it has one."""
        file = "scheduler_config.json" if name.endswith("scheduler") else "config.json"
        path = Path(self.source) / folder_name(self.index.get("_class_name"), name) / file
        return str(path) if not self.loaded and path.is_file() else f"{self.source}: {name}"

    def tokenizer_kind(self, name: str) -> type[Tokenizer]:
        """That of "tokenizer" or "tokenizer_2": what its text encoder was trained with."""
        encoder = self.components.get(name.replace("tokenizer", "text_encoder"))
        architectures = encoder.config.get("architectures") if encoder is not None else None
        kinds = {LDM_BERT: BertTokenizer, T5_ENCODER: T5Tokenizer, GLIDE_TEXT: GlideTokenizer}
        names = architectures if isinstance(architectures, list) else []
        return next((kind for name, kind in kinds.items() if name in names), Tokenizer)

    def tokenizer(self, name: str) -> Tokenizer:
        """Open "tokenizer" or "tokenizer_2"; each call reads its files again."""
        return self.tokenizers[name].open(self.tokenizer_kind(name))
