"""Export of text encoder, U-Net and VAE to other runtimes. Installed, and imported, as `fastldm.export`."""

from __future__ import annotations

import os

if __name__ != "fastldm.export":
    raise ImportError(f"import this package as 'fastldm.export', not as {__name__!r}")

# Since 1.31, ONNX Runtime keeps a device id and an event database in the user's cache unless this is set before it is
# loaded: its own function comes too late. To allow it, set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
