"""PyTorch's threads rest while the thread that they work for waits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastldm import openmp

SCRIPT = """
import os, torch
from threading import Thread
from fastldm import Pipeline, openmp

def count():
    return len(os.listdir("/proc/self/task"))

def load():
    global pipe
    pipe = Pipeline.default(device="cpu", dtype="float32")

torch.set_num_threads(3)
alone = count()
for ended in (
    openmp.rest,
    load,
    lambda: pipe.load_lora_weights("sketch"),
    lambda: pipe.session.call(lambda: None),  # starts the worker
    lambda: pipe("a", num_inference_steps=1, width=64, height=64),
):
    torch.randn(1 << 22).exp()
    both = count()
    ended()
    print(both - alone, count() - alone)

numbers = []
new = Thread(target=lambda: numbers.append(torch.get_num_threads()))
new.start()
new.join()
print(pipe.session.call(torch.get_num_threads), *numbers)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other runtimes, which are left alone")
def test_waiting_thread_has_no_helpers() -> None:
    """Two help the main thread. Later there is the session's worker, and after a request the one that helps it: so many
    use the decoder has for, and other threads still start with three."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "3"}
    environment["GOMP_SPINCOUNT"] = "9999"  # whoever says so has no thread more while others want the cores
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["2 0", "2 0", "2 0", "2 1", "3 2", "2 3"]


def test_number_of_threads_is_set_at_the_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    before = torch.get_num_threads()
    monkeypatch.setattr(threading.Thread, "start", refused)
    try:
        openmp.set_threads(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/\n", {"cpu.max": "max 100000"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, [4.0, 2.0]),
        ("0::/docker/of-the-host\n", {"cpu.max": "50000 100000"}, [0.5]),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, [1.0]),
        ("3:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, []),
        ("3:cpuset:/x\n4:memory:/y\n", {"cpuset/x/cpu.max": "100000 100000"}, []),
        ("0::/\n", {"cpu.max": "nonsense"}, []),
        ("0::/\n", {}, []),
    ],
)
def test_quotas_of_control_groups(groups: str, files: dict[str, str], quotas: list[float], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(openmp._quotas(groups, tmp_path)) == quotas


def printed(code: str, **environment: str) -> str:
    cached = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    cached |= {"PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=cached, check=True)
    return done.stdout.strip()


SHOW = "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_NUM_THREADS'))"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other runtimes, which are left alone")
def test_threads_spin_shortly_unless_configured() -> None:
    assert printed(f"import os, fastldm; {SHOW}") == f"{openmp.SPIN_COUNT} None"
    assert printed(f"import os, fastldm; {SHOW}", OMP_WAIT_POLICY="ACTIVE") == "None None"
    assert printed(f"import os, fastldm; {SHOW}", GOMP_SPINCOUNT="7") == "7 None"
    assert printed(f"import os, torch, fastldm; {SHOW}") == "None None", "too late: the runtime has read it"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no control groups")
def test_no_more_threads_than_cpus() -> None:
    """Of a quota that is read before the runtime is there, and of one that a request finds."""
    groups = "import os, pathlib; os.sched_getaffinity = lambda pid: set(range(8)); import fastldm.openmp as o; "
    quota = f"o._quotas = lambda *_: iter([1.4]); o.bound_spin(); {SHOW}; "
    code = groups + quota + "import torch; print(o.cpus(), torch.get_num_threads())"
    assert printed(code).splitlines() == [f"{openmp.SPIN_COUNT} 1", "1 1"]
    later = "import torch; torch.set_num_threads(4); import fastldm.openmp as o; o._quotas = lambda *_: iter([1.0]); "
    run = "import fastldm; p = fastldm.Pipeline.default(device='cpu', dtype='float32'); p('a', num_inference_steps=1); "
    assert printed(later + run + "print(p.session.call(torch.get_num_threads))") == "1"


CONTENTION = """
import os, sys, time, torch
from pathlib import Path
from fastldm import openmp

openmp._SCHEDSTAT, watch = Path(sys.argv[1]), openmp.Contention()
count = lambda: len(os.listdir("/proc/self/task"))
alone = count()

def after(share, seconds):
    global worked, waited
    worked, waited = worked + 1e9 * (1 - share), waited + 1e9 * share
    openmp._SCHEDSTAT.write_text(f"{worked:.0f} {waited:.0f} 7")
    time.sleep(1.2 * openmp.WINDOW)
    watch.look()
    time.sleep(seconds)
    return count() - alone

worked = waited = 0
print(after(0.02, 0.1), after(0.5, 0.2), after(0.5, 0.4), after(0.1, 0.3), after(0.5, 0.2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how long a thread waited for a core")
@pytest.mark.parametrize(
    ("environment", "crowded"), [({}, True), ({"GOMP_SPINCOUNT": "7"}, False), ({"OMP_WAIT_POLICY": "active"}, False)]
)
def test_threads_sleep_during_contention(environment: dict[str, str], crowded: bool, tmp_path: Path) -> None:
    """A thread more than there are cores, and who keeps them: there while a thread waits for its core, gone after."""
    crowd = (len(os.sched_getaffinity(0)) + 1) * crowded
    code = f"import sys; sys.argv = ['', {str(tmp_path / 'schedstat')!r}]\n{CONTENTION}"
    assert printed(code, **environment) == f"0 {crowd} {crowd} 0 {crowd}"


def test_kernel_without_counters_is_supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watch = openmp.Contention()
    for text in (None, "", "nonsense 1 2"):
        if text is not None:
            (tmp_path / "schedstat").write_text(text)
        monkeypatch.setattr(openmp, "_SCHEDSTAT", tmp_path / "schedstat")
        monkeypatch.setattr(watch, "_measured_at", 0.0)
        watch.look()
    assert watch._helper is None
