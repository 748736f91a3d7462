"""benchmarks/stages.py: stages that fail in every way leave the rest and their rows intact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from benchmarks import first, stages
from benchmarks.stages import Stage

PYTHON = sys.executable


def python(*lines: str) -> list[str]:
    """A process of this checkout that runs some lines and can emit rows."""
    return [PYTHON, "-c", "; ".join(["import os, sys, time", "from benchmarks.stages import emit", *lines])]


def run(plan: list[Stage], folder: Path, seconds: float = 60, **options: Any) -> dict[str, str]:
    plan = [first.replace(stage, folder=ROOT) for stage in plan]
    return stages.run(plan, folder, seconds, say=lambda text: None, **options)


FAILURES = {
    "raises": (["emit(a=1)", "raise RuntimeError('broken')"], "failed"),
    "hangs": (["emit(a=1)", "time.sleep(600)"], "timed out"),
    "is killed": (["emit(a=1)", "os.kill(os.getpid(), 9)"], "killed"),
    "exits in half a row": (["emit(a=1)", "os.write(1, b'\\x1e{\"half\": ')", "os._exit(3)"], "failed"),
    "prints what is no row": (
        ["emit(a=1)", "print('\\x1e{not a row')", "print('\\x1e[1, 2]')", "sys.exit(1)"],
        "failed",
    ),
    "leaves a child that holds its output": (
        ["emit(a=1)", "import subprocess", "subprocess.Popen(['sleep', '600'])"],
        "done",
    ),
    "writes bytes that are no text": (["emit(a=1)", "os.write(1, bytes(range(128, 256)) + b'\\n')"], "done"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_stage_leaves_the_rest_intact(kind: str, tmp_path: Path) -> None:
    lines, expected = FAILURES[kind]
    plan = [
        Stage("before", [python("emit(found=1)")], 30),
        Stage("poison", [python(*lines)], 5 if kind == "hangs" else 30),
        Stage("after", [python("emit(found=2)")], 30),
    ]
    assert run(plan, tmp_path) == {"before": "done", "poison": expected, "after": "done"}
    rows = stages.read(tmp_path)
    assert [row["found"] for row in rows if "found" in row] == [1, 2]
    assert [row["a"] for row in stages.of(rows, "poison")] == [1]
    assert stages.ended(rows) == {"before": "done", "poison": expected, "after": "done"}
    for line in (tmp_path / stages.RESULTS).read_text().splitlines():
        json.loads(line)


def test_a_missing_command_is_a_failed_stage(tmp_path: Path) -> None:
    plan = [Stage("missing", [["/no/such/tool"]], 30), Stage("after", [python("emit(found=2)")], 30)]
    assert run(plan, tmp_path) == {"missing": "failed", "after": "done"}
    assert "No such file" in next(row["why"] for row in stages.read(tmp_path) if row["stage"] == "missing")


def test_parallel_commands_fail_independently(tmp_path: Path) -> None:
    commands = [python("emit(found=1)"), python("sys.exit(2)"), python("time.sleep(1)", "emit(found=3)")]
    assert run([Stage("together", commands, 30, together=True)], tmp_path) == {"together": "failed"}
    assert sorted(row["found"] for row in stages.read(tmp_path) if "found" in row) == [1, 3]


def test_rows_are_written_before_the_stage_ends(tmp_path: Path) -> None:
    look = f"sys.exit('early' not in open({str(tmp_path / stages.RESULTS)!r}).read())"
    assert run([Stage("one", [python("emit(early=1)", "time.sleep(0.5)", look)], 60)], tmp_path) == {"one": "done"}


def test_stages_beyond_the_time_limit_do_not_run(tmp_path: Path) -> None:
    plan = [Stage("long", [python("time.sleep(600)")], 3), Stage("late", [python("emit(found=1)")], 30)]
    assert run(plan, tmp_path, seconds=4) == {"long": "timed out", "late": "no time"}


def test_resume_continues_after_an_incomplete_row(tmp_path: Path) -> None:
    plan = [Stage("one", [python("emit(found=1)")], 30), Stage("two", [python("emit(found=2)")], 30)]
    run(plan[:1], tmp_path)
    with (tmp_path / stages.RESULTS).open("a") as file:
        file.write('{"stage": "two", "found": ')  # the machine went away in the middle of a row
    with pytest.raises(FileExistsError, match="--resume"):
        run(plan, tmp_path)
    assert run(plan, tmp_path, resume=True) == {"one": "done", "two": "done"}
    assert [row["found"] for row in stages.read(tmp_path) if "found" in row] == [1, 2]


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    run([Stage("one", [python("emit(a=float('nan'), b=[float('inf')], c={1: 2.5})")], 30)], tmp_path)
    assert stages.read(tmp_path)[0] == {"a": "nan", "b": ["inf"], "c": {"1": 2.5}, "stage": "one"}
