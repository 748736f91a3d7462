"""What benchmarks write: histories, plots, fitted growth, and the README's tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, networks, readme, scaling, suite
from fastldm.kernels import dispatch
from fastldm.planning import timing as bench


def run(ratio: float, date: str = "2026-11-22 10:00") -> dict[str, Any]:
    def row(title: str, ratio: float, **others: Any) -> dict[str, Any]:
        one = {"contender": {"title": title}, "failure": "", "wrong": False, "median": 1 / ratio, "ratio": ratio}
        return {**one, "spread": [0.9 * ratio, 1.1 * ratio], **others}

    rows = [row("diffusers float32", 1.0), row("ours", ratio), row("broken", 99.0, wrong=True)]
    task = {"what": "step", "width": 256, "height": 256, "steps": 1, "model": "default", "threads": 2}
    versions = {"diffusers": "0.42.1", "openvino": None}
    about = {"machine": {"name": "A <CPU>", "torch": "2.13.0"}, "versions": versions, "command": "fastldm bench"}
    return {"date": date, **about, "task": task, "rows": rows}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


def test_the_readme_says_what_was_measured() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert {found[2] for found in readme._MARKED.finditer(text)} == set(readme.TABLES)
    assert readme.rendered(text) == text, "run python -m benchmarks.readme"


def test_a_history_grows_and_the_newest_run_counts(results: Path) -> None:
    for ratio in (2.0, 3.0):
        suite.keep("sd15-step", {k: v for k, v in run(ratio).items() if k != "date"})
    (path,) = results.glob("*/sd15-step.json")
    assert [one["rows"][1]["ratio"] for one in json.loads(path.read_text())["runs"]] == [2.0, 3.0]
    path.write_text(json.dumps({"case": "sd15-step", "runs": [run(2.0), run(3.0, "2026-11-22 11:00")]}))
    assert "| ours | 0.33 | 3.00 (2.70 to 3.30) |" in readme.compared("sd15-step")
    assert "not yet measured" in readme.compared("cpu-picture")[0]
    assert not any("broken" in line for line in readme.compared("sd15-step"))


def test_the_page_has_every_contender_of_every_run(results: Path) -> None:
    (results / "machine").mkdir()
    (results / "machine" / "sd15-step.json").write_text(
        json.dumps({"case": "sd15-step", "runs": [{**run(ratio), "commit": "abc"} for ratio in (2.0, 3.0)]})
    )
    (results / "machine" / "attention-float16.json").write_text(json.dumps({"rows": []}))  # of another benchmark
    page = suite.page()
    assert "A &lt;CPU&gt;" in page
    assert page.count("<title>ours: ") == 2
    assert "broken" not in page


def test_what_takes_no_turns_has_its_history_in_seconds(results: Path) -> None:
    for seconds in (1.0, 3.0):
        about = {"command": "python -m benchmarks.cold_start", "machine": {"name": "A <CPU>"}}
        suite.keep("cold-start", {**about, "seconds": {"whole command": [0.5, seconds, 4.0], "load": 0.25}})
    page = (results / "index.html").read_text()
    assert [f"<title>whole command: {seconds} s</title>" in page for seconds in (1, 2, 3)] == [True, False, True]
    assert page.count("<title>load: 0.25 s</title>") == 2
    assert ">4 s</text>" in page
    assert "5 s</text>" not in page


def test_the_readme_has_every_command_of_the_newest_deployment(results: Path) -> None:
    assert readme.deployed() == ["Not yet measured."]
    commands = {
        "export split": {"seconds": 100.4, "peak_MiB": 2048, "MiB": 512},
        "torch float32": {"seconds": 60.0, "peak_MiB": 1024, "timings": {"steps": [12.5, 12.0]}},
    }
    about = {"command": "", "machine": {"name": "A CPU"}, "threads": 2, "seconds": {"export split": 100.4}}
    suite.keep("deployment", {**about, "commands": commands})
    assert readme.deployed()[2:4] == [
        "| export split | 100 | 2.0 GiB | 0.50 GiB |",
        "| torch float32 | 60 (a step 12.5) | 1.0 GiB |  |",
    ]


def test_growth_is_fitted() -> None:
    points = [(n, 0.5 * n**1.5) for n in (1, 2, 4, 8)]
    assert scaling.slope(points) == pytest.approx(1.5)
    assert scaling.between([*points, (16, 2 * 0.5 * 8**1.5)]) == pytest.approx([1.5, 1.5, 1.5, 1.0])


def test_what_scales_is_what_is_said() -> None:
    """Every series on counts that stand for seconds: each size is asked for, in every round."""
    asked: list[int] = []

    def timed(size: int) -> float:
        asked.append(size)
        return float(size)

    found = scaling.measure({"steps": ((2, 4), timed)}, rounds=3)
    assert asked == [2, 4] * 4
    assert found == {"steps": [(2, 2.0), (4, 4.0)]}
    record = {"model": "m", "dtype": "float32", "machine": {"name": "A <CPU>"}}
    series = {"points": found["steps"], "exponent": 1.0, "expected": 1.0, "between": [1.0]}
    page = scaling.page({**record, "series": {"steps": series}})
    assert "A &lt;CPU&gt;" in page
    assert page.count("<circle") == 2


def test_optimum_joins_the_cases_that_run_bundles() -> None:
    python = Path("/opt/optimum/bin/python")
    given = suite.with_optimum(suite.CASES["cpu-picture"], python)
    assert given[1] == suite.CASES["cpu-picture"][1] + ",optimum"
    assert given[-2:] == ["--python", f"optimum={python}"]
    assert suite.with_optimum(suite.CASES["cpu-picture"], None) == suite.CASES["cpu-picture"]
    assert suite.with_optimum(suite.CASES["cpu-step"], python) == suite.CASES["cpu-step"]


def test_results_are_written_row_by_row(tmp_path: Path) -> None:
    record = harness.Record(tmp_path / "chosen", "geglu-float16", dtype="float16")
    for k in range(2):
        record.add({"call": k})
        content = json.loads((tmp_path / "chosen" / "geglu-float16.json").read_text())
        assert (len(content["rows"]), content["whole"]) == (k + 1, False)
    record.end()
    assert json.loads(record.path.read_text())["whole"]
    record.add({"wrong": "error 1"})
    with pytest.raises(SystemExit, match="wrong"):
        record.end()


def test_a_contender_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (call, *_) = (call for call in networks.calls("tiny step", torch.float32) if call.op == "layer_norm")

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no driver")

    monkeypatch.setattr(harness, "disagreement", lambda *_: None)
    monkeypatch.setattr(dispatch.OPS["layer_norm"], "triton", broken)
    limits = bench.Ceilings(1e12, 1e12)
    row = harness.bench(call, lambda *args: {"rival": lambda: broken(*args)}, limits, device="cpu", copies=1, rounds=1)
    assert row["failed"] == {"triton": "no driver", "rival": "no driver"}
    assert row["us"].keys() == {"torch"}
    assert "no driver" in harness.line({"workload": "tiny", "count": 1, **row})
    assert harness.against_rivals({"triton": 2.0}) == {}
    assert harness.against_rivals({"triton": 2.0, "a": 6.0, "b": 3.0}) == {"best_rival": "b", "ratio": 1.5}


def test_a_kernel_that_writes_wrongly_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what an op writes into its arguments, which are left as they were."""
    for name in ("layer_norm", "guidance_rescale"):
        (call, *_) = (call for call in networks.calls("tiny step", torch.float32) if call.op == name)
        op, (args, kwargs) = dispatch.OPS[name], call.arguments("cpu")
        before = copy.deepcopy(op.bind(*args, **kwargs))
        monkeypatch.setattr(op, "triton", op.reference)
        assert harness.disagreement(op, args, kwargs) is None

        def off(*args: Any, op: Any = op, **kwargs: Any) -> Any:
            out = op.reference(*args, **kwargs)
            changed = out if out is not None else op.bind(*args, **kwargs)[op.mutates[0]]
            changed.mul_(1.001)
            return out

        monkeypatch.setattr(op, "triton", off)
        assert "error" in str(harness.disagreement(op, args, kwargs))
        named = op.bind(*args, **kwargs)
        assert all(value.equal(before[key]) for key, value in named.items() if isinstance(value, torch.Tensor))


def test_the_readme_has_the_rungs_of_a_gpu(results: Path) -> None:
    assert "not yet measured" in readme.on_gpu()[0]
    (results / "a-gpu").mkdir()
    rungs = {"eager": {"ms": 20.0}, "+ graphs": {"failed": "OutOfMemoryError"}}
    rows = [{"model": "sd15-512", "floor_ms": 2.0, "rungs": rungs}]
    (results / "a-gpu" / "ladder-float16.json").write_text(json.dumps({"rows": rows}))
    assert readme.on_gpu()[2:] == ["| a-gpu, sd15-512 | eager | 20.00 | 2.0 |"]
