"""fastldm/serving/session.py: many requests from many threads, each getting what it would have got alone."""

from __future__ import annotations

import ctypes
import gc
import math
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT
from counters import Recorder
from sessions import SAMPLERS, from_threads, options, requests, same, slow, tiny_pipeline
from sessions import alone as run_alone

from fastldm import (
    Cancelled,
    InputError,
    Pipeline,
    QueueFull,
    Session,
)
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.graph import Graphs


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def thirty_two(pipe: Pipeline) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    queries = requests(32, seed=1)
    return queries, run_alone(pipe, queries)


def test_concurrent_requests_match_single_requests(pipe: Pipeline, thirty_two: Any) -> None:
    queries, alone = thirty_two
    with Session(pipe, max_batch=6) as session:
        futures = from_threads(session, queries)
        for query, future, expected in zip(queries, futures, alone, strict=True):
            result = future.result(60)
            same(result.images, expected)
            assert result.seeds[0] == query["seed"]


# ---- leaving early


def test_close_cancels_or_waits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    session = Session(pipe, max_batch=1)
    futures = [session.submit(**options(k, steps=3)) for k in range(3)]
    session.close()
    assert all(future.result(0).images.shape == (1, 64, 64, 3) for future in futures)
    with pytest.raises(InputError, match="this session is closed"):
        session.submit("a cat")

    session = Session(pipe, max_batch=1)
    futures = [session.submit(**options(k, steps=500)) for k in range(3)]
    next(futures[0].progress())
    session.close(cancel=True)
    assert all(future.done() for future in futures)
    for future in futures:
        with pytest.raises((Cancelled, CancelledError)):
            future.result(0)
    pipe("a cat", num_inference_steps=1)  # other sessions of the model go on


def test_full_queue_refuses_requests(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1, max_queue=2) as session:
        first = session.submit(**options())
        while not first.running():
            time.sleep(0.001)
        rest = [session.submit(**options(k)) for k in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already, and max_queue is 2"):
            session.submit(**options())
        rest[0].cancel()
        gate.set()
        rest[1].result(10)
        last = session.submit(**options())
        for future in (first, last):
            future.result(10)


# ---- who is next


# ---- what a caller sees


def test_requests_from_the_worker_thread_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="inside the worker's own thread"):
        pipe.session.call(lambda: pipe("a cat"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline": 0}, "deadline is 0: expected seconds from now, more than 0"),
        ({"height": 60}, "height is 60"),
        ({"stps": 3}, "unknown argument 'stps'"),
    ],
)
def test_bad_requests_are_refused_at_once(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe.session.submit("a cat", **arguments)


def test_session_limits_are_checked(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="max_batch is 0: expected a whole number, 1 to 4096"):
        Session(pipe, max_batch=0)


# ---- memory


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


class Malloc(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use() -> int:
    """Bytes that malloc has given out, in all arenas and mapped alone. What is resident says less: free chunks between
    those come and go by tens of megabytes."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Malloc
    info = ask()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc's malloc, from 2.33 on")
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_memory_stays_flat_over_many_requests(pipe: Pipeline, count: int) -> None:
    """After 50 requests, and after many more: as many live tensors and objects, and malloc's memory
    within a kilobyte a request."""
    with Session(pipe, max_batch=3) as session:

        def run(requests: int) -> tuple[int, int, int]:
            for first in range(0, requests, 5):
                futures = [
                    session.submit(**options(k, steps=1 + k % 2, height=16, width=16)) for k in range(first, first + 5)
                ]
                for future in futures:
                    future.result(60)
            del futures, future
            session.call(lambda: None)  # behind what the worker still does with the last request
            tensors = live_tensors()  # collects first
            return tensors, len(gc.get_objects()), in_use()

        tensors, objects, bytes = run(50)
        more_tensors, more_objects, more_bytes = run(count - 50)
    assert more_tensors <= tensors  # fewer, where an earlier test's last tensor went meanwhile
    assert more_objects <= objects + 100
    assert more_bytes - bytes <= 1024 * (count - 50)


def test_an_unreferenced_model_is_freed() -> None:
    """The worker's thread stays, and keeps nothing of what it ran."""
    pipe = tiny_pipeline()
    pipe(**options(steps=1))
    gone = weakref.ref(pipe.unet)
    del pipe
    for _ in range(50):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.02)  # the worker may be on its way to sleep
    assert gone() is None


# ---- nothing of a sampler runs in the loop


def test_no_sampler_code_runs_in_the_loop(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sampler, it was a table before the first step."""
    files: set[str] = set()
    step = EagerBatch.step

    def watched(self: EagerBatch, runs: Any) -> str:
        sys.setprofile(lambda frame, event, arg: files.add(frame.f_code.co_filename.rsplit("/", 1)[-1]))
        try:
            return step(self, runs)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(EagerBatch, "step", watched)
    for sampler in SAMPLERS:
        pipe(**options(sampler=sampler))
    assert "denoise.py" in files
    assert not files & {"solvers.py", "spacing.py", "grid.py", "table.py", "pipeline.py", "text.py"}


# ---- as on a GPU: slots in still buffers, graphs


@pytest.fixture
def in_slots(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The pipeline takes the way that it takes on a GPU; what graphs would do is recorded, and done."""
    driver = Recorder()
    monkeypatch.setattr(pipe.stages, "graphs", Graphs(driver))
    monkeypatch.setattr(pipe, "_session", Session(pipe))
    monkeypatch.setattr("fastldm.runtime.stages.fuses", lambda x: True)
    return driver


def test_requests_in_slots_match_single_requests(pipe: Pipeline, thirty_two: Any, in_slots: Recorder) -> None:
    queries, alone = thirty_two
    with Session(pipe, max_batch=4) as session:
        futures = from_threads(session, queries)
        for future, expected in zip(futures, alone, strict=True):
            same(future.result(60).images, expected)
    assert in_slots.calls.count("replay") > in_slots.calls.count("capture") > 0


def test_a_graph_serves_all_requests_of_its_shape(pipe: Pipeline, in_slots: Recorder) -> None:
    """Another sampler, step count, scale, prompt and seed capture nothing; another size does."""
    with Session(pipe, max_batch=1) as session:

        def run(**more: Any) -> str:
            return session.submit(**options(**{"steps": 4, "guidance_scale": 3.0, **more})).result(60).backend

        assert [run(), run(), run(), run()] == ["torch", "cuda graph", "cuda graph", "cuda graph"]
        captured = in_slots.calls.count("capture")
        for more in (
            {"sampler": "euler a"},
            {"sampler": "unipc", "steps": 9},
            {"guidance_scale": 9.0},
            {"prompt": "a dog"},
            {"seed": 5},
        ):
            assert run(**more) == "cuda graph"
        assert in_slots.calls.count("capture") == captured
        run(width=96)
        assert run(width=96) == "cuda graph"
        assert in_slots.calls.count("capture") > captured


def test_warmup_captures_the_largest_first(pipe: Pipeline, in_slots: Recorder) -> None:
    pipe.warmup(sizes=[(32, 32), (64, 64)], batches=[1, 2], guidance_scale=3.0)
    captured = in_slots.calls.count("capture")
    for size in (32, 64):
        for images in (1, 2):
            result = pipe(**options(width=size, height=size, num_images_per_prompt=images, guidance_scale=3.0))
            assert result.backend == "cuda graph"
    assert in_slots.calls.count("capture") == captured


# ---- on a GPU


@pytest.fixture(scope="module")
def gpu() -> Pipeline:
    return tiny_pipeline("cuda", torch.float16)


@pytest.mark.gpu
def test_replays_are_the_eager_steps_bitwise(gpu: Pipeline) -> None:
    eager = [gpu(**options(seed=k, steps=2)).images for k in range(4)]  # two steps: never captured
    results = [gpu(**options(seed=k, steps=2)) for k in range(4)]
    assert results[-1].backend == "cuda graph"
    for expected, result in zip(eager, results, strict=True):
        assert np.array_equal(expected, result.images)


@pytest.mark.gpu
def test_steps_allocate_nothing(gpu: Pipeline) -> None:
    gpu.warmup(guidance_scale=3.0)
    seen: list[int] = []

    def look(*_: Any) -> None:
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_stats()["allocation.all.allocated"])

    gpu(**options(steps=8, guidance_scale=3.0), callback_on_step_end=look)
    # What a callback sees is a copy, one a step.
    assert {after - before for before, after in pairwise(seen)} <= {0, 1, 2}


@pytest.mark.gpu
def test_replays_use_changed_weights(gpu: Pipeline) -> None:
    gpu.warmup()
    before = gpu(**options()).images
    gpu.unet.conv_out.weight.data += 0.1
    changed = gpu(**options())
    assert changed.backend == "cuda graph"
    assert np.abs(changed.images - before).max() > 0.01
    gpu.unet.conv_out.weight.data -= 0.1
    assert np.abs(gpu(**options()).images - before).max() < 0.02


@pytest.mark.gpu
def test_threads_and_samplers_share_captured_graphs(gpu: Pipeline) -> None:
    gpu.warmup(batches=[1, 2], guidance_scale=3.0)
    queries = [options(k, steps=3 + k, sampler=SAMPLERS[k % 3], guidance_scale=3.0) for k in range(6)]
    alone = [gpu(**query).images for query in queries]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda query: gpu(**query).images, queries))
    for expected, got in zip(alone, together, strict=True):
        assert np.abs(expected - got).max() < 0.02, "float16, at other numbers of rows"


@pytest.mark.gpu
def test_reserved_memory_matches_the_plan() -> None:
    """SD1.5's full size, captured and run, in a process of its own."""
    code = """
import torch
from benchmarks import ladder
from fastldm.planning.memory import Workload, plan
from fastldm.runtime.slots import step_capacity
model = ladder.MODELS["sd15-512"]
pipe = ladder.pipeline(model, torch.device("cuda"), torch.float16)
pipe.warmup([(512, 512)])
pipe("a castle", num_inference_steps=4)
asked = Workload.of_stages(pipe.stages, width=512, height=512, batch=1, guided=True, steps=step_capacity(4),
                             slots=pipe.session.max_batch, rows=pipe.stages.unet_rows(pipe.session.max_batch))
print(torch.cuda.max_memory_reserved() / plan(asked).peak)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.85 <= float(done.stdout.split()[-1]) <= 1.0


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


@pytest.mark.parametrize("value", [None, -1, 1.5, "yes", []], ids=repr)
def test_preview_is_a_flag_or_a_number(value: Any, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"^preview is [^\n]*: expected a whole number, 0 to 10000$"):
        pipe.session.submit("a cat", preview=value)
