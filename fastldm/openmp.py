"""What PyTorch's CPU threads do while the thread that they work for waits.

Every thread that runs PyTorch's ops has OpenMP threads of its own. GNU's runtime, which PyTorch's builds for Linux
bring, lets them spin between two loops, for the next one is microseconds away. But it counts those of all threads, and
once they are more than there are cores they sleep instead, and are woken anew for each of a network's hundreds of
loops: the default model's steps take twice as long.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

_SOFT = 1  # omp_pause_soft: what the runtime knows is kept


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
