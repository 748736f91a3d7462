"""benchmarks/aot.py: every kernel compiles for every GPU, none spills, and the committed table is up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ops import kernels

from fastldm.kernels import fp8
from fastldm.kernels.compile import ARCHS, SHARED_MEMORY

COMMITTED = ROOT / "benchmarks" / "results" / "aot.json"


def aot(cache: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aot", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_an_op_compiles_for_a_gpu(tmp_path: Path) -> None:
    table = aot(tmp_path, "--op", "layer_norm", "--arch", "90", "--workload", "sd15-512 step", "--dtype", "float16")
    assert "| _layer_norm_kernel | float16 |" in table
    assert "spills 0" not in table


def test_committed_table_has_every_kernel_and_no_spill() -> None:
    rows: list[dict[str, Any]] = json.loads(COMMITTED.read_text())
    assert len(kernels()) >= 10
    for arch in ARCHS:
        absent = {"_quantize_kernel"} if arch < fp8.OLDEST else set()  # no matrix units for what it writes
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels() - absent
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED_MEMORY[row["arch"]] * 1024, row


@pytest.mark.full
def test_committed_table_matches_the_kernels(tmp_path: Path) -> None:
    """The same kernels in the same configurations; registers may differ with the compiler's version."""
    out = tmp_path / "results"
    aot(tmp_path / "cache", "--results", str(out))

    def configurations(file: Path) -> set[str]:
        return {
            json.dumps([row["kernel"], row["arch"], row["dtype"], row["constants"]], sort_keys=True)
            for row in json.loads(file.read_text())
        }

    assert configurations(out / "aot.json") == configurations(COMMITTED)
