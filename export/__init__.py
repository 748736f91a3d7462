"""Export of text encoder, U-Net and VAE to other runtimes. Installed, and imported, as `fastldm.export`."""

from __future__ import annotations

import os

if __name__ != "fastldm.export":
    raise ImportError(f"import this package as 'fastldm.export', not as {__name__!r}")

# From 1.31 on, ONNX Runtime keeps a device id and a data base of events in its user's cache unless it is told not to
# before it is loaded: its own call for that comes too late. Who wants them sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
