"""Times ops on a GPU at the shapes of real networks, against their floors and the fastest alternatives.

A benchmark of an op is a function of its rivals and one line:

    def rivals(x):  return {"eager": lambda: reference(x), "torch.compile": lambda: compiled(x)}
    if __name__ == "__main__":
        harness.main([GEGLU], rivals)

Each distinct call of the workloads (benchmarks/networks.py) is first checked against the reference in float32, and not
timed if it is wrong. All contenders are timed inside CUDA graphs, so that no launch overhead is counted; a graph holds
several calls on different copies of the arguments, together larger than the L2 cache where the op is bound by memory.
Times are medians of rounds in which all contenders take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import WORKLOADS, Call, calls
from fastldm.kernels import dispatch
from fastldm.planning.timing import Ceilings, ceilings, take_turns

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
L2_BYTES = 128 << 20  # copies of the arguments together exceed this: more than the L2 cache of any GPU

Rivals = Callable[..., dict[str, Callable[[], object]]]


def main(ops: Sequence[dispatch.Op[..., Any]], rivals: Rivals) -> None:
    """The command line of an op's benchmark."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--list", action="store_true", help="only the calls with their costs; needs no GPU")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this workload; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    args = parser.parse_args()
    dispatch.load_ops()

    names = {op.name for op in ops}
    selected = [
        (workload, call, count)
        for workload in args.workload or WORKLOADS
        for call, count in calls(workload, DTYPES[args.dtype]).items()
        if call.op in names
    ]
    if args.list:
        for workload, call, count in selected:
            flop, moved, exp = call.cost
            print(
                f"{workload:16} {count:3} x {call!s:56} "
                f"{flop / 1e9:9.2f} GFLOP {moved / 1e6:8.1f} MB {exp / 1e6:8.1f} Mexp"
            )
        return
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: this times kernels on one. --list prints shapes and costs without.")

    measured = ceilings(torch.device("cuda"), DTYPES[args.dtype])
    name = Path(sys.modules["__main__"].__file__ or "op").stem
    record = Record(
        args.results, f"{name}-{args.dtype}", source=source(name), ceilings=measured._asdict(), dtype=args.dtype
    )
    for workload, call, count in selected:
        row = {"workload": workload, "count": count, **bench(call, rivals, measured)}
        record.add(row)
        print(line(row), flush=True)
    record.end()


class Record:
    """The results of a benchmark on a GPU as a file, written after every row: an aborted run keeps its rows."""

    def __init__(self, folder: Path | None, name: str, **header: Any) -> None:
        """folder: benchmarks/results/GPU when None."""
        folder = folder or RESULTS / machine()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self.content: dict[str, Any] = {"machine": describe(), **header, "whole": False, "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        self.content["rows"].append(row)
        self.write()

    def write(self) -> None:
        unfinished = self.path.with_name(self.path.name + ".partial")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)

    def end(self) -> None:
        """Mark the file as complete. Exits with 1 if a kernel was wrong."""
        self.content["whole"] = True
        self.write()
        if any("wrong" in row for row in self.content["rows"]):
            sys.exit("some kernels are wrong and were not timed")


def bench(
    call: Call,
    rivals: Rivals,
    ceilings: Ceilings,
    *,
    device: str = "cuda",
    copies: int | None = None,
    rounds: int = 9,
    seconds: float = 0.02,
) -> dict[str, Any]:
    """The row of a call: correct or not, microseconds of each contender, and the floor.

    copies: sets of arguments; None: as many as exceed the L2 cache.
    """
    op = dispatch.OPS[call.op]
    flop, moved, exp = call.cost
    row: dict[str, Any] = {
        "call": str(call),
        "flop": flop,
        "bytes": moved,
        "exp": exp,
        "floor_us": ceilings.seconds(flop, moved) * 1e6,
    }

    copies = copies or min(16, max(2, L2_BYTES // max(moved, 1) + 1))
    sets = [call.arguments(device) for _ in range(copies)]
    contenders: dict[str, list[Callable[[], object]]] = {}
    verdict = op.supports(*sets[0][0], **sets[0][1])
    if not verdict:
        row["unsupported"] = verdict.reason
    elif wrong := disagreement(op, *sets[0]):
        row["wrong"] = wrong
        return row
    else:
        contenders["triton"] = [(lambda a=a, k=k: op.triton(*a, **k)) for a, k in sets]
    contenders["torch"] = [(lambda a=a, k=k: op.reference(*a, **k)) for a, k in sets]
    for args, kwargs in sets:
        for name, call_rival in rivals(*args, **kwargs).items():
            contenders.setdefault(name, []).append(call_rival)

    row["us"], row["spread"], row["failed"] = take_turns(contenders, rounds, seconds)
    return row | against_rivals(row["us"])


def against_rivals(us: dict[str, float], ours: str = "triton") -> dict[str, Any]:
    """The fastest rival and the ratio of its time to ours; nothing where either is missing."""
    rivals = {name: time for name, time in us.items() if not name.startswith(ours)}
    if ours not in us or not rivals:
        return {}
    best = min(rivals, key=rivals.__getitem__)
    return {"best_rival": best, "ratio": rivals[best] / us[ours]}


SMALL = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}  # a quarter of the last place, about
SMALL[torch.float8_e4m3fn] = 2**-4  # a step of the largest numbers: sums of another order may round to the next
# Of products of 8 bits, which Hopper's matrix units add with 14: 160 times for the largest of SDXL.
EIGHT_BIT_SUMS = 4e-3


def disagreement(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The first output or mutated argument for which the Triton path's error, against float32, is more than twice that
    of the reference in the same precision; None if there is none. The arguments are unchanged.
    """

    def results(function: Callable[..., Any], exactly: bool = False) -> dict[str, Tensor]:
        call = op.bind(*args, **kwargs)
        for name, value in call.items():
            if isinstance(value, Tensor):
                value = value.float() if exactly and value.is_floating_point() else value
                call[name] = value.clone() if name in op.mutates else value
        out = function(**call)
        returned = () if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
        outputs = {f"output {i}": x for i, x in enumerate(returned)}
        written = {name: call.get(name) for name in op.mutates}
        return outputs | {name: x for name, x in written.items() if isinstance(x, Tensor)}

    eight = any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in args)
    exact, expected, got = results(op.reference, exactly=True), results(op.reference), results(op.triton)
    for name, result in got.items():
        g, p, e = (t.double() for t in (result, expected[name], exact[name]))
        scale = e.abs().max().clamp_min(1e-30)
        allowed = 2 * (p - e).abs().max() / scale + SMALL.get(result.dtype, 0.0) + EIGHT_BIT_SUMS * eight
        off = (g - e).abs().max() / scale
        if not off <= allowed:
            return f"{name}: error {off.item():.2e}, allowed {allowed.item():.2e}"
    return None


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['workload']:16} {row['count']:3} x {row['call']:56}"
    if "wrong" in row:
        return f"{head} WRONG, not timed: {row['wrong']}"
    kernel_us = row["us"].get("triton")
    rivals = " ".join(f"{name} {us:.1f}" for name, us in row["us"].items() if name != "triton")
    if kernel_us is None:
        reason = row.get("unsupported") or row["failed"]["triton"]
        return f"{head} not run by a kernel ({reason}); us: {rivals}"
    tflops, gbps = row["flop"] / kernel_us / 1e6, row["bytes"] / kernel_us / 1e3
    rate = f"{tflops:.0f} TFLOP/s" if row["flop"] else f"{gbps:.0f} GB/s"
    ratio = f"{row['ratio']:.2f}x {row['best_rival']}" if "ratio" in row else "no rival ran"
    percent = 100 * row["floor_us"] / kernel_us
    return f"{head} {kernel_us:9.1f} us {rate:>12}, {percent:3.0f}% of floor, {ratio}; us: {rivals}"


def source(name: str) -> str:
    """A hash of the sources that a benchmark's figures depend on: the file of its ops and the kernels that it imports,
    or for the ladder all kernels and the runtime.
    """
    kernels = ROOT / "kernels"
    files, imported = {kernels / "tuned.json"}, [kernels / f"{name}.py"]
    if not imported[0].exists():
        files, imported = {*kernels.glob("*"), *(ROOT / "fastldm").rglob("*.py")}, []
    while imported:
        file = imported.pop()
        if file not in files:
            files.add(file)
            text = file.read_text(encoding="utf-8")
            imported += [
                kernels / f"{module}.py" for module in re.findall(r"^from fastldm\.kernels\.(\w+) ", text, re.M)
            ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files) if file.is_file())).hexdigest()[:16]


def machine() -> str:
    """The name of the GPU's folder."""
    return folder_name(torch.cuda.get_device_name())


def folder_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def describe() -> dict[str, Any]:
    """The machine and the versions of libraries, as plain data."""
    description: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if dispatch.has_triton() else None,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if not torch.cuda.is_available():
        return description
    properties = torch.cuda.get_device_properties(0)
    return description | {
        "gpu": properties.name,
        "folder": machine(),
        "sm": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "cudnn": torch.backends.cudnn.version(),
    }
