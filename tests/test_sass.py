"""benchmarks/sass.py: what it reads of machine code, and that no kernel has more instructions than its table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ops import kernels

from benchmarks.sass import Loop, main_loop, programs

COMMITTED = ROOT / "benchmarks" / "results" / "sass.json"

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   DEPBAR.LE SB0, 0x4 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   HGMMA.64x64x16.F32 R56, gdesc[UR20], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x16.F32 R24, gdesc[UR20], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   MUFU.EX2 R16, R16 ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R55+0x800], desc[UR24][R174.64], !P4 ;
        /*00a0*/              @UP1 LDS.64 R4, [R5] ;
        /*00b0*/              @!P4 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_0:
        /*00d0*/                   BRA `(.L_x_0);
        /*00e0*/                   NOP;
"""


def test_the_main_loop_is_counted() -> None:
    loop, is_loop = main_loop(LISTING)
    assert is_loop
    assert loop == Loop(
        instructions=9,
        matrix={"HGMMA.64x64x16": 2},
        special={"MUFU.EX2": 1},
        copies={"LDGSTS.128": 1},
        loads={},
        shared={"LDS.64": 1},
        barriers=1,
        drains=1,
        local=0,
    )
    cycles = loop.cycles(warps=4)
    assert cycles["issue"] == 9
    assert cycles["matrix"] == 2 * 2 * 64 * 64 * 16 / 4096  # one group of four warps: 64 rows
    assert cycles["special"] == 4 * 32 / 16
    assert cycles["shared"] == 4 * 32 * (16 + 8) / 128


def test_a_kernel_without_loops_is_read_to_its_exit() -> None:
    straight = "\n".join(line for line in LISTING.splitlines() if "L_x_1" not in line and "L_x_2" not in line)
    loop, is_loop = main_loop(straight)
    assert not is_loop
    assert loop.instructions == 11  # with LDC, IADD3 and EXIT, without the trap behind it


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "count"),
    [(32, 0, 8, 8), (202, 0, 4, 2), (128, 0, 4, 4), (255, 100 * 1024, 8, 1), (64, 100 * 1024, 4, 2), (16, 0, 1, 32)],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, count: int) -> None:
    assert programs(registers, shared, warps) == count


def counts(file: Path) -> dict[str, tuple[int, int]]:
    """Instructions and registers by kernel and configuration, the most of those that differ in their arguments."""
    most: dict[str, tuple[int, int]] = {}
    for row in json.loads(file.read_text()):
        key = json.dumps([row["kernel"], row["constants"]], sort_keys=True)
        instructions, registers = most.get(key, (0, 0))
        most[key] = max(instructions, row["loop"]["instructions"]), max(registers, row["registers"])
    return most


def test_the_table_has_every_kernel_and_no_spill() -> None:
    rows: list[dict[str, Any]] = json.loads(COMMITTED.read_text())
    assert {row["kernel"] for row in rows} == kernels()
    assert all(row["loop"]["local"] == 0 and row["programs"] >= 1 for row in rows)


ONE = ["--op", "layer_norm", "--workload", "sd15-512 step"]


@pytest.mark.parametrize("options", [ONE, pytest.param([], marks=pytest.mark.full)], ids=["one op", "all"])
def test_no_kernel_has_more_instructions_than_its_table(options: list[str], tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path / "t")}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.sass", "--results", str(tmp_path), *options]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    table, now = counts(COMMITTED), counts(tmp_path / "sass.json")
    assert now
    for key, (instructions, registers) in now.items():
        assert (instructions <= table[key][0], registers <= table[key][1]) == (True, True), key
