"""The waiting behaviour and the number of PyTorch's CPU threads.

Every thread that runs PyTorch's ops has its own OpenMP threads. GNU's runtime, which PyTorch's builds for Linux
include, lets them spin between two parallel loops, since the next one starts within microseconds. That causes three
problems:

    Other processes need the cores. A spinning thread uses CPU time that the thread it waits for would need: eight steps
    of the default model take 5 to 30 s on two cores with a load of four, while three times the idle machine's 0.28 s
    would be fair. `bound_spin` limits spinning to a thirtieth of the default, after which threads sleep: 1.5 s.
    `Contention` measures how long a thread was ready to run without a core, and lets its OpenMP threads sleep at once
    while there is contention: 0.8 to 1.1 s. Always sleeping would take 0.47 s on an idle machine; fewer threads would
    change an image's last bits depending on the load.

    A container has fewer CPUs than the machine. Only the kernel knows its quota; with a thread for each of 64 cores and
    a quota of 1.5, threads are stopped for most of each period, including the one that all others wait for. `cpus`
    returns the number of usable CPUs.

    Two callers have threads. The runtime counts the threads of all callers, and if there are more than cores, they
    sleep and are woken for each of a network's hundreds of loops: the default model's steps take twice as long. `rest`
    ends the OpenMP threads of a caller that only waits, or has loaded a model and may never call again.

    New threads take the number of threads that was set last, by whichever thread. `set_threads` is for one alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from time import monotonic

_SOFT = 1  # omp_pause_soft: keep the runtime's state
SPIN_COUNT = "10000"
"""Iterations that a waiting thread spins before it sleeps. The fewest without cost on an idle machine: with 3,000 the
default model's steps lose a fifth, with 1,000 a half. GNU's default is 300,000."""
_CGROUPS = Path("/sys/fs/cgroup")
_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # nanoseconds that this thread ran, and was ready but not running
WINDOW = 0.05  # seconds over which contention is measured
WAITED = 0.2
"""Fraction of that time without a core that counts as contention: at most 0.02 on an idle machine, 0.5 for each of six
processes on two cores."""
PATIENCE = 0.5  # seconds after the last contention until threads spin again


def bound_spin() -> None:
    """Limit the spinning of OpenMP's threads, and their number to this process's CPU quota. Call it before the runtime
    is loaded, which reads the environment only once: `import fastldm` does so. Variables that are already set
    (OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_NUM_THREADS) stay.
    """
    if sys.platform != "linux" or _is_loaded():
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    allowed = cpus()
    if "OMP_NUM_THREADS" not in os.environ and allowed < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(allowed)


def _is_loaded() -> bool:
    """Whether GNU's runtime is already loaded in this process."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:
        return "torch" in sys.modules


def cpus() -> int:
    """The number of CPUs that this process may use, by its affinity and by the rounded quota of its control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return affinity
    return max(1, min([affinity, *(int(quota + 0.5) for quota in _quotas(groups, _CGROUPS))]))


def threads() -> int:
    """The number of CPU threads for ops of this thread: PyTorch's setting, but at most the number of usable CPUs."""
    import torch

    return min(torch.get_num_threads(), cpus())


def set_threads(count: int) -> None:
    """`torch.set_num_threads` for this thread alone: those that start later have as many as they would have had."""
    import torch

    if torch.get_num_threads() == count:
        return
    seen, is_set = Future[int](), threading.Event()

    def keep() -> None:
        default = torch.get_num_threads()  # a new thread's
        seen.set_result(default)
        is_set.wait()
        torch.set_num_threads(default)

    keeper = threading.Thread(target=keep, name="fastldm threads", daemon=True)
    try:
        keeper.start()
    except RuntimeError:  # the interpreter ends, where nothing starts any more
        torch.set_num_threads(count)
        return
    seen.result()
    try:
        torch.set_num_threads(count)
    finally:
        is_set.set()
        keeper.join()


def _quotas(groups: str, root: Path) -> Iterator[float]:
    """The CPU quotas of a process's control groups and their parents. groups: content of /proc/self/cgroup.

    In a container the path may be the host's, which is not mounted: then the root of the mount has the quota.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        for mount in mounts:
            group = Path(path.lstrip("/"))
            for folder in (mount / group, *(mount / parent for parent in group.parents)):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """The quota of one control group, of version 2 or 1; yields nothing if it has none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return


class Contention:
    """Detects contention for the core of one thread; meanwhile, its OpenMP threads sleep as soon as they wait.

    The runtime reads its environment only once, but lets no thread spin while there are more threads than cores: so
    during contention there is a helper thread with one more OpenMP thread than cores, all asleep.
    """

    def __init__(self) -> None:
        self._worked = self._waited = 0  # nanoseconds of the thread at the last measurement
        self._measured_at = 0.0
        self._contended_until = 0.0
        self._helper: threading.Thread | None = None

    def look(self) -> None:
        """Measure contention; called often by the thread while it works."""
        now = monotonic()
        if now - self._measured_at < WINDOW or not _can_stop_spinning():
            return
        self._measured_at = now
        try:
            worked, waited = map(int, _SCHEDSTAT.read_text().split()[:2])
        except (OSError, ValueError):  # a kernel without these counters
            return
        ran, without_core = worked - self._worked, waited - self._waited
        self._worked, self._waited = worked, waited
        if without_core > WAITED * (ran + without_core):
            self._contended_until = now + PATIENCE
            if self._helper is None or not self._helper.is_alive():
                self._helper = threading.Thread(target=self._stay, name="fastldm contention", daemon=True)
                self._helper.start()

    def _stay(self) -> None:
        runtime = ctypes.CDLL(None)
        no_op = ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p)
        runtime.GOMP_parallel(no_op, None, ctypes.c_uint(len(os.sched_getaffinity(0)) + 1), ctypes.c_uint(0))
        wait = threading.Event().wait
        while (remaining := self._contended_until - monotonic()) > 0:
            wait(remaining)


@functools.cache
def _can_stop_spinning() -> bool:
    """Whether the runtime is GNU's, on Linux, and the environment does not configure how threads wait."""
    configured = "OMP_WAIT_POLICY" in os.environ or os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT) != SPIN_COUNT
    return sys.platform == "linux" and not configured and hasattr(ctypes.CDLL(None), "GOMP_parallel")


def rest() -> None:
    """End the OpenMP threads of this thread. New ones are started, within microseconds, when it needs them."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """OpenMP 5's omp_pause_resource_all of the runtime that PyTorch loaded, if it is GNU's."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
