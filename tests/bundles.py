"""Models for the tests of exports. Tracing takes a second for each layer of a network, so they have few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny


def smallest(family: str, folder: Path) -> Path:
    """A diffusers folder of the family's kind: two levels of one layer and nothing in the middle, a text encoder of two
    layers, an autoencoder of factor 2 without attention."""
    levels: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": (tiny.DOWN, tiny.CROSS_DOWN),
        "up_block_types": (tiny.CROSS_UP, tiny.UP),
        "mid_block_type": None,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": (2, 4),
    }
    vae = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": False,
    }
    parts = {
        "unet": tiny.unet(family, **levels),
        "vae": tiny.vae(family, 1, **vae),
        "text_encoder": tiny.text_encoder("l", 2, num_hidden_layers=2),
    }
    tiny.pipeline(family, **parts).save_pretrained(folder)
    return folder
