"""Timing for benchmarks, the tuner and the profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Ceilings(NamedTuple):
    """The peak rates of a device, as measured on it."""

    flops: float
    """Float operations a second, of a large matrix product."""
    bytes: float
    """Bytes a second, read and written, of a large copy."""

    def seconds(self, flop: float, moved: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flop / self.flops, moved / self.bytes)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the device, a CPU with torch's current number of threads: about a second."""
    gpu = device.type == "cuda"
    side, size = (8192, 1 << 30) if gpu else (1536, 1 << 28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.arange(size // 4, device=device, dtype=torch.int32)  # not zeros, which some GPUs copy faster
    target = torch.empty_like(source)
    functions: list[Callable[[], object]] = [lambda: F.linear(a, b), lambda: target.copy_(source)]
    if gpu:
        graphs = [capture([function]) for function in functions]
        product, copy = (min(replay(graph) for _ in range(5)) / 1e6 for graph in graphs)
    else:
        product, copy = (_least(function) for function in functions)
    return Ceilings(2 * side**3 / product, 2 * size / copy)


def _least(function: Callable[[], object]) -> float:
    """Seconds of the fastest of eight calls: other load on the machine only adds time."""
    times = []
    for _ in range(8):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return min(times)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls, so that no launch overhead is timed. Each is called twice before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph, seconds: float = 0.02) -> float:
    """Microseconds of a replay, the mean over about `seconds`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / times

    return run(max(3, int(seconds * 1e6 / run(3))))


def take_turns(
    contenders: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 9, seconds: float = 0.02
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """(median microseconds a call, spread as (max - min) / median, the error of those that failed), each by name.

    A contender is several calls of one function on different tensors, on a GPU in a graph, which is replayed for about
    `seconds` in each round. All are timed in every round, so that a drifting clock affects them alike.
    """
    timed: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, calls in contenders.items():
        try:
            timed[name] = _timed(calls, seconds)
        except Exception as error:  # an alternative may not take these arguments
            failed[name] = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, once in timed.items():
            times[name].append(once() / len(contenders[name]))
    medians = {name: median(samples) for name, samples in times.items()}
    return medians, {name: (max(samples) - min(samples)) / medians[name] for name, samples in times.items()}, failed


def _timed(calls: Sequence[Callable[[], object]], seconds: float) -> Callable[[], float]:
    """A function that runs the calls again and returns the microseconds; they have run once before."""
    if torch.cuda.is_available():
        graph = capture(calls)
        return lambda: replay(graph, seconds)

    def once() -> float:
        start = perf_counter()
        for call in calls:
            call()
        return 1e6 * (perf_counter() - start)

    once()
    return once
