"""What runs a network: tensors by name in, tensors by name out; and a network of a bundle on a backend."""

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
from fastldm.export.backends import BACKENDS
from fastldm.export.spec import NetworkSpec
from fastldm.reading import check_path
from fastldm.sizes import Axis, nearest


class Engine(Protocol):
    """A network that is ready to run. Used by one thread at a time."""

    @property
    def specs(self) -> Sequence[NetworkSpec]:
        """What it takes: of what it was opened for, each range of sizes that it was built for."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass: all inputs of the network's spec to all its outputs, new tensors that belong to the caller.

        Inputs are on the engine's device, in the spec's dtypes; contiguous ones are read where they lie. InputError
        where they are not as the spec says, EngineError where the backend fails.
        """

    def close(self) -> None:
        """Give up what the engine holds. It is not used again."""


MANIFEST = "manifest.json"
"""What a folder that is a bundle has, and no other model."""


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `fastldm export` wrote. InputError for what can be no path."""
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
    """A network of a bundle, on a backend.

    path: the network's model.onnx; for "tensorrt" also an engine that was built before (NAME.engine).
    device: where inputs and outputs are, and where it runs.
    precision: what it computes in, "float32", "float16" or "bfloat16"; what the file holds where it is None, but for
        OpenVINO, which computes in "float32" or "bfloat16" whatever the file holds.
    hashes: sha256 of the network's files by name, where they are known: engine caches need them.
    threads: of a CPU that it may use; those that PyTorch has in this thread where it is None.

    Raises EngineError where the backend is not installed, naming the extra that brings it, or cannot run this.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {show(backend)}: expected one of {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(f"fastldm.export.{backend}")
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


def _words(dtype: torch.dtype, dimensions: int, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} of {dimensions} dimensions on {device}"


def _shape(shape: tuple[int | Axis, ...]) -> str:
    def words(axis: Axis) -> str:
        multiple = f" in steps of {axis.multiple_of}" if axis.multiple_of > 1 else ""
        return f"{axis.name} {axis.least} to {axis.most}{multiple}"

    return "(" + ", ".join(str(axis) if isinstance(axis, int) else words(axis) for axis in shape) + ")"
