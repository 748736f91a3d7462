"""What PyTorch's CPU threads do while they wait, and how many of them there should be.

Every thread that runs PyTorch's ops has OpenMP threads of its own. GNU's runtime, which PyTorch's builds for Linux
bring, lets them spin between two loops, for the next one is microseconds away. Three things go wrong with that:

    Others want the cores. A thread that spins burns the share that the thread it waits for would need: eight steps of
    the default model take 5 to 30 s on two cores with a load of four, where three times the quiet 0.28 s would be fair.
    `bound_spin` has them spin for a thirtieth of that and then sleep: 1.5 s. `Contention` sees how long a thread was
    ready and had no core, and has its helpers sleep at once for as long as others want the cores: 0.8 to 1.1 s.
    Sleeping always would take 0.47 s where it is quiet; fewer threads would change a picture's last bits by the load.

    A container has fewer CPUs than the machine. What it may use by quota is known to the kernel alone; a thread for
    each of 64 cores, of which 1.5 are its own, is stopped for most of each period, the one that all others wait for
    too. `cpus` says how many there are.

    Threads of two callers. The runtime counts those of all, and once they are more than there are cores they sleep
    instead, and are woken anew for each of a network's hundreds of loops: the default model's steps take twice as long.
    `rest` ends those of a caller that only waits.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

_SOFT = 1  # omp_pause_soft: what the runtime knows is kept
SPIN_COUNT = "10000"
"""Rounds that a waiting thread spins before it sleeps. The fewest that cost nothing on a quiet machine: of the default
model's steps 3,000 lose a fifth, 1,000 a half. GNU's default is 300,000."""
_CGROUPS = Path("/sys/fs/cgroup")
_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # nanoseconds that this thread ran, and that it was ready and did not
WINDOW = 0.05  # seconds of work over which contention is judged
WAITED = (
    0.2  # share of it without a core that shows contention: at most 0.02 where it is quiet, 0.5 of six on two cores
)
PATIENCE = 0.5  # seconds after contention was last seen until threads spin again


def bound_spin() -> None:
    """Have OpenMP's threads spin shortly, and be no more than this process has CPUs by quota. To be called before the
    runtime is loaded, which reads the environment once: `import fastldm` does so. What the environment says already
    (OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_NUM_THREADS) stays.
    """
    if sys.platform != "linux" or _is_loaded():
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    allowed = cpus()
    if "OMP_NUM_THREADS" not in os.environ and allowed < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(allowed)


def _is_loaded() -> bool:
    """Whether GNU's runtime is in this process already."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:
        return "torch" in sys.modules


def cpus() -> int:
    """How many CPUs this process may use: by its affinity, and by the quota of its control groups, to the nearest."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return affinity
    return max(1, min([affinity, *(int(quota + 0.5) for quota in _quotas(groups, _CGROUPS))]))


def threads() -> int:
    """How many CPU threads work has that this thread asks for: what torch.set_num_threads said, and no more than there
    are CPUs."""
    import torch

    return min(torch.get_num_threads(), cpus())


def _quotas(groups: str, root: Path) -> Iterator[float]:
    """CPUs that each control group of a process allows, its parents' too. groups: what /proc/self/cgroup says.

    In a container the path may be the host's, of which nothing is mounted: then the mount's own root says it.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        for mount in mounts:
            inside = Path(path.lstrip("/"))
            for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Of one control group, of version 2 or 1; nothing where it has none."""
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
    """Whether others want the core of one thread; while they do, its OpenMP threads sleep as soon as they wait.

    The runtime reads its environment once, but lets no thread spin while there are more of them than cores: so a thread
    is kept that has one more than there are cores, asleep. It goes by itself.
    """

    def __init__(self) -> None:
        self._worked = self._waited = 0  # nanoseconds of the thread's, when last judged
        self._looked = 0.0
        self._crowded_until = 0.0
        self._crowd: threading.Thread | None = None

    def look(self) -> None:
        """To be called by the thread, often, while it works."""
        now = monotonic()
        if now - self._looked < WINDOW or not _may_crowd():
            return
        self._looked = now
        try:
            worked, waited = map(int, _SCHEDSTAT.read_text().split()[:2])
        except (OSError, ValueError):  # a kernel that does not count them
            return
        did, was_kept = worked - self._worked, waited - self._waited
        self._worked, self._waited = worked, waited
        if was_kept > WAITED * (did + was_kept):
            self._crowded_until = now + PATIENCE
            if self._crowd is None or not self._crowd.is_alive():
                self._crowd = threading.Thread(target=self._stay, name="fastldm crowd", daemon=True)
                self._crowd.start()

    def _stay(self) -> None:
        runtime = ctypes.CDLL(None)
        nothing = ctypes.cast(runtime.omp_get_thread_num, ctypes.c_void_p)
        runtime.GOMP_parallel(nothing, None, ctypes.c_uint(len(os.sched_getaffinity(0)) + 1), ctypes.c_uint(0))
        wait = threading.Event().wait
        while (left := self._crowded_until - monotonic()) > 0:
            wait(left)


@functools.cache
def _may_crowd() -> bool:
    """Whether the runtime is GNU's, on Linux, and nobody has said how its threads wait."""
    said = "OMP_WAIT_POLICY" in os.environ or os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT) != SPIN_COUNT
    return sys.platform == "linux" and not said and hasattr(ctypes.CDLL(None), "GOMP_parallel")


def rest() -> None:
    """End the threads that work for this one. It gets new ones, in microseconds, when it next needs them."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """OpenMP 5's omp_pause_resource_all of the runtime that PyTorch loaded, where that is GNU's."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
