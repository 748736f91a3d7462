"""Live bytes on a CPU, as torch.profiler counts them: it records every allocation in the allocator itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

SCRATCH = 512 * 1024
"""Temporaries within an op, a thread, which no plan counts: blocks of attention's scores, unfolded images."""


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is alive at a time of what a function allocates."""
    with torch.no_grad():
        run()  # warm-up: a thread's plans
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    alive = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def assert_planned(planned: int, run: Callable[[], object], scratch: int = 0) -> None:
    """That a plan is what a function takes, but for SCRATCH and so many bytes that its ops take inside, and for
    rounding."""
    real = peak_bytes(run)
    assert planned <= 1.001 * real, (planned, real)
    assert planned >= real - SCRATCH * torch.get_num_threads() - scratch, (planned, real)
