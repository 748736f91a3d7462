"""Which backends there are, as data: what the command and the loader know of each without importing it.

To add a backend, write its file beside this one, with `open_engine`, and its entry here.
"""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    extra: str  # of fastldm, which installs it
    packages: tuple[str, ...]  # that it consists of, of which one is enough
    devices: tuple[str, ...]  # where it runs
    any_dtype: bool = False  # whether it computes in others than the one that a bundle was exported in


BACKENDS = {
    "onnxruntime": Backend("onnx", ("onnxruntime",), ("cpu", "cuda")),
    "openvino": Backend("openvino", ("openvino",), ("cpu",), any_dtype=True),
    "tensorrt": Backend("tensorrt", ("tensorrt_rtx", "tensorrt"), ("cuda",)),
}
"""By name. Where nothing was measured, `--backend auto` prefers the later ones."""
