"""Text encoders by the class that their config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastldm.models.clip import CLIPText
from fastldm.models.config import GLIDE_TEXT, T5_ENCODER, TextConfig
from fastldm.models.glide import GlideConfig, GlideText
from fastldm.models.t5 import T5Config, T5Text

_CONFIGS: dict[str, type[TextConfig]] = {T5_ENCODER: T5Config, GLIDE_TEXT: GlideConfig}


def text_config(cfg: Mapping[str, Any], source: str = "config.json") -> TextConfig:
    """Read a text encoder's config.json, of any class that there is."""
    architectures = cfg.get("architectures")
    names = architectures if isinstance(architectures, list | tuple) else ()
    kinds = (kind for name, kind in _CONFIGS.items() if name in names)
    return next(kinds, TextConfig).from_dict(cfg, source)


def text_encoder(config: TextConfig) -> CLIPText | T5Text:
    """The network of a text encoder's config."""
    if isinstance(config, GlideConfig):
        return GlideText(config)
    return T5Text(config) if isinstance(config, T5Config) else CLIPText(config)
