"""How well pictures show what prompts say, by a CLIP model: the cosine of their projected vectors.

    score = <image, text> / (|image| |text|)

Source: Radford et al. 2021, arXiv:2103.00020; transformers' CLIPModel multiplies it by exp(logit_scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastldm.conditioning.image_encoder import ImageEncoder
from fastldm.conditioning.prompt import parse
from fastldm.conditioning.text import TextStage, split_windows
from fastldm.device import send, send_numbers
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import TextConfig

PICTURES = 16
"""That are encoded at a time."""


@dataclass(frozen=True)
class RankerConfig:
    """The sizes of a CLIP model that ranks."""

    vision: VisionConfig
    text: TextConfig | None
    """None where the model's whose pictures it ranks is read."""
    projection: tuple[int, int] | None = None
    """(P, D), of that one's states."""


@dataclass(frozen=True, eq=False)
class Ranker:
    """A CLIP model. It never changes."""

    images: ImageEncoder
    text: TextStage | None
    """Its own tokenizer and text encoder; None for those of the model whose pictures it ranks."""
    projection: Tensor | None = None
    """(P, D), of those states: of a text encoder that has none itself."""

    @property
    def config(self) -> RankerConfig:
        """Its sizes."""
        text = None if self.text is None else self.text.model
        assert text is None or isinstance(text, CLIPText)
        projection = None if self.projection is None else (self.projection.shape[0], self.projection.shape[1])
        return RankerConfig(self.images.model.config, None if text is None else text.config, projection)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str], own: TextStage, *, literal: bool = False) -> Tensor:
        """Unit vectors (N, P) float32 of texts, each encoded once. own, literal: as of `scores`."""
        distinct = list(dict.fromkeys(texts))
        vectors = F.normalize(self._vectors(self.text or own, distinct, literal).float(), dim=-1)
        return vectors[[distinct.index(text) for text in texts]]

    @torch.no_grad()
    def scores(
        self, pictures: Sequence[Image.Image], texts: Sequence[str], own: TextStage, *, literal: bool = False
    ) -> list[float]:
        """The cosine of each picture and its text. own: the text stage of the model that made them. literal: brackets
        are text. As a CLIPModel reads it, a text has no weights, and ends where its first window is full."""
        of_text = self.text_vectors(texts, own, literal=literal)  # (N, P)
        scores: list[float] = []
        for start in range(0, len(pictures), PICTURES):
            pixels = self.images.pixels(pictures[start : start + PICTURES], "pictures")
            embeds = self.images.embeds(send(pixels, self.images.model.device)).float()
            rows = F.normalize(embeds, dim=-1) * of_text[start : start + PICTURES].to(embeds.device)
            scores += rows.sum(-1).tolist()
        return scores

    def _vectors(self, stage: TextStage, texts: Sequence[str], literal: bool) -> Tensor:
        """(N, P), the texts' projected states at their ends."""
        plain = ["".join(text for section in parse(each, literal=literal) for text, _ in section) for each in texts]
        (rows,) = split_windows([stage], [(text, text) for text in plain], True, None)
        model = stage.model
        ids = send_numbers([row[0].ids for row in rows], torch.int64, model.device)
        inputs = (ids, stage.embed(ids)) if stage.added and int(ids.max()) >= stage.first_added else (ids,)
        hidden, pooled = model(*inputs)
        if self.projection is None:
            assert pooled is not None
            return pooled
        ends = model.ends(ids)  # type: ignore[attr-defined]
        last = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        return F.linear(last.to(self.projection.dtype), self.projection)
