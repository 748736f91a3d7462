"""The command as a person uses it: what it prints, what it writes, how it fails."""

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
from click.testing import CliRunner, Result
from PIL import Image

import fastldm
from fastldm.cli import main

ROOT = Path(fastldm.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pipeline("sd1", tmp_path_factory.mktemp("cli") / "tiny-sd1"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fast(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def generate(model: str, *arguments: str) -> Result:
    return fast("generate", "a cat", "-m", model, "--steps", "1", "--device", "cpu", "--dtype", "float32", *arguments)


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
    assert fast("generate", "../../etc/passwd", "-m", model, "--steps", "1", "--seed", "1").exit_code == 0
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


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["generate"], 2, "Missing argument 'PROMPT'"),
        (["generate", "a", "--size", "big"], 2, "'big' is not a size: write WIDTHxHEIGHT"),
        (["generate", "a", "--n", "0"], 2, "0 is not in the range"),
        (["generate", "a", "--steps", "0"], 2, "num_inference_steps is 0: expected a whole number of steps"),
        (["generate", "a", "--seed", "-1"], 2, "seed is -1"),
        (["generate", "a", "-o", "no/where.png"], 2, "the folder 'no' does not exist"),
        (["generate", "a", "-o", "a.gif"], 2, "picture format"),
        (["generate", "a", "--mask", "m.png"], 2, "mask_image was given without image"),
        (["generate", "a", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["generate", "a", "-m", "./nowhere"], 1, "nowhere"),
        (["plan", "--size", "61x64"], 2, "width is 61: expected a positive multiple of 4"),
        (["plan", "--arch", "sm_1"], 2, "arch is 'sm_1'"),
        (["plan", "--arch", "sm_90", "--device", "cpu"], 2, "give --arch for a GPU that need not be here, or --device"),
        (["paint"], 2, "No such command 'paint'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], status: int, says: str, tmp_path: Path) -> None:
    done = fast(*arguments)
    assert done.exit_code == status, done.output
    assert says in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


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
    said = " ".join(fast("generate", "--help").output.split())
    for word in ("a.png becomes a-0.png", "dpm++ 2m karras", "--init-image", "fastldm-SEED.png", "default: default"):
        assert word in said
    assert "fastldm generate" in fast("--help").output


def plan(model: str, *arguments: str) -> Result:
    return fast("plan", "-m", model, "--device", "cpu", "--dtype", "float32", *arguments)


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
    elsewhere = json.loads(fast("plan", "-m", model, "--arch", "sm_89", "--json").output)
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


def test_doctor(model: str) -> None:
    report = json.loads(fast("doctor", "-m", model, "--json").output)
    assert report["model"]["family"] == "sd1"
    assert report["extras"]["test"]["missing"] == []
    said = fast("doctor", "-m", model).output
    assert f"fastldm {fastldm.__version__}" in said
    assert "onnx-gpu" in said


def test_doctor_sees_two_onnx_runtimes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastldm.planning import doctor

    monkeypatch.setattr(doctor, "version_of", lambda distribution: "1.0")
    assert "overwrite each other's files" in fast("doctor", "-m", model).output
