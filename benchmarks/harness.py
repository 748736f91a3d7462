"""Times ops on a GPU at the shapes of real networks, against their floors and the best alternatives.

A benchmark of an op is its rivals and one line:

    def rivals(x):  return {"eager": lambda: reference(x), "torch.compile": lambda: compiled(x)}
    if __name__ == "__main__":
        harness.main([GEGLU], rivals)

Each distinct call of the workloads (benchmarks/networks.py) is first checked against the reference in float32, and not
timed if it is wrong. Then everything is timed inside CUDA graphs, so that no launch overhead is counted; a graph holds
several calls on different copies of the arguments, together larger than the L2 cache where the op is bound by memory.
Times are medians of rounds in which all contenders take turns.
"""

from __future__ import annotations

import argparse
import importlib
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

from benchmarks.gpu import source
from benchmarks.networks import WORKLOADS, Call, calls
from fastldm.bench import Ceilings, ceilings, take_turns
from fastldm.kernels import dispatch

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
L2_BYTES = 128 << 20  # copies of the arguments together pass this: more than any chip's L2

Rivals = Callable[..., dict[str, Callable[[], object]]]


def main(ops: Sequence[dispatch.Op[..., Any]], rivals: Rivals) -> None:
    """The command line of an op's benchmark."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--list", action="store_true", help="only the calls with what they cost; needs no GPU")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    args = parser.parse_args()
    importlib.import_module("fastldm.models.layers")  # registers all ops

    names = {op.name for op in ops}
    wanted = [
        (workload, call, count)
        for workload in args.workload or WORKLOADS
        for call, count in calls(workload, DTYPES[args.dtype]).items()
        if call.op in names
    ]
    if args.list:
        for workload, call, count in wanted:
            flop, moved, exp = call.cost
            print(
                f"{workload:16} {count:3} x {call!s:56} "
                f"{flop / 1e9:9.2f} GFLOP {moved / 1e6:8.1f} MB {exp / 1e6:8.1f} Mexp"
            )
        return
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: this times kernels on one. --list prints shapes and costs without.")

    limits = ceilings(torch.device("cuda"), DTYPES[args.dtype])
    rows = []
    for workload, call, count in wanted:
        row = {"workload": workload, "count": count, **bench(call, rivals, limits)}
        rows.append(row)
        print(line(row), flush=True)
    folder = args.results or RESULTS / machine()
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(sys.modules["__main__"].__file__ or "op").stem
    record = {"machine": describe(), "source": source(name), "ceilings": limits._asdict(), "dtype": args.dtype}
    record["rows"] = rows
    (folder / f"{name}-{args.dtype}.json").write_text(json.dumps(record, indent=1) + "\n")
    if any("wrong" in row for row in rows):
        sys.exit("some kernels are wrong and were not timed")


def bench(call: Call, rivals: Rivals, limits: Ceilings) -> dict[str, Any]:
    """One call: correct or not, microseconds of each contender, and the floor."""
    op = dispatch.OPS[call.op]
    flop, moved, exp = call.cost
    row: dict[str, Any] = {
        "call": str(call),
        "flop": flop,
        "bytes": moved,
        "exp": exp,
        "floor_us": limits.seconds(flop, moved) * 1e6,
    }

    sets = [call.arguments("cuda") for _ in range(min(16, max(2, L2_BYTES // max(moved, 1) + 1)))]
    contenders: dict[str, list[Callable[[], object]]] = {}
    verdict = op.supports(*sets[0][0], **sets[0][1])
    if not verdict:
        row["unsupported"] = verdict.why
    elif wrong := disagreement(op, *sets[0]):
        row["wrong"] = wrong
        return row
    else:
        contenders["triton"] = [(lambda a=a, k=k: op.triton(*a, **k)) for a, k in sets]
    contenders["torch"] = [(lambda a=a, k=k: op.reference(*a, **k)) for a, k in sets]
    for args, kwargs in sets:
        for name, run in rivals(*args, **kwargs).items():
            contenders.setdefault(name, []).append(run)

    row["us"], row["spread"], row["failed"] = take_turns(contenders)
    if "triton" in row["us"]:
        others = {name: us for name, us in row["us"].items() if name != "triton"}
        best = min(others, key=others.__getitem__)
        row |= {"best_rival": best, "ratio": others[best] / row["us"]["triton"]}
    return row


def disagreement(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """How the Triton path is further from float32 than twice the reference in the same precision; None if it is not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def float32(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    exact = op.reference(*map(float32, args), **{name: float32(value) for name, value in kwargs.items()})
    plain, got = op.reference(*args, **kwargs), op.triton(*args, **kwargs)
    for g, p, e in zip(*(t if isinstance(t, tuple | list) else [t] for t in (got, plain, exact)), strict=True):
        scale = e.abs().max()
        off, allowed = (g - e).abs().max() / scale, 2 * (p - e).abs().max() / scale + torch.finfo(g.dtype).eps / 4
        if not off <= allowed:
            return f"error {off.item():.2e}, allowed {allowed.item():.2e}"
    return None


def line(row: dict[str, Any]) -> str:
    """One row for a person."""
    head = f"{row['workload']:16} {row['count']:3} x {row['call']:56}"
    if "wrong" in row:
        return f"{head} WRONG, not timed: {row['wrong']}"
    mine = row["us"].get("triton")
    others = " ".join(f"{name} {us:.1f}" for name, us in row["us"].items() if name != "triton")
    if mine is None:
        return f"{head} not supported ({row['unsupported']}); us: {others}"
    rate = f"{row['flop'] / mine / 1e6:.0f} TFLOP/s" if row["flop"] else f"{row['bytes'] / mine / 1e3:.0f} GB/s"
    return (
        f"{head} {mine:9.1f} us {rate:>12}, {100 * row['floor_us'] / mine:3.0f}% of floor, "
        f"{row['ratio']:.2f}x {row['best_rival']}; us: {others}"
    )


def machine() -> str:
    """The GPU's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def describe() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sm": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
