"""fastldm/serving/generation.py: cancelling, deadlines, progress and done-callbacks of a submitted request."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from sessions import RAISED, SMALL, options, same, slow, tiny_pipeline

import fastldm
from fastldm import Cancelled, DeadlineExceeded, Pipeline, Session


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> Any:
    return pipe(**options(7, **SMALL)).images


def test_cancel_between_two_steps(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    with Session(pipe) as session:
        future, neighbour = session.submit(**options(steps=500)), session.submit(**options(1, steps=4))
        next(future.progress())
        assert future.running()
        assert future.cancel()
        with pytest.raises(Cancelled, match=r"cancelled after \d+ steps"):
            future.result(10)
        assert not future.cancel(), "it is over"
        assert neighbour.result(10).images.shape == (1, 64, 64, 3)
        assert [step.step for step in neighbour.progress()] == [0, 1, 2, 3]
        assert list(neighbour.progress()) == []


def test_cancel_before_the_first_step(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1) as session:
        first, second = session.submit(**options()), session.submit(**options())
        assert second.cancel()
        gate.set()
        with pytest.raises(CancelledError):
            second.result(10)
        assert list(second.progress()) == []
        first.result(10)


def test_deadline_passes_between_two_steps(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    with Session(pipe) as session:
        first, late = session.submit(**options(steps=20)), session.submit(**options(1, steps=500), deadline=60)
        next(late.progress())
        late.submitted -= 100  # time flies
        with pytest.raises(DeadlineExceeded, match=r"deadline of 60 s passed after \d+ steps"):
            late.result(10)
        assert isinstance(late.exception(), TimeoutError)
        first.result(60)


def test_deadline_passes_in_the_queue(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1) as session:
        first, late = session.submit(**options()), session.submit(**options(1), deadline=60)
        late.submitted -= 100
        gate.set()
        with pytest.raises(DeadlineExceeded, match="deadline of 60 s passed while it waited"):
            late.result(10)
        first.result(10)


def test_deadline_passes_during_a_callback(pipe: Pipeline) -> None:
    """A request that waits for its caller is let go in time, though nothing else happens on the device."""
    future = pipe.session.submit_request(fastldm.Request(**options(steps=4)), deadline=3, waits_for_answer=True)
    with pytest.raises(DeadlineExceeded, match="after 1 steps"):
        future.result(20)


def test_progress_has_steps_and_previews(pipe: Pipeline) -> None:
    future = pipe.session.submit(**options(steps=3, num_images_per_prompt=2), preview=True)
    steps = list(future.progress())
    assert [(step.step, step.steps) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [step.timestep for step in steps] == sorted((step.timestep for step in steps), reverse=True)
    for step in steps:
        assert step.preview is not None
        assert [image.size for image in step.preview] == [(64, 64)] * 2
    # The last is the picture: latents of 8x8 are decoded whole.
    last = np.asarray(steps[-1].preview[0]) / 255.0  # type: ignore[index]
    assert np.abs(last - future.result().images[0]).max() <= 0.5 / 255 + 1e-6


def test_previews_of_large_images_are_small(pipe: Pipeline) -> None:
    (step,) = pipe.session.submit(**options(steps=1, height=256, width=384), preview=True).progress()
    assert step.preview is not None
    assert step.preview[0].size == (128, 88)  # 16 x 11 latents


def test_a_callback_delays_no_other_request(pipe: Pipeline) -> None:
    """While one caller thinks, another's request runs from beginning to end, made from inside that callback even."""
    inner: list[Any] = []

    def think(pipe: Pipeline, i: int, t: float, kwargs: dict[str, Any]) -> None:
        if i == 0:
            assert threading.current_thread() is threading.main_thread()
            inner.append(pipe(**options(3)).images)

    outer = pipe(**options(steps=3), callback_on_step_end=think).images
    same(outer, pipe(**options(steps=3)).images)
    same(inner[0], pipe(**options(3)).images)


def test_done_callbacks_may_submit_requests(pipe: Pipeline) -> None:
    """It is called by no thread that anybody else's request needs."""
    results: SimpleQueue[Any] = SimpleQueue()
    future = pipe.session.submit(**options(steps=3))
    future.add_done_callback(lambda done: results.put((done, pipe(**options(3)).images)))
    future.result(10)
    done, images = results.get(timeout=30)
    assert done is future
    same(images, pipe(**options(3)).images)
    future.add_done_callback(lambda _: results.put(threading.current_thread()))
    assert results.get(timeout=0) is threading.main_thread(), "of what is done already, at once"


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
        for generation in (thinking, waiting):
            generation.cancel()


# ---- asyncio


def test_many_streams_need_no_threads(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's pool has cores + 4 threads: readers that block one each would wait for one another. What the worker has
    of its own may come and go, for callbacks, and while other processes want its core."""
    slow(monkeypatch)
    count, own = 40, {"fastldm callbacks", "fastldm contention", "fastldm threads"}

    async def read(session: Session, seed: int) -> list[int]:
        future, steps = session.submit(**options(seed, steps=6, **SMALL), preview=True), []
        async for step in future.async_progress():
            assert step.preview is not None
            steps.append(step.step)
        assert (await future).images.shape == (1, 16, 16, 3)
        return steps

    async def main(session: Session) -> tuple[list[list[int]], list[str]]:
        before = threading.enumerate()
        readers = [asyncio.ensure_future(read(session, k)) for k in range(count)]
        await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        started = [thread.name for thread in threading.enumerate() if thread not in before]
        return await asyncio.gather(*readers), [name for name in started if name not in own]

    with Session(pipe, max_batch=count) as session:
        session.submit(**options(**SMALL)).result(60)
        steps, threads = asyncio.run(main(session))
    assert steps == [[*range(6)]] * count
    assert threads == []


def test_awaiting_task_cancels_its_request(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)

    async def main(session: Session) -> None:
        future = session.submit(**options(steps=500))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(future, 0.2)
        assert await asyncio.to_thread(lambda: wait([future], 10).done) == {future}
        with pytest.raises(Cancelled):
            future.result(0)

    with Session(pipe) as session:
        asyncio.run(main(session))


def test_readers_take_over_from_each_other(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)

    async def some(future: fastldm.Generation, count: int) -> list[int]:
        steps: list[int] = []
        async for step in future.async_progress():
            steps.append(step.step)
            if len(steps) == count:
                break
        return steps

    with Session(pipe) as session:
        future = session.submit(**options(steps=12))
        seen = [next(future.progress()).step]
        seen += asyncio.run(some(future, 3))
        future.result(10)
        rest = [step.step for step in future.progress()]
        assert rest[-1] == 11
        assert sorted({*seen, *rest}) == [*seen, *rest]  # none twice; one on its way while a reader leaves is lost
        assert asyncio.run(some(future, 99)) == []
