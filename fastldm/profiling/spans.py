"""Spans of time, one inside the other: what a profile is made of. Functions are timed from around, and know nothing.

A span's time is the host's, from a clock that only goes forward; on a GPU it is also that between two events of the
stream, which no host waits for before the work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.kernels.dispatch import Cost, Op


class Call(NamedTuple):
    """What an op was called for."""

    name: str
    cost: Cost
    path: str


class Span:
    """From one time to another, inside of another span or of none."""

    __slots__ = ("began", "call", "ended", "marks", "name", "noticed", "parent", "stage")

    def __init__(self, name: str, stage: str, parent: Span | None) -> None:
        self.name, self.stage, self.parent = name, stage, parent
        self.call: Call | None = None
        self.noticed = self.began = self.ended = perf_counter()  # noticed: before the watching began
        self.marks: tuple[Any, Any] | None = None

    def seconds(self, device: bool) -> float:
        if not device:
            return self.ended - self.began
        assert self.marks is not None
        return self.marks[0].elapsed_time(self.marks[1]) / 1e3


class Clock:
    """The spans of whoever works, in the order in which they began. NVTX knows them too."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.ahead = False  # whether a GPU is made to wait for the host first: an op is then timed, not its launch
        self.spans: list[Span] = []
        self._open: list[Span] = []

    @property
    def inside(self) -> Span | None:
        return self._open[-1] if self._open else None

    def begin(self, name: str, stage: str = "") -> Span:
        """stage: what the span's time counts to; where it is empty to what that of the span around it does."""
        if self.gpu:
            if self.ahead and not self._open:
                torch.cuda._sleep(50_000_000)  # cycles, some 30 ms: longer than a step takes to be issued
            torch.cuda.nvtx.range_push(name)
        inside = self.inside
        span = Span(name, stage or (inside.stage if inside is not None else name), inside)
        self.spans.append(span)
        self._open.append(span)
        if self.gpu:
            span.marks = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            span.marks[0].record()
        span.began = perf_counter()
        return span

    def end(self, span: Span) -> None:
        span.ended = perf_counter()
        if span.marks is not None:
            span.marks[1].record()
            torch.cuda.nvtx.range_pop()
        self._open.remove(span)

    @contextmanager
    def span(self, name: str, stage: str = "") -> Iterator[None]:
        span = self.begin(name, stage)
        try:
            yield
        finally:
            self.end(span)

    def around(self, name: str, function: Callable[..., Any], stage: str = "") -> Callable[..., Any]:
        """The function, each call a span."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name, stage):
                return function(*args, **kwargs)

        return timed

    def pieces(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The generator function, each piece a span."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            while True:
                with self.span(name):
                    try:
                        piece = next(made)
                    except StopIteration as done:
                        return done.value
                yield piece

        return timed

    def observe(self, op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None] | None:
        """`kernels.observe`'s: each op a span, but not those that it is made of."""
        if self.inside is not None and self.inside.call is not None:
            return None
        noticed = perf_counter()
        verdict = op.path(*args, **kwargs)
        name, cost = _name(op, args), op.cost(*args, **kwargs)
        span = self.begin(name)
        span.noticed = noticed
        span.call = Call(name, cost, "triton" if verdict else f"torch: {verdict.why}")
        span.began = perf_counter()
        return lambda: self.end(span)

    def kept(self, function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        """onednn's, which says by None that it did not serve."""

        def noted(*args: Any) -> Tensor | None:
            out, span = function(*args), self.inside
            if out is not None and span is not None and span.call is not None:
                span.call = span.call._replace(path="oneDNN: its layout of the weight is kept")
            return out

        return noted


def _name(op: Op[..., Any], args: tuple[Any, ...]) -> str:
    if op.name != "attention":
        return op.name
    q, k = args[:2]  # of attention to itself thirds of one product
    return f"{'self' if q.untyped_storage()._cdata == k.untyped_storage()._cdata else 'cross'}-attention"


@contextmanager
def replaced(owner: Any, **changes: Any) -> Iterator[None]:
    """Inside, the owner has other attributes; afterwards its own, or those of its class, again."""
    before = {name: vars(owner)[name] for name in changes if name in vars(owner)}
    for name, value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in changes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)
