"""Which backend makes a picture soonest on this machine: measured by `fastldm verify`, remembered, and never guessed
where it was measured.

One small file for each bundle and machine, in fastldm's cache: of each backend, and of PyTorch where the model that the
bundle was made of is at hand, the seconds until a pipeline is loaded and those of a picture.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import json
import logging
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fastldm import openmp
from fastldm.engine import BACKENDS
from fastldm.errors import BundleError, EngineError
from fastldm.export.bundle import Bundle
from fastldm.export.cache import instructions
from fastldm.export.engines import Engines
from fastldm.export.networks import source
from fastldm.pipeline import Pipeline
from fastldm.planning.doctor import cache_root
from fastldm.planning.timing import machine

logger = logging.getLogger("fastldm")

_PACKAGES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "tensorrt": ("tensorrt_rtx", "tensorrt")}
_PREFERRED = {"cpu": ("openvino", "onnxruntime"), "cuda": ("tensorrt", "onnxruntime")}


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
    """The backend for a bundle, see `fastldm.engine.choose`."""

    def computes(backend: str) -> bool:
        """Whether it can compute in the dtype that was asked for."""
        return dtype is None or backend in ("torch", "openvino") or _named(dtype) == bundle.manifest["dtype"]

    measured = {backend: took for backend, took in read(bundle, device).items() if computes(backend)}
    while measured:
        fastest = min(measured, key=lambda backend: measured[backend].total)
        if fastest != "torch" or _has_source(bundle):
            return fastest
        del measured[fastest]
    for backend in _PREFERRED.get(device.type, ()):
        if computes(backend) and _ready(bundle, backend, device):
            return backend
    raise EngineError(
        f"no backend is ready to run {bundle.folder} on {device}{f' in {_named(dtype)}' if dtype else ''}: "
        f"expected one of {', '.join(f'{one} (fastldm[{extra}])' for one, extra in BACKENDS.items())}; "
        "--backend NAME says what is missing"
    )


def _named(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ready(bundle: Bundle, backend: str, device: torch.device) -> bool:
    """Whether a backend is installed and has nothing to build first."""
    if not any(importlib.util.find_spec(package) is not None for package in _PACKAGES[backend]):
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


def measure(bundle: Bundle, backend: str, device: torch.device, dtype: str | torch.dtype | None = None) -> Measured:
    """Load a pipeline and let it make pictures of two steps; remembered for `choose`."""

    def load() -> Pipeline:
        gc.collect()
        return Pipeline.from_pretrained(bundle.folder, backend=backend, device=device, dtype=dtype)

    load()  # fills the caches that the next is measured with
    began = perf_counter()
    pipe = load()
    start_up = perf_counter() - began
    asked: dict[str, Any] = {"prompt": "a photograph", "num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    if pipe.unet.config.in_channels > pipe.latent_channels:  # made for inpainting
        grey = np.full((64, 64, 3), 0.5, dtype=np.float32)
        asked |= {"image": grey, "mask_image": grey[..., 0], "strength": 1.0}
    for _ in range(2):
        timings = pipe(**asked).timings
    steps = pipe.family.num_inference_steps * median(timings.steps)
    found = Measured(start_up, timings.text + steps + timings.decode, pipe.precision)
    _write(bundle, device, {**read(bundle, device), backend: found})
    return found


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


def _write(bundle: Bundle, device: torch.device, measured: dict[str, Measured]) -> None:
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
    packages = ("torch", *_PACKAGES.get(backend, ()))
    return sorted(f"{name} {metadata.version(name)}" for package in packages for name in names.get(package, ()))
