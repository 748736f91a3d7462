"""Reading CLIP's image encoder from a folder of transformers: of its own, or of a whole CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastldm.conditioning.image_encoder import ImageEncoder, Preprocessing
from fastldm.errors import CheckpointError
from fastldm.loading.checkpoint import Component
from fastldm.loading.diffusers_folder import weight_files
from fastldm.loading.formats import choose_weights
from fastldm.loading.state import load_module
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.reading import check_file, read_json

FILES = ("config.json", "model.safetensors")
PREPROCESSOR = "preprocessor_config.json"  # beside them, or not
CLASS_NAME = "CLIPVisionModelWithProjection"


def folder_component(folder: Path, class_name: str, *, allow_pickle: bool = False) -> Component:
    """The config and weights that a folder of transformers has of a class. CheckpointError for a folder without."""
    check_file(folder / FILES[0])
    names = {path.name for path in folder.iterdir()}
    weights = choose_weights({folder.name: names}, None, allow_pickle, str(folder.parent))[folder.name]
    config = read_json(folder / FILES[0])
    files = weight_files(folder, weights)
    return Component(folder.name, class_name, config, files, str(folder / weights.entry), allow_pickle=allow_pickle)


def preprocessing_of(config: VisionConfig, raw: Mapping[str, Any], source: str) -> Preprocessing:
    """What a preprocessor_config.json says of the input of an image encoder; as diffusers without one: at its size,
    with CLIP's mean."""
    if not raw:
        return Preprocessing(config.image_size, config.image_size)
    preprocessing = Preprocessing.from_dict(raw, source)
    if preprocessing.crop != config.image_size:
        raise CheckpointError(
            f"{source}: 'crop_size' is {preprocessing.crop}, and the image encoder reads {config.image_size} pixels"
        )
    return preprocessing


def read_image_encoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    preprocessing: bool = True,
    allow_pickle: bool = False,
) -> ImageEncoder:
    """Read an image encoder. preprocessing: whether the folder's own is taken, if it has one.

    CheckpointError for a folder that is missing, damaged, or of another kind.
    """
    component = folder_component(folder, CLASS_NAME, allow_pickle=allow_pickle)
    config = VisionConfig.from_dict(component.config, str(folder / FILES[0]))
    with torch.device("meta"):
        model = CLIPVision(config)
    load_module(model, component.state(), dtype=dtype, device=device, source=component.source)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity in {dtype}.".replace("torch.", ""))
    path = folder / PREPROCESSOR
    raw = read_json(path) if preprocessing and path.is_file() else {}
    return ImageEncoder(model, preprocessing_of(config, raw, str(path)), str(folder))
