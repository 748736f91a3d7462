"""Many requests, one model: who waits, who is in the batch, and the one thread that drives the device.

    session = Session(pipe)
    future = session.submit("a red apple", seed=7)          from any thread
    for progress in future.progress(): ...
    image = future.result().images[0]

Requests of one size share a batch. Each joins it between two steps, goes at its own pace through its own table, and
leaves when it is done: it is decoded, piece by piece, between the steps of those that stay. Of several sizes, the one
that has had least of the device's time is next, so that a stream of large pictures never starves a small one.

All work on a device is issued by one thread: another's allocation would break the capture of a CUDA graph, and cuDNN
keeps its plans by thread. Nobody else's code runs there: what a caller wants to do between two steps happens in the
caller's thread, and that request alone waits for it.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastldm import openmp
from fastldm.denoise import Batch, Embeds, Run
from fastldm.errors import Cancelled, DeadlineExceeded, InputError, OutOfMemory, QueueFull, out_of_memory_named
from fastldm.kernels import dispatch
from fastldm.request import Request, Result, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastldm.callback import Change
    from fastldm.pipeline import Pipeline

T = TypeVar("T")

SECONDS_A_PRIORITY = 10.0
"""How long a request waits for what one level of priority is worth: none waits forever behind more urgent ones."""
IDLE_SIZES = 4
"""Sizes whose buffers are kept though nobody asks for them, the last used."""


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

    def __init__(self, job: _Job) -> None:
        super().__init__()
        self._job = job
        self._events: SimpleQueue[Progress | None] = SimpleQueue()
        self.add_done_callback(lambda _: self._events.put(None))

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
            yield event
        self._events.put(None)  # who comes again finds the end again

    def result(self, timeout: float | None = None) -> Result:
        """The Result, waited for. Raises what went wrong, `concurrent.futures.CancelledError` or Cancelled where the
        request was cancelled before or after its first step, TimeoutError where it took longer than `timeout` seconds.
        """
        result = super().result(timeout)
        if isinstance(result.images, Tensor) and result.images.is_cuda:
            result.images.record_stream(torch.cuda.current_stream(result.images.device))
        return result

    def _answer(self, change: Change | None) -> None:
        """Let a request go on that waits for its callback, with what that changed."""
        with self._job.worker.changed:
            self._job.change, self._job.paused = change, False
            self._job.worker.changed.notify()


class Session:
    """Takes requests for a pipeline from any thread."""

    def __init__(self, pipe: Pipeline, *, max_batch: int = 4, max_queue: int = 256) -> None:
        """max_batch: pictures of one size that share a step; a larger request runs alone. max_queue: requests that may
        wait, beyond which `submit` raises QueueFull."""
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise InputError(f"{name} is {value}: expected 1 or more")
        self.pipe, self.max_batch, self.max_queue = pipe, max_batch, max_queue
        self._worker = _Worker.of(pipe.device)
        self._buckets: dict[tuple[int, int, dispatch.Route | None], _Bucket] = {}
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
        the request fails with DeadlineExceeded. preview: whether `Progress` has a small picture of each step.

        Raises InputError for what cannot be run, QueueFull, and OutOfMemory for what cannot fit.
        """
        request = Request.of(prompt, options)
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline}: expected seconds from now, more than 0")
        return self._submit(request, priority=priority, deadline=deadline, preview=preview)

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
        job = _Job(self._worker, self.pipe._complete(request), deadline, preview, answered)
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
            bucket = self._buckets.pop(key, None) or _Bucket(self, job.route)
            self._buckets[key] = bucket  # the last used is the last
            if not bucket.jobs():
                bucket.spent = max(bucket.spent, worker.least_spent())  # what it did not ask for, it is not owed
            heapq.heappush(bucket.waiting, (job.submitted - SECONDS_A_PRIORITY * priority, next(self._numbers), job))
            self._open.add(job.future)
            worker.add(self)
        job.future.add_done_callback(self._open.discard)
        return job.future

    def call(self, work: Callable[[], T]) -> T:
        """work(), between two steps on the thread that has the device, while the caller waits."""
        if threading.current_thread() is self._worker.thread:
            return work()
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

    def __enter__(self) -> Session:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.close(cancel=failed is not None)


class _Job:
    """A request between submission and result."""

    def __init__(
        self,
        worker: _Worker,
        request: Request,
        deadline: float | None,
        preview: bool,
        answered: bool,
    ) -> None:
        self.worker, self.request = worker, request
        self.preview, self.answered = preview, answered
        self.submitted = perf_counter()
        self.seconds = deadline
        self.route = dispatch.preference()  # kernels.use holds for the caller's thread: it goes along
        self.threads = openmp.threads()
        self.given = torch.cuda.Event() if worker.device.type == "cuda" else None
        if self.given is not None:
            self.given.record(torch.cuda.current_stream(worker.device))  # behind what made the request's tensors
        self.run: Run | None = None
        self.began = self.begun = self.admitted = self.submitted
        self.marks: list[float] = []  # when each step was done
        self.ran: set[str] = set()  # what ran its steps
        self.paused = self.cancelled = self.interrupted = False
        self.change: Change | None = None
        self.future = Generation(self)

    def over(self, now: float) -> Exception | None:
        """Why the request has to stop, if it has to."""
        if self.cancelled:
            return Cancelled(f"cancelled after {len(self.marks)} steps")
        if self.seconds is not None and now - self.submitted > self.seconds:
            at = f"after {len(self.marks)} steps" if self.run is not None else "while it waited"
            return DeadlineExceeded(f"the request's deadline of {self.seconds:g} s passed {at}")
        return None


class _Bucket:
    """The requests of one size."""

    def __init__(self, session: Session, route: dispatch.Route | None) -> None:
        self.session, self.pipe, self.worker = session, session.pipe, session._worker
        self.route = route
        self.waiting: list[tuple[float, int, _Job]] = []  # a heap: the first in line is first
        self.next: _Job | None = None  # begun, and waiting until the batch can take it
        self.running: list[_Job] = []
        self.finishing: list[tuple[_Job, Iterator[Any]]] = []  # decoded one after the other
        self.batch: Batch | None = None
        self.spent = 0.0  # seconds of the device that this size had
        self.step_time = 0.0
        self._event: Any = None  # what the first of `finishing` waits for

    def jobs(self) -> list[_Job]:
        begun = [] if self.next is None else [self.next]
        return [*(job for *_, job in self.waiting), *begun, *self.running, *(job for job, _ in self.finishing)]

    @property
    def pictures(self) -> int:
        return sum(job.request.batch for job in self.running)

    def _first(self) -> _Job | None:
        """Who may join now. Nobody overtakes: what does not fit yet waits until it does, and the others behind it."""
        job = self.next or (self.waiting[0][-1] if self.waiting else None)
        if job is None or not self.running:
            return job
        if self.batch is not None and job.run is not None and not self.batch.holds(job.run):
            return None  # the buffers are made anew when the last has left them
        return job if self.pictures + job.request.batch <= self.session.max_batch else None

    def ready(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.finishing or any(not job.paused for job in self.running)) or self._first() is not None

    # --- a turn, on the worker's thread

    def turn(self) -> None:
        began = perf_counter()
        with dispatch.use(self.route) if self.route else nullcontext():
            self._apply_answers()
            self._admit()
            self._finish_some()
            self._step()
        self.spent += perf_counter() - began

    def expire(self) -> None:
        """Let go of what was cancelled or is too late."""
        now = perf_counter()
        with self.worker.changed:
            cancelled = [job for *_, job in self.waiting if job.future.cancelled()]
            self._leave(cancelled)
            over = [(job, error) for job in self.jobs() if (error := job.over(now)) is not None]
        for job in cancelled:
            job.future.set_running_or_notify_cancel()  # wakes those who wait for it
        for job, error in over:
            self._fail(job, error)

    def _leave(self, jobs: list[_Job]) -> None:
        """Take requests out of the queue. Called with `changed` held."""
        if jobs:
            self.waiting = [one for one in self.waiting if one[-1] not in jobs]
            heapq.heapify(self.waiting)

    def _apply_answers(self) -> None:
        for job in list(self.running):
            if job.paused:
                continue
            if job.change is not None:
                assert self.batch is not None
                assert job.run is not None
                change, job.change = job.change, None
                with self._failing(job):
                    self.pipe._change(self.batch, job.run, change)
            if job in self.running:
                self._retire(job)

    def _admit(self) -> None:
        with self.worker.changed:
            job = self._first()
            if job is None:
                return
            if job is not self.next:
                heapq.heappop(self.waiting)
                if not job.future.set_running_or_notify_cancel():
                    return
                self.next = job
        with self._failing(job):
            if job.run is None:
                job.began = perf_counter()
                if job.given is not None:
                    torch.cuda.current_stream().wait_event(job.given)
                self._set_threads([job])
                job.run = self.pipe._begin(job.request)
                job.begun = perf_counter()
            if self.batch is None or not self.batch.holds(job.run):
                if self.running:
                    return
                self.drop_batch()
                self.batch = self.pipe._new_batch(job.run, self.session.max_batch)
            self.batch.admit(job.run)
            job.admitted = perf_counter()
            self.running.append(job)
            self.next = None

    def _step(self) -> None:
        jobs = [job for job in self.running if not job.paused]
        if not jobs:
            return
        began = perf_counter()
        self._set_threads(jobs)
        self._step_together(jobs)
        now = perf_counter()
        self.step_time = now - began
        for job in jobs:
            if job in self.running:
                with self._failing(job):
                    self._after_step(job, now)

    def _step_together(self, jobs: list[_Job]) -> None:
        assert self.batch is not None
        runs = [job.run for job in jobs if job.run is not None]
        try:
            ran = self.batch.step(runs)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:  # nobody has moved: whoever it was fails alone, the others go on
                for job in jobs:
                    self._step_together([job])
            return
        for job in jobs:
            job.ran.add(ran)

    def _after_step(self, job: _Job, now: float) -> None:
        assert self.batch is not None
        assert job.run is not None
        job.marks.append(now)
        step, table = len(job.marks) - 1, job.run.work.table
        c_in = 1.0 if job.run.done else float(table.rows[step + 1][0])
        preview = self.pipe._preview(self.batch.latents(job.run), c_in) if job.preview else None
        latents, embeds = (self.batch.latents(job.run), job.run.conditions.embeds) if job.answered else (None, None)
        job.paused = job.answered
        job.future._events.put(Progress(step, len(table), float(table.timesteps[step]), preview, latents, embeds))
        if not job.paused:
            self._retire(job)

    def _retire(self, job: _Job) -> None:
        """From the loop to the decoder, if all steps are done that will be."""
        assert self.batch is not None
        if job.run is not None and (job.run.done or (job.interrupted and job.marks)):
            latents = self.batch.latents(job.run)
            first_bad = self.batch.release(job.run)
            self.running.remove(job)
            self.finishing.append((job, self.pipe._finish(job.request, job.run.work.table, latents, first_bad)))

    def _finish_some(self) -> None:
        """Decode for about as long as a step takes while others step, to the end of one request otherwise."""
        until = perf_counter() + self.step_time
        while self.finishing:
            job, pieces = self.finishing[0]
            others = any(not one.paused for one in self.running)
            if self._event is not None and others and not self._event.query():
                return
            with self._failing(job):
                self._set_threads([job])
                try:
                    self._event = next(pieces)
                except StopIteration as done:
                    del self.finishing[0]
                    self._event = None
                    job.future.set_result(self._result(job, done.value))
                    if not others:
                        return
            if others and perf_counter() > until:
                return

    def _result(self, job: _Job, images: Any) -> Result:
        now, last = perf_counter(), job.marks[-1]
        assert job.run is not None
        timings = Timings(
            text=job.begun - job.began,
            steps=tuple(after - before for before, after in pairwise([job.admitted, *job.marks])),
            decode=now - last,
            total=now - job.submitted,
        )
        backend = job.ran.pop() if len(job.ran) == 1 else self.pipe.backend
        return self.pipe._result(job.request, job.run.work.table, images, timings, backend)

    @contextmanager
    def _failing(self, job: _Job) -> Iterator[None]:
        """What is raised inside is this request's failure, and nobody else's."""
        try:
            yield
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: _Job, error: Exception) -> None:
        error = out_of_memory_named(error)
        if job in self.running:
            self.running.remove(job)
            assert self.batch is not None
            assert job.run is not None
            self.batch.release(job.run)
        if self.next is job:
            self.next = None
        if self.finishing and self.finishing[0][0] is job:
            self._event = None
        self.finishing = [one for one in self.finishing if one[0] is not job]
        with self.worker.changed:
            self._leave([job])
        if isinstance(error, OutOfMemory):
            if not self.running:
                self.drop_batch()
            self.session.release_memory()
            self.pipe._release_memory()
        if not job.future.done():
            if not job.future.running():
                job.future.set_running_or_notify_cancel()
            job.future.set_exception(error)

    def drop_batch(self) -> None:
        if self.batch is not None:
            self.batch.close()
            self.batch = None

    def _set_threads(self, jobs: list[_Job]) -> None:
        """As many CPU threads as the work of these requests has use for, and their callers have."""
        wanted = max(job.threads for job in jobs)
        if self.worker.device.type == "cpu":
            wanted = self.pipe._threads(jobs[0].request, sum(job.request.batch for job in jobs), wanted)
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


class _Worker:
    """The thread that issues all work of a device, for every session on it. It lives as long as the process."""

    _of: ClassVar[dict[torch.device, _Worker]] = {}
    _lock = threading.Lock()

    @classmethod
    def of(cls, device: torch.device) -> _Worker:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with cls._lock:
            if device not in cls._of:
                cls._of[device] = cls(device)
            return cls._of[device]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.changed = threading.Condition()  # guards all queues
        self.thread: threading.Thread | None = None
        self._busy: set[Session] = set()  # sessions with a request that is not done
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._stopping = False
        atexit.register(self.stop)

    def add(self, session: Session) -> None:
        """A session has something to do. Called with `changed` held."""
        self._busy.add(session)
        self._start()

    def _start(self) -> None:
        """See to it that the thread runs, and looks. Called with `changed` held."""
        if self.thread is None or not self.thread.is_alive():  # a fork leaves a thread that is not
            self.thread = threading.Thread(target=self._run, name=f"fastldm {self.device}", daemon=True)
            self.thread.start()
        self.changed.notify()

    def stop(self) -> None:
        """At the interpreter's end: a thread inside a device's library must not be cut off."""
        with self.changed:
            self._stopping = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join(timeout=10)

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            while not self._stopping:
                self._expire()
                if not self._turn():
                    with self.changed:
                        if self._choose() is None and not self._calls:
                            self.changed.wait(self._patience())

    def _expire(self) -> None:
        for bucket in self._buckets():
            bucket.expire()

    def call(self, work: Callable[[], T]) -> T:
        """work(), on this thread between two turns, while the caller waits."""
        future: Future[T] = Future()
        with self.changed:
            self._calls.append((future, work))
            self._start()
        return future.result()

    def _turn(self) -> bool:
        """One turn of one size; False where nobody has anything to do. (A function of its own, so that an idle worker
        keeps no model alive.)"""
        with self.changed:
            calls, self._calls = self._calls, []
            bucket = self._choose()
        for future, work in calls:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
        if bucket is not None:
            bucket.turn()
        return bool(calls) or bucket is not None

    def _buckets(self) -> list[_Bucket]:
        with self.changed:
            return [bucket for session in self._busy for bucket in session._buckets.values()]

    def least_spent(self) -> float:
        """Of the sizes that something is asked of."""
        return min((bucket.spent for bucket in self._buckets() if bucket.jobs()), default=0.0)

    def _choose(self) -> _Bucket | None:
        """The size that has had least of the device, of those that have something to do."""
        for session in list(self._busy):
            if not any(bucket.jobs() for bucket in session._buckets.values()):
                self._busy.discard(session)
                session.release_memory(keep=IDLE_SIZES)
        return min((one for one in self._buckets() if one.ready()), key=lambda one: one.spent, default=None)

    def _patience(self) -> float | None:
        """Seconds until the next deadline of a request that waits for its caller."""
        jobs = [job for bucket in self._buckets() for job in bucket.jobs()]
        left = [job.submitted + job.seconds - perf_counter() for job in jobs if job.seconds is not None]
        return max(0.0, min(left)) + 0.001 if left else None
