"""Export of text encoder, U-Net and VAE to other runtimes. Installed, and imported, as `fastldm.export`."""

from __future__ import annotations

if __name__ != "fastldm.export":
    raise ImportError(f"import this package as 'fastldm.export', not as {__name__!r}")
