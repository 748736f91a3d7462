"""Runs that reuse deep features, in batches with runs that do not: each as alone, and as the judge has it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import controls
import numpy as np
import ops
import pytest
import tiny
import torch
from controls import picture
from counters import Recorder
from reusing import Reusing
from torch import Tensor

from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.models.controlnet import ControlNet
from fastldm.models.unet import UNet
from fastldm.runtime import slots
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Run, denoise
from fastldm.runtime.graph import Graphs
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.runtime.stages import Change

BASE: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": 5,
    "guidance_scale": 4.0,
    "height": 64,
    "width": 64,
    "sampler": "ddim",
}
MIXED: list[dict[str, Any]] = [
    {"reuse": 2},
    {"num_inference_steps": 4},
    {"reuse": 3, "num_images_per_prompt": 2, "guidance_scale": 1.0, "num_inference_steps": 7},
    {"reuse": 2, "sampler": "heun", "prompt": "a dog " * 40, "num_inference_steps": 4},
    {"reuse": 2, "guidance_interval": (0.3, 0.8), "num_inference_steps": 8},
    {"reuse": 2, "control_image": {"outlines": picture(1)}, "control_guidance_end": 0.7},
    {"reuse": 4, "control_image": {"sketch": picture(2), "outlines": picture(3)}, "guess_mode": True},
    {"control_image": {"outlines": picture(4)}, "guidance_scale": 1.0},
    {"reuse": 3, "control_image": {"outlines": picture(5)}, "guess_mode": True, "image_scale": 1.5},
    {"reuse": 2, "control_image": {"sketch": picture(2), "outlines": picture(3)}, "image_scale": 1.0},
]


@functools.cache
def pipeline() -> Pipeline:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.attach_control(controls.controlnet("sd1", 10), "outlines")
    pipe.attach_control(controls.t2i_adapter("full"), "sketch")
    return pipe


def run_of(workload: dict[str, Any], seed: int = 0) -> Run:
    """image_scale: for three rows, as of InstructPix2Pix."""
    stages, options = pipeline().stages, {**BASE, "seed": seed, **workload}
    image_scale = options.pop("image_scale", None)
    run = stages.prepare(stages.complete(Request(**options)))
    run.guidance = replace(run.guidance, image_scale=image_scale)
    return run


def batch_of(kind: str, reuse: bool = True) -> Batch:
    """kind: "eager", "slots", or "graphs" that are recorded."""
    unet: Any = pipeline().unet
    if kind == "eager":
        return EagerBatch(unet)
    networks = [control.network for control in pipeline().controls.values()]
    buffers = StaticBuffers.empty(
        unet.config,
        slots=12,
        rows=32,
        height=8,
        width=8,
        tokens=154,
        steps=16,
        dtype=torch.float32,
        device="cpu",
        controls=[network for network in networks if isinstance(network, ControlNet)],
        features=True,
        reuse=reuse,
    )
    if buffers.deep is not None:
        buffers.deep.fill_(float("nan"))  # what nobody has kept is not read
    return Slots(unet, buffers, Graphs(Recorder()) if kind == "graphs" else None)


def finish(batch: Batch, runs: Sequence[Run], starts: Sequence[int] | None = None) -> list[Tensor]:
    done: dict[Run, Tensor] = {}
    starts, turn = starts or [0] * len(runs), 0
    while len(done) < len(runs):
        for run, start in zip(runs, starts, strict=True):
            if start == turn:
                assert batch.holds(run)
                batch.admit(run)
        under_way = [run for run, start in zip(runs, starts, strict=True) if start <= turn and run not in done]
        if under_way:
            batch.step(under_way)
        for run in under_way:
            if run.done:
                done[run] = batch.latents(run)
                assert batch.release(run)() is None
        turn += 1
    return [done[run] for run in runs]


@functools.cache
def expected() -> list[Tensor]:
    """Each alone, as test_peer_reuse.py compares with diffusers, and below those of three rows."""
    return [finish(batch_of("eager"), [run_of(workload, k)])[0] for k, workload in enumerate(MIXED)]


@pytest.mark.parametrize("kind", ["eager", "slots", "graphs"])
@pytest.mark.parametrize("starts", [[0] * 10, [3, 0, 1, 2, 5, 0, 4, 1, 2, 0]], ids=["together", "one-after-the-other"])
def test_requests_of_different_reuse_share_a_batch(kind: str, starts: list[int]) -> None:
    runs = [run_of(workload, k) for k, workload in enumerate(MIXED)]
    for got, alone in zip(finish(batch_of(kind), runs, starts), expected(), strict=True):
        assert ops.error(got, alone) < 1e-5


@pytest.mark.parametrize("kind", ["eager", "slots"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("image_scale", [None, 1.5])
def test_rows_compute_what_a_branch_lacks(kind: str, interval: tuple[float, float], image_scale: float | None) -> None:
    """The loop of one run around diffusers' U-Net. Where guidance begins, the unconditional branch has kept nothing."""
    theirs = tiny.unet("sd1")
    workload: dict[str, Any] = {"reuse": 3, "guidance_interval": interval, "num_inference_steps": 8}
    workload["image_scale"] = image_scale
    run = run_of(workload)
    theirs.up_blocks[-2].register_forward_hook(Reusing(3, run.table_branches))

    def network(model_input: Tensor, row: int, branches: tuple[int, ...]) -> Tensor:
        assert run.embeds is not None
        text = run.embeds.prompt_embeds[[run.guidance.texts[branch] for branch in branches]]
        return theirs(model_input, float(run.table.timesteps[row]), text).sample

    (got,) = finish(batch_of(kind), [run_of(workload)])
    assert ops.error(got, denoise(network, run)) < 1e-5
    (plain,) = finish(batch_of(kind), [run_of({**workload, "reuse": 1})])
    assert ops.error(got, plain) > 1e-4


class Deep:
    """Counts the rows that the deep part is computed for, at each call of the U-Net."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        unet: Any = pipeline().unet
        step, pending = UNet.step, unet.mid_block.resnets[0].pending

        def counted(*args: Any, **options: Any) -> Tensor:
            self.rows.append(0)
            return step(*args, **options)

        def counted_rows(x: Tensor, *args: Any, **options: Any) -> Any:
            self.rows[-1] += len(x)
            return pending(x, *args, **options)

        monkeypatch.setattr(UNet, "step", counted)
        monkeypatch.setattr(unet.mid_block.resnets[0], "pending", counted_rows)


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_only_rows_that_need_it_run_the_deep_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Deep(monkeypatch)
    workloads = [{"reuse": 2}, {"reuse": 3, "guidance_scale": 1.0}, {"num_inference_steps": 3, "guidance_scale": 1.0}]
    finish(batch_of(kind), [run_of(workload) for workload in workloads])
    assert deep.rows == [4, 1, 3, 1, 2]
    deep.rows.clear()
    finish(batch_of(kind), [run_of({"reuse": 2}), run_of({"reuse": 2, "guidance_scale": 1.0})])
    assert deep.rows == [3, 0, 3, 0, 3]


def test_controls_are_deep_where_their_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ControlNet, too, computes its deep half for rows of the U-Net that compute theirs."""
    rows: list[int] = []
    network: Any = pipeline().controls["outlines"].network
    pending = network.mid_block.resnets[0].pending

    def counted(x: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(x))
        return pending(x, *args, **options)

    monkeypatch.setattr(network.mid_block.resnets[0], "pending", counted)
    controlled = {"control_image": {"outlines": picture(1)}}
    for kind in ("eager", "slots"):
        rows.clear()
        workloads = [{"reuse": 2, **controlled}, {"reuse": 3, **controlled}, {"num_inference_steps": 2}]
        finish(batch_of(kind), [run_of(workload) for workload in workloads])
        assert rows == [4, 2, 2, 2]


def test_graphs_are_keyed_by_rows_that_compute_all() -> None:
    """Two graphs for one request: all rows, and none. One that never reuses has its own beside another batch's."""
    batch: Any = batch_of("graphs")
    finish(batch, [run_of({"reuse": 2, "num_inference_steps": 9})])
    assert batch.graphs.driver.calls.count("capture") == 2
    assert sorted(key[5] for key in batch.graphs._captured) == [0, 2]
    finish(batch, [run_of({"reuse": 3, "num_inference_steps": 9}, 1)])
    assert batch.graphs.driver.calls.count("capture") == 2
    finish(batch, [run_of({"num_inference_steps": 3})])
    assert batch.graphs.driver.calls.count("capture") == 3
    assert [key[5] for key in batch.graphs._captured] == [2, 0, None]


def test_maps_are_sent_only_where_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request alone, or several in step, sends none while some rows reuse and later ones do not."""
    sent: list[int] = []
    send = slots.send_numbers
    monkeypatch.setattr(slots, "send_numbers", lambda *args: sent.append(1) or send(*args))

    def counts(workloads: list[dict[str, Any]]) -> list[bool]:
        batch, runs, seen = batch_of("slots"), [run_of(workload) for workload in workloads], []
        for run in runs:
            batch.admit(run)
        for _ in range(5):
            before = len(sent)
            batch.step(runs)
            seen.append(len(sent) > before)
        return seen

    assert counts([{"reuse": 2}]) == [True] + [False] * 4
    assert counts([{"reuse": 2}, {"reuse": 2}]) == [True] + [False] * 4
    assert counts([{"reuse": 2}, {}]) == [True] * 5


def test_changed_text_computes_all_again(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Deep(monkeypatch)
    stages = pipeline().stages
    for kind in ("eager", "slots"):
        batch, run = batch_of(kind), run_of({"reuse": 4})
        batch.admit(run)
        deep.rows.clear()
        for row in range(5):
            if row == 2:
                assert run.embeds is not None
                embeds = run.embeds._replace(prompt_embeds=run.embeds.prompt_embeds.flip(1))
                stages.change(batch, run, Change(4.0, 0.0, embeds=embeds))
            batch.step([run])
        assert deep.rows == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_without_reuse_nothing_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is called as ever, with all rows, and nothing is kept; buffers have no room, and take no reuse."""
    calls: list[Any] = []
    step = UNet.step
    monkeypatch.setattr(UNet, "step", lambda *a, **o: calls.append(o.get("reuse")) or step(*a, **o))
    batch = batch_of(kind, reuse=False)
    finish(batch, [run_of({}), run_of({"guidance_scale": 1.0})])
    assert calls == [None] * 5
    assert batch.holds(run_of({"reuse": 2})) == (kind == "eager")
    if isinstance(batch, Slots):
        kept = batch_of("slots")
        assert kept.nbytes - batch.nbytes == 4 * 37 * 32 * 64 + 2 * 8 * 32


def test_unet_of_one_level_has_nothing_deep() -> None:
    one: dict[str, Any] = {"down_block_types": (tiny.CROSS_DOWN,), "up_block_types": (tiny.CROSS_UP,)}
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", unet=tiny.unet("sd1", block_out_channels=(16,), **one)))
    with pytest.raises(InputError, match="reuse is 2, and this model's U-Net has one level"):
        pipe("a cat", reuse=2)


def test_batch_invariant_images_are_bitwise_as_alone() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"), batch_invariant=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "reuse": 2, "output_type": "np"}
    both = pipe(["a cat", "a dog"], seed=[5, 6], **options).images
    alone = pipe("a dog", seed=6, **options).images
    assert np.array_equal(both[1], alone[0])
    assert not np.array_equal(both[1], pipe("a dog", seed=6, **{**options, "reuse": 1}).images[0])
