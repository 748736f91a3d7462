"""This machine, and where files lie on it. Imports torch only where it is asked for."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parent / "assets"
"""What the package brings: the default model, CLIP's byte pairs."""
CHECKOUT = ASSETS.parent.parent
"""Where fastldm is imported from: a checkout, or site-packages."""


def cache_root() -> Path:
    """Where fastldm keeps what it can make again: `FASTLDM_CACHE`, else the platform's cache folder for it."""
    chosen = os.environ.get("FASTLDM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        import platformdirs
    except ModuleNotFoundError:  # a container that was given torch and not all else: what platformdirs says on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastldm"
    return platformdirs.user_cache_path("fastldm")


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "sm": f"{properties.major}{properties.minor}", **found}
    name, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"name": name, "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), **found}
