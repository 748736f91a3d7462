"""Which backend makes a picture soonest on this machine: measured by `fastldm verify`, remembered, and never guessed
where it was measured.

One small file for each bundle and machine, in fastldm's cache: of each backend, and of PyTorch where the model that the
bundle was made of is at hand, the seconds until a pipeline is loaded and those of a picture.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from fastldm import openmp
from fastldm.errors import BundleError, EngineError
from fastldm.export.backends import BACKENDS
from fastldm.export.bundle import Bundle
from fastldm.export.cache import instructions
from fastldm.export.engines import Engines
from fastldm.export.networks import source
from fastldm.system import cache_root, machine

logger = logging.getLogger("fastldm")


@dataclass(frozen=True)
class Measured:
    """What a picture of the model's own size and number of steps costs, in seconds."""

    start_up: float  # until a pipeline is loaded, its engines from the cache where there is one
    picture: float
    precision: str

    @property
    def total(self) -> float:
        return self.start_up + self.picture


def choose(bundle: Bundle, device: torch.device, dtype: str | torch.dtype | None = None) -> str:
    """The backend for a bundle, see `fastldm.model.choose_backend`."""

    def computes(backend: str) -> bool:
        """Whether it can compute in the dtype that was asked for."""
        any_dtype = backend not in BACKENDS or BACKENDS[backend].any_dtype  # not in: torch
        return dtype is None or any_dtype or _named(dtype) == bundle.manifest["dtype"]

    measured = {backend: took for backend, took in read(bundle, device).items() if computes(backend)}
    while measured:
        fastest = min(measured, key=lambda backend: measured[backend].total)
        if fastest != "torch" or _has_source(bundle):
            return fastest
        del measured[fastest]
    for backend in reversed(BACKENDS):
        if device.type in BACKENDS[backend].devices and computes(backend) and _ready(bundle, backend, device):
            return backend
    raise EngineError(
        f"no backend is ready to run {bundle.folder} on {device}{f' in {_named(dtype)}' if dtype else ''}: "
        f"expected one of {', '.join(f'{name} (fastldm[{entry.extra}])' for name, entry in BACKENDS.items())}; "
        "--backend NAME says what is missing"
    )


def _named(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ready(bundle: Bundle, backend: str, device: torch.device) -> bool:
    """Whether a backend is installed and has nothing to build first."""
    if not any(importlib.util.find_spec(package) is not None for package in BACKENDS[backend].packages):
        return False
    if backend == "openvino":
        return not bundle.manifest["fused_ops"]  # it cannot read functions in ONNX files
    if backend == "tensorrt":
        return {record.key.network for record in Engines(bundle.folder).records()} >= bundle.specs.keys()
    if device.type == "cuda":
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return True


def _has_source(bundle: Bundle) -> bool:
    """Whether the model that it was made of is here as it was, for PyTorch. Where not, one line a process says so."""
    try:
        source(bundle)
    except BundleError as error:
        if str(error) not in _said:
            _said.add(str(error))
            logger.warning("PyTorch was fastest here, and is not taken: %s", error)
        return False
    return True


_said: set[str] = set()


def read(bundle: Bundle, device: torch.device) -> dict[str, Measured]:
    """What was measured of a bundle here, with the versions that are installed now."""
    try:
        data = json.loads(_path(bundle, device).read_bytes())
        return {
            backend: Measured(**one["measured"])
            for backend, one in data.items()
            if one["versions"] == _versions(backend)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def remember(bundle: Bundle, device: torch.device, measured: dict[str, Measured]) -> None:
    """For `choose`."""
    path = _path(bundle, device)
    data = {backend: {"measured": asdict(one), "versions": _versions(backend)} for backend, one in measured.items()}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(data, indent=1))
        beside.replace(path)
    except OSError as error:
        logger.warning("what was measured cannot be kept in %s (%s)", path.parent, error)


def _path(bundle: Bundle, device: torch.device) -> Path:
    here = device.type == "cpu" or torch.cuda.is_available()
    runs = [machine(device) if here else str(device), openmp.threads(), instructions()]
    about = [bundle.manifest["sha256"], *runs]
    return cache_root() / "measured" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]}.json"


@functools.cache
def _versions(backend: str) -> list[str]:
    """Of the packages that a backend is, as installed here."""
    names = metadata.packages_distributions()
    packages = ("torch", *(BACKENDS[backend].packages if backend in BACKENDS else ()))
    return sorted(f"{name} {metadata.version(name)}" for package in packages for name in names.get(package, ()))
