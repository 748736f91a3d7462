"""This machine, and locations of files on it. Imports torch only in functions that need it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parent / "assets"
LOOK = ASSETS / "look"
"""What both pages have in common: the server's, and that of an export for the web."""
"""Files of the package: the default model, CLIP's byte pairs."""
CHECKOUT = ASSETS.parent.parent
"""The folder that fastldm is imported from: a checkout, or site-packages."""


def cache_root() -> Path:
    """The cache folder: `FASTLDM_CACHE`, or by default the platform's."""
    folder = os.environ.get("FASTLDM_CACHE")
    if folder:
        return Path(folder).expanduser()
    try:
        import platformdirs
    except ModuleNotFoundError:  # a container with torch but few other packages: as platformdirs on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastldm"
    return platformdirs.user_cache_path("fastldm")


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software on which something was measured."""
    import torch

    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "sm": f"{properties.major}{properties.minor}", **versions}
    name, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"name": name, "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), **versions}
