"""Reads the machine code of every kernel for Hopper (sm_90): registers, occupancy, and what its main loop is made of.

    python -m benchmarks.sass                     writes benchmarks/results/sass.md and sass.json
    python -m benchmarks.sass --op attention      prints the table of one op

Needs no GPU: kernels are compiled ahead of time, as benchmarks/aot.py does, and disassembled by the nvdisasm that comes
with Triton. The main loop is the innermost one with most matrix instructions, or with most instructions where none has
any; a kernel without a loop is read from its first to its last instruction.

Cycles are what one iteration takes of a multiprocessor, for all warps of a program, by what limits it: issue (four
schedulers, an instruction each), matrix units (4,096 float16 operations), special functions (16), shared memory (128
bytes) and bytes from outside: copies into shared memory at what a multiprocessor takes from the L2 cache (64), for
other programs read the same, all else at its part of the device's bandwidth. The largest is the bound: no less time
than that, as latencies and what cannot overlap are not modelled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.aot import RESULTS, compile_all, row
from benchmarks.networks import WORKLOADS
from fastldm.kernels import dispatch
from fastldm.kernels.compile import Compiled

ARCH = 90
# Of an H200 at 1.755 GHz. Source: NVIDIA's H100 architecture whitepaper and H200 datasheet.
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 227 * 1024  # of a multiprocessor
SCHEDULERS, MATRIX, SPECIAL, SHARED_BYTES = 4, 4096, 16, 128  # a cycle
DEVICE_BYTES = 4.8e12 / 132 / 1.755e9  # a cycle and multiprocessor: 20.7
CACHE_BYTES = 64  # a cycle, the most that enter a multiprocessor from the L2 cache

INSTRUCTION = re.compile(r"^\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(?P<code>[A-Z][\w.]*)(?P<rest>[^;]*);")
LABEL = re.compile(r"^(?P<name>\.L_\w+):")
TARGET = re.compile(r"`\((?P<name>\.L_\w+)\)")


class Instruction(NamedTuple):
    code: str  # with its modifiers, such as "LDGSTS.E.BYPASS.128"
    operands: str

    @property
    def name(self) -> str:
        return self.code.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a thread moves: 4 but for an explicit width."""
        return next((int(part) // 8 for part in self.code.split(".") if part in ("8", "16", "64", "128")), 4)


@dataclass(frozen=True)
class Loop:
    """What one iteration is made of, by a warp."""

    instructions: int
    matrix: dict[str, int]  # HGMMA, QGMMA (of eight bits) or HMMA by shape
    special: dict[str, int]  # MUFU by function
    copies: dict[str, int]  # from device memory to shared memory, by instruction and width
    loads: dict[str, int]  # LDG and STG, by width
    shared: dict[str, int]  # shared memory to registers and back, by width
    barriers: int
    drains: int  # waits for all matrix work or all copies
    local: int  # spilled registers written or read

    @classmethod
    def of(cls, code: Sequence[Instruction]) -> Loop:
        def counted(*names: str, key: Any = lambda i: i.code) -> dict[str, int]:
            return dict(sorted(Counter(key(i) for i in code if i.name in names).items()))

        def by_width(i: Instruction) -> str:
            return f"{i.name}.{8 * i.width}"

        return cls(
            instructions=sum(i.name != "NOP" for i in code),
            matrix=counted("HGMMA", "QGMMA", "HMMA", key=lambda i: ".".join(i.code.split(".")[:2])),
            special=counted("MUFU"),
            copies=counted("LDGSTS", "UTMALDG", "UBLKCP", key=by_width),
            loads=counted("LDG", "STG", "RED", "ATOMG", key=by_width),
            shared=counted("LDS", "STS", "LDSM", "STSM", key=by_width),
            barriers=sum(i.name in ("BAR", "SYNCS") for i in code),
            drains=sum("DEPBAR" in i.code and i.operands.rstrip().endswith("0x0") for i in code),
            local=sum(i.name in ("LDL", "STL") for i in code),
        )

    def cycles(self, warps: int) -> dict[str, float]:
        """Of a multiprocessor, for one program of so many warps."""
        operations = 0.0
        for shape, count in self.matrix.items():
            name, _, size = shape.partition(".")
            if name in ("HGMMA", "QGMMA"):  # 64 rows for a group of four warps; eight bits at twice the rate
                m, n, k = map(int, size.split("x"))
                operations += count * 2 * m * n * k * warps / (8 if name == "QGMMA" else 4)
            else:
                operations += count * 2 * 16 * 8 * 16 * warps
        moved = {kind: 32 * warps * _bytes(getattr(self, kind)) for kind in ("copies", "loads", "shared")}
        return {
            "issue": warps * self.instructions / SCHEDULERS,
            "matrix": operations / MATRIX,
            "special": 32 * warps * sum(self.special.values()) / SPECIAL,
            "shared": (moved["shared"] + moved["copies"]) / SHARED_BYTES,
            "bytes": moved["copies"] / CACHE_BYTES + moved["loads"] / DEVICE_BYTES,
        }


def _bytes(counts: dict[str, int]) -> float:
    """Of one thread."""
    return sum(count * int(name.rpartition(".")[2]) / 8 for name, count in counts.items())


def disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main_loop(text: str) -> tuple[Loop, bool]:
    """The main loop of a disassembled kernel, and whether it is one; the straight line of a kernel without."""
    return main_loop_and_all(text)[:2]


def main_loop_and_all(text: str) -> tuple[Loop, bool, Loop]:
    """As `main_loop`, and the kernel from its first to its last instruction."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label["name"]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(Instruction(found["code"], found["rest"]))
            target = TARGET.search(found["rest"])
            # Backwards, and not to itself: that is the trap behind the end.
            if found["code"].startswith("BRA") and target and labels.get(target["name"], len(code)) < len(code) - 1:
                loops.append((labels[target["name"]], len(code)))
    innermost = [
        loop
        for loop in loops
        if not any(loop != other and loop[0] <= other[0] <= other[1] <= loop[1] for other in loops)
    ]
    end = max((k for k, i in enumerate(code) if i.name == "EXIT"), default=len(code))
    everything = Loop.of(code[: end + 1])
    if not innermost:
        return everything, False, everything
    read = [Loop.of(code[start:end]) for start, end in innermost]
    return max(read, key=lambda loop: (sum(loop.matrix.values()), loop.instructions)), True, everything


def programs(registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor holds at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)  # registers are given in eights
    by_shared = SHARED // (shared + 1024)  # each program has 1 KiB of its own
    return max(0, min(PROGRAMS, WARPS // warps, by_registers, by_shared))


def read(compiled: Compiled, dtype: str) -> dict[str, Any]:
    """A row: what benchmarks/aot.py says of a kernel, and its main loop."""
    loop, loops = main_loop(disassemble(compiled.cubin))
    values = row(compiled, dtype)
    warps = int(values["constants"]["num_warps"])
    cycles = {name: round(number, 1) for name, number in loop.cycles(warps).items()}
    return values | {
        "programs": programs(values["registers"], values["shared"], warps),
        "loops": loops,
        "loop": asdict(loop),
        "cycles": cycles,
        "bound": max(cycles, key=cycles.__getitem__),
    }


def rows_of(workload: str, dtype: str, op: str | None) -> list[dict[str, Any]]:
    return [read(compiled, dtype) for compiled in compile_all(ARCH, workload, dtype, op)]


def render(rows: Iterable[dict[str, Any]]) -> str:
    table = [
        "# The machine code of the kernels on Hopper",
        "",
        f"`python -m benchmarks.sass`, triton {metadata.version('triton')}, sm_{ARCH}. Counts are of one iteration of "
        "the main loop, by a warp, or of the kernel where it has none (marked *). Cycles are of a multiprocessor, for "
        "one program and iteration; the largest is the bound.",
        "",
        "| kernel | dtype | configuration | registers | programs an SM | instructions | matrix | special "
        "| copies, loads | shared | barriers, drains | cycles: issue / matrix / special / shared / bytes | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        loop, cycles = entry["loop"], entry["cycles"]
        hidden = ("num_stages", "maxnreg")
        constants = " ".join(f"{name}={value}" for name, value in entry["constants"].items() if name not in hidden)
        cells = [
            entry["kernel"],
            entry["dtype"],
            constants,
            entry["registers"],
            entry["programs"],
            f"{loop['instructions']}{'' if entry['loops'] else '*'}",
            *(_listed(loop[kind]) for kind in ("matrix", "special")),
            _listed(loop["copies"] | loop["loads"]),
            _listed(loop["shared"]),
            f"{loop['barriers']}, {loop['drains']}",
            " / ".join(f"{cycles[name]:.0f}" for name in ("issue", "matrix", "special", "shared", "bytes")),
            entry["bound"],
        ]
        table.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(table) + "\n"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only this op, such as attention; prints the table unless --results is given")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--results", type=Path, help=f"folder for the table (of all: {RESULTS})")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()

    dispatch.load_ops()
    with ProcessPoolExecutor(args.jobs) as pool:
        found = pool.map(partial(rows_of, dtype="float16", op=args.op), args.workload or WORKLOADS)
        rows = list({json.dumps(entry, sort_keys=True): entry for entries in found for entry in entries}.values())
    rows.sort(key=lambda entry: (entry["kernel"], str(entry["constants"])))
    results = args.results or (None if args.op or args.workload else RESULTS)
    if results is None:
        print(render(rows))
        return
    results.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in rows)
    (results / "sass.json").write_text(f"[\n{lines}\n]\n")
    (results / "sass.md").write_text(render(rows))
    print(f"{len(rows)} kernels; see {results / 'sass.md'}")


if __name__ == "__main__":
    main()
