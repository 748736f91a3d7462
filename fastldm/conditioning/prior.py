"""Text as unCLIP's prior and its decoder read it: the states, the projected vector and the length of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastldm.conditioning.image_encoder import Preprocessing
from fastldm.conditioning.prompt import parse
from fastldm.conditioning.text import TextStage, split_windows
from fastldm.device import send, send_numbers
from fastldm.models.clip import ends
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.models.config import TextConfig
from fastldm.models.interfaces import VectorNormalizer
from fastldm.models.prior import PriorConfig, PriorNetwork
from fastldm.samplers.config import ScheduleConfig

PriorConfigs = tuple[PriorConfig | TextConfig | VisionConfig, ...]
"""Of a prior, of the text encoder that it reads, and of Kandinsky's image encoder."""


@dataclass(frozen=True)
class PriorTexts:
    """What a prior, or unCLIP's decoder, reads of N texts."""

    hidden: Tensor  # (N, T, D) the text encoder's states
    vectors: Tensor  # (N, P) what it projects the text to
    lengths: Tensor  # (N,) int32: of the tokens those that are no padding

    def repeat(self, count: int) -> PriorTexts:
        """Each so many times, in turn."""
        return PriorTexts(*(x.repeat_interleave(count, 0) for x in (self.hidden, self.vectors, self.lengths)))


@dataclass(frozen=True, eq=False)
class TextPrior:
    """A prior with the text encoder that it reads, and what its vectors may be noised by. It never changes."""

    text: TextStage
    model: PriorNetwork
    schedule: ScheduleConfig
    normalizer: VectorNormalizer | None = None  # of stable unCLIP
    image_encoder: CLIPVision | None = None  # of Kandinsky, which makes the vector of a black picture
    preprocessing: Preprocessing | None = None  # of pictures for that

    @property
    def configs(self) -> PriorConfigs:
        """Those of its networks."""
        own = self.model.config, self.text.model.config
        return own if self.image_encoder is None else (*own, self.image_encoder.config)

    @torch.no_grad()
    def read(self, texts: Sequence[str], *, literal: bool = False) -> PriorTexts:
        """As `read_texts`."""
        return read_texts(self.text, texts, literal=literal)

    @torch.no_grad()
    def zero_embeds(self) -> Tensor:
        """The image encoder's vector (1, D) of zeros, in float32."""
        encoder = self.image_encoder
        assert encoder is not None
        side = encoder.config.image_size
        return encoder(send(torch.zeros(1, 3, side, side), encoder.device, encoder.dtype)).float()


@torch.no_grad()
def read_texts(stage: TextStage, texts: Sequence[str], *, literal: bool = False) -> PriorTexts:
    """Texts, as a text encoder with a projection reads them: without weights, and as far as the first window goes.
    literal: brackets are text."""
    plain = ["".join(text for section in parse(each, literal=literal) for text, _ in section) for each in texts]
    (rows,) = split_windows([stage], [(text, text) for text in plain], True, None)
    model = stage.model
    ids = send_numbers([row[0].ids for row in rows], torch.int64, model.device)
    hidden, vectors = model(ids)
    assert vectors is not None
    return PriorTexts(hidden, vectors, (ends(model.config, ids) + 1).int())
