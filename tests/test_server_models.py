"""Models by name: loaded at the start or at first use, in the room that there is."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from sessions import options, tiny_pipeline

from fastldm import Pipeline
from fastldm.errors import CheckpointError, OutOfMemory
from fastldm.planning import memory
from fastldm.server import models as module
from fastldm.server.errors import ApiError
from fastldm.server.models import Models
from fastldm.server.settings import Settings

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture
def loads(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths as they are loaded. A file's weights are not of interest here: each is the same pipeline."""
    loaded: list[str] = []

    def from_pretrained(path: str, **_: Any) -> Pipeline:
        loaded.append(path)
        return pipe

    monkeypatch.setattr(module.Pipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(Models, "_check_room", lambda self, model: None)
    return loaded


def some(load: str = "first") -> Models:
    return Models(Settings(models={name: f"/{name}" for name in NAMES}, load=load))


def room_for(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Models, model: Any) -> None:
        if len(self.loaded) >= count:
            raise OutOfMemory(f"model {model.name} needs more than there is")

    monkeypatch.setattr(Models, "_check_room", check)


async def touch(models: Models, *names: str | None) -> None:
    for name in names:
        async with models.use(name):
            pass


def loaded(models: Models) -> list[str]:
    return [model.name for model in models.loaded]


def test_first_use_loads_and_keeps(loads: list[str]) -> None:
    models = some()
    assert loads == []
    asyncio.run(touch(models, "b", "b", None))
    assert loads == ["/b", "/a"]  # no name is the first
    assert loaded(models) == ["a", "b"]


def test_start_loads_all(loads: list[str]) -> None:
    models = some("start")
    models.load()
    assert loads == ["/a", "/b", "/c"]
    asyncio.run(touch(models, *NAMES))
    assert len(loads) == 3


def test_unknown_names_are_404(loads: list[str]) -> None:
    with pytest.raises(ApiError, match="there is no model 'd': this server has 'a', 'b', 'c'") as error:
        asyncio.run(touch(some(), "d"))
    assert (error.value.status_code, error.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError):
        asyncio.run(touch(some(), "../a"))
    assert loads == []


def test_many_at_once_load_once(loads: list[str]) -> None:
    models = some()

    async def run() -> None:
        await asyncio.gather(*(touch(models, name) for name in ("a", "b") * 5))

    asyncio.run(run())
    assert sorted(loads) == ["/a", "/b"]


def test_the_longest_unused_makes_room(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(2, monkeypatch)
    models = some()
    asyncio.run(touch(models, "a", "b", "a", "c"))
    assert loaded(models) == ["a", "c"]
    asyncio.run(touch(models, "b"))
    assert loaded(models) == ["b", "c"]
    assert loads == ["/a", "/b", "/c", "/b"]


def test_models_in_use_are_not_unloaded(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(1, monkeypatch)
    models = some()

    async def run() -> None:
        async with models.use("a") as model:  # about to submit something
            with pytest.raises(OutOfMemory, match="model b needs more"):
                await touch(models, "b")
            assert model.session is not None
        await touch(models, "b")

    asyncio.run(run())
    assert loaded(models) == ["b"]


def test_models_at_work_are_not_unloaded(loads: list[str], monkeypatch: pytest.MonkeyPatch, gate: Any) -> None:
    room_for(1, monkeypatch)
    models = some()

    async def run() -> None:
        async with models.use("a") as model:
            assert model.session is not None
            generation = model.session.submit(**options())
        try:
            with pytest.raises(OutOfMemory):
                await touch(models, "b")
        finally:
            gate.set()
        await generation
        await touch(models, "b")

    asyncio.run(run())
    assert loaded(models) == ["b"]


def test_what_cannot_be_loaded_can_be_asked_again(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, **_: Any) -> Pipeline:
        raise CheckpointError(f"{path}: there is no such file")

    models = some()
    with monkeypatch.context() as patched:
        patched.setattr(module.Pipeline, "from_pretrained", broken)
        for _ in range(2):
            with pytest.raises(CheckpointError):
                asyncio.run(touch(models, "a"))
    assert models.default.users == 0
    asyncio.run(touch(models, "a"))
    assert loaded(models) == ["a"]


def test_the_memory_plan_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(Settings(load="first", device="cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "free_bytes", lambda device: 2**20)
        with pytest.raises(OutOfMemory, match=r"model default needs .* for a picture, and .* are free"):
            asyncio.run(touch(models, None))
        patched.setattr(memory, "free_bytes", lambda device: None)  # where the system does not say
        models._check_room(models.default)
        patched.setattr(memory, "free_bytes", lambda device: 2**40)
        models._check_room(models.default)
    assert loaded(models) == []


def test_adapters_are_loaded_where_they_fit(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastldm.server"), "propagate", True)
    caplog.set_level(logging.INFO, "fastldm.server")
    both = {"default": Pipeline.default(dtype="float32"), "tiny": pipe}
    models = Models(Settings(models=dict.fromkeys(both, "/"), loras={"sketch": "sketch"}), both)
    assert both["default"].get_active_adapters() == []  # for requests that name it
    assert "sketch" in models.default.session.stats().adapters  # type: ignore[union-attr]
    assert "sketch is not for tiny" in caplog.text


def test_adapters_may_be_loaded_by_their_first_request() -> None:
    default = Pipeline.default(dtype="float32")
    models = Models(Settings(loras={"sketch": "sketch", "pixel": "pixel"}, load="first"), {"default": default})

    async def use(*adapters: str) -> None:
        async with models.use(None, adapters):
            assert set(default.adapters) >= {*adapters} - {"none"}
            assert default.get_active_adapters() == []  # for requests that name it

    assert not default.adapters
    asyncio.run(use("sketch", "none"))
    assert [*default.adapters] == ["sketch"]
    before = default.adapters["sketch"]
    asyncio.run(use("pixel", "sketch"))
    assert default.adapters["sketch"] is before
    models.unload_lora("default", "sketch")
    models.unload_lora("default", "sketch")
    assert [*default.adapters] == ["pixel"]
    asyncio.run(use("sketch"))


@pytest.mark.parametrize("options", [{"loras": {"sketch": "sketch"}}, {"controls": {"shape": "shape"}}, {}])
def test_what_bundles_do_not_take_runs_on_torch(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Whether or not the model was prepared."""
    seen = []

    def opened(path: str, *, backend: str, **_: Any) -> Pipeline:
        seen.append(backend)
        return pipe

    monkeypatch.setattr(Pipeline, "from_pretrained", opened)
    Models(Settings(**options)).load()
    assert seen == ["torch" if options else "auto"]


def test_adapters_that_are_not_there_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Models(Settings(loras={"x": str(tmp_path / "none.safetensors")}))


def test_size_is_what_the_model_was_made_for(pipe: Pipeline) -> None:
    models = Models(Settings(models={"tiny": "/"}), {"tiny": pipe})
    assert models.default.size == (64, 64)
    assert models.default.idle
    models.close(cancel=True)
