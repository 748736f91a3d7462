"""The buckets of a model in a session: which request goes to which."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from fastldm.kernels import dispatch
from fastldm.request import Request
from fastldm.serving.bucket import Bucket
from fastldm.serving.cascade import AnyStages
from fastldm.serving.generation import Generation, Host
from fastldm.serving.stats import Totals

SECONDS_A_PRIORITY = 10.0
"""The waiting time that one level of priority is worth: no request waits forever behind more urgent ones."""


class Buckets:
    """The buckets of one session, which its worker drives. Queues are read and changed with `host.changed` held."""

    def __init__(
        self, stages: AnyStages, host: Host, max_batch: int, batch_invariant: bool, of: Buckets | None = None
    ) -> None:
        """of: those of the session's own model, whose requests have stages here."""
        self._main = self if of is None else of
        self._stages, self._host, self._max_batch = stages, host, max_batch
        self._batch_invariant = batch_invariant
        self._by_size: dict[tuple[int, int, dispatch.Route | None, bool], Bucket] = {}  # the last used is the last
        self._numbers = itertools.count()
        self.open: set[Generation] = set()  # submitted and not done
        self.totals = Totals()

    def __iter__(self) -> Iterator[Bucket]:
        return iter([*self._by_size.values()])

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(len(bucket.waiting) for bucket in self)

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return any(bucket.generations() for bucket in self)

    def add(self, generation: Generation, priority: float, least_spent: float) -> None:
        """Queue a request. least_spent: seconds of the device that the least served bucket of the worker has had."""
        request = generation.part
        # Steps with a gradient take several times as long: they have turns of their own.
        key = (int(request.height or 0), int(request.width or 0), generation.route, request.gradient is not None)
        bucket = self._by_size.pop(key, None) or Bucket(
            self._stages,
            self._host,
            self._max_batch,
            generation.route,
            self.release_memory,
            self._batch_invariant,
            self._main.totals,
            (key[1], key[0]),
        )
        self._by_size[key] = bucket
        if not bucket.generations():
            bucket.spent = max(bucket.spent, least_spent)  # time that it did not ask for is not owed to it
        place = generation.submitted - SECONDS_A_PRIORITY * priority
        heapq.heappush(bucket.waiting, (place, next(self._numbers), generation))
        if generation not in self._main.open:  # else it comes back for another stage
            self._main.open.add(generation)
            Future.add_done_callback(generation, self._main.ended)

    def ended(self, generation: Any) -> None:
        """A request is done."""
        self.open.discard(generation)
        self.totals.ended(generation)

    def held(self, request: Request) -> int:
        """Bytes of buffers that are kept for requests of this one's size."""
        size = (int(request.height or 0), int(request.width or 0))
        with self._host.changed:
            batches = [bucket.batch for key, bucket in self._by_size.items() if key[:2] == size]
            return sum(batch.nbytes for batch in batches if batch is not None)

    def release_memory(self, keep: int = 0) -> None:
        """Free the buffers of idle buckets, but of the last `keep` used. On the worker's thread."""
        with self._host.changed:
            idle = [key for key, bucket in self._by_size.items() if not bucket.generations()]
            dropped = [self._by_size.pop(key) for key in idle[: len(idle) - keep]]
        for bucket in dropped:
            bucket.drop_batch()

    def lose_in_child(self) -> None:
        """In a process that was forked from this one: what was open is lost there, and nothing of it is touched."""
        lost, self.open, self._by_size = self.open, set(), {}
        for generation in lost:
            generation.lose_in_child()
