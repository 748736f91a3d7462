"""benchmarks/first.py: a rehearsal on a CPU, its report, the plan of stages, and the suite for a machine with a GPU,
which may have torch, triton, transformers and pytest, and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ops import modules

from benchmarks import first, gpu_report, readme, stages
from fastldm.kernels import dispatch

PYTHON = sys.executable


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    command = [PYTHON, "-m", "benchmarks.gpu", "first", "--dry", "--out", str(out), "--seconds", "1500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (out / stages.LOG).read_text()[-4000:]
    return out


@pytest.mark.full
def test_every_stage_runs_without_the_peers(rehearsal: Path) -> None:
    rows = stages.read(rehearsal)
    plan = first.stages(first.Context(rehearsal, dry=True))
    assert stages.ended(rows) == dict.fromkeys([stage.name for stage in plan], "done")
    assert all(any(stages.of(rows, stage.name)) for stage in plan), "a stage without rows"
    assert not [row for row in rows if row.get("wrong") or isinstance(row.get("failed"), str)]
    timed = [row for row in rows if "us" in row and row["stage"] in ("ops", "attention", "group norm")]
    assert timed, "ops are timed"
    assert not [row for row in timed if set(row["failed"]) - {"flash", "cudnn"}], "which need a GPU"
    checked = {row["op"] for row in stages.of(rows, "checks") if row.get("ended") and row["tried"]}
    assert checked == set(dispatch.OPS), "each op has a call that its kernel supports"
    assert next(row["tests"]["passed"] for row in stages.of(rows, "tests")) >= 5
    assert len(list(rehearsal.iterdir())) <= 6
    assert all(path.is_file() and path.stat().st_size < 16 << 20 for path in rehearsal.iterdir())


@pytest.mark.full
def test_results_are_published_as_a_page(rehearsal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_op_whose_check_failed_is_not_timed(tmp_path: Path) -> None:
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


def test_both_halves_fit_their_time_and_run_every_stage() -> None:
    context = first.Context(Path("out"), dry=False)
    halves = [first.stages(context, half) for half in (1, 2)]
    assert [stage.name for half in halves for stage in half] == [stage.name for stage in first.stages(context)]
    headline = [stage.name for stage in halves[0]].index("step")
    assert sum(stage.seconds for stage in halves[0][: headline + 1]) <= 240, "four minutes hold the headline"
    commands = {
        command[command.index("stage") + 1]
        for half in halves
        for s in half
        for command in s.commands
        if "stage" in command
    }
    assert commands == set(first.STAGES)


def test_suite_has_every_file_marked_gpu() -> None:
    marker = f"@pytest.mark.{'gpu'}\n"  # this file asks for none
    marked = {path.stem for path in (ROOT / "tests").glob("test_*.py") if marker in path.read_text()}
    names = [Path(name).stem for name in first.suite()]
    assert marked <= set(names)
    assert len(names) == len(set(names))
    assert {f"test_{module}" for module in modules()} <= set(names)
    assert all((ROOT / name).is_file() for name in first.suite())


@pytest.mark.full
def test_suite_collects_the_same_tests_without_the_peers() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    environments = (None, first.without(*first.MISSING))
    running = [
        subprocess.Popen([*command, *first.suite()], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for env in environments
    ]
    full, lacking = (process.communicate(timeout=600)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0], lacking[-3000:]
    collected = [line for line in full.splitlines() if "::" in line]
    assert len(collected) >= 20
    assert [line for line in lacking.splitlines() if "::" in line] == collected


def test_generate_and_doctor_run_without_the_peers(tmp_path: Path) -> None:
    environment = first.without(*first.MISSING, "transformers", "scipy")
    del environment["FASTLDM_CACHE"]
    generate = "-m", "fastldm", "generate", "a red apple", "--steps", "1", "-o", str(tmp_path / "apple.png")
    for arguments in (generate, ("-m", "fastldm", "doctor")):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "apple.png").stat().st_size > 0
    folder = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    assert f"{folder}/fastldm" in done.stdout
