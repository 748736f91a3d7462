"""CUDA graphs by key, within a budget of memory: functions that are recorded once and replayed.

A function is captured only after it has run eagerly, exactly as it will be captured, often enough for every kernel,
plan and workspace to exist: compiling or searching inside a capture is an error. All graphs share one pool of memory
and are replayed on the stream of the thread that captured them, one after the other; inputs and outputs lie outside the
pool, in buffers that the caller keeps.

The memory of a graph is not what the pool grows by at its capture: a graph captured into memory that another's tensors
have left makes it grow by nothing. And the pool frees nothing while any graph holds it. So the budget is the pool's:
where the pool exceeds it all graphs are destroyed, and those that are still called are captured again into a new pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastldm.errors import EngineError
from fastldm.kernels.dispatch import CompiledLate, nothing_compiles

logger = logging.getLogger("fastldm")

WARM_UPS = 2  # eager runs before a capture: the first compiles and plans, the second finds all that done


class Driver(Protocol):
    """What captures: `CUDA`, or a test's stand-in that records the calls."""

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record `function`, which is not run. A handle."""

    def held(self) -> int:
        """Bytes that the pool holds of the device's memory, used by a graph or not."""

    def replay(self, handle: Any) -> None: ...

    def destroy(self, handle: Any) -> None:
        """Free a graph, and with the last one the pool."""

    def trim(self) -> None:
        """Return memory that no pool holds any more to the device."""


class CUDA:
    """Graphs of one device, on the current stream of the thread that calls, which must be one of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._alive = 0

    def capture(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self.device)
        if not self._alive:  # PyTorch captures nothing more into a pool whose last graph has gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate and copy meanwhile, as a caller that reads its images does.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=torch.cuda.current_stream(self.device), capture_error_mode="thread_local"
        ):
            function()
        self._alive += 1
        return graph

    def held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        own = [segment for segment in segments if tuple(segment["segment_pool_id"]) == tuple(self.pool)]
        return sum(segment["total_size"] for segment in own)

    def replay(self, handle: torch.cuda.CUDAGraph) -> None:
        handle.replay()

    def destroy(self, handle: torch.cuda.CUDAGraph) -> None:
        torch.cuda.current_stream(self.device).synchronize()  # a replay may be under way
        handle.reset()
        self._alive -= 1

    def trim(self) -> None:
        torch.cuda.empty_cache()


@dataclass
class _Captured:
    handle: Any
    inputs: tuple[Tensor, ...]
    outputs: list[Any]  # one item: what the function returned when it was captured, written by each replay


class Graphs:
    """Captured functions by key.

    budget: bytes that the pool of all graphs may hold, but for one graph that needs more; None for no bound. Used by
    one thread.
    """

    def __init__(self, driver: Driver, budget: int | None = None) -> None:
        self.driver, self.budget = driver, budget
        self._captured: dict[Hashable, _Captured] = {}  # in the order of their captures
        self._calls: dict[Hashable, int] = {}  # eager calls of what is not captured
        self._refused: set[Hashable] = set()

    @property
    def bytes(self) -> int:
        """What the pool holds."""
        return self.driver.held() if self._captured else 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, function: Callable[[], Any]) -> bool:
        """Call `function`: by replay, captured when it has run eagerly often enough; until then eagerly. Returns
        whether it was replayed.

        key: distinguishes all that `function` depends on, but for the values in the tensors that it reads.
        """
        captured = self._find(key, function, ())
        if captured is None:
            function()
            return False
        self.driver.replay(captured.handle)
        return True

    def call(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), a tensor or a tuple of them, likewise: the inputs are copied in, the outputs out."""
        key = (key, tuple((tuple(x.shape), x.dtype) for x in inputs))
        captured = self._find(key, function, inputs)
        if captured is None:
            return function(*inputs)
        for buffer, value in zip(captured.inputs, inputs, strict=True):
            buffer.copy_(value)
        self.driver.replay(captured.handle)
        return _map(torch.clone, captured.outputs[-1])

    def _find(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Captured | None:
        if key in self._captured:
            return self._captured[key]
        if key in self._refused:
            return None
        calls = self._calls.get(key, 0)
        if calls < WARM_UPS:
            self._calls[key] = calls + 1
            return None
        captured = self._capture(key, function, inputs)
        if captured is None or self.budget is None or len(self._captured) == 1 or self.driver.held() <= self.budget:
            return captured
        self._destroy_all()  # their eager calls stay counted: each is captured again at its next call
        return self._capture(key, function, inputs)

    def _capture(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Captured | None:
        buffers = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        outputs: list[Any] = []
        try:
            with nothing_compiles():
                handle = self.driver.capture(lambda: outputs.append(function(*buffers)))
        except torch.OutOfMemoryError:
            raise
        except CompiledLate as error:
            raise EngineError(f"capturing {key}: {error}; its eager runs were not of this work") from error
        except Exception as error:  # only CUDA knows the reason; the eager way is there and as good
            logger.warning("%s cannot be captured and runs eagerly: %s", key, error)
            self._refused.add(key)
            return None
        captured = self._captured[key] = _Captured(handle, buffers, outputs)
        return captured

    def forget(self, owner: Hashable) -> None:
        """Destroy the graphs whose keys begin with `owner`, whose buffers are about to be freed."""

        def owned(key: Hashable) -> bool:
            return isinstance(key, tuple) and key[0] == owner

        for key in [*filter(owned, self._captured)]:
            self.driver.destroy(self._captured.pop(key).handle)
        self.driver.trim()
        self._calls = {key: calls for key, calls in self._calls.items() if not owned(key)}
        self._refused = {key for key in self._refused if not owned(key)}

    def clear(self) -> None:
        """Destroy all graphs, and forget what has been called."""
        self._destroy_all()
        self._calls.clear()
        self._refused.clear()

    def _destroy_all(self) -> None:
        """The last captured first."""
        while self._captured:
            self.driver.destroy(self._captured.popitem()[1].handle)
        self.driver.trim()


def _map(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    if outputs is None:
        return None
    return function(outputs) if isinstance(outputs, Tensor) else tuple(_map(function, output) for output in outputs)
