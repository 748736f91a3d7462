"""A prompt to a picture. The body of `Pipeline.__call__` is the whole way through the house:

    prompt -> Conditioning -> (StepTable, noise) -> latents -> image
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastldm import image as images
from fastldm import schedule, text, weights
from fastldm.config import Family, TextConfig, TinyVAEConfig, UNetConfig, VAEConfig, recognise
from fastldm.denoise import Guidance, denoise, draw_noise
from fastldm.errors import CheckpointError, InputError, NonFinite, OutOfMemory
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder, rescale_for_half
from fastldm.request import Request, Result, Timings, picture_seeds

logger = logging.getLogger("fastldm")

DEFAULT_MODEL = Path(__file__).parent / "assets" / "default"
StepCallback = Callable[["Pipeline", int, float, "dict[str, Any]"], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Spec:
    """What a model is, known before any of its weights are read."""

    checkpoint: weights.Checkpoint
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    text: tuple[TextConfig, ...]
    family: Family

    @property
    def parameters(self) -> int:
        """Numbers in all networks together."""
        with torch.device("meta"):
            networks: list[torch.nn.Module] = [UNet(self.unet), _autoencoder(self.vae), *map(CLIPText, self.text)]
        return sum(p.numel() for network in networks for p in network.parameters())


def describe(
    path_or_id: str | os.PathLike[str] = "default",
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Spec:
    """What a diffusers folder, a hub id, a single-file checkpoint or "default" holds. Reads no weights.

    Raises CheckpointError for anything that is not a model that fastldm can run, naming what it is instead.
    """
    given = DEFAULT_MODEL if str(path_or_id) == "default" else path_or_id
    checkpoint = weights.open_checkpoint(
        given,
        variant=variant,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    return spec_of(checkpoint)


def spec_of(checkpoint: weights.Checkpoint) -> Spec:
    """The networks' descriptions from a checkpoint's raw config files."""
    parts = checkpoint.components
    vae = TinyVAEConfig if parts["vae"].config.get("_class_name") == "AutoencoderTiny" else VAEConfig
    unet = UNetConfig.from_dict(parts["unet"].config, f"{checkpoint.source}: unet")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    return Spec(
        checkpoint,
        unet,
        vae.from_dict(parts["vae"].config, f"{checkpoint.source}: vae"),
        tuple(TextConfig.from_dict(parts[name].config, f"{checkpoint.source}: {name}") for name in encoders),
        recognise(unet, checkpoint.scheduler),
    )
