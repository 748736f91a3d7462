"""The seam between a pipeline and what runs its networks.

    TextEncoder, Denoiser, Autoencoder    what a pipeline asks of them: PyTorch's modules, or a bundle's networks
    Engine                                what those ask of a backend: tensors by name in, tensors by name out

The only place in the runtime that knows of `fastldm.export`, and it imports what it needs of that when it needs it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastldm import openmp
from fastldm.errors import EngineError, InputError
from fastldm.reading import check_path

if TYPE_CHECKING:
    from fastldm.export.bundle import Bundle
    from fastldm.export.networks import Source
    from fastldm.export.spec import Axis, NetworkSpec
    from fastldm.loading import spec as loading
    from fastldm.models.config import TextConfig, TinyVAEConfig, UNetConfig, VAEConfig
    from fastldm.models.unet import AddedConditions
    from fastldm.models.vae import Layer


class TextEncoder(Protocol):
    """See models.clip.CLIPText."""

    @property
    def config(self) -> TextConfig: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, input_ids: Tensor, skip: int = 0, final_norm: bool = True) -> tuple[Tensor, Tensor | None]: ...


class Denoiser(Protocol):
    """See models.unet.UNet."""

    @property
    def config(self) -> UNetConfig: ...

    def time_rows(
        self, timesteps: Tensor, *, added: AddedConditions | None = None, guidance: Tensor | None = None
    ) -> Tensor: ...

    def cross_kv(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]: ...

    def step(
        self, u: Tensor, temb_row: Tensor, cross_kv: Sequence[Tensor], *, kv_len: Tensor | None = None
    ) -> Tensor: ...


class Autoencoder(Protocol):
    """See models.vae.AutoencoderKL."""

    @property
    def config(self) -> VAEConfig | TinyVAEConfig: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def decoding(self) -> list[Layer]: ...


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


# backend -> the extra that brings its packages
BACKENDS = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}
MANIFEST = "manifest.json"
"""What a folder that is a bundle has, and no other model."""


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `fastldm export` wrote. InputError for what can be no path."""
    return (check_path(path, "path_or_id") / MANIFEST).is_file()


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """What a bundle says of itself; its files have not been compared with their hashes. BundleError where it says
    nothing that can be read."""
    from fastldm.export.bundle import Bundle

    return Bundle.read(Path(path).expanduser())


def describe(path: str | os.PathLike[str]) -> loading.Spec:
    """What a bundle is a bundle of."""
    return read_bundle(path).model


def source(path: str | os.PathLike[str]) -> Source:
    """The model that a bundle was made of, for PyTorch. BundleError where it is not here any more, or has changed."""
    from fastldm.export import networks

    return networks.source(read_bundle(path))


def choose_device(backend: str, device: str | torch.device | None) -> str | torch.device | None:
    """Where a backend runs if nothing else is asked for: OpenVINO on the CPU, also where there is a GPU."""
    return "cpu" if device is None and backend == "openvino" else device


def choose(
    backend: str, path: str | os.PathLike[str], device: torch.device, dtype: str | torch.dtype | None = None
) -> str:
    """What runs the model at a path: the backend that was asked for, or for "auto" PyTorch, if it is no bundle.

    Of a bundle, "auto" takes what makes a picture soonest, loading included, as `fastldm verify` measured on this
    machine; where it did not, the first that is installed of OpenVINO and ONNX Runtime, on a GPU of TensorRT, if
    engines were built ahead, and ONNX Runtime. Of those, only what computes in `dtype`. Nothing is exported, built or
    measured here.

    Raises InputError for a backend there is not and for one that runs bundles where this is none, EngineError where
    none is installed.
    """
    if backend not in ("auto", "torch", *BACKENDS):
        raise InputError(f"backend is {backend!r}: expected auto, torch, {', '.join(BACKENDS)}")
    if not is_bundle(path):
        if backend in BACKENDS:
            raise InputError(f"{backend} runs bundles, and {path} is none: `fastldm export -m {path} OUT` makes one")
        return "torch"
    if backend != "auto":
        return backend
    from fastldm.export import auto

    return auto.choose(read_bundle(path), device, dtype)


def latents(path: str | os.PathLike[str]) -> list[tuple[Axis, Axis]]:
    """The heights and widths of latents that a bundle runs with, each range of them."""
    from fastldm.export import networks

    return networks.latents(read_bundle(path))


def precisions(
    path: str | os.PathLike[str], backend: str, device: torch.device, dtype: str | torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """What a bundle was exported in, and what a backend would compute it in."""
    from fastldm.export import networks

    bundle = read_bundle(path)
    computed = networks.precision(bundle, backend, device, dtype)
    return getattr(torch, bundle.manifest["dtype"]), getattr(torch, computed)


def load(
    path: str | os.PathLike[str], backend: str, device: torch.device, dtype: str | torch.dtype | None
) -> tuple[loading.Spec, loading.Networks, str]:
    """What a bundle is of, its networks on a backend, and its name. dtype: to compute in, the best where it is None.

    Raises BundleError for a file that is not what was written, before anything is run.
    """
    from fastldm.export import networks
    from fastldm.export.bundle import Bundle

    bundle = Bundle.open(Path(path).expanduser())
    return bundle.model, networks.load(bundle, backend, device, dtype), bundle.manifest["model"]


def need_exporter() -> None:
    """EngineError where the packages that exporting needs are not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise EngineError(f"{', '.join(missing)} is not installed: pip install 'fastldm[onnx]'")


def export(model: loading.Spec, modules: Mapping[str, Any], out: Path, **options: Any) -> Path:
    """Write a model in memory as a bundle, see `Pipeline.export`. modules: its networks by their components' names.

    Raises EngineError where the packages that exporting needs are not installed.
    """
    need_exporter()
    from fastldm.export import bundle, writing

    return writing.export(bundle.in_memory(model, modules), out, source=None, **options).folder


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
        raise InputError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(f"fastldm.export.{backend}")
    except ImportError as error:
        raise EngineError(
            f"backend {backend!r} cannot be imported here ({error}): pip install 'fastldm[{BACKENDS[backend]}]'"
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


def check_size(latents: Sequence[tuple[Axis, Axis]], factor: int, width: int, height: int) -> None:
    """InputError for pictures of a size that none of these ranges has. latents: heights and widths. factor: pixels a
    latent."""

    def words(tall: Axis, wide: Axis) -> str:
        least, most = (f"{w * factor}x{h * factor}" for w, h in ((wide.least, tall.least), (wide.most, tall.most)))
        return least if least == most else f"{least} to {most} in steps of {tall.multiple_of * factor}"

    near = [
        [nearest(axis, n // factor) * factor for axis, n in zip(one, (height, width), strict=True)] for one in latents
    ]
    if [height, width] not in near:
        h, w = min(near, key=lambda one: abs(one[0] - height) + abs(one[1] - width))
        runs = " or ".join(words(*one) for one in latents)
        raise InputError(f"the size is {width}x{height}: this bundle runs {runs}, of which {w}x{h} is nearest")


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
