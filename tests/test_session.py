"""fastldm/serving/session.py: many requests from many threads, each getting what it would have got alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT
from counters import Recorder
from sessions import options, same, tiny_pipeline

import fastldm
from fastldm import Cancelled, DeadlineExceeded, InputError, NonFinite, OutOfMemory, Pipeline, QueueFull, Session
from fastldm.runtime.denoise import EagerBatch
from fastldm.runtime.graph import Graphs
from fastldm.runtime.stages import Stages


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


SAMPLERS = ["ddim", "euler a", "dpm++ 2m karras", "unipc", "heun", "dpm++ 2m sde", "plms", "lcm"]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Of every kind: sampler, steps, size, guidance (none, whole, part, rescaled), prompt length, pictures."""
    r = random.Random(seed)
    return [
        options(
            seed=k,
            steps=r.randint(2, 6),
            prompt=" ".join(["a cat"] * r.choice([1, 1, 40])),  # 40: two windows of tokens
            sampler=r.choice(SAMPLERS),
            guidance_scale=r.choice([1.0, 3.0, 7.5]),
            guidance_rescale=r.choice([0.0, 0.0, 0.7]),
            guidance_interval=r.choice([(0.0, 1.0), (0.0, 1.0), (0.3, 0.8)]),
            num_images_per_prompt=r.choice([1, 1, 2]),
            height=r.choice([32, 48]),
            width=48,
        )
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def thirty_two(pipe: Pipeline) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The requests, and what each gives alone."""
    queries = requests(32, seed=1)
    return queries, [pipe(**one).images for one in queries]  # type: ignore[misc]


def from_threads(session: Session, queries: list[dict[str, Any]], **arguments: Any) -> list[fastldm.Generation]:
    """Submitted by 8 threads at random moments; the futures in the requests' order."""
    futures: list[Any] = [None] * len(queries)

    def submit(first: int) -> None:
        r = random.Random(first)
        for k in range(first, len(queries), 8):
            time.sleep(r.random() * 0.03)
            futures[k] = session.submit(**queries[k], **arguments)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(submit, range(8)))
    return futures


def test_concurrent_requests_match_single_requests(pipe: Pipeline, thirty_two: Any) -> None:
    queries, alone = thirty_two
    with Session(pipe, max_batch=6) as session:
        futures = from_threads(session, queries)
        for one, future, expected in zip(queries, futures, alone, strict=True):
            result = future.result(60)
            same(result.images, expected)
            assert result.seeds[0] == one["seed"]


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

    def broken_begin(self: Pipeline, request: fastldm.Request) -> Any:
        kind = request.seed[0] % 16 if request.seed[0] % 4 == 0 else None  # type: ignore[index]
        if kind == 0:
            raise ValueError("injected: cannot begin")
        run = begin(self, request)
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


# ---- leaving early


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Steps that take their time, so that something can happen between them."""
    step = EagerBatch.step

    def slowly(self: EagerBatch, runs: Any) -> str:
        time.sleep(seconds)
        return step(self, runs)

    monkeypatch.setattr(EagerBatch, "step", slowly)


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
        other, late = session.submit(**options(steps=20)), session.submit(**options(1, steps=500), deadline=60)
        next(late.progress())
        late.submitted -= 100  # time flies
        with pytest.raises(DeadlineExceeded, match=r"deadline of 60 s passed after \d+ steps"):
            late.result(10)
        assert isinstance(late.exception(), TimeoutError)
        other.result(60)


def test_deadline_passes_in_the_queue(pipe: Pipeline, gate: threading.Event) -> None:
    with Session(pipe, max_batch=1) as session:
        other, late = session.submit(**options()), session.submit(**options(1), deadline=60)
        late.submitted -= 100
        gate.set()
        with pytest.raises(DeadlineExceeded, match="deadline of 60 s passed while it waited"):
            late.result(10)
        other.result(10)


def test_deadline_passes_during_a_callback(pipe: Pipeline) -> None:
    """A request that waits for its caller is let go in time, though nothing else happens on the device."""
    future = pipe.session.submit_request(fastldm.Request(**options(steps=4)), deadline=3, waits_for_answer=True)
    with pytest.raises(DeadlineExceeded, match="after 1 steps"):
        future.result(20)


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


# ---- what a caller sees


def test_progress_has_steps_and_previews(pipe: Pipeline) -> None:
    future = pipe.session.submit(**options(steps=3, num_images_per_prompt=2), preview=True)
    steps = list(future.progress())
    assert [(one.step, one.steps) for one in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [one.timestep for one in steps] == sorted((one.timestep for one in steps), reverse=True)
    for one in steps:
        assert one.preview is not None
        assert [picture.size for picture in one.preview] == [(64, 64)] * 2
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


def test_requests_from_the_worker_thread_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="inside the worker's own thread"):
        pipe.session.call(lambda: pipe("a cat"))


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"deadline": 0}, "deadline is 0: expected seconds from now, more than 0"),
        ({"height": 60}, "height is 60"),
        ({"stps": 3}, "unknown argument 'stps'"),
    ],
)
def test_bad_requests_are_refused_at_once(pipe: Pipeline, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        pipe.session.submit("a cat", **arguments)


def test_session_limits_are_checked(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="max_batch is 0: expected a whole number, 1 to 4096"):
        Session(pipe, max_batch=0)


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


# ---- memory


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
            tensors = live_tensors()  # collects first
            return tensors, len(gc.get_objects()), in_use()

        tensors, objects, bytes = run(50)
        more_tensors, more_objects, more_bytes = run(count - 50)
    assert more_tensors == tensors
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
    monkeypatch.setattr(pipe, "_session", None)
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
        for pictures in (1, 2):
            result = pipe(**options(width=size, height=size, num_images_per_prompt=pictures, guidance_scale=3.0))
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
    for one, result in zip(eager, results, strict=True):
        assert np.array_equal(one, result.images)


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
    alone = [gpu(**one).images for one in queries]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: gpu(**one).images, queries))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() < 0.02, "float16, at other numbers of rows"


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
