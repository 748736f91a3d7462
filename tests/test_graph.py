"""runtime/graph.py: what is captured when, what goes, and in which order; on a GPU, that a replay is its work."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from counters import Recorder
from torch import Tensor

from fastldm.errors import EngineError
from fastldm.kernels.dispatch import CompiledLate
from fastldm.runtime.graph import CUDA, WARM_UPS, Graphs


class Work:
    """Counts how often it really ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1


def warm(graphs: Graphs, key: Any, function: Any = lambda: None) -> None:
    for _ in range(WARM_UPS + 1):
        graphs.run(key, function)


def test_graphs_warm_up_capture_and_replay() -> None:
    driver, function = Recorder(), Work()
    graphs = Graphs(driver)
    assert [graphs.run("a", function) for _ in range(5)] == [False, False, True, True, True]
    assert driver.calls == ["capture", "replay", "replay", "replay"]
    assert function.runs == 5, "each run is one run: a capture does not count"
    assert "a" in graphs
    assert "b" not in graphs


def test_each_key_warms_up_separately() -> None:
    driver = Recorder()
    graphs = Graphs(driver)
    assert [graphs.run(key, lambda: None) for key in ("a", "b", "a", "b", "a", "b")] == [False] * 4 + [True] * 2


class Pool(Recorder):
    """Memory as PyTorch's allocator holds it for the graphs of one pool: a capture takes what is free there before the
    pool grows, and nothing is given back while a graph holds the pool."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = iter(sizes)
        self.alive = self.reserved = 0

    def capture(self, function: Any) -> Any:
        self.calls.append("capture")
        self.alive += 1
        self.reserved = max(self.reserved, next(self.sizes))
        return function

    def held(self) -> int:
        return self.reserved

    def destroy(self, handle: Any) -> None:
        super().destroy(handle)
        self.alive -= 1

    def trim(self) -> None:
        super().trim()
        if not self.alive:
            self.reserved = 0


def test_pool_stays_within_its_budget() -> None:
    """A graph in memory that another has left makes the pool grow by nothing, and is not free for that."""
    driver = Pool(200, 100, 240, 300, 300, 100, 100)
    graphs = Graphs(driver, budget=250)
    for key in ("a", "b", "c"):
        warm(graphs, key)
    assert (graphs.bytes, [key in graphs for key in "abc"]) == (240, [True] * 3), "they lie on the same memory"
    warm(graphs, "d")  # 300 alone
    assert [key in graphs for key in "abcd"] == [False, False, False, True]
    assert driver.calls[-7:] == [*["destroy"] * 4, "trim", "capture", "replay"]
    assert graphs.run("b", lambda: None), "it has run before: it is captured again at once"
    assert "d" not in graphs
    assert graphs.bytes == driver.reserved <= 250


def test_one_graph_may_be_larger_than_the_budget() -> None:
    graphs = Graphs(Pool(1000), budget=250)
    warm(graphs, "a")
    assert "a" in graphs
    assert graphs.bytes == 1000


def test_the_last_graph_frees_the_pool() -> None:
    graphs = Graphs(Pool(200, 100))
    for key in ((1, "x"), (2, "x")):
        warm(graphs, key)
    graphs.forget(1)
    assert graphs.bytes == 200
    graphs.forget(2)
    assert graphs.bytes == graphs.driver.held() == 0


class FakeCUDA:
    """What `CUDA` asks of torch.cuda. A pool whose last graph has gone takes no other, as in PyTorch."""

    class CUDAGraph:
        def __init__(self) -> None:
            self.pool: Any = None

        def reset(self) -> None:
            FakeCUDA.users[self.pool] -= 1

        def replay(self) -> None: ...

    users: dict[Any, int]

    def __init__(self) -> None:
        FakeCUDA.users = {}
        self.pools = 0

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def graph(self, graph: CUDAGraph, pool: Any, **_: Any) -> Any:
        if pool in self.users and self.users[pool] == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] = self.users.get(pool, 0) + 1
        graph.pool = pool
        try:
            yield
        except BaseException:
            graph.reset()
            raise

    def memory_snapshot(self) -> list[dict[str, Any]]:
        segments = [{"segment_pool_id": pool, "total_size": 20} for pool, users in self.users.items() if users]
        return [{"segment_pool_id": (0, 0), "total_size": 7}, *segments, *segments]

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self  # synchronize, current_stream, empty_cache


def test_an_emptied_pool_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they were let go for memory, with their buffers, or the only one could not be captured."""
    monkeypatch.setattr("fastldm.runtime.graph.torch.cuda", FakeCUDA())

    def refuses() -> None:
        raise RuntimeError("not permitted when stream is capturing")

    for let_go in (Graphs.clear, lambda graphs: graphs.forget(1), lambda graphs: warm(graphs, "b", refuses)):
        graphs = Graphs(CUDA(torch.device("cuda")))
        with contextlib.suppress(RuntimeError):
            let_go(graphs)
        for _ in range(2):
            warm(graphs, (1, "a"))
            assert (1, "a") in graphs
            assert graphs.bytes == 40
            graphs.clear()
    graphs = Graphs(CUDA(torch.device("cuda")))
    for key in ((1, "a"), (2, "a")):
        warm(graphs, key)
    graphs.forget(1)
    warm(graphs, (3, "a"))
    assert (3, "a") in graphs
    assert sorted(FakeCUDA.users.values())[-1] == 2, "graphs that live together share a pool"


def test_clear_destroys_graphs_in_reverse() -> None:
    class Numbered(Recorder):
        captured = 0

        def capture(self, function: Any) -> Any:
            self.captured += 1
            return self.captured

        def replay(self, handle: Any) -> None: ...

        def destroy(self, handle: Any) -> None:
            self.calls.append(handle)

    driver = Numbered()
    graphs = Graphs(driver)
    for key in "abc":
        warm(graphs, key)
    graphs.clear()
    assert driver.calls == [3, 2, 1, "trim"]
    assert graphs.bytes == 0
    assert not graphs.run("a", lambda: None)


def test_forget_destroys_one_owners_graphs() -> None:
    graphs = Graphs(Recorder())
    for key in ((1, "x"), (1, "y"), (2, "x")):
        warm(graphs, key)
    graphs.run((1, "z"), lambda: None)
    graphs.forget(1)
    assert [key in graphs for key in ((1, "x"), (1, "y"), (2, "x"))] == [False, False, True]
    assert [graphs.run((1, "z"), lambda: None) for _ in range(3)] == [False, False, True]


def test_calls_copy_inputs_and_outputs() -> None:
    """A replay works on tensors of its own: the caller's may change and go, and so may what was returned."""
    driver = Recorder()
    graphs = Graphs(driver)
    buffers: list[Tensor] = []

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        if not buffers:
            buffers.append(torch.empty_like(x))
        buffers[0].copy_(x * 2 + y)  # as a graph's output does, this lies where it lay before
        return buffers[0], None

    outs = []
    for k in range(5):
        out, nothing = graphs.call("a", function, torch.full((3,), float(k)), torch.ones(3))
        assert nothing is None
        outs.append(out)
    assert driver.calls == ["capture", "replay", "replay", "replay"]
    assert [out[0].item() for out in outs[2:]] == [5.0, 7.0, 9.0]


def test_other_shapes_are_other_graphs() -> None:
    driver = Recorder()
    graphs = Graphs(driver)
    for _ in range(3):
        for x in (torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.float16)):
            assert graphs.call("a", lambda x: x + 1, x).shape == x.shape
    assert driver.calls.count("capture") == 3


def test_failed_captures_run_eagerly_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Recorder):
        def capture(self, function: Any) -> Any:
            self.calls.append("capture")
            raise RuntimeError("operation not permitted when stream is capturing")

    driver, function = Refusing(), Work()
    graphs = Graphs(driver)
    with caplog.at_level(logging.WARNING, "fastldm"):
        assert [graphs.run("a", function) for _ in range(6)] == [False] * 6
    assert driver.calls == ["capture"], "it is tried once"
    assert function.runs == 6
    assert len(caplog.records) == 1
    assert "a cannot be captured and runs eagerly: operation not permitted" in caplog.text


def test_compiling_inside_a_capture_is_an_error() -> None:
    class Compiling(Recorder):
        def capture(self, function: Any) -> Any:
            raise CompiledLate("kernel k was not compiled before")

    graphs = Graphs(Compiling())
    with pytest.raises(EngineError, match="capturing a: kernel k was not compiled before"):
        warm(graphs, "a")


def test_out_of_memory_in_a_capture_is_raised() -> None:
    class Full(Recorder):
        def capture(self, function: Any) -> Any:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        warm(Graphs(Full()), "a")


# ---- on a device


@pytest.fixture
def graphs() -> Any:
    with torch.cuda.stream(torch.cuda.Stream()):
        yield Graphs(CUDA(torch.device("cuda", torch.cuda.current_device())))


@pytest.mark.gpu
def test_replays_are_bitwise_eager(graphs: Graphs) -> None:
    layer = torch.nn.Linear(64, 64).cuda().half()
    xs = torch.randn(6, 32, 64, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for x in xs:
            assert torch.equal(graphs.call("a", layer, x), layer(x))
        layer.weight.data += 1  # in place: the next replay sees it
        assert torch.equal(graphs.call("a", layer, xs[0]), layer(xs[0]))


@pytest.mark.gpu
def test_replays_allocate_nothing(graphs: Graphs) -> None:
    x = torch.randn(256, 256, device="cuda")
    out = torch.empty_like(x)

    def function() -> None:
        out.copy_((x @ x).relu() @ x)

    warm(graphs, "a", function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        assert graphs.run("a", function)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_destroyed_graphs_free_the_pool(graphs: Graphs) -> None:
    def function() -> Tensor:
        return torch.ones(64 * 2**20, device="cuda") * 2  # 256 MiB each, two at a time

    warm(graphs, "a", function)
    reserved, before = graphs.bytes, torch.cuda.memory_reserved()
    graphs.clear()
    assert reserved >= 512 * 2**20
    assert before - torch.cuda.memory_reserved() >= reserved


@pytest.mark.gpu
def test_uncompiled_kernels_are_an_error_in_a_capture(graphs: Graphs) -> None:
    from fastldm.kernels.geglu import GEGLU

    calls = [0]
    x = torch.randn(8, 640, device="cuda", dtype=torch.float16)

    def function() -> None:
        calls[0] += 1
        if calls[0] > WARM_UPS:  # its first run is inside the capture
            GEGLU.triton(x.bfloat16())

    with pytest.raises(EngineError, match="was not compiled before"):
        warm(graphs, "a", function)
