"""Reading a CLIP model that ranks pictures: a folder of transformers' CLIPModel, or the part of one that a model of
fastldm has beside its own text encoder: the image encoder and both projections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastldm.conditioning.ranking import Ranker
from fastldm.conditioning.text import TextStage
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import CheckpointError
from fastldm.loading.formats import named_config
from fastldm.loading.image_encoder import FILES, folder_component, read_image_encoder
from fastldm.loading.state import load_module
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig
from fastldm.reading import read_json

FOLDER = "image_encoder"
_PROJECTION = "text_projection.weight"


def has_ranker(folder: Path) -> bool:
    """Whether a model's folder has a CLIP model's part to rank its pictures by."""
    config = folder / FOLDER / FILES[0]
    return config.is_file() and read_json(config).get("model_type") == "clip"


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
    images = read_image_encoder(folder, dtype, device, allow_pickle=allow_pickle)
    component = folder_component(folder, "CLIPTextModelWithProjection", allow_pickle=allow_pickle)
    state = component.state()
    raw = read_json(folder / FILES[0])
    if raw.get("model_type") != "clip" or not any(key.startswith("text_projection") for key in state):
        raise CheckpointError(f"{folder} has an image encoder alone: expected a CLIPModel, whose text encoder says")
    if set(state) == {_PROJECTION}:
        projection = state[_PROJECTION].to(device, dtype)
        if len(own) != 1 or not isinstance(own[0].model, CLIPText) or own[0].model.config.hidden != projection.shape[1]:
            raise CheckpointError(
                f"{folder} has no text encoder, and its projection reads {projection.shape[1]} channels, which this "
                "model's text encoder does not have: give the folder of a whole CLIPModel"
            )
        return Ranker(images, None, projection)
    text = {**raw.get("text_config", {}), "projection_dim": raw.get("projection_dim", 512)}
    named = named_config({"model_type": "clip", "text_config": text}, "CLIPTextModelWithProjection")
    config = TextConfig.from_dict(named, str(folder / FILES[0]))
    with torch.device("meta"):
        model = CLIPText(config)
    load_module(model, state, dtype=dtype, device=device, source=component.source)
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1}, and the text encoder has {config.vocab} "
            "embeddings ('vocab_size')"
        )
    return Ranker(images, TextStage(tokenizer, model))
