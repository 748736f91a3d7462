"""Engines: a network of a bundle on a backend, with tensors by name as inputs and outputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastldm import openmp
from fastldm.checks import show
from fastldm.errors import EngineError, InputError
from fastldm.export.backends import BACKENDS, engines_of
from fastldm.export.spec import NetworkSpec
from fastldm.reading import check_path
from fastldm.sizes import Axis, nearest


class Engine(Protocol):
    """A network that is ready to run. Used by one thread at a time."""

    @property
    def specs(self) -> Sequence[NetworkSpec]:
        """The network's spec, for each range of sizes that the engine was built for."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the network: all inputs of its spec to all its outputs, which are new tensors.

        Inputs are on the engine's device, in the spec's dtypes; contiguous ones are not copied. InputError if they do
        not match the spec, EngineError if the backend fails.
        """

    def close(self) -> None:
        """Free the engine's resources. It must not be used again."""


MANIFEST = "manifest.json"
"""The file that makes a folder a bundle."""


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `fastldm export` wrote. InputError for values that are no path."""
    return (check_path(path, "path_or_id") / MANIFEST).is_file()


def open_engine(
    backend: str,
    path: Path,
    spec: NetworkSpec,
    *,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    hashes: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> Engine:
    """Open a network of a bundle on a backend.

    path: the network's model.onnx; for "tensorrt" also an engine that was built before (NAME.engine).
    device: where it runs, and where inputs and outputs are.
    precision: "float32", "float16" or "bfloat16"; by default the dtype of the file, except that OpenVINO computes in
        "float32" or "bfloat16" whatever the file holds.
    hashes: sha256 of the network's files by name, which engine caches need.
    threads: number of CPU threads; by default PyTorch's number of threads in this thread.

    Raises EngineError if the backend is not installed, naming the extra that installs it, or cannot run the network.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {show(backend)}: expected one of {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(f"fastldm.export.{engines_of(backend)}")
    except ImportError as error:
        raise EngineError(
            f"backend {backend!r} cannot be imported here ({error}): pip install 'fastldm[{BACKENDS[backend].extra}]'"
        ) from error
    if not path.is_file():
        raise EngineError(f"{path} does not exist: expected the {spec.name} of a bundle")
    return module.open_engine(path, spec, torch.device(device), precision, hashes or {}, threads or openmp.threads())


def bound(
    spec: NetworkSpec, inputs: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs for backends that take addresses: inputs checked and contiguous, outputs allocated. InputError
    if an input does not match the spec."""
    if set(inputs) != {port.name for port in spec.inputs}:
        expected = ", ".join(port.name for port in spec.inputs)
        raise InputError(f"{spec.name} got {', '.join(inputs) or 'nothing'}: expected {expected}")
    sizes: dict[str, int] = {}
    axes = spec.axes
    for port in spec.inputs:
        x = inputs[port.name]
        if x.dtype != port.torch_dtype or x.device != device or x.ndim != len(port.shape):
            raise InputError(
                f"{spec.name}: {port.name} is {_describe(x.dtype, x.ndim, x.device)}: "
                f"expected {_describe(port.torch_dtype, len(port.shape), device)}"
            )
        for size, axis in zip(x.shape, port.shape, strict=True):
            if isinstance(axis, int):
                fits = size == axis
            else:
                own = axes[axis.name]  # of which this may be in another unit
                fits = nearest(axis, size) == size
                fits = fits and sizes.setdefault(axis.name, size * own.best // axis.best) * axis.best == size * own.best
            if not fits:
                raise InputError(
                    f"{spec.name}: {port.name} is {tuple(x.shape)}: expected {_describe_shape(port.shape)}"
                )
    outputs = {
        port.name: torch.empty(spec.shape(port, sizes), dtype=port.torch_dtype, device=device) for port in spec.outputs
    }
    return {name: tensor.contiguous() for name, tensor in inputs.items()}, outputs


def _describe(dtype: torch.dtype, dimensions: int, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} of {dimensions} dimensions on {device}"


def _describe_shape(shape: tuple[int | Axis, ...]) -> str:
    def describe(axis: Axis) -> str:
        multiple = f" in steps of {axis.multiple_of}" if axis.multiple_of > 1 else ""
        return f"{axis.name} {axis.least} to {axis.most}{multiple}"

    return "(" + ", ".join(str(axis) if isinstance(axis, int) else describe(axis) for axis in shape) + ")"
