"""benchmarks/aot.py: kernels compiled for a GPU that is not here, and what they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def aot(cache: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aot", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_one_op_for_one_gpu(tmp_path: Path) -> None:
    said = aot(tmp_path, "--op", "layer_norm", "--arch", "90", "--workload", "sd15-512 step", "--dtype", "float16")
    assert "| _layer_norm_kernel | float16 |" in said
    assert "spills 0" not in said
