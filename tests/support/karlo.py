"""Karlo's two pipelines of diffusers, with tiny random parts."""

from __future__ import annotations

from typing import Any

import ip_adapters
import other_networks
import picture_readers
import tiny
import torch

SMALL, LARGE = 8, 16  # pixels a side, of the decoder and of super-resolution
PRIOR = {"prediction_type": "sample", "variance_type": "fixed_small_log", "clip_sample": True, "clip_sample_range": 5.0}
DECODER = {"variance_type": "learned_range"}


def exact(pipe: Any) -> Any:
    """A pipeline whose schedulers, of which the last step is a ratio of float32's last bits, count in float64. It is
    adopted before, for then they differ from their configs."""
    for scheduler in (part for name, part in pipe.components.items() if name.endswith("scheduler")):
        bar = scheduler.alphas_cumprod.double()
        scheduler.alphas_cumprod, scheduler.alphas = bar, bar / torch.cat((torch.ones(1), bar[:-1]))
        scheduler.betas = 1 - scheduler.alphas
    return pipe


def karlo(variation: bool = False, **replaced: Any) -> Any:
    """diffusers' UnCLIPPipeline, or UnCLIPImageVariationPipeline."""
    diffusers, transformers = tiny.peer("diffusers"), tiny.peer("transformers")
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    own, width = picture_readers.unclip_of_text().components, ip_adapters.PROJECTED
    schedule = diffusers.UnCLIPScheduler
    projection = tiny.seeded(
        lambda: UnCLIPTextProjModel(
            clip_extra_context_tokens=3, clip_embeddings_dim=width, time_embed_dim=64, cross_attention_dim=32
        )
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in projection.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    parts = {
        "decoder": other_networks.network("karlo-decoder", sample_size=SMALL),
        "text_encoder": own["prior_text_encoder"],
        "tokenizer": own["prior_tokenizer"],
        "text_proj": projection,
        "super_res_first": other_networks.network("karlo-super-resolution", sample_size=LARGE),
        "super_res_last": other_networks.network("karlo-super-resolution", sample_size=LARGE, layers_per_block=1),
        "decoder_scheduler": schedule(**DECODER),
        "super_res_scheduler": schedule(),
    }
    if variation:
        parts["image_encoder"] = ip_adapters.image_encoder()
        parts["feature_extractor"] = transformers.CLIPImageProcessor(size=32, crop_size=32)
    else:
        parts |= {"prior": own["prior"], "prior_scheduler": schedule(**PRIOR)}
    kind = diffusers.UnCLIPImageVariationPipeline if variation else diffusers.UnCLIPPipeline
    pipe = kind(**{**parts, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe
