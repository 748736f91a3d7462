"""The one thread that issues all work of a device, for every session on it, and owns the buckets of their requests.

No foreign code runs on it, but a request's `guidance_fn`. Done-callbacks (`add_done_callback`) are called by another
thread; what is raised in the course of a request, be it SystemExit, is that request's failure. Should anything be
raised elsewhere, the request or call in hand is lost and fails, and the thread goes on with the rest.

A process that is forked from this one has the sessions but not the thread. The fork waits until no turn is under way,
so that no tensor is half written and no lock held; in the child all requests that were open fail, and new ones are
served by a thread of its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from time import perf_counter
from typing import Any, ClassVar, TypeVar

import torch

from fastldm import openmp
from fastldm.device import Mark
from fastldm.serving.bucket import Bucket
from fastldm.serving.buckets import Buckets
from fastldm.serving.cascade import AnyStages
from fastldm.serving.generation import Callbacks, Generation, log_exception, lost_by

T = TypeVar("T")
Call = tuple[Future[Any], Callable[[], Any]]

logger = logging.getLogger("fastldm")

IDLE_SIZES = 4
"""Of a session, the idle buckets that keep their buffers: the last used."""
MAX_SLEEP = 3600.0  # seconds; a lock cannot be waited for much longer
MAX_FAILURES = 3  # in a row with nothing in hand, after which all that waits is given up
FORK_TIMEOUT = 30.0  # seconds that a fork waits for a turn to end


class Worker:
    """The thread of a device. It lives as long as the process."""

    _of: ClassVar[dict[torch.device, Worker]] = {}
    _lock: ClassVar[Any] = threading.Lock()
    callbacks: ClassVar[Callbacks] = Callbacks()

    @classmethod
    def of(cls, device: torch.device) -> Worker:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with cls._lock:
            if device not in cls._of:
                cls._of[device] = cls(device)
            return cls._of[device]

    @classmethod
    def renew(cls) -> None:
        """In a process that was forked: another thread may have held what all workers share."""
        cls._lock, cls.callbacks = threading.Lock(), Callbacks()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._all: weakref.WeakSet[Buckets] = weakref.WeakSet()  # a session keeps its own
        self._reset()

    def _reset(self) -> None:
        self.changed = threading.Condition()  # guards all queues
        self.turning = threading.RLock()  # held while something is done: a fork waits for it ...
        self.no_fork = threading.Event()  # ... and the next turn for the fork
        self.no_fork.set()
        self.thread: threading.Thread | None = None
        self._busy: set[Buckets] = set()  # those with a request that is not done
        self._calls: list[Call] = []
        self._in_hand: Bucket | Call | None = None  # what it works on
        self._contention = openmp.Contention()
        self._failures = 0  # how often in a row something was raised that is no request's own
        self._stopping = False

    # --- for other threads

    def buckets(self, stages: AnyStages, max_batch: int, batch_invariant: bool, of: Buckets | None = None) -> Buckets:
        """Those of a new session, which has to keep them. of: as of `Buckets`."""
        buckets = Buckets(stages, self, max_batch, batch_invariant, of)
        self._all.add(buckets)
        return buckets

    def submit(self, buckets: Buckets, generation: Generation, priority: float) -> None:
        """Queue a request. Called with `changed` held."""
        served = [bucket.spent for busy in self._busy for bucket in busy if bucket.generations()]
        buckets.add(generation, priority, min(served, default=0.0))
        self._busy.add(buckets)
        self._start()

    def position(self, generation: Generation) -> int:
        """See `Generation.position`."""
        with self.changed:
            entries = [entry for bucket in self._all_buckets() for entry in bucket.waiting]
            own = next((entry for entry in entries if entry[-1] is generation), None)
            # Numbers count within a session: of two that were submitted at one moment either may be the first.
            return 0 if own is None else 1 + sum(entry[:2] < own[:2] for entry in entries)

    def remaining(self, generation: Generation) -> float | None:
        """Seconds until a request is done, about: the work of its own size before it, while each other size with
        something to do gets as much of the device, but no more than it needs."""
        with self.changed:
            buckets = [bucket for bucket in self._all_buckets() if bucket.generations()]
            own = [bucket for bucket in buckets if generation in bucket.generations()]
            work = own[0].work(generation) if own else 0.0
            others = [bucket.work() for bucket in buckets if bucket not in own]
        return None if work is None else work + sum(min(work, work if other is None else other) for other in others)

    def _start(self) -> None:
        """Start the thread if it does not run, and wake it. Called with `changed` held."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._run, name=f"fastldm {self.device}", daemon=True)
            self.thread.start()
        self.changed.notify()

    def call(self, function: Callable[[], T]) -> T:
        """function(), on this thread between two turns, while the caller waits. Each sees what the other's stream
        did."""
        if threading.current_thread() is self.thread:
            return function()
        before, future = Mark(self.device), Future[T]()
        after: list[Mark] = []
        openmp.rest()

        def ordered() -> T:
            before.follow(None)
            try:
                return function()
            finally:
                after.append(Mark(self.device))

        with self.changed:
            self._calls.append((future, ordered))
            self._start()
        result = None
        try:
            result = future.result()
            return result
        finally:
            for mark in after:
                mark.follow(result)

    def stop(self) -> None:
        """At the interpreter's end: a thread inside a device's library must not be cut off."""
        with self.changed:
            self._stopping = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join(timeout=10)

    # --- on the thread

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if self.device.type == "cuda":
                    stack.enter_context(torch.cuda.device(self.device))
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
                while not self._stopping:
                    try:
                        self._round()
                        self._failures = 0
                    except BaseException as error:
                        self._lose(error)
        except BaseException as error:  # the device cannot be worked on at all
            self._lose(error, everything=True)
        with self.changed:
            if not self._stopping:
                self.thread = None
                if self._calls or any(buckets.busy for buckets in self._busy):
                    self._start()

    def _round(self) -> None:
        """A call or a turn, or a wait for something to do. (Functions of their own, so that an idle worker keeps no
        model alive by a local variable.)"""
        self.no_fork.wait(FORK_TIMEOUT)
        with self.turning:
            self._expire()
            self._release_idle()
            if self._turn():
                return
        with self.changed:
            if self._choose() is None and not self._calls and not self._stopping:
                self.changed.wait(self._seconds_to_deadline())

    def _expire(self) -> None:
        for bucket in self._buckets():
            bucket.expire()

    def _turn(self) -> bool:
        """A call that somebody waits for, else a turn of one bucket; False where there is nothing to do."""
        with self.changed:
            self._in_hand = self._calls.pop(0) if self._calls else self._choose()
        if self._in_hand is None:
            return False
        if isinstance(self._in_hand, tuple):
            future, function = self._in_hand
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        else:
            self._in_hand.turn()
            if self.device.type == "cpu":
                self._contention.look()
        self._in_hand = None
        return True

    def _lose(self, error: BaseException, everything: bool = False) -> None:
        """Something was raised that is no request's own. What was in hand fails; all there is where nothing was, again
        and again."""
        log_exception("the worker of %s lost what it had in hand", self.device)
        in_hand, self._in_hand = self._in_hand, None
        self._failures += 1
        everything = everything or (in_hand is None and self._failures >= MAX_FAILURES)
        lost: list[Bucket | Call] = [] if in_hand is None else [in_hand]
        if everything:
            with self.changed:
                lost += [*self._calls, *(bucket for buckets in self._busy for bucket in buckets)]
                self._calls = []
        for item in lost:
            try:
                if isinstance(item, tuple):
                    item[0].set_exception(lost_by(error))
                else:
                    item.lose(error, everything)
            except BaseException:
                log_exception("the error of a lost request could not be set")
        if in_hand is None:
            time.sleep(0.01 * min(self._failures, 100))

    def _release_idle(self) -> None:
        """Free memory of sessions that have nothing to do any more."""
        with self.changed:
            idle = [buckets for buckets in self._busy if not buckets.busy]
            self._busy.difference_update(idle)
        for buckets in idle:
            buckets.release_memory(keep=IDLE_SIZES)

    def _all_buckets(self) -> list[Bucket]:
        """Called with `changed` held."""
        return [bucket for buckets in self._busy for bucket in buckets]

    def _buckets(self) -> list[Bucket]:
        with self.changed:
            return self._all_buckets()

    def _choose(self) -> Bucket | None:
        """The bucket that has had least of the device, of those that have something to do."""
        ready = (bucket for bucket in self._buckets() if bucket.ready())
        return min(ready, key=lambda bucket: bucket.spent, default=None)

    def _seconds_to_deadline(self) -> float | None:
        """Until the next deadline of a request that waits for its caller."""
        generations = [generation for bucket in self._buckets() for generation in bucket.generations()]
        deadlines = [one.submitted + one.deadline for one in generations if one.deadline is not None]
        return min(max(0.0, min(deadlines) - perf_counter()) + 0.001, MAX_SLEEP) if deadlines else None

    # --- forks

    def _before_fork(self) -> None:
        if threading.current_thread() is not self.thread:
            self.no_fork.clear()
            self.turning.acquire(timeout=FORK_TIMEOUT)

    def _after_fork_in_parent(self) -> None:
        if threading.current_thread() is not self.thread:
            self.no_fork.set()
            try:
                self.turning.release()
            except RuntimeError:  # the turn took longer than the fork was willing to wait
                logger.warning("a process was forked while %s was at work", self.device)

    def _after_fork_in_child(self) -> None:
        self._reset()
        for buckets in [*self._all]:
            buckets.lose_in_child()


def _on_all_workers(name: str) -> Callable[[], None]:
    def call() -> None:
        if name == "_after_fork_in_child":
            Worker.renew()
        for worker in [*Worker._of.values()]:
            getattr(worker, name)()

    return call


def _stop() -> None:
    for worker in [*Worker._of.values()]:
        worker.stop()
    Worker.callbacks.stop()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_on_all_workers("_before_fork"),
        after_in_parent=_on_all_workers("_after_fork_in_parent"),
        after_in_child=_on_all_workers("_after_fork_in_child"),
    )
