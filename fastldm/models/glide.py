"""GLIDE's text transformer (arXiv:2112.10741, section 2.3): the layers of CLIP's without a causal mask, over a window
in which a learned vector of each place stands for padding.

The U-Net attends to its states, and reads the last one, projected, with the time. Parameter names are those of
transformers' CLIPTextModelWithProjection, where there are such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastldm.models.clip import CLIPText, Embedding, TextEmbeddings
from fastldm.models.config import TextConfig, heads_of
from fastldm.models.config_fields import WIDTH, only
from fastldm.models.layers import Linear
from fastldm.reading import MAX_CHANNELS, Field, Integer, read_fields

_FIELDS = only({"model_type": ("glide_text",)}) | {
    "vocab_size": Field(Integer(3, 2**22)),
    "hidden_size": Field(WIDTH),
    "num_hidden_layers": Field(Integer(1, 256)),
    "num_attention_heads": Field(WIDTH),
    "intermediate_size": Field(Integer(1, 2**20)),
    "max_position_embeddings": Field(Integer(3, MAX_CHANNELS)),
    "projection_dim": Field(WIDTH),
}


@dataclass(frozen=True)
class GlideConfig(TextConfig):
    """GLIDE's text transformer. Its last id is that of padding."""

    kind: ClassVar[str] = "GLIDE's"

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> GlideConfig:
        """Read what loading/glide.py derives of a file; CheckpointError for values that do not fit."""
        values = read_fields(cfg, _FIELDS, source)
        hidden, heads = heads_of(values, source)
        return cls(
            vocab=values["vocab_size"],
            hidden=hidden,
            layers=values["num_hidden_layers"],
            heads=heads,
            intermediate=values["intermediate_size"],
            max_position=values["max_position_embeddings"],
            act="gelu",
            norm_eps=1e-5,
            eos_token_id=values["vocab_size"] - 1,
            projection_dim=values["projection_dim"],
            with_projection=False,
            causal=False,
            pools=True,
        )

    @property
    def final_norm(self) -> bool:
        return True


class GlideText(CLIPText):
    """Token ids to hidden states, and to the projected state of the window's last place, whatever is there."""

    def __init__(self, config: GlideConfig) -> None:
        super().__init__(config)
        self.text_projection = Linear(config.hidden, config.projection_dim or 0)
        self.text_model.embeddings = GlideEmbeddings(config)

    def ends(self, input_ids: Tensor) -> Tensor:
        """The last index of each text in input_ids (B, T): (B,)."""
        return torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)


class GlideEmbeddings(TextEmbeddings):
    """Embeddings of tokens and their places, and of padding another for each place."""

    def __init__(self, config: GlideConfig) -> None:
        super().__init__(config)
        self.padding_embedding = Embedding(config.max_position, config.hidden)
        self.padding = config.eos_token_id

    def forward(self, input_ids: Tensor, embeds: Tensor | None = None) -> Tensor:
        padding = self.padding_embedding.weight[: input_ids.shape[1]]
        return torch.where((input_ids == self.padding)[..., None], padding, super().forward(input_ids, embeds))
