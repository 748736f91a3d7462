"""`fastldm generate`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import controls
import ip_adapters
import numpy as np
import pytest
import tiny
import torch
from click.testing import Result
from command import run
from PIL import Image
from safetensors.torch import save_file

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


def test_output_names_file_seed_and_times(model: str, tmp_path: Path) -> None:
    done = generate(model, "-o", "cat.png", "--seed", "3", "--size", "64x96", "--negative", "dog", "--sampler", "ddim")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("cat.png  seed 3\ntorch float32 on cpu: ")
    with Image.open("cat.png") as image:
        assert image.size == (64, 96)
        assert image.info["parameters"].startswith(
            "a cat\nNegative prompt: dog\n"
            "Steps: 1, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 64x96, Model: tiny-sd1"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["cat.png"]


def test_file_names_without_output_and_with_n(model: str, tmp_path: Path) -> None:
    assert generate(model, "--seed", "8").exit_code == 0
    assert generate(model, "--seed", "8", "--n", "2", "-o", "a.png", "--no-metadata").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "fastldm-8.png"]
    with Image.open("a-0.png") as without, Image.open("fastldm-8.png") as default:
        assert "parameters" not in without.info
        assert default.info["parameters"].count("Seed: 8") == 1


def test_prompt_never_names_a_file(model: str, tmp_path: Path) -> None:
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


def test_json_prints_one_object(model: str) -> None:
    done = generate(model, "--seed", "5", "--n", "2", "--json")
    record = json.loads(done.stdout)
    assert done.stderr == ""
    assert record["files"] == ["fastldm-5-0.png", "fastldm-5-1.png"]
    assert record["seeds"] == [5, 6]
    assert (record["backend"], record["dtype"], record["device"]) == ("torch", "float32", "cpu")
    assert len(record["timings"]["steps"]) == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--guidance", "3.5"], "CFG scale: 3.5"),
        (["--steps", "2"], "Steps: 2"),
        (["--sampler", "dpm++ 2m karras"], "Schedule type: Karras"),
        (["--reuse", "2", "--steps", "2"], "Reuse: 2"),
        (["--clip-skip", "1"], "Clip skip: 2"),  # there the last layer is number 1
        (["--literal"], "Literal prompt: True"),
        (["--dtype", "bfloat16"], "Backend: torch bfloat16"),
        (["--backend", "torch"], "Backend: torch float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_run_and_written_to_the_png(model: str, options: list[str], field: str) -> None:
    done = generate(model, "-o", "a.png", *options)
    assert done.exit_code == 0, done.output
    with Image.open("a.png") as image:
        assert field in image.info["parameters"].splitlines()[-1].split(", ")


def test_decode_options_give_the_same_image(model: str) -> None:
    images = {}
    for decode in ("whole", "sliced", "tiled"):
        done = generate(model, "--seed", "2", "--n", "2", "--decode", decode, "-o", f"{decode}.png")
        assert done.exit_code == 0, done.output
        images[decode] = np.stack([np.asarray(Image.open(f"{decode}-{k}.png"), np.int16) for k in range(2)])
    assert np.abs(images["sliced"] - images["whole"]).max() <= 1
    assert np.abs(images["tiled"] - images["whole"]).max() <= 1  # one tile, at this size


def test_embeddings_are_words_of_the_prompt(model: str) -> None:
    """By the name that the file states, or its own; a bad file is found before the model is loaded."""
    for name, key, seed in (("toy", "emb_params", 1), ("other", "<thing>", 2)):
        save_file({key: torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))}, f"{name}.safetensors")
    images = []
    for prompt, files in (("a cat", 0), ("a qtoy <thing>", 0), ("a qtoy <thing>", 1), ("a qtoy <thing>", 2)):
        Path("qtoy.safetensors").write_bytes(Path("toy.safetensors").read_bytes())
        options = [x for name in ("qtoy", "other")[:files] for x in ("--embedding", f"{name}.safetensors")]
        done = run("generate", prompt, "-m", model, "--steps", "1", "--seed", "1", "-o", "a.png", "--force", *options)
        assert done.exit_code == 0, done.output
        with Image.open("a.png") as image:
            images.append(np.asarray(image).tobytes())
    assert len({*images}) == 4
    for path, message in (("none.safetensors", "does not exist here"), ("a.png", "is no safetensors file")):
        refused = run("generate", "a", "-m", "no/model", "--embedding", path)
        assert refused.exit_code != 0
        assert message in refused.output


def test_ip_adapter_reads_pictures_as_prompts(model: str, tmp_path: Path) -> None:
    folder = ip_adapters.folder(tmp_path / "ip", tiny.unet("sd1"), "base") / "models"
    for k in (1, 2):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f"{k}.png")
    images = []
    for options in ((), ("--ip-image", "1.png"), ("--ip-image", "1.png", "--ip-image", "2.png", "--ip-scale", "0.5")):
        adapter = ("--ip-adapter", str(folder / "base.safetensors")) if options else ()
        done = generate(model, "--seed", "1", "-o", "a.png", "--force", *adapter, *options)
        assert done.exit_code == 0, done.output
        with Image.open("a.png") as image:
            images.append(np.asarray(image).tobytes())
    assert len({*images}) == 3
    for refused in (generate(model, "--ip-image", "1.png"), generate(model, "--ip-adapter", "x.safetensors")):
        assert refused.exit_code != 0
        assert "--ip-adapter and --ip-image go together" in refused.output
    assert "there is no file 'none.png'" in generate(model, "--ip-image", "none.png", "--ip-adapter", "x").output


def test_controls_read_a_picture_each(model: str, tmp_path: Path) -> None:
    controls.controlnet("sd1").save_pretrained(tmp_path / "outlines")
    controls.t2i_adapter("full").save_pretrained(tmp_path / "sketch")
    for k in (1, 2):
        controls.picture(k).save(f"{k}.png")
    one = ("--control", "outlines", "--control-image", "1.png")
    two = (*one, "--control", "sketch:0.5", "--control-image", "2.png")
    images = []
    for options in ((), one, ("--control", "outlines:0.5", *one[2:]), two):
        done = generate(model, "--seed", "1", "-o", "a.png", "--force", *options)
        assert done.exit_code == 0, done.output
        with Image.open("a.png") as image:
            images.append(np.asarray(image).tobytes())
    assert len({*images}) == 4
    fields = fastldm.read_parameters("a.png")[1]
    assert fields["ControlNet 0"].startswith("Module: none, Model: outlines [")
    assert "Weight: 0.5" in fields["ControlNet 1"]
    for refused in (one[:2], one[2:], two[:6]):
        done = generate("no/model", *refused)
        assert done.exit_code != 0
        assert "--control and --control-image go together" in done.output
    assert "there is no file 'none.png'" in generate("no/model", *one[:3], "none.png").output
    assert "1.png is no safetensors file" in generate(model, "--control", "1.png", *one[2:]).output


def test_variant_selects_the_weights_files(tmp_path: Path) -> None:
    folder = tiny.save_pipeline("sd1", tmp_path / "half", variant="fp16")
    refused = generate(str(folder), "-o", "a.png")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "fp16" in refused.stderr
    done = generate(str(folder), "-o", "a.png", "--variant", "fp16")
    assert done.exit_code == 0, done.output
    assert Path("a.png").exists()


def test_default_model_needs_only_a_prompt(tmp_path: Path) -> None:
    done = run("generate", "a red apple", "--seed", "0")
    assert (done.exit_code, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "fastldm-0.png  seed 0"
    time = r"\d+\.\d\d"
    assert re.fullmatch(rf"torch \w+ on \w+: {time} s \(text {time}, 4 steps {time}, decode {time}\)", second)
    assert [path.name for path in tmp_path.iterdir()] == ["fastldm-0.png"]


def test_image_to_image_and_inpainting_write_images(model: str) -> None:
    Image.new("RGB", (64, 64), "red").save("in.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    assert generate(model, "--init-image", "in.png", "--strength", "1", "-o", "a.png").exit_code == 0
    assert generate(model, "--init-image", "in.png", "--mask", "mask.png", "-o", "b.png").exit_code == 0


def test_mistakes_found_by_the_loaded_model(model: str) -> None:
    for arguments, message in [
        (("--size", "60x64"), "width is 60: expected a multiple of 8"),
        (("--sampler", "eulr"), "did you mean"),
        (("--init-image", "missing.png"), "there is no file 'missing.png'"),
        (("--device", "warp"), "cannot be used here"),
    ]:
        done = generate(model, *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr.lower() or message in done.stderr
        assert done.stderr.count("\n") == 1, "one line"
        assert done.stdout == ""


def test_debug_prints_a_traceback(model: str) -> None:
    assert "Traceback" in generate(model, "--size", "60x64", "--debug").output


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root may write to: /proc")
def test_unwritable_folder_is_refused_before_loading() -> None:
    done = generate("no-model-is-opened", "-o", "/proc/a.png")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is for POSIX")
def test_ctrl_c_exits_130_and_writes_nothing(model: str, tmp_path: Path) -> None:
    # A job that a shell started in the background inherits an ignored SIGINT, and so would this child. It says when a
    # step begins: all is loaded then, and under way, however busy the machine is.
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastldm.cli import main
from fastldm.runtime.batch import EagerBatch
step = EagerBatch.step
EagerBatch.step = lambda *args: print("step", flush=True) or step(*args)
main()
"""
    command = [sys.executable, "-c", code, "generate", "a cat", "-m", model, "--steps", "999", "-o", "a.png"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=120)
    assert first == "step\n", stderr
    assert running.returncode == 130, stderr
    assert "stopped" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_help_gives_examples_and_defaults() -> None:
    text = " ".join(run("generate", "--help").output.split())
    for word in ("a.png becomes a-0.png", "dpm++ 2m karras", "--init-image", "fastldm-SEED.png", "default: default"):
        assert word in text
    assert "fastldm generate" in run("--help").output
