"""The memory of large tensors stays in a process that keeps its heap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastldm import __main__

SCRIPT = """
import resource, sys, threading
from fastldm import heap
if sys.argv[1] != "plain":
    heap.keep(**eval(sys.argv[1]))
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():  # on a thread, as a session does
    touched = []
    for turn in range(20):
        before = faults()
        for size in eval(sys.argv[2]):
            torch.empty(size << 20, dtype=torch.uint8).fill_(1)
        touched.append(faults() - before)
    print(sum(touched[-5:]) // 5)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def faults(*arguments: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    clean |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, env=clean, check=True).stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc alone is told what to keep"
)
@pytest.mark.full
def test_kept_heap_touches_no_new_pages() -> None:
    """Once it has what the largest ops need. Without it each op does, and whoever tells malloc what to do by its
    variables is obeyed."""
    pages = (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    small, large = "100, 20, 60, 100, 33", "200, 33"
    assert faults("{}", small) < 313 * pages / 100
    assert faults("plain", small) > 313 * pages / 2
    assert faults("{}", small, MALLOC_MMAP_THRESHOLD_="1000000") > 313 * pages / 2
    some = '{"at_most": 128 << 20}'
    assert faults(some, small) < 313 * pages / 100
    assert 200 * pages / 2 < faults(some, large) < 210 * pages


@pytest.mark.parametrize(("command", "at_most"), [("generate", None), ("export", 2**27), ("prepare", 2**27)])
def test_commands_that_export_return_memory(command: str, at_most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int | None] = []
    monkeypatch.setattr(sys, "argv", ["fastldm", command])
    monkeypatch.setattr(__main__.heap, "keep", lambda at_most: kept.append(at_most))
    monkeypatch.setattr(__main__.cli_report, "run", lambda main: None)
    __main__.run()
    assert kept == [at_most]
