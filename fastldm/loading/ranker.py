"""Reading a CLIP model that ranks pictures: a folder of transformers' CLIPModel, or the part of one that a model of
fastldm has beside its own text encoder: the image encoder and both projections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastldm.conditioning.ranking import Ranker, RankerConfig
from fastldm.conditioning.text import TextStage
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import CheckpointError
from fastldm.loading import hub
from fastldm.loading.formats import TOKENIZER_FILES, PathLike, choose_weights, named_config
from fastldm.loading.image_encoder import FILES, PREPROCESSOR, folder_component, read_image_encoder
from fastldm.loading.state import load_module
from fastldm.loading.tensors import Shapes, read_shapes
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import TextConfig
from fastldm.reading import check_path, read_json

FOLDER = "image_encoder"
_PROJECTION = "text_projection.weight"
_CLASS_NAME = "CLIPTextModelWithProjection"


def has_ranker(folder: Path) -> bool:
    """Whether a model's folder has a CLIP model's part to rank its pictures by."""
    config = folder / FOLDER / FILES[0]
    return config.is_file() and read_json(config).get("model_type") == "clip"


def find_ranker(path_or_id: PathLike, *, allow_pickle: bool = False, **where: Any) -> Path:
    """The folder of a CLIP model: a path as it is, or a hub id, whose config, tokenizer and weights are downloaded.
    where: revision, cache_dir and local_files_only.

    CheckpointError for what does not exist, for a repository without a config or weights, and for errors of the hub.
    """
    path, repo = check_path(path_or_id, "path_or_id"), str(path_or_id)
    if path.exists() or path.is_symlink():
        return path

    def choose(names: list[str]) -> list[str]:
        own = [name for name in names if "/" not in name]
        if FILES[0] not in own:
            raise CheckpointError(f"{repo} has no {FILES[0]}: expected a CLIPModel of transformers")
        owner, name = repo.split("/")
        weights = choose_weights({name: own}, None, allow_pickle, owner)[name]
        return [*(name for name in (FILES[0], PREPROCESSOR, *TOKENIZER_FILES) if name in own), *weights.names]

    return hub.find_files(repo, choose, **where)[0].parent


def describe_ranker(folder: Path, *, allow_pickle: bool = False) -> RankerConfig:
    """The sizes of a CLIP model, without its weights. Errors as of `read_ranker`, but for those of numbers."""
    component = folder_component(folder, _CLASS_NAME, allow_pickle=allow_pickle)
    raw, source, shapes = component.config, str(folder / FILES[0]), dict[str, tuple[int, ...]]()
    for file in component.files:
        shapes |= read_shapes(file, allow_pickle)[0]
    if raw.get("model_type") != "clip" or _PROJECTION not in shapes:
        raise CheckpointError(f"{folder} has an image encoder alone: expected a CLIPModel, whose text encoder says")
    vision = VisionConfig.from_dict(raw, source)
    if not any(key.startswith("text_model.") for key in shapes):
        return RankerConfig(vision, None, _projection(shapes, folder))
    text = {**raw.get("text_config", {}), "projection_dim": raw.get("projection_dim", 512)}
    named = named_config({"model_type": "clip", "text_config": text}, _CLASS_NAME)
    return RankerConfig(vision, TextConfig.from_dict(named, source))


def _projection(shapes: Shapes, folder: Path) -> tuple[int, int]:
    shape = shapes[_PROJECTION]
    if len(shape) != 2:
        raise CheckpointError(f"{folder}: {_PROJECTION} has shape {shape}, expected a matrix")
    return shape[0], shape[1]


def read_ranker(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    own: Sequence[TextStage],
    *,
    allow_pickle: bool = False,
) -> Ranker:
    """Read a CLIP model. own: the text stages of the model whose pictures it will rank.

    CheckpointError for a folder that is missing, damaged, or of another kind, and for one without text encoder whose
    projection does not fit the model's.
    """
    config = describe_ranker(folder, allow_pickle=allow_pickle)
    images = read_image_encoder(folder, dtype, device, allow_pickle=allow_pickle)
    component = folder_component(folder, _CLASS_NAME, allow_pickle=allow_pickle)
    state = component.state()
    if config.text is None:
        projection = state[_PROJECTION].to(device, dtype)
        fits = len(own) == 1 and isinstance(own[0].model, CLIPText) and not own[0].model.config.kind
        if not fits or own[0].model.config.hidden != projection.shape[1]:
            raise CheckpointError(
                f"{folder} has no text encoder, and its projection reads {projection.shape[1]} channels, which this "
                "model's text encoder does not have: give the folder of a whole CLIPModel"
            )
        return Ranker(images, None, projection)
    with torch.device("meta"):
        model = CLIPText(config.text)
    load_module(model, state, dtype=dtype, device=device, source=component.source)
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.text.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1}, and the text encoder has "
            f"{config.text.vocab} embeddings ('vocab_size')"
        )
    return Ranker(images, TextStage(tokenizer, model))
