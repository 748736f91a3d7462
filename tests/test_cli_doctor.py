"""`fastldm doctor`: what it prints, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import tiny
from command import run

import fastldm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


def test_doctor(model: str) -> None:
    report = json.loads(run("doctor", "-m", model, "--json").output)
    assert report["model"]["family"] == "sd1"
    assert report["extras"]["test"]["missing"] == []
    said = run("doctor", "-m", model).output
    assert f"fastldm {fastldm.__version__}" in said
    assert "onnx-gpu" in said


def test_doctor_sees_two_onnx_runtimes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.planning import doctor

    monkeypatch.setattr(doctor, "version_of", lambda distribution: "1.0")
    assert "overwrite each other's files" in run("doctor", "-m", model).output
