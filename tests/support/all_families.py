"""The families beside Stable Diffusion, each as a pipeline of diffusers with tiny random parts, and what a request of
it has to have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepfloyd
import kandinsky
import karlo
import other_networks
import picture_readers
import tiny

MAKERS: dict[str, Callable[[], Any]] = {
    "ldm-text": tiny.ldm_text,
    "ldm": lambda: tiny.plain("LDMPipeline"),
    "ldm-super-resolution": lambda: tiny.plain("LDMSuperResolutionPipeline"),
    "ddpm": lambda: tiny.plain("DDPMPipeline"),
    "ddim": lambda: tiny.plain("DDIMPipeline"),
    "consistency": lambda: tiny.plain("ConsistencyModelPipeline"),
    "x2-upscaler": other_networks.latent_upscaler,
    "sd2-unclip-prior": picture_readers.unclip_of_text,
    "kandinsky": kandinsky.decoder,
    "karlo": karlo.karlo,
    "karlo-variation": lambda: karlo.karlo(variation=True),
    "if": deepfloyd.first_stage,
    "if-super-resolution": deepfloyd.super_resolution,
}
"""By the name of their family."""
TEXT_FREE = ("ldm", "ldm-super-resolution", "ddpm", "ddim", "consistency")
ENLARGING = ("ldm-super-resolution", "x2-upscaler", "if-super-resolution")


def save(name: str, root: Path) -> Path:
    """A family's folder, root/name."""
    MAKERS[name]().save_pretrained(root / name)
    return root / name


class Folders:
    """Families' folders, each written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        path = self._root / name
        return path if path.exists() else save(name, self._root)
