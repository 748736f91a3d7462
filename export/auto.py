"""Which backend makes a picture soonest on this machine: measured by `fastldm verify`, remembered, and never guessed
where it was measured.

One small file for each bundle and machine, in fastldm's cache: of each backend, and of PyTorch where the model that the
bundle was made of is at hand, the seconds until a pipeline is loaded and those of a picture.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from fastldm.doctor import cache_root
from fastldm.engine import BACKENDS
from fastldm.errors import BundleError, EngineError
from fastldm.export.bundle import Bundle
from fastldm.export.networks import source
from fastldm.pipeline import Pipeline

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


def choose(bundle: Bundle, device: torch.device) -> str:
    """The backend for a bundle, see `fastldm.engine.choose`."""
    measured = read(bundle, device)
    if not has_source(bundle):
        measured.pop("torch", None)
    if measured:
        return min(measured, key=lambda backend: measured[backend].total)
    preferred = _PREFERRED.get(device.type, ())
    for backend in preferred:
        if backend == "openvino" and bundle.manifest["fused_ops"]:
            continue  # it cannot read functions in ONNX files
        if any(importlib.util.find_spec(package) is not None for package in _PACKAGES[backend]):
            return backend
    raise EngineError(
        f"no backend that runs bundles on {device} is installed: pip install 'fastldm[{BACKENDS[preferred[0]]}]'"
        if preferred
        else f"no backend runs bundles on {device}: expected cpu or cuda"
    )


def has_source(bundle: Bundle) -> bool:
    """Whether the model that it was made of is here, for PyTorch."""
    try:
        source(bundle)
    except BundleError:
        return False
    return True


def measure(bundle: Bundle, backend: str, device: torch.device) -> Measured:
    """Load a pipeline and let it make pictures of two steps; remembered for `choose`."""
    for _ in range(2):  # the first fills the caches that the second is measured with
        gc.collect()
        began = perf_counter()
        pipe = Pipeline.from_pretrained(bundle.folder, backend=backend, device=device)
        start_up = perf_counter() - began
    for _ in range(2):
        timings = pipe("a photograph", num_inference_steps=2, seed=0, output_type="pt").timings
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
    except (OSError, ValueError, KeyError, TypeError):
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
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    about = [bundle.manifest["sha256"], device.type, machine, torch.get_num_threads()]
    return cache_root() / "measured" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]}.json"


def _versions(backend: str) -> list[str]:
    """Of the packages that a backend is, as installed here."""
    found = []
    for package in ("torch", *_PACKAGES.get(backend, ())):
        for name in metadata.packages_distributions().get(package, ()):
            found.append(f"{name} {metadata.version(name)}")
    return sorted(found)
