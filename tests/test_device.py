"""fastldm/device.py, and whoever has tensors cross: that nothing waits for the device unseen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from sessions import SMALL, options, tiny_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastldm
from benchmarks import ladder
from fastldm import InputError, Pipeline, device
from fastldm.conditioning import encode as conditioning
from fastldm.conditioning import text
from fastldm.device import Mark, send, send_numbers, to_host
from fastldm.kernels import dispatch
from fastldm.request import Request
from fastldm.runtime import controls, denoise, image_prompts, noise, slots, stages, start
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.stages import Stages


def test_numbers_keep_their_values_shape_and_dtype() -> None:
    x = torch.arange(6, dtype=torch.float64).view(2, 3).t()
    assert torch.equal(send(x, "cpu"), x)
    assert send(x, "cpu", torch.float16).dtype == torch.float16
    assert send_numbers([[1, 2], [3, 4]], torch.int32, "cpu").tolist() == [[1, 2], [3, 4]]
    assert to_host(x) is x
    mark = Mark(torch.device("cpu"))
    assert mark.follow(x) is x
    assert mark.reached()
    mark.wait()


@pytest.mark.parametrize(("ratio", "faster"), [(0.5, False), (1.0, False), (2.0, True)])
def test_bfloat16_is_taken_where_measured_faster(monkeypatch: pytest.MonkeyPatch, ratio: float, faster: bool) -> None:
    took = {torch.float32: ratio, torch.bfloat16: 1.0}
    monkeypatch.setattr(device, "_seconds", lambda x: took[x.dtype])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    device.bfloat16_is_faster.cache_clear()
    try:
        assert device.choose_dtype(None, torch.device("cpu")) == (torch.bfloat16 if faster else torch.float32)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        device.bfloat16_is_faster.cache_clear()
        assert device.choose_dtype(None, torch.device("cpu")) == torch.float32
    finally:
        device.bfloat16_is_faster.cache_clear()


class NoWaits(TorchDispatchMode):
    """Refuses what would wait for a GPU, for which tensors without storage stand: to read a value of it (which such
    tensors refuse themselves), to index by a list, to copy between host and device but by `send`."""

    READ = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select", "item"})

    def __init__(self) -> None:
        super().__init__()
        self.sending = 0
        self.made: dict[int, Any] = {}  # what operators made, and so no list did: PyTorch sends those behind our back

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.made |= {id(t): weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        for index in args[1] if name in ("index", "index_put", "index_put_") else ():
            if index is not None and self.made.get(id(index), lambda: None)() is not index:
                raise AssertionError(f"{name} by a list, or by a tensor from elsewhere")
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        there, here = (any(t.is_meta == meta and (meta or t.dim()) for t in tensors) for meta in (True, False))
        if there and name in self.READ:
            raise AssertionError(f"{name} reads a value of the device")
        if there and here and not self.sending:
            raise AssertionError(f"{name} goes from host to device or back: {[(t.shape, t.device) for t in tensors]}")
        return out


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaits]:
    mode = NoWaits()

    def sending(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def send(*args: Any) -> Tensor:
            mode.sending += 1
            try:
                return function(*args)
            finally:
                mode.sending -= 1

        return send

    for module in (conditioning, controls, denoise, image_prompts, noise, slots, stages, start, text):
        for name in ("send", "send_numbers"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, sending(getattr(module, name)))
    make = torch.tensor  # which no mode sees

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        assert torch.device(device or "cpu").type == "cpu", "torch.tensor copies from the host and waits"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(conditioning.checks, "tensor", lambda name, value, shape: value)  # refuses the meta device
    with dispatch.targeting(dispatch.Target(90)):
        yield mode


@pytest.fixture(scope="module")
def on_a_gpu() -> Pipeline:
    """A pipeline whose tensors have no storage and stand for a GPU's."""
    bare = mock.patch.object(ladder, "with_random_weights", lambda network, device, dtype: network.to(dtype).eval())
    with bare, dispatch.targeting(dispatch.Target(90)):
        return ladder.pipeline(ladder.MODELS["tiny"], torch.device("meta"), torch.float16)


PICTURE = Image.new("RGB", (64, 64), "red")
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": ["a (red:1.3) cat, " * 30, "a dog"], "negative_prompt": "blurry", "sampler": "euler a"},
    "latents": {"latents": torch.zeros(1, 4, 32, 32), "guidance_scale": 1.0},
    "image": {"image": PICTURE, "strength": 0.9, "num_images_per_prompt": 2},
    "inpainting": {"image": PICTURE, "mask_image": PICTURE.convert("L"), "generator": torch.Generator()},
    "embeds": {
        "prompt": None,
        "prompt_embeds": torch.zeros(1, 77, 32),
        "negative_prompt_embeds": torch.zeros(1, 77, 32),
    },
}


def request_of(pipe: Pipeline, name: str) -> Request:
    options = {"prompt": "a cat", "num_inference_steps": 2, "height": 64, "width": 64, **REQUESTS[name]}
    if "latents" in options:
        options["latents"] = torch.zeros(1, 4, 64 // pipe.vae.config.factor, 64 // pipe.vae.config.factor)
    return pipe.stages.complete(Request(**options))


def through(pipe: Pipeline, request: Request) -> None:
    """A request, up to where it may wait: the device has come so far."""
    run = pipe.stages.prepare(request)
    batch = pipe.stages.new_batch(run, 4)
    assert isinstance(batch, slots.Slots)
    batch.admit(run)
    while not run.done:
        batch.step([run])
        pipe.stages.preview(batch.latents(run), 1.0)
        batch.go_on_from(run, batch.latents(run) * 0.9)
    pieces = pipe.stages.decode(request, run, batch.latents(run), batch.release(run))
    next(piece for piece in pieces if piece is not None)
    batch.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_admitting_stepping_and_releasing_never_wait(name: str, on_a_gpu: Pipeline, watch: NoWaits) -> None:
    request = request_of(on_a_gpu, name)
    with torch.no_grad(), watch:
        through(on_a_gpu, request)


def test_waiting_is_detected(watch: NoWaits) -> None:
    x = torch.zeros(4, 3, device="meta")

    def index_assigned() -> None:
        x[[0, 1]] = x[:2]

    waiting: dict[str, Callable[[], Any]] = {
        "list": lambda: x[[0, 1]],
        "list, assigned": index_assigned,
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.isfinite().all()),
        "tensor": lambda: torch.tensor([1, 2], device="meta"),
        "to": lambda: torch.zeros(3).to("meta"),
        "copy": lambda: x.copy_(torch.zeros(4, 3), non_blocking=True),
    }
    for call in waiting.values():
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), watch:
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", REQUESTS)
def test_on_a_gpu_batches_never_wait(name: str) -> None:
    pipe = ladder.pipeline(ladder.MODELS["tiny"], torch.device("cuda"), torch.float16)
    request = request_of(pipe, name)

    def watched() -> None:
        for _ in range(4):  # whatever is done once, and captured
            through(pipe, request)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            through(pipe, request)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipe.session.call(watched)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.complex64, torch.float64, torch.float8_e4m3fn, "double", 16, ["float32"]]
)
def test_unusable_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match=r"dtype is .*: expected float32, float16 or bfloat16"):
        fastldm.Pipeline.default(dtype=dtype)


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "nowhere", 3.5, ["cpu"], "cpu:x", "\0"])
def test_unusable_devices_are_refused(device: Any) -> None:
    with pytest.raises(InputError, match=r"^device .*cpu") as refused:
        fastldm.Pipeline.default(device=device)
    assert str(refused.value).isprintable()


# ---- streams


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


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
            behind = max(k for k, (noted, *_) in enumerate(self.log[:at]) if noted == first)
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
    monkeypatch.setattr(
        Stages, "prepare", lambda self, *args, **kwargs: streams.note("read") or begin(self, *args, **kwargs)
    )
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
