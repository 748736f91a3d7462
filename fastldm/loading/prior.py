"""Loading Kandinsky 2.2's prior: a pipeline of its own, without a U-Net and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastldm.conditioning.prior import TextPrior
from fastldm.conditioning.text import TextStage
from fastldm.errors import CheckpointError
from fastldm.loading.checkpoint import Checkpoint
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.models.config import TextConfig
from fastldm.models.families import IMAGE_ENCODER, KANDINSKY_PRIOR_PIPELINE, PRIOR
from fastldm.models.prior import Prior, PriorConfig
from fastldm.samplers.scheduler_config import read_scheduler


def load_prior(checkpoint: Checkpoint, fill: Callable[[torch.nn.Module, str], Any]) -> TextPrior:
    """The prior with its text encoder and image encoder. fill(module on meta, component name) returns the module
    with its weights. CheckpointError for another pipeline, for what is not implemented, and for parts that do not fit.
    """
    named, source = checkpoint.index.get("_class_name"), checkpoint.source
    if named != KANDINSKY_PRIOR_PIPELINE:
        raise CheckpointError(f"{source} is a {named}, expected a {KANDINSKY_PRIOR_PIPELINE}")
    readers: dict[str, Any] = {PRIOR: PriorConfig, "text_encoder": TextConfig, IMAGE_ENCODER: VisionConfig}
    configs = {
        name: kind.from_dict(checkpoint.components[name].config, checkpoint.config_source(name))
        for name, kind in readers.items()
    }
    model, text, vision = configs.values()
    schedule = read_scheduler(checkpoint.scheduler, None, checkpoint.config_source("scheduler"))
    fits = model.text_dim == text.hidden == model.out_dim == vision.projection_dim
    if not fits or model.vector_dim != text.projection_dim or model.tokens != text.max_position:
        raise CheckpointError(
            f"{source}: the prior reads {model.tokens} tokens of {model.text_dim} channels and a vector of "
            f"{model.vector_dim}, and makes one of {model.out_dim}; text_encoder makes {text.max_position} of "
            f"{text.hidden}, and a vector of {text.projection_dim}; image_encoder one of {vision.projection_dim}: its "
            "components are not of one model"
        )
    with torch.device("meta"):
        networks = {PRIOR: Prior(model), "text_encoder": CLIPText(text), IMAGE_ENCODER: CLIPVision(vision)}
    filled = {name: fill(network, name) for name, network in networks.items()}
    stage = TextStage(checkpoint.tokenizer("tokenizer"), filled["text_encoder"])
    return TextPrior(stage, filled[PRIOR], schedule, image_encoder=filled[IMAGE_ENCODER])
