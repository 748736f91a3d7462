"""PyTorch's threads rest while the thread that they work for waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, torch
from fastldm import Pipeline, openmp

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
alone = count()
for ended in (openmp.rest, lambda: Pipeline.default(device="cpu", dtype="float32")("a", num_inference_steps=1)):
    torch.randn(1 << 22).exp()
    both = count()
    ended()
    print(both - alone, count() - alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other runtimes, which are left alone")
def test_a_thread_that_waits_has_no_others() -> None:
    """Two help the main thread. After a request there are the session's worker and the one that helps it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["2 0", "2 2"]
