"""serving/worker.py: whatever is raised wherever, others are served; streams are ordered; forks are survived."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from sessions import RAISED, SMALL, Odd, options, same, tiny_pipeline

from fastldm import Pipeline, Session, WorkerLost
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.stages import Stages
from fastldm.serving.bucket import Bucket
from fastldm.serving.worker import Worker


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> Any:
    return pipe(**options(7, **SMALL)).images


OWNERS: dict[str, tuple[Any, str]] = {
    **{name: (Stages, name) for name in ("prepare", "new_batch", "preview", "result", "threads", "change")},
    **{name: (EagerBatch, name) for name in ("admit", "step", "latents", "release", "holds", "go_on_from")},
    "finish": (Stages, "decode"),
    "release after a failure": (EagerBatch, "release"),
    "memory given back": (Stages, "release_memory"),
}


@pytest.mark.parametrize(
    "error", [SystemExit, MemoryError, *[pytest.param(cls, marks=pytest.mark.full) for cls in RAISED[1:3] + RAISED[4:]]]
)
@pytest.mark.parametrize("point", OWNERS)
def test_exceptions_anywhere_leave_other_requests_alone(
    point: str, error: type[BaseException], pipe: Pipeline, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every call that the worker makes for a request; it fails, or not where the call is not needed for it."""
    owner, name = OWNERS[point]
    original = getattr(owner, name)
    victims: list[Any] = []

    def is_about(args: tuple[Any, ...]) -> bool:
        return any(getattr(item, "seed", None) == (666,) or any(item is v for v in victims) for item in args)

    def raises(*args: Any, **kwargs: Any) -> Any:
        listed = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if name in ("release_memory", "preview") or is_about(tuple(listed)):
            raise error("thrown on purpose")
        return original(*args, **kwargs)

    def pieces(*args: Any) -> Iterator[Any]:
        if is_about(args):
            yield None
            raise error("thrown on purpose")
        return (yield from original(*args))

    begin, step = Stages.prepare, EagerBatch.step

    def prepared(self: Pipeline, request: Any, **options: Any) -> Any:
        run = begin(self, request, **options)
        if request.seed == (666,):
            victims.append(run)
        return run

    def failing(self: EagerBatch, runs: Any) -> str:
        if any(run is v for run in runs for v in victims):
            raise MemoryError("first this")
        return step(self, runs)

    if point != "prepare":
        monkeypatch.setattr(Stages, "prepare", prepared)
    if point in ("release after a failure", "memory given back"):
        monkeypatch.setattr(EagerBatch, "step", failing)
    monkeypatch.setattr(owner, name, pieces if point == "finish" else raises)
    changes = lambda *_: {"latents": torch.zeros(1, 4, *[16 // pipe.vae.config.factor] * 2)}  # noqa: E731
    with Session(pipe, max_batch=3) as session:
        before = session.submit(**options(7, **SMALL))
        if name in ("change", "go_on_from"):
            monkeypatch.setattr(pipe, "_session", session)
            caught: SimpleQueue[Any] = SimpleQueue()

            def call() -> None:
                try:
                    caught.put(pipe(**options(666, **SMALL), callback_on_step_end=changes))
                except BaseException as raised:
                    caught.put(raised)

            victim: Any = threading.Thread(target=call)
            victim.start()
        else:
            size = {"height": 32, "width": 32} if point == "new_batch" else SMALL  # of another size: in another batch
            victim = session.submit(**options(666, **size), preview=True)
        after = session.submit(**options(7, **SMALL))
        for future in (before, after):
            same(future.result(60).images, alone)
        if isinstance(victim, threading.Thread):
            assert isinstance(caught.get(timeout=60), Exception)
        elif point != "holds":  # that batch is made anew
            assert isinstance(victim.exception(60), Exception), "an error that the caller's thread survives"
        monkeypatch.setattr(owner, name, original)
        same(session.submit(**options(7, **SMALL)).result(60).images, alone)


@pytest.mark.parametrize("error", RAISED)
def test_exceptions_outside_requests_fail_those_in_hand(
    error: type[BaseException], pipe: Pipeline, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, thrown = Bucket.turn, []

    def turn(self: Bucket) -> None:
        if not thrown and self.running:
            thrown.append(1)
            raise error("thrown on purpose")
        original(self)

    with Session(pipe, max_batch=1) as session:
        monkeypatch.setattr(Bucket, "turn", turn)
        futures = [session.submit(**options(7, **SMALL)) for _ in range(3)]
        with pytest.raises(WorkerLost, match=f"{error.__name__}: thrown on purpose"):
            futures[0].result(60)
        for future in futures[1:]:
            same(future.result(60).images, alone)


def test_nothing_is_freed_while_queues_are_locked(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's tensors and the buffers of the batch, of a request that is lost."""
    changed, freed, turn = Worker.of(torch.device("cpu")).changed, [], Bucket.turn

    class Batch(EagerBatch):
        def close(self) -> None:
            freed.append(("batch", changed._is_owned()))  # type: ignore[attr-defined]

    class Pieces:
        def __del__(self) -> None:
            freed.append(("decoder", changed._is_owned()))  # type: ignore[attr-defined]

    def lost(self: Bucket) -> None:
        if self.finishing and not self.running:
            raise Odd
        turn(self)

    monkeypatch.setattr(Stages, "decode", lambda *_: Pieces())
    monkeypatch.setattr(Stages, "new_batch", lambda self, run, max_batch: Batch(self.unet))
    with Session(pipe) as session:
        monkeypatch.setattr(Bucket, "turn", lost)
        with pytest.raises(WorkerLost):
            session.submit(**options(7, **SMALL)).result(60)
    assert {name for name, _ in freed} == {"decoder", "batch"}
    assert not any(locked for _, locked in freed)


@pytest.mark.parametrize("method", ["_buckets", "_choose", "_seconds_to_deadline", "_expire"])
def test_worker_recovers_from_its_own_failures(
    method: str, pipe: Pipeline, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = getattr(Worker, method), threading.Event()

    def raises(self: Worker, *args: Any) -> Any:
        if broken.is_set() and threading.current_thread() is self.thread:
            raise OverflowError("thrown on purpose")
        return original(self, *args)

    monkeypatch.setattr(Worker, method, raises)
    with Session(pipe) as session:
        broken.set()
        future = session.submit(**options(7, **SMALL))
        if method == "_seconds_to_deadline":  # it is asked when there is nothing to do
            same(future.result(60).images, alone)
        else:
            with pytest.raises(WorkerLost, match="OverflowError: thrown on purpose"):
                future.result(60)
        broken.clear()
        same(session.submit(**options(7, **SMALL)).result(60).images, alone)


# ---- streams


# ---- forks


def in_a_fork(function: Callable[[], bool], seconds: float = 60) -> str:
    """What becomes of a child that does some work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: "right", 1: "raised", 2: "wrong"}.get(os.waitstatus_to_exitcode(status), str(status))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_busy_works_alone(pipe: Pipeline, alone: Any) -> None:
    with Session(pipe, max_batch=2) as session:
        futures = [session.submit(**options(7, steps=500, **SMALL)) for _ in range(3)]
        progress = futures[0].progress()
        next(progress)

        def child() -> bool:
            lost = [isinstance(future.exception(5), WorkerLost) for future in futures]
            list(progress)
            image = session.submit(**options(7, **SMALL)).result(30).images
            session.close()
            second = pipe(**options(7, **SMALL)).images
            pipe.session.close(cancel=True)
            return all(lost) and bool(np.abs(image - alone).max() < 1e-4 and np.abs(second - alone).max() < 1e-4)

        for function in (child, child, lambda: session.close() is None):
            assert in_a_fork(function) == "right"
        assert not any(future.done() for future in futures)
        for future in futures:
            future.cancel()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_the_current_turn(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step, stepping = EagerBatch.step, threading.Event()

    def slowly(self: EagerBatch, runs: Any) -> str:
        stepping.set()
        time.sleep(0.05)
        ran = step(self, runs)
        stepping.clear()
        return ran

    monkeypatch.setattr(EagerBatch, "step", slowly)
    with Session(pipe) as session:
        future = session.submit(**options(7, steps=6, **SMALL))
        assert stepping.wait(60)
        assert in_a_fork(lambda: not stepping.is_set()) == "right"
        future.result(60)
