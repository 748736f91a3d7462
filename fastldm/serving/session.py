"""Many requests, one model: from any thread to the one thread that drives the device.

    session = Session(pipe)
    future = session.submit("a red apple", seed=7)          from any thread
    for progress in future.progress(): ...
    image = future.result().images[0]

Requests of one size share a batch. Each joins it between two steps, goes at its own pace through its own table, and
leaves when it is done: it is decoded, piece by piece, between the steps of those that stay. Of several sizes, the one
that has had least of the device's time is next, so that a stream of large images never starves a small one.

All work on a device is issued by one thread (worker.py): another's allocation would break the capture of a CUDA graph,
and cuDNN keeps its plans by thread. No foreign code runs there, but a request's own `guidance_fn`, which is a part of
its step: requests with one take turns with those without. What a caller does between two steps happens in the caller's
thread, and that request alone waits for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from fastldm import checks, openmp
from fastldm.checks import MAX_STEPS
from fastldm.errors import InputError, QueueFull
from fastldm.planning import memory
from fastldm.request import Request
from fastldm.runtime.prior import PriorStages
from fastldm.runtime.stages import Stages
from fastldm.serving import admission, cascade
from fastldm.serving.generation import Generation
from fastldm.serving.stats import Stats
from fastldm.serving.worker import Worker

T = TypeVar("T")
M = TypeVar("M", bound=cascade.AnyStages)

MAX_BATCH = 4096  # images that share a step, at most
MAX_TOGETHER = 4  # by default
MAX_QUEUE = 10**9
MAX_PRIORITY = 1e9


class Staged(Protocol):
    """A pipeline."""

    stages: Stages


class Session:
    """Takes requests for a pipeline from any thread."""

    def __init__(
        self,
        pipe: Staged | Stages,
        *,
        max_batch: int = MAX_TOGETHER,
        max_queue: int = 256,
        batch_invariant: bool | None = None,
    ) -> None:
        """max_batch: images of one size that share a step; a larger request runs alone. max_queue: requests that may
        wait, beyond which `submit` raises QueueFull. batch_invariant: whether an image is bitwise the one that its seed
        and prompt make alone, whatever else is in its request or its batch; None is what the pipeline says.
        """
        stages = getattr(pipe, "stages", pipe)
        if not isinstance(stages, Stages):
            raise InputError(f"pipe is {checks.show(pipe)}: expected a fastldm.Pipeline")
        self.stages = stages
        self.max_batch = checks.whole("max_batch", max_batch, 1, MAX_BATCH)
        self.max_queue = checks.whole("max_queue", max_queue, 1, MAX_QUEUE)
        if batch_invariant is None:
            batch_invariant = stages.batch_invariant
        self.batch_invariant = checks.flag("batch_invariant", batch_invariant)
        self._worker = Worker.of(stages.device)
        self._buckets = self._worker.buckets(stages, self.max_batch, self.batch_invariant)
        self._model = cascade.CascadeModel(stages, self._buckets, tuple(map(self._queued, stages.follows)))
        self._refiner: Session | None = getattr(pipe, "refiner_session", None)
        self._enlarger: cascade.CascadeModel[Stages] | None = None
        self._prior: cascade.CascadeModel[PriorStages] | None = None
        self._upscalers: tuple[Session, ...] = tuple(getattr(pipe, "upscaler_sessions", ()))
        self._weight_bytes = stages.weight_bytes
        self._closed = False

    @property
    def refiner(self) -> Session | None:
        """That of the model which goes on where this one's requests stop, see `Request.refiner_switch_at`."""
        return self._refiner

    @refiner.setter
    def refiner(self, session: Session | None) -> None:
        if session is not None:
            cascade.check_refiner(self.stages, session.stages)
        self._refiner = session

    @property
    def upscalers(self) -> tuple[Session, ...]:
        """Those of the models that enlarge this one's images, one after the other."""
        return self._upscalers

    @upscalers.setter
    def upscalers(self, sessions: Sequence[Session]) -> None:
        self._upscalers = self._checked(sessions)

    def _checked(self, sessions: Sequence[Session]) -> tuple[Session, ...]:
        """Upscalers' sessions, of which those that have no text encoder read the text of the one before."""
        for before, session in zip((self, *sessions), sessions, strict=False):
            cascade.check_upscaler(before.stages, session.stages)
            session.stages.share_text(self.stages)
        return tuple(sessions)

    def submit(
        self,
        prompt: str | list[str] | Request | None = None,
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool | int = False,
        id: str | None = None,
        refiner: Session | None = None,
        upscalers: Sequence[Session] | None = None,
        **options: Any,
    ) -> Generation:
        """Queue a request: a text, a list of texts, or a whole Request; options are the other fields of Request.

        priority: higher goes first; each level is worth ten seconds of waiting. deadline: seconds from now, after which
        the request fails with DeadlineExceeded; infinity is none. preview: whether `Progress` has small images of each
        step; a number is of how many steps, evenly spread. id: what logs name it by, at most 200 characters; None is a
        random one. refiner: the session of a model that goes on with the latents, in place of the pipeline's own.
        upscalers: likewise those of models that enlarge the images.

        Raises InputError for what cannot be run, QueueFull, and OutOfMemory for what cannot fit.
        """
        request = Request.of(prompt, options)
        priority = checks.real("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        deadline = None if deadline is None else _seconds(deadline)
        return self.submit_request(
            request,
            priority=priority,
            deadline=deadline,
            preview=preview if isinstance(preview, bool) else checks.whole("preview", preview, 0, MAX_STEPS),
            id=None if id is None else checks.short_text("id", id, "a name of at most 200 characters"),
            refiner=refiner,
            upscalers=upscalers,
        )

    def submit_request(
        self,
        request: Request,
        *,
        priority: float = 0,
        deadline: float | None = None,
        preview: bool | int = False,
        waits_for_answer: bool = False,
        id: str | None = None,
        refiner: Session | None = None,
        upscalers: Sequence[Session] | None = None,
    ) -> Generation:
        """waits_for_answer: whether the request waits after each step until `Generation.answer` is called. refiner,
        upscalers: those of models, in place of the session's."""
        if refiner is None:
            refiner = self.refiner
        else:
            cascade.check_refiner(self.stages, refiner.stages)
        upscalers = self._upscalers if upscalers is None else self._checked(upscalers)
        models = self._model, None if refiner is None else refiner._model
        completed = cascade.complete(request, *models)
        parts = completed.parts(self.max_batch)
        options: dict[str, Any] = {"enlarger": self._enlarger_of(completed), "several": len(parts) > 1}
        options["prior"] = self._prior_of()
        options["upscalers"] = [session._model for session in upscalers]
        cascades = [cascade.stages_of(part, request.sampler, *models, **options) for part in parts]
        for stage in cascades[0]:
            held, ranked = stage.model.queue.held(stage.request), completed.candidates is not None
            ranked = ranked and stage is cascades[0][0]  # whose model has what ranks
            admission.check(stage.model.stages, stage.request, self.max_batch, held, ranked=ranked)
        generation = Generation(
            self._worker,
            completed,
            cascades,
            priority=priority,
            deadline=deadline,
            preview=preview,
            waits_for_answer=waits_for_answer,
            id=id,
        )
        worker = self._worker
        if worker.device.type == "cpu":
            openmp.rest()
        with worker.changed:
            if self._closed:
                raise InputError("this session is closed: make a new one")
            if threading.current_thread() is worker.thread:
                raise InputError("a request was made inside the worker's own thread, which would wait for itself")
            waiting = self._waiting
            if waiting >= self.max_queue:
                raise QueueFull(f"{waiting} requests wait already, and max_queue is {self.max_queue}: try again later")
            worker.submit(cascades[0][0].model.queue, generation, priority)
        return generation

    def _prior_of(self) -> cascade.CascadeModel[PriorStages] | None:
        """The model's prior, if it has one, and the queue of its vectors."""
        stages = self.stages.prior
        if stages is None or self._prior is None or self._prior.stages is not stages:
            self._prior = None if stages is None else self._queued(stages)
        return self._prior

    def _queued(self, stages: M) -> cascade.CascadeModel[M]:
        """Another model that runs stages of requests, with a queue of its own."""
        return cascade.CascadeModel(
            stages, self._worker.buckets(stages, self.max_batch, self.batch_invariant, of=self._buckets)
        )

    def _enlarger_of(self, completed: Request) -> cascade.CascadeModel[Stages] | None:
        """What enlarges a request's images, opened when one is first wanted; None where nothing has to."""
        if self.stages.enlarger is None or not cascade.is_enlarged(completed, self.stages):
            return None
        if self._enlarger is None:
            self._enlarger = self._queued(self.stages.enlarger())
        return self._enlarger

    @property
    def waiting(self) -> int:
        """How many requests wait: what of `stats` every submission of a server asks."""
        with self._worker.changed:
            return self._waiting

    @property
    def _waiting(self) -> int:
        """Called with `changed` held."""
        return self._buckets.waiting + (0 if self._prior is None else self._prior.queue.waiting)

    def stats(self) -> Stats:
        """What it does at the moment, and has done so far."""
        stages, worker, totals = self.stages, self._worker, self._buckets.totals
        with worker.changed:
            buckets, waiting, open_ = [*self._buckets], self._waiting, len(self._buckets.open)
            images = [one.part.batch for bucket in buckets for one in [*bucket.running]]
            held = sum(bucket.batch.nbytes for bucket in buckets if bucket.batch is not None)
            works = [bucket.work() for bucket in (*buckets, *(self._prior.queue if self._prior is not None else ()))]
            step_times = {bucket.size: bucket.step_time for bucket in buckets if bucket.step_time}
        graphs = stages.graphs
        return Stats(
            waiting=waiting,
            running=max(0, open_ - waiting),
            images=sum(images),
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            completed=totals.completed,
            failed=totals.failed,
            cancelled=totals.cancelled,
            wait=totals.wait,
            step_times=step_times,
            remaining=None if None in works else sum(filter(None, works)),
            adapters=tuple(stages.adapters.loaded),
            adapter_swaps=stages.adapters.swaps,
            captures=0 if graphs is None else len(graphs),
            memory_planned=self._weight_bytes + held + stages.adapters.nbytes,
            memory_used=memory.used_bytes(stages.device),
        )

    def call(self, function: Callable[[], T]) -> T:
        """function(), between two steps on the thread that has the device, while the caller waits."""
        return self._worker.call(function)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait for those under way, or cancel them."""
        with self._worker.changed:
            self._closed = True
            remaining = list(self._buckets.open)
        if cancel:
            for generation in remaining:
                generation.cancel()
        wait(remaining)
        self.call(self._buckets.release_memory)
        if self._prior is not None:
            self.call(self._prior.queue.release_memory)

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
