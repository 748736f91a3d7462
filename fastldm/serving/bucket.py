"""Requests of one size, from the queue through the batch to the decoder, all on the worker's thread.

What a request's own work raises is that request's failure and no other's, be it an Exception or what ends threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter
from typing import Any

from fastldm import openmp, spans
from fastldm.device import Mark
from fastldm.errors import OutOfMemory, WorkerLost, out_of_memory_named
from fastldm.kernels import dispatch
from fastldm.request import Result, Timings
from fastldm.runtime import candidates
from fastldm.runtime.batch import Batch
from fastldm.runtime.denoise import Run
from fastldm.runtime.stages import Stages
from fastldm.serving.cascade import AnyStages
from fastldm.serving.generation import Generation, Host, Progress, log_exception, lost_by
from fastldm.serving.stats import Totals

CALL_SECONDS = 0.1
"""What a call of several steps may take, between which nobody can join, leave or be shown anything."""


class Bucket:
    """The requests of one size."""

    def __init__(
        self,
        stages: AnyStages,
        host: Host,
        max_batch: int,
        route: dispatch.Route | None,
        release_idle: Callable[[], None],
        batch_invariant: bool,
        totals: Totals,
        size: tuple[int, int],
    ) -> None:
        """max_batch: images that share a step. release_idle: frees what idle buckets of the session hold.
        batch_invariant: whether an image is computed as if it were alone. totals: what the session counts.
        size: (width, height) of the images in pixels."""
        self.size = size
        self.stages, self.host, self.max_batch, self.route = stages, host, max_batch, route
        self.batch_invariant = batch_invariant
        self._release_idle, self._totals = release_idle, totals
        self.waiting: list[tuple[float, int, Generation]] = []  # a heap: the first in line is first
        self.next: Generation | None = None  # prepared, and waiting until the batch has room
        self.running: list[Generation] = []
        self.finishing: list[tuple[Generation, Iterator[Any]]] = []  # decoded one after the other
        self.batch: Batch | None = None
        self.revision = stages.revision  # of the networks, for which the batch was made
        self.damaged = False  # whether the batch may still hold a run that has left it: it admits no other
        self.spent = 0.0  # seconds of the device that this size has had
        self.step_time = 0.0  # of the last step, for each row that it took
        self.image_time = 0.0  # of a step, for each image of a batch as large as batches have been lately
        self._mark: Mark | None = None  # what the first of `finishing` waits for

    def generations(self) -> list[Generation]:
        prepared = [] if self.next is None else [self.next]
        finishing = [generation for generation, _ in self.finishing]
        return [*(generation for *_, generation in self.waiting), *prepared, *self.running, *finishing]

    def _holds(self, run: Run) -> bool:
        if self.batch is None or self.damaged or self.revision != self.stages.revision:
            return False
        try:
            return self.batch.holds(run)
        except BaseException:  # no request's own failure: the batch is replaced
            self.damaged = True
            return False

    def _first(self) -> Generation | None:
        """The request that may join now. None overtakes: one that does not fit yet waits, and the rest behind it."""
        first = self.next or (self.waiting[0][-1] if self.waiting else None)
        if first is not None and first.run is not None and not self.stages.adapters.admits(first.run):
            return None  # its weights are not those of the runs under way
        if first is None or not self.running:
            return first
        if self.damaged or (first.run is not None and not self._holds(first.run)):
            return None  # the batch is replaced when the last run has left it
        images = sum(generation.part.batch for generation in self.running)
        return first if images + first.part.batch <= self.max_batch else None

    def ready(self) -> bool:
        """Whether a turn would do anything."""
        steps = any(not generation.paused for generation in self.running)
        return bool(self.finishing) or steps or self._first() is not None

    def work(self, until: Generation | None = None) -> float | None:
        """Seconds of the device that its requests need, about: all of them, or until one is done. None while no step
        was timed. Called with `changed` held."""
        waiting = [entry[-1] for entry in sorted(self.waiting)]
        started = [one for one in self.generations() if all(one is not other for other in waiting)]
        if any(one is until for one in started):
            return until.steps_left * self.step_time if self.step_time else None  # type: ignore[union-attr]
        if until is not None:
            waiting = waiting[: 1 + next(k for k, one in enumerate(waiting) if one is until)]
        steps = sum(one.steps_left * one.part.batch for one in (*started, *waiting))
        return steps * self.image_time if self.image_time or not steps else None

    # --- a turn

    def turn(self) -> None:
        start = perf_counter()
        with dispatch.use(self.route) if self.route else nullcontext():
            self._apply_changes()
            self._admit()
            self._finish_some()
            self._step()
        self.spent += perf_counter() - start

    def expire(self) -> None:
        """Let go of what was cancelled, has passed its deadline, or was answered by somebody else."""
        now = perf_counter()
        with self.host.changed:
            expired = [(one, error) for one in self.generations() if (error := one.expired(now)) is not None]
        for generation, error in expired:
            self._fail(generation, error)

    def lose(self, error: BaseException, waiting_too: bool) -> None:
        """Fail all that have started, for nobody knows how far they are; those that wait too if `waiting_too`."""
        with self.host.changed:
            waiting = [] if waiting_too else self.waiting
            lost = [one for one in self.generations() if all(one is not entry[-1] for entry in waiting)]
            finishing, self.finishing = self.finishing, []
            self.waiting, self.next, self.running, self._mark = waiting, None, [], None
        for generation in lost:
            self._leave(generation)
            generation.run = None
            generation.fail(lost_by(error))
        del finishing  # frees what was being decoded, now that the lock is not held
        self.drop_batch()

    def _apply_changes(self) -> None:
        for generation in list(self.running):
            if generation.paused:
                continue
            with self._failing(generation):
                if generation.change is not None:
                    assert self.batch is not None
                    assert generation.run is not None
                    assert isinstance(self.stages, Stages)
                    (change, mark), generation.change = generation.change, None
                    self.stages.change(self.batch, generation.run, mark.follow(change))
                self._retire(generation)

    def _admit(self) -> None:
        with self.host.changed:
            generation = self._first()
            if generation is None:
                return
            if generation is not self.next:
                heapq.heappop(self.waiting)
                self.next = generation
        with self._failing(generation):
            if generation.run is None:
                if not generation.start():
                    self.next = None
                    return
                start = perf_counter()
                if not generation.step_times:
                    generation.prepare_start = start
                    self._totals.started(generation)
                generation.input_mark.follow(generation.request)
                self._set_threads([generation])
                options: dict[str, Any] = {"batch_invariant": self.batch_invariant, "generators": generation.generators}
                generation.run = self.stages.prepare(generation.part, **options)
                generation.prepare_end = perf_counter()
                generation.text_time += generation.prepare_end - start
            if not self.stages.adapters.enter(generation.run):
                return
            if not self._holds(generation.run):
                if self.running:
                    return
                self.drop_batch()
                with spans.span("admit"):
                    self.revision = self.stages.revision
                    self.batch = self.stages.new_batch(generation.run, self.max_batch)
            assert self.batch is not None
            self.damaged = True  # until the run has been admitted as a whole
            with spans.span("admit"):
                self.batch.admit(generation.run)
            self.damaged = False
            generation.admitted = perf_counter()
            self.running.append(generation)
            self.next = None

    def _step(self) -> None:
        stepping = [generation for generation in self.running if self._may_step(generation)]
        if not stepping:
            return
        rows = self._rows_at_once(stepping)
        before = []
        for generation in stepping:
            assert generation.run is not None
            generation.run.at_once = rows
            before.append(generation.run.row)
        start = perf_counter()
        self._step_together(stepping)
        now = perf_counter()
        taken = [0 if one.run is None else one.run.row - row for one, row in zip(stepping, before, strict=True)]
        self.step_time = (now - start) / max(1, *taken)
        image_time = self.step_time / sum(generation.part.batch for generation in stepping)
        self.image_time = image_time if not self.image_time else 0.8 * self.image_time + 0.2 * image_time
        for generation, count in zip(stepping, taken, strict=True):
            if generation in self.running:
                with self._failing(generation):
                    for k in range(1, count):
                        self._after_step(generation, start + (now - start) * k / count)
                    self._after_step(generation, now)
                    if not self._waits(generation):  # else after the answer, with what that changes
                        self._retire(generation)

    @staticmethod
    def _may_step(generation: Generation) -> bool:
        """An answer that came after `_apply_changes` counts in the next turn: what it changes is not applied yet, and
        who is done has not left."""
        assert generation.run is not None
        return not (generation.paused or generation.change is not None or generation.run.done)

    def _rows_at_once(self, stepping: list[Generation]) -> int:
        """How many rows a call may take: what a tenth of a second has time for, and one where anybody waits for what
        lies between."""
        watched = any(one.waits_for_answer or one.preview is not False for one in stepping)
        if watched or self.waiting or self.next or self.finishing or not self.step_time:
            return 1
        return max(1, int(CALL_SECONDS / self.step_time))

    def _step_together(self, generations: list[Generation]) -> None:
        assert self.batch is not None
        runs = [generation.run for generation in generations if generation.run is not None]
        try:
            self._set_threads(generations)
            with spans.span("step"):
                ran_on = self.batch.step(runs)
        except BaseException as error:
            if len(generations) == 1:
                self._fail(generations[0], error)
            else:  # no run has moved: step each alone, so that only the one that raises fails
                for generation in generations:
                    self._step_together([generation])
            return
        for generation in generations:
            generation.ran_on.add(ran_on)

    def _after_step(self, generation: Generation, now: float) -> None:
        run = generation.run
        assert self.batch is not None
        assert run is not None
        step = len(generation.step_times) - generation.steps_before  # of this stage
        generation.step_durations.append(now - (generation.step_times[-1] if step else generation.admitted))
        generation.step_times.append(now)
        steps = generation.steps_before + len(run.table) + generation.rows_later
        progress = Progress(len(generation.step_times) - 1, steps, float(run.table.timesteps[step]))
        if self._waits(generation):
            latents = self.batch.latents(run)
            progress = replace(progress, latents=latents, embeds=run.embeds)
        preview = None
        if generation.takes_preview(progress.step, progress.steps) and isinstance(self.stages, Stages):
            c_in = 1.0 if run.done else float(run.table.rows[step + 1][0])
            preview = self.stages.preview(self.batch.latents(run), c_in, run)
        generation.paused = self._waits(generation)
        generation.publish(preview, progress)

    def _waits(self, generation: Generation) -> bool:
        """Whether it waits after each step: as in diffusers, of a prior's no callback is told."""
        return generation.waits_for_answer and isinstance(self.stages, Stages)

    def _retire(self, generation: Generation) -> None:
        """Move it from the loop to the decoder, if it takes no more steps."""
        run = generation.run
        assert self.batch is not None
        stepped = len(generation.step_times) > generation.steps_before
        if run is not None and (run.done or (generation.interrupted and stepped)):
            if generation.interrupted and generation.later and isinstance(self.stages, Stages):
                # What there is, is the result; of a prior's vector the next stage takes its first step.
                generation.cascades[len(generation.sampled)] = generation.cascade[: generation.stage + 1]
                generation.part = generation.part.replace(output_type=generation.request.output_type)
            latents = self.batch.latents(run)
            first_bad = self._release(run)
            self.running.remove(generation)
            self.finishing.append((generation, self.stages.decode(generation.part, run, latents, first_bad)))

    def _release(self, run: Run) -> Callable[[], int | None]:
        assert self.batch is not None
        try:
            return self.batch.release(run)
        except BaseException:
            self.damaged = True
            raise
        finally:
            self.stages.adapters.leave(run)

    def _leave(self, generation: Generation) -> None:
        """Let a request go that has started, wherever it is."""
        with suppress(BaseException):
            if generation.run is not None:
                self.stages.adapters.leave(generation.run)

    def _finish_some(self) -> None:
        """Decode for about as long as a step takes while others step, to the end of one request otherwise."""
        until = perf_counter() + self.step_time
        while self.finishing:
            generation, pieces = self.finishing[0]
            stepping = any(not other.paused for other in self.running)
            with self._failing(generation):
                if self._mark is not None and stepping and not self._mark.reached():
                    return
                self._set_threads([generation])
                try:
                    with spans.span("decode"):
                        self._mark = next(pieces)
                except StopIteration as decoded:
                    result, run = self._result(generation, decoded.value), generation.run
                    del self.finishing[0]
                    self._mark = generation.run = None  # before its caller is told, who may look at memory
                    if result is not None:
                        generation.finish(result)
                    else:
                        self._go_on(generation, decoded.value, run)
                    del run
                    if not stepping:
                        return
            if stepping and perf_counter() > until:
                return

    def _go_on(self, generation: Generation, made: Any, run: Run | None) -> None:
        """Queue it for its next stage, with the requests of that stage's model and size, or for its next candidates."""
        assert run is not None
        stage = generation.next_stage(made, run) if generation.later else generation.next_part()
        with self.host.changed:
            self.host.submit(stage.model.queue, generation, generation.priority)

    def _result(self, generation: Generation, images: Any) -> Result | None:
        """None if there are more stages, or candidates remain to be sampled."""
        request, parts = generation.request, generation.sampled
        if generation.record is None and isinstance(self.stages, Stages):
            assert generation.run is not None
            nothing = Timings(0.0, (), 0.0, 0.0)
            generation.record = self.stages.result(request, generation.run, None, nothing, self.stages.backend)
        if not generation.later and request.candidates is not None:
            stages = generation.cascade[0].model.stages
            assert isinstance(stages, Stages)
            with spans.span("rank"):
                parts.append((images, stages.scores(request, images)))
        now = perf_counter()
        generation.decode_time += now - generation.step_times[-1]
        generation.steps_before = len(generation.step_times)
        if generation.later:
            return None
        enough = sum(len(scores) for _, scores in parts) >= request.count * request.keep
        remain = request.candidates is not None and len(parts) < len(generation.cascades)
        if remain and not (generation.interrupted and enough):
            return None
        assert generation.record is not None
        timings = Timings(
            text=generation.text_time,
            steps=tuple(generation.step_durations),
            decode=generation.decode_time,
            total=now - generation.submitted,
        )
        backend = generation.ran_on.pop() if len(generation.ran_on) == 1 else generation.record.backend
        names = [(stage.role, stage.model.stages.name) for stage in generation.cascade]
        made: dict[str, Any] = {"images": images, "timings": timings, "backend": backend}
        made["refiner"] = next((name for role, name in names if role == "refiner"), "")
        made["upscalers"] = tuple(name for role, name in names if role == "upscaler")
        result = replace(generation.record, **made)
        if request.candidates is None:
            return result
        kept, seeds, scores = candidates.best(request, parts)
        return replace(result, images=kept, seeds=seeds, scores=scores)

    # --- failures

    @contextmanager
    def _failing(self, generation: Generation) -> Iterator[None]:
        """What is raised inside is this request's failure, and no other's."""
        try:
            yield
        except BaseException as error:
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: BaseException) -> None:
        """Remove a request that cannot go on, whatever that raises in turn, and set its error."""
        if isinstance(error, Exception):
            reported = out_of_memory_named(error)
        else:  # what ends a thread or a process would end whoever asks for the result
            reported = WorkerLost(f"the request's own work raised {type(error).__name__}: {error}")
            reported.__cause__ = error
        if generation in self.running:
            self.running.remove(generation)
            with suppress(BaseException):
                self._release(generation.run)  # type: ignore[arg-type]
        if self.next is generation:
            self.next = None
        if self.finishing and self.finishing[0][0] is generation:
            self._mark = None
        self.finishing = [entry for entry in self.finishing if entry[0] is not generation]
        with self.host.changed:
            self.waiting = [entry for entry in self.waiting if entry[-1] is not generation]
            heapq.heapify(self.waiting)
        if isinstance(reported, OutOfMemory):
            with suppress(BaseException):
                if not self.running:
                    self.drop_batch()
                self._release_idle()
                self.stages.release_memory()
        self._leave(generation)
        generation.run = None
        generation.fail(reported)

    def drop_batch(self) -> None:
        batch, self.batch, self.damaged = self.batch, None, False
        if batch is not None:
            try:
                batch.close()
            except BaseException:  # of buffers that nobody needs any more
                log_exception("buffers of %s could not be freed", self.stages.name)

    def _set_threads(self, generations: list[Generation]) -> None:
        """As many CPU threads as the work of these requests has use for, and their callers have."""
        threads = max(generation.threads for generation in generations)
        if self.host.device.type == "cpu":
            images = 1 if self.batch_invariant else sum(generation.part.batch for generation in generations)
            threads = self.stages.threads(generations[0].part, images, threads)
        openmp.set_threads(threads)
