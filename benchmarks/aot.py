"""Compiles every kernel for every GPU that is supported, at the shapes of SD1.5, SDXL, their VAE and CLIP, and tables
what each takes. Needs no GPU.

    python -m benchmarks.aot                     writes benchmarks/results/aot.md and aot.json
    python -m benchmarks.aot --arch 90 --op attention

A row is one kernel in one configuration: registers a thread, bytes of stack (what spills goes there), shared memory.
Exits with 1 if a kernel spills, or takes more shared memory than the chip has.
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


def compile_all(arch: int, workload: str, dtype: str, op: str | None) -> list[dict[str, Any]]:
    """What a workload launches on sm_`arch`, by default and where every op takes its kernel, compiled."""
    # Watched first, on the torch path: what is compiled is then what one op launches, and no op inside another.
    wanted = [] if op is None else [call for call in calls(workload, DTYPES[dtype]) if call.op == op]
    ahead = Ahead(arch)
    with dispatch.targeting(ahead):
        if op is None:
            WORKLOADS[workload](DTYPES[dtype])
        with dispatch.use("triton"):
            if op is None:
                WORKLOADS[workload](DTYPES[dtype])
            for call in wanted:
                args, kwargs = call.arguments("meta")
                dispatch.OPS[call.op](*args, **kwargs)
    return [row(compiled, dtype) for compiled in ahead.compiled.values()]


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
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert used is not None, said.stdout
    return int(used[1]), int(used[2])


def render(rows: Iterable[dict[str, Any]]) -> str:
    """One line a kernel, configuration and dtype; registers / shared KiB of each architecture side by side."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for one in rows:
        constants = " ".join(f"{name}={value}" for name, value in one["constants"].items())
        cell = f"{one['registers']} / {one['shared'] / 1024:.0f}" + (f" **spills {one['stack']}**" * (one["stack"] > 0))
        lines.setdefault((one["kernel"], one["dtype"], constants), {})[one["arch"]] = cell
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
    parser.add_argument("--op", help="only this op, such as attention; prints and writes no file")
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
        found = [one for rows in pool.map(compile_all, *zip(*jobs, strict=True)) for one in rows]
    rows = list({json.dumps(one, sort_keys=True): one for one in found}.values())
    rows.sort(key=lambda one: (one["kernel"], one["arch"], one["dtype"], str(one["constants"])))
    if args.op or args.arch or args.workload or args.dtype:
        print(render(rows))
    else:
        args.results.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(one, sort_keys=True) for one in rows)
        (args.results / "aot.json").write_text(f"[\n{lines}\n]\n")
        (args.results / "aot.md").write_text(render(rows))
        print(f"{len(rows)} kernels; see {args.results / 'aot.md'}")
    spilled = [one for one in rows if one["stack"]]
    for one in spilled:
        print(f"spills {one['stack']} bytes: {one}", file=sys.stderr)
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
