"""`fastldm bench`: its table, its JSON file, and what it refuses before it starts. test_compare.py runs contenders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import run

from fastldm.profiling import compare
from fastldm.profiling.compare import Contender, Row, Task

FIRST = Row(Contender("diffusers", "float32"), (0.4, 0.5, 0.6), (1.0, 1.0, 1.0), 7.7, 0.41, 636 << 20, 0.0, False)
FAST = Row(Contender("fastldm", "float32"), (0.1, 0.125, 0.15), (4.0, 4.0, 5.0), None, 0.17, 386 << 20, 3e-6, False)
WRONG = Row(Contender("fastldm", "bfloat16"), (0.1, 0.1, 0.1), (4.0, 5.0, 6.0), 0.4, 0.15, 386 << 20, 0.5, True)
ABSENT = Row(Contender("optimum", "float32"), (), (), None, 0.0, 0, None, True, "No module named 'optimum'")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Task, list[Contender], int]]:
    """What would have run; rows of all kinds stand for the result."""
    tasks = []

    def compared(task: Task, contenders: list[Contender], rounds: int, on_event: Any) -> list[Row]:
        tasks.append((task, contenders, rounds))
        return [FIRST, FAST, WRONG, ABSENT]

    monkeypatch.setattr(compare, "compare", compared)
    return tasks


def test_table_and_json_have_every_contender(tasks: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run("bench", "--steps", "2", "--threads", "1", "--json", str(out))
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "default, 1 x 64x64, 2 steps, DDIMScheduler, guidance 2; 1 threads each, 3 rounds"
    assert lines[2].split() == ["seconds", "times", "faster", "load", "first", "memory", "difference"]
    assert [" ".join(line.split()) for line in lines[3:]] == [
        "diffusers float32 0.500 1.00 (1.00 to 1.00) 7.7 0.41 636 MiB 0e+00",
        "fastldm on torch float32 0.125 4.00 (4.00 to 4.50) - 0.17 386 MiB 3e-06",
        "fastldm on torch bfloat16 does not compute the same: 5.0e-01 off",
        "optimum float32 cannot run: No module named 'optimum'",
    ]
    record = json.loads(out.read_text("utf-8"))
    assert record["task"]["model"] == "default"
    assert [row["contender"]["title"] for row in record["rows"]] == [
        *("diffusers float32", "fastldm on torch float32", "fastldm on torch bfloat16", "optimum float32")
    ]
    assert record["rows"][1]["ratio"] == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_options_reach_the_task(tasks: list[Any], tmp_path: Path) -> None:
    model = str(tiny.save_pipeline("sd1", tmp_path / "model"))
    options = [
        "--what",
        "step",
        "--size",
        "64x32",
        "--n",
        "2",
        "--guidance",
        "3",
        "--sampler",
        "EulerDiscreteScheduler",
    ]
    options += ["--prompt", "a cat", "--dtypes", "float32", "--backend", "torch", "--threads", "1"]
    done = run("bench", "-m", model, "--steps", "4", "--rounds", "5", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{model}, 2 x 64x32, one guided step; 1 threads each, ")
    ((task, contenders, rounds),) = tasks
    assert task == Task(model, "step", 64, 32, "EulerDiscreteScheduler", 4, 3.0, 1, prompt="a cat", batch=2)
    assert [str(contender) for contender in contenders] == ["diffusers float32", "fastldm on torch float32"]
    assert rounds == 5


def test_cpu_step_suite_has_a_fixed_task(tasks: list[Any]) -> None:
    done = run("bench", "--suite", "cpu-step", "--threads", "1")
    assert done.exit_code == 0, done.output
    ((task, _, rounds),) = tasks
    assert task == Task(compare.RANDOM, "step", 256, 256, "DDIMScheduler", 1, 7.5, 1)
    assert rounds == 3


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--suite", "cpu-step", "--size", "64"], 2, "one step at 256x256 of a network with random weights"),
        (["--suite", "cpu-step", "--compare", "diffusers,openvino"], 2, "leave out openvino"),
        (["--suite", "ladder", "--json", "a.json"], 2, "leave out --json"),
        (["--sampler", "EulerScheduler"], 2, "expected a scheduler of diffusers, such as EulerDiscreteScheduler"),
        (["--json", "none/a.json"], 2, "the folder 'none' does not exist"),
        (["--compare", ","], 2, "expected some of diffusers"),
        (["--bundle", "none"], 1, "none"),
        (["-m", "./nowhere"], 1, "nowhere"),
        (["-m", "file.safetensors"], 2, "is one file: --compare needs a diffusers folder, or a hub id"),
        (["--size", "0"], 2, "height is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_start_no_contender(
    options: list[str], status: int, message: str, tasks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.safetensors").touch()
    done = run("bench", *options)
    assert (done.exit_code, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not tasks
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
