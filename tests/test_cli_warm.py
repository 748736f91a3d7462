"""`fastldm warm`: which kernels it compiles, where they go, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundles
import pytest
import tiny
import torch
from command import run

import fastldm
from fastldm.planning import warm

ROOT = Path(fastldm.__file__).resolve().parent.parent


def test_each_arch_is_warmed_for_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def warmed(spec: Any, arch: str, *, sizes: Any, batches: Any, dtype: Any, controls: Any, **options: Any) -> int:
        own = {"lora": False, "pag": False, "apg_momentum": False, "prior": ()}
        assert options == {**own, "on_kernel": options["on_kernel"]}
        calls.append((spec.family.name, arch, list(sizes), tuple(batches), dtype, [type(each) for each in controls]))
        return 7

    monkeypatch.setattr(warm, "warm", warmed)
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")  # set anew by --cache, and put back after the test
    folder = str(tmp_path / "kernels")
    options = ["--arch", "sm_90", "--arch", "sm_89", "--size", "64", "--size", "32x64", "--n", "1", "--n", "2"]
    done = run("warm", *options, "--dtype", "bfloat16", "--cache", folder)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"sm_90: 7 kernels in {folder}\nsm_89: 7 kernels in {folder}\n"
    for call, arch in zip(calls, ("sm_90", "sm_89"), strict=True):
        assert call == ("small", arch, [(64, 64), (32, 64)], (1, 2), torch.bfloat16, [])


def test_second_model_of_a_size_is_warmed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(warm, "warm", lambda spec, arch, *, sizes, **_: calls.append((spec.family.name, sizes)) or 2)
    done = run("warm", "--arch", "sm_90", "--size", "128x128")
    assert done.stdout.startswith("sm_90: 4 kernels in "), done.output
    assert calls == [("small", [(128, 128), (64, 64)]), ("pixel-upscaler", [(128, 128)])]


def test_what_requests_will_have_is_warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(warm, "warm", lambda spec, arch, **options: calls.append((spec.family.name, options)) or 2)
    refiner = str(tiny.save_pipeline("sdxl-refiner", tmp_path / "refiner"))
    options = ("--hires-scale", "1.5", "--refiner", refiner, "--pag", "--best-of", "6", "--n", "1")
    done = run("warm", "--arch", "sm_90", *options)
    assert done.stdout.startswith("sm_90: 4 kernels in "), done.output
    (name, own), (other, theirs) = calls
    assert (name, own["sizes"], own["batches"]) == ("small", [(64, 64), (96, 96)], [1, 4])
    assert own["pag"]
    assert own["ranker"].vision.image_size == 64
    assert (other, theirs["sizes"], theirs["batches"]) == ("sdxl-refiner", [(96, 96)], [1, 4])
    assert theirs["pag"], "the refiner is guided likewise"
    assert "ranker" not in theirs
    assert "--ranker is for --best-of" in run("warm", "--arch", "sm_90", "--ranker", "x").stderr
    small = str(tiny.save_pipeline("sd1", tmp_path / "small"))
    assert "this model has none: give one" in run("warm", "-m", small, "--arch", "sm_90", "--best-of", "2").stderr


@pytest.mark.full
def test_kernels_are_compiled_into_the_cache_folder(tmp_path: Path) -> None:
    """In a process of its own: Triton's interpreter, which the tests run kernels with, cannot compile. (A third of a
    minute; test_dispatch.py compiles a few in every run.)"""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    model, folder = str(bundles.smallest("sd1", tmp_path / "model")), tmp_path / "kernels"
    command = [sys.executable, "-m", "fastldm", "warm", "-m", model, "--arch", "sm_90", "--size", "16"]
    done = subprocess.run(
        [*command, "--cache", str(folder)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    count = re.fullmatch(rf"sm_90: (\d+) kernels in {re.escape(str(folder))}\n", done.stdout)
    assert count is not None
    assert len([*folder.rglob("*.cubin")]) == int(count[1]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_75"], f"arch is 'sm_75': expected {warm.ARCH_NAMES}"),
        (["--arch", "sm_90", "--size", "0"], "height is 0"),
        (["--arch", "sm_90", "--n", "0"], "0 is not in the range"),
        (["--arch", "sm_90", "-m", "./nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_compile_nothing(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "warm", lambda *args, **kwargs: pytest.fail("it compiles"))
    done = run("warm", *options)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
