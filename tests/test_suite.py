"""benchmarks/suite.py: histories, their page, and the cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_runs import run

from benchmarks import readme, suite


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


def test_a_history_grows_and_its_newest_run_counts(results: Path) -> None:
    for ratio in (2.0, 3.0):
        suite.add_run("sd15-step", {k: v for k, v in run(ratio).items() if k != "date"})
    (path,) = results.glob("*/sd15-step.json")
    assert [entry["rows"][1]["ratio"] for entry in json.loads(path.read_text())["runs"]] == [2.0, 3.0]
    path.write_text(json.dumps({"case": "sd15-step", "runs": [run(2.0), run(3.0, "2026-11-22 11:00")]}))
    assert "| ours | 0.33 | 3.00 (2.70 to 3.30) |" in readme.compared("sd15-step")
    assert "not yet measured" in readme.compared("cpu-picture")[0]
    assert not any("broken" in line for line in readme.compared("sd15-step"))


def test_page_has_every_contender_of_every_run(results: Path) -> None:
    (results / "machine").mkdir()
    (results / "machine" / "sd15-step.json").write_text(
        json.dumps({"case": "sd15-step", "runs": [{**run(ratio), "commit": "abc"} for ratio in (2.0, 3.0)]})
    )
    (results / "machine" / "attention-float16.json").write_text(json.dumps({"rows": []}))  # of another benchmark
    page = suite.page()
    assert "A &lt;CPU&gt;" in page
    assert page.count("<title>ours: ") == 2
    assert "broken" not in page


def test_histories_of_seconds_are_plotted(results: Path) -> None:
    for seconds in (1.0, 3.0):
        header = {"command": "python -m benchmarks.cold_start", "machine": {"name": "A <CPU>"}}
        suite.add_run("cold-start", {**header, "seconds": {"whole command": [0.5, seconds, 4.0], "load": 0.25}})
    page = (results / "index.html").read_text()
    assert [f"<title>whole command: {seconds} s</title>" in page for seconds in (1, 2, 3)] == [True, False, True]
    assert page.count("<title>load: 0.25 s</title>") == 2
    assert ">4 s</text>" in page
    assert "5 s</text>" not in page


def test_optimum_joins_the_cases_that_run_bundles() -> None:
    python = Path("/opt/optimum/bin/python")
    command = suite.with_optimum(suite.CASES["cpu-picture"], python)
    assert command[1] == suite.CASES["cpu-picture"][1] + ",optimum"
    assert command[-2:] == ["--python", f"optimum={python}"]
    assert suite.with_optimum(suite.CASES["cpu-picture"], None) == suite.CASES["cpu-picture"]
    assert suite.with_optimum(suite.CASES["cpu-step"], python) == suite.CASES["cpu-step"]
