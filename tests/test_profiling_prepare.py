"""A prepared model runs on what was fastest, and on PyTorch where it has changed or what it needs is PyTorch's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import all_families
import bundles
import pytest
import torch
from command import run

from fastldm import Pipeline
from fastldm.export import auto, prepared
from fastldm.export.auto import Measured
from fastldm.profiling import backends
from fastldm.profiling.prepare import prepare

CPU = torch.device("cpu")
pytest.importorskip("fastldm.export.onnx", reason="needs fastldm[onnx]", exc_type=ImportError)
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that bundles of other tests are of: its networks are traced once."""
    made = bundles.exported("sd1", True, bundles.shared(tmp_path_factory), whole_picture=True)[0]
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("prepare") / "sd1"))


@pytest.fixture(scope="module")
def cache(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With that model prepared on ONNX Runtime, whose graph is said to be fastest."""
    folder = tmp_path_factory.mktemp("cache")
    seconds = {"torch": 3.0, "onnxruntime": 2.0, "onnxruntime-graph": 1.0}

    def measure(bundle: Any, backend: str, device: Any, dtype: Any = None) -> Measured:
        measured = Measured(0.0, seconds[backend], "float32")
        auto.remember(bundle, device, {**auto.read(bundle, device), backend: measured})
        return measured

    with pytest.MonkeyPatch.context() as patch, bundles.traced_once(bundles.shared(tmp_path_factory)):
        patch.setenv("FASTLDM_CACHE", str(folder))
        patch.setattr(backends, "measure", measure)
        said: list[str] = []
        assert prepare(str(source), backend_names=("onnxruntime",), say=said.append) == "onnxruntime-graph"
        assert [line for line in said if line.startswith("onnxruntime-graph float32: ")]
    return folder


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(cache))


def test_prepared_model_runs_on_what_was_fastest(source: Path) -> None:
    pipe = Pipeline.from_pretrained(source, device="cpu")
    assert (pipe.backend, pipe.name) == ("onnxruntime-graph", "sd1")
    small: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    expected = Pipeline.from_pretrained(source, device="cpu", dtype="float32", backend="torch")("a cat", **small)
    result = pipe("a cat", **small)
    assert result.backend == "onnxruntime-graph"
    assert float((result.images - expected.images).abs().max()) < 1e-4  # type: ignore[operator]


def test_other_dtype_and_other_device_go_as_before(source: Path) -> None:
    """ONNX Runtime computes in what a bundle was exported in."""
    assert Pipeline.from_pretrained(source, device="cpu", dtype="bfloat16").backend == "torch"
    assert prepared.find(str(source), {}, torch.device("cuda")) is None


def test_torch_where_that_was_fastest(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        auto, "read", lambda *_: {"torch": Measured(0, 1, "float32"), "onnxruntime": Measured(0, 2, "")}
    )
    assert Pipeline.from_pretrained(source, device="cpu").backend == "torch"


def test_other_options_are_another_model(source: Path) -> None:
    assert prepared.find(str(source), {"prediction_type": "v_prediction"}, CPU) is None
    assert prepared.find(str(source), {"local_files_only": True, "variant": None}, CPU) is not None


def test_changed_model_runs_on_torch(
    source: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = next((source / "unet").glob("*.safetensors"))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    try:
        assert Pipeline.from_pretrained(source, device="cpu").backend == "torch"
    finally:
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "has changed since it was prepared" in caplog.text
    assert Pipeline.from_pretrained(source, device="cpu").backend == "onnxruntime-graph"


def test_lost_bundle_is_said_once_and_not_used(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    shutil.copytree(cache / "prepared", tmp_path / "prepared")
    (entry,) = (tmp_path / "prepared").iterdir()
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "bundle": str(tmp_path / "gone")}))
    assert Pipeline.from_pretrained(source, device="cpu").backend == "torch"
    entry.write_text("{}")
    assert Pipeline.from_pretrained(source, device="cpu").backend == "torch"
    assert "cannot be used" in caplog.text


def test_command_generates_on_what_was_prepared(source: Path, tmp_path: Path) -> None:
    arguments = ["generate", "a cat", "-m", str(source), "-o", str(tmp_path / "a.png"), "--steps", "1", "--json"]
    done = run(*arguments, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["backend"] == "onnxruntime-graph"
    done = run(*arguments, "--device", "cpu", "--force", "--decode", "tiled")  # which an engine cannot
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["backend"].startswith("torch")


def test_plan_is_of_what_was_prepared(source: Path) -> None:
    arguments = ["plan", "-m", str(source), "--device", "cpu", "--json"]
    backends = [
        json.loads(run(*arguments, *options).stdout)["workload"]["backend"] for options in ([], ["--reuse", "2"])
    ]
    assert backends == ["onnxruntime-graph", "torch"]


def test_controls_take_the_model_itself(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "edges"
    bundles.small_controlnet("sd1").save_pretrained(path)
    assert Pipeline.from_pretrained(source, device="cpu", controlnet=str(path)).backend == "torch"


@pytest.mark.full
def test_models_without_a_prompt_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no graph of a whole picture, which no backend is then asked for."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    source = all_families.save("ddim", tmp_path)
    assert prepare(str(source), backend_names=("onnxruntime",), say=said.append) in ("onnxruntime", "torch")
    assert any(line.startswith("onnxruntime float32: ") for line in said), said
    assert not [line for line in said if "graph:" in line or "cannot be measured" in line]
