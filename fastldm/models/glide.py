"""GLIDE's text transformer (arXiv:2112.10741, section 2.3): the layers of CLIP's without a causal mask, over a window in
which a learned vector of each place stands for padding.

The U-Net attends to its states, and reads the last one, projected, with the time. Parameter names are those of
transformers' CLIPTextModelWithProjection, where there are such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastldm.models.clip import CLIPText, Embedding
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
    """Token ids to hidden states, and to the projected state of the window's last place."""

    def __init__(self, config: GlideConfig) -> None:
        super().__init__(config)
        self.text_projection = Linear(config.hidden, config.projection_dim or 0)
        self.text_model.embeddings.padding_embedding = Embedding(config.max_position, config.hidden)

    def forward(
        self, input_ids: Tensor, embeds: Tensor | None = None, skip: int = 0, final_norm: bool = True
    ) -> tuple[Tensor, Tensor]:
        """input_ids (B, T) integers -> hidden (B, T, D), pooled (B, P). embeds: (B, T, D) in place of the table's rows.

        hidden is the output of all layers except the last `skip`, with final_norm normalised; pooled is of all.
        """
        text = self.text_model
        padding = text.embeddings.padding_embedding.weight[: input_ids.shape[1]]
        is_padding = (input_ids == self.config.eos_token_id)[..., None]
        x = torch.where(is_padding, padding, text.embeddings(input_ids, embeds))
        x = text.encoder(x, skip)
        hidden = text.final_layer_norm(x) if final_norm else x
        for layer in text.encoder.layers[self.config.layers - skip :]:
            x = layer(x)
        assert self.text_projection is not None
        return hidden, self.text_projection(text.final_layer_norm(x[:, -1]))
