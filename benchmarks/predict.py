"""Predicts the time of a step and of a decode on an H200 from the kernels' machine code: a theory for the first run to
test, made before it.

    python -m benchmarks.predict                          writes predicted.md, .json and predicted_table.json
    python -m benchmarks.predict --workload "sd15-512 step"

Needs no GPU. A workload runs on the meta device as a CUDA graph would contain it; each launch is a node. A node takes

    gap + ramp + max(rounds of programs, bytes)

gap: from one node of a graph to the next. ramp: until the first bytes have come and the last have gone. bytes: those of
the op, each once, at the rate that a large copy reaches. rounds: a multiprocessor runs P / 132 programs of a kernel, k
of them at a time. What limits a program is read from its machine code (benchmarks/sass.py): cycles of issue, of the
matrix units, of the special functions, of shared memory, in the main loop times its iterations, and once in the rest.
All programs together keep a unit at most fully busy; one program alone does not overlap its matrix products with the
rest of its instructions, k programs do with each other's:

    rounds = max(n * the busiest unit's cycles, ceil(n / k) * (matrix + the busiest other unit's cycles))

Products of cuBLAS and cuDNN are rounds of their best tile, of which the matrix units reach EFFICIENCY. Everything else
of PyTorch is its bytes.

The model takes EFFICIENCY off the libraries' products, which have been measured, and nothing off ours, which have not.
So a workload has a second, cautious time, in which ours pay for it too, as do the partial sums of a split product for
being written. Choices that are made by default, for want of a measurement, are faster by both.

What a table of launch configurations may give is predicted too: `predicted_table` takes, for each shape, what the model
says is fastest, and the workload is predicted with that table. That is the most it can give. `make gpu-first` runs a
step by it against the default.

The constants are from data sheets and published measurements of other kernels, none was fitted to a run of these: they
stay as they are until one has been compared with them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import sass
from benchmarks.aot import RESULTS, resources
from benchmarks.networks import SD15, SDXL, VAE, calls, in_eight_bits
from fastldm.kernels import dispatch
from fastldm.kernels.compile import Ahead, Compiled
from fastldm.kernels.dispatch import Table, cdiv
from fastldm.planning import dry_run
from fastldm.planning.tune import candidates

CLOCK = 1.755e9
MULTIPROCESSORS = 132
BYTES = 4.3e12  # a second, of 4.8 on the data sheet: what a large copy reaches
GAP, RAMP = 0.9e-6, 1.0e-6
# Of the matrix units' peak, by the elements of the tile, for operands that come in time. Source: cuBLAS on an H100 at
# large sizes, 700 to 750 TFLOP/s of 989; CUTLASS's profiler for the smaller tiles.
EFFICIENCY = {128 * 256: 0.78, 128 * 128: 0.70, 64 * 128: 0.60, 64 * 64: 0.45}
TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))

# Views, and what a graph does not contain. (The meta device's convolutions forget that they are channels-last, and are
# copied; cuDNN's do not.)
FREE = frozenset({
    "alias", "as_strided", "clone", "detach", "empty", "empty_strided", "expand", "new_empty", "permute", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
})  # fmt: skip

ITERATIONS: dict[str, Callable[[dict[str, Any], dict[str, Any], tuple[int, ...]], int]] = {
    "linear_kernel": lambda a, c, grid: cdiv(cdiv(a["k"], c["BLOCK_K"]), c["SPLIT"]),
    "lora_linear_kernel": lambda a, c, grid: cdiv(a["k"], c["BLOCK_K"]),
    "shrink_kernel": lambda a, c, grid: cdiv(a["k"], c["BLOCK_K"]),
    "_conv_kernel": lambda a, c, grid: cdiv(c["TAPS"] ** 2 * cdiv(a["channels"], c["BLOCK_K"]), c["SPLIT"]),
    "_long_kernel": lambda a, c, grid: cdiv(a["keys"], c["BLOCK_N"]),
    "_short_kernel": lambda a, c, grid: cdiv(cdiv(a["queries"], c["BLOCK_M"]), grid[0]),
    "_statistics_kernel": lambda a, c, grid: c["TILES"],
    "_normalise_kernel": lambda a, c, grid: c["TILES"],
    "_guidance_rescale_kernel": lambda a, c, grid: cdiv(a["pixels"], c["PIXELS"]),
}
"""How often a program runs its main loop: (arguments by name, constants, grid) -> times. Kernels without an entry have
none."""

WORKLOADS: dict[str, Callable[[torch.dtype], dry_run.DryRun]] = {
    "sd15-512 step": lambda dtype: dry_run.step(SD15, height=64, width=64, rows=2, tokens=77, dtype=dtype),
    "sdxl-1024 step": lambda dtype: dry_run.step(SDXL, height=128, width=128, rows=2, tokens=77, dtype=dtype),
    "sdxl-1024 step, fp8": lambda dtype: in_eight_bits(
        dry_run.network(SDXL, dtype), dry_run.step(SDXL, height=128, width=128, rows=2, tokens=77, dtype=dtype)
    ),
    "vae-512 decode": lambda dtype: dry_run.decode(VAE, height=64, width=64, batch=1, dtype=dtype),
}


@dataclass(frozen=True)
class Node:
    """A launch of a workload and its predicted time."""

    op: str  # fastldm's op that launches it, or "torch"
    kernel: str
    shape: str
    seconds: float
    bound: str
    cautious: float  # seconds, with EFFICIENCY taken off fastldm's products too


def efficiency(elements: int) -> float:
    """Of the largest tile of EFFICIENCY that a tile of so many elements has within."""
    return max((value for size, value in EFFICIENCY.items() if size <= elements), default=EFFICIENCY[64 * 64])


def matrix_product(m: int, n: int, k: int, elements: int | None = None) -> tuple[float, str]:
    """Seconds of a library's product (m, k) x (k, n), 16-bit, without gap and ramp; and what bounds it. elements: read
    and written in memory, by default those of the three matrices; a convolution's are fewer.
    """
    times = []
    for rows, columns in TILES:
        for split in (1, 2, 4, 8):
            rounds = cdiv(cdiv(m, rows) * cdiv(n, columns) * split, MULTIPROCESSORS)
            depth = cdiv(k, split)
            matrix = 2 * rows * columns * depth / sass.MATRIX / EFFICIENCY[rows * columns]
            copies = 2 * (rows + columns) * depth / sass.CACHE_BYTES
            sums = 8 * m * n * split / BYTES + GAP + RAMP if split > 1 else 0.0
            times.append((rounds * max(matrix, copies) / CLOCK + sums, "matrix" if matrix >= copies else "cache"))
    moved = 2 * (m * k + k * n + m * n if elements is None else elements) / BYTES
    return max(min(times), (moved, "bytes"))


class Watch(TorchDispatchMode, Ahead):
    """A GPU that takes the time of every node."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Ahead.__init__(self, sass.ARCH)
        self.nodes: list[Node] = []
        self._ops: list[tuple[str, int]] = []  # the ops under way: name, bytes
        self._read: dict[int, tuple[int, sass.Loop, bool, sass.Loop]] = {}

    def observe(self, op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        self._ops.append((op.name, op.cost(*args, **kwargs).bytes))
        return lambda: (self._ops.pop(), None)[1]

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        compiled = self.compile(kernel, args, constants)
        resident, loop, loops, everything = self._code(compiled)
        named = dict(zip(kernel.arg_names, args, strict=False))
        name = kernel.fn.__name__
        count = ITERATIONS[name](named, constants, grid) if loops and name in ITERATIONS else 1
        warps = int(constants["num_warps"])
        once, each = everything.cycles(warps), loop.cycles(warps)
        cycles = {unit: once[unit] + (count - 1) * each[unit] for unit in ("issue", "matrix", "special", "shared")}
        programs = cdiv(prod(grid), MULTIPROCESSORS)
        together = max(1, min(resident, programs))
        busiest = max(cycles, key=lambda unit: cycles[unit])
        alone = cycles["matrix"] + max(cycles[unit] for unit in cycles if unit != "matrix")
        rounds = max(programs * cycles[busiest], cdiv(programs, together) * alone) / CLOCK
        tensors = [t for t in args if isinstance(t, Tensor)]
        # An op of several kernels reads and writes its bytes in one of them, the others most of them again.
        moved = min(self._ops[-1][1] if self._ops else 1 << 60, sum(t.numel() * t.element_size() for t in tensors))
        shape = "x".join(map(str, tensors[0].shape))
        seconds, bound = max((rounds, busiest), (moved / BYTES, "bytes"))
        cautious = seconds
        if name in ("linear_kernel", "_conv_kernel"):
            columns = (constants["BLOCK_N"] + constants.get("MORE_N", 0)) * (2 if constants.get("GEGLU") else 1)
            paid = efficiency(constants["BLOCK_M"] * columns)
            partial_sums = sum(4 * t.numel() for t in tensors if t.dim() == 3) if constants["SPLIT"] > 1 else 0
            cautious = max(cautious, programs * cycles["matrix"] / paid / CLOCK) + partial_sums / BYTES
        self._add(name, shape, seconds, bound, cautious)

    def _code(self, compiled: Compiled) -> tuple[int, sass.Loop, bool, sass.Loop]:
        """Programs that a multiprocessor holds, and the code; read once for each kernel."""
        if id(compiled) not in self._read:
            registers, _ = resources(compiled.cubin)
            held = sass.programs(registers, compiled.shared, int(dict(compiled.constants)["num_warps"]))
            self._read[id(compiled)] = (held, *sass.main_loop_and_all(sass.disassemble(compiled.cubin)))
        return self._read[id(compiled)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FREE:
            return out
        tensors = [t for t in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if isinstance(t, Tensor)]
        shapes = [tuple(t.shape) for t in tensors]
        if name in ("mm", "addmm", "addmm_"):
            (m, k), n = shapes[-3] if name == "mm" else shapes[1], shapes[-1][1]
            seconds, bound = matrix_product(m, n, k)
        elif name == "convolution":
            weight, result = shapes[1], shapes[-1]
            transposed = weight[0] == shapes[0][1] and bool(args[6])
            pixels = result[0] * result[2] * result[3] // (4 if transposed else 1)
            filters = 4 * result[1] if transposed else result[1]  # the phases, 2x2 taps each
            taps = 4 if transposed else prod(weight[2:])
            elements = tensors[0].numel() + tensors[1].numel() + tensors[-1].numel()
            seconds, bound = matrix_product(pixels, filters, shapes[0][1] * taps, elements)
        else:
            unique = {id(t): t.numel() * t.element_size() for t in tensors}
            seconds, bound = sum(unique.values()) / BYTES, "bytes"
        self._add(name, "x".join(map(str, shapes[-1] if shapes else ())), seconds, bound)
        return out

    def _add(self, kernel: str, shape: str, seconds: float, bound: str, cautious: float | None = None) -> None:
        op = self._ops[0][0] if self._ops else "torch"
        launch = GAP + RAMP
        later = launch + (seconds if cautious is None else cautious)
        self.nodes.append(Node(op, kernel, shape, launch + seconds, bound if seconds > launch else "launch", later))


def nodes(workload: str, paths: Table | Literal["own"] | None = None) -> list[Node]:
    """The nodes of a workload's graph, in float16: by default paths, by those of a table, or with every op by its own
    kernel.
    """
    dispatch.load_ops()
    watch, dtype = Watch(), torch.float16
    way = nullcontext() if paths is None else dispatch.use("triton") if paths == "own" else dispatch.use_table(paths)
    with dispatch.targeting(watch), way:
        run = WORKLOADS[workload](dtype)
        watch.nodes.clear()  # of what making it launched
        with watch, dispatch.observe(watch.observe):
            run()
    return watch.nodes


def predicted_table(workload: str) -> Table:
    """A table of launch configurations: the fastest candidate, or the library, for the ops of a workload that a library
    computes by default. Of several calls of a class the first decides.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    watch = Watch()  # one, for it reads each kernel's code once

    def seconds(op: dispatch.Op[..., Any], shape_class: str, entry: Mapping[str, Any]) -> float:
        watch.nodes.clear()
        only = {f"sm_{sass.ARCH}": {op.name: {shape_class: entry}}}
        with dispatch.use_table(only), dispatch.targeting(watch), watch, dispatch.observe(watch.observe):
            op(*args, **kwargs)
        return sum(node.seconds for node in watch.nodes)

    for call in calls(workload, torch.float16):
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        with dispatch.targeting(dispatch.Target(sass.ARCH)):
            if op.prefer != "torch" or not op.supports(*args, **kwargs):
                continue
            shape_class = op.shape_class(*args, **kwargs)
            configs = candidates(op, shape_class, sass.ARCH, args, kwargs)
        if shape_class in table.get(op.name, {}):
            continue
        own = [(seconds(op, shape_class, {"path": "triton", "config": config}), config) for config in configs]
        best, config = min(own, key=lambda pair: pair[0])
        library = seconds(op, shape_class, {"path": "torch", "config": config})
        us = {"us": round(1e6 * best, 2), "torch_us": round(1e6 * library, 2)}
        entry = {"config": config, "path": "triton" if best <= library else "torch", "predicted": us}
        table.setdefault(op.name, {})[shape_class] = entry
    return {f"sm_{sass.ARCH}": table}


def summary(of: list[Node]) -> dict[str, Any]:
    """Milliseconds and launches of a workload, in all and by op and kernel."""
    parts: dict[str, dict[str, Any]] = {}
    for node in of:
        part = parts.setdefault(f"{node.op}: {node.kernel}", {"launches": 0, "ms": 0.0, "bounds": {}})
        part["launches"] += 1
        part["ms"] += 1e3 * node.seconds
        part["bounds"][node.bound] = part["bounds"].get(node.bound, 0) + 1
    ordered = sorted(parts.items(), key=lambda item: -item[1]["ms"])
    rounded = {name: {**part, "ms": round(part["ms"], 4)} for name, part in ordered}
    total = sum(node.seconds for node in of)
    return {
        "ms": round(1e3 * total, 3),
        "cautious ms": round(1e3 * sum(node.cautious for node in of), 3),
        "launches": len(of),
        "gaps and ramps, ms": round(1e3 * (GAP + RAMP) * len(of), 3),
        "parts": rounded,
    }


def render(summaries: dict[str, dict[str, Any]], by_table: dict[str, dict[str, Any]] | None = None) -> str:
    """The tables; by_table: summaries of the same workloads by the predicted table."""
    lines = [
        "# The predicted time of a step on an H200",
        "",
        f"`python -m benchmarks.predict`, triton {metadata.version('triton')}, float16, one guided image. Not "
        "measured: the docstring of benchmarks/predict.py has the model. Bounds: how many launches take longest for "
        "what.",
    ]
    for name, total in summaries.items():
        lines += [
            "",
            f"## {name}: {total['ms']:.2f} ms, {total['launches']} launches",
            "",
            f"With the libraries' efficiency taken off fastldm's products too: {total['cautious ms']:.2f} ms.",
            "",
            "| op: kernel | launches | ms | bounds |",
            "|---|---|---|---|",
        ]
        if by_table is not None:
            tabled = by_table[name]
            text = "At most by the predicted table, fastldm's products where the model says that they are faster: "
            lines[-3:-3] = ["", f"{text}**{tabled['ms']:.2f} ms, {tabled['launches']} launches**."]
        for part, entry in total["parts"].items():
            bounds = ", ".join(f"{count} {bound}" for bound, count in entry["bounds"].items())
            lines.append(f"| {part} | {entry['launches']} | {entry['ms']:.3f} | {bounds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one; prints, writes no file")
    parser.add_argument("--own", action="store_true", help="every op by its own kernel; prints, writes no file")
    parser.add_argument("--nodes", action="store_true", help="print every launch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    selected = args.workload or list(WORKLOADS)
    with ProcessPoolExecutor(min(args.jobs, len(selected))) as pool:

        def predict(paths: Table | Literal["own"] | None) -> dict[str, list[Node]]:
            return dict(zip(selected, pool.map(partial(nodes, paths=paths), selected), strict=True))

        predicted = predict("own" if args.own else None)
        # Of a class that several workloads have, the entry of the first.
        table = {} if args.own else dispatch.merge_tables(*reversed(list(pool.map(predicted_table, selected))))
        by_table = {} if args.own else {name: summary(of) for name, of in predict(table).items()}
    if args.nodes:
        for name in selected:
            for node in predicted[name]:
                print(json.dumps(asdict(node)))
    summaries = {name: summary(of) for name, of in predicted.items()}
    text = render(summaries, by_table or None)
    if args.workload or args.own:
        print(text)
        return
    tabled = {name: {"ms": total["ms"], "launches": total["launches"]} for name, total in by_table.items()}
    whole = {name: {**total, "by table": tabled[name]} for name, total in summaries.items()}
    (args.results / "predicted.json").write_text(json.dumps(whole, indent=1) + "\n")
    (args.results / "predicted.md").write_text(text)
    (args.results / "predicted_table.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
