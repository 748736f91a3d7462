"""What each backend takes for a picture of a bundle on this machine, measured for `--backend auto`."""

from __future__ import annotations

import gc
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastldm.export import auto
from fastldm.export.auto import Measured
from fastldm.export.bundle import Bundle
from fastldm.pipeline import Pipeline
from fastldm.runtime.complete import sample_request


def measure(bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None = None) -> Measured:
    """Load a pipeline and let it make pictures of two steps; remembered for `export.auto.choose`."""

    def load() -> Pipeline:
        gc.collect()
        return Pipeline.from_pretrained(bundle.folder, backend=backend, device=device, dtype=dtype)

    load()  # fills the caches that the next is measured with
    start = perf_counter()
    pipe = load()
    start_up = perf_counter() - start
    arguments: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    arguments |= sample_request(pipe.stages.spec)
    for _ in range(2):
        timings = pipe(**arguments).timings
    steps = pipe.family.num_inference_steps * median(timings.steps)
    measured = Measured(start_up, timings.text + steps + timings.decode, pipe.precision)
    auto.remember(bundle, device, {**auto.read(bundle, device), backend: measured})
    return measured
