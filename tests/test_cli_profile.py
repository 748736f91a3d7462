"""`fastldm profile`: the table on stdout, the files beside it, and what is refused. test_profile.py has the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from command import run
from diffusers import T2IAdapter
from PIL import Image


def profile(*options: str) -> Result:
    return run("profile", "--device", "cpu", "--dtype", "float32", "--steps", "1", "--rounds", "1", *options)


def test_table_has_stages_and_ops_of_json(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    done = profile("--size", "32x32", "--json", str(file))
    assert (done.exit_code, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    record = json.loads(file.read_text("utf-8"))
    lines = done.stdout.splitlines()
    assert lines[0].startswith("default: 1 picture of 32x32, 1 steps of ddim, guidance 2; torch float32 on ")
    assert lines[2].split()[:5] == ["median", "p90", "p99", "spread", "share"]
    for stage in record["stages"]:
        assert sum(line.startswith(f"  {stage['name']} ") for line in lines) >= 1, stage["name"]
    for title in ("a picture ", "only the first time: import ", "this machine: ", "operations: ", "memory: "):
        assert sum(line.startswith(title) for line in lines) == 1, title


def test_adapters_and_controls_are_profiled(tmp_path: Path) -> None:
    config = {"in_channels": 1, "channels": [64, 128, 192], "num_res_blocks": 1, "downscale_factor": 4}
    T2IAdapter(**config).save_pretrained(tmp_path / "shape")
    picture, file = tmp_path / "shape.png", tmp_path / "profile.json"
    Image.new("L", (64, 64), 255).save(picture)
    extras = ("--lora", "sketch:0.5", "--control", f"{tmp_path / 'shape'}:0.8", "--control-image", str(picture))
    done = profile("--json", str(file), *extras)
    assert (done.exit_code, done.stderr) == (0, "")
    assert ", with sketch:0.5 merged, controlled by shape; torch float32 on " in done.stdout.splitlines()[0]
    record = json.loads(file.read_text("utf-8"))
    assert (record["about"]["adapters"], record["about"]["adapted"]) == ({"sketch": 0.5}, "merged")
    assert record["memory"]["measured"] == pytest.approx(record["memory"]["planned"], rel=0.01)
    assert "--control and --control-image go together" in profile(*extras[:4]).stderr


@pytest.mark.parametrize("option", ["--json", "--html", "--trace"])
def test_files_that_cannot_be_written_are_refused(option: str, tmp_path: Path) -> None:
    done = profile(option, str(tmp_path / "none" / "file"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "none" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "30x31"], "height is 31: expected a multiple of 4"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--backend", "openvino"], "openvino runs bundles"),
        (["--device", "warp"], "cannot be used here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_reported_on_stderr(options: list[str], message: str) -> None:
    done = profile(*options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
