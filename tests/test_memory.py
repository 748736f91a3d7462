"""The memory plan, held against the bytes that really were alive on a CPU, as torch.profiler counts them.

The profiler hears of every allocation from the allocator itself; the plan is made of storages of tensors on the meta
device. Both see all that is a tensor. The profiler alone sees what an op takes and gives back within itself: blocks of
attention's scores, and the unfolded picture where ATen convolves without oneDNN (small ones, with one thread). So the
plan may be less by that, `SCRATCH`, and never more, but for what ends a byte earlier or later.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastldm
from benchmarks.networks import CLIP_L, SD15, SDXL, VAE
from fastldm import OutOfMemory, Pipeline
from fastldm import image as images
from fastldm.kernels.step import StepState
from fastldm.loading import spec as loading
from fastldm.models.unet import AddedConditions
from fastldm.models.vae import decode_pieces, finish
from fastldm.planning import memory
from fastldm.planning.allocator import MIB, CUDAHeap, Heap, record
from fastldm.planning.memory import MemoryPlan, Workload, plan, refuse
from fastldm.runtime.slots import StaticBuffers

ROOT = Path(fastldm.__file__).resolve().parent.parent
SCRATCH = 512 * 1024


def most_alive(work: Callable[[], object]) -> int:
    with torch.no_grad():
        work()  # what is made once, such as a thread's plans
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    alive = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def really(pipe: Pipeline, asked: Workload) -> dict[str, int]:
    """What each phase of a request needs on this machine."""
    unet, vae, config = pipe.unet, pipe.vae, pipe.unet.config
    rows, factor = asked.batch * (2 if asked.guided else 1), vae.config.factor
    ids = torch.zeros(rows, pipe.text_stages[0].model.config.max_position, dtype=torch.long)
    text = torch.randn(rows, asked.tokens, config.cross_attention_dim, dtype=asked.dtype)
    added, times = None, asked.steps
    if config.needs_added:
        times *= rows
        added = AddedConditions(torch.randn(times, 24, dtype=asked.dtype), torch.randn(times, 6))

    def conditions() -> tuple[Tensor, tuple[Tensor, ...]]:
        return unet.time_rows(torch.zeros(times), added=added), unet.cross_kv(text)

    u = torch.randn(rows, config.in_channels, asked.height, asked.width, dtype=asked.dtype)
    u = u.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        temb, kv = conditions()
    temb = temb[:1].repeat(rows, 1)
    latents = torch.randn(asked.batch, 4, asked.height, asked.width)
    picture = torch.randn(asked.batch, 3, asked.height * factor, asked.width * factor)

    def decode() -> None:
        z = latents / vae.config.scaling_factor
        decoded = finish(decode_pieces(vae, z.to(asked.dtype), asked.decode))
        decoded.isfinite().all()
        images.to_pixels(decoded, "pil")

    return {
        "text": most_alive(lambda: [stage.model(ids) for stage in pipe.text_stages]),
        "conditions": most_alive(conditions),
        "encode": most_alive(lambda: vae.encode(picture.to(asked.dtype)).float()),
        "step": most_alive(lambda: unet.step(u, temb, kv)),
        "decode": most_alive(decode),
    }


def phases(made: MemoryPlan) -> dict[str, int]:
    return {line.name: line.bytes for line in made.phases}


def held_against_reality(pipe: Pipeline, asked: Workload) -> None:
    planned = phases(plan(asked))
    for name, real in really(pipe, asked).items():
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
def test_the_plan_is_what_is_really_alive(family: str, options: dict[str, Any]) -> None:
    """256 to 512 pixels, so that scratch is small beside it."""
    pipe = Pipeline.from_diffusers(tiny.pipeline(family))
    place = {"width": 32 * pipe.vae.config.factor, "height": 48 * pipe.vae.config.factor}
    held_against_reality(pipe, Workload.of_stages(pipe.stages, encode=True, **{"guided": True, **place, **options}))


def test_the_plan_of_a_tiled_decode_is_what_is_really_alive() -> None:
    """TAESD: 96 latents are two tiles, and nothing is normalised."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", vae=tiny.tiny_vae()))
    asked = Workload.of_stages(pipe.stages, width=768, height=256, batch=1, guided=False, decode="tiled", encode=True)
    held_against_reality(pipe, asked)


@pytest.mark.full
@pytest.mark.parametrize("decode", ["whole", "tiled"])
def test_the_plan_of_the_default_model_at_its_largest(decode: Any) -> None:
    pipe = Pipeline.default(device="cpu", dtype="float32")
    asked = Workload.of_stages(pipe.stages, width=448, height=320, batch=2, guided=True, decode=decode, encode=True)
    held_against_reality(pipe, asked)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> loading.Spec:
    return loading.describe(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("plan") / "sd1"))


def asked_of(spec: loading.Spec, **changed: Any) -> Workload:
    given = {"width": 256, "height": 256, "batch": 2, "dtype": torch.float32, "arch": 0}
    return Workload.of_spec(spec, **{**given, **changed})


def test_weights_and_buffers_are_counted_to_the_byte(spec: loading.Spec) -> None:
    made = plan(asked_of(spec, steps=30))
    assert sum(line.bytes for line in made.weights) == 4 * spec.parameters
    buffers = StaticBuffers.empty(
        spec.unet, slots=2, rows=4, height=32, width=32, tokens=77, steps=30, dtype=torch.float32, device="cpu"
    )
    tensors = [t for t in (*buffers.step, buffers.temb, *buffers.text, buffers.kv_len, buffers.maps) if t is not None]
    assert sum(line.bytes for line in made.buffers) == sum(t.numel() * t.element_size() for t in tensors)
    assert made.needed == made.resident + max(phases(made).values())


def test_it_grows_with_the_request(spec: loading.Spec) -> None:
    once, twice = (phases(plan(asked_of(spec, width=width, encode=True))) for width in (256, 512))
    for name in ("encode", "step", "decode"):  # activations: in proportion to the pixels
        assert 1.9 < twice[name] / once[name] < 2.1, name
    assert twice["text"] == once["text"]
    more = phases(plan(asked_of(spec, batch=4)))
    assert all(1.9 < more[name] / once[name] < 2.1 for name in ("text", "conditions", "step", "decode"))
    half = plan(asked_of(spec, dtype=torch.bfloat16))
    assert half.loading * 2 == plan(asked_of(spec)).loading
    unguided = plan(asked_of(spec, guided=False))
    assert phases(unguided)["step"] * 2 == once["step"]


def test_slices_and_tiles_need_less(spec: loading.Spec) -> None:
    """A picture of 1024 pixels is four tiles by the default size, and a quarter of one is a tile."""
    whole, sliced, tiled = (
        phases(plan(asked_of(spec, width=1024, height=1024, decode=how)))["decode"]
        for how in ("whole", "sliced", "tiled")
    )
    assert sliced < 0.6 * whole
    assert tiled < 0.5 * sliced


def test_a_gpu_has_its_own_plan(spec: loading.Spec) -> None:
    """Kernels instead of ATen's chains of ops, phases that are kept, workspaces, and an allocator that rounds."""
    gpu, cpu = (plan(asked_of(spec, dtype=torch.float16, arch=arch)) for arch in (90, 0))
    assert phases(gpu)["step"] < phases(cpu)["step"]
    assert [line.name for line in gpu.weights][-1] == "made of weights"
    assert {line.name: line.bytes for line in gpu.libraries}["cuBLAS"] == 32 * MIB
    assert gpu.cached.bytes > 0
    assert cpu.cached.bytes == 0
    assert not cpu.libraries
    assert all(line.bytes % 512 == 0 for line in (*gpu.weights, *gpu.buffers, *gpu.phases))
    older = plan(asked_of(spec, dtype=torch.float16, arch=80))
    assert {line.name: line.bytes for line in older.libraries}["cuBLAS"] == (2 * 4096 + 8 * 16) * 1024


def test_cublas_says_how_much_it_takes(spec: loading.Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert memory._libraries(90)[0].bytes == 8 * 16 * 1024


def test_what_cannot_fit_is_refused_with_both_numbers_and_what_would(spec: loading.Spec) -> None:
    made = plan(asked_of(spec, width=1024, height=1024))
    needed = made.needed - made.loading
    refuse(made, needed, "2 pictures of 1024x1024")
    one = plan(asked_of(spec, width=1024, height=1024, batch=1))
    sliced = plan(asked_of(spec, width=1024, height=1024, decode="sliced"))
    free = max(one.needed, sliced.needed) - made.loading
    with pytest.raises(OutOfMemory) as refused:
        refuse(made, free, "2 pictures of 1024x1024")
    said = str(refused.value)
    assert said.startswith("2 pictures of 1024x1024 need ")
    assert memory.size(needed) in said
    assert memory.size(free) in said
    assert "sliced decode, or tiled decode" in said
    assert "1 picture at once" in said
    for other in made.remedies(free + made.loading):
        assert other.fits(free + made.loading)
    with pytest.raises(OutOfMemory, match="a smaller size, or a device with more memory"):
        refuse(made, 1000, "2 pictures of 1024x1024")


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "small"])
def test_nothing_is_let_through_that_the_plan_would_refuse(family: str, arch: int) -> None:
    pipe = Pipeline.from_diffusers(tiny.pipeline(family))
    for width, batch, steps in ((8, 1, 1), (64, 1, 200), (512, 3, 20), (1024, 1, 30)):
        asked = Workload.of_stages(
            pipe.stages, width=width, height=256, batch=batch, guided=True, encode=True, steps=steps
        )
        made = plan(replace(asked, arch=arch))
        assert memory.at_most(made.workload) >= made.needed - made.loading


def test_the_bound_holds_for_full_sizes_and_is_no_waste_of_memory() -> None:
    for unet, size in ((SD15, 64), (SDXL, 128)):
        for arch, dtype in ((90, torch.float16), (0, torch.float32)):
            asked = Workload(unet, VAE, (CLIP_L,), size, size, 1, True, dtype, arch)
            made = plan(asked)
            assert 1 < memory.at_most(asked) / (made.needed - made.loading) < 5


def test_a_plan_is_made_only_where_it_is_close(spec: loading.Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of(spec, width=1024, height=1024)
    needed = plan(asked).needed - plan(asked).loading
    memory.check(asked, needed, "2 pictures")
    with pytest.raises(OutOfMemory, match="2 pictures need"):
        memory.check(asked, needed - 1, "2 pictures")
    monkeypatch.setattr(memory, "plan", lambda workload: pytest.fail("a plan was made"))
    memory.check(asked, 2**40, "2 pictures")


def test_the_largest_batch_is_found(spec: loading.Spec) -> None:
    asked = asked_of(spec, batch=9)
    for right in (1, 5, 8):
        free = plan(replace(asked, batch=right)).needed
        found = memory._largest_batch(asked, free)
        assert found is not None
        assert found.workload.batch == right
    assert memory._largest_batch(asked, plan(replace(asked, batch=1)).needed - 1) is None


def test_all_is_told_as_plain_data(spec: loading.Spec) -> None:
    made = plan(asked_of(spec))
    told = json.loads(json.dumps(made.to_dict()))
    parts = [told[part] for part in ("weights", "buffers", "libraries")]
    assert sum(line["bytes"] for part in parts for line in part) == told["resident"] == made.resident
    assert told["resident"] + max(line["bytes"] for line in told["phases"]) == told["needed"]
    assert told["needed"] + told["cached"]["bytes"] == told["peak"] == made.peak
    assert told["workload"]["width"] == 256
    fields = {*StaticBuffers._fields, *StepState._fields} - {"step"}
    assert {line["name"] for line in told["buffers"]} == fields


def test_planning_allocates_nothing(tmp_path: Path) -> None:
    """SDXL in float32, 2.6 G parameters in the U-Net alone: 10 GiB of weights."""
    code = """
import resource, torch
from benchmarks.networks import CLIP_L, SDXL, VAE
from fastldm.planning.memory import Workload, plan
def asked(size):
    return Workload(SDXL, VAE, (CLIP_L,), size, size, 1, True, torch.float32, 0)
plan(asked(8))  # imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = plan(asked(128))
print(made.needed, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed, grown = map(int, done.stdout.split())
    assert needed > 12 * 2**30
    assert grown < 32 * MIB


# ---------------------------------------------------------------------------------------------------- the allocators


def test_a_trace_has_what_comes_and_goes_but_no_views() -> None:
    kept = torch.empty(100, device="meta")

    def work() -> None:
        a = kept + 1  # 400 bytes
        b = a.view(10, 10).t()[2:]
        a += 1
        del a
        c = torch.cat([b, b])  # 640 bytes, with a still alive by its view
        del b
        c.mul(2)  # 640 more, without a

    heap = Heap()
    assert heap.run(record(work)) == 640 + 640
    assert heap.live == 0
    assert record(lambda: kept[2:]) == ()


def test_attention_writes_no_scores() -> None:
    q = torch.empty(2, 3, 1000, 16, device="meta")
    work = torch.nn.functional.scaled_dot_product_attention
    assert Heap().run(record(lambda: work(q, q, q))) == 4 * 2 * 3 * 1000 * (16 + 1)


def test_the_caching_allocator() -> None:
    """By hand from the rules: a segment of 2 MiB for what is small, of 20 MiB for what is less than 10 MiB, its own for
    the rest."""
    heap = CUDAHeap()
    assert heap.hold([1]) == 512
    assert heap.reserved == 2 * MIB
    heap.take("a", 6 * MIB)
    assert heap.reserved == 22 * MIB
    heap.take("b", 6 * MIB)  # beside it
    heap.take("c", 6 * MIB)
    assert heap.reserved == 22 * MIB
    heap.give("a")
    heap.give("c")
    heap.take("d", 8 * MIB)  # c and the 2 MiB behind it are one block, a is too small
    assert heap.reserved == 22 * MIB
    heap.take("e", 8 * MIB)  # a's 6 MiB and b's
    assert heap.reserved == 42 * MIB
    heap.take("f", 13 * MIB + 1)
    assert heap.reserved == 42 * MIB + 14 * MIB
    heap.take("g", 12 * MIB)  # what e left
    heap.give("f")
    heap.take("h", 13 * MIB - 512)  # more than 1 MiB would be left: split
    heap.take("i", MIB + 512)
    heap.take("j", 512 * 1024)  # small ones have segments of their own
    assert heap.reserved == 56 * MIB
    assert heap.live == 512 + (6 + 8 + 8 + 12 + 13 - 0 + 1) * MIB + 512 * 1024


def test_the_caching_allocator_never_holds_less_than_is_alive() -> None:
    generator, heap, alive, model = torch.Generator().manual_seed(0), CUDAHeap(), [], 0
    for name in range(3000):
        draw = torch.rand(3, generator=generator).tolist()
        if alive and draw[0] < 0.49:
            heap.give(alive.pop(int(draw[1] * len(alive))))
        else:
            heap.take(name, int(2 ** (8 + 18 * draw[2])))
            alive.append(name)
        assert heap.live <= heap.reserved
        model = max(model, heap.live)
    assert heap.peak == model
    for name in alive:
        heap.give(name)
    assert heap.live == 0
    # all free blocks have become whole segments again: nothing more is reserved when they are asked for
    segments = [block.size for pool in heap._free for block in pool]
    assert sum(segments) == heap.reserved
    assert all(block.before is None and block.behind is None for pool in heap._free for block in pool)
