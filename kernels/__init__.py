"""The network's ops, one file an op: the maths, a plain PyTorch reference that defines correct, and the public op.

Installed, and imported, as `fastldm.kernels`; nothing here imports anything else of fastldm.
"""

from __future__ import annotations

if __name__ != "fastldm.kernels":
    # A second copy under another name would register every op twice and split its state.
    raise ImportError(f"import this package as 'fastldm.kernels', not as {__name__!r}")
