"""`fastldm generate`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import Result
from command import run
from PIL import Image

import fastldm

ROOT = Path(fastldm.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(model: str, *arguments: str) -> Result:
    return run("generate", "a cat", "-m", model, "--steps", "1", "--device", "cpu", "--dtype", "float32", *arguments)


def test_it_says_where_the_picture_went(model: str, tmp_path: Path) -> None:
    done = generate(model, "-o", "cat.png", "--seed", "3", "--size", "64x96", "--negative", "dog", "--sampler", "ddim")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("cat.png  seed 3\ntorch float32 on cpu: ")
    with Image.open("cat.png") as image:
        assert image.size == (64, 96)
        assert image.info["parameters"].startswith(
            "a cat\nNegative prompt: dog\n"
            "Steps: 1, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 64x96, Model: tiny-sd1"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["cat.png"]


def test_names_without_o_and_with_n(model: str, tmp_path: Path) -> None:
    assert generate(model, "--seed", "8").exit_code == 0
    assert generate(model, "--seed", "8", "--n", "2", "-o", "a.png", "--no-metadata").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "fastldm-8.png"]
    with Image.open("a-0.png") as one, Image.open("fastldm-8.png") as other:
        assert "parameters" not in one.info
        assert "parameters" in other.info
        assert other.info["parameters"].count("Seed: 8") == 1


def test_a_prompt_never_names_a_file(model: str, tmp_path: Path) -> None:
    assert run("generate", "../../etc/passwd", "-m", model, "--steps", "1", "--seed", "1").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["fastldm-1.png"]


def test_nothing_is_overwritten_without_force(model: str) -> None:
    Path("a.png").write_bytes(b"precious")
    refused = generate(model, "-o", "a.png")
    assert refused.exit_code == 2
    assert "'a.png' exists" in refused.output
    assert "--force" in refused.output
    assert Path("a.png").read_bytes() == b"precious"
    assert generate(model, "-o", "a.png", "--force").exit_code == 0
    assert Path("a.png").read_bytes() != b"precious"


def test_json_is_one_object(model: str) -> None:
    done = generate(model, "--seed", "5", "--n", "2", "--json")
    record = json.loads(done.output)
    assert record["files"] == ["fastldm-5-0.png", "fastldm-5-1.png"]
    assert record["seeds"] == [5, 6]
    assert (record["backend"], record["dtype"], record["device"]) == ("torch", "float32", "cpu")
    assert len(record["timings"]["steps"]) == 1


def test_image_to_image_and_inpainting(model: str) -> None:
    Image.new("RGB", (64, 64), "red").save("in.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    assert generate(model, "--init-image", "in.png", "--strength", "1", "-o", "a.png").exit_code == 0
    assert generate(model, "--init-image", "in.png", "--mask", "mask.png", "-o", "b.png").exit_code == 0


def test_mistakes_that_only_a_loaded_model_shows(model: str) -> None:
    for arguments, says in [
        (("--size", "60x64"), "width is 60: expected a multiple of 8"),
        (("--sampler", "eulr"), "did you mean"),
        (("--init-image", "missing.png"), "there is no file 'missing.png'"),
        (("--device", "warp"), "cannot be used here"),
    ]:
        done = generate(model, *arguments)
        assert done.exit_code == 2, done.output
        assert says in done.output.lower() or says in done.output
        assert done.output.count("\n") == 1, "one line"


def test_debug_shows_where(model: str) -> None:
    assert "Traceback" in generate(model, "--size", "60x64", "--debug").output


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root may write to: /proc")
def test_an_unwritable_folder_is_found_before_the_work() -> None:
    done = generate("no-model-is-opened", "-o", "/proc/a.png")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is for POSIX")
def test_ctrl_c_stops_with_130_and_leaves_no_file(model: str, tmp_path: Path) -> None:
    # A job that a shell started in the background inherits an ignored SIGINT, and so would this child.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fastldm.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "generate", "a cat", "-m", model, "--steps", "999", "-o", "a.png"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        # torch maps its library when it is imported; from then on the command is inside what it guards
        if "libtorch_cpu" in Path(f"/proc/{running.pid}/maps").read_text():
            time.sleep(1)
            running.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "stopped" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_help_teaches() -> None:
    said = " ".join(run("generate", "--help").output.split())
    for word in ("a.png becomes a-0.png", "dpm++ 2m karras", "--init-image", "fastldm-SEED.png", "default: default"):
        assert word in said
    assert "fastldm generate" in run("--help").output
