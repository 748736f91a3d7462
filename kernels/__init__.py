"""The ops of the networks, a file each: the maths, a plain PyTorch reference that defines correct, where the kernel
applies, launch configurations, the kernel, and the op.

Installed, and imported, as `fastldm.kernels`; of the rest of fastldm only the basement is imported here.
"""

from __future__ import annotations

if __name__ != "fastldm.kernels":
    # A checkout as working folder makes this folder importable as `kernels`. A second copy of the ops must not come
    # of that, but neither may the import fail: transformers imports whatever goes by that name to see whether it is
    # the distribution so called.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"import this package as 'fastldm.kernels', not as {__name__!r}")

else:
    from fastldm.kernels.dispatch import OPS, observe, use

    __all__ = ["OPS", "observe", "use"]
