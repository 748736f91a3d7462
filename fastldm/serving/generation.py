"""A request under way: the Future that its caller holds, and what the worker records of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
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
from fastldm.runtime.candidates import Part
from fastldm.runtime.denoise import Embeds, Run
from fastldm.runtime.stages import Change
from fastldm.serving.cascade import CascadeStage

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("fastldm")


class Callbacks:
    """A thread that calls functions in the order in which they were put, whatever they raise."""

    def __init__(self) -> None:
        self._lock, self._queue = threading.Lock(), SimpleQueue[Callable[[], Any] | None]()
        self._thread: threading.Thread | None = None

    def put(self, function: Callable[[], Any]) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="fastldm callbacks", daemon=True)
                self._thread.start()
        self._queue.put(function)

    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """When all functions have been called, or take too long."""
        if self._thread is not None and not self.is_current_thread():
            self._queue.put(None)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            try:
                function()
            except BaseException:
                log_exception("a done-callback of a request failed")
            del function  # nothing of it is kept until the next


class Host(Protocol):
    """The worker that runs a request (worker.py), as far as requests know it."""

    device: torch.device
    changed: threading.Condition
    """Guards all queues."""
    thread: threading.Thread | None

    @property
    def callbacks(self) -> Callbacks: ...

    def position(self, generation: Generation) -> int: ...

    def remaining(self, generation: Generation) -> float | None: ...

    def submit(self, buckets: Any, generation: Generation, priority: float) -> None: ...


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
    """Small images of the latents so far; for requests submitted with preview."""
    latents: Tensor | None = None
    """(B, C, h, w) float32; for calls with a callback."""
    embeds: Embeds | None = None
    """What the U-Net's rows are conditioned on; for calls with a callback."""


Event = tuple[Progress, Tensor | None, Mark]
"""A step that is done, its preview on the way to the host, and what both wait for."""


class Generation(Future[Result]):
    """A submitted request: a `concurrent.futures.Future` of its Result, and awaitable."""

    def __init__(
        self,
        host: Host,
        request: Request,
        cascades: Sequence[Sequence[CascadeStage]],
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool | int = False,
        waits_for_answer: bool = False,
        id: str | None = None,
    ) -> None:
        """request: with every default filled in. cascades: the stages of each of its parts, which are sampled one after
        the other. deadline: seconds from now. preview: after each step, or how many in all. waits_for_answer: whether
        it waits after each step until `answer` is called. id: by which logs name it; None is a random one."""
        super().__init__()
        self.id = secrets.token_hex(8) if id is None else id
        """What logs name it by."""
        self.request = request
        """What is generated, with every default filled in."""
        self._host = host
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._listener: Callable[[Event | None], None] | None = None  # takes events in place of the queue
        self._listening = threading.Lock()
        self._result_mark: Mark | None = None  # behind the result's tensors
        super().add_done_callback(lambda _: self._put(None))
        # What follows is the worker's.
        self.deadline, self.preview, self.waits_for_answer = deadline, preview, waits_for_answer
        self._preview_asked = False
        self.route = dispatch.preference()  # `kernels.use` holds for the caller's thread: the request carries it along
        self.threads = openmp.threads()
        self.input_mark = Mark(host.device)  # behind what computed the request's tensors
        self.run: Run | None = None
        self.cascades, self.priority = [tuple(stages) for stages in cascades], priority
        self.sampled: list[Part] = []  # of the parts that are done
        self.stage = 0  # of this part: the number of the one that it is in
        self.part = self.cascades[0][0].request  # what is sampled now: all of the request, or a stage of a part
        self.generators: Sequence[torch.Generator] | None = None  # of its seeds, as the stages before have left them
        self.record: Result | None = None  # of the first stage, without images
        self.submitted = self.prepare_start = self.prepare_end = self.admitted = perf_counter()
        self.text_time = self.decode_time = 0.0  # seconds
        self.step_times: list[float] = []  # when each step was done
        self.step_durations: list[float] = []
        self.steps_before = 0  # of the stages that are done
        self.ran_on: set[str] = set()  # what ran its steps
        self.paused = self.cancelling = self.interrupted = False
        self.change: tuple[Change, Mark] | None = None  # what a callback has changed

    # --- for the caller

    def cancel(self) -> bool:
        """Stop the request, between two steps if it has started; `result` raises then. False where it is done."""
        stopped = super().cancel()
        with self._host.changed:
            if not stopped and self.done():
                return False
            self.cancelling = True
            self._host.changed.notify()
        return True

    def interrupt(self) -> None:
        """Finish early: leave out the remaining steps, except the first, and decode the latents as they are."""
        with self._host.changed:
            self.interrupted = True
            self._host.changed.notify()

    def progress(self) -> Iterator[Progress]:
        """Each step as it is done, until the request is; for one reader. Never raises what `result` does."""
        while (event := self._events.get()) is not None:
            yield _received(event)
        self._events.put(None)  # for the next reader

    async def async_progress(self) -> AsyncIterator[Progress]:
        """`progress` for asyncio: as many readers as there are requests, and no thread for any."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def listen(event: Event | None) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(arrived.put_nowait, event)

        with self._listening:
            while not self._events.empty():
                arrived.put_nowait(self._events.get())
            self._listener = listen
        try:
            while (event := await arrived.get()) is not None:
                waits = event[1] is not None and not event[2].reached()  # only a GPU's previews are ever late
                yield await asyncio.to_thread(_received, event) if waits else _received(event)
        finally:
            with self._listening:
                self._listener = None
                while not arrived.empty():
                    self._events.put(arrived.get_nowait())
                if self.done():
                    self._events.put(None)

    def __await__(self) -> Generator[Any, None, Result]:
        """The Result. Who cancels the task that awaits it cancels the request."""
        yield from asyncio.wrap_future(self).__await__()
        return self.result(0)

    def ask_preview(self) -> None:
        """Have a preview with the next step that is done, whatever was submitted."""
        self._preview_asked = True

    def position(self) -> int:
        """How many requests of its device have to start before it and with it: 1 is the next, 0 has started. Those of
        one size start in this order; of several sizes the one that has had least of the device goes first."""
        return self._host.position(self)

    @property
    def steps_done(self) -> int:
        """Passes of the sampler's loop that are done."""
        return len(self.step_times)

    @property
    def steps_left(self) -> int:
        """Those that are not."""
        if self.done():
            return 0
        run = self.run
        rows = self.cascade[self.stage].rows if run is None else len(run.table)
        return max(0, rows - (self.steps_done - self.steps_before)) + self.rows_later

    @property
    def cascade(self) -> tuple[CascadeStage, ...]:
        """The stages of the part that is sampled."""
        return self.cascades[min(len(self.sampled), len(self.cascades) - 1)]

    @property
    def later(self) -> tuple[CascadeStage, ...]:
        """Of those the ones behind the one that it is in."""
        return self.cascade[self.stage + 1 :]

    @property
    def rows_later(self) -> int:
        """Steps of these, and of the parts behind."""
        parts = self.cascades[len(self.sampled) + 1 :]
        return sum(stage.rows for stages in (self.later, *parts) for stage in stages)

    def next_stage(self, made: Any, run: Run) -> CascadeStage:
        """Go over to the next stage. made: by the one before, which was `run`."""
        self.stage, self.generators = self.stage + 1, run.generators
        stage = self.cascade[self.stage]
        fields = {name: getattr(self.part, name) for name in stage.keeps} | dict(stage.take(made))
        if stage.reads_text and run.embeds is not None:
            states, batch = run.embeds.prompt_embeds, stage.request.batch  # negatives first, if there are any
            fields["prompt_embeds"] = states[-batch:]
            if stage.request.negative_prompt_embeds is not None:
                fields["negative_prompt_embeds"] = states[:batch]
        self.part = stage.request.replace(**fields)
        return stage

    def next_part(self) -> CascadeStage:
        """Go over to the first stage of the next part."""
        self.stage, self.generators = 0, None
        stage = self.cascade[0]
        self.part = stage.request
        return stage

    def remaining(self) -> float | None:
        """Seconds until it is done, about, from the times of the last steps; None while there are none."""
        return 0.0 if self.done() else self._host.remaining(self)

    def result(self, timeout: float | None = None) -> Result:
        """The Result, waited for. Raises what went wrong, `concurrent.futures.CancelledError` or Cancelled where the
        request was cancelled before or after its first step, TimeoutError where it took longer than `timeout` seconds.
        """
        result = super().result(timeout)
        return result if self._result_mark is None else self._result_mark.follow(result)

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """As of any Future: fn(self) when the request is done, at once if it is. Called by the thread that cancels, or
        by a thread for such callbacks: while one waits for something, so do those of other requests."""

        def call(future: Future[Result]) -> None:
            if threading.current_thread() is self._host.thread:
                self._host.callbacks.put(lambda: fn(future))
            else:
                fn(future)

        super().add_done_callback(call)

    def answer(self, change: Change | None) -> None:
        """Let a request go on that waits for its callback, with what that has changed."""
        marked = None if change is None else (change, Mark(self._host.device))
        with self._host.changed:
            self.change, self.paused = marked, False
            self._host.changed.notify()

    # --- for the worker

    def start(self) -> bool:
        """Mark it as running. False where nobody waits for it any more."""
        with suppress(InvalidStateError, RuntimeError):
            if not self.done() and not self.running():
                return self.set_running_or_notify_cancel()
        return self.running()

    def expired(self, now: float) -> Exception | None:
        """The reason why the request has to stop, if there is one."""
        if self.cancelling:
            return Cancelled(f"cancelled after {len(self.step_times)} steps")
        if self.deadline is not None and now - self.submitted > self.deadline:
            when = f"after {len(self.step_times)} steps" if self.run is not None else "while it waited"
            return DeadlineExceeded(f"the request's deadline of {self.deadline:g} s passed {when}")
        if self.done():  # set by another holder of the Future: nobody waits for it any more
            return Cancelled("the request was answered by somebody else")
        return None

    def takes_preview(self, step: int, steps: int) -> bool:
        """Whether step number `step` of so many has one. Some previews lie evenly between the start and the result."""
        asked, self._preview_asked = self._preview_asked, False
        if asked or isinstance(self.preview, bool):
            return asked or self.preview is True
        parts = self.preview + 1
        return step + 1 < steps and (step + 1) * parts // steps > step * parts // steps

    def publish(self, preview: Tensor | None, progress: Progress) -> None:
        """preview: small images on their way to the host."""
        self._put((progress, preview, Mark(self._host.device)))

    def _put(self, event: Event | None) -> None:
        with self._listening:
            (self._listener or self._events.put)(event)

    def finish(self, result: Result) -> None:
        self._result_mark = Mark(self._host.device)
        with suppress(InvalidStateError):  # set by another holder of the Future
            self.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.cancelled():
            with suppress(RuntimeError):
                self.set_running_or_notify_cancel()  # wakes threads that wait for several futures
        elif not self.done():
            with suppress(InvalidStateError):
                self.set_exception(error)

    def lose_in_child(self) -> None:
        """In a process that was forked meanwhile, whose worker does not run it. Its done-callbacks are the parent's."""
        self._condition, self._listening = threading.Condition(), threading.Lock()  # another thread may have held them
        self._listener = None
        self._done_callbacks: list[Any] = []
        self.fail(WorkerLost("the request runs in the process that this one was forked from: ask again here"))
        self._events.put(None)


def _received(event: Event) -> Progress:
    """A step as its reader gets it."""
    step, preview, mark = event
    mark.follow((step.latents, step.embeds))
    if preview is not None:
        mark.wait()  # it is on its way from the device
        step = replace(step, preview=images.to_images(preview, "pil"))  # type: ignore[arg-type]
    return step


def lost_by(error: BaseException) -> WorkerLost:
    """The error of a request that was in hand when something else failed."""
    lost = WorkerLost(f"the thread that ran the request failed ({type(error).__name__}: {error}): ask again")
    lost.__cause__ = error
    return lost


def log_exception(text: str, *args: object) -> None:
    """To the log, whose handlers are foreign code too."""
    with suppress(BaseException):
        logger.exception(text, *args)
