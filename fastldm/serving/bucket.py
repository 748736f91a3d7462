"""The requests of one size, from the queue through the batch to the decoder: all of it happens on the worker's thread.

What a request's own work raises is that request's failure and nobody else's, be it an Exception or what ends threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from fastldm.device import Mark
from fastldm.errors import OutOfMemory, WorkerLost, out_of_memory_named
from fastldm.kernels import dispatch
from fastldm.request import Result, Timings
from fastldm.runtime.denoise import Batch, Run
from fastldm.runtime.stages import Stages
from fastldm.serving.generation import Host, Job, lost_by, report


class Bucket:
    """The requests of one size."""

    def __init__(
        self,
        stages: Stages,
        worker: Host,
        max_batch: int,
        route: dispatch.Route | None,
        release_memory: Callable[[], None],
    ) -> None:
        """max_batch: pictures that share a step. release_memory: gives up what other sizes keep for later."""
        self.stages, self.worker, self.max_batch, self.route = stages, worker, max_batch, route
        self._release_others = release_memory
        self.waiting: list[tuple[float, int, Job]] = []  # a heap: the first in line is first
        self.next: Job | None = None  # begun, and waiting until the batch can take it
        self.running: list[Job] = []
        self.finishing: list[tuple[Job, Iterator[Any]]] = []  # decoded one after the other
        self.batch: Batch | None = None
        self.damaged = False  # whether the batch may still hold what has left it: it takes nobody in
        self.spent = 0.0  # seconds of the device that this size had
        self.step_time = 0.0
        self._mark: Mark | None = None  # what the first of `finishing` waits for

    def jobs(self) -> list[Job]:
        begun = [] if self.next is None else [self.next]
        return [*(job for *_, job in self.waiting), *begun, *self.running, *(job for job, _ in self.finishing)]

    @property
    def pictures(self) -> int:
        return sum(job.request.batch for job in self.running)

    def _holds(self, run: Run) -> bool:
        if self.batch is None or self.damaged:
            return False
        try:
            return self.batch.holds(run)
        except BaseException:  # it is asked while nobody's work is done: one that cannot say is made anew
            self.damaged = True
            return False

    def _first(self) -> Job | None:
        """Who may join now. Nobody overtakes: what does not fit yet waits until it does, and the others behind it."""
        job = self.next or (self.waiting[0][-1] if self.waiting else None)
        if job is None or not self.running:
            return job
        if self.damaged or (job.run is not None and not self._holds(job.run)):
            return None  # the buffers are made anew when the last has left them
        return job if self.pictures + job.request.batch <= self.max_batch else None

    def ready(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.finishing or any(not job.paused for job in self.running)) or self._first() is not None

    # --- a turn

    def turn(self) -> None:
        began = perf_counter()
        with dispatch.use(self.route) if self.route else nullcontext():
            self._apply_answers()
            self._admit()
            self._finish_some()
            self._step()
        self.spent += perf_counter() - began

    def expire(self) -> None:
        """Let go of what was cancelled, is too late, or was answered by somebody else."""
        now = perf_counter()
        with self.worker.changed:
            over = [(job, error) for job in self.jobs() if (error := job.over(now)) is not None]
        for job, error in over:
            self._fail(job, error)

    def lose(self, error: BaseException, waiting_too: bool) -> None:
        """Whoever has begun fails, for nobody knows how far they are; those who wait too where they are to."""
        with self.worker.changed:
            begun = [job for job in self.jobs() if waiting_too or all(job is not one[-1] for one in self.waiting)]
            self.waiting = [] if waiting_too else self.waiting
            self.next, self.running, self.finishing, self._mark = None, [], [], None
        for job in begun:
            job.future.fail(lost_by(error))
        self.drop_batch()

    def _apply_answers(self) -> None:
        for job in list(self.running):
            if job.paused:
                continue
            with self._failing(job):
                if job.answer is not None:
                    assert self.batch is not None
                    assert job.run is not None
                    (change, given), job.answer = job.answer, None
                    self.stages.change(self.batch, job.run, given.follow(change))
                self._retire(job)

    def _admit(self) -> None:
        with self.worker.changed:
            job = self._first()
            if job is None:
                return
            if job is not self.next:
                heapq.heappop(self.waiting)
                self.next = job
        with self._failing(job):
            if job.run is None:
                if not job.future.begin():
                    self.next = None
                    return
                job.began = perf_counter()
                job.given.follow(job.request)
                self._set_threads([job])
                job.run = self.stages.prepare(job.request)
                job.begun = perf_counter()
            if not self._holds(job.run):
                if self.running:
                    return
                self.drop_batch()
                self.batch = self.stages.new_batch(job.run, self.max_batch)
            assert self.batch is not None
            self.damaged = True  # until it has been taken in whole
            self.batch.admit(job.run)
            self.damaged = False
            job.admitted = perf_counter()
            self.running.append(job)
            self.next = None

    def _step(self) -> None:
        jobs = [job for job in self.running if not job.paused]
        if not jobs:
            return
        began = perf_counter()
        self._step_together(jobs)
        now = perf_counter()
        self.step_time = now - began
        for job in jobs:
            if job in self.running:
                with self._failing(job):
                    self._after_step(job, now)

    def _step_together(self, jobs: list[Job]) -> None:
        assert self.batch is not None
        runs = [job.run for job in jobs if job.run is not None]
        try:
            self._set_threads(jobs)
            ran = self.batch.step(runs)
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:  # nobody has moved: whoever it was fails alone, the others go on
                for job in jobs:
                    self._step_together([job])
            return
        for job in jobs:
            job.ran.add(ran)

    def _after_step(self, job: Job, now: float) -> None:
        assert self.batch is not None
        assert job.run is not None
        job.marks.append(now)
        step, table = len(job.marks) - 1, job.run.work.table
        c_in = 1.0 if job.run.done else float(table.rows[step + 1][0])
        preview = self.stages.preview(self.batch.latents(job.run), c_in) if job.preview else None
        latents, embeds = (self.batch.latents(job.run), job.run.conditions.embeds) if job.answered else (None, None)
        job.paused = job.answered
        told = {"step": step, "steps": len(table), "timestep": float(table.timesteps[step])}
        job.future.publish(preview, latents=latents, embeds=embeds, **told)
        if not job.answered:  # else when it has been, however soon that was: with what the answer changes
            self._retire(job)

    def _retire(self, job: Job) -> None:
        """From the loop to the decoder, if all steps are done that will be."""
        assert self.batch is not None
        if job.run is not None and (job.run.done or (job.interrupted and job.marks)):
            latents = self.batch.latents(job.run)
            first_bad = self._release(job.run)
            self.running.remove(job)
            self.finishing.append((job, self.stages.decode(job.request, job.run.work.table, latents, first_bad)))

    def _release(self, run: Run) -> Any:
        assert self.batch is not None
        try:
            return self.batch.release(run)
        except BaseException:
            self.damaged = True
            raise

    def _finish_some(self) -> None:
        """Decode for about as long as a step takes while others step, to the end of one request otherwise."""
        until = perf_counter() + self.step_time
        while self.finishing:
            job, pieces = self.finishing[0]
            others = any(not one.paused for one in self.running)
            with self._failing(job):
                if self._mark is not None and others and not self._mark.reached():
                    return
                self._set_threads([job])
                try:
                    self._mark = next(pieces)
                except StopIteration as done:
                    result = self._result(job, done.value)
                    del self.finishing[0]
                    self._mark = None
                    job.future.finish(result)
                    if not others:
                        return
            if others and perf_counter() > until:
                return

    def _result(self, job: Job, images: Any) -> Result:
        now, last = perf_counter(), job.marks[-1]
        assert job.run is not None
        timings = Timings(
            text=job.begun - job.began,
            steps=tuple(after - before for before, after in pairwise([job.admitted, *job.marks])),
            decode=now - last,
            total=now - job.submitted,
        )
        backend = job.ran.pop() if len(job.ran) == 1 else self.stages.backend
        return self.stages.result(job.request, job.run.work.table, images, timings, backend)

    # --- failures

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """What is raised inside is this request's failure, and nobody else's."""
        try:
            yield
        except BaseException as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        """Let a request go that cannot go on, whatever that raises in turn, and tell whoever waits for it."""
        told = out_of_memory_named(error) if isinstance(error, Exception) else _named(error)
        if job in self.running:
            self.running.remove(job)
            with suppress(BaseException):
                self._release(job.run)  # type: ignore[arg-type]
        if self.next is job:
            self.next = None
        if self.finishing and self.finishing[0][0] is job:
            self._mark = None
        self.finishing = [one for one in self.finishing if one[0] is not job]
        with self.worker.changed:
            self.waiting = [one for one in self.waiting if one[-1] is not job]
            heapq.heapify(self.waiting)
        if isinstance(told, OutOfMemory):
            with suppress(BaseException):
                if not self.running:
                    self.drop_batch()
                self._release_others()
                self.stages.release_memory()
        job.future.fail(told)

    def drop_batch(self) -> None:
        batch, self.batch, self.damaged = self.batch, None, False
        if batch is not None:
            try:
                batch.close()
            except BaseException:  # of what nobody needs any more
                report("buffers of %s pictures could not be given back", self.stages.name)

    def _set_threads(self, jobs: list[Job]) -> None:
        """As many CPU threads as the work of these requests has use for, and their callers have."""
        wanted = max(job.threads for job in jobs)
        if self.worker.device.type == "cpu":
            wanted = self.stages.threads(jobs[0].request, sum(job.request.batch for job in jobs), wanted)
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def _named(error: BaseException) -> WorkerLost:
    """For what ends a thread or a process, and would do so to whoever asks for the result."""
    lost = WorkerLost(f"the request's own work raised {type(error).__name__}: {error}")
    lost.__cause__ = error
    return lost
