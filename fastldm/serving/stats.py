"""What a session does at a moment, and has done so far."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastldm.errors import Cancelled

if TYPE_CHECKING:
    from fastldm.serving.generation import Generation

_RECENT = 100  # waits that the median is of


@dataclass(frozen=True)
class Stats:
    """A session at a moment (`Session.stats`). Times are in seconds, memory in bytes."""

    waiting: int
    """Requests in the queue."""
    running: int
    """Requests that have started and are not done."""
    images: int
    """Images that share steps at the moment, of `max_batch` that one size may have."""
    max_batch: int
    max_queue: int
    completed: int
    """Requests that have their result; likewise those that failed, and those that were cancelled."""
    failed: int
    cancelled: int
    wait: float | None
    """From `submit` to the start of a request: the median of the last 100 that started, None before the first."""
    step_times: dict[tuple[int, int], float]
    """The last step of a batch, by its images' size (width, height) in pixels."""
    remaining: float | None
    """Until all that was submitted is done, about; None while no step has been timed, 0 if there is nothing."""
    adapters: tuple[str, ...]
    """Names of the adapters that are loaded."""
    adapter_swaps: int
    """How often adapters were merged into the weights, or taken out again."""
    captures: int
    """CUDA graphs that are held."""
    memory_planned: int
    """The networks' weights and the buffers of all sizes in use, allocated before a first step, with copies and pages
    of adapters."""
    memory_used: int | None
    """By this process: of a GPU what PyTorch has allocated there, else its resident memory, where the system says."""


@dataclass
class Totals:
    """What a session counts. Any thread may be the one in which a request ends."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, generation: Generation) -> None:
        """Count a request that is done."""
        cancelled = generation.cancelled()
        error = None if cancelled else generation.exception()
        with self._lock:
            if cancelled or isinstance(error, Cancelled):
                self.cancelled += 1
            elif error is not None:
                self.failed += 1
            else:
                self.completed += 1

    def started(self, generation: Generation) -> None:
        """Count a request that has left the queue."""
        self.waits.append(generation.prepare_start - generation.submitted)

    @property
    def wait(self) -> float | None:
        waits = [*self.waits]
        return statistics.median(waits) if waits else None
