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
    engines: str = ""  # another backend, whose engines it has and takes several steps a call with; "": its own


BACKENDS = {
    "onnxruntime-graph": Backend("onnx", ("onnxruntime",), ("cpu", "cuda"), engines="onnxruntime"),
    "onnxruntime": Backend("onnx", ("onnxruntime",), ("cpu", "cuda")),
    "openvino-graph": Backend("openvino", ("openvino",), ("cpu",), any_dtype=True, engines="openvino"),
    "openvino": Backend("openvino", ("openvino",), ("cpu",), any_dtype=True),
    "tensorrt": Backend("tensorrt", ("tensorrt_rtx", "tensorrt"), ("cuda",)),
}
"""By name. Without measurements, `--backend auto` prefers later entries."""


def engines_of(backend: str) -> str:
    """The backend whose engines a backend has: itself, as a rule."""
    return (BACKENDS[backend].engines if backend in BACKENDS else "") or backend


def takes_several_steps(backend: str) -> bool:
    """Whether a backend takes several steps a call, by the graph of a bundle that was exported with --whole-picture."""
    return engines_of(backend) != backend


def related(backend: str) -> list[str]:
    """The backends that have the same engines."""
    return [name for name in reversed(BACKENDS) if engines_of(name) == engines_of(backend)]
