"""Kandinsky 2.2's two pipelines of diffusers, with tiny random parts."""

from __future__ import annotations

from typing import Any

import ip_adapters
import other_networks
import picture_readers
import tiny

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
PUBLISHED = {  # of kandinsky-community/kandinsky-2-2-decoder
    **SCHEDULE,
    "clip_sample": False,
    "thresholding": True,
    "sample_max_value": 2.0,
    "variance_type": "learned_range",
}
KARLO = {  # the prior's: prediction of the sample, clamped to 5
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 5.0,
}


def movq_blocks(*channels: int) -> dict[str, Any]:
    """The config of a MoVQ, which as the published one attends at the latents' resolution."""
    kinds = [["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)]
    kinds[0][-1], kinds[1][0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    return {
        "norm_type": "spatial",
        "block_out_channels": channels,
        "down_block_types": kinds[0],
        "up_block_types": kinds[1],
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "norm_num_groups": 8,
    }


def decoder(scheduler: Any = None, movq: Any = None, **changes: Any) -> Any:
    """diffusers' KandinskyV22Pipeline. changes: of its U-Net's config."""
    diffusers = tiny.peer("diffusers")
    movq = movq or tiny.vq(**movq_blocks(32, 32, 64))
    unet = other_networks.network("kandinsky", **changes)
    return _quiet(diffusers.KandinskyV22Pipeline(unet, scheduler or diffusers.DDPMScheduler(**PUBLISHED), movq))


def prior() -> Any:
    """diffusers' KandinskyV22PriorPipeline, of vectors of ip_adapters.PROJECTED channels."""
    diffusers, transformers = tiny.peer("diffusers"), tiny.peer("transformers")
    own = picture_readers.unclip_of_text().components
    return _quiet(
        diffusers.KandinskyV22PriorPipeline(
            prior=own["prior"],
            image_encoder=ip_adapters.image_encoder(),
            text_encoder=own["prior_text_encoder"],
            tokenizer=own["prior_tokenizer"],
            scheduler=diffusers.UnCLIPScheduler(**KARLO),
            image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        )
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def combined(prior: Any, kind: str = "", **changes: Any) -> Any:
    """A decoder that reads what a prior makes, and that, as one pipeline. kind: of the classes' names."""
    parts = decoder(encoder_hid_dim=ip_adapters.PROJECTED, **changes).components
    own = {f"prior_{name}": part for name, part in prior.components.items()}
    return _quiet(getattr(tiny.peer("diffusers"), f"KandinskyV22{kind}CombinedPipeline")(**parts, **own))
