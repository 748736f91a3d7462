"""Candidates of a request: more pictures than are returned, of which a CLIP model says which are the best."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastldm.conditioning.ranking import Ranker
from fastldm.conditioning.text import TextStage
from fastldm.errors import InputError
from fastldm.loading.ranker import FOLDER, has_ranker, read_ranker
from fastldm.request import Request, as_list, picture_seeds

_GIVE_ONE = (
    "give one, a CLIPModel's folder or hub id, to `fastldm generate` or `fastldm serve` as --ranker "
    "openai/clip-vit-large-patch14, in Python to load_ranker"
)

Part = tuple[Any, list[float]]
"""The images of some of a request's candidates, of its output_type, and their scores."""


class Ranking:
    """What ranks a model's candidates: the CLIP model that was loaded for it, else that of its own folder, if it has
    one. Read when it is first needed, by any thread."""

    def __init__(self, source: str, dtype: torch.dtype, device: torch.device) -> None:
        """source: the model's folder, if it has one."""
        self._own, self._lock = Path(source), threading.Lock()
        # A CPU ranks in float32: an image encoder is small beside what it ranks.
        self._to = (torch.float32 if device.type == "cpu" else dtype, device)
        self.loaded: Ranker | None = None

    def read(self, folder: Path, stages: Sequence[TextStage], *, allow_pickle: bool = False) -> Ranker:
        """As `loading.ranker.read_ranker`."""
        return read_ranker(folder, *self._to, stages, allow_pickle=allow_pickle)

    def need(self, stages: Sequence[TextStage], backend: str, use: str = "candidates are ranked") -> Ranker:
        """InputError for a model without any. use: what is done by it."""
        with self._lock:
            if self.loaded is None:
                self.loaded = self.read(own_ranker(self._own, backend, use), stages)
            return self.loaded


def own_ranker(source: Path, backend: str, use: str = "candidates are ranked") -> Path:
    """The folder of what ranks a model's candidates beside its networks. InputError for a model without. use: what is
    done by it."""
    if backend != "torch":
        raise InputError(
            f"{use} by a CLIP image encoder, and a bundle, here on {backend}, has none: {_GIVE_ONE}, or run the "
            "checkpoint with --backend torch"
        )
    if not has_ranker(source):
        raise InputError(f"{use} by a CLIP image encoder, and this model has none: {_GIVE_ONE}")
    return source / FOLDER


def scores(ranker: Ranker, request: Request, images: Any, own: TextStage) -> list[float]:
    """Of the images of a part, which are all of its request's prompts in turn."""
    pictures = images if isinstance(images, list) else [Image.fromarray(array) for array in _bytes(images)]
    texts = as_list(request.prompt)
    each = len(pictures) // len(texts)
    return ranker.scores(pictures, [text for text in texts for _ in range(each)], own, literal=request.literal_prompt)


def _bytes(images: np.ndarray | Tensor) -> np.ndarray:
    """Pictures in 0..1, (B, H, W, 3) or a tensor (B, 3, H, W), as they are saved: uint8 (B, H, W, 3)."""
    array = images.float().cpu().movedim(1, -1).numpy() if isinstance(images, Tensor) else images
    return (array * 255).round().astype(np.uint8)


def best(request: Request, parts: Sequence[Part]) -> tuple[Any, tuple[int, ...], tuple[float, ...]]:
    """Of each prompt's candidates the `keep` with the highest scores, best first: images, seeds, scores.

    parts: those of `Request.parts`, as far as they were sampled.
    """
    of_prompt: list[list[tuple[float, int, Any]]] = [[] for _ in range(request.count)]
    seeds, candidates, first = picture_seeds(request), int(request.candidates or 1), 0
    for images, own in parts:
        each = len(own) // request.count
        for p, k in ((p, k) for p in range(request.count) for k in range(each)):
            of_prompt[p].append((own[p * each + k], seeds[p * candidates + first + k], images[p * each + k]))
        first += each
    kept = [entry for entries in of_prompt for entry in sorted(entries, key=lambda entry: -entry[0])[: request.keep]]
    ordered, images = [entry[2] for entry in kept], parts[0][0]
    if isinstance(images, Tensor):
        images = torch.stack(ordered)
    else:
        images = np.stack(ordered) if isinstance(images, np.ndarray) else ordered
    return images, tuple(entry[1] for entry in kept), tuple(entry[0] for entry in kept)
