"""serving/worker.py: whatever is raised wherever, others are served; streams are ordered; forks are survived."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from sessions import options, same, tiny_pipeline

import fastldm
from fastldm import InputError, Pipeline, Session, WorkerLost, device
from fastldm.device import Mark
from fastldm.runtime.denoise import EagerBatch
from fastldm.runtime.stages import Stages
from fastldm.serving.bucket import Bucket
from fastldm.serving.worker import Worker

SMALL = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> Any:
    return pipe(**options(7, **SMALL)).images


class Odd(BaseException):
    """Nobody's idea of an error."""


RAISED = [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, Odd, ValueError]
OWNERS: dict[str, tuple[Any, str]] = {
    **{name: (Stages, name) for name in ("prepare", "new_batch", "preview", "result", "threads", "change")},
    **{name: (EagerBatch, name) for name in ("admit", "step", "latents", "release", "holds", "go_on_from")},
    "finish": (Stages, "decode"),
    "release after a failure": (EagerBatch, "release"),
    "memory given back": (Stages, "release_memory"),
}


@pytest.mark.parametrize(
    "error", [SystemExit, MemoryError, *[pytest.param(one, marks=pytest.mark.full) for one in RAISED[1:3] + RAISED[4:]]]
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
        return any(getattr(one, "seed", None) == (666,) or any(one is v for v in victims) for one in args)

    def raises(*args: Any, **kwargs: Any) -> Any:
        listed = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if name in ("release_memory", "preview") or is_about(tuple(listed)):
            raise error("thrown on purpose")
        return original(*args, **kwargs)

    def pieces(*args: Any) -> Iterator[Any]:
        if is_about(args):
            yield None
            raise error("thrown on purpose")
        return (yield from original(*args))

    begin, step = Stages.prepare, EagerBatch.step

    def prepared(self: Pipeline, request: Any) -> Any:
        run = begin(self, request)
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


@pytest.mark.parametrize("where", ["_buckets", "_choose", "_seconds_to_deadline", "_expire"])
def test_worker_recovers_from_its_own_failures(
    where: str, pipe: Pipeline, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = getattr(Worker, where), threading.Event()

    def raises(self: Worker, *args: Any) -> Any:
        if broken.is_set() and threading.current_thread() is self.thread:
            raise OverflowError("thrown on purpose")
        return original(self, *args)

    monkeypatch.setattr(Worker, where, raises)
    with Session(pipe) as session:
        broken.set()
        future = session.submit(**options(7, **SMALL))
        if where == "_seconds_to_deadline":  # it is asked when there is nothing to do
            same(future.result(60).images, alone)
        else:
            with pytest.raises(WorkerLost, match="OverflowError: thrown on purpose"):
                future.result(60)
        broken.clear()
        same(session.submit(**options(7, **SMALL)).result(60).images, alone)


def test_done_callbacks_may_raise_or_exit(pipe: Pipeline, alone: Any) -> None:
    called: SimpleQueue[Any] = SimpleQueue()

    def raising(error: type[BaseException]) -> Callable[[Any], None]:
        def callback(future: Any) -> None:
            called.put(threading.current_thread())
            raise error("thrown on purpose")

        return callback

    with Session(pipe, max_batch=1) as session:
        futures = [session.submit(**options(7, **SMALL)) for _ in RAISED]
        for future, error in zip(futures, RAISED, strict=True):
            future.add_done_callback(raising(error))
        for future in futures:
            same(future.result(60).images, alone)
        threads = {called.get(timeout=60) for _ in RAISED}
        assert session._worker.thread not in threads


def test_misused_futures_leave_the_worker_alive(pipe: Pipeline, alone: Any, gate: threading.Event) -> None:
    """Whoever answers a request himself has his answer, and nobody else is bothered."""
    with Session(pipe, max_batch=1) as session:
        first = session.submit(**options(7, **SMALL))
        while not first.running():
            time.sleep(0.001)
        queued = {
            name: session.submit(**options(7, **SMALL)) for name in ("result", "error", "running", "cancel", "twice")
        }
        first.set_result("mine")  # type: ignore[arg-type]
        queued["result"].set_result("mine")  # type: ignore[arg-type]
        queued["error"].set_exception(SystemExit(1))
        assert queued["running"].set_running_or_notify_cancel()
        assert queued["cancel"].cancel()
        assert not queued["cancel"].set_running_or_notify_cancel()
        assert queued["twice"].set_running_or_notify_cancel()
        queued["twice"].set_result("mine")  # type: ignore[arg-type]
        last = session.submit(**options(7, **SMALL))
        gate.set()
        same(last.result(60).images, alone)
        same(queued["running"].result(60).images, alone)
        for finished in (first, queued["result"], queued["twice"]):
            assert finished.result(0) == "mine"
        assert not wait([*queued.values()], 60).not_done


def test_asyncio_awaits_generations(pipe: Pipeline, alone: Any) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*[asyncio.wrap_future(pipe.session.submit(**options(7, **SMALL))) for _ in "ab"])

    for result in asyncio.run(both()):
        same(result.images, alone)


@pytest.mark.parametrize("deadline", [math.inf, 1e10, 1e300, 3600, np.float32(1e4), np.int64(5000), torch.tensor(9e9)])
def test_huge_deadlines_never_pass(deadline: Any, pipe: Pipeline) -> None:
    """Also of a request that waits while its callback thinks, so that the worker sleeps until then."""
    with Session(pipe) as session:
        thinking = session.submit_request(fastldm.Request(**options(7, **SMALL)), waits_for_answer=True)
        future = session.submit(**options(7, **SMALL), deadline=deadline)
        next(thinking.progress())
        future.result(60)
        waiting = session.submit_request(fastldm.Request(**options(7, **SMALL)), deadline=1e10, waits_for_answer=True)
        next(waiting.progress())
        session.submit(**options(7, **SMALL)).result(60)
        for one in (thinking, waiting):
            one.cancel()


NONSENSE = [math.nan, "3", b"3", [], {}, True, 1j, np.array([1, 2]), torch.zeros(2), print, np.nan]


@pytest.mark.parametrize("value", [*NONSENSE, 0, -1, -math.inf, 10**400], ids=repr)
def test_bad_deadlines_are_refused(value: Any, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"^deadline is [^\n]*: expected seconds from now, more than 0$"):
        pipe.session.submit("a cat", deadline=value)


@pytest.mark.parametrize("value", [*NONSENSE, None, math.inf, -math.inf, 10**400], ids=repr)
def test_bad_priorities_are_refused(value: Any, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"^priority is [^\n]*: expected [^\n]+$"):
        pipe.session.submit("a cat", priority=value)


@pytest.mark.parametrize("name", ["max_batch", "max_queue"])
@pytest.mark.parametrize("value", [*NONSENSE, None, 0, -1, 1.5, math.inf, 2**70], ids=repr)
def test_bad_session_limits_are_refused(name: str, value: Any, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=rf"^{name} is [^\n]*: expected a whole number, 1 to \d+$"):
        Session(pipe, **{name: value})


@pytest.mark.parametrize("value", [None, "default", 3, torch.nn.Linear(1, 1), Pipeline], ids=repr)
def test_sessions_need_a_pipeline(value: Any) -> None:
    with pytest.raises(InputError, match=r"^pipe is [^\n]*: expected a fastldm.Pipeline$"):
        Session(value)


@pytest.mark.parametrize("value", [None, 1, "yes", []], ids=repr)
def test_preview_has_to_be_a_flag(value: Any, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"^preview is [^\n]*: expected True or False$"):
        pipe.session.submit("a cat", preview=value)


# ---- streams


class Streams:
    """A GPU's streams, one a thread, as a log of what was recorded in which and waited for by which."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []  # ("records" or "waits", thread, event)

    class Event:
        def record(self, stream: Any) -> None:
            stream("records", self)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None: ...

    def current_stream(self, device: Any = None) -> Any:
        thread = threading.current_thread().name

        def stream(label: str, event: Any) -> None:
            self.log.append((label, thread, event))

        stream.wait_event = lambda event: stream("waits", event)  # type: ignore[attr-defined]
        return stream

    def note(self, label: str) -> None:
        self.log.append((label, threading.current_thread().name, None))

    def ordered(self, first: str, then: str) -> bool:
        """Whether all that was noted as `then` waits, in its thread, for an event that was recorded behind the last
        `first` before it, in that one's."""
        matched = False
        for at, (label, thread, _) in enumerate(self.log):
            if label != then:
                continue
            behind = max(k for k, (other, *_) in enumerate(self.log[:at]) if other == first)
            maker = self.log[behind][1]
            events = [event for kind, by, event in self.log[behind:at] if kind == "records" and by == maker]
            matched = any(
                kind == "waits" and by == thread and event in events for kind, by, event in self.log[behind:at]
            )
            if not matched:
                return False
        return matched


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()

    def init(self: Mark, device: torch.device) -> None:
        self._device, self._event = device, Streams.Event()
        self._event.record(streams.current_stream())

    monkeypatch.setattr(Mark, "__init__", init)
    monkeypatch.setattr(device.torch.cuda, "current_stream", streams.current_stream)
    return streams


def test_requests_wait_for_the_stream_of_their_tensors(
    streams: Streams, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Stages.prepare
    monkeypatch.setattr(Stages, "prepare", lambda self, request: streams.note("read") or begin(self, request))
    streams.note("made")
    pipe.session.submit(**options(**SMALL)).result(60)
    assert streams.ordered("made", "read")


def test_results_wait_for_the_workers_stream(streams: Streams, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Stages.result
    monkeypatch.setattr(Stages, "result", lambda self, *args: streams.note("made") or result(self, *args))
    for kind in ("pt", "latent"):
        future = pipe.session.submit(**options(**SMALL, output_type=kind))
        future.result(60)
        streams.note("read")
        assert streams.ordered("made", "read")


def test_callbacks_and_steps_are_ordered_both_ways(
    streams: Streams, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, go_on = EagerBatch.step, EagerBatch.go_on_from
    monkeypatch.setattr(EagerBatch, "step", lambda self, runs: (step(self, runs), streams.note("stepped"))[0])
    monkeypatch.setattr(EagerBatch, "go_on_from", lambda self, *args: streams.note("goes on") or go_on(self, *args))

    def callback(pipe: Any, i: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        streams.note("called")
        changed = tensors["latents"] * 0.9
        streams.note("changed")
        return {"latents": changed}

    pipe(**options(steps=3, **SMALL), callback_on_step_end=callback)
    assert streams.ordered("stepped", "called")
    assert streams.ordered("changed", "goes on")


def test_readers_wait_for_their_previews(streams: Streams, pipe: Pipeline) -> None:
    waited: list[str] = []
    wait_ = Mark.wait
    Mark.wait = lambda self: waited.append(threading.current_thread().name) or wait_(self)  # type: ignore[method-assign]
    try:
        future = pipe.session.submit(**options(steps=2, **SMALL, output_type="latent"), preview=True)
        steps = list(future.progress())
    finally:
        Mark.wait = wait_  # type: ignore[method-assign]
    assert [step.preview[0].size for step in steps] == [(16, 16)] * 2  # type: ignore[index]
    assert waited.count(threading.current_thread().name) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_worker_calls_are_ordered_both_ways(fails: bool, streams: Streams, pipe: Pipeline) -> None:
    def function() -> None:
        streams.note("works")
        if fails:
            raise ValueError("on purpose")

    streams.note("before")
    try:
        pipe.session.call(function)
    except ValueError:
        assert fails
    streams.note("after")
    assert streams.ordered("before", "works")
    assert streams.ordered("works", "after")
    if not fails:
        streams.note("changed")
        changed = pipe.stages.prepared.weights_changed
        pipe.stages.prepared.weights_changed = lambda: streams.note("seen") or changed()  # type: ignore[method-assign,func-returns-value]
        try:
            pipe.weights_changed()
        finally:
            del pipe.stages.prepared.weights_changed
        assert streams.ordered("changed", "seen")


def test_marked_tensors_live_for_the_reading_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    x, alive = torch.zeros(2), []
    monkeypatch.setattr(device, "_tensors", lambda value: [x] if value is not None else [])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: alive.append((self, stream)))
    streams = Streams()
    monkeypatch.setattr(device.torch.cuda, "current_stream", streams.current_stream)
    mark = Mark(torch.device("cpu"))
    mark._event = Streams.Event()  # type: ignore[assignment]
    mark.follow({"deep": [x]})
    assert alive[0][0] is x
    mark.follow(None)
    assert len(alive) == 1


def test_marks_find_nested_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(1, 4, 2, 2)
    request = fastldm.Request(prompt="a", latents=c, image=[a, (b,)])
    matched = [*device._tensors({"x": request, "y": "text"})]
    assert {id(t) for t in matched} == {id(a), id(b), id(c)}


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
            picture = session.submit(**options(7, **SMALL)).result(30).images
            session.close()
            other = pipe(**options(7, **SMALL)).images
            pipe.session.close(cancel=True)
            return all(lost) and bool(np.abs(picture - alone).max() < 1e-4 and np.abs(other - alone).max() < 1e-4)

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
