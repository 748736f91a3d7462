"""Controls of a pipeline: which a request has, and many requests with different ones in one batch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import controls
import lora
import numpy as np
import ops
import pytest
import tiny
import torch
from controls import BASE, make, picture
from counters import Launches, Nodes, Recorder
from torch import Tensor

from benchmarks.networks import SD15
from fastldm import Pipeline, Request, Session
from fastldm.errors import InputError
from fastldm.image import load_control, read_parameters, save_result
from fastldm.kernels import dispatch
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.t2i_adapter import T2IAdapter
from fastldm.models.unet import UNetEncoder
from fastldm.planning import dry_run
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.controls import ControlSelection, joined
from fastldm.runtime.denoise import Run
from fastldm.runtime.graph import Graphs
from fastldm.runtime.slots import Slots, StaticBuffers


@functools.cache
def controlled() -> Pipeline:
    """With two ControlNets and two T2I-Adapters."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=tiny.scheduler("small")))
    pipe.attach_control(controls.controlnet("sd1", 10), "outlines")
    pipe.attach_control(controls.controlnet("sd1-bgr", 11), "depth")
    pipe.attach_control(controls.t2i_adapter("full"), "sketch")
    pipe.attach_control(controls.t2i_adapter("full-grey"), "ink")
    return pipe


# --- which controls a request has ---


def test_dictionary_chooses_controls_pictures_and_weights() -> None:
    pipe = controlled()
    plain = make(pipe)
    outlines = make(pipe, control_image={"outlines": picture()}, controlnet_conditioning_scale={"outlines": 0.5})
    assert np.abs(outlines - plain).max() > 1e-2
    assert np.array_equal(make(pipe, control_image={}), plain)
    both = {"outlines": picture(), "depth": picture(2)}
    scales = {"outlines": 0.5, "depth": 0.0}
    assert np.abs(make(pipe, control_image=both, controlnet_conditioning_scale=scales) - outlines).max() < 1e-6
    alone = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=tiny.scheduler("small")))
    alone.attach_control(controls.controlnet("sd1", 10))
    single = make(alone, control_image=picture(), controlnet_conditioning_scale=0.5)
    assert np.abs(single - outlines).max() < 1e-6


def test_list_is_in_the_order_of_attaching() -> None:
    pipe = controlled()
    given = [picture(1), picture(2), picture(3), picture(4)]
    options = {"controlnet_conditioning_scale": [0.5, 0.7], "adapter_conditioning_scale": [0.3, 0.9]}
    by_name = {
        "controlnet_conditioning_scale": {"outlines": 0.5, "depth": 0.7},
        "adapter_conditioning_scale": {"sketch": 0.3, "ink": 0.9},
    }
    named = dict(zip(("ink", "sketch", "depth", "outlines"), reversed(given), strict=True))
    assert np.abs(make(pipe, control_image=given, **options) - make(pipe, control_image=named, **by_name)).max() < 1e-5


def test_image_alone_is_the_control_as_in_diffusers() -> None:
    """Text to image with a ControlNet has its picture in `image`; strength or mask_image say that it is not."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=tiny.scheduler("small")))
    edited = make(pipe, image=picture())
    pipe.attach_control(controls.controlnet("sd1"))
    expected = make(pipe, control_image=picture())
    assert np.array_equal(make(pipe, image=picture()), expected)
    assert np.array_equal(make(pipe, image=picture(), strength=0.8), edited)
    assert np.array_equal(make(pipe, image=picture(), control_image={}), edited)
    result = pipe(**BASE, seed=0, image=picture())
    assert np.array_equal(pipe(result.request).images, expected), "a request that was made is made again"


def test_size_is_that_of_the_picture() -> None:
    pipe = controlled()
    images = make(pipe, control_image={"outlines": picture().resize((100, 76))})
    assert images.shape == (1, 72, 96, 3)
    images = make(pipe, control_image={"outlines": picture().resize((100, 76))}, height=64, width=64)
    assert images.shape == (1, 64, 64, 3)


def test_sizes_are_multiples_of_what_adapters_read() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sdxl"))
    pipe.attach_control(controls.t2i_adapter("xl"), "sketch")
    assert make(pipe, control_image=picture().resize((90, 70))).shape == (1, 64, 80, 3)
    with pytest.raises(InputError, match="64x72: expected multiples of 16 pixels"):
        make(pipe, control_image=picture(), height=72, width=64)


def test_pictures_are_read_as_diffusers_reads_them() -> None:
    """-1 is what a ControlNet for inpainting reads where there is nothing."""
    processor = tiny.peer("diffusers").image_processor.VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    array = np.asarray(picture(), np.float32)[None] / 255
    holes = torch.from_numpy(array).movedim(-1, 1).clone()
    holes[:, :, :32] = -1
    for source in (picture(), picture().convert("L"), array, holes):
        for height, width in ((64, 64), (48, 72)):
            theirs = processor.preprocess(source, height=height, width=width)
            if source is not holes or (height, width) == (64, 64):
                assert (load_control(source, (height, width)) - theirs.expand(-1, 3, -1, -1)).abs().max() < 1e-6
    assert torch.equal(load_control(holes), holes)


TWO = {"outlines": picture(), "depth": picture(2)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": ({"control_image": {"lines": picture()}}, "no control named 'lines': attached are 'outlines', "),
    "too few": ({"control_image": [picture()] * 3}, "for 4 attached controls: expected a list of a picture for each"),
    "one for four": ({"control_image": picture()}, "for 4 attached controls"),
    "no picture": ({"control_image": {"outlines": 7}}, "control_image is a int: expected a PIL image"),
    "None": ({"control_image": {"outlines": None}}, "control_image is a NoneType"),
    "empty": ({"control_image": {"outlines": []}}, "control_image is an empty list"),
    "latents": ({"control_image": {"outlines": torch.zeros(1, 4, 8, 8)}}, "control_image"),
    "NaN": ({"control_image": {"outlines": np.full((64, 64, 3), np.nan)}}, "control_image has values from nan"),
    "counts": ({"control_image": {"outlines": [picture()] * 3}}, "holds 3 pictures for 'outlines': expected one, or"),
    "scales": (
        {"control_image": TWO, "controlnet_conditioning_scale": [1.0]},
        "controlnet_conditioning_scale has 1 numbers for 2 controls",
    ),
    "scale of none": (
        {"control_image": TWO, "controlnet_conditioning_scale": {"outlines": 1.0}},
        "controlnet_conditioning_scale has no number for 'depth'",
    ),
    "scale of another": (
        {"control_image": TWO, "control_guidance_end": {"lines": 1.0}},
        "no control named 'lines'",
    ),
    "start after end": (
        {"control_image": TWO, "control_guidance_start": 0.5, "control_guidance_end": [0.7, 0.5]},
        "control_guidance_start is 0.5 and control_guidance_end 0.5 for 'depth': expected start < end",
    ),
    "fraction": ({"control_image": TWO, "control_guidance_end": 1.5}, "control_guidance_end is 1.5"),
    "NaN scale": (
        {"control_image": TWO, "controlnet_conditioning_scale": float("nan")},
        "controlnet_conditioning_scale",
    ),
    "flag": ({"control_image": TWO, "guess_mode": 1}, "guess_mode is 1"),
    "factor": ({"control_image": TWO, "adapter_conditioning_factor": -0.1}, "adapter_conditioning_factor is -0.1"),
    "names": ({"control_image": {7: picture()}}, "a name in control_image is 7"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_argument_is_one_error(fault: str) -> None:
    options, message = BAD[fault]
    with pytest.raises(InputError) as caught:
        make(controlled(), **options)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_picture_without_a_control_is_refused() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("tiny-sd"))
    with pytest.raises(InputError, match="no control is attached"):
        make(pipe, control_image=picture())


def test_batch_invariant_images_are_bitwise_as_alone() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"), batch_invariant=True)
    pipe.attach_control(controls.controlnet("sd1"), "outlines")
    pipe.attach_control(controls.t2i_adapter("full"), "sketch")
    given = {"outlines": [picture(1), picture(2)], "sketch": picture(3)}
    both = make(pipe, prompt=["a cat", "a dog"], control_image=given, seed=[5, 6])
    second = make(pipe, prompt="a dog", control_image={"outlines": picture(2), "sketch": picture(3)}, seed=6)
    assert np.array_equal(both[1], second[0])


def test_long_names_of_files_are_cut(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    controls.t2i_adapter("light").save_pretrained(tmp_path / ("long" * 60))
    names = [pipe.attach_control(tmp_path / ("long" * 60)) for _ in range(2)]
    assert names == [("long" * 60)[:190], ("long" * 60)[:190] + "-2"]
    pictures = dict.fromkeys(names, picture())
    options = {"control_image": pictures, "adapter_conditioning_scale": dict.fromkeys(names, 0.5)}
    save_result(pipe("a cat", num_inference_steps=1, **options), [tmp_path / "a.png"], "tiny")
    request, _ = read_parameters(tmp_path / "a.png")
    assert request.adapter_conditioning_scale == dict.fromkeys(names, 0.5)


def test_png_says_which_controls_made_it(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    controls.t2i_adapter("light").save_pretrained(tmp_path / "sketch")
    pipe.attach_control(controls.controlnet("sd1"), 'my "lines", 1: a')
    pipe.attach_control(tmp_path / "sketch")
    options = {"controlnet_conditioning_scale": 0.75, "control_guidance_end": 0.5, "guess_mode": True}
    result = pipe("a cat", seed=0, num_inference_steps=1, control_image=[picture(), picture(2)], **options)
    save_result(result, [tmp_path / "a.png"], "tiny")
    request, fields = read_parameters(tmp_path / "a.png")
    assert (request.prompt, request.control_image) == ("a cat", None)
    mode = "Control Mode: ControlNet is more important"
    first = f'Module: none, Model: my "lines" 1 a, Weight: 0.75, Guidance Start: 0, Guidance End: 0.5, {mode}'
    digest = pipe.controls["sketch"].short_hash
    second = f"Module: none, Model: sketch [{digest}], Weight: 1, Guidance Start: 0, Guidance End: 1, {mode}"
    assert (fields["ControlNet 0"], fields["ControlNet 1"]) == (first, second)
    assert request.controlnet_conditioning_scale == {'my "lines" 1 a': 0.75, "sketch": 1.0}
    assert request.control_guidance_end == {'my "lines" 1 a': 0.5, "sketch": 1.0}
    save_result(pipe("a cat", num_inference_steps=1), [tmp_path / "b.png"], "tiny")
    assert not [name for name in read_parameters(tmp_path / "b.png")[1] if name.startswith("ControlNet")]


# --- many in one batch ---

MIXED: list[dict[str, Any]] = [
    {"control_image": {"outlines": picture(1)}},
    {"guidance_scale": 1.0},
    {"control_image": {"outlines": picture(2), "depth": picture(3)}, "num_images_per_prompt": 2},
    {"control_image": {"depth": picture(4)}, "guess_mode": True, "num_inference_steps": 5},
    {"control_image": {"sketch": picture(5)}, "adapter_conditioning_factor": 0.5},
    {"prompt": "a cat " * 50, "control_image": {"outlines": picture(6)}, "control_guidance_start": 0.3},
    {
        "control_image": {"outlines": picture(7), "sketch": picture(8), "ink": picture(9)},
        "guidance_interval": (0.3, 0.8),
    },
    {"num_inference_steps": 3},
]


def runs_of(pipe: Pipeline, workloads: Sequence[dict[str, Any]] = MIXED) -> list[Run]:
    requests = [Request(**{**BASE, "seed": k, **workload}) for k, workload in enumerate(workloads)]
    return [pipe.stages.prepare(pipe.stages.complete(request)) for request in requests]


def buffers(pipe: Pipeline, slots: int = 10, **options: Any) -> StaticBuffers:
    networks = [control.network for control in pipe.controls.values()]
    defaults: dict[str, Any] = {
        "controls": [network for network in networks if isinstance(network, ControlNet)],
        "features": True,
    }
    return StaticBuffers.empty(
        pipe.unet.config,
        slots=slots,
        rows=24,
        height=8,
        width=8,
        tokens=154,
        steps=16,
        dtype=torch.float32,
        device="cpu",
        **{**defaults, **options},
    )


def finish(batch: Batch, runs: Sequence[Run], starts: Sequence[int]) -> list[Tensor]:
    done: dict[Run, Tensor] = {}
    for turn in range(100):
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
    return [done[run] for run in runs]


@functools.cache
def expected() -> list[Tensor]:
    """Each alone, as test_peer_controls.py compares with diffusers."""
    pipe = controlled()
    return [finish(EagerBatch(pipe.unet), [run], [0])[0] for run in runs_of(pipe)]


@pytest.mark.parametrize("kind", ["eager", "slots", "graphs"])
@pytest.mark.parametrize("starts", [[0] * 8, [3, 0, 1, 2, 5, 0, 4, 1]], ids=["together", "one-after-the-other"])
def test_requests_with_different_controls_share_a_batch(kind: str, starts: list[int]) -> None:
    pipe = controlled()
    batch: Batch = EagerBatch(pipe.unet)
    if kind != "eager":
        batch = Slots(pipe.unet, buffers(pipe), Graphs(Recorder()) if kind == "graphs" else None)  # type: ignore[arg-type]
    for made, alone in zip(finish(batch, runs_of(pipe), starts), expected(), strict=True):
        assert ops.error(made, alone) < 1e-5


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ControlNet, int]]:
    """The calls of ControlNets, and with how many rows."""
    calls: list[tuple[ControlNet, int]] = []
    step = ControlNet.step

    def counted(self: ControlNet, model_input: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((self, len(model_input)))
        return step(self, model_input, *args, **options)

    monkeypatch.setattr(ControlNet, "step", counted)
    return calls


@pytest.mark.parametrize("kind", ["eager", "slots"])
def test_only_controlled_rows_are_computed(kind: str, widths: list[tuple[ControlNet, int]]) -> None:
    """One call a step of each network, with the rows that it acts on at that step, and none where it does not."""
    pipe = controlled()
    outlines, depth = (pipe.controls[name].network for name in ("outlines", "depth"))
    workloads: list[dict[str, Any]] = [
        {"num_inference_steps": 4},
        {"control_image": {"outlines": picture()}, "control_guidance_end": 0.5},
        {"control_image": {"depth": picture()}, "guess_mode": True, "control_guidance_start": 0.25},
        {"control_image": {"outlines": picture()}, "guidance_scale": 1.0},
        {"control_image": {"outlines": picture(), "depth": picture()}, "controlnet_conditioning_scale": [1.0, 0.0]},
    ]
    runs = runs_of(pipe, workloads)
    batch: Batch = EagerBatch(pipe.unet) if kind == "eager" else Slots(pipe.unet, buffers(pipe))
    finish(batch, runs, [0] * len(runs))
    assert [rows for network, rows in widths if network is outlines] == [5, 5, 3, 3]
    assert [rows for network, rows in widths if network is depth] == [1, 1, 1]


def test_what_no_step_changes_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[f"{cls.__name__}.{name}"] += isinstance(args[0], (ControlNet, T2IAdapter))
            return method(*args, **options)

        monkeypatch.setattr(cls, name, counted)

    for name in ("hint", "time_rows", "step"):
        count(ControlNet, name)
    count(UNetEncoder, "cross_kv")
    count(T2IAdapter, "forward")
    make(controlled(), control_image={"outlines": picture(), "sketch": picture(2)}, num_images_per_prompt=2)
    once = dict.fromkeys(("ControlNet.hint", "ControlNet.time_rows", "UNetEncoder.cross_kv", "T2IAdapter.forward"), 1)
    assert calls == once | {"ControlNet.step": 4}


def test_graphs_are_keyed_by_controlled_rows() -> None:
    """Other pictures, weights, prompts and samplers capture nothing; another number of controlled rows does."""
    pipe, driver = controlled(), Recorder()
    batch = Slots(pipe.unet, buffers(pipe), Graphs(driver))  # type: ignore[arg-type]

    def captures(**options: Any) -> int:
        before = driver.calls.count("capture")
        workloads = [{"num_inference_steps": 4, **options}, {}]
        runs = runs_of(pipe, workloads)
        alone = [finish(EagerBatch(pipe.unet), [run], [0])[0] for run in runs_of(pipe, workloads)]
        for made, reference in zip(finish(batch, runs, [0, 0]), alone, strict=True):
            assert ops.error(made, reference) < 1e-5
        return driver.calls.count("capture") - before

    assert captures(control_image={"outlines": picture()}) == 1
    options: dict[str, Any] = {"prompt": "a dog", "sampler": "euler a"}
    assert captures(control_image={"outlines": picture(2)}, controlnet_conditioning_scale=0.3, **options) == 0
    assert captures() == 1, "none is controlled"
    assert captures(control_image={"depth": picture()}) == 1
    assert captures(control_image={"outlines": picture(3)}) == 0


def test_slot_keeps_nothing_of_the_last_control() -> None:
    pipe = controlled()
    batch = Slots(pipe.unet, buffers(pipe, slots=1))
    workloads = [MIXED[0], MIXED[6], MIXED[4], MIXED[7], MIXED[3]]
    for workload in workloads:
        (run,) = runs_of(pipe, [workload])
        (made,) = finish(batch, [run], [0])
        (alone,) = finish(EagerBatch(pipe.unet), runs_of(pipe, [workload]), [0])
        assert ops.error(made, alone) < 1e-5


def test_buffers_without_a_control_do_not_hold_its_runs() -> None:
    pipe = controlled()
    controlled_run, adapted, plain = runs_of(pipe, [MIXED[0], MIXED[4], {}])
    batch = Slots(pipe.unet, buffers(pipe, controls=[], features=False))
    assert [batch.holds(run) for run in (controlled_run, adapted, plain)] == [False, False, True]
    held = buffers(pipe)
    assert Slots(pipe.unet, held).nbytes > batch.nbytes
    assert all(Slots(pipe.unet, held).holds(run) for run in (controlled_run, adapted, plain))


def test_neighbours_of_a_broken_control_are_untouched() -> None:
    """One whose residuals are NaN is its own request's failure."""
    pipe = controlled()
    for kind in ("eager", "slots"):
        broken, fine = runs_of(pipe, [MIXED[0], {"num_inference_steps": 4}])
        broken.controls[0].hint.fill_(torch.nan)
        batch: Batch = EagerBatch(pipe.unet) if kind == "eager" else Slots(pipe.unet, buffers(pipe))
        for run in (broken, fine):
            batch.admit(run)
        while not fine.done:
            batch.step([broken, fine])
        (alone,) = finish(EagerBatch(pipe.unet), runs_of(pipe, [{}, {"num_inference_steps": 4}])[1:], [0])
        assert ops.error(batch.latents(fine), alone) < 1e-5
        assert batch.release(broken)() == 0
        assert batch.release(fine)() is None


def test_adjacent_ranges_are_one() -> None:
    assert joined([(0, 2), (2, 3), (5, 6), (6, 8)]) == ((0, 3), (5, 8))
    assert joined([]) == ()


def test_selection_is_a_mapping_of_pictures() -> None:
    request = controlled().stages.complete(Request(**BASE, control_image={"outlines": picture()}))
    selection = request.control_image
    assert isinstance(selection, ControlSelection)
    assert dict(selection) == {"outlines": picture()}
    assert selection in {selection}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision_is_near_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.save_pipeline("sd1", tmp_path / "sd1")
    options = {"control_image": {"outlines": picture(), "sketch": picture(2)}, "num_inference_steps": 2}
    made = {}
    for kind in (torch.float32, dtype):
        pipe = Pipeline.from_pretrained(tmp_path / "sd1", dtype=kind, device="cpu")
        pipe.attach_control(controls.controlnet("sd1"), "outlines")
        pipe.attach_control(controls.t2i_adapter("full"), "sketch")
        made[kind] = make(pipe, **options)
        plain = make(pipe, num_inference_steps=2)
    assert np.abs(made[dtype] - made[torch.float32]).max() < np.abs(plain - made[torch.float32]).max() / 3


def test_session_makes_each_of_many_as_alone() -> None:
    pipe = controlled()
    workloads = [{**BASE, "seed": k, **workload} for k, workload in enumerate(MIXED)]
    alone = [pipe(**workload).images for workload in workloads]
    with Session(pipe, max_batch=4) as session:
        made = [generation.result().images for generation in [session.submit(**workload) for workload in workloads]]
    for ours, reference in zip(made, alone, strict=True):
        assert np.abs(ours - reference).max() < 2e-5  # type: ignore[operator]


def test_other_adapters_beside_each_other_have_their_controls(tmp_path: Path) -> None:
    """Adapters beside the weights are the U-Net's alone: no ControlNet's."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    pipe.attach_control(controls.controlnet("sd1"), "outlines")
    for k, name in enumerate("ab"):
        file = lora.write(tmp_path / f"{name}.safetensors", "sd1", seed=k)
        pipe.load_lora_weights(file, adapter_name=name)
    workloads: list[dict[str, Any]] = [
        {"adapters": {"a": 1.0}, "control_image": {"outlines": picture(1)}},
        {"adapters": {"b": 0.8}},
        {"adapters": {}, "control_image": {"outlines": picture(2)}, "guess_mode": True},
        {"adapters": {"a": 0.5, "b": 0.5}, "control_image": {"outlines": picture(3)}},
    ]
    alone = [make(pipe, **workload) for workload in workloads]
    with Session(pipe, max_batch=4) as session:
        generations = [session.submit(**{**BASE, "seed": 0, **workload}) for workload in workloads]
        made = [generation.result().images for generation in generations]
    for ours, reference in zip(made, alone, strict=True):
        assert np.abs(ours - reference).max() < 2e-5  # type: ignore[operator]


def test_controlnet_adds_half_of_a_steps_launches() -> None:
    """Of SD 1.5's 387: its encoder again, a product and a sum for each of 13 residuals."""
    launches, own = Launches(), ControlNetConfig(SD15, 3, (16, 32, 96, 256), False, False)
    with dispatch.targeting(launches):
        shape: dict[str, Any] = {"height": 64, "width": 64, "rows": 2, "tokens": 77, "dtype": torch.float16}
        step = dry_run.step(SD15, **shape, controls=[own])
        with Nodes() as nodes:
            step()
    assert 450 < nodes.count + launches.count <= 578
