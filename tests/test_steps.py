"""A batch that takes several steps a call: each request gets what PyTorch gives it alone, whoever watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch
from sessions import from_threads, options
from torch import Tensor

from fastldm import Cancelled, NonFinite, Pipeline, Session
from fastldm.errors import InputError
from fastldm.export import auto
from fastldm.export.auto import Measured
from fastldm.export.bundle import Bundle
from fastldm.request import Request
from fastldm.runtime import steps
from fastldm.runtime.denoise import check_finite
from fastldm.serving import bucket

CPU = torch.device("cpu")
BACKENDS = ["onnxruntime-graph", "openvino-graph"]
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(bundles.shared(tmp_path_factory) / "cache"))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return bundles.exported("sd1", True, bundles.shared(tmp_path_factory), whole_picture=True)


@pytest.fixture(scope="module")
def torch_pipe(sd1: tuple[Path, Path]) -> Pipeline:
    return Pipeline.from_pretrained(sd1[0], backend="torch", device="cpu", dtype="float32")


def load(bundle: Path, backend: str, **more: Any) -> Pipeline:
    pytest.importorskip(backend.removesuffix("-graph"), reason=f"{backend} is not installed")
    return Pipeline.from_pretrained(bundle, backend=backend, device="cpu", dtype="float32", **more)


@pytest.fixture(params=BACKENDS)
def pipe(sd1: tuple[Path, Path], request: pytest.FixtureRequest) -> Pipeline:
    return load(sd1[1], request.param)


class Counted:
    """The engine of the steps, and the rows of the tables that it was called with."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.tables = pipe.stages._steps, list[tuple[int, int]]()
        self.specs = self.engine.specs
        monkeypatch.setattr(pipe.stages, "_steps", self)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.tables.append(tuple(inputs["table"].shape[:2]))  # type: ignore[arg-type]
        return self.engine(inputs)  # type: ignore[no-any-return]


def queries() -> list[dict[str, Any]]:
    """Requests of one size that differ in all that a batch puts side by side."""
    start = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    size: dict[str, Any] = {"height": 16, "width": 16}
    return [
        options(0, 4, sampler="ddim", guidance_scale=3.0, **size),
        options(1, 5, sampler="euler a", guidance_scale=1.0, **size),
        options(2, 3, sampler="heun", guidance_scale=4.0, guidance_rescale=0.7, num_images_per_prompt=2, **size),
        options(3, 6, sampler="unipc", guidance_interval=(0.3, 0.8), prompt=" ".join(["a cat"] * 40), **size),
        options(4, 4, sampler="dpm++ 2m sde", prompt="a (red:1.3) cat", clip_skip=1, **size),
        options(5, 5, sampler="plms", image=start, strength=0.8, mask_image=np.eye(16, dtype=np.float32), **size),
    ]


def apart(images: Any, expected: Any) -> float:
    return float(np.abs(images - expected).max())


def test_concurrent_requests_are_as_alone_on_torch(pipe: Pipeline, torch_pipe: Pipeline) -> None:
    expected = [torch_pipe(**query).images for query in queries()]
    with Session(pipe, max_batch=6) as session:
        futures = from_threads(session, queries())
        found = [future.result(120) for future in futures]
    assert {result.backend for result in found} == {pipe.backend}
    assert max(apart(result.images, images) for result, images in zip(found, expected, strict=True)) < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    [
        *("sdxl", "sd1-inpaint", "sd2-v", "lcm", "sdxl-lcm", "sdxl-refiner"),
        *("sd1-edit", "sdxl-edit", "sd2-depth", "sd1-variation", "sd2-unclip"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_family_is_as_on_torch(backend: str, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, bundle = bundles.exported(family, True, bundles.shared(tmp_path_factory), whole_picture=True)
    reference = Pipeline.from_pretrained(source, backend="torch", device="cpu", dtype="float32")
    pipe = load(bundle, backend)
    for query in [bundles.for_family(family, query) for query in queries()]:
        assert apart(pipe(**query).images, reference(**query).images) < TOLERANCE


def test_nobody_watching_takes_several_rows_a_call(
    sd1: tuple[Path, Path], torch_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    monkeypatch.setattr(bucket, "CALL_SECONDS", 1e9)
    query = options(0, 6, sampler="heun", guidance_interval=(0.0, 0.5), height=16, width=16)
    counted = Counted(pipe, monkeypatch)
    pipe(**query)  # now the time of a row is known
    counted.tables.clear()
    generation = pipe.session.submit(**query)
    rows = [step.step for step in generation.progress()]
    result = generation.result(60)
    assert counted.tables == [(6, 1), (5, 1)]  # guided, and not
    assert rows == list(range(11))  # of Heun's two a step but the last
    assert len(result.timings.steps) == 11
    assert apart(result.images, torch_pipe(**query).images) < TOLERANCE


def test_rows_of_a_call_end_within_its_time(sd1: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    monkeypatch.setattr(bucket, "CALL_SECONDS", 0.0)
    counted = Counted(pipe, monkeypatch)
    for _ in range(2):
        pipe(**options(0, 4, height=16, width=16))
    assert counted.tables == [(1, 1)] * 8


def test_watched_requests_take_row_by_row(sd1: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    monkeypatch.setattr(bucket, "CALL_SECONDS", 1e9)
    query = options(0, 4, height=16, width=16)
    counted = Counted(pipe, monkeypatch)
    pipe(**query)
    counted.tables.clear()
    generation = pipe.session.submit(**query, preview=True)
    previews = [step.preview for step in generation.progress()]
    assert all(previews)
    assert counted.tables == [(1, 1)] * 4


def test_callbacks_change_latents_and_guidance(pipe: Pipeline, torch_pipe: Pipeline) -> None:
    def callback(of: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        of._guidance_scale = 2.0 + step
        return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * 0.8}

    query = options(0, 3, guidance_scale=3.0, height=16, width=16)
    names = ("latents", "prompt_embeds")
    images = [
        own(**query, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names).images
        for own in (pipe, torch_pipe)
    ]
    assert apart(*images) < TOLERANCE


def test_cancelling_ends_between_calls(sd1: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    generation = pipe.session.submit(**options(0, 500, height=16, width=16))
    next(generation.progress())
    generation.cancel()
    with pytest.raises(Cancelled, match="cancelled after"):
        generation.result(60)
    pipe(**options(0, 1, height=16, width=16))


def test_first_row_that_is_not_finite_is_named(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = pipe.stages
    request = stages.complete(Request(**options(0, 4, height=16, width=16)))
    run = stages.prepare(request)
    run.table.rows[2, 3] = np.inf  # a: of the latents
    batch = stages.new_batch(run, 1)
    batch.admit(run)
    run.at_once = 4
    batch.step([run])
    assert run.done
    assert batch.release(run)() == 2


def test_batch_invariant_images_are_bitwise_as_alone(sd1: tuple[Path, Path]) -> None:
    pipe = load(sd1[1], "onnxruntime-graph", batch_invariant=True)
    query = options(0, 3, height=16, width=16)
    together = pipe(**{**query, "seed": [0, 1], "num_images_per_prompt": 2}).images
    alone = [pipe(**{**query, "seed": seed}).images for seed in (0, 1)]
    assert all(np.array_equal(image, own[0]) for image, own in zip(together, alone, strict=True))


def test_more_images_than_a_call_takes(sd1: tuple[Path, Path], torch_pipe: Pipeline) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    query = options(0, 2, height=8, width=8, num_images_per_prompt=11)
    assert apart(pipe(**query).images, torch_pipe(**query).images) < TOLERANCE


def test_bundle_without_graphs_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, bundle = bundles.exported("sd1", True, bundles.shared(tmp_path_factory))
    with pytest.raises(InputError, match="has no graph for onnxruntime-graph: export it with --whole-picture"):
        load(bundle, "onnxruntime-graph")


def test_auto_takes_steps_where_they_were_fastest(sd1: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.read(sd1[1])
    times = {"openvino": 2.0, "onnxruntime-graph": 1.0, "onnxruntime": 3.0}
    measured = {name: Measured(0.0, seconds, "float32") for name, seconds in times.items()}
    monkeypatch.setattr(auto, "read", lambda *_: measured)
    assert auto.choose(bundle, CPU) == "onnxruntime-graph"
    without = Bundle(bundle.folder, bundle.manifest, bundle.specs)
    assert auto.choose(without, CPU) == "openvino"


def test_unknown_columns_are_refused_where_used(sd1: tuple[Path, Path]) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    stages = pipe.stages
    run = stages.prepare(stages.complete(Request(**options(0, 2, height=16, width=16))))
    batch = stages.new_batch(run, 1)
    batch.admit(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "COLUMNS", (*steps.COLUMNS, "unheard_of"))
        patch.setattr(steps, "NEUTRAL", {**steps.NEUTRAL, "unheard_of": 1.0})
        object.__setattr__(run.table, "rows", np.pad(run.table.rows, ((0, 0), (0, 1)), constant_values=1))
        run.table.rows[1, -1] = 0
        with pytest.raises(InputError, match="does not know unheard_of of the sampler's table"):
            batch.step([run])
        run.table.rows[1, -1] = 1
        batch.step([run])


def test_cfg_pp_runs_where_it_is_a_scale(sd1: tuple[Path, Path], torch_pipe: Pipeline) -> None:
    """Euler's is a scale of each row; what adds to the latents has a column that the graph does not know."""
    pipe = load(sd1[1], "onnxruntime-graph")
    query = options(0, 3, sampler="euler cfg++", guidance_scale=0.7, height=16, width=16)
    assert apart(pipe(**query).images, torch_pipe(**query).images) < TOLERANCE
    with pytest.raises(InputError, match="the bundle's graph does not know gx of the sampler's table"):
        pipe(**{**query, "sampler": "dpm++ 2m cfg++"})


def test_not_finite_start_is_an_error(sd1: tuple[Path, Path]) -> None:
    pipe = load(sd1[1], "onnxruntime-graph")
    stages = pipe.stages
    run = stages.prepare(stages.complete(Request(**options(0, 2, height=16, width=16))))
    run.latents[0, 0, 0, 0] = float("nan")
    batch = stages.new_batch(run, 1)
    batch.admit(run)
    batch.step([run])
    with pytest.raises(NonFinite, match="the latents that denoising starts from"):
        check_finite(batch.release(run)(), run.table)
