"""models/clip_vision.py and conditioning/image_encoder.py against transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import ops
import pytest
import tiny
import torch
from PIL import Image

from fastldm.conditioning.image_encoder import Preprocessing
from fastldm.errors import CheckpointError
from fastldm.loading.image_encoder import read_image_encoder
from fastldm.models.clip_vision import VisionConfig


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu", "image_size": 27, "layer_norm_eps": 1e-3}])
def test_vectors_and_states_equal_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    clip = tiny.peer("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = clip.CLIPVisionConfig(**{**sizes, "projection_dim": 20, "image_size": 32, "patch_size": 8, **options})
    peer = tiny.seeded(lambda: clip.CLIPVisionModelWithProjection(config), 3)
    peer.save_pretrained(tmp_path)
    encoder = read_image_encoder(tmp_path, torch.float32)
    pixels = torch.randn(3, 3, encoder.size, encoder.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peer(pixels, output_hidden_states=True)
    assert ops.error(encoder.embeds(pixels), expected.image_embeds) < 1e-5
    assert ops.error(encoder.embeds(pixels, hidden=True), expected.hidden_states[-2]) < 1e-5


def test_the_half_of_a_whole_clip_is_read(tmp_path: Path) -> None:
    peer = ip_adapters.whole_clip()
    peer.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peer.visual_projection(peer.vision_model(pixels).pooler_output)
    assert ops.error(read_image_encoder(tmp_path, torch.float32).embeds(pixels), expected) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"size": 40, "crop_size": 32}, {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}]
)
@pytest.mark.parametrize("size", [(40, 56), (64, 30), (32, 32), (9, 200)])
def test_pictures_are_prepared_as_transformers_does(
    size: tuple[int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    peer = tiny.peer("transformers").CLIPImageProcessor(**{"size": 32, "crop_size": 32, **options})
    peer.save_pretrained(tmp_path)
    ours = Preprocessing.from_dict(peer.to_dict())(photo(*size))
    assert ops.error(ours, peer(photo(*size), return_tensors="pt").pixel_values[0]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "'do_center_crop' is False"),
        ({"crop_size": {"height": 30, "width": 40}}, "expected squares"),
        ({"image_std": [0, 1, 1]}, "'image_std"),
    ],
)
def test_other_preparations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Preprocessing.from_dict(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip_vision_model"}, "'model_type' is 'siglip_vision_model'"),
        ({"hidden_size": 50}, "'hidden_size' 50 does not divide"),
        ({"patch_size": 64}, "'patch_size' is 64, more than"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    ],
)
def test_other_encoders_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"hidden_size": 48, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    with pytest.raises(CheckpointError, match=message):
        VisionConfig.from_dict({**config, **change})
