"""fastldm runs trained latent diffusion models (CLIP text encoder, U-Net, VAE) as fast as the hardware allows.

    import fastldm
    image = fastldm.Pipeline.default()("a red apple").images[0]

Importing this module loads nothing heavy: the public names below are found in their modules on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastldm import openmp
from fastldm.errors import (
    BundleError,
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    EngineError,
    FastLDMError,
    InputError,
    NonFinite,
    OutOfMemory,
    QueueFull,
    WorkerLost,
)
from fastldm.version import __version__

if TYPE_CHECKING:
    from fastldm.gradients import ClassifierGuidance, CLIPGuidance
    from fastldm.image import read_parameters
    from fastldm.pipeline import Pipeline
    from fastldm.priors import KandinskyPrior
    from fastldm.request import Request, Result
    from fastldm.serving.generation import Generation, Progress
    from fastldm.serving.session import Session

openmp.bound_spin()  # before torch is loaded, whose runtime reads it once

__all__ = [
    "BundleError",
    "CLIPGuidance",
    "Cancelled",
    "CheckpointError",
    "ClassifierGuidance",
    "DeadlineExceeded",
    "EngineError",
    "FastLDMError",
    "Generation",
    "InputError",
    "KandinskyPrior",
    "NonFinite",
    "OutOfMemory",
    "Pipeline",
    "Progress",
    "QueueFull",
    "Request",
    "Result",
    "Session",
    "WorkerLost",
    "__version__",
    "read_parameters",
]

_LAZY = {
    "CLIPGuidance": "gradients",
    "ClassifierGuidance": "gradients",
    "Generation": "serving.generation",
    "KandinskyPrior": "priors",
    "Pipeline": "pipeline",
    "Progress": "serving.generation",
    "Request": "request",
    "Result": "request",
    "Session": "serving.session",
    "read_parameters": "image",
}

# In a checkout `kernels` and `export` lie beside this package, not in it (pyproject.toml maps them in for a wheel).
# Without this line a bare checkout would not find `fastldm.kernels`, nor would an installed wheel once a checkout is
# the working folder and shadows it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fastldm.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'fastldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
