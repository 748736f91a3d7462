"""The seam between a pipeline and what runs its networks: tensors by name in, tensors by name out.

The only place in the runtime that knows of `fastldm.export`, and it imports a backend when one is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastldm.errors import EngineError, InputError

if TYPE_CHECKING:
    from fastldm.export.spec import Axis, NetworkSpec


class Engine(Protocol):
    """A network that is ready to run. Used by one thread at a time."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass: all inputs of the network's spec to all its outputs, new tensors that belong to the caller.

        Inputs are on the engine's device, in the spec's dtypes; contiguous ones are read where they lie. InputError
        where they are not as the spec says, EngineError where the backend fails.
        """

    def close(self) -> None:
        """Give up what the engine holds. It is not used again."""


# backend -> the extra that brings its packages
BACKENDS = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}


def open_engine(
    backend: str,
    path: Path,
    spec: NetworkSpec,
    *,
    device: torch.device | str = "cpu",
    precision: str | None = None,
) -> Engine:
    """A network of a bundle, on a backend.

    path: the network's model.onnx; for "tensorrt" also an engine that was built before (NAME.engine).
    device: where inputs and outputs are, and where it runs.
    precision: what it computes in, "float32", "float16" or "bfloat16"; what the file holds where it is None, but for
        OpenVINO, which computes in "float32" or "bfloat16" whatever the file holds.

    Raises EngineError where the backend is not installed, naming the extra that brings it, or cannot run this.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(f"fastldm.export.{backend}")
    except ImportError as error:
        raise EngineError(
            f"backend {backend!r} cannot be imported here ({error}): pip install 'fastldm[{BACKENDS[backend]}]'"
        ) from error
    if not path.is_file():
        raise EngineError(f"{path} does not exist: expected the {spec.name} of a bundle")
    return module.open_engine(path, spec, torch.device(device), precision)


def bound(
    spec: NetworkSpec, inputs: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pass's inputs and outputs as backends that are handed addresses need them: inputs checked and contiguous,
    outputs allocated. InputError where an input is not what the spec says."""
    if set(inputs) != {port.name for port in spec.inputs}:
        wanted = ", ".join(port.name for port in spec.inputs)
        raise InputError(f"{spec.name} got {', '.join(inputs) or 'nothing'}: expected {wanted}")
    sizes: dict[str, int] = {}
    for port in spec.inputs:
        given = inputs[port.name]
        if given.dtype != port.torch_dtype or given.device != device or given.ndim != len(port.shape):
            raise InputError(
                f"{spec.name}: {port.name} is {_words(given.dtype, given.ndim, given.device)}: "
                f"expected {_words(port.torch_dtype, len(port.shape), device)}"
            )
        for size, axis in zip(given.shape, port.shape, strict=True):
            if isinstance(axis, int):
                fits = size == axis
            else:
                fits = nearest(axis, size) == size == sizes.setdefault(axis.name, size)
            if not fits:
                raise InputError(f"{spec.name}: {port.name} is {tuple(given.shape)}: expected {_shape(port.shape)}")
    outputs = {
        port.name: torch.empty(spec.shape(port, sizes), dtype=port.torch_dtype, device=device) for port in spec.outputs
    }
    return {name: tensor.contiguous() for name, tensor in inputs.items()}, outputs


def nearest(axis: Axis, size: int) -> int:
    """The size closest to this one that an axis can have; the smaller of two."""
    unit = axis.multiple_of
    below, above = size // unit * unit, -(-size // unit) * unit
    return min(max(below if size - below <= above - size else above, axis.least), axis.most)


def _words(dtype: torch.dtype, dimensions: int, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} of {dimensions} dimensions on {device}"


def _shape(shape: tuple[int | Axis, ...]) -> str:
    def words(axis: Axis) -> str:
        multiple = f" in steps of {axis.multiple_of}" if axis.multiple_of > 1 else ""
        return f"{axis.name} {axis.least} to {axis.most}{multiple}"

    return "(" + ", ".join(str(axis) if isinstance(axis, int) else words(axis) for axis in shape) + ")"
