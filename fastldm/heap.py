"""What malloc does with the memory of large tensors once they are gone, in a process that is fastldm's own.

On a CPU PyTorch asks malloc for each activation. Glibc takes what is larger than some megabytes from the system anew,
and gives it back as soon as it is free; the kernel clears each page of it again when it is first touched. In a float32
step of SD1.5 that is up to a quarter of the time, in a VAE's decoder a third, and whether a step fares so or not is
luck: it depends on what else lies in the heap. `MALLOC_TOP_PAD_=131072 fastldm generate ...` leaves malloc as it is, to
compare.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Have the heap keep what is freed, for the next op, until the process ends. To be called before any thread begins.

    It then holds the most that it ever needed, which is what it needs again for the next picture. Does nothing without
    glibc, and where the environment tells malloc what to do.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # heaps of other threads than the first hold 64 MB at most
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
