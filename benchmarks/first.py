"""The first quarter of an hour on a GPU: the most important measurements first, as `benchmarks.gpu first` runs them.

Each stage is a function here that runs in a process of its own and emits rows (benchmarks/stages.py). Later stages read
the rows of earlier ones: an op whose check failed is not timed. `dry` runs the same code on a CPU, on tiny shapes, with
interpreted kernels: a rehearsal, whose figures mean nothing.

Over 500 lines, for the stages are one plan: each is a few lines, and shares the shapes and the order with the rest.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stages import Row, Stage, emit, of, read

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Call
    from fastldm.kernels.dispatch import Config, Op
    from fastldm.models.unet import UNet
    from fastldm.planning.timing import Ceilings

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 8  # the most calls of an op that are timed
SLOW = ("torch.compile", "math", "efficient")  # rivals that take a minute, or much memory, and are never the fastest
MARKED = re.compile(r"^import ops$|\bmark\.gpu\b", re.MULTILINE)  # support/ops.py runs kernels on a GPU if there is one
# Packages that such a machine lacked, with those that come with them (onnxscript traces ONNX): a rehearsal hides them.
MISSING = ("diffusers", "platformdirs", "openvino", "tensorrt", "tensorrt_rtx", "onnxscript", "onnx_ir", "optimum")


@dataclass(frozen=True)
class Context:
    """The folder of results and the mode of a stage."""

    out: Path
    dry: bool

    @cached_property
    def rows(self) -> list[Row]:
        return read(self.out)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of kernels."""
        import torch

        return torch.float16

    @property
    def network_dtype(self) -> torch.dtype:
        """The dtype of networks."""
        import torch

        return torch.float32 if self.dry else torch.float16

    @property
    def arch(self) -> int:
        """Compute capability, as reported by the first stage."""
        archs = [row["machine"].get("sm") for row in self.rows if "machine" in row]
        return int(archs[0]) if archs and archs[0] else 90

    @property
    def ceilings(self) -> Ceilings:
        """The ceilings that the first stage measured, else those of the data sheet."""
        from fastldm.planning.timing import Ceilings

        measured = [row for row in of(self.rows, "ceilings") if "flops" in row]
        return Ceilings(measured[0]["flops"], measured[0]["bytes"]) if measured else Ceilings(800e12, 4.3e12)

    @property
    def failed_checks(self) -> set[str]:
        """Ops whose check failed or did not end."""
        checks = list(of(self.rows, "checks"))
        started, ended = ({row["op"] for row in checks if row.get(key)} for key in ("begun", "ended"))
        return {row["op"] for row in checks if row.get("wrong")} | (started - ended)

    def calls(self, *workloads: str) -> dict[Call, int]:
        """The distinct calls of these workloads, or of the tiny ones, with their counts."""
        from benchmarks.networks import SMALL, calls

        total: dict[Call, int] = {}
        for workload in SMALL if self.dry else workloads:
            for call, count in calls(workload, self.dtype).items():
                total[call] = total.get(call, 0) + count
        return total

    def fp8_calls(self) -> dict[Call, int]:
        """Calls of a step of SDXL in fp8 that it does not make in float16; of the tiny ones, `calls` has all."""
        plain = self.calls("sdxl-1024 step")
        return {call: count for call, count in self.calls("sdxl-1024 step, fp8").items() if call not in plain}


# --------------------------------------------------------------------------------------------------------- the stages


def ceilings(context: Context) -> None:
    """peak rates of this machine: bytes moved and operations of a matrix product"""
    import torch

    from benchmarks.harness import describe
    from fastldm.planning.timing import ceilings

    emit(machine=describe(), say=f"{describe().get('gpu', 'a CPU')}, torch {torch.__version__}")
    measured = ceilings(context.device, context.network_dtype)
    text = f"{measured.flops / 1e12:.2f} TFLOP/s, {measured.bytes / 1e12:.3f} TB/s"
    emit(**measured._asdict(), dtype=str(context.dtype), say=text)


def compile_kernels(context: Context) -> None:
    """every kernel of later stages, compiled by all cores into Triton's cache"""
    calls = [*context.calls("sd15-512 step", "vae-512 decode", "sdxl-1024 step", "clip-l"), *context.fp8_calls()]
    if context.dry:
        calls = [call for call in calls if not call.cost.flop][:2]  # kernels without products compile fast
    start = time.monotonic()
    kernels = precompile(context.arch, [(call, [None]) for call in calls])
    emit(kernels=kernels, compile_seconds=time.monotonic() - start, say=f"{kernels} kernels")


def precompile(arch: int, calls: Sequence[tuple[Call, Sequence[Config | None]]]) -> int:
    """Compile calls in these launch configurations (None: the op's own) by all cores, into Triton's cache. Returns the
    number of kernels. To be called before CUDA is initialised in this process, which then could not fork.
    """
    jobs = [(call, config) for call, configs in calls for config in configs]
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    kernels = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for result in pool.map(_compile, [(arch, jobs[i::workers]) for i in range(workers)]):
            kernels += result["kernels"]
            for call, config, error in result["failed"]:
                emit(call=call, config=config, failed=error)
    return kernels


def _compile(job: tuple[int, list[tuple[Call, Config | None]]]) -> dict[str, Any]:
    from fastldm.kernels import dispatch
    from fastldm.kernels.compile import Ahead

    arch, jobs = job
    ahead, failed = Ahead(arch), []
    for call, config in jobs:
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        forced = nullcontext() if config is None else dispatch.forced(op.name, config)
        with dispatch.targeting(ahead), dispatch.use("triton"), forced:
            try:
                if op.supports(*args, **kwargs):
                    op.triton(*args, **kwargs)
            except Exception as error:  # a kernel that does not compile is a result, and the rest goes on
                failed.append((str(call), config, f"{type(error).__name__}: {error}".split("\n")[0][:300]))
    return {"kernels": len(ahead.compiled), "failed": failed}


def checks(context: Context, ops: list[str]) -> None:
    """every op at every shape of a step, a decode and a text, against float32"""
    from benchmarks.harness import disagreement
    from fastldm.kernels import dispatch

    calls = context.calls("sd15-512 step", "vae-512 decode", "clip-l") | context.fp8_calls()
    for name in ops:
        own = [call for call in calls if call.op == name]
        emit(op=name, begun=True)
        wrong = tried = 0
        for call in _smallest(own) if context.dry else own:
            args, kwargs = call.arguments(context.device.type)
            verdict = dispatch.OPS[name].supports(*args, **kwargs)
            if not verdict:
                emit(op=name, call=str(call), unsupported=verdict.reason)
                continue
            tried += 1
            try:
                reason = disagreement(dispatch.OPS[name], args, kwargs)
            except Exception as error:  # a result too, and the next call may be correct
                reason = f"raised {type(error).__name__}: {error}".split("\n")[0][:300]
            if reason is not None:
                wrong += 1
                emit(op=name, call=str(call), wrong=reason, say=f"{call}: WRONG, {reason}")
        emit(op=name, ended=True, tried=tried, wrong_calls=wrong)


def step(context: Context, name: str = "sd15-512") -> None:
    """one guided step: eager, channels-last, own kernels, partly evaluated, captured"""
    from benchmarks import ladder

    name = "tiny" if context.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, context.device, context.network_dtype)
    steps = 2 if context.dry else max(model.steps, 4)

    def on_rung(rung: str, row: dict[str, Any]) -> None:
        text = f"{row['ms']:.3f} ms a step, host {row['host_ms']:.3f}" if "ms" in row else row["failed"]
        emit(model=name, rung=rung, **row, floor_ms=model.floor_ms, say=f"{name} {rung:14} {text}")

    ladder.time_rungs(pipe, model, steps, 2 if context.dry else 5, on_rung=on_rung)


def ops(context: Context, names: list[str]) -> None:
    """each op at its largest calls: its kernel, PyTorch, and the fastest library"""
    from benchmarks import harness
    from fastldm.kernels import dispatch

    calls = context.calls("sd15-512 step", "vae-512 decode", "sdxl-1024 step") | context.fp8_calls()
    ceilings = context.ceilings
    options: dict[str, Any] = {"device": context.device.type, "rounds": 1 if context.dry else 5, "seconds": 0.01}
    for name in names:
        if name in context.failed_checks:
            emit(op=name, skipped="its check failed", say=f"{name}: not timed, its check failed")
            continue
        benchmark = _benchmark(dispatch.OPS[name].module)
        if name in getattr(benchmark, "ROWS_OF", {}):  # it has shapes and rivals of its own
            for row in benchmark.ROWS_OF[name](context.dtype, ceilings.bytes, context.device.type, context.dry):
                emit(op=name, **row, say=harness.line(row))
            continue
        own = {call: count for call, count in calls.items() if call.op == name}
        largest = sorted(own, key=lambda call: -ceilings.seconds(call.cost.flop, call.cost.bytes) * own[call])
        for call in _smallest(own) if context.dry else largest[:LARGEST]:
            copies = 1 if context.dry else None
            row = harness.bench(call, _rivals(benchmark), ceilings, copies=copies, **options)
            row = {"workload": "step or decode", "count": own[call], **row}
            emit(op=name, shape_class=call.shape_class, **row, say=harness.line(row))


def _benchmark(module: str) -> Any:
    """The benchmark of a file of kernels, which has its name; None where there is none."""
    name = f"benchmarks.{module}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _rivals(benchmark: Any) -> Callable[..., dict[str, Callable[[], object]]]:
    """The rivals of an op in its benchmark, without the slow ones."""

    def fast(*args: Any, **kwargs: Any) -> dict[str, Callable[[], object]]:
        rivals = benchmark.rivals(*args, **kwargs) if benchmark else {}
        return {title: call for title, call in rivals.items() if not title.startswith(SLOW)}

    return fast


def _smallest(calls: Iterable[Call]) -> list[Call]:
    """The call of an op for a rehearsal: of those that its kernel supports the one with the fewest bytes."""
    from fastldm.kernels import dispatch

    for call in sorted(calls, key=lambda call: call.cost.bytes):
        args, kwargs = call.arguments("meta")
        with dispatch.targeting(dispatch.Target(90)):
            if dispatch.OPS[call.op].supports(*args, **kwargs):
                return [call]
    return []


def variants(context: Context, name: str) -> None:
    """launch configurations against each other, at an op's largest calls"""
    from fastldm.kernels import dispatch
    from fastldm.planning.timing import take_turns
    from fastldm.planning.tune import candidates

    if name in context.failed_checks:
        emit(op=name, skipped="its check failed", say=f"{name}: not timed, its check failed")
        return
    tried: dict[Call, list[Config]] = {}
    for call in _of_each_class(context, name):
        op, (args, kwargs) = dispatch.OPS[name], call.arguments("meta")
        shape_class, limit = op.shape_class(*args, **kwargs), 2 if context.dry else 16
        if op.supports(*args, **kwargs):
            tried[call] = candidates(op, shape_class, context.arch, args, kwargs, limit)
    if not context.dry:
        precompile(context.arch, list(tried.items()))
    for call, configs in tried.items():
        args, kwargs = call.arguments(context.device.type)
        us, spread, failed = take_turns(
            {json.dumps(dict(config)): [_forced(op, config, args, kwargs)] for config in configs},
            rounds=1 if context.dry else 5,
            seconds=0.01,
        )
        best = min(us, key=us.__getitem__, default="")
        default = us.get(json.dumps(dict(configs[0])))
        text = f"{call}: default {default or 0:.1f} us, best {us[best]:.1f} {best}" if best else f"{call}: none ran"
        row = {"call": str(call), "shape_class": call.shape_class, "default_us": default, "best": best}
        emit(op=name, **row, us=us, spread=spread, failed=failed, say=text)


def _forced(op: Op[..., Any], config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    from fastldm.kernels import dispatch

    def call() -> object:
        with dispatch.forced(op.name, config):
            return op.triton(*args, **kwargs)

    return call


def _of_each_class(context: Context, name: str) -> list[Call]:
    """The largest call of each shape class of an op, by the floor of all of the class's calls."""

    own = {call: count for call, count in context.calls("sd15-512 step", "sdxl-1024 step").items() if call.op == name}
    floor = {call: context.ceilings.seconds(call.cost.flop, call.cost.bytes) * count for call, count in own.items()}
    largest: dict[str, Call] = {}
    for call in sorted(own, key=lambda call: -floor[call]):
        largest.setdefault(call.shape_class, call)
    return _smallest(own) if context.dry else list(largest.values())[:6]


def smallest(context: Context) -> None:
    """each op once, at the smallest shape of each of its kinds: for the sanitizer"""
    from benchmarks.networks import SMALL, calls
    from fastldm.kernels import dispatch

    by_class: dict[tuple[str, str], Call] = {}
    for workload in SMALL:
        for call in calls(workload, context.dtype):
            by_class.setdefault((call.op, call.shape_class), call)
    kinds: dict[str, int] = {}
    for (name, _), call in sorted(by_class.items(), key=lambda item: item[1].cost.bytes):
        if kinds.get(name, 0) >= (1 if context.dry else 8 if name == "attention" else 2):
            continue
        args, kwargs = call.arguments(context.device.type)
        if dispatch.OPS[name].supports(*args, **kwargs):
            kinds[name] = kinds.get(name, 0) + 1
            dispatch.OPS[name].triton(*args, **kwargs)
    if not context.dry:
        import torch

        torch.cuda.synchronize()
    emit(ran=kinds)


def pictures(context: Context, name: str) -> None:
    """images through the public pipeline, by stage; then the decoder alone"""
    from benchmarks import ladder

    name = "tiny" if context.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, context.device, context.network_dtype)
    steps = 2 if context.dry else model.steps
    row = ladder.stages_of(pipe, model, steps, 1 if context.dry else 5)
    emit(model=name, steps=steps, **row, say=f"{name} {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")


def slots(context: Context, name: str = "sd15-512") -> None:
    """requests a second: one at a time, and eight in the queue of a session"""
    from benchmarks import ladder

    name = "tiny" if context.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, context.device, context.network_dtype)
    row = ladder.throughput(pipe, model, 2 if context.dry else 10, count=2 if context.dry else 16)
    emit(model=name, **row, say=f"{name} {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")


def invariance(context: Context, name: str = "sd15-512") -> None:
    """four images of a request against the same alone, bitwise, and what that costs"""
    from benchmarks import batch_invariance, ladder

    model = ladder.MODELS["tiny" if context.dry else name]
    pipe = ladder.pipeline(model, context.device, context.network_dtype)
    steps, rounds = (1, 1) if context.dry else (20, 3)
    row = batch_invariance.measure(pipe, 2 if context.dry else 4, rounds, num_inference_steps=steps)
    emit(model=name, **row, say=", ".join(f"{key} {value}" for key, value in row.items()))


def _unet(context: Context, name: str) -> tuple[UNet, tuple[Any, ...]]:
    """A U-Net with random weights, and the inputs of its step."""
    import torch

    from benchmarks import ladder

    model = ladder.MODELS[name]
    unet = ladder.pipeline(model, context.device, context.network_dtype).unet
    config, size = model.unet, model.size // model.vae.factor
    options: dict[str, Any] = {"device": context.device, "dtype": context.network_dtype}
    text = torch.randn(2, 77, config.cross_attention_dim, **options)
    rows = unet.time_rows(torch.full((2,), 500.0, device=context.device))
    return unet, (torch.randn(2, config.in_channels, size, size, **options), rows, unet.cross_kv(text))


def designs(context: Context, name: str = "sd15-512") -> None:
    """a step of the U-Net in a graph by the default design, and with one choice made otherwise: A against B"""
    import torch

    from benchmarks.designs import as_table, design_tables
    from fastldm.kernels import dispatch
    from fastldm.planning.timing import take_turns

    name = "tiny" if context.dry else name
    tables = design_tables("tiny step" if context.dry else f"{name} step", context.dtype, context.arch)
    if not context.dry:
        precompile(context.arch, [(call, [entry["config"]]) for table in tables.values() for call, entry in table])
    with torch.no_grad():
        unet, inputs = _unet(context, name)

        def step(table: dispatch.Table) -> Callable[[], object]:
            def call() -> object:
                with dispatch.use_table(table):
                    return unet.step(*inputs)

            return call

        contenders = {"default": [lambda: unet.step(*inputs)]}
        for title, entries in tables.items():
            contenders[title] = [step(as_table(context.arch, entries))]
        us, spread, failed = take_turns(contenders, rounds=1 if context.dry else 5)
    for title in tables.keys() & us.keys():
        ratio = us[title] / us["default"]
        text = f"{title}: {us[title] / 1e3:.3f} ms, {ratio:.3f} of the default's {us['default'] / 1e3:.3f}"
        emit(model=name, design=title, us=us[title], default_us=us["default"], spread=spread[title], say=text)
    for title, error in failed.items():
        emit(model=name, design=title, failed=error, say=f"{title}: {error}")


def eight_bits(context: Context, name: str = "sdxl-1024") -> None:
    """a step of the U-Net in a graph, its large linear layers in fp8 against float16"""
    import torch

    from benchmarks.networks import in_eight_bits
    from fastldm.planning.timing import take_turns

    name = "tiny" if context.dry else name
    with torch.no_grad():
        unet, inputs = _unet(context, name)
        least = {"least_weight": 1, "least_rows": 1} if context.dry else {}
        eight = in_eight_bits(unet, lambda: unet.step(*inputs), **least)
        contenders = {"float16": [lambda: unet.step(*inputs)], "fp8": [eight]}
        us, spread, failed = take_turns(contenders, rounds=1 if context.dry else 5)
    text = ", ".join(f"{key} {value / 1e3:.3f} ms" for key, value in us.items())
    emit(model=name, us=us, spread=spread, failed=failed, say=f"{name} step: {text or failed}")


def compiled(context: Context, name: str = "sd15-512") -> None:
    """the U-Net by torch.compile, with fastldm's layers on PyTorch's ops"""
    import torch

    from fastldm.kernels import use
    from fastldm.planning.timing import take_turns

    name = "tiny" if context.dry else name
    with torch.no_grad(), use("torch"):
        unet, inputs = _unet(context, name)
        network: Callable[..., object] = unet.step
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
        if context.dry:  # a rehearsal traces one layer, and skips the minutes of a compiler
            network, inputs, options = unet.conv_in, inputs[:1], {"backend": "eager"}
        compiled_network = torch.compile(network, **options)
        start = time.monotonic()
        compiled_network(*inputs)
        seconds = time.monotonic() - start
        contenders = {"torch.compile": [lambda: compiled_network(*inputs)], "eager": [lambda: network(*inputs)]}
        us, spread, failed = take_turns(contenders, rounds=1 if context.dry else 5)
    text = ", ".join(f"{key} {value / 1e3:.3f} ms" for key, value in us.items())
    report = f"{name} U-Net in a graph: {text}"
    emit(model=name, us=us, spread=spread, failed=failed, compile_seconds=seconds, say=report)


def tune(context: Context) -> None:
    """launch configurations of the ten largest calls of ops that run torch by default, into tuned.json"""
    from fastldm.kernels import dispatch
    from fastldm.planning.tune import best_of, candidates, merge_into

    tried: dict[Call, list[Config]] = {}
    for name in [op.name for op in dispatch.OPS.values() if op.prefer == "torch"]:  # none of which is measured yet
        for call in [] if name in context.failed_checks else _of_each_class(context, name):
            op, (args, kwargs) = dispatch.OPS[name], call.arguments("meta")
            shape_class, limit = op.shape_class(*args, **kwargs), 2 if context.dry else 24
            if op.supports(*args, **kwargs):
                tried[call] = candidates(op, shape_class, context.arch, args, kwargs, limit)
    seconds = {call: context.ceilings.seconds(call.cost.flop, call.cost.bytes) for call in tried}
    largest = sorted(tried, key=lambda call: -seconds[call])[: 1 if context.dry else 10]
    if not context.dry:
        precompile(context.arch, [(call, tried[call]) for call in largest])
    for call in largest:
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        rounds = 1 if context.dry else 3
        entry = best_of(op, tried[call], args, kwargs, context.device.type, rounds=rounds, seconds=0.01)
        if entry is not None:
            shape_class = op.shape_class(*args, **kwargs)
            merge_into(context.out / "tuned.json", {f"sm_{context.arch}": {op.name: {shape_class: entry}}})
            emit(op=op.name, call=str(call), shape_class=shape_class, **entry, say=f"{call}: {entry}")


# ----------------------------------------------------------------------------------------------- the order of stages


def without(*names: str) -> dict[str, str]:
    """The environment of a Python without some installed packages, for its child processes too."""
    path = [str(Path(__file__).parent / "without"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "FASTLDM_WITHOUT": ",".join(names)}


def op_names() -> list[str]:
    """All ops; first those whose kernel is taken wherever no table says otherwise."""
    from fastldm.kernels import dispatch

    return sorted(dispatch.load_ops(), key=lambda name: (dispatch.OPS[name].prefer == "torch", name))


def op_modules() -> list[str]:
    """The files of kernels that declare ops, in the order of `op_names`."""
    from fastldm.kernels import dispatch

    return list(dict.fromkeys(dispatch.OPS[name].module for name in op_names()))


def suite() -> list[str]:
    """The test files that depend on a GPU: those of the ops first, then each with a test that is marked gpu."""
    ops = [f"tests/test_{module}.py" for module in op_modules()]
    marked = sorted(path for path in (ROOT / "tests").glob("test_*.py") if MARKED.search(path.read_text("utf-8")))
    return [*ops, *(name for path in marked if (name := f"tests/{path.name}") not in ops)]


def stages(context: Context, half: int | None = None) -> list[Stage]:
    """The stages, most important first. The first half is useful alone; each takes six minutes at most."""

    def command(function: Callable[..., None], *arguments: str) -> list[str]:
        dry = ["--dry"] if context.dry else []
        module = [sys.executable, "-m", "benchmarks.gpu", "stage", function.__name__, *arguments]
        return [*module, "--out", str(context.out), *dry]

    # On a GPU each op has its own process: one that reads out of bounds ends it.
    ops_alone = [op_names()] if context.dry else [[name] for name in op_names()]
    first = [
        Stage("ceilings", [command(ceilings)], 30),
        Stage("compile", [command(compile_kernels)], 60),
        Stage("checks", [command(checks, *names) for names in ops_alone], 70, together=True),
        Stage("step", [command(step, "sd15-512")], 80),
        Stage("ops", [command(ops, *names) for names in ops_alone], 110),
        Stage("attention", [command(variants, "attention")], 60),
        Stage("group norm", [command(variants, "group_norm")], 45),
    ]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.pytest_rows", "-m", "not full", "--timeout", "60"]
    if context.dry:
        tests = [*tests[:-2], "tests/test_geglu.py", "-n", "1", "-k", "reference or kernel"]
    else:
        tests += ["-n", "12", *suite()]
    models = ["sd15-512"] if context.dry else ["sd15-512", "sdxl-1024", "sd-turbo-512"]
    second = [
        Stage("tests", [tests], 110),
        Stage("sanitizer", [[*tool, *command(smallest)] for tool in _sanitizers(context)], 70, together=True),
        Stage("pictures", [command(pictures, name) for name in models], 90),
        Stage("torch.compile", [command(compiled, "sd15-512")], 90),
        Stage("slots", [command(slots, "sd15-512")], 40),
        Stage("designs", [command(designs, "sd15-512")], 60),
        Stage("eight bits", [command(eight_bits, "sdxl-1024")], 60),
        Stage("invariance", [command(invariance, "sd15-512")], 60),
        Stage("tune", [command(tune)], 90),
    ]
    selected = {None: [*first, *second], 1: first, 2: second}[half]
    return [_in_checkout(stage, context) for stage in selected]


def sanitizer() -> str:
    """The path of compute-sanitizer, which comes with the CUDA toolkit, whether it is installed or not."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def _sanitizers(context: Context) -> list[list[str]]:
    """The commands of compute-sanitizer, for memory and for races; none in a dry run."""
    if context.dry:
        return [[]]
    return [[sanitizer(), "--tool", check, "--error-exitcode", "9"] for check in ("memcheck", "racecheck")]


def _in_checkout(stage: Stage, context: Context) -> Stage:
    """The stage in the checkout; in a dry run on one thread, with interpreted kernels, and without MISSING."""
    environment = dict(os.environ)
    seconds = stage.seconds
    if context.dry:
        seconds = 300.0  # a rehearsal must pass on a busy machine too
        environment = without(*MISSING) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TRITON_INTERPRET"] = "0" if stage.name == "compile" else "1"
    return replace(stage, seconds=seconds, environment=environment, folder=ROOT)


STAGES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(ceilings, compile_kernels, checks, step, ops, variants),
        *(smallest, pictures, compiled, slots, designs, eight_bits, invariance, tune),
    )
}
"""The stages of `python -m benchmarks.gpu stage NAME`."""
LISTS = (checks, ops)
"""The stages that take any number of names."""


def run_stage(name: str, arguments: Sequence[str], context: Context) -> None:
    """Run one stage in this process."""
    function = STAGES[name]
    op_names()  # registers them all
    function(context, list(arguments)) if function in LISTS else function(context, *arguments)
