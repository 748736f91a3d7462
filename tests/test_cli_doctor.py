"""`fastldm doctor`: what it prints, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from command import run

import fastldm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


def test_report_names_model_version_and_extras(model: str) -> None:
    report = json.loads(run("doctor", "-m", model, "--json").output)
    assert report["model"]["family"] == "sd1"
    assert report["extras"]["test"]["missing"] == []
    text = run("doctor", "-m", model).output
    assert f"fastldm {fastldm.__version__}" in text
    assert "onnx-gpu" in text


def test_two_onnx_runtimes_are_a_problem(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.planning import doctor

    monkeypatch.setattr(doctor, "version_of", lambda distribution: "1.0")
    assert "overwrite each other's files" in run("doctor", "-m", model).output


def test_text_and_json_agree() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    done = run("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    titled = {line.partition(" ")[0]: line for line in lines if line}
    assert titled["fastldm"].startswith(
        f"fastldm {report['fastldm']}, Python {report['python']}, torch {torch.__version__}"
    )
    assert titled["cache"].endswith(report["cache"])
    model = report["model"]
    assert titled["model"] == (
        f"model    default: small, 17 M parameters, would run on {model['runs on']} in {model['dtype']}"
    )
    for name, extra in report["extras"].items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.endswith(f": missing {', '.join(extra['missing'])}" if extra["missing"] else ": installed")
    assert [line for line in lines if line.startswith("! ")] == [f"! {problem}" for problem in report["problems"]]


def test_adapters_that_ship_are_listed_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastldm.adapters import locate

    report = json.loads(run("doctor", "--arch", "sm_90", "--json").stdout)
    assert report["adapters"]["ship"] == {
        "lora": ["gold", "pixel", "sketch"],
        "embedding": ["smiley"],
        "control": ["shape"],
    }
    assert {*report["adapters"]["beside the weights"]["triton"]} == {"lora_linear", "lora_geglu"}
    assert not any("which ships" in problem for problem in report["problems"])
    shutil.copytree(locate.SHIPPED, tmp_path / "adapters")
    weights = "control/shape/diffusion_pytorch_model.safetensors"
    for file in ("lora/pixel.safetensors", "embedding/smiley.safetensors", weights):
        (tmp_path / "adapters" / file).write_bytes(b"x")
    monkeypatch.setattr(locate, "SHIPPED", tmp_path / "adapters")
    problems = [line for line in run("doctor").stdout.splitlines() if line.startswith("! ")]
    for name in ("--lora pixel", "--embedding smiley", "--control shape"):
        assert any(line.startswith(f"! {name}, which ships, cannot be read: ") for line in problems), name


def test_arch_gives_the_path_of_each_op() -> None:
    ops = json.loads(run("doctor", "--arch", "sm_90", "--json").stdout)["ops"]
    assert ops["on"] == "sm_90"
    done = run("doctor", "--arch", "sm_90")
    assert done.exit_code == 0, done.output
    for name, reasons in ops["triton"].items():
        assert f"  {name:<16} triton  {sum(reasons.values())} calls\n" in done.stdout
    for name, reasons in ops["torch"].items():
        for reason, count in reasons.items():
            assert f"  {name:<16} torch   {count} calls: {reason}\n" in done.stdout


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [(["--arch", "sm_1"], 2, "arch is 'sm_1'"), (["-m", "./nowhere"], 1, "nowhere"), (["--size", "8"], 2, "--size")],
)
def test_mistakes_are_reported_on_stderr(options: list[str], status: int, message: str) -> None:
    done = run("doctor", *options)
    assert (done.exit_code, done.stdout) == (status, "")
    assert message in done.stderr
