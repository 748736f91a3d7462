"""diffusers' pipelines beside ours of the same weights, and what counts as the same image."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import tiny
import torch

from fastldm import Pipeline

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()


def peer(family: str, scheduler: Any = None) -> Any:
    pipe = tiny.pipeline(family) if scheduler is None else tiny.pipeline(family, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Pairs:
    """(diffusers' pipeline, ours with its weights) by family, each loaded once."""

    def __init__(self, scheduler: str | None = None) -> None:
        """scheduler: of the family whose scheduler all take; each its own where it is None."""
        self._scheduler = scheduler
        self._loaded: dict[str, tuple[Any, Pipeline]] = {}

    def __call__(self, family: str) -> tuple[Any, Pipeline]:
        if family not in self._loaded:
            theirs = peer(family, self._scheduler and tiny.scheduler(self._scheduler))
            self._loaded[family] = theirs, Pipeline.from_diffusers(theirs)
        return self._loaded[family]


def as_bytes(images: np.ndarray) -> np.ndarray:
    return (images * 255).round().astype(np.int16)


def close(ours: Any, theirs: Any) -> None:
    """Images within 1/255."""
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert ours.std() > 0.01, "a flat image would agree with anything"
    assert np.abs(as_bytes(ours) - as_bytes(theirs)).max() <= 1


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
