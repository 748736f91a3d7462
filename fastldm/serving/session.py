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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from fastldm import checks, openmp
from fastldm import image as images
from fastldm.device import Mark
from fastldm.errors import InputError, QueueFull, WorkerLost
from fastldm.kernels import dispatch
from fastldm.request import Request, Result
from fastldm.runtime.denoise import Embeds
from fastldm.serving.bucket import Bucket, Job
from fastldm.serving.worker import Worker

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastldm.pipeline import Pipeline
    from fastldm.serving.callback import Change

T = TypeVar("T")

SECONDS_A_PRIORITY = 10.0
"""How long a request waits for what one level of priority is worth: none waits forever behind more urgent ones."""
MAX_BATCH = 4096  # pictures that share a step, at most
MAX_QUEUE = 10**9
MAX_PRIORITY = 1e9


@dataclass(frozen=True)
class Progress:
    """A step that is done."""

    step: int
    """Which pass of the sampler's loop, from 0."""
    steps: int
    """How many there are."""
    timestep: float
    """The training timestep that it was taken at."""
    preview: list[Image] | None = None
    """What the pictures look like so far, small; for requests submitted with preview."""
    latents: Tensor | None = None
    """(B, C, h, w) float32; for calls with a callback."""
    embeds: Embeds | None = None
    """What the U-Net's rows are conditioned on; for calls with a callback."""


class Generation(Future[Result]):
    """A submitted request: a `concurrent.futures.Future` of its Result."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._events: SimpleQueue[tuple[Progress, Tensor | None, Mark] | None] = SimpleQueue()
        self._made: Mark | None = None  # behind the result's tensors
        super().add_done_callback(lambda _: self._events.put(None))

    def cancel(self) -> bool:
        """Stop the request, between two steps if it has begun; `result` raises then. False where it is done already."""
        stopped = super().cancel()
        with self._job.worker.changed:
            if not stopped and self.done():
                return False
            self._job.cancelled = True
            self._job.worker.changed.notify()
        return True

    def interrupt(self) -> None:
        """Finish early: leave out the steps that are left, but for one where none is done, and decode what there is."""
        with self._job.worker.changed:
            self._job.interrupted = True
            self._job.worker.changed.notify()

    @property
    def request(self) -> Request:
        """What is made, with every default filled in."""
        return self._job.request

    def progress(self) -> Iterator[Progress]:
        """Each step as it is done, until the request is; for one reader. Never raises what `result` does."""
        while (event := self._events.get()) is not None:
            step, preview, mark = event
            mark.follow((step.latents, step.embeds))
            if preview is not None:
                mark.wait()  # on the device's way to the host
                step = replace(step, preview=images.to_images(preview, "pil"))  # type: ignore[arg-type]
            yield step
        self._events.put(None)  # who comes again finds the end again

    def result(self, timeout: float | None = None) -> Result:
        """The Result, waited for. Raises what went wrong, `concurrent.futures.CancelledError` or Cancelled where the
        request was cancelled before or after its first step, TimeoutError where it took longer than `timeout` seconds.
        """
        result = super().result(timeout)
        return result if self._made is None else self._made.follow(result)

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """As of any Future: fn(self) when the request is done, at once if it is. Called by the thread that cancels, or
        by one that does nothing else; while one callback waits for something, so do those of other requests."""

        def call(future: Future[Result]) -> None:
            worker = self._job.worker
            if threading.current_thread() is worker.thread:
                worker.callbacks.put(lambda: fn(future))
            else:
                fn(future)

        super().add_done_callback(call)

    # --- what the worker and the caller tell

    def _begin(self) -> bool:
        """Whether somebody still waits for it."""
        with suppress(InvalidStateError, RuntimeError):
            if not self.done() and not self.running():
                return self.set_running_or_notify_cancel()
        return self.running()

    def _tell(self, preview: Tensor | None, **step: Any) -> None:
        """preview: pictures on their way to the host. step: the fields of Progress but that."""
        self._events.put((Progress(**step), preview, Mark(self._job.worker.device)))

    def _finish(self, result: Result) -> None:
        self._made = Mark(self._job.worker.device)
        with suppress(InvalidStateError):  # somebody else has answered it
            self.set_result(result)

    def _fail(self, error: Exception) -> None:
        if self.cancelled():
            with suppress(RuntimeError):
                self.set_running_or_notify_cancel()  # wakes those who wait for several
        elif not self.done():
            with suppress(InvalidStateError):
                self.set_exception(error)

    def _answer(self, change: Change | None) -> None:
        """Let a request go on that waits for its callback, with what that changed."""
        answer = None if change is None else (change, Mark(self._job.worker.device))
        with self._job.worker.changed:
            self._job.answer, self._job.paused = answer, False
            self._job.worker.changed.notify()

    def _forked(self) -> None:
        """In a process that was forked meanwhile, whose worker knows nothing of it. What is to be done when it is done
        is the other's to do."""
        self._condition = threading.Condition()  # another thread may have held it
        self._done_callbacks: list[Any] = []
        self._fail(WorkerLost("the request runs in the process that this one was forked from: ask again here"))
        self._events.put(None)


class Session:
    """Takes requests for a pipeline from any thread."""

    def __init__(self, pipe: Pipeline, *, max_batch: int = 4, max_queue: int = 256) -> None:
        """max_batch: pictures of one size that share a step; a larger request runs alone. max_queue: requests that may
        wait, beyond which `submit` raises QueueFull."""
        from fastldm.pipeline import Pipeline

        if not isinstance(pipe, Pipeline):
            raise InputError(f"pipe is {checks.show(pipe)}: expected a fastldm.Pipeline")
        self.pipe = pipe
        self.max_batch = checks.whole("max_batch", max_batch, 1, MAX_BATCH)
        self.max_queue = checks.whole("max_queue", max_queue, 1, MAX_QUEUE)
        self._worker = Worker.of(pipe.device)
        self._worker.sessions.add(self)
        self._buckets: dict[tuple[int, int, dispatch.Route | None], Bucket] = {}
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
        return self._submit(request, priority=priority, deadline=deadline, preview=checks.flag("preview", preview))

    def _submit(
        self,
        request: Request,
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool = False,
        answered: bool = False,
    ) -> Generation:
        """answered: whether the request waits after each step until somebody has answered for it."""
        job = Job(self._worker, self.pipe._complete(request), deadline, preview, answered)
        job.future = Generation(job)
        worker = self._worker
        if worker.device.type == "cpu":
            openmp.rest()
        with worker.changed:
            if self._closed:
                raise InputError("this session is closed: make a new one")
            if threading.current_thread() is worker.thread:
                raise InputError("a request was made inside the worker's own thread, which would wait for itself")
            waiting = sum(len(bucket.waiting) for bucket in self._buckets.values())
            if waiting >= self.max_queue:
                raise QueueFull(f"{waiting} requests wait already, and max_queue is {self.max_queue}: try again later")
            key = (int(job.request.height or 0), int(job.request.width or 0), job.route)
            bucket = self._buckets.pop(key, None) or Bucket(self, job.route)
            self._buckets[key] = bucket  # the last used is the last
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
            batches = [bucket.batch for (h, w, _), bucket in self._buckets.items() if (h, w) == (height, width)]
            return sum(batch.nbytes for batch in batches if batch is not None)

    def release_memory(self, keep: int = 0) -> None:
        """Give up the buffers of sizes that nobody asks for, but of the last `keep` used. On the worker's thread."""
        with self._worker.changed:
            idle = [key for key, bucket in self._buckets.items() if not bucket.jobs()]
            gone = [self._buckets.pop(key) for key in idle[: len(idle) - keep]]
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

    def _forked(self) -> None:
        """In a process that was forked from this one: what was open is lost there, and nothing of it is touched."""
        lost, self._open, self._buckets = self._open, set(), {}
        self.pipe._lock = threading.Lock()  # another thread may have held it
        for future in lost:
            future._forked()

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
