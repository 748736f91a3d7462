"""Many requests, one model: who waits, who is in the batch, and the one thread that drives the device.

    session = Session(pipe)
    future = session.submit("a red apple", seed=7)          from any thread
    for progress in future.progress(): ...
    image = future.result().images[0]

Requests of one size share a batch. Each joins it between two steps, goes at its own pace through its own table, and
leaves when it is done: it is decoded, piece by piece, between the steps of those that stay. Of several sizes, the one
that has had least of the device's time is next, so that a stream of large pictures never starves a small one.

All work on a device is issued by one thread (worker.py): another's allocation would break the capture of a CUDA graph,
and cuDNN keeps its plans by thread. Nobody else's code runs there: what a caller wants to do between two steps happens
in the caller's thread, and that request alone waits for it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastldm import checks, openmp
from fastldm.errors import InputError, QueueFull
from fastldm.kernels import dispatch
from fastldm.request import Request
from fastldm.runtime.stages import Stages
from fastldm.serving import admission
from fastldm.serving.bucket import Bucket
from fastldm.serving.generation import Generation, Job
from fastldm.serving.worker import Worker

T = TypeVar("T")

SECONDS_A_PRIORITY = 10.0
"""How long a request waits for what one level of priority is worth: none waits forever behind more urgent ones."""
MAX_BATCH = 4096  # pictures that share a step, at most
MAX_QUEUE = 10**9
MAX_PRIORITY = 1e9


class Staged(Protocol):
    """A pipeline."""

    stages: Stages


class Session:
    """Takes requests for a pipeline from any thread."""

    def __init__(self, pipe: Staged | Stages, *, max_batch: int = 4, max_queue: int = 256) -> None:
        """max_batch: pictures of one size that share a step; a larger request runs alone. max_queue: requests that may
        wait, beyond which `submit` raises QueueFull."""
        stages = getattr(pipe, "stages", pipe)
        if not isinstance(stages, Stages):
            raise InputError(f"pipe is {checks.show(pipe)}: expected a fastldm.Pipeline")
        self.stages = stages
        self.max_batch = checks.whole("max_batch", max_batch, 1, MAX_BATCH)
        self.max_queue = checks.whole("max_queue", max_queue, 1, MAX_QUEUE)
        self._worker = Worker.of(stages.device)
        self._worker.sessions.add(self)
        self.buckets: dict[tuple[int, int, dispatch.Route | None], Bucket] = {}
        self._numbers = itertools.count()
        self._open: set[Generation] = set()  # what has been submitted and is not done
        self._closed = False

    def submit(
        self,
        prompt: str | list[str] | Request | None = None,
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool = False,
        **options: Any,
    ) -> Generation:
        """Queue a request: a text, a list of texts, or a whole Request; options are the other fields of Request.

        priority: higher goes first; each level is worth ten seconds of waiting. deadline: seconds from now, after which
        the request fails with DeadlineExceeded; infinity is none. preview: whether `Progress` has a small picture of
        each step.

        Raises InputError for what cannot be run, QueueFull, and OutOfMemory for what cannot fit.
        """
        request = Request.of(prompt, options)
        priority = checks.real("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        deadline = None if deadline is None else _seconds(deadline)
        return self.submit_request(
            request, priority=priority, deadline=deadline, preview=checks.flag("preview", preview)
        )

    def submit_request(
        self,
        request: Request,
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool = False,
        answered: bool = False,
    ) -> Generation:
        """answered: whether the request waits after each step until somebody has answered for it."""
        completed = self.stages.complete(request)
        admission.check(
            self.stages, completed, self.max_batch, self.held(int(completed.height or 0), int(completed.width or 0))
        )
        job = Job(self._worker, completed, deadline, preview, answered)
        job.future = Generation(job)
        worker = self._worker
        if worker.device.type == "cpu":
            openmp.rest()
        with worker.changed:
            if self._closed:
                raise InputError("this session is closed: make a new one")
            if threading.current_thread() is worker.thread:
                raise InputError("a request was made inside the worker's own thread, which would wait for itself")
            waiting = sum(len(bucket.waiting) for bucket in self.buckets.values())
            if waiting >= self.max_queue:
                raise QueueFull(f"{waiting} requests wait already, and max_queue is {self.max_queue}: try again later")
            key = (int(job.request.height or 0), int(job.request.width or 0), job.route)
            bucket = self.buckets.pop(key, None) or Bucket(
                self.stages, worker, self.max_batch, job.route, self.release_memory
            )
            self.buckets[key] = bucket  # the last used is the last
            if not bucket.jobs():
                bucket.spent = max(bucket.spent, worker.least_spent())  # what it did not ask for, it is not owed
            heapq.heappush(bucket.waiting, (job.submitted - SECONDS_A_PRIORITY * priority, next(self._numbers), job))
            self._open.add(job.future)
            worker.add(self)
        Future.add_done_callback(job.future, self._open.discard)
        return job.future

    def call(self, work: Callable[[], T]) -> T:
        """work(), between two steps on the thread that has the device, while the caller waits."""
        return self._worker.call(work)

    def held(self, height: int, width: int) -> int:
        """Bytes that lie ready for requests of this size, in pixels."""
        with self._worker.changed:
            batches = [bucket.batch for (h, w, _), bucket in self.buckets.items() if (h, w) == (height, width)]
            return sum(batch.nbytes for batch in batches if batch is not None)

    def release_memory(self, keep: int = 0) -> None:
        """Give up the buffers of sizes that nobody asks for, but of the last `keep` used. On the worker's thread."""
        with self._worker.changed:
            idle = [key for key, bucket in self.buckets.items() if not bucket.jobs()]
            gone = [self.buckets.pop(key) for key in idle[: len(idle) - keep]]
        for bucket in gone:
            bucket.drop_batch()

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait for those that there are, or cancel them."""
        with self._worker.changed:
            self._closed = True
            left = list(self._open)
        if cancel:
            for future in left:
                future.cancel()
        wait(left)
        self.call(self.release_memory)

    def lose_in_child(self) -> None:
        """In a process that was forked from this one: what was open is lost there, and nothing of it is touched."""
        lost, self._open, self.buckets = self._open, set(), {}
        for future in lost:
            future.lose_in_child()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.close(cancel=failed is not None)


def _seconds(deadline: Any) -> float | None:
    seconds = 0.0
    with suppress(InputError, OverflowError):
        seconds = checks.real("deadline", deadline, -math.inf, math.inf)
    if seconds <= 0:
        raise InputError(f"deadline is {checks.show(deadline)}: expected seconds from now, more than 0")
    return None if seconds == math.inf else seconds
