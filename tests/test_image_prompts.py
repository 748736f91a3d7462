"""runtime/image_prompts.py in batches: requests with unlike pictures, in slots and captured steps, each as alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import adapter_files
import ip_adapters
import numpy as np
import ops
import pytest
import torch
from counters import Recorder
from PIL import Image
from torch import Tensor

from fastldm import Pipeline, Request
from fastldm.adapters.ip_adapter import read_ip_adapter
from fastldm.models import layers
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Embeds, Run
from fastldm.runtime.graph import Graphs
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.runtime.stages import Change


@functools.cache
def pipeline() -> Pipeline:
    """With a "plus" and a "base" adapter."""
    original = adapter_files.pipeline("sd1")
    pipe = Pipeline.from_diffusers(original)
    adapters = [
        read_ip_adapter(ip_adapters.state(original.unet, kind, seed=k), pipe.stages.spec)
        for k, kind in enumerate(("plus", "base"))
    ]
    pipe.stages.image_prompts.replace(adapters, ip_adapters.own_image_encoder())
    return pipe


def photo(seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 64, "sampler": "ddim"}
MIXED: list[dict[str, Any]] = [
    {"ip_adapter_image": [photo(1), None]},
    {},
    {"ip_adapter_image": [photo(2), photo(3)], "num_inference_steps": 5, "sampler": "euler a"},
    {"ip_adapter_image": [None, [photo(1), photo(2), photo(3)]], "guidance_scale": 1.0},
    {"guidance_scale": 1.0, "prompt": "a dog " * 40},
    {"ip_adapter_image": [photo(4), photo(4)], "ip_adapter_scale": [{"up": 0.5}, {"down": {"block_0": [1.0, 0.0]}}]},
    {"ip_adapter_image": [photo(5), None], "guidance_interval": (0.3, 0.7), "num_images_per_prompt": 2},
]


def runs_of(workloads: Sequence[dict[str, Any]] = MIXED) -> list[Run]:
    stages = pipeline().stages
    requests = [Request(**{**BASE, "seed": k, **workload}) for k, workload in enumerate(workloads)]
    return [stages.prepare(stages.complete(request)) for request in requests]


def slots(graphs: Graphs | None = None, count: int = 10, pictures: Sequence[int] = (16, 16)) -> Slots:
    unet: Any = pipeline().unet
    sizes = {"slots": count, "rows": 24, "height": 8, "width": 8, "tokens": 154, "steps": 16}
    to: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    return Slots(unet, StaticBuffers.empty(unet.config, **sizes, **to, pictures=pictures), graphs)


def finish(batch: Batch, runs: Sequence[Run], starts: Sequence[int]) -> list[Tensor]:
    done: dict[Run, Tensor] = {}
    turn = 0
    while len(done) < len(runs):
        for run, start in zip(runs, starts, strict=True):
            if start == turn:
                assert batch.holds(run)
                batch.admit(run)
        under_way = [run for run, start in zip(runs, starts, strict=True) if start <= turn and run not in done]
        batch.step(under_way)
        for run in under_way:
            if run.done:
                done[run] = batch.latents(run)
                assert batch.release(run)() is None
        turn += 1
    return [done[run] for run in runs]


def alone(workload: dict[str, Any], k: int = 0) -> Tensor:
    """As test_image_prompting.py compares with diffusers."""
    (run,) = runs_of([{"seed": k, **workload}])
    return finish(EagerBatch(pipeline().unet), [run], [0])[0]


@functools.cache
def expected() -> list[Tensor]:
    return [alone(workload, k) for k, workload in enumerate(MIXED)]


@pytest.mark.parametrize("kind", ["eager", "slots", "graphs"])
@pytest.mark.parametrize("starts", [[0] * 7, [3, 0, 1, 2, 1, 0, 4]], ids=["together", "one-after-the-other"])
def test_requests_with_unlike_pictures_share_a_batch(kind: str, starts: list[int]) -> None:
    batch: Batch = EagerBatch(pipeline().unet)
    if kind != "eager":
        batch = slots(Graphs(Recorder()) if kind == "graphs" else None)
    for made, reference in zip(finish(batch, runs_of(), starts), expected(), strict=True):
        assert ops.error(made, reference) < 1e-5


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_rows_without_pictures_pay_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that attention to pictures is computed for: those of the requests that have some."""
    rows: list[int] = []
    original = layers.attention

    def counted(q: Tensor, k: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if k.shape[1] == 12:  # neither of a text nor of a square of pixels
            rows.append(len(q))
        return original(q, k, *arguments, **options)

    three = [[photo(1), photo(2), photo(3)], None]
    workloads = [{}, {"ip_adapter_image": three}, {"guidance_scale": 1.0}, {}]
    runs = runs_of(workloads)
    monkeypatch.setattr(layers, "attention", counted)
    batch: Batch = EagerBatch(pipeline().unet) if kind == "eager" else slots(pictures=(12,))
    finish(batch, runs, [0] * len(runs))
    attentions = len(pipeline().unet.config.cross_widths)
    assert rows == [2] * attentions * BASE["num_inference_steps"]
    rows.clear()
    batch = EagerBatch(pipeline().unet) if kind == "eager" else slots(pictures=(12,))
    finish(batch, runs_of([{}, {}]), [0, 0])
    assert rows == []


def test_graphs_are_keyed_by_rows_with_pictures() -> None:
    """Other pictures, scales and numbers of pictures capture nothing; another number of rows that have some does."""
    driver = Recorder()
    batch = slots(Graphs(driver))

    def captures(**options: Any) -> int:
        before = driver.calls.count("capture")
        workloads = [{**options, "num_inference_steps": 4}, {"num_inference_steps": 4}]
        made, plain = finish(batch, runs_of(workloads), [0, 0])
        assert ops.error(made, alone(workloads[0])) < 1e-5
        assert ops.error(plain, alone(workloads[1], 1)) < 1e-5
        return driver.calls.count("capture") - before

    assert captures(ip_adapter_image=[photo(1), None]) == 1
    more: dict[str, Any] = {"prompt": "a dog", "ip_adapter_scale": [{"mid": 2.0}, 1.0]}
    assert captures(ip_adapter_image=[photo(2), None], **more) == 0
    assert captures(ip_adapter_image=[None, [photo(1), photo(2)]]) == 0, "the other adapter, as the first of a slot"
    assert captures() == 1, "none has any"
    assert captures(ip_adapter_image=[photo(1), photo(2)]) == 1, "two adapters"
    assert captures(ip_adapter_image=[photo(3), None]) == 0


def test_a_slot_keeps_nothing_of_the_last_pictures() -> None:
    batch = slots(count=2)
    for k in (2, 5, 1, 3, 0, 6):
        (run,) = runs_of([{"seed": k, **MIXED[k]}])
        (made,) = finish(batch, [run], [0])
        assert ops.error(made, expected()[k]) < 1e-5


def test_buffers_hold_as_many_tokens_as_they_have() -> None:
    one, two, many, plain = runs_of([MIXED[0], MIXED[2], {"ip_adapter_image": [None, [photo(1)] * 5]}, {}])
    assert [batch.holds(many) for batch in (slots(), slots(pictures=(32,)))] == [False, True]
    assert [slots(pictures=()).holds(run) for run in (one, two, plain)] == [False, False, True]
    assert [slots(pictures=(16,)).holds(run) for run in (one, two, plain)] == [True, False, True]
    assert slots().nbytes > slots(pictures=()).nbytes


def test_neighbours_of_broken_pictures_are_untouched() -> None:
    for kind in ("eager", "slots"):
        broken, fine, plain = runs_of([MIXED[0], MIXED[0], {}])
        for kv in broken.pictures[0]:
            assert kv is not None
            kv.fill_(torch.nan)
        batch: Batch = EagerBatch(pipeline().unet) if kind == "eager" else slots()
        for run in (broken, fine, plain):
            batch.admit(run)
        while not fine.done:
            batch.step([broken, fine, plain])
        assert ops.error(batch.latents(fine), alone(MIXED[0], 1)) < 1e-5
        assert ops.error(batch.latents(plain), alone({}, 2)) < 1e-5
        assert batch.release(broken)() == 0
        assert batch.release(fine)() is None


def test_a_callback_may_take_the_negatives_away() -> None:
    """As diffusers' SDCFGCutoffCallback does."""
    stages, made = pipeline().stages, []
    for batch in (EagerBatch(pipeline().unet), slots()):
        (run,) = runs_of([MIXED[0]])
        batch.admit(run)
        batch.step([run])
        assert run.embeds is not None
        stages.change(batch, run, Change(0.0, 0.0, embeds=Embeds(run.embeds.prompt_embeds[1:])))
        while not run.done:
            batch.step([run])
        made.append(batch.latents(run))
    assert ops.error(*made) < 1e-5
    assert ops.error(made[0], expected()[0]) > 1e-3


def test_batches_have_room_for_what_is_loaded() -> None:
    prompts = pipeline().stages.image_prompts
    assert prompts.capacity([]) == [16, 16]
    assert prompts.capacity([20]) == [32, 16]
    assert prompts.capacity([4, 4, 257]) == [16, 16, 512]
