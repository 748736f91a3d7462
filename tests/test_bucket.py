"""fastldm/serving/bucket.py: which requests share steps, which is next, and what the failure of one leaves alone."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from sessions import alone as run_alone
from sessions import from_threads, options, requests, same, tiny_pipeline

import fastldm
from fastldm import Cancelled, NonFinite, OutOfMemory, Pipeline, Session
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.stages import Stages


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def thirty_two(pipe: Pipeline) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    queries = requests(32, seed=1)
    return queries, run_alone(pipe, queries)


def test_concurrent_requests_share_steps(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    step = EagerBatch.step
    monkeypatch.setattr(EagerBatch, "step", lambda self, runs: together.append(len(runs)) or step(self, runs))
    with Session(pipe, max_batch=4) as session:
        futures = [session.submit(**options(k, steps=8, sampler="ddim")) for k in range(6)]
        for future in futures:
            future.result(60)
    assert max(together) == 4
    assert sum(together) == 6 * 8


def test_failed_requests_leave_their_neighbours_alone(
    pipe: Pipeline, thirty_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth request fails in its own way: it cannot begin, its network raises, gives NaN, or it is cancelled."""
    queries, alone = thirty_two
    begin, step = Stages.prepare, EagerBatch.step
    raising, nan = set(), set()

    def broken_begin(self: Pipeline, request: fastldm.Request, **options: Any) -> Any:
        kind = request.seed[0] % 16 if request.seed[0] % 4 == 0 else None  # type: ignore[index]
        if kind == 0:
            raise ValueError("injected: cannot begin")
        run = begin(self, request, **options)
        if kind == 4:
            raising.add(run)
        if kind == 8:
            nan.add(run)
        return run

    def broken_step(self: EagerBatch, runs: Any) -> str:
        if any(run in raising and run.row == 1 for run in runs):
            raise ValueError("injected: cannot step")
        ran_on = step(self, runs)
        for run in runs:
            if run in nan and run.row == 1:
                self.go_on_from(run, self.latents(run) * float("nan"))
        return ran_on

    monkeypatch.setattr(Stages, "prepare", broken_begin)
    monkeypatch.setattr(EagerBatch, "step", broken_step)
    with Session(pipe, max_batch=6) as session:
        futures = from_threads(session, queries)
        for k in range(12, 32, 16):
            futures[k].cancel()
        for k, (future, expected) in enumerate(zip(futures, alone, strict=True)):
            if k % 16 == 0:
                with pytest.raises(ValueError, match="cannot begin"):
                    future.result(60)
            elif k % 16 == 4:
                with pytest.raises(ValueError, match="cannot step"):
                    future.result(60)
            elif k % 16 == 8:
                with pytest.raises(NonFinite, match="NaN or infinity in the latents after step"):
                    future.result(60)
            elif k % 16 == 12:
                with contextlib.suppress(CancelledError, Cancelled):
                    same(future.result(60).images, expected)  # it was done before it was cancelled
            else:
                same(future.result(60).images, expected)
    monkeypatch.undo()
    same(pipe(**queries[0]).images, alone[0])


def finished_in_order(futures: dict[str, fastldm.Generation], gate: threading.Event) -> list[str]:
    order: SimpleQueue[str] = SimpleQueue()
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: order.put(name))
    gate.set()
    return [order.get(timeout=60) for _ in futures]


def test_queue_is_ordered_by_priority_then_age(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1) as session:
        futures = {"first": session.submit(**options())}
        while not futures["first"].running():
            time.sleep(0.001)
        for name, priority in (("a", 0), ("b", 0), ("urgent", 5), ("idle", -1)):
            futures[name] = session.submit(**options(), priority=priority)
        assert finished_in_order(futures, gate) == ["first", "urgent", "a", "b", "idle"]


def test_waiting_raises_priority(pipe: Pipeline, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is worth more than one level."""
    with Session(pipe, max_batch=1) as session:
        futures = {"first": session.submit(**options())}
        while not futures["first"].running():
            time.sleep(0.001)
        now = time.perf_counter()
        monkeypatch.setattr("fastldm.serving.generation.perf_counter", lambda: now - 60.0)
        futures["old"] = session.submit(**options())
        monkeypatch.setattr("fastldm.serving.generation.perf_counter", time.perf_counter)
        futures["urgent"] = session.submit(**options(), priority=1)
        assert finished_in_order(futures, gate) == ["first", "old", "urgent"]


def test_large_images_do_not_starve_a_small_one(pipe: Pipeline, gate: threading.Event) -> None:
    """Twelve large requests are there first; the small one is done before most of them, for it gets half the time."""
    with Session(pipe, max_batch=1) as session:
        futures = {f"large {k}": session.submit(**options(k, steps=4, height=160, width=160)) for k in range(12)}
        futures["small"] = session.submit(**options(steps=4, height=32, width=32))
        order = finished_in_order(futures, gate)
    assert order.index("small") <= 2


def test_a_request_larger_than_max_batch_runs_alone(pipe: Pipeline) -> None:
    with Session(pipe, max_batch=2) as session:
        small, large = session.submit(**options()), session.submit(**options(num_images_per_prompt=5))
        last = session.submit(**options(4))
        assert large.result(60).images.shape[0] == 5
        same(large.result().images[4:], last.result(60).images)
        same(large.result().images[:1], small.result(60).images)


def test_kernels_use_holds_for_submitted_requests(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's choice of path holds for its own requests, which run on another thread."""
    from fastldm import kernels
    from fastldm.kernels import dispatch

    seen: list[Any] = []
    step = EagerBatch.step
    monkeypatch.setattr(EagerBatch, "step", lambda self, runs: seen.append(dispatch.preference()) or step(self, runs))
    with kernels.use("torch"):
        pipe(**options(steps=1))
    pipe(**options(steps=1))
    assert seen == ["torch", None]


def test_smaller_requests_succeed_after_out_of_memory(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step = EagerBatch.step

    def fails(self: EagerBatch, runs: Any) -> str:
        if runs[0].latents.shape[-1] > 8:
            torch.empty(2**56)
        return step(self, runs)

    monkeypatch.setattr(EagerBatch, "step", fails)
    with Session(pipe) as session:
        large, small = session.submit(**options(width=128)), session.submit(**options())
        with pytest.raises(OutOfMemory, match="memory ran out"):
            large.result(10)
        small.result(10)
        assert session.submit(**options(1)).result(10).images.shape == (1, 64, 64, 3)
