"""Compiles every kernel for every supported GPU, at the shapes of SD1.5, SDXL, their VAE and CLIP, and writes a table
of their resources. Needs no GPU.

    python -m benchmarks.aot                     writes benchmarks/results/aot.md and aot.json
    python -m benchmarks.aot --arch 90 --op attention

A row is a kernel in a configuration: registers a thread, bytes of stack (for spilled registers), shared memory. Exits
with 1 if a kernel spills, or takes more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import WORKLOADS, calls
from fastldm.kernels import dispatch
from fastldm.kernels.compile import ARCHS, SHARED_MEMORY, Ahead, Compiled

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"end_step": ({"rare": False}, {"rare": True})}
"""By op, arguments of which its calls in the workloads have only the first."""


def compile_all(arch: int, workload: str, dtype: str, op: str | None) -> list[Compiled]:
    """Compile the kernels of a workload on sm_`arch`: of all its calls, whichever path they take by default."""
    ahead = Ahead(arch)
    with dispatch.targeting(ahead), dispatch.use("triton"):
        for call in calls(workload, DTYPES[dtype]):
            args, kwargs = call.arguments("meta")
            if op in (None, call.op) and dispatch.OPS[call.op].supports(*args, **kwargs):
                for variant in VARIANTS.get(call.op, ({},)):
                    dispatch.OPS[call.op].triton(*args, **{**kwargs, **variant})
    return list(ahead.compiled.values())


def rows_of(arch: int, workload: str, dtype: str, op: str | None) -> list[dict[str, Any]]:
    return [row(compiled, dtype) for compiled in compile_all(arch, workload, dtype, op)]


def row(compiled: Compiled, dtype: str) -> dict[str, Any]:
    constants = {name: value for name, value in compiled.constants if name != "enable_fp_fusion"}
    registers, stack = resources(compiled.cubin)
    return {
        "kernel": compiled.kernel,
        "arch": compiled.arch,
        "dtype": dtype,
        "registers": registers,
        "stack": stack,
        "shared": compiled.shared,
        "constants": {k: v if isinstance(v, int | float | str) else str(v) for k, v in constants.items()},
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from the cubin itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", output.stdout)
    assert used is not None, output.stdout
    return int(used[1]), int(used[2])


def render(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each kernel, configuration and dtype, with registers / shared KiB on each architecture."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
        cell = f"{row['registers']} / {row['shared'] / 1024:.0f}" + (f" **spills {row['stack']}**" * (row["stack"] > 0))
        lines.setdefault((row["kernel"], row["dtype"], constants), {})[row["arch"]] = cell
    table = [
        "# Every shipped kernel, compiled ahead of time",
        "",
        f"`python -m benchmarks.aot`, triton {metadata.version('triton')}. Cells are registers a thread / KiB of "
        "shared memory a program. A kernel with stack use would be marked: none may have any.",
        "",
        "Shared memory limits, KiB: " + ", ".join(f"sm_{arch} {limit}" for arch, limit in SHARED_MEMORY.items()) + ".",
        "",
        "| kernel | dtype | configuration | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |",
        "|---|---|---|" + "---|" * len(ARCHS),
    ]
    for (kernel, dtype, constants), cells in sorted(lines.items()):
        table.append(f"| {kernel} | {dtype} | {constants} | " + " | ".join(cells.get(a, "") for a in ARCHS) + " |")
    return "\n".join(table) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append", help="only this one; may be repeated")
    parser.add_argument("--op", help="only this op, such as attention; prints the table and writes no file")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()

    dispatch.load_ops()
    jobs = [
        (arch, workload, dtype, args.op)
        for arch in args.arch or ARCHS
        for workload in args.workload or WORKLOADS
        for dtype in args.dtype or DTYPES
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        compiled = [row for rows in pool.map(rows_of, *zip(*jobs, strict=True)) for row in rows]
    rows = list({json.dumps(row, sort_keys=True): row for row in compiled}.values())
    rows.sort(key=lambda row: (row["kernel"], row["arch"], row["dtype"], str(row["constants"])))
    if args.op or args.arch or args.workload or args.dtype:
        print(render(rows))
    else:
        args.results.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
        (args.results / "aot.json").write_text(f"[\n{lines}\n]\n")
        (args.results / "aot.md").write_text(render(rows))
        print(f"{len(rows)} kernels; see {args.results / 'aot.md'}")
    spilled = [row for row in rows if row["stack"]]
    for row in spilled:
        print(f"spills {row['stack']} bytes: {row}", file=sys.stderr)
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
