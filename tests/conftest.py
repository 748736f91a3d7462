"""Shared by all tests: the checkout is importable without an install, as are the helpers in support/, nothing reaches a
hub, and every test starts from one seed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # also where a test imports ONNX Runtime itself
os.environ.setdefault("FASTLDM_CACHE", "/dev/null/cache")  # no user's cache in the tests, and none that root can make
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels run on the CPU, slowly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
        for item in items:
            if item.get_closest_marker("gpu"):  # not `keywords`, which have the names of folders too
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; `mount -o remount,size=...` enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Steps wait until it is set: what a test does before happens before them, however slow the machine."""
    from fastldm.runtime.batch import EagerBatch

    gate, step = threading.Event(), EagerBatch.step

    def waiting(self: Any, runs: Any) -> str:
        assert gate.wait(60)
        return step(self, runs)

    monkeypatch.setattr(EagerBatch, "step", waiting)
    return gate
