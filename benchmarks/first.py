"""The first quarter of an hour on a GPU: what has to be learnt first, in this order, as `benchmarks.gpu first` runs it.

Each stage is a function here that runs in a process of its own and emits what it finds (benchmarks/stages.py). Later
stages read what earlier ones found: an op whose check was red is not timed. `dry` runs the same code on a CPU, on tiny
shapes, with kernels interpreted: a rehearsal, whose figures mean nothing.
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
    from fastldm.planning.timing import Ceilings

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 8  # calls of an op that are timed
SLOW = ("torch.compile", "math", "efficient")  # alternatives that take a minute, or memory, and are not the best
MARKED = re.compile(r"^import ops$|\bmark\.gpu\b", re.MULTILINE)  # support/ops.py runs a kernel where there is a device
# What such a machine was seen to lack, and what comes with it (onnxscript traces ONNX): a rehearsal lacks it too.
MISSING = ("diffusers", "platformdirs", "openvino", "tensorrt", "tensorrt_rtx", "onnxscript", "onnx_ir", "optimum")


@dataclass(frozen=True)
class Where:
    """What a stage runs on, and where it finds what others have found."""

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
        """What the kernels are run in."""
        import torch

        return torch.float16

    @property
    def network_dtype(self) -> torch.dtype:
        """What whole networks are run in."""
        import torch

        return torch.float32 if self.dry else torch.float16

    @property
    def arch(self) -> int:
        """Compute capability, as the first stage found it."""
        found = [row["machine"].get("sm") for row in self.rows if "machine" in row]
        return int(found[0]) if found and found[0] else 90

    @property
    def limits(self) -> Ceilings:
        """The ceilings that the first stage measured, or those of the vendor's sheet, which the table then says."""
        from fastldm.planning.timing import Ceilings

        found = [row for row in of(self.rows, "ceilings") if "flops" in row]
        return Ceilings(found[0]["flops"], found[0]["bytes"]) if found else Ceilings(800e12, 4.3e12)

    @property
    def red(self) -> set[str]:
        """Ops whose check was red, or did not come to its end."""
        checks = list(of(self.rows, "checks"))
        begun, ended = ({row["op"] for row in checks if row.get(key)} for key in ("begun", "ended"))
        return {row["op"] for row in checks if row.get("wrong")} | (begun - ended)

    def calls(self, *workloads: str) -> dict[Call, int]:
        """The distinct calls of these workloads, or of the tiny ones, with how often each is made."""
        from benchmarks.networks import SMALL, calls

        total: dict[Call, int] = {}
        for workload in SMALL if self.dry else workloads:
            for call, count in calls(workload, self.dtype).items():
                total[call] = total.get(call, 0) + count
        return total


# --------------------------------------------------------------------------------------------------------- the stages


def ceilings(where: Where) -> None:
    """what this machine moves and multiplies at best"""
    import torch

    from benchmarks.harness import describe
    from fastldm.planning.timing import ceilings

    emit(machine=describe(), say=f"{describe().get('gpu', 'a CPU')}, torch {torch.__version__}")
    measured = ceilings(where.device, where.network_dtype)
    said = f"{measured.flops / 1e12:.2f} TFLOP/s, {measured.bytes / 1e12:.3f} TB/s"
    emit(**measured._asdict(), dtype=str(where.dtype), say=said)


def compile_kernels(where: Where) -> None:
    """every kernel that comes later, compiled by all cores into Triton's cache"""
    calls = list(where.calls("sd15-512 step", "vae-512 decode", "sdxl-1024 step", "clip-l"))
    if where.dry:
        calls = [call for call in calls if not call.cost.flop][:2]  # kernels without products compile fast
    began = time.monotonic()
    kernels = precompile(where.arch, [(call, [None]) for call in calls])
    emit(kernels=kernels, compile_seconds=time.monotonic() - began, say=f"{kernels} kernels")


def precompile(arch: int, wanted: Sequence[tuple[Call, Sequence[Config | None]]]) -> int:
    """Compile calls in these launch configurations (None: the op's own) by all cores, into Triton's cache. Returns how
    many kernels there are. Before anything of CUDA begins in this process, which then could not be forked."""
    jobs = [(call, config) for call, configs in wanted for config in configs]
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    kernels = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for made in pool.map(_compile, [(arch, jobs[i::workers]) for i in range(workers)]):
            kernels += made["kernels"]
            for call, config, error in made["failed"]:
                emit(call=call, config=config, failed=error)
    return kernels


def _compile(job: tuple[int, list[tuple[Call, Config | None]]]) -> dict[str, Any]:
    from fastldm.kernels import dispatch
    from fastldm.kernels.compile import Ahead

    arch, jobs = job
    ahead, failed = Ahead(arch), []
    for call, config in jobs:
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        chosen = nullcontext() if config is None else dispatch.forced(op.name, config)
        with dispatch.targeting(ahead), dispatch.use("triton"), chosen:
            try:
                if op.supports(*args, **kwargs):
                    op.triton(*args, **kwargs)
            except Exception as error:  # one that does not compile is a result, and the others are wanted
                failed.append((str(call), config, f"{type(error).__name__}: {error}".split("\n")[0][:300]))
    return {"kernels": len(ahead.compiled), "failed": failed}


def checks(where: Where, ops: list[str]) -> None:
    """every op at every shape of a step, a decode and a text, against float32"""
    from benchmarks.harness import disagreement
    from fastldm.kernels import dispatch

    calls = where.calls("sd15-512 step", "vae-512 decode", "clip-l")
    for name in ops:
        own = [call for call in calls if call.op == name]
        emit(op=name, begun=True)
        wrong = tried = 0
        for call in _smallest(own) if where.dry else own:
            args, kwargs = call.arguments(where.device.type)
            verdict = dispatch.OPS[name].supports(*args, **kwargs)
            if not verdict:
                emit(op=name, call=str(call), unsupported=verdict.reason)
                continue
            tried += 1
            try:
                why = disagreement(dispatch.OPS[name], args, kwargs)
            except Exception as error:  # a result too, and the next call may be right
                why = f"raised {type(error).__name__}: {error}".split("\n")[0][:300]
            if why is not None:
                wrong += 1
                emit(op=name, call=str(call), wrong=why, say=f"{call}: WRONG, {why}")
        emit(op=name, ended=True, tried=tried, wrong_calls=wrong)


def step(where: Where, name: str = "sd15-512") -> None:
    """one guided step: eager, channels-last, own kernels, partly evaluated, captured"""
    from benchmarks import ladder

    name = "tiny" if where.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, where.device, where.network_dtype)
    steps = 2 if where.dry else max(model.steps, 4)

    def on_rung(rung: str, row: dict[str, Any]) -> None:
        said = f"{row['ms']:.3f} ms a step, host {row['host_ms']:.3f}" if "ms" in row else row["failed"]
        emit(model=name, rung=rung, **row, floor_ms=model.floor_ms, say=f"{name} {rung:14} {said}")

    ladder.climb(pipe, model, steps, 2 if where.dry else 5, on_rung=on_rung)


def ops(where: Where, names: list[str]) -> None:
    """each op at its largest calls: its kernel, PyTorch's own, and the library's best"""
    from benchmarks import harness
    from fastldm.kernels import dispatch

    calls = where.calls("sd15-512 step", "vae-512 decode", "sdxl-1024 step")
    limits = where.limits
    given: dict[str, Any] = {"device": where.device.type, "rounds": 1 if where.dry else 5, "seconds": 0.01}
    for name in names:
        if name in where.red:
            emit(op=name, skipped="its check was red", say=f"{name}: not timed, its check was red")
            continue
        benchmark = _benchmark(dispatch.OPS[name].module)
        if name in getattr(benchmark, "ROWS_OF", {}):  # it has shapes and rivals of its own
            for row in benchmark.ROWS_OF[name](where.dtype, limits.bytes, where.device.type, where.dry):
                emit(op=name, **row, say=harness.line(row))
            continue
        own = {call: count for call, count in calls.items() if call.op == name}
        largest = sorted(own, key=lambda call: -limits.seconds(call.cost.flop, call.cost.bytes) * own[call])
        for call in _smallest(own) if where.dry else largest[:LARGEST]:
            copies = 1 if where.dry else None
            row = harness.bench(call, _rivals(benchmark), limits, copies=copies, **given)
            row = {"workload": "step or decode", "count": own[call], **row}
            emit(op=name, shape_class=_class_of(dispatch.OPS[name], call), **row, say=harness.line(row))


def _benchmark(module: str) -> Any:
    """The benchmark of a file of kernels, which has its name; None where there is none."""
    name = f"benchmarks.{module}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _rivals(benchmark: Any) -> Callable[..., dict[str, Callable[[], object]]]:
    """The alternatives to an op that its benchmark has, but for the slow ones."""

    def fast(*args: Any, **kwargs: Any) -> dict[str, Callable[[], object]]:
        rivals = benchmark.rivals(*args, **kwargs) if benchmark else {}
        return {title: run for title, run in rivals.items() if not title.startswith(SLOW)}

    return fast


def _class_of(op: Op[..., Any], call: Call) -> str:
    args, kwargs = call.arguments("meta")
    return op.shape_class(*args, **kwargs)


def _smallest(calls: Iterable[Call]) -> list[Call]:
    """What a rehearsal takes of some calls of one op: the one with the fewest bytes that its kernel takes."""
    from fastldm.kernels import dispatch

    for call in sorted(calls, key=lambda call: call.cost.bytes):
        args, kwargs = call.arguments("meta")
        with dispatch.targeting(dispatch.Target(90)):
            if dispatch.OPS[call.op].supports(*args, **kwargs):
                return [call]
    return []


def variants(where: Where, name: str) -> None:
    """launch configurations against each other, A against B, at an op's largest calls"""
    from fastldm.kernels import dispatch
    from fastldm.planning.timing import take_turns
    from fastldm.planning.tune import candidates

    if name in where.red:
        emit(op=name, skipped="its check was red", say=f"{name}: not timed, its check was red")
        return
    wanted: dict[Call, list[Config]] = {}
    for call in _of_each_class(where, name):
        op, (args, kwargs) = dispatch.OPS[name], call.arguments("meta")
        shape_class, limit = op.shape_class(*args, **kwargs), 2 if where.dry else 16
        if op.supports(*args, **kwargs):
            wanted[call] = candidates(op, shape_class, where.arch, args, kwargs, limit)
    if not where.dry:
        precompile(where.arch, list(wanted.items()))
    for call, configs in wanted.items():
        args, kwargs = call.arguments(where.device.type)
        us, spread, failed = take_turns(
            {json.dumps(dict(config)): [_forced(op, config, args, kwargs)] for config in configs},
            rounds=1 if where.dry else 5,
            seconds=0.01,
        )
        best = min(us, key=us.__getitem__, default="")
        default = us.get(json.dumps(dict(configs[0])))
        said = f"{call}: default {default or 0:.1f} us, best {us[best]:.1f} {best}" if best else f"{call}: none ran"
        row = {"call": str(call), "shape_class": _class_of(op, call), "default_us": default, "best": best}
        emit(op=name, **row, us=us, spread=spread, failed=failed, say=said)


def _forced(op: Op[..., Any], config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    from fastldm.kernels import dispatch

    def run() -> object:
        with dispatch.forced(op.name, config):
            return op.triton(*args, **kwargs)

    return run


def _of_each_class(where: Where, name: str) -> list[Call]:
    """The largest call of each shape class of an op, by the least that all of the class's calls can take."""
    from fastldm.kernels import dispatch

    own = {call: count for call, count in where.calls("sd15-512 step", "sdxl-1024 step").items() if call.op == name}
    floor = {call: where.limits.seconds(call.cost.flop, call.cost.bytes) * count for call, count in own.items()}
    largest: dict[str, Call] = {}
    for call in sorted(own, key=lambda call: -floor[call]):
        largest.setdefault(_class_of(dispatch.OPS[name], call), call)
    return _smallest(own) if where.dry else list(largest.values())[:6]


def smallest(where: Where) -> None:
    """each op once, at the smallest shape of each of its kinds: what the sanitizer watches"""
    from benchmarks.networks import SMALL, calls
    from fastldm.kernels import dispatch

    found: dict[tuple[str, str], Call] = {}
    for workload in SMALL:
        for call in calls(workload, where.dtype):
            found.setdefault((call.op, _class_of(dispatch.OPS[call.op], call)), call)
    kinds: dict[str, int] = {}
    for (name, _), call in sorted(found.items(), key=lambda item: item[1].cost.bytes):
        if kinds.get(name, 0) >= (1 if where.dry else 8 if name == "attention" else 2):
            continue
        args, kwargs = call.arguments(where.device.type)
        if dispatch.OPS[name].supports(*args, **kwargs):
            kinds[name] = kinds.get(name, 0) + 1
            dispatch.OPS[name].triton(*args, **kwargs)
    if not where.dry:
        import torch

        torch.cuda.synchronize()
    emit(ran=kinds)


def pictures(where: Where, name: str) -> None:
    """whole pictures through the public pipeline, by stage; then the decoder alone"""
    from benchmarks import ladder

    name = "tiny" if where.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, where.device, where.network_dtype)
    steps = 2 if where.dry else model.steps
    row = ladder.stages_of(pipe, model, steps, 1 if where.dry else 5)
    emit(model=name, steps=steps, **row, say=f"{name} {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")


def slots(where: Where, name: str = "sd15-512") -> None:
    """requests a second: one at a time, and eight waiting for a session"""
    from benchmarks import ladder

    name = "tiny" if where.dry else name
    model = ladder.MODELS[name]
    pipe = ladder.pipeline(model, where.device, where.network_dtype)
    row = ladder.throughput(pipe, model, 2 if where.dry else 10, count=2 if where.dry else 16)
    emit(model=name, **row, say=f"{name} {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")


def compiled(where: Where, name: str = "sd15-512") -> None:
    """the U-Net by torch.compile, of fastldm's layers on PyTorch's ops"""
    import torch

    from benchmarks import ladder
    from fastldm.kernels import use
    from fastldm.planning.timing import take_turns

    name = "tiny" if where.dry else name
    model = ladder.MODELS[name]
    unet = ladder.pipeline(model, where.device, where.network_dtype).unet
    config, size = model.unet, model.size // model.vae.factor
    u = torch.randn(2, config.in_channels, size, size, device=where.device, dtype=where.network_dtype)
    text = torch.randn(2, 77, config.cross_attention_dim, device=where.device, dtype=where.network_dtype)
    with torch.no_grad(), use("torch"):
        network, inputs = (
            unet.step,
            (u, unet.time_rows(torch.full((2,), 500.0, device=where.device)), unet.cross_kv(text)),
        )
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
        if where.dry:  # a rehearsal traces one layer, and leaves out the minutes of a compiler
            network, inputs, options = unet.conv_in, (u,), {"backend": "eager"}
        run = torch.compile(network, **options)
        began = time.monotonic()
        run(*inputs)
        took = time.monotonic() - began
        contenders = {"torch.compile": [lambda: run(*inputs)], "eager": [lambda: network(*inputs)]}
        us, spread, failed = take_turns(contenders, rounds=1 if where.dry else 5)
    said = ", ".join(f"{key} {value / 1e3:.3f} ms" for key, value in us.items())
    emit(model=name, us=us, spread=spread, failed=failed, compile_seconds=took, say=f"{name} U-Net in a graph: {said}")


def tune(where: Where) -> None:
    """launch configurations of the ten largest calls of ops that run torch by default, into tuned.json"""
    from fastldm.kernels import dispatch
    from fastldm.planning.tune import best_of, candidates, merge_into

    wanted: dict[Call, list[Config]] = {}
    for name in [op.name for op in dispatch.OPS.values() if op.prefer == "torch"]:  # which no table has measured yet
        for call in [] if name in where.red else _of_each_class(where, name):
            op, (args, kwargs) = dispatch.OPS[name], call.arguments("meta")
            shape_class, limit = op.shape_class(*args, **kwargs), 2 if where.dry else 24
            if op.supports(*args, **kwargs):
                wanted[call] = candidates(op, shape_class, where.arch, args, kwargs, limit)
    seconds = {call: where.limits.seconds(call.cost.flop, call.cost.bytes) for call in wanted}
    largest = sorted(wanted, key=lambda call: -seconds[call])[: 1 if where.dry else 10]
    if not where.dry:
        precompile(where.arch, [(call, wanted[call]) for call in largest])
    for call in largest:
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        rounds = 1 if where.dry else 3
        entry = best_of(op, wanted[call], args, kwargs, where.device.type, rounds=rounds, seconds=0.01)
        if entry is not None:
            shape_class = op.shape_class(*args, **kwargs)
            merge_into(where.out / "tuned.json", {f"sm_{where.arch}": {op.name: {shape_class: entry}}})
            emit(op=op.name, call=str(call), shape_class=shape_class, **entry, say=f"{call}: {entry}")


# ------------------------------------------------------------------------------------------------------ in which order


def without(*names: str) -> dict[str, str]:
    """The environment of a Python that lacks packages which are installed here, in what it starts too."""
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
    """The files of tests that a GPU has a say in: those of the ops first, then each with a test that is marked gpu."""
    ops = [f"tests/test_{module}.py" for module in op_modules()]
    found = sorted(path for path in (ROOT / "tests").glob("test_*.py") if MARKED.search(path.read_text("utf-8")))
    return [*ops, *(name for path in found if (name := f"tests/{path.name}") not in ops)]


def stages(where: Where, half: int | None = None) -> list[Stage]:
    """What runs, most important first. The first half is worth having alone; each takes six minutes at most."""

    def command(function: Callable[..., None], *arguments: str) -> list[str]:
        dry = ["--dry"] if where.dry else []
        module = [sys.executable, "-m", "benchmarks.gpu", "stage", function.__name__, *arguments]
        return [*module, "--out", str(where.out), *dry]

    # On a GPU each op has its own process: one that reads out of bounds ends it.
    ops_alone = [op_names()] if where.dry else [[name] for name in op_names()]
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
    if where.dry:
        tests = [*tests[:-2], "tests/test_geglu.py", "-n", "1", "-k", "reference or kernel"]
    else:
        tests += ["-n", "12", *suite()]
    models = ["sd15-512"] if where.dry else ["sd15-512", "sdxl-1024", "sd-turbo-512"]
    second = [
        Stage("tests", [tests], 110),
        Stage("sanitizer", [[*tool, *command(smallest)] for tool in _sanitizers(where)], 70, together=True),
        Stage("pictures", [command(pictures, name) for name in models], 90),
        Stage("torch.compile", [command(compiled, "sd15-512")], 90),
        Stage("slots", [command(slots, "sd15-512")], 40),
        Stage("tune", [command(tune)], 90),
    ]
    chosen = {None: [*first, *second], 1: first, 2: second}[half]
    return [_placed(stage, where) for stage in chosen]


def sanitizer() -> str:
    """Where compute-sanitizer is, or would be: it comes with the CUDA toolkit."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def _sanitizers(where: Where) -> list[list[str]]:
    """compute-sanitizer, memory and races; nothing before the command in a dry run."""
    if where.dry:
        return [[]]
    return [[sanitizer(), "--tool", check, "--error-exitcode", "9"] for check in ("memcheck", "racecheck")]


def _placed(stage: Stage, where: Where) -> Stage:
    """The stage in the checkout; in a dry run on one thread, interpreting, and without what the machine lacks."""
    environment = dict(os.environ)
    seconds = stage.seconds
    if where.dry:
        seconds = 300.0  # a rehearsal is right or wrong, however busy the machine
        environment = without(*MISSING) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TRITON_INTERPRET"] = "0" if stage.name == "compile" else "1"
    return replace(stage, seconds=seconds, environment=environment, folder=ROOT)


STAGES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (ceilings, compile_kernels, checks, step, ops, variants, smallest, pictures, compiled, slots, tune)
}
"""What `python -m benchmarks.gpu stage NAME` runs."""
LISTS = (checks, ops)
"""Those that take any number of names."""


def run_stage(name: str, arguments: Sequence[str], where: Where) -> None:
    """One stage, in this process."""
    function = STAGES[name]
    op_names()  # registers them all
    function(where, list(arguments)) if function in LISTS else function(where, *arguments)
