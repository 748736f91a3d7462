"""benchmarks/readme.py: the tables of measurements in README.md and docs/server.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme, suite


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


def test_pages_have_the_newest_measurements() -> None:
    texts = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    assert {match[2] for text in texts for match in readme._MARKED.finditer(text)} == set(readme.TABLES)
    for text in texts:
        assert readme.rendered(text) == text, "run python -m benchmarks.readme"


def test_readme_has_every_command_of_the_newest_deployment(results: Path) -> None:
    assert readme.deployed() == ["Not yet measured."]
    commands = {
        "export split": {"seconds": 100.4, "peak_MiB": 2048, "MiB": 512},
        "torch float32": {"seconds": 60.0, "peak_MiB": 1024, "timings": {"steps": [12.5, 12.0]}},
    }
    header = {"command": "", "machine": {"name": "A CPU"}, "threads": 2, "seconds": {"export split": 100.4}}
    suite.add_run("deployment", {**header, "commands": commands})
    assert readme.deployed()[2:4] == [
        "| export split | 100 | 2.0 GiB | 0.50 GiB |",
        "| torch float32 | 60 (a step 12.5) | 1.0 GiB |  |",
    ]


def test_readme_has_the_rungs_of_a_gpu(results: Path) -> None:
    assert "not yet measured" in readme.on_gpu()[0]
    (results / "a-gpu").mkdir()
    rungs = {"eager": {"ms": 20.0}, "+ graphs": {"failed": "OutOfMemoryError"}}
    rows = [{"model": "sd15-512", "floor_ms": 2.0, "rungs": rungs}]
    (results / "a-gpu" / "ladder-float16.json").write_text(json.dumps({"rows": rows}))
    assert readme.on_gpu()[2:] == ["| a-gpu, sd15-512 | eager | 20.00 | 2.0 |"]


def test_page_has_every_part_of_the_newest_serving(results: Path) -> None:
    assert "Not yet measured" in readme.served()[0]
    load = {
        "clients": 8,
        "pictures/s": 5.25,
        "spread": [5, 6],
        "p50 ms": 900.4,
        "p95 ms": 1000,
        "p99 ms": 1100,
        "core s a picture": 0.3,
    }
    record = {
        "comparison": {"table": [{"kind": "mixed", "server": "fastldm", **load}], "others": 0.02},
        "batch": {"table": [{"kind": "mixed", "server": "max batch 4", **load}], "others": 0},
        "streams": {"table": [{"answer": "plain", **load}], "others": 0},
        "overhead": {"ms": {"encoding": 1.5}, "others": 0},
    }
    header = {
        "command": "",
        "machine": {"name": "A CPU", "cores": 2, "torch": "2.13"},
        "rounds": 3,
        "seconds": {"p50": 1},
    }
    for part, figures in record.items():
        suite.add_run(f"serving-{part}", {**header, **figures})
    load_ = "8 | 5.25 (5.00 to 6.00) | 900, 1000, 1100 | 0.30 |"
    lines = readme.served()
    assert f"| mixed | 8 | fastldm | {load_[4:]}" in lines
    assert f"| mixed, max batch 4 | {load_}" in lines
    assert f"| one kind, plain | {load_}" in lines
    assert "| encoding | 1.5 |" in lines
    assert "comparison 2%, 3 rounds" in lines[-1]
