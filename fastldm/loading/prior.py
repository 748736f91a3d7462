"""Loading Kandinsky 2.2's prior: a pipeline of its own, without a U-Net and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastldm.conditioning.prior import TextPrior
from fastldm.conditioning.text import TextStage
from fastldm.errors import CheckpointError
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.formats import PREPROCESSOR
from fastldm.loading.image_encoder import preprocessing_of
from fastldm.loading.spec import PriorSpec
from fastldm.models.clip import CLIPText
from fastldm.models.clip_vision import CLIPVision, VisionConfig
from fastldm.models.config import TextConfig
from fastldm.models.families import IMAGE_ENCODER, KANDINSKY_PRIOR_PIPELINE, PRIOR
from fastldm.models.prior import Prior, PriorConfig
from fastldm.samplers.scheduler_config import read_scheduler


def spec_of_prior(checkpoint: Checkpoint) -> PriorSpec:
    """Its configs. CheckpointError for another pipeline, for what is not implemented, and for parts that do not fit."""
    named, source = checkpoint.index.get("_class_name"), checkpoint.source
    if named != KANDINSKY_PRIOR_PIPELINE:
        raise CheckpointError(f"{source} is a {named}, expected a {KANDINSKY_PRIOR_PIPELINE}")
    readers: dict[str, Any] = {PRIOR: PriorConfig, "text_encoder": TextConfig, IMAGE_ENCODER: VisionConfig}
    model, text, vision = (
        kind.from_dict(checkpoint.components[name].config, checkpoint.config_source(name))
        for name, kind in readers.items()
    )
    schedule = read_scheduler(checkpoint.scheduler, None, checkpoint.config_source("scheduler"))
    fits = model.text_dim == text.hidden == model.out_dim == vision.projection_dim
    if not fits or model.vector_dim != text.projection_dim or model.tokens != text.max_position:
        raise CheckpointError(
            f"{source}: the prior reads {model.tokens} tokens of {model.text_dim} channels and a vector of "
            f"{model.vector_dim}, and makes one of {model.out_dim}; text_encoder makes {text.max_position} of "
            f"{text.hidden}, and a vector of {text.projection_dim}; image_encoder one of {vision.projection_dim}: its "
            "components are not of one model"
        )
    return PriorSpec(model, text, schedule, vision)


def load_prior(checkpoint: Checkpoint, fill: Callable[[torch.nn.Module, str], Any]) -> TextPrior:
    """The prior with its text encoder and image encoder. fill(module on meta, component name) returns the module with
    its weights. CheckpointError as of `spec_of_prior`."""
    spec = spec_of_prior(checkpoint)
    assert spec.vision is not None
    assert spec.text is not None
    with torch.device("meta"):
        networks = {PRIOR: Prior(spec.model), "text_encoder": CLIPText(spec.text)}
        networks[IMAGE_ENCODER] = CLIPVision(spec.vision)
    filled = {name: fill(network, name) for name, network in networks.items()}
    stage = TextStage(checkpoint.tokenizer("tokenizer"), filled["text_encoder"])
    preprocessing = preprocessing_of(spec.vision, checkpoint.preprocessor, f"{checkpoint.source}: {PREPROCESSOR[1]}")
    pictures = {"image_encoder": filled[IMAGE_ENCODER], "preprocessing": preprocessing}
    return TextPrior(stage, filled[PRIOR], spec.schedule, **pictures)
