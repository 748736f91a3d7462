"""Settings of malloc for processes that only run fastldm, so that the memory of large tensors is reused.

On a CPU, PyTorch calls malloc for each activation. Glibc maps blocks of more than a few megabytes from the system and
unmaps them when they are freed; the kernel zeroes each page again on first access. That takes up to a quarter of a
float32 step of SD1.5 and a third of a VAE's decoder, depending on the state of the heap. For comparison,
`MALLOC_TOP_PAD_=131072 fastldm generate ...` disables these settings.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8


def keep(at_most: int | None = None) -> None:
    """Keep freed memory in the heap for the next op, until the process ends. Call it before any thread is started.

    The heap then stays at its peak size, which the next image needs again. at_most: bytes, below 2 GiB, that are kept
    free at its end; larger blocks are the system's. Does nothing without glibc, or if the environment configures
    malloc.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # arenas of other threads hold at most 64 MB
        if at_most is None:
            mallopt(_M_MMAP_MAX, 0)
        else:
            mallopt(_M_MMAP_THRESHOLD, at_most)
        mallopt(_M_TRIM_THRESHOLD, -1 if at_most is None else at_most)
