"""Requests in slots, and one in a slot and eagerly."""

from __future__ import annotations

from collections.abc import Sequence

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


@torch.no_grad()
def in_slots(stages: Stages, requests: Sequence[Request], *, tokens: int, reuse: bool = False) -> list[Tensor]:
    """The latents that requests of as many steps end with in slots, each with its adapters. On the worker's thread.
    tokens: of their texts, at most. reuse: whether buffers have room for what steps reuse."""
    runs = [stages.prepare(stages.complete(request)) for request in requests]
    assert all(stages.adapters.enter(run) for run in runs)
    height, width = runs[0].latents.shape[2:]
    sizes = {"slots": len(runs), "rows": 12, "height": height, "width": width, "tokens": tokens, "steps": 64}
    buffers = StaticBuffers.empty(stages.spec.unet, **sizes, dtype=torch.float32, device="cpu", reuse=reuse)
    batch = Slots(stages.unet, buffers)  # type: ignore[arg-type]
    for run in runs:
        batch.admit(run)
    while not runs[0].done:
        batch.step(runs)
    latents = [batch.latents(run) for run in runs]
    for run in runs:
        stages.adapters.leave(run)
    return latents
