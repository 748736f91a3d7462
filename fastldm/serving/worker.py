"""The one thread that issues all work of a device, for every session on it, and what keeps it going.

Nobody else's code runs on it. What callers want to have done when a request is over (`add_done_callback`) is done by a
thread for that; what is raised in the course of a request, be it SystemExit, is that request's failure. Should anything
be raised elsewhere, what the thread had in hand is lost and fails, and it goes on with what waits.

A process that is forked from this one has the sessions and not the thread. The fork waits until no turn is under way,
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
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from fastldm import openmp
from fastldm.device import Mark
from fastldm.serving.bucket import Bucket
from fastldm.serving.generation import Callbacks, lost_by, report

T = TypeVar("T")
Call = tuple[Future[Any], Callable[[], Any]]

logger = logging.getLogger("fastldm")

IDLE_SIZES = 4
"""Sizes whose buffers are kept though nobody asks for them, the last used."""
LONGEST_SLEEP = 3600.0  # seconds; more than a lock can be waited for is an error
PATIENCE = 3  # failures in a row, with nothing in hand, after which all that waits is given up
FORK_PATIENCE = 30.0  # seconds that a fork waits for a turn to end


class Client(Protocol):
    """A session, as its worker sees it."""

    buckets: dict[Any, Bucket]

    def release_memory(self, keep: int = 0) -> None: ...

    def lose_in_child(self) -> None: ...


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
        self.sessions: weakref.WeakSet[Client] = weakref.WeakSet()
        self._reset()

    def _reset(self) -> None:
        self.changed = threading.Condition()  # guards all queues
        self.turning = threading.RLock()  # held while something is done: a fork waits for it ...
        self.no_fork = threading.Event()  # ... and the next turn for the fork
        self.no_fork.set()
        self.thread: threading.Thread | None = None
        self._busy: set[Client] = set()  # sessions with a request that is not done
        self._calls: list[Call] = []
        self._in_hand: Bucket | Call | None = None  # whose turn it is
        self._contention = openmp.Contention()
        self._failures = 0  # how often in a row something was raised that is no request's own
        self._stopping = False

    # --- what other threads ask

    def add(self, session: Client) -> None:
        """A session has something to do. Called with `changed` held."""
        self._busy.add(session)
        self._start()

    def _start(self) -> None:
        """See to it that the thread runs, and looks. Called with `changed` held."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._run, name=f"fastldm {self.device}", daemon=True)
            self.thread.start()
        self.changed.notify()

    def call(self, work: Callable[[], T]) -> T:
        """work(), on this thread between two turns, while the caller waits. Each sees what the other's stream did."""
        if threading.current_thread() is self.thread:
            return work()
        given, future = Mark(self.device), Future[T]()
        done: list[Mark] = []

        def ordered() -> T:
            given.follow(None)
            try:
                return work()
            finally:
                done.append(Mark(self.device))

        with self.changed:
            self._calls.append((future, ordered))
            self._start()
        result = None
        try:
            result = future.result()
            return result
        finally:
            for mark in done:
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
            self._lose(error, all_there_is=True)
        with self.changed:
            if not self._stopping:
                self.thread = None
                if self._calls or any(bucket.jobs() for bucket in self._buckets()):
                    self._start()

    def _round(self) -> None:
        """What there is to do, or a wait for something."""
        self.no_fork.wait(FORK_PATIENCE)
        with self.turning:
            self._expire()
            self._let_idle_go()
            if self._turn():
                return
        with self.changed:
            if self._choose() is None and not self._calls and not self._stopping:
                self.changed.wait(self._patience())

    def _expire(self) -> None:
        for bucket in self._buckets():
            bucket.expire()

    def _turn(self) -> bool:
        """What somebody waits for, else one turn of one size; False where nobody has anything to do. (Functions of
        their own, so that an idle worker keeps no model alive.)"""
        with self.changed:
            self._in_hand = self._calls.pop(0) if self._calls else self._choose()
        if self._in_hand is None:
            return False
        if isinstance(self._in_hand, tuple):
            future, work = self._in_hand
            try:
                result = work()
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

    def _lose(self, error: BaseException, all_there_is: bool = False) -> None:
        """Something was raised that is no request's own. What was in hand fails; all there is where nothing was, again
        and again."""
        report("the worker of %s lost what it had in hand", self.device)
        lost, self._in_hand = self._in_hand, None
        self._failures += 1
        waiting_too = all_there_is or (lost is None and self._failures >= PATIENCE)
        everything: list[Bucket | Call] = [] if lost is None else [lost]
        if waiting_too:
            with self.changed:
                everything += [*self._calls, *(b for one in self._busy for b in one.buckets.values())]
                self._calls = []
        for one in everything:
            try:
                if isinstance(one, tuple):
                    one[0].set_exception(lost_by(error))
                else:
                    one.lose(error, waiting_too)
            except BaseException:
                report("a request that was lost could not be told so")
        if lost is None:
            time.sleep(0.01 * min(self._failures, 100))

    def _let_idle_go(self) -> None:
        """Memory of sessions that have nothing to do any more."""
        with self.changed:
            idle = [one for one in self._busy if not any(bucket.jobs() for bucket in one.buckets.values())]
            self._busy.difference_update(idle)
        for session in idle:
            session.release_memory(keep=IDLE_SIZES)

    def _buckets(self) -> list[Bucket]:
        with self.changed:
            return [bucket for session in self._busy for bucket in session.buckets.values()]

    def least_spent(self) -> float:
        """Of the sizes that something is asked of."""
        return min((bucket.spent for bucket in self._buckets() if bucket.jobs()), default=0.0)

    def _choose(self) -> Bucket | None:
        """The size that has had least of the device, of those that have something to do."""
        return min((one for one in self._buckets() if one.ready()), key=lambda one: one.spent, default=None)

    def _patience(self) -> float | None:
        """Seconds until the next deadline of a request that waits for its caller."""
        jobs = [job for bucket in self._buckets() for job in bucket.jobs()]
        left = [job.submitted + job.seconds - perf_counter() for job in jobs if job.seconds is not None]
        return min(max(0.0, min(left)) + 0.001, LONGEST_SLEEP) if left else None

    # --- forks

    def _before_fork(self) -> None:
        if threading.current_thread() is not self.thread:
            self.no_fork.clear()
            self.turning.acquire(timeout=FORK_PATIENCE)

    def _after_fork_in_parent(self) -> None:
        if threading.current_thread() is not self.thread:
            self.no_fork.set()
            try:
                self.turning.release()
            except RuntimeError:  # the turn took longer than the fork was willing to wait
                logger.warning("a process was forked while %s was at work", self.device)

    def _after_fork_in_child(self) -> None:
        self._reset()
        for session in [*self.sessions]:
            session.lose_in_child()


def _forking(name: str) -> Callable[[], None]:
    def ask() -> None:
        if name == "_after_fork_in_child":
            Worker.renew()
        for worker in [*Worker._of.values()]:
            getattr(worker, name)()

    return ask


def _stop() -> None:
    for worker in [*Worker._of.values()]:
        worker.stop()
    Worker.callbacks.stop()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking("_before_fork"),
        after_in_parent=_forking("_after_fork_in_parent"),
        after_in_child=_forking("_after_fork_in_child"),
    )
