"""The first quarter of an hour on a GPU, rehearsed; and stages that go wrong in every way there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks import first, gpu_report, networks, readme, stages
from benchmarks.stages import Stage
from fastldm.kernels import dispatch

PYTHON = sys.executable


def python(*lines: str) -> list[str]:
    """A process of this checkout that runs some lines and can emit rows."""
    return [PYTHON, "-c", "; ".join(["import os, sys, time", "from benchmarks.stages import emit", *lines])]


def run(plan: list[Stage], folder: Path, seconds: float = 60, **options: Any) -> dict[str, str]:
    plan = [first.replace(stage, folder=ROOT) for stage in plan]
    return stages.run(plan, folder, seconds, say=lambda text: None, **options)


POISON = {
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


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_stage_costs_itself_alone(kind: str, tmp_path: Path) -> None:
    lines, expected = POISON[kind]
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


def test_a_command_that_is_not_there_is_a_stage_that_failed(tmp_path: Path) -> None:
    plan = [Stage("missing", [["/no/such/tool"]], 30), Stage("after", [python("emit(found=2)")], 30)]
    assert run(plan, tmp_path) == {"missing": "failed", "after": "done"}
    assert "No such file" in next(row["why"] for row in stages.read(tmp_path) if row["stage"] == "missing")


def test_stages_side_by_side_fail_alone(tmp_path: Path) -> None:
    commands = [python("emit(found=1)"), python("sys.exit(2)"), python("time.sleep(1)", "emit(found=3)")]
    assert run([Stage("together", commands, 30, together=True)], tmp_path) == {"together": "failed"}
    assert sorted(row["found"] for row in stages.read(tmp_path) if "found" in row) == [1, 3]


def test_rows_are_there_before_the_stage_ends(tmp_path: Path) -> None:
    look = f"sys.exit('early' not in open({str(tmp_path / stages.RESULTS)!r}).read())"
    assert run([Stage("one", [python("emit(early=1)", "time.sleep(0.5)", look)], 60)], tmp_path) == {"one": "done"}


def test_no_time_is_left_to_what_does_not_fit(tmp_path: Path) -> None:
    plan = [Stage("long", [python("time.sleep(600)")], 3), Stage("late", [python("emit(found=1)")], 30)]
    assert run(plan, tmp_path, seconds=4) == {"long": "timed out", "late": "no time"}


def test_resume_goes_on_where_a_machine_went_away(tmp_path: Path) -> None:
    plan = [Stage("one", [python("emit(found=1)")], 30), Stage("two", [python("emit(found=2)")], 30)]
    run(plan[:1], tmp_path)
    with (tmp_path / stages.RESULTS).open("a") as file:
        file.write('{"stage": "two", "found": ')  # the machine went away in the middle of a row
    with pytest.raises(FileExistsError, match="--resume"):
        run(plan, tmp_path)
    assert run(plan, tmp_path, resume=True) == {"one": "done", "two": "done"}
    assert [row["found"] for row in stages.read(tmp_path) if "found" in row] == [1, 2]


def test_numbers_that_json_lacks_are_told_as_text(tmp_path: Path) -> None:
    run([Stage("one", [python("emit(a=float('nan'), b=[float('inf')], c={1: 2.5})")], 30)], tmp_path)
    assert stages.read(tmp_path)[0] == {"a": "nan", "b": ["inf"], "c": {"1": 2.5}, "stage": "one"}


# ---------------------------------------------------------------------------------------------------------- rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    command = [PYTHON, "-m", "benchmarks.gpu", "first", "--dry", "--out", str(out), "--seconds", "1500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (out / stages.LOG).read_text()[-4000:]
    return out


def test_every_stage_runs_where_peers_are_missing(rehearsal: Path) -> None:
    rows = stages.read(rehearsal)
    plan = first.stages(first.Context(rehearsal, dry=True))
    assert stages.ended(rows) == dict.fromkeys([stage.name for stage in plan], "done")
    assert all(any(stages.of(rows, stage.name)) for stage in plan), "a stage that found nothing"
    assert not [row for row in rows if row.get("wrong") or isinstance(row.get("failed"), str)]
    ours = [row for row in rows if "us" in row and row["stage"] in ("ops", "attention", "group norm")]
    assert ours, "ops are timed"
    assert not [row for row in ours if set(row["failed"]) - {"flash", "cudnn"}], (
        "no backend of theirs is there on a CPU"
    )
    checked = {row["op"] for row in stages.of(rows, "checks") if row.get("ended") and row["tried"]}
    assert checked == set(dispatch.OPS), "each op has a call that its kernel takes, and was tried"
    assert next(row["tests"]["passed"] for row in stages.of(rows, "tests")) >= 5
    assert len(list(rehearsal.iterdir())) <= 6
    assert all(path.is_file() and path.stat().st_size < 16 << 20 for path in rehearsal.iterdir())


def test_what_came_back_becomes_a_page(rehearsal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stages.read(rehearsal)
    titles = [table.title for table in gpu_report.tables(rows)]
    assert titles[:3] == ["Stages", "A guided step", "Kernels that are wrong"]
    target = gpu_report.publish(rehearsal, tmp_path)
    page = (target / "first.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert json.loads((target / "first.json").read_text())["ended"]["step"] == "done"
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert [line.split(" | ")[1] for line in readme.on_gpu()[2:]][:2] == ["eager", "channels-last"]
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl"):
        gpu_report.publish(tmp_path / "nothing", tmp_path)


def test_an_op_whose_check_was_red_is_not_timed(tmp_path: Path) -> None:
    rows = [
        {"stage": "checks", "op": "geglu", "begun": True},
        {"stage": "checks", "op": "geglu", "call": "geglu 2x2", "wrong": "error 1"},
        {"stage": "checks", "op": "geglu", "ended": True, "tried": 1},
        {"stage": "checks", "op": "linear", "begun": True},  # and its process died
        {"stage": "checks", "op": "attention", "begun": True},
        {"stage": "checks", "op": "attention", "ended": True, "tried": 3},
    ]
    (tmp_path / stages.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert first.Context(tmp_path, dry=True).failed_checks == {"geglu", "linear"}


def test_both_halves_fit_their_minutes_and_name_every_stage() -> None:
    context = first.Context(Path("out"), dry=False)
    halves = [first.stages(context, half) for half in (1, 2)]
    assert [stage.name for half in halves for stage in half] == [stage.name for stage in first.stages(context)]
    headline = [stage.name for stage in halves[0]].index("step")
    assert sum(stage.seconds for stage in halves[0][: headline + 1]) <= 240, "four minutes hold the headline"
    asked = {
        command[command.index("stage") + 1]
        for half in halves
        for s in half
        for command in s.commands
        if "stage" in command
    }
    assert asked == set(first.STAGES)


# ------------------------------------------------------------------------------------------- arguments that are valid


def test_every_op_says_which_integers_are_valid() -> None:
    for workload in networks.SMALL:
        for call in networks.calls(workload, torch.float32):
            args, kwargs = call.arguments("cpu")  # TypeError for an integer tensor of which nothing is known
            if kwargs.get("kv_len") is not None:
                (slots, tokens, _), lengths, taken = args[1].shape, kwargs["kv_len"], kwargs["slots"]
                assert ((lengths >= 1) & (lengths <= tokens)).all()
                assert ((taken >= 0) & (taken < slots)).all()


def test_an_op_with_integers_that_it_says_nothing_of_is_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(2, 64, 40, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    op = dispatch.OPS["attention"]
    (x, *_), kwargs = op.example((q, q, q, 1), {"kv_len": lengths}, "cpu")
    assert x.isfinite().all()
    assert kwargs["kv_len"].tolist() == [64, 64]
    monkeypatch.setattr(op, "example_values", None)
    with pytest.raises(TypeError, match="kv_len"):
        op.example((q, q, q, 1), {"kv_len": lengths}, "cpu")


def test_an_example_of_a_step_takes_one() -> None:
    """Its slots are before their end, and every row and draw that they name is there."""
    (call,) = [c for c in networks.calls("tiny step", torch.float32) if c.op == "end_step"]
    args, kwargs = call.arguments("cpu")
    op = dispatch.OPS["end_step"]
    call_by_name = op.bind(*args, **kwargs)
    before = call_by_name["x"].clone()
    op.reference(*args, **kwargs)
    assert call_by_name["counter"].eq(1).all()
    assert call_by_name["x"].isfinite().all()
    assert not call_by_name["x"].equal(before)
