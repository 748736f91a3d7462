"""The backends as data, which the command and the loader read without importing any of them.

To add a backend, write its file beside this one, with `open_engine`, and its entry here.
"""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    extra: str  # the extra of fastldm that installs it
    packages: tuple[str, ...]  # alternatives, one of which is enough
    devices: tuple[str, ...]  # types of devices that it runs on
    any_dtype: bool = False  # whether it can compute in another dtype than a bundle was exported in


BACKENDS = {
    "onnxruntime": Backend("onnx", ("onnxruntime",), ("cpu", "cuda")),
    "openvino": Backend("openvino", ("openvino",), ("cpu",), any_dtype=True),
    "tensorrt": Backend("tensorrt", ("tensorrt_rtx", "tensorrt"), ("cuda",)),
}
"""By name. Without measurements, `--backend auto` prefers later entries."""
