"""`fastldm prepare`: what it prints, and what it refuses. test_profiling_prepare.py has what is prepared."""

from __future__ import annotations

from typing import Any

import pytest
from command import run

from fastldm.profiling import prepare as preparing

pytest.importorskip("fastldm.export.onnx", reason="needs fastldm[onnx]", exc_type=ImportError)


def test_prepare_prints_what_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: str, options: dict[str, Any], say: Any) -> str:
        say(f"{model} {options}")
        return "openvino-graph"

    monkeypatch.setattr(preparing, "prepare", prepare)
    done = run("prepare", "-m", "./model", "--variant", "fp16")
    assert (done.exit_code, done.stdout) == (0, "./model runs on openvino-graph here\n")
    assert done.stderr == "./model {'variant': 'fp16'}\n"


def test_missing_model_is_one_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    done = run("prepare", "-m", "./nowhere")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("fastldm: ")
    assert len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
