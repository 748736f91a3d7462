"""Adopted pipelines against the diffusers pipelines that they share weights with."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny
import torch
from torch import nn

from fastldm import Pipeline


def small_pipeline() -> Any:
    """A diffusers pipeline of the smallest networks, for which no progress bar is drawn."""
    smaller = {"unet": tiny.unet("small", sample_size=8), "vae": tiny.vae("small", sample_size=32)}
    pipe: Any = tiny.pipeline("sd1", **smaller)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, prompt: str = "a wall") -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images)


def same_image(pipe: Any, prompt: str = "a wall") -> bool:
    adopted = Pipeline.from_diffusers(pipe)
    return bool(np.abs(image(adopted, prompt) - image(pipe, prompt)).max() < 1e-4)


def dropout_in_eval(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
