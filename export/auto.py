"""The fastest backend for a bundle on this machine, as measured by `fastldm verify`.

Measurements are in fastldm's cache, a small file per bundle and machine: for each backend, and for PyTorch if the model
that the bundle was exported from is available, the seconds to load a pipeline and to generate an image.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from fastldm import openmp
from fastldm.errors import BundleError, EngineError
from fastldm.export.backends import BACKENDS, engines_of, takes_several_steps
from fastldm.export.bundle import Bundle
from fastldm.export.cache import instructions
from fastldm.export.engines import Engines
from fastldm.export.networks import source
from fastldm.system import cache_root, machine

logger = logging.getLogger("fastldm")


@dataclass(frozen=True)
class Measured:
    """Seconds to load a pipeline and to generate an image with the model's default size and number of steps."""

    start_up: float  # to load a pipeline, with engines from the cache
    picture: float
    precision: str

    def total(self, pictures: int = 1) -> float:
        """Seconds to load a pipeline and to generate so many images."""
        return self.start_up + pictures * self.picture


def choose(bundle: Bundle, device: torch.device, dtype: str | torch.dtype | None = None) -> str:
    """The backend for a bundle, see `fastldm.model.choose_backend`."""

    taken = fastest(bundle, device, dtype)
    if taken == "torch" and not _has_source(bundle):
        taken = fastest(bundle, device, dtype, without=("torch",))
    if taken is not None:
        return taken
    for backend in reversed(BACKENDS):
        fits = device.type in BACKENDS[backend].devices and _computes(bundle, backend, dtype)
        if fits and _ready(bundle, backend, device):
            return backend
    raise EngineError(
        f"no backend is ready to run {bundle.folder} on {device}{f' in {_dtype_name(dtype)}' if dtype else ''}: "
        f"expected one of {', '.join(f'{name} (fastldm[{entry.extra}])' for name, entry in BACKENDS.items())}; "
        "--backend NAME says what is missing"
    )


def fastest(
    bundle: Bundle,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    *,
    without: Sequence[str] = (),
    pictures: int = 1,
) -> str | None:
    """What was measured to be fastest for loading a bundle and generating so many images, "torch" included; None where
    nothing was measured that computes in `dtype`."""
    measured = {
        backend: seconds
        for backend, seconds in read(bundle, device).items()
        if backend not in without and _computes(bundle, backend, dtype)
    }
    return min(measured, key=lambda backend: measured[backend].total(pictures), default=None)


def _computes(bundle: Bundle, backend: str, dtype: str | torch.dtype | None) -> bool:
    """Whether a backend can run a bundle in the requested dtype."""
    if takes_several_steps(backend) and not bundle.graphs:
        return False
    any_dtype = backend not in BACKENDS or BACKENDS[backend].any_dtype  # not in: torch
    return dtype is None or any_dtype or _dtype_name(dtype) == bundle.manifest["dtype"]


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ready(bundle: Bundle, backend: str, device: torch.device) -> bool:
    """Whether a backend is installed and needs no build."""
    if not any(importlib.util.find_spec(package) is not None for package in BACKENDS[backend].packages):
        return False
    if engines_of(backend) == "openvino":
        return not bundle.manifest["fused_ops"]  # OpenVINO cannot read functions in ONNX files
    if backend == "tensorrt":
        return {record.key.network for record in Engines(bundle.folder).records()} >= bundle.specs.keys()
    if device.type == "cuda":
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return True


def _has_source(bundle: Bundle) -> bool:
    """Whether the model that the bundle was exported from is available, unchanged. If not, warns once per process."""
    try:
        source(bundle)
    except BundleError as error:
        if str(error) not in _warned:
            _warned.add(str(error))
            logger.warning("PyTorch was fastest here, and is not used: %s", error)
        return False
    return True


_warned: set[str] = set()


def read(bundle: Bundle, device: torch.device) -> dict[str, Measured]:
    """Measurements of a bundle on this machine, made with the installed versions; empty if there are none."""
    try:
        data = json.loads(_path(bundle, device).read_bytes())
        return {
            backend: Measured(**entry["measured"])
            for backend, entry in data.items()
            if entry["versions"] == _versions(backend)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def remember(bundle: Bundle, device: torch.device, measured: dict[str, Measured]) -> None:
    """Store measurements for `choose`."""
    path = _path(bundle, device)
    data = {backend: {"measured": asdict(entry), "versions": _versions(backend)} for backend, entry in measured.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(path)
    except OSError as error:
        logger.warning("measurements cannot be stored in %s (%s)", path.parent, error)


def _path(bundle: Bundle, device: torch.device) -> Path:
    available = device.type == "cpu" or torch.cuda.is_available()
    hardware = machine(device) if available else str(device)
    key = json.dumps([bundle.manifest["sha256"], hardware, openmp.threads(), instructions()])
    return cache_root() / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


@functools.cache
def _versions(backend: str) -> list[str]:
    """Names and installed versions of a backend's packages."""
    names = metadata.packages_distributions()
    packages = ("torch", *(BACKENDS[backend].packages if backend in BACKENDS else ()))
    return sorted(f"{name} {metadata.version(name)}" for package in packages for name in names.get(package, ()))
