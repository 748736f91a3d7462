"""`fastldm plan`: what it prints, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import tiny
from click.testing import Result
from command import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


def plan(model: str, *arguments: str) -> Result:
    return run("plan", "-m", model, "--device", "cpu", "--dtype", "float32", *arguments)


def test_plan(model: str) -> None:
    done = plan(model, "--size", "512x256", "--batch", "3")
    assert done.exit_code == 0, done.output
    said = done.output.splitlines()
    assert said[0] == "3 x 512x256, guided, 30 steps, torch float32 on a CPU, whole decode"
    for name in ("weights", "  U-Net", "buffers", "  noise", "all the time", "  and in decode", "needed", "peak"):
        assert sum(line.startswith(f"{name} ") for line in said) == 1, name
    assert said[-1].startswith("fits: ")
    assert len({line.index("iB") for line in said if "iB  " in line}) == 1, "aligned"


def test_plan_as_json(model: str) -> None:
    report = json.loads(plan(model, "--n", "4", "--json").output)
    assert report["model"] == model
    assert report["workload"]["batch"] == 4
    assert report["needed"] == report["resident"] + max(line["bytes"] for line in report["phases"])
    assert report["here"]["fits"]
    assert report["would_fit"] == []
    elsewhere = json.loads(run("plan", "-m", model, "--arch", "sm_89", "--json").output)
    assert elsewhere["here"] is None
    assert elsewhere["workload"]["dtype"] == "float16"


def test_plan_says_what_would_fit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.planning import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * 2**20)
    said = plan(model, "--size", "768x768", "--n", "2").output
    assert "does not fit: 100.0 MiB are free; what would: " in said
    assert "tiled decode" in said
    report = json.loads(plan(model, "--size", "768x768", "--n", "2", "--json").output)
    assert report["here"] == {"fits": False, "free": 100 * 2**20}
    assert "tiled" in {way["workload"]["decode"] for way in report["would_fit"]}
