"""LoRA files of tiny pipelines, written by peft and diffusers, and the pictures that diffusers makes with them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from fastldm import Pipeline

UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ALL = (*UNET, "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv", "time_emb_proj", "linear_1", "linear_2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}


def write(path: Path, family: Any, *, seed: int = 0, rank: int = 4, unet: Any = UNET, text: Any = TEXT) -> Path:
    """A file as diffusers saves it, of a U-Net's and the text encoders' modules with these ends; () is none. family: or
    a pipeline of diffusers, which keeps the adapter."""
    pipe, peft = tiny.pipeline(family) if isinstance(family, str) else family, tiny.peer("peft")
    layers: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("unet", *TEXT_ENCODERS):
            network, targets = getattr(pipe, name, None), list(unet if name == "unet" else text)
            if network is None or not targets:
                continue
            config = peft.LoraConfig(r=rank, lora_alpha=rank * 0.75, init_lora_weights=False, target_modules=targets)
            network.add_adapter(config)
            layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
    type(pipe).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


@functools.cache
def theirs(family: str) -> Any:
    """A diffusers pipeline to load adapters into; `Judge` takes them out again."""
    pipe = tiny.pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def ours(family: str) -> Pipeline:
    """A pipeline of the same weights, not shared."""
    return Pipeline.from_diffusers(tiny.pipeline(family))


def picture(pipe: Any, prompt: str = "a cat", seed: int = 0, **options: Any) -> Any:
    """Of a pipeline of either kind: (H, W, 3) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    images = pipe(prompt, generator=generator, **{**OPTIONS, **options}).images
    return np.asarray(images[0])
