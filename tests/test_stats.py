"""fastldm/serving/stats.py, and what a request knows of its place in the line and of its time."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest
from sessions import SMALL, options, slow, tiny_pipeline

from fastldm import InputError, Pipeline, Session


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def test_stats_count_what_a_session_did(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1, max_queue=7) as session:
        assert (session.stats().waiting, session.stats().running, session.stats().remaining) == (0, 0, 0)
        assert session.stats().wait is None
        futures = [session.submit(**options(k)) for k in range(4)]
        bad = session.submit(**options(4), deadline=1e-9)
        futures[3].cancel()
        gate.set()
        wait([*futures, bad])
        stats = session.stats()
    assert (stats.completed, stats.cancelled, stats.failed) == (3, 1, 1)
    assert (stats.waiting, stats.running, stats.images, stats.max_batch, stats.max_queue) == (0, 0, 0, 1, 7)
    assert stats.wait is not None
    assert stats.wait > 0
    assert list(stats.step_times) == [(64, 64)]
    assert stats.memory_planned >= sum(p.nbytes for p in pipe.unet.parameters())
    assert stats.memory_used is None or stats.memory_used > stats.memory_planned


def test_positions_follow_priority(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1) as session:
        first = session.submit(**options())
        while session.stats().waiting:  # until the worker has taken it
            pass
        second, third = session.submit(**options(1)), session.submit(**options(2, **SMALL))
        urgent = session.submit(**options(3), priority=1)
        assert [one.position() for one in (first, urgent, second, third)] == [0, 1, 2, 3]
        assert session.stats().running == 1
        gate.set()
    assert [one.position() for one in (first, urgent, second, third)] == [0, 0, 0, 0]


def test_remaining_time_shrinks_and_counts_those_before(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    with Session(pipe, max_batch=1) as session:
        first, second = session.submit(**options(steps=40)), session.submit(**options(1, steps=40))
        steps = first.progress()
        next(steps)
        next(steps)
        whole, behind = first.remaining(), second.remaining()
        assert whole is not None
        assert behind is not None
        assert 0.02 * 30 < whole < behind
        for _ in range(30):
            next(steps)
        later = first.remaining()
        assert later is not None
        assert later < 0.7 * whole
        first.cancel(), second.cancel()
    assert first.remaining() == 0


def test_requests_have_ids(pipe: Pipeline) -> None:
    with Session(pipe) as session:
        assert session.submit(**options(steps=1), id="mine").id == "mine"
        assert session.submit(**options(steps=1)).id != session.submit(**options(steps=1)).id
        with pytest.raises(InputError, match="id is 7: expected a name"):
            session.submit(**options(), id=7)  # type: ignore[arg-type]
