"""How much work there is, in counts that need no clock: a change that makes a step do more turns one of these red.

The counts of ops follow from the architectures and are exact: SD1.5 has 16 transformer layers, SDXL 70, each with two
attentions. What PyTorch makes of an op differs a little from version to version, so operators and bytes are bounds,
those of torch 2.13. Where a change does less, the number here goes down with it.

Held elsewhere: kernels of SD1.5's step, and that nothing in it waits for the device (test_slots); operators at the end
of a step (test_denoise); memory at its most (test_memory); what the command must not import (test_package).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import pytest
import tiny
import torch
from conftest import ROOT
from counters import Launches, Nodes

from benchmarks.networks import CLIP_L, SD15, SDXL, VAE
from fastldm import Pipeline
from fastldm.kernels import dispatch
from fastldm.models.config import UNetConfig
from fastldm.planning import dry_run
from fastldm.planning.allocator import record
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import Guidance, Run
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table
from fastldm.serving.session import Session

GPU, CPU = 90, 0


def ops(run: Callable[[], object]) -> Counter[str]:
    """The ops that are called, without those that they are made of."""
    seen: Counter[str] = Counter()
    running: list[str] = []

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
        if not running:
            seen[op.name] += 1
        running.append(op.name)
        return running.pop

    with dispatch.observe(watch):  # type: ignore[arg-type]
        run()
    return seen


def step(config: UNetConfig, size: int, arch: int) -> dry_run.Work:
    """A guided step of one picture."""
    dtype = torch.float16 if arch else torch.float32
    return dry_run.step(config, height=size, width=size, rows=2, tokens=77, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ a step

STEP_OPS = {
    "sd1.5": {"conv2d": 49, "upsample_conv2d": 3, "group_norm": 61, "attention": 32, "linear": 138}
    | {"linear_geglu": 16, "layer_norm": 16, "add_layer_norm": 32},
    "sdxl": {"conv2d": 38, "upsample_conv2d": 2, "group_norm": 46, "attention": 140, "linear": 392}
    | {"linear_geglu": 70, "layer_norm": 70, "add_layer_norm": 140},
}
GPU_OPS = {  # a norm and the convolution whose output it reads are one op
    "sd1.5": {"conv_group_norm": 47, "conv2d": 2, "group_norm": 14, "guidance_rescale": 1, "end_step": 1},
    "sdxl": {"conv_group_norm": 36, "conv2d": 2, "group_norm": 10, "guidance_rescale": 1, "end_step": 1},
}
NETWORKS = [pytest.param(SD15, 64, "sd1.5", id="sd1.5"), pytest.param(SDXL, 128, "sdxl", id="sdxl")]


@pytest.mark.parametrize(("config", "size", "name"), NETWORKS)
def test_a_step_has_few_ops(config: UNetConfig, size: int, name: str) -> None:
    """On a GPU the end of the step is an op too, behind the one that a batch with rescaled guidance has."""
    with dispatch.targeting(dispatch.Target(CPU)):
        assert ops(step(config, size, CPU)) == STEP_OPS[name]
    with dispatch.targeting(dispatch.Target(GPU)):
        assert ops(step(config, size, GPU)) == STEP_OPS[name] | GPU_OPS[name]


def launched(make: Callable[[], dry_run.Work]) -> int:
    """Kernels on a GPU, PyTorch's and ours."""
    launches = Launches()
    with dispatch.targeting(launches):
        work = make()
        with Nodes() as nodes:
            work()
    return nodes.count + launches.count


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: step(SDXL, 128, GPU), 920),
        (lambda: dry_run.conditions(SD15, steps=30, rows=2, tokens=77, dtype=torch.float16), 75),
        (lambda: dry_run.conditions(SDXL, steps=30, rows=2, tokens=77, dtype=torch.float16), 134),
        (lambda: dry_run.decode(VAE, height=64, width=64, batch=1, dtype=torch.float16), 135),
        (lambda: dry_run.text([CLIP_L], batch=2, dtype=torch.float16), 327),
    ],
    ids=["sdxl step", "sd1.5 conditions", "sdxl conditions", "vae", "clip-l"],
)
def test_a_step_launches_few_kernels_on_gpus(make: Callable[[], dry_run.Work], most: int) -> None:
    assert 0.8 * most < launched(make) <= most


@pytest.mark.parametrize(
    ("config", "size", "arch", "most"),
    [(SD15, 64, CPU, 4.19e9), (SD15, 64, GPU, 1.57e9), (SDXL, 128, CPU, 29.95e9), (SDXL, 128, GPU, 9.01e9)],
    ids=["sd1.5 cpu", "sd1.5 gpu", "sdxl cpu", "sdxl gpu"],
)
def test_a_step_allocates_few_bytes(config: UNetConfig, size: int, arch: int, most: float) -> None:
    """All tensors that are made, one after the other: what is written to memory and read again. 0.3 GB of SD1.5's on a
    GPU are partial sums of convolutions, which stay in the L2 cache."""
    with dispatch.targeting(dispatch.Target(arch)):
        allocated = sum(size for _, size in record(step(config, size, arch)) if size > 0)
    assert 0.9 * most < allocated <= most


# ------------------------------------------------------------------------------------------------- once, and not again


@pytest.mark.parametrize("steps", [2, 5])
def test_texts_are_projected_once_per_prompt(steps: int) -> None:
    """One product for keys and values of each cross-attention, for prompts and negatives at once, whatever the steps.
    The model's own encoder makes products of the same text before: it stands still here."""
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1"))
    embeds = torch.randn(2, 1, 77, pipe.unet.config.cross_attention_dim)
    seen: list[torch.Size] = []

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name == "linear" and args[0].shape[1:] == embeds.shape[2:]:
            seen.append(args[0].shape)

    observing = dispatch.observe(watch)
    with Session(pipe) as session:
        session.call(observing.__enter__)
        try:
            arguments: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "seed": 0}
            session.submit(**arguments, num_inference_steps=steps, sampler="ddim").result()
        finally:
            session.call(lambda: observing.__exit__(None, None, None))
    assert seen == [torch.Size([2, *embeds.shape[2:]])] * len(pipe.unet.config.cross_widths)


@pytest.mark.parametrize(("config", "layers"), [(SD15, 16), (SDXL, 70)], ids=["sd1.5", "sdxl"])
def test_conditions_are_computed_once_per_request(config: UNetConfig, layers: int) -> None:
    """Of texts one a layer; of time one a resnet, and two for each embedding: of time, and SDXL's of size and text."""
    resnets, embeddings = len(dry_run.network(config, torch.float32).row_readers()), 4 if config.needs_added else 2  # type: ignore
    with dispatch.targeting(dispatch.Target(CPU)):
        work = dry_run.conditions(config, steps=30, rows=2, tokens=77, dtype=torch.float32)
        assert ops(work) == {"linear": layers + resnets + embeddings}


def test_cpu_steps_read_no_values() -> None:
    """Steps of two requests at once, one unguided, on tensors that have none: to read one would be an error."""
    table = make_table(read_config({"_class_name": "DDIMScheduler"}), 3, sampler="dpm++ 2m")
    unet: Any = dry_run.network(UNetConfig.from_dict(tiny.UNETS["sd1"], "tiny"), torch.float32)
    batch = EagerBatch(unet)
    runs = []
    for rows in (1, 2):
        text = tuple(torch.empty(rows, 77, 2 * width, device="meta") for width in unet.config.cross_widths)
        x, temb = torch.empty(1, 4, 8, 8, device="meta"), torch.empty(3, 1, unet.config.time_channels, device="meta")
        runs.append(Run(table, x, [None] * 3, Guidance(float(rows)), temb=temb, text_kv=text))
        batch.admit(runs[-1])
    with dispatch.targeting(dispatch.Target(CPU)):
        for _ in range(3):
            batch.step(runs)
    assert all(run.done for run in runs)


# -------------------------------------------------------------------------------------------------------------- imports


def imported(code: str, folder: Path) -> list[str]:
    """What a fresh interpreter imports for some code."""
    program = (
        f"import sys, json\nbefore = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


LATER = ("controls", "things")  # of cli, those that a command imports when it runs
HELP = """
import contextlib, io
sys.argv = ["fastldm", "--help"]
from fastldm.__main__ import run
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    run()
"""


@pytest.mark.parametrize(
    ("code", "ours", "rest", "most"),
    [
        ("import fastldm", {"errors", "openmp", "version"}, set(), 40),
        (
            HELP,
            {"__main__", "errors", "export", "export.backends", "heap", "openmp", "version", "cli"}
            | {f"cli.{path.stem}" for path in (ROOT / "fastldm" / "cli").glob("[a-z]*.py") if path.stem not in LATER},
            {"click"},
            120,
        ),
    ],
    ids=["import fastldm", "fastldm --help"],
)
def test_few_modules_are_imported(code: str, ours: set[str], rest: set[str], most: int, tmp_path: Path) -> None:
    """Ours and the packages of others exactly; how many the standard library has of its own differs by version (20 and
    71 on Python 3.11)."""
    modules = imported(code, tmp_path)
    assert {name.partition(".")[2] for name in modules if name.startswith("fastldm.")} == ours
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"fastldm"}
    assert {name for name in packages if not name.startswith("_")} == rest
    assert len(modules) <= most


# ----------------------------------------------------------------------------------------------------------------- ONNX

# network -> the most operators in all, and how many hold the work. The U-Net has 3 cross-attentions and 3 to itself.
# How many compute shapes differs by what was traced in the process before: 375 and 379 were seen of the step, 62 and
# 63 of the encoder.
NODES = {
    "text_encoder": (111, {"MatMul": 12, "LayerNormalization": 6, "Softmax": 2}),
    "text_kv": (3, {"MatMul": 3}),
    "time_rows": (26, {"Gemm": 8}),
    "unet_step": (385, {"Conv": 16, "GroupNormalization": 16, "LayerNormalization": 9, "Softmax": 6, "Gelu": 3}),
    "vae_decoder": (87, {"Conv": 16, "GroupNormalization": 13, "MatMul": 1, "Softmax": 0}),
    "vae_encoder": (64, {"Conv": 12, "GroupNormalization": 9, "MatMul": 1, "Softmax": 0}),
}


def test_exported_graphs_have_few_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the smallest SD1 model's networks, which other tests export anyway."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    folder = bundles.exported("sd1", True, bundles.shared(tmp_path_factory))[1]
    for name, (most, expected) in NODES.items():
        graph = onnx.load(str(folder / name / "model.onnx"), load_external_data=False).graph
        counts = Counter(node.op_type for node in graph.node)
        assert {op: counts[op] for op in expected} == expected, name
        assert sum(counts.values()) <= most, name
