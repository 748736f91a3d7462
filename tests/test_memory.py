"""planning/memory.py: the plan against the live bytes on a CPU, as torch.profiler counts them.

The profiler records every allocation in the allocator itself; the plan counts storages of tensors on the meta device.
Both count all tensors. The profiler alone counts temporaries within an op: blocks of attention's scores, and the
unfolded image where ATen convolves without oneDNN (small ones, with one thread). So the plan may be less by `SCRATCH`,
and never more, but for rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import all_families
import controls
import pytest
import tiny
import torch
from live_bytes import SCRATCH, peak_bytes
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastldm
from benchmarks.networks import CLIP_L, SD15, SDXL, VAE
from fastldm import OutOfMemory, Pipeline, Request
from fastldm import image as images
from fastldm.kernels.step import StepState
from fastldm.loading import spec as loading
from fastldm.loading.prepare import prepare
from fastldm.model import describe
from fastldm.models.unet import AddedConditions, Features
from fastldm.models.vae import decode_pieces, finish
from fastldm.planning import memory
from fastldm.planning.allocator import MIB
from fastldm.planning.memory import MemoryPlan, Workload, plan, refuse
from fastldm.runtime.complete import sample_request
from fastldm.runtime.slots import StaticBuffers

ROOT = Path(fastldm.__file__).resolve().parent.parent


def measure_phases(pipe: Pipeline, workload: Workload) -> dict[str, int]:
    """The peak of each phase of a request on this machine."""
    unet, vae, config = pipe.unet, pipe.vae, pipe.unet.config
    rows, factor = workload.batch * (2 if workload.guided else 1), vae.config.factor
    ids = torch.zeros(rows, pipe.text_stages[0].model.config.max_position, dtype=torch.long)
    text = torch.randn(rows, workload.tokens, config.cross_attention_dim, dtype=workload.dtype)
    added, times = None, workload.steps
    if config.needs_added:
        times *= rows
        added = AddedConditions(torch.randn(times, 24, dtype=workload.dtype), torch.randn(times, 6))

    def conditions() -> tuple[Tensor, tuple[Tensor, ...]]:
        return unet.time_rows(torch.zeros(times), added=added), unet.cross_kv(text)

    model_input = torch.randn(rows, config.in_channels, workload.height, workload.width, dtype=workload.dtype)
    model_input = model_input.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        temb, kv = conditions()
    temb = temb[:1].repeat(rows, 1)
    latents = torch.randn(workload.batch, 4, workload.height, workload.width)
    image = torch.randn(workload.batch, 3, workload.height * factor, workload.width * factor)

    def decode() -> None:
        z = latents / vae.config.scaling_factor
        decoded = finish(decode_pieces(vae, z.to(workload.dtype), workload.decode))
        decoded.isfinite().all()
        images.to_pixels(decoded, "pil")

    return {
        "text": peak_bytes(lambda: [stage.model(ids) for stage in pipe.text_stages]),
        "conditions": peak_bytes(conditions),
        "encode": peak_bytes(lambda: vae.encode(image.to(workload.dtype)).float()),
        "step": peak_bytes(lambda: unet.step(model_input, temb, kv)),
        "decode": peak_bytes(decode),
    }


def phases(planned: MemoryPlan) -> dict[str, int]:
    return {line.name: line.bytes for line in planned.phases}


def assert_plan_matches(pipe: Pipeline, workload: Workload) -> None:
    planned = phases(plan(workload))
    for name, real in measure_phases(pipe, workload).items():
        assert planned[name] <= 1.001 * real, name
        assert planned[name] >= real - SCRATCH * torch.get_num_threads(), name


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", {"batch": 2}),
        ("sd1", {"batch": 2, "guided": False, "decode": "sliced"}),
        ("sdxl", {"batch": 1}),  # pooled text, transformers of several layers
        ("small", {"batch": 1}),  # no attention in the VAE
    ],
)
def test_plan_matches_live_bytes(family: str, options: dict[str, Any]) -> None:
    """256 to 512 pixels, so that scratch is small beside it."""
    pipe = Pipeline.from_diffusers(tiny.pipeline(family))
    size = {"width": 32 * pipe.vae.config.factor, "height": 48 * pipe.vae.config.factor}
    assert_plan_matches(pipe, Workload.of_stages(pipe.stages, encode=True, **{"guided": True, **size, **options}))


def test_plan_of_a_tiled_decode_matches_live_bytes() -> None:
    """TAESD: 96 latents are two tiles, and nothing is normalised."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", vae=tiny.tiny_vae()))
    workload = Workload.of_stages(
        pipe.stages, width=768, height=256, batch=1, guided=False, decode="tiled", encode=True
    )
    assert_plan_matches(pipe, workload)


@pytest.mark.full
@pytest.mark.parametrize("decode", ["whole", "tiled"])
def test_plan_of_the_default_model_matches_live_bytes(decode: Any) -> None:
    pipe = Pipeline.default(device="cpu", dtype="float32")
    workload = Workload.of_stages(pipe.stages, width=448, height=320, batch=2, guided=True, decode=decode, encode=True)
    assert_plan_matches(pipe, workload)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> loading.Spec:
    return loading.describe(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("plan") / "sd1"))


def workload_of(spec: loading.Spec, **changed: Any) -> Workload:
    options = {"width": 256, "height": 256, "batch": 2, "dtype": torch.float32, "arch": 0}
    return Workload.of_spec(spec, **{**options, **changed})


def test_weights_and_buffers_are_counted_to_the_byte(spec: loading.Spec) -> None:
    planned = plan(workload_of(spec, steps=30))
    assert sum(line.bytes for line in planned.weights) == 4 * spec.parameters
    buffers = StaticBuffers.empty(
        spec.unet, slots=2, rows=4, height=32, width=32, tokens=77, steps=30, dtype=torch.float32, device="cpu"
    )
    tensors = [leaf for leaf in tree_leaves(buffers) if isinstance(leaf, Tensor)]
    assert sum(line.bytes for line in planned.buffers) == sum(t.numel() * t.element_size() for t in tensors)
    assert planned.needed == planned.resident + max(phases(planned).values())


@pytest.mark.full
def test_plan_of_a_gradient_matches_live_bytes() -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    workload = Workload.of_stages(pipe.stages, width=384, height=256, batch=2, guided=True, gradient=True)
    unet, vae = pipe.unet, pipe.vae
    with torch.no_grad():
        temb = unet.time_rows(torch.zeros(1)).repeat(2, 1)
        kv = unet.cross_kv(torch.randn(2, workload.tokens, 32))

    def gradient() -> None:
        with torch.enable_grad():
            latents = torch.randn(2, 4, 32, 48).requires_grad_()
            pictures = vae.decode(unet.step(latents, temb, kv) / vae.config.scaling_factor)
            torch.autograd.grad(pictures.sum(), latents)

    planned, real = phases(plan(workload))["gradient"], peak_bytes(gradient)
    assert 0.9 * real < planned < 1.2 * real
    assert planned > 3 * phases(plan(workload))["step"], "what is kept for the way back"
    assert "gradient" not in phases(plan(replace(workload, gradient=False)))


def test_plan_of_controls_matches_live_bytes() -> None:
    """The step with a ControlNet's residuals and a T2I-Adapter's features, pictures, weights, and a GPU's buffers."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    networks: list[Any] = [
        controls.ours_of(controls.controlnet("sd1")),
        controls.our_adapter_of(controls.t2i_adapter("full")),
    ]
    prepare({str(k): network for k, network in enumerate(networks)})
    controlnet, adapter = networks
    configs = tuple(network.config for network in networks)
    options: dict[str, Any] = {"width": 256, "height": 384, "batch": 2, "guided": True}
    without = plan(Workload.of_stages(pipe.stages, **options))
    planned = plan(Workload.of_stages(pipe.stages, **options, attached=configs, controls=configs))
    weights = [4 * sum(p.numel() for p in network.parameters()) for network in networks]
    assert [line.bytes for line in planned.weights if line.name.startswith("control")] == weights

    unet, rows = pipe.unet, 4
    picture = torch.rand(2, 3, 384, 256)
    text = torch.randn(rows, 77, unet.config.cross_attention_dim)
    model_input = torch.randn(rows, 4, 48, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times, kv = unet.time_rows(torch.zeros(rows)), unet.cross_kv(text)
        own_times, own_kv = controlnet.time_rows(torch.zeros(rows)), controlnet.cross_kv(text)
        hint = controlnet.hint(picture).repeat(2, 1, 1, 1)
        hint = hint.contiguous(memory_format=torch.channels_last)
        features = [level.repeat(2, 1, 1, 1) for level in adapter(picture)]
    features.append(torch.zeros(rows, unet.config.mid.channels, 6, 4))
    weight = torch.ones(len(unet.config.skip_channels) + 1, rows)

    def step() -> object:
        residuals = controlnet.step(model_input, own_times, own_kv, hint)._replace(weights=weight)
        return unet.step(model_input, times, kv, residuals=[residuals], features=[Features(tuple(features))])

    for name, run in (("step", step), ("control", lambda: [controlnet.hint(picture), adapter(picture)])):
        real = peak_bytes(run)
        assert phases(planned)[name] <= 1.001 * real, name
        assert phases(planned)[name] >= real - SCRATCH * torch.get_num_threads(), name
    assert phases(planned)["step"] > 1.1 * phases(without)["step"]

    held = StaticBuffers.empty(
        unet.config,
        slots=2,
        rows=4,
        height=48,
        width=32,
        tokens=77,
        steps=30,
        dtype=torch.float32,
        device="cpu",
        controls=[controlnet],
        features=True,
    )
    lines = {line.name: line.bytes for line in planned.buffers}
    (own,) = held.controls
    assert lines["controls"] == sum(t.nbytes for t in (own.hint, own.weights, own.temb, *own.text))
    assert lines["features"] == sum(t.nbytes for t in held.features)
    assert not {"controls", "features"} & {line.name for line in without.buffers}


def test_controls_count_when_a_request_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", vae=tiny.tiny_vae()))
    wide = {"conditioning_embedding_out_channels": (64, 64, 64, 64)}  # takes more than the decoder
    pipe.attach_control(controls.controlnet("sd1", **wide), "outlines")
    options: dict[str, Any] = {"width": 256, "height": 256, "batch": 1, "guided": True, "steps": 64}
    attached = tuple(control.network.config for control in pipe.controls.values())
    need = {
        used: (planned := plan(Workload.of_stages(pipe.stages, **options, attached=attached, controls=used))).needed
        - planned.loading
        for used in ((), attached)
    }
    assert need[attached] > 1.1 * need[()]
    monkeypatch.setattr(memory, "free_bytes", lambda device: sum(need.values()) // 2)
    request: dict[str, Any] = {"width": 256, "height": 256, "num_inference_steps": 1, "output_type": "np"}
    pipe("a cat", **request)
    with pytest.raises(OutOfMemory, match="1 picture of 256x256 need"):
        pipe("a cat", **request, control_image=Image.new("RGB", (64, 64)))


def test_room_for_pictures_is_counted_to_the_byte(spec: loading.Spec) -> None:
    options: dict[str, Any] = {"width": 64, "height": 64, "batch": 2, "dtype": torch.float32, "arch": 0}
    with_pictures = plan(Workload.of_spec(spec, **options, pictures=(16, 32)))
    lines = {line.name: line.bytes for line in with_pictures.buffers}
    expected = 4 * (2 * 2) * (16 + 32) * 2 * sum(spec.unet.cross_widths) + 2 * 4 * (2 * 2)  # and int32 lengths
    assert lines["pictures"] == expected
    assert "pictures" not in {line.name for line in plan(Workload.of_spec(spec, **options)).buffers}
    assert memory.upper_bound(with_pictures.workload) >= with_pictures.needed - with_pictures.loading


@pytest.mark.parametrize("arch", [0, 90])
def test_deep_features_are_counted_to_the_byte(spec: loading.Spec, arch: int) -> None:
    without, planned = (plan(workload_of(spec, arch=arch, reuse=reuse)) for reuse in (False, True))
    lines = {line.name: line.bytes for line in planned.buffers}
    rounded = 512 if arch else 1  # PyTorch's blocks on a GPU
    assert lines["deep"] == 4 * (3 * 2 + 1) * 32 * 32**2
    assert lines["deep_index"] == max(2 * 8 * 4, rounded)
    assert not {"deep", "deep_index"} & {line.name for line in without.buffers}
    assert planned.needed > without.needed
    assert memory.upper_bound(planned.workload) >= planned.needed - planned.loading


def test_plan_grows_with_the_request(spec: loading.Spec) -> None:
    base, twice = (phases(plan(workload_of(spec, width=width, encode=True))) for width in (256, 512))
    for name in ("encode", "step", "decode"):  # activations: in proportion to the pixels
        assert 1.9 < twice[name] / base[name] < 2.1, name
    assert twice["text"] == base["text"]
    larger = phases(plan(workload_of(spec, batch=4)))
    assert all(1.9 < larger[name] / base[name] < 2.1 for name in ("text", "conditions", "step", "decode"))
    bfloat16 = plan(workload_of(spec, dtype=torch.bfloat16))
    assert bfloat16.loading * 2 == plan(workload_of(spec)).loading
    unguided = plan(workload_of(spec, guided=False))
    assert phases(unguided)["step"] * 2 == base["step"]


def test_slices_and_tiles_need_less_memory(spec: loading.Spec) -> None:
    """An image of 1024 pixels is four tiles of the default size, and a quarter of it is one tile."""
    full, sliced, tiled = (
        phases(plan(workload_of(spec, width=1024, height=1024, decode=mode)))["decode"]
        for mode in ("whole", "sliced", "tiled")
    )
    assert sliced < 0.6 * full
    assert tiled < 0.5 * sliced


def test_plan_of_a_gpu_differs_from_a_cpu(spec: loading.Spec) -> None:
    """Kernels instead of ATen's chains of ops, cached phases, workspaces, and an allocator that rounds."""
    gpu, cpu = (plan(workload_of(spec, dtype=torch.float16, arch=arch)) for arch in (90, 0))
    assert phases(gpu)["step"] < phases(cpu)["step"]
    assert [line.name for line in gpu.weights][-1] == "made of weights"
    assert {line.name: line.bytes for line in gpu.libraries}["cuBLAS"] == 32 * MIB
    assert gpu.cached.bytes > 0
    assert cpu.cached.bytes == 0
    assert not cpu.libraries
    assert all(line.bytes % 512 == 0 for line in (*gpu.weights, *gpu.buffers, *gpu.phases))
    older = plan(workload_of(spec, dtype=torch.float16, arch=80))
    assert {line.name: line.bytes for line in older.libraries}["cuBLAS"] == (2 * 4096 + 8 * 16) * 1024


def test_plan_reads_the_workspace_setting_of_cublas(spec: loading.Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert memory._libraries(90)[0].bytes == 8 * 16 * 1024


def test_refusal_names_both_sizes_and_remedies(spec: loading.Spec) -> None:
    planned = plan(workload_of(spec, width=1024, height=1024))
    needed = planned.needed - planned.loading
    refuse(planned, needed, "2 pictures of 1024x1024")
    single = plan(workload_of(spec, width=1024, height=1024, batch=1))
    sliced = plan(workload_of(spec, width=1024, height=1024, decode="sliced"))
    free = max(single.needed, sliced.needed) - planned.loading
    with pytest.raises(OutOfMemory) as refused:
        refuse(planned, free, "2 pictures of 1024x1024")
    message = str(refused.value)
    assert message.startswith("2 pictures of 1024x1024 need ")
    assert memory.size(needed) in message
    assert memory.size(free) in message
    assert "sliced decode, or tiled decode" in message
    assert "1 picture at once" in message
    for remedy in planned.remedies(free + planned.loading):
        assert remedy.fits(free + planned.loading)
    with pytest.raises(OutOfMemory, match="a smaller size, or a device with more memory"):
        refuse(planned, 1000, "2 pictures of 1024x1024")


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "small"])
def test_upper_bound_is_never_below_the_plan(family: str, arch: int) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline(family))
    for width, batch, steps in ((8, 1, 1), (64, 1, 200), (512, 3, 20), (1024, 1, 30)):
        workload = Workload.of_stages(
            pipe.stages, width=width, height=256, batch=batch, guided=True, encode=True, steps=steps
        )
        planned = plan(replace(workload, arch=arch))
        assert memory.upper_bound(planned.workload) >= planned.needed - planned.loading


def test_upper_bound_is_within_five_times_at_full_size() -> None:
    for unet, size in ((SD15, 64), (SDXL, 128)):
        for arch, dtype in ((90, torch.float16), (0, torch.float32)):
            workload = Workload(unet, VAE, (CLIP_L,), size, size, 1, True, dtype, arch)
            planned = plan(workload)
            assert 1 < memory.upper_bound(workload) / (planned.needed - planned.loading) < 5


def test_check_plans_only_above_the_upper_bound(spec: loading.Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(spec, width=1024, height=1024)
    needed = plan(workload).needed - plan(workload).loading
    memory.check(workload, needed, "2 pictures")
    with pytest.raises(OutOfMemory, match="2 pictures need"):
        memory.check(workload, needed - 1, "2 pictures")
    monkeypatch.setattr(memory, "plan", lambda workload: pytest.fail("a plan was computed"))
    memory.check(workload, 2**40, "2 pictures")


def test_largest_batch_that_fits_is_found(spec: loading.Spec) -> None:
    workload = workload_of(spec, batch=9)
    for expected_batch in (1, 5, 8):
        free = plan(replace(workload, batch=expected_batch)).needed
        largest = memory._largest_batch(workload, free)
        assert largest is not None
        assert largest.workload.batch == expected_batch
    assert memory._largest_batch(workload, plan(replace(workload, batch=1)).needed - 1) is None


def test_plan_serialises_to_json(spec: loading.Spec) -> None:
    planned = plan(workload_of(spec))
    report = json.loads(json.dumps(planned.to_dict()))
    components = [report[component] for component in ("weights", "buffers", "libraries")]
    assert (
        sum(line["bytes"] for component in components for line in component) == report["resident"] == planned.resident
    )
    assert report["resident"] + max(line["bytes"] for line in report["phases"]) == report["needed"]
    assert report["needed"] + report["cached"]["bytes"] == report["peak"] == planned.peak
    assert report["workload"]["width"] == 256
    fields = {*StaticBuffers._fields, *StepState._fields} - {
        "step",
        "controls",
        "features",
        "pictures",
        "deep",
        "deep_index",
    }
    assert {line["name"] for line in report["buffers"]} == fields


def test_planning_allocates_nothing(tmp_path: Path) -> None:
    """SDXL in float32, 2.6 G parameters in the U-Net alone: 10 GiB of weights."""
    code = """
import resource, torch
from benchmarks.networks import CLIP_L, SDXL, VAE
from fastldm.planning.memory import Workload, plan
def workload(size):
    return Workload(SDXL, VAE, (CLIP_L,), size, size, 1, True, torch.float32, 0)
plan(workload(8))  # imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
planned = plan(workload(128))
print(planned.needed, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed, grown = map(int, done.stdout.split())
    assert needed > 12 * 2**30
    assert grown < 32 * MIB


FEW = ("consistency", "x2-upscaler", "if-super-resolution")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in all_families.MAKERS]
)
def test_plans_of_configs_are_those_of_requests(name: str, tmp_path: Path) -> None:
    """Of every family beside Stable Diffusion, weights, buffers and phases, with what its request cannot do without;
    weights are those that the pipeline has."""
    pipe = Pipeline.from_pretrained(all_families.save(name, tmp_path), device="cpu", dtype="float32")
    spec = describe(tmp_path / name)
    width, height = spec.own_size  # of Karlo not that of its pictures
    request = pipe.stages.complete(Request(**sample_request(spec), num_inference_steps=3, seed=0))
    asked = memory.plan(memory.Workload.of_request(pipe.stages, request))
    sizes: dict[str, Any] = {"width": width, "height": height, "batch": 1, "dtype": torch.float32, "arch": 0}
    planned = memory.plan(memory.Workload.of_spec(spec, **sizes, steps=3))
    assert planned.weights == asked.weights
    assert planned.buffers == asked.buffers
    assert planned.phases == asked.phases
    own = spec.parameters - sum(each.parameters for each in spec.follows)
    assert sum(line.bytes for line in planned.weights) >= 4 * own
    assert ("encode" in {line.name for line in planned.phases}) == (name == "x2-upscaler")
    assert all(line.bytes for line in planned.phases if line.name in ("conditions", "step", "decode"))
