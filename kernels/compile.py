"""Compiling kernels ahead of time, for a GPU that this machine need not have.

Triton needs no driver to compile, only a target. `Ahead` sets one, with a stub in place of the driver, and compiles
each kernel that an op would launch, through the launcher that a GPU would run, with the same specialisation of its
arguments. So a machine with that GPU finds these entries in Triton's cache, and its first request compiles nothing.

    ahead = Ahead(90)
    with targeting(ahead), torch.device("meta"):
        group_norm(...)                  # compiles the kernels, and runs none
    ahead.compiled                       # an entry for each kernel and configuration
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
    """A compiled kernel: its name, target and constants, and the resources that it uses."""

    kernel: str
    arch: int
    constants: tuple[tuple[str, Any], ...]  # constexpr arguments, num_warps, num_stages
    shared: int  # bytes of shared memory a program takes
    cubin: bytes


class Ahead(Target):
    """Compiles for sm_`arch`. Raises the compiler's errors, and RuntimeError where a kernel takes more shared memory
    than the GPU has, which the compiler does not check. `on_compiled` is called once for each kernel.
    """

    def __init__(self, arch: int, on_compiled: Callable[[Compiled], None] | None = None) -> None:
        if arch not in ARCHS:
            raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(map(str, ARCHS))}")
        if interpreting():
            raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels and cannot compile them; unset it")
        super().__init__(arch)
        self.on_compiled = on_compiled
        self.compiled: dict[str, Compiled] = {}  # by Triton's own hash

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.compile(kernel, args, constants)

    def compile(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
        """The kernel for these arguments, compiled once."""
        with _stub_driver(self.arch):
            binary = kernel.warmup(*args, grid=(1,), **constants)
        if binary.hash in self.compiled:
            return self.compiled[binary.hash]
        if binary.metadata.shared > SHARED_MEMORY[self.arch] * 1024:
            raise RuntimeError(
                f"{binary.name} {constants} takes {binary.metadata.shared} bytes of shared memory; sm_{self.arch} has "
                f"{SHARED_MEMORY[self.arch]} KiB"
            )
        compiled = Compiled(
            binary.name, self.arch, tuple(sorted(constants.items())), binary.metadata.shared, binary.asm["cubin"]
        )
        self.compiled[binary.hash] = compiled
        if self.on_compiled is not None:
            self.on_compiled(compiled)
        return compiled


class _StubDriver:
    """The methods of Triton's driver that compilation calls."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return (
            self.arch
        )  # Triton caches kernels by device: no two targets share a number, and none that of a real device

    def get_current_stream(self, device: int) -> int:
        return 0


_lock = threading.RLock()


@contextmanager
def _stub_driver(arch: int) -> Iterator[None]:
    from triton.runtime import driver

    with _lock:
        previous = driver._active  # reset_active() would look for a real driver, and fail without one
        driver.set_active(_StubDriver(arch))
        try:
            yield
        finally:
            driver._active = previous
