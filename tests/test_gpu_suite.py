"""What runs on a machine with a GPU, which may have torch, triton, transformers and pytest, and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ops
from conftest import ROOT

from benchmarks import first


def test_the_suite_has_every_file_that_asks_for_a_gpu() -> None:
    marker = f"@pytest.mark.{'gpu'}\n"  # this file asks for none
    asking = {path.stem for path in (ROOT / "tests").glob("test_*.py") if marker in path.read_text()}
    names = [Path(name).stem for name in first.suite()]
    assert asking <= set(names)
    assert len(names) == len(set(names))
    assert {f"test_{module}" for module in ops.modules()} <= set(names)
    assert all((ROOT / name).is_file() for name in first.suite())


def test_it_collects_the_same_where_peers_are_missing() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    environments = (None, first.without(*first.MISSING))
    running = [
        subprocess.Popen([*command, *first.suite()], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for env in environments
    ]
    whole, lacking = (process.communicate(timeout=600)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0], lacking[-3000:]
    collected = [line for line in whole.splitlines() if "::" in line]
    assert len(collected) >= 20
    assert [line for line in lacking.splitlines() if "::" in line] == collected


def test_a_picture_is_made_where_they_are_missing(tmp_path: Path) -> None:
    environment = first.without(*first.MISSING, "transformers", "scipy")
    del environment["FASTLDM_CACHE"]
    work = "-m", "fastldm", "generate", "a red apple", "--steps", "1", "-o", str(tmp_path / "apple.png")
    for arguments in (work, ("-m", "fastldm", "doctor")):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "apple.png").stat().st_size > 0
    folder = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    assert f"{folder}/fastldm" in done.stdout
