"""Spans of time, one inside the other: what a profile is computed from.

A `Clock` listens to the spans that the code reports (fastldm/spans.py) and to its ops (`dispatch.observe`). A span's
time is the host's, from a monotonic clock; on a GPU it is also that between two events of the stream, which no host
waits for before the work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch

from fastldm.kernels.dispatch import Cost, Op


class Call(NamedTuple):
    """A call of an op."""

    name: str
    cost: Cost
    path: str


class Span:
    """From one time to another, inside another span or none."""

    __slots__ = ("call", "end", "events", "name", "noticed", "parent", "stage", "start")

    def __init__(self, name: str, stage: str, parent: Span | None) -> None:
        self.name, self.stage, self.parent = name, stage, parent
        self.call: Call | None = None
        self.noticed = self.start = self.end = perf_counter()  # noticed: before the overhead of watching
        self.events: tuple[Any, Any] | None = None

    def seconds(self, device: bool) -> float:
        if not device:
            return self.end - self.start
        assert self.events is not None
        return self.events[0].elapsed_time(self.events[1]) / 1e3


class Clock:
    """A `spans.Listener` that times the spans, in the order in which they start. NVTX gets them too."""

    def __init__(self, device: torch.device, stages: Collection[str]) -> None:
        """stages: names of spans whose time is their own; that of any other span counts to the stage around it."""
        self.gpu, self.stages = device.type == "cuda", stages
        self.detailed = False
        """Whether spans of networks and ops are timed too. A GPU is then made to wait for the host before each stage,
        so that an op is timed and not its launch."""
        self.spans: list[Span] = []
        self._open: list[Span] = []

    @property
    def current(self) -> Span | None:
        """The innermost open span."""
        return self._open[-1] if self._open else None

    def _start(self, name: str) -> Span:
        if self.gpu:
            if self.detailed and not self._open:
                torch.cuda._sleep(50_000_000)  # cycles, some 30 ms: longer than it takes to launch a step
            torch.cuda.nvtx.range_push(name)
        parent = self.current
        span = Span(name, name if name in self.stages or parent is None else parent.stage, parent)
        self.spans.append(span)
        self._open.append(span)
        if self.gpu:
            span.events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            span.events[0].record()
        span.start = perf_counter()
        return span

    def _end(self, span: Span) -> None:
        span.end = perf_counter()
        if span.events is not None:
            span.events[1].record()
            torch.cuda.nvtx.range_pop()
        self._open.remove(span)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if not self.detailed and name not in self.stages:
            yield
            return
        span = self._start(name)
        try:
            yield
        finally:
            self._end(span)

    def served(self, path: str) -> None:
        span = self.current
        if span is not None and span.call is not None:
            span.call = span.call._replace(path=path)

    def observe(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None] | None:
        """For `dispatch.observe`: each op is a span, but not the ops that it is made of."""
        if self.current is not None and self.current.call is not None:
            return None
        noticed = perf_counter()
        verdict = op.path(*args, **kwargs)
        name, cost = _name(op, args), op.cost(*args, **kwargs)
        span = self._start(name)
        span.noticed = noticed
        span.call = Call(name, cost, "triton" if verdict else f"torch: {verdict.reason}")
        span.start = perf_counter()
        return lambda: self._end(span)


def _name(op: Op[..., Any], args: tuple[Any, ...]) -> str:
    if op.name != "attention":
        return op.name
    q, k = args[:2]  # of self-attention: slices of one product
    return f"{'self' if q.untyped_storage()._cdata == k.untyped_storage()._cdata else 'cross'}-attention"
