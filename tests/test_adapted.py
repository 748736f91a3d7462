"""Which runs share a batch, and how: merged into the weights, beside them, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import lora
import numpy as np
import ops
import pytest
import tiny
import torch
from both_ways import in_slots
from counters import Recorder

from fastldm import Pipeline, Request, Session
from fastldm.adapters.forms import Change, Difference
from fastldm.adapters.read import Adapter, merged_numbers
from fastldm.adapters.targets import Target
from fastldm.planning.memory import Workload, plan
from fastldm.runtime import pages as paging
from fastldm.runtime.graph import Graphs
from fastldm.runtime.slots import Slots, StaticBuffers

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", "seed": 5}
MIXED: list[dict[str, Any]] = [
    {"a": 1.0},
    {},
    {"b": 0.5},
    {"a": 0.5, "c": 1.0},
    {"a": {"unet": {"down": 0.2, "mid": 2.0}}},
]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """With three adapters, one of all layers and a rank above a page, and one, "full", that is not of low rank."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = Pipeline.from_pretrained(tiny.save_pipeline("sd1", folder / "model"), dtype="float32")
    kinds: list[dict[str, Any]] = [{}, {"unet": lora.ALL, "rank": 20}, {"text": (), "rank": 2}]
    for k, kind in enumerate(kinds):
        file = lora.write(folder / f"{k}.safetensors", "sd1", seed=k, **kind)
        pipe.load_lora_weights(file, adapter_name="abc"[k])
    shape, generator = pipe.unet.conv_in.weight.shape, torch.Generator().manual_seed(0)
    change = Change(Difference(torch.randn(shape, generator=generator)))
    changes = MappingProxyType({Target("unet", "conv_in"): change})
    pipe.stages.adapters.add("full", Adapter("full", "nowhere", "lycoris", "0" * 12, changes, ()))
    return pipe


@pytest.fixture
def session(pipe: Pipeline) -> Iterator[Session]:
    with Session(pipe, max_batch=16) as session:
        yield session


def image(result: Any) -> Any:
    return np.asarray(result.images[0])


def together(session: Session, weights: list[Any], **options: Any) -> list[Any]:
    generations = [session.submit("a cat", adapters=w, **{**OPTIONS, **options}) for w in weights]
    return [generation.result() for generation in generations]


def test_mixed_batch_equals_each_alone(pipe: Pipeline, session: Session) -> None:
    alone = [pipe("a cat", adapters=w, **OPTIONS) for w in MIXED]
    assert [result.adapters for result in alone] == ["merged", "", "merged", "merged", "merged"]
    mixed = together(session, MIXED, num_inference_steps=3)
    assert [result.adapters for result in mixed] == ["beside", "", "beside", "beside", "beside"]
    for got, expected in zip(mixed, alone, strict=True):
        assert np.abs(image(got) - image(expected)).max() < 1e-5
    seen = [image(result) for result in alone]
    assert min(np.abs(a - b).max() for k, a in enumerate(seen) for b in seen[:k]) > 1e-3, "all are different images"


def test_rows_with_adapters_reuse_deep_features(pipe: Pipeline, session: Session) -> None:
    """Beside the weights, of which the deep part sees fewer rows: on a CPU by groups, on a GPU by pages of each row."""
    reuses = [2, 1, 3, 2, 1]
    requests = [{"adapters": w, "reuse": reuse} for w, reuse in zip(MIXED, reuses, strict=True)]
    options: dict[str, Any] = {**OPTIONS, "num_inference_steps": 4, "output_type": "latent"}
    alone = [pipe("a cat", **{**options, **request}).images for request in requests]
    mixed = [each.result() for each in [session.submit("a cat", **{**options, **request}) for request in requests]]
    assert [result.adapters for result in mixed] == ["beside", "", "beside", "beside", "beside"]
    asked = [Request(prompt="a cat", **{**options, **each}) for each in requests]
    denoised = pipe.session.call(lambda: in_slots(pipe.stages, asked, tokens=77, reuse=True))
    for expected, eager, slots in zip(alone, mixed, denoised, strict=True):
        assert ops.error(eager.images, expected) < 1e-5
        assert ops.error(slots, expected) < 1e-5


def test_equal_sets_are_merged_together(session: Session) -> None:
    together(session, [{"a": 0.5, "c": 1}])
    results = together(session, [{"a": 0.5, "c": 1}, {"c": 1.0, "a": 0.5}, {"a": 0.5, "c": 1.0}])
    assert [result.adapters for result in results] == ["merged"] * 3


def test_full_differences_take_turns(pipe: Pipeline, session: Session) -> None:
    weights: list[Any] = [{"full": 1.0}, {"a": 1.0}, {"full": 1.0}, {}, {"full": 0.5}]
    alone = [image(pipe("a cat", adapters=w, **OPTIONS)) for w in weights]
    results = together(session, weights)
    for got, expected in zip(results, alone, strict=True):
        assert np.abs(image(got) - expected).max() < 1e-5
    assert [results[k].adapters for k in (0, 2, 4)] == ["merged"] * 3
    assert np.abs(alone[0] - alone[4]).max() > 1e-3


def test_waiting_run_is_not_passed(pipe: Pipeline) -> None:
    """One that needs the weights for itself goes before those that came later, whatever these could share."""
    adapters = pipe.stages.adapters
    runs = {}
    for name, weights in (("plain", {}), ("full", {"full": 1.0}), ("late", {}), ("other", {"a": 1.0})):
        request = pipe.stages.complete(lora_request(weights))
        runs[name] = pipe.session.call(lambda request=request: pipe.stages.prepare(request))
    enter = lambda name: pipe.session.call(lambda: adapters.enter(runs[name]))  # noqa: E731
    assert enter("plain")
    assert not enter("full")
    assert not enter("late"), "it would share the weights, and waits behind the one before"
    assert not enter("other")
    pipe.session.call(lambda: adapters.leave(runs["plain"]))
    assert not enter("late")
    assert enter("full")
    pipe.session.call(lambda: adapters.leave(runs["full"]))
    assert enter("late")
    assert enter("other"), "beside"
    assert runs["other"].applied
    del runs["late"], runs["other"]  # a run that is gone is no longer under way
    assert enter("full")
    pipe.session.call(lambda: adapters.leave(runs["full"]))


def lora_request(weights: Any, steps: int = 3) -> Request:
    return Request(prompt="a cat", adapters=weights, **{**OPTIONS, "num_inference_steps": steps})


def test_batch_invariant_runs_take_turns(pipe: Pipeline) -> None:
    with Session(pipe, max_batch=8, batch_invariant=True) as session:
        alone = [image(together(session, [w])[0]) for w in MIXED]
        mixed = together(session, MIXED)
    assert all(np.array_equal(image(got), expected) for got, expected in zip(mixed, alone, strict=True))
    assert "beside" not in {result.adapters for result in mixed}


def test_swaps_capture_and_write_nothing(pipe: Pipeline) -> None:
    """Four adapters in one batch of one captured step; then four others in the same step."""
    rounds: list[list[Any]] = [
        [{"a": 1.0}, {"b": 0.5}, {"c": 0.7}, {"a": 0.5, "c": 1.0}],
        [{"b": 1.0}, {"c": -0.5}, {"a": 0.1}, {}],
        [{"c": 2.0}, {}, {}, {"b": 0.3, "c": 0.2, "a": 0.1}],
    ]
    recorder, stages = Recorder(), pipe.stages
    sizes = {"slots": 4, "rows": 8, "height": 8, "width": 8, "tokens": 77, "steps": 64}
    buffers = StaticBuffers.empty(pipe.unet.config, **sizes, dtype=torch.float32, device="cpu")  # type: ignore[arg-type]
    batch = Slots(pipe.unet, buffers, Graphs(recorder))  # type: ignore[arg-type]

    def denoised(each: list[Any]) -> list[torch.Tensor]:
        runs = [stages.prepare(stages.complete(lora_request(weights, steps=4))) for weights in each]
        assert all(stages.adapters.enter(run) for run in runs)
        for run in runs:
            batch.admit(run)
        while not runs[0].done:
            batch.step(runs)
        latents = [batch.latents(run) for run in runs]
        for run in runs:
            batch.release(run), stages.adapters.leave(run)
        return latents

    pipe.session.call(lambda: denoised([{"a": 1.0}, {}]))  # from now on beside
    made, counts = [], []
    for each in rounds:
        before = recorder.calls.count("capture"), stages.adapters.merged["step"].writes
        made.append(pipe.session.call(lambda each=each: denoised(each)))
        after = recorder.calls.count("capture"), stages.adapters.merged["step"].writes
        counts.append((after[0] - before[0], after[1] - before[1]))
    assert counts == [(1, 0), (0, 0), (0, 0)], "captures, and weights that were written"
    assert "replay" in recorder.calls
    for each, latents in zip(rounds, made, strict=True):
        for got, weights in zip(latents, each, strict=True):
            expected = pipe(lora_request(weights, steps=4), output_type="latent").images
            assert ops.error(got, expected) < 1e-5


def test_set_that_comes_twice_is_merged_again(pipe: Pipeline, session: Session) -> None:
    together(session, MIXED[:3])
    names = [pipe("a cat", adapters=w, **OPTIONS).adapters for w in ({"a": 1.0}, {"c": 1.0}, {"c": 1.0}, {"a": 1.0})]
    assert names == ["beside", "beside", "merged", "merged"]


def test_pages_make_room_on_a_gpu(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed number of pages, those that no run has are given away; what does not fit waits its turn."""
    pages = paging.Pages(pipe.unet, fixed=3)  # type: ignore[arg-type]
    select = pipe.stages.adapters.select
    a, b, c = (select({name: 1.0}) for name in "abc")  # of 1, 2 and 1 pages
    assert pages.fits([a, b])
    assert not pages.fits([a, b, c])
    held = [pages.apply(s, [a, b]) for s in (a, b)]
    assert len({page for applied in held for page, *_ in applied}) == 3
    assert pages.apply(a, [b]) == held[0], "what is there is not copied again"
    moved = pages.apply(c, [b])
    assert {page for page, *_ in moved} == {page for page, *_ in held[0]}, "a's, which nobody has"
    monkeypatch.setattr(paging, "OF_A_ROW", 1)
    assert not pages.fits([b])
    pages.close()


def test_unloading_frees_copies_and_pages(pipe: Pipeline, session: Session) -> None:
    adapters = pipe.stages.adapters
    loaded = dict(adapters.loaded)
    together(session, [*MIXED, {"full": 1.0}])
    assert adapters.nbytes > 0
    pipe.unload_lora_weights()
    together(session, [None])
    assert adapters.nbytes == 0
    for name, adapter in loaded.items():
        adapters.add(name, adapter)
    results = together(session, MIXED)
    assert "beside" in {result.adapters for result in results}


def test_copies_are_planned_before_they_are_made(pipe: Pipeline) -> None:
    adapters = pipe.stages.adapters
    selection = adapters.select({"a": 1.0, "b": 0.5})
    fresh = Pipeline.from_pretrained(pipe.stages.spec.checkpoint.source, dtype="float32")
    missing = fresh.stages.adapters.missing(selection)
    assert missing == 4 * merged_numbers([adapters.loaded[name] for name in "ab"], pipe.stages.spec)
    for name in "ab":
        fresh.stages.adapters.add(name, adapters.loaded[name])
    fresh("a cat", adapters={"a": 1.0, "b": 0.5}, **OPTIONS)
    assert fresh.stages.adapters.missing(selection) == 0
    assert fresh.stages.adapters.nbytes == missing
    workload = Workload.of_spec(pipe.stages.spec, width=64, height=64, batch=1, dtype=torch.float32, arch=0)
    planned, without = plan(replace(workload, originals=missing)), plan(workload)
    assert planned.needed - without.needed == missing
