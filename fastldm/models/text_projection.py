"""The text projection of unCLIP's decoder: what its U-Net reads of a picture's vector and a text, once a request.

    vector + the text's vector   -> an addition to the time's embedding
    vector, as extra tokens | text -> the text of cross-attentions

Parameter names are those of diffusers' UnCLIPTextProjModel. Source: Ramesh et al. 2022, arXiv:2204.06125, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.models.config_fields import WIDTH, only
from fastldm.models.layers import LayerNorm, Linear, parameter
from fastldm.reading import Field, Integer, read_fields

_FIELDS = only({"_class_name": ("UnCLIPTextProjModel",)}) | {
    "clip_extra_context_tokens": Field(Integer(1, 64), 4),
    "clip_embeddings_dim": Field(WIDTH, 768),
    "time_embed_dim": Field(WIDTH),
    "cross_attention_dim": Field(WIDTH),
}


@dataclass(frozen=True)
class TextProjectionConfig:
    """A text projection (diffusers' UnCLIPTextProjModel)."""

    tokens: int  # that a vector becomes, before those of the text
    vector_dim: int  # channels of the vectors, of pictures and of texts, and of the text's states
    time_dim: int  # of the time's embedding
    context: int  # channels of the text that the U-Net attends to

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> TextProjectionConfig:
        """Read diffusers' text_proj/config.json; CheckpointError for invalid values."""
        values = read_fields(cfg, _FIELDS, source)
        return cls(
            tokens=values["clip_extra_context_tokens"],
            vector_dim=values["clip_embeddings_dim"],
            time_dim=values["time_embed_dim"],
            context=values["cross_attention_dim"],
        )


class TextProjection(nn.Module):
    """The network of a TextProjectionConfig."""

    def __init__(self, config: TextProjectionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vector_dim
        self.learned_classifier_free_guidance_embeddings = parameter(width)
        self.embedding_proj = Linear(width, config.time_dim)
        self.clip_image_embeddings_project_to_time_embeddings = Linear(width, config.time_dim)
        self.clip_extra_context_tokens_proj = Linear(width, config.tokens * config.context)
        self.encoder_hidden_states_proj = Linear(width, config.context)
        self.text_encoder_hidden_states_norm = LayerNorm(config.context)

    def forward(self, vectors: Tensor, text_vectors: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of B pictures (B, D), and of R texts, which are B prompts with or without B negatives before them,
        their own (R, D) and their states (R, T, D) -> what cross-attentions read (R, tokens + T, context), and what the
        time's embedding has added (R, time_dim). Negatives read a learned vector in place of a picture's."""
        negatives = len(hidden) - len(vectors)
        none = self.learned_classifier_free_guidance_embeddings.expand(negatives, -1)
        vectors = torch.cat((none, vectors.to(none.dtype)))  # (R, D)
        added = self.clip_image_embeddings_project_to_time_embeddings(vectors) + self.embedding_proj(text_vectors)
        tokens = self.clip_extra_context_tokens_proj(vectors).unflatten(1, (-1, self.config.tokens)).transpose(1, 2)
        text = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(hidden))
        return torch.cat((tokens, text), dim=1), added
