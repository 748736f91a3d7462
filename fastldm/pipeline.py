"""A prompt to a picture: five calls, each one function of another module.

    prompt -> Conditioning -> (StepTable, noise) -> latents -> image
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm import config as configs
from fastldm import image as images
from fastldm import schedule, text, weights
from fastldm.denoise import Guidance, denoise, draw_noise
from fastldm.errors import InputError, NonFinite, OutOfMemory
from fastldm.models.clip import CLIPText
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import AutoencoderKL, TinyAutoencoder
from fastldm.request import Request, Result, Timings, picture_seeds

logger = logging.getLogger("fastldm")

DEFAULT_MODEL = Path(__file__).parent / "assets" / "default"
StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]
