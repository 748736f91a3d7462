"""benchmarks/readme.py: the README's tables of measurements."""

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


def test_readme_has_the_newest_measurements() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert {match[2] for match in readme._MARKED.finditer(text)} == set(readme.TABLES)
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
