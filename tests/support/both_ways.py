"""One request in a slot and eagerly."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm import Request
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.runtime.stages import Stages


def both_ways(stages: Stages, request: Request, *, rows: int, tokens: int) -> list[Tensor]:
    """The latents that a completed request of two steps ends with: in a slot, and eagerly. rows: of the U-Net. tokens:
    of its text."""
    run, other = stages.prepare(request), stages.prepare(request)
    sizes = {"height": run.latents.shape[2], "width": run.latents.shape[3], "tokens": tokens, "steps": 2}
    buffers = StaticBuffers.empty(stages.spec.unet, slots=1, rows=rows, **sizes, dtype=torch.float32, device="cpu")
    latents = []
    for batch, own in ((Slots(stages.unet, buffers), run), (EagerBatch(stages.unet), other)):  # type: ignore[arg-type]
        batch.admit(own)
        while not own.done:
            batch.step([own])
        latents.append(batch.latents(own))
    return latents
