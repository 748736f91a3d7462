"""Compiling kernels for a GPU that is not there.

Triton needs no driver to compile, only to be told the target. `Ahead` is told, stands in for the driver, and compiles
each kernel that an op would launch, through the very launcher that a GPU would run, with the same specialisation of
its arguments. So what it leaves in Triton's cache is what a machine with that GPU finds there, and its first request
compiles nothing.

    ahead = Ahead(90)
    with targeting(ahead), torch.device("meta"):
        group_norm(...)                  # runs nothing, compiles what it would launch
    ahead.compiled                       # one entry a kernel and configuration
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastldm.kernels.dispatch import Target, interpreting

ARCHS = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one program may take


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled: what it was made from, and what it takes."""

    kernel: str
    arch: int
    constants: tuple[tuple[str, Any], ...]  # constexpr arguments, num_warps, num_stages
    shared: int  # bytes of shared memory a program takes
    cubin: bytes


class Ahead(Target):
    """Compiles for sm_`arch`. Fails with the compiler's error, and where a kernel takes more shared memory than there
    is, which the compiler does not check. `done` hears of each kernel once.
    """

    def __init__(self, arch: int, done: Callable[[Compiled], None] | None = None) -> None:
        if arch not in ARCHS:
            raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(map(str, ARCHS))}")
        if interpreting():
            raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels and cannot compile them; unset it")
        super().__init__(arch)
        self.done = done
        self.compiled: dict[str, Compiled] = {}  # by Triton's own hash

    def compile(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        with _standing_in(self.arch):
            made = kernel.warmup(*args, grid=(1,), **constants)
        if made.hash in self.compiled:
            return
        if made.metadata.shared > SHARED_MEMORY[self.arch] * 1024:
            raise RuntimeError(
                f"{made.name} {constants} takes {made.metadata.shared} bytes of shared memory; sm_{self.arch} has "
                f"{SHARED_MEMORY[self.arch]} KiB"
            )
        compiled = Compiled(
            made.name, self.arch, tuple(sorted(constants.items())), made.metadata.shared, made.asm["cubin"]
        )
        self.compiled[made.hash] = compiled
        if self.done is not None:
            self.done(compiled)


class _StandIn:
    """The part of Triton's driver that compilation asks."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device: no two targets, and no real device, share a number

    def get_current_stream(self, device: int) -> int:
        return 0


_lock = threading.RLock()


@contextmanager
def _standing_in(arch: int) -> Iterator[None]:
    from triton.runtime import driver

    with _lock:
        before = driver._active  # reset_active() would look for a real driver, and fail without one
        driver.set_active(_StandIn(arch))
        try:
            yield
        finally:
            driver._active = before
