"""Work that is recorded once and replayed: CUDA graphs by key, within a budget of memory.

A graph is captured only after its work has run eagerly, exactly as it will be captured, often enough for every kernel,
plan and workspace to be there: to compile or to search inside a capture is an error. All graphs share one pool of
memory and are replayed on the stream of the thread that captured them, one after the other; what crosses a graph's
edge lies outside the pool, in buffers that the caller keeps.

What a graph takes cannot be told from what it makes the pool grow by: one that is captured where another's tensors lay
makes it grow by nothing. And the pool gives nothing back while any graph holds it. So the budget is the pool's, and
where the pool passes it all graphs go, and those that are still asked for are captured again in a new one.
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
    """What captures. `CUDA` is the one there is; a test's records what it is asked."""

    def capture(self, work: Callable[[], Any]) -> Any:
        """Record `work`, which is not run. A handle."""

    def held(self) -> int:
        """Bytes that the pool holds of the device's memory, used by a graph or not."""

    def replay(self, handle: Any) -> None: ...

    def destroy(self, handle: Any) -> None:
        """Let a graph go, and with the last one the pool."""

    def trim(self) -> None:
        """Give memory that no pool holds any more back to the device."""


class CUDA:
    """Graphs of one device, on the current stream of the thread that calls, which must be one of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._alive = 0

    def capture(self, work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self.device)
        if not self._alive:  # PyTorch captures nothing more into a pool whose last graph has gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate and copy meanwhile, as a caller that reads its picture does.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=torch.cuda.current_stream(self.device), capture_error_mode="thread_local"
        ):
            work()
        self._alive += 1
        return graph

    def held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self.pool))

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
    outputs: list[Any]  # one: what the work returned when it was captured, written by each replay


class Graphs:
    """Captured work by key.

    budget: bytes that the pool of all graphs may hold, but for one graph that needs more; None for no bound. Used by
    one thread.
    """

    def __init__(self, driver: Driver, budget: int | None = None) -> None:
        self.driver, self.budget = driver, budget
        self._captured: dict[Hashable, _Captured] = {}  # in the order of their captures
        self._runs: dict[Hashable, int] = {}  # eager runs of what is not captured
        self._refused: set[Hashable] = set()

    @property
    def bytes(self) -> int:
        """What the pool holds."""
        return self.driver.held() if self._captured else 0

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
            return found
        if key in self._refused:
            return None
        runs = self._runs.get(key, 0)
        if runs < WARM_UPS:
            self._runs[key] = runs + 1
            return None
        found = self._capture(key, work, inputs)
        if found is None or self.budget is None or len(self._captured) == 1 or self.driver.held() <= self.budget:
            return found
        self._destroy_all()  # what they have run is kept: each is captured again when it is next asked for
        return self._capture(key, work, inputs)

    def _capture(self, key: Hashable, work: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Captured | None:
        mine = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        outputs: list[Any] = []
        try:
            with nothing_compiles():
                handle = self.driver.capture(lambda: outputs.append(work(*mine)))
        except torch.OutOfMemoryError:
            raise
        except CompiledLate as error:
            raise EngineError(f"capturing {key}: {error}; its eager runs were not of this work") from error
        except Exception as error:  # what it is, only CUDA knows; the eager way is there and as good
            logger.warning("%s cannot be captured and runs eagerly: %s", key, error)
            self._refused.add(key)
            return None
        captured = self._captured[key] = _Captured(handle, mine, outputs)
        return captured

    def forget(self, owner: Hashable) -> None:
        """Destroy the graphs whose keys begin with `owner`, whose buffers are about to go."""

        def owned(key: Hashable) -> bool:
            return isinstance(key, tuple) and key[0] == owner

        for key in [*filter(owned, self._captured)]:
            self.driver.destroy(self._captured.pop(key).handle)
        self.driver.trim()
        self._runs = {key: runs for key, runs in self._runs.items() if not owned(key)}
        self._refused = {key for key in self._refused if not owned(key)}

    def clear(self) -> None:
        """Destroy all graphs, and forget what has run."""
        self._destroy_all()
        self._runs.clear()
        self._refused.clear()

    def _destroy_all(self) -> None:
        """The last captured first."""
        while self._captured:
            self.driver.destroy(self._captured.popitem()[1].handle)
        self.driver.trim()


def _map(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    if outputs is None:
        return None
    return function(outputs) if isinstance(outputs, Tensor) else tuple(_map(function, one) for one in outputs)
