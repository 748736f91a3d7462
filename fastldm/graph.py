"""Work that is recorded once and replayed: CUDA graphs by key, within a budget of memory.

A graph is captured only after its work has run eagerly, exactly as it will be captured, often enough for every kernel,
plan and workspace to be there: to compile or to search inside a capture is an error. All graphs share one pool of
memory and are replayed on the stream of the thread that captured them, one after the other; what crosses a graph's
edge lies outside the pool, in buffers that the caller keeps.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
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
    """What captures. `CUDA` is the one there is; a test's records what it is asked."""

    def capture(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """Record `work`, which is not run. A handle, and by how many bytes the pool grew."""

    def replay(self, handle: Any) -> None: ...

    def destroy(self, handle: Any) -> None:
        """Give the graph's memory back to the pool."""

    def trim(self) -> None:
        """Give memory of the pool that no graph uses back to the device."""


class CUDA:
    """Graphs of one device, on the current stream of the thread that calls, which must be one of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, int]:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # a capture begins with this: what it gives back is no growth of ours
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate and copy meanwhile, as a caller that reads its picture does.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=torch.cuda.current_stream(self.device), capture_error_mode="thread_local"
        ):
            work()
        return graph, max(0, torch.cuda.memory_reserved(self.device) - before)

    def replay(self, handle: torch.cuda.CUDAGraph) -> None:
        handle.replay()

    def destroy(self, handle: torch.cuda.CUDAGraph) -> None:
        torch.cuda.current_stream(self.device).synchronize()  # a replay may be under way
        handle.reset()

    def trim(self) -> None:
        torch.cuda.empty_cache()


@dataclass
class _Captured:
    handle: Any
    bytes: int
    inputs: tuple[Tensor, ...]
    outputs: list[Any]  # one: what the work returned when it was captured, written by each replay


class Graphs:
    """Captured work by key; where it would pass its budget, the least recently used goes.

    budget: bytes that all graphs together may add to the pool; None for no bound. Used by one thread.
    """

    def __init__(self, driver: Driver, budget: int | None = None) -> None:
        self.driver, self.budget = driver, budget
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()  # the least recently used first
        self._runs: dict[Hashable, int] = {}  # eager runs of what is not captured
        self._refused: set[Hashable] = set()

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self._captured.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def run(self, key: Hashable, work: Callable[[], Any]) -> bool:
        """Do `work`: by replay, captured when it has run eagerly often enough; until then eagerly. Says whether it was
        replayed.

        key: says all that `work` depends on but what is in the tensors that it reads.
        """
        found = self._find(key, work, ())
        if found is None:
            work()
            return False
        self.driver.replay(found.handle)
        return True

    def call(self, key: Hashable, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """work(*inputs), a tensor or a tuple of them, in the same way: the inputs are copied in, the outputs out."""
        key = (key, tuple((tuple(x.shape), x.dtype) for x in inputs))
        found = self._find(key, work, inputs)
        if found is None:
            return work(*inputs)
        for mine, given in zip(found.inputs, inputs, strict=True):
            mine.copy_(given)
        self.driver.replay(found.handle)
        return _map(torch.clone, found.outputs[-1])

    def _find(self, key: Hashable, work: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Captured | None:
        found = self._captured.get(key)
        if found is not None:
            self._captured.move_to_end(key)
            return found
        if key in self._refused:
            return None
        runs = self._runs.get(key, 0)
        if runs < WARM_UPS:
            self._runs[key] = runs + 1
            return None
        return self._capture(key, work, inputs)

    def _capture(self, key: Hashable, work: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Captured | None:
        mine = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        outputs: list[Any] = []
        try:
            with nothing_compiles():
                handle, size = self.driver.capture(lambda: outputs.append(work(*mine)))
        except torch.OutOfMemoryError:
            raise
        except CompiledLate as error:
            raise EngineError(f"capturing {key}: {error}; its eager runs were not of this work") from error
        except Exception as error:  # what it is, only CUDA knows; the eager way is there and as good
            logger.warning("%s cannot be captured and runs eagerly: %s", key, error)
            self._refused.add(key)
            return None
        captured = self._captured[key] = _Captured(handle, size, mine, outputs)
        self._runs.pop(key, None)
        while self.budget is not None and self.bytes > self.budget and len(self._captured) > 1:
            self.drop(next(iter(self._captured)))
        return captured

    def drop(self, key: Hashable) -> None:
        """Destroy one graph."""
        self.driver.destroy(self._captured.pop(key).handle)
        self.driver.trim()

    def forget(self, owner: Hashable) -> None:
        """Destroy the graphs whose keys begin with `owner`, whose buffers are about to go."""
        for key in [key for key in self._captured if isinstance(key, tuple) and key[0] == owner]:
            self.drop(key)
        self._runs = {key: runs for key, runs in self._runs.items() if not (isinstance(key, tuple) and key[0] == owner)}

    def clear(self) -> None:
        """Destroy all graphs, the last captured first, and forget what has run."""
        while self._captured:
            self.driver.destroy(self._captured.popitem()[1].handle)
        self._runs.clear()
        self._refused.clear()
        self.driver.trim()


def _map(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    if outputs is None:
        return None
    return function(outputs) if isinstance(outputs, Tensor) else tuple(_map(function, one) for one in outputs)
