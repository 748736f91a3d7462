"""Timing on a GPU: what benchmarks and the tuner share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


def capture(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of these calls, so that no launch overhead is timed. Each is run twice before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for run in runs:
                run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    return graph


def replay(graph: torch.cuda.CUDAGraph, seconds: float = 0.02) -> float:
    """Microseconds of one replay, the mean over as many as take `seconds`."""
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
    contenders: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 9
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """(median microseconds a call, spread as (max - min) / median, why one could not be captured), each by name.

    A contender is several calls that do the same to different tensors. All are timed in every round, so that a clock
    that drifts hits them alike.
    """
    graphs, failed = {}, {}
    for name, runs in contenders.items():
        try:
            graphs[name] = capture(runs)
        except Exception as error:  # an alternative that does not take these arguments is no failure of the benchmark
            failed[name] = str(error).strip().split("\n")[0][:200]
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(replay(graph) / len(contenders[name]))
    middle = {name: median(samples) for name, samples in times.items()}
    return middle, {name: (max(samples) - min(samples)) / middle[name] for name, samples in times.items()}, failed
