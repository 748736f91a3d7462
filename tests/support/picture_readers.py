"""diffusers' pipelines that read what a picture shows, with tiny random parts."""

from __future__ import annotations

from typing import Any

import ip_adapters
import tiny
import torch

FAMILIES = ("sd1-variation", "sd2-unclip")


def unet(family: str, **changes: Any) -> Any:
    """The U-Net of one of FAMILIES. changes: of its config."""
    changes = {"layers_per_block": 1, **changes}
    if family == "sd1-variation":
        return tiny.unet("sd1", cross_attention_dim=ip_adapters.PROJECTED, **changes)
    reads = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * ip_adapters.PROJECTED}
    network: Any = tiny.unet("sd2", **reads, **changes)
    # Else its share of the embedding is lost among small random weights.
    network.class_embedding.linear_2.weight.data *= 20
    return network


def variations(**replaced: Any) -> Any:
    """A picture in place of a prompt."""
    diffusers, transformers = tiny.peer("diffusers"), tiny.peer("transformers")
    parts = {
        "vae": tiny.vae("small", sample_size=32),
        "image_encoder": ip_adapters.image_encoder(),
        "unet": unet("sd1-variation"),
        "scheduler": tiny.scheduler("sd1"),
        "safety_checker": None,
        "feature_extractor": transformers.CLIPImageProcessor(size=32, crop_size=32, image_mean=[0.5] * 3),
        "requires_safety_checker": False,
    }
    pipe = diffusers.StableDiffusionImageVariationPipeline(**{**parts, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unclip(**replaced: Any) -> Any:
    """The noised vector of a picture beside a prompt."""
    diffusers, transformers = tiny.peer("diffusers"), tiny.peer("transformers")
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(ip_adapters.PROJECTED)
    generator = torch.Generator().manual_seed(1)
    normalizer.mean.data.normal_(generator=generator)
    normalizer.std.data.uniform_(0.5, 2, generator=generator)
    own = tiny.pipeline("sd2").components
    parts = {
        "feature_extractor": transformers.CLIPImageProcessor(size=32, crop_size=32),
        "image_encoder": ip_adapters.image_encoder(),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "unet": unet("sd2-unclip"),
        **{name: own[name] for name in ("tokenizer", "text_encoder", "scheduler", "vae")},
    }
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(**{**parts, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unclip_of_text(**replaced: Any) -> Any:
    """The noised vector that a prior makes of the prompt, beside it."""
    diffusers, transformers = tiny.peer("diffusers"), tiny.peer("transformers")
    own, width = unclip().components, ip_adapters.PROJECTED
    tokenizer = own["tokenizer"]
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=tiny.VOCABULARY,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prior = tiny.seeded(
        lambda: diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, embedding_dim=width
        )
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in prior.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    names = ("image_normalizer", "image_noising_scheduler", "unet", "tokenizer", "text_encoder", "scheduler", "vae")
    parts = {
        "prior": prior,
        "prior_text_encoder": tiny.seeded(lambda: transformers.CLIPTextModelWithProjection(config)),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            variance_type="fixed_small_log",
            clip_sample=True,
            clip_sample_range=5.0,
        ),
        **{name: own[name] for name in names},
    }
    pipe = diffusers.StableUnCLIPPipeline(**{**parts, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe
