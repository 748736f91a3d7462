"""A request on its way: what its caller holds, what the worker knows of it, and what the one tells the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastldm import image as images
from fastldm import openmp
from fastldm.device import Mark
from fastldm.errors import Cancelled, DeadlineExceeded, WorkerLost
from fastldm.kernels import dispatch
from fastldm.request import Request, Result
from fastldm.runtime.denoise import Embeds, Run
from fastldm.runtime.stages import Change

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("fastldm")


class Callbacks:
    """A thread that does what others have asked to be done, in order, whatever that raises."""

    def __init__(self) -> None:
        self._lock, self._queue = threading.Lock(), SimpleQueue[Callable[[], Any] | None]()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], Any]) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="fastldm callbacks", daemon=True)
                self._thread.start()
        self._queue.put(work)

    def inside(self) -> bool:
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """When all that was asked for is done, or takes too long."""
        if self._thread is not None and not self.inside():
            self._queue.put(None)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException:
                report("a done-callback of a request failed")
            del work  # nothing of it is kept until the next


class Host(Protocol):
    """What a request needs of the worker that runs it (worker.py)."""

    device: torch.device
    changed: threading.Condition
    """Guards all queues."""
    thread: threading.Thread | None

    @property
    def callbacks(self) -> Callbacks: ...


class Job:
    """A request between submission and result."""

    def __init__(
        self,
        worker: Host,
        request: Request,
        seconds: float | None,
        preview: bool,
        answered: bool,
    ) -> None:
        """seconds: until its deadline. answered: whether it waits after each step until somebody has answered."""
        self.worker, self.request = worker, request
        self.preview, self.answered = preview, answered
        self.submitted = perf_counter()
        self.seconds = seconds
        self.route = dispatch.preference()  # kernels.use holds for the caller's thread: it goes along
        self.threads = openmp.threads()
        self.given = Mark(worker.device)  # behind what made the request's tensors
        self.run: Run | None = None
        self.began = self.begun = self.admitted = self.submitted
        self.marks: list[float] = []  # when each step was done
        self.ran: set[str] = set()  # what ran its steps
        self.paused = self.cancelled = self.interrupted = False
        self.answer: tuple[Change, Mark] | None = None  # what a callback wants changed
        self.future: Generation  # whose it is

    def over(self, now: float) -> Exception | None:
        """Why the request has to stop, if it has to."""
        if self.cancelled:
            return Cancelled(f"cancelled after {len(self.marks)} steps")
        if self.seconds is not None and now - self.submitted > self.seconds:
            at = f"after {len(self.marks)} steps" if self.run is not None else "while it waited"
            return DeadlineExceeded(f"the request's deadline of {self.seconds:g} s passed {at}")
        if self.future.done():  # by somebody who holds it: nobody waits for it any more
            return Cancelled("the request was answered by somebody else")
        return None


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

    def begin(self) -> bool:
        """Whether somebody still waits for it."""
        with suppress(InvalidStateError, RuntimeError):
            if not self.done() and not self.running():
                return self.set_running_or_notify_cancel()
        return self.running()

    def publish(self, preview: Tensor | None, **step: Any) -> None:
        """preview: pictures on their way to the host. step: the fields of Progress but that."""
        self._events.put((Progress(**step), preview, Mark(self._job.worker.device)))

    def finish(self, result: Result) -> None:
        self._made = Mark(self._job.worker.device)
        with suppress(InvalidStateError):  # somebody else has answered it
            self.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.cancelled():
            with suppress(RuntimeError):
                self.set_running_or_notify_cancel()  # wakes those who wait for several
        elif not self.done():
            with suppress(InvalidStateError):
                self.set_exception(error)

    def answer(self, change: Change | None) -> None:
        """Let a request go on that waits for its callback, with what that changed."""
        answer = None if change is None else (change, Mark(self._job.worker.device))
        with self._job.worker.changed:
            self._job.answer, self._job.paused = answer, False
            self._job.worker.changed.notify()

    def lose_in_child(self) -> None:
        """In a process that was forked meanwhile, whose worker knows nothing of it. What is to be done when it is done
        is the other's to do."""
        self._condition = threading.Condition()  # another thread may have held it
        self._done_callbacks: list[Any] = []
        self.fail(WorkerLost("the request runs in the process that this one was forked from: ask again here"))
        self._events.put(None)


def lost_by(error: BaseException) -> WorkerLost:
    """What a request gets that was in hand when something else failed."""
    lost = WorkerLost(f"the thread that ran the request failed ({type(error).__name__}: {error}): ask again")
    lost.__cause__ = error
    return lost


def report(text: str, *args: object) -> None:
    """To the log, whose handlers are somebody else's code too."""
    with suppress(BaseException):
        logger.exception(text, *args)
