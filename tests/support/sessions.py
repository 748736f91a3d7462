"""A pipeline for the tests of sessions, requests to it, and what counts as the same result."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
from benchmarks import ladder
from fastldm import Pipeline, Session
from fastldm.kernels import use
from fastldm.models.unet import UNet
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import Guidance, Run
from fastldm.samplers.table import StepTable


def tiny_pipeline(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Seeded random weights, 64x64 pixels of 8x8 latents; built without diffusers, which a GPU's machine may lack."""
    pipe = ladder.pipeline(ladder.MODELS["tiny"], torch.device(device), dtype)
    image = pipe("a cat", num_inference_steps=1, seed=0, output_type="np").images
    assert image.std() > 0.05, "a flat image would agree with anything"  # type: ignore[union-attr]
    return pipe


def options(seed: int = 0, steps: int = 2, **more: Any) -> dict[str, Any]:
    defaults = {"prompt": "a cat", "seed": seed, "num_inference_steps": steps, "sampler": "ddim", "output_type": "np"}
    return defaults | more


def same(actual: Any, expected: Any) -> None:
    """But for the order of sums: float32 rounding through some steps of a random network."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 2e-5


SMALL = {"height": 16, "width": 16}
SAMPLERS = ["ddim", "euler a", "dpm++ 2m karras", "unipc", "heun", "dpm++ 2m sde", "plms", "lcm"]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Of every kind: sampler, steps, size, guidance (none, whole, part, rescaled), prompt length, pictures."""
    r = random.Random(seed)
    return [
        options(
            seed=k,
            steps=r.randint(2, 6),
            prompt=" ".join(["a cat"] * r.choice([1, 1, 40])),  # 40: two windows of tokens
            sampler=r.choice(SAMPLERS),
            guidance_scale=r.choice([1.0, 3.0, 7.5]),
            guidance_rescale=r.choice([0.0, 0.0, 0.7]),
            guidance_interval=r.choice([(0.0, 1.0), (0.0, 1.0), (0.3, 0.8)]),
            num_images_per_prompt=r.choice([1, 1, 2]),
            height=r.choice([32, 48]),
            width=48,
        )
        for k in range(count)
    ]


def from_threads(session: Session, queries: list[dict[str, Any]], **arguments: Any) -> list[fastldm.Generation]:
    """Submitted by 8 threads at random moments; the futures in the requests' order."""
    futures: list[Any] = [None] * len(queries)

    def submit(first: int) -> None:
        r = random.Random(first)
        for k in range(first, len(queries), 8):
            time.sleep(r.random() * 0.03)
            futures[k] = session.submit(**queries[k], **arguments)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(submit, range(8)))
    return futures


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Steps that take their time, so that something can happen between them."""
    step = EagerBatch.step

    def slowly(self: EagerBatch, runs: Any) -> str:
        time.sleep(seconds)
        return step(self, runs)

    monkeypatch.setattr(EagerBatch, "step", slowly)


class Odd(BaseException):
    """Nobody's idea of an error."""


RAISED = [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, Odd, ValueError]


def alone(pipe: Pipeline, queries: list[dict[str, Any]]) -> list[np.ndarray]:
    """What each of these requests gives by itself."""
    return [pipe(**query).images for query in queries]  # type: ignore[misc]


def guided_runs(unet: UNet, table: StepTable, guidances: Sequence[Guidance]) -> list[Run]:
    """A run of 8x8 latents for each guidance, of one and two images in turn, each with a text and noise of its own; the
    table draws none."""
    made = []
    for k, guidance in enumerate(guidances):
        g, batch = torch.Generator().manual_seed(k), 1 + k % 2
        text = torch.randn(batch * (1 + guidance.guided), 7, 32, generator=g)
        temb = unet.time_rows(torch.from_numpy(table.timesteps))[:, None]
        latents = torch.randn(batch, 4, 8, 8, generator=g)
        made.append(Run(table, latents, [None] * len(table), guidance, temb=temb, text_kv=unet.cross_kv(text)))
    return made


class OnTorch:
    """A network without Triton, for the interpreter is slow."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet

    def step(self, *args: Any, **options: Any) -> Tensor:
        with use("torch"):
            return self.unet.step(*args, **options)
