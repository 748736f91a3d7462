"""Tiny seeded models of every family, as diffusers and transformers build them. No network connection is needed.

tiny.unet("sdxl")                    a diffusers U-Net, of any name in UNETS
tiny.vae(), .vq(), .tiny_vae()       its autoencoders
tiny.text_encoder("bigg")            a transformers text encoder
tiny.pipeline("sd2-v")               a diffusers pipeline, of any name in FAMILIES
tiny.save_pipeline("sd1", folder)    the same as a folder on disk
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from torch import nn

from fastldm.conditioning.tokenizer import clip_vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
    from transformers import BertTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

M = TypeVar("M", bound=nn.Module)
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VOCABULARY = 1000  # tokens: all bytes, 486 merges, and the two special ones


def peer(package: str) -> Any:
    """A package to compare with, imported when a test first needs it; the test is skipped where it is missing."""
    reason = f"{package}, which this is compared with, is not installed"
    return pytest.importorskip(package, reason=reason, exc_type=ImportError)


# ---------------------------------------------------------------------------------------------------------- U-Net

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

_SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
    "attention_head_dim": 4,  # heads, in truth
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
_SD2 = {**_SD1, "attention_head_dim": (1, 2, 3, 3), "use_linear_projection": True, "upcast_attention": True}
_SDXL: dict[str, Any] = {
    **_SD1,
    "block_out_channels": (16, 32, 48),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 32 + 40,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": _SD1,
    "sd1-inpaint": {**_SD1, "in_channels": 9},
    "sd1-edit": {**_SD1, "in_channels": 8},
    "sd2": _SD2,
    "sd2-v": _SD2,
    "sd-turbo": _SD2,
    "lcm": {**_SD1, "time_cond_proj_dim": 24},
    "sdxl": _SDXL,
    "sdxl-edit": {**_SDXL, "in_channels": 8},
    # Reads the second text encoder alone, and a score in place of the target size; no transformer on its last level.
    "sdxl-refiner": {
        **_SDXL,
        "block_out_channels": (16, 32, 48, 48),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (2, 4, 6, 6),
        "cross_attention_dim": 40,
        "projection_class_embeddings_input_dim": 24 + 5 * 8,
    },
    "sdxl-turbo": _SDXL,
    "sdxl-lightning": _SDXL,
    "sdxl-lcm": {**_SDXL, "time_cond_proj_dim": 24},
    # BK-SDM small: one layer a block, nothing in the middle.
    "bk-sdm": {**_SD1, "layers_per_block": 1, "mid_block_type": None},
    # BK-SDM tiny and Segmind's tiny-sd: a level less, too, with cross-attention on the last.
    "tiny-sd": {
        **_SD1,
        "block_out_channels": (16, 32, 48),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP),
        "layers_per_block": 1,
        "mid_block_type": None,
    },
    # Segmind's SSD-1B: a resnet alone in the middle, transformers of another depth after every resnet.
    "ssd-1b": {
        **_SDXL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, (2, 2), (1, 2)),
        "reverse_transformer_layers_per_block": ((2, 1, 3), (2, 1, 1), 1),
    },
    # Like the model that ships with fastldm: cross-attention on every level, half the stride.
    "small": {
        **_SD1,
        "sample_size": 16,
        "block_out_channels": (16, 32, 48),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP),
        "layers_per_block": 1,
    },
    # The x4 upscaler: noise levels as classes, and levels whose transformers read the text twice.
    "x4-upscaler": {
        **_SD2,
        "sample_size": 16,
        "in_channels": 7,
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP, UP),
        "attention_head_dim": 4,
        "num_class_embeds": 1000,
        "only_cross_attention": (True, True, True, False),
    },
    "sd2-depth": {**_SD2, "in_channels": 5},
    # What the configuration allows beyond the families: each level its own.
    "uneven": {
        **_SD2,
        "block_out_channels": (16, 32, 48),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "layers_per_block": (1, 3, 2),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": (2, 4, 3),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "time_embedding_dim": 40,
        "out_channels": 6,
    },
}


def seeded(make: Callable[[], M], seed: int = 0) -> M:
    """Build a module from a seed for inference, with norms and biases off one and zero, so that none is lost unseen."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = make()
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


def unet(family: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    return seeded(lambda: peer("diffusers").UNet2DConditionModel(**{**UNETS[family], **changes}), seed)


# ----------------------------------------------------------------------------------------------------- autoencoders


_SCALING = {"sdxl": 0.13025, "x4": 0.08333}


def vae(family: str = "sd1", seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A KL autoencoder of factor 8 (4 for "small" and the x4 upscaler): pictures of 64 x 64 for every family at its
    sample_size."""
    channels = (8, 16, 24) if family in ("small", "x4-upscaler") else (8, 16, 24, 24)
    config: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 1,
        "mid_block_add_attention": family != "small",
        "norm_num_groups": 4,
        "scaling_factor": _SCALING.get(family.split("-")[0], 0.18215),
        "force_upcast": family.startswith("sdxl"),
    }
    return seeded(lambda: peer("diffusers").AutoencoderKL(**{**config, **changes}), seed)


def vq(seed: int = 0, **changes: Any) -> VQModel:
    """VQ-GAN's autoencoder of factor 4, whose codes are as far apart as latents are."""
    config = {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "num_vq_embeddings": 40,
    }
    model = seeded(lambda: peer("diffusers").VQModel(**{**config, **changes}), seed)
    model.quantize.embedding.weight.data *= model.config.num_vq_embeddings
    return model


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderTiny:
    """TAESD of factor 8."""
    config = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    return seeded(lambda: peer("diffusers").AutoencoderTiny(**{**config, **changes}), seed)


# ------------------------------------------------------------------------------------------------------------ text

_TEXT: dict[str, dict[str, Any]] = {
    # OpenAI's ViT-L/14 (SD1, SDXL's first); its configs say eos_token_id = 2
    "l": {"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "quick_gelu", "eos_token_id": 2},
    # OpenCLIP's H/14 (SD2), one layer short as there
    "h": {"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "gelu", "num_hidden_layers": 2},
    # OpenCLIP's bigG/14 (SDXL's second), projected to another width than its own
    "bigg": {"hidden_size": 40, "num_attention_heads": 5, "hidden_act": "gelu", "projection_dim": 24},
}


def text_encoder(kind: str, seed: int = 0, **changes: Any) -> CLIPTextModel | CLIPTextModelWithProjection:
    """ "l", "h" or "bigg"; the last with projection."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 3,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        **_TEXT[kind],
        **changes,
    }
    config.setdefault("intermediate_size", 3 * config["hidden_size"])
    clip = peer("transformers")
    make = clip.CLIPTextModelWithProjection if kind == "bigg" else clip.CLIPTextModel
    return seeded(lambda: make(clip.CLIPTextConfig(**config)), seed)


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of 1,000. SD2 and SDXL's second encoder pad with "!"."""
    vocab, merges = clip_vocabulary(VOCABULARY)
    return peer("transformers").CLIPTokenizer(vocab, merges, pad_token=pad, model_max_length=77)


BERT_WORDS = ("a", "photo", "of", "cat", "dog", "squirrel", "##s", "##ing", "eat", "un", "##believable", "'", ".", "!")


def bert_vocabulary() -> dict[str, int]:
    """Special tokens where BERT has them relative to each other, letters, alone and inside words, and some words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return {token: k for k, token in enumerate(dict.fromkeys([*tokens, *BERT_WORDS]))}


def bert_tokenizer(**options: Any) -> BertTokenizer:
    return peer("transformers").BertTokenizer(bert_vocabulary(), **options)


def ldm_bert(seed: int = 0, **changes: Any) -> Any:
    """The text encoder of latent diffusion's text to image: heads of another width than the layers' together."""
    peer("diffusers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = {
        "vocab_size": len(bert_vocabulary()),
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 3,
        "head_dim": 8,
    }
    model = seeded(lambda: LDMBertModel(LDMBertConfig(**{**config, **changes})), seed)
    for embedding in (model.model.embed_tokens, model.model.embed_positions):
        embedding.weight.data *= 20  # else a text is lost beside the biases
    return model


def ldm_text(seed: int = 0, **replaced: Any) -> DiffusionPipeline:
    """Latent diffusion's text to image, whose latents are codes' neighbours."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    components = {
        "vqvae": vq(seed + 1, block_out_channels=(8, 16, 24, 24), latent_channels=4, **levels),
        "bert": ldm_bert(seed + 2),
        "tokenizer": bert_tokenizer(),
        "unet": unet("sd1", seed),
        "scheduler": peer("diffusers").DDIMScheduler(**{**_BETAS, "clip_sample": False, "set_alpha_to_one": False}),
    }
    pipe = peer("diffusers").LDMTextToImagePipeline(**{**components, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """A U-Net that reads no text, of pixels or of codes' latents."""
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return seeded(lambda: peer("diffusers").UNet2DModel(**{**config, **changes}), seed)


# Parts beside the U-Net: of each class of pipelines without a prompt its scheduler, and changes of its U-Net.
_CODES_DDIM = ("DDIMScheduler", {**_BETAS, "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False})
PLAIN: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "DDPMPipeline": (("DDPMScheduler", {}), {}),
    "DDIMPipeline": (("DDIMScheduler", {}), {}),
    "ConsistencyModelPipeline": (("CMStochasticIterativeScheduler", {}), {"num_class_embeds": 10}),
    "LDMPipeline": (_CODES_DDIM, {}),
    "LDMSuperResolutionPipeline": (_CODES_DDIM, {"in_channels": 6, "out_channels": 3, "sample_size": 32}),
}


def plain(name: str, seed: int = 0, **replaced: Any) -> DiffusionPipeline:
    """A pipeline of diffusers without a prompt, by its class in PLAIN."""
    (scheduler_name, options), changes = PLAIN[name]
    components: dict[str, Any] = {
        "unet": plain_unet(seed, **changes),
        "scheduler": getattr(peer("diffusers"), scheduler_name)(**options),
        **({"vqvae": vq(seed + 1)} if name.startswith("LDM") else {}),
    }
    pipe = getattr(peer("diffusers"), name)(**{**components, **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def depth_estimator(seed: int = 0) -> dict[str, Any]:
    """A network that estimates the depth of pictures, and what prepares those for it."""
    dpt = peer("transformers")
    config = dpt.DPTConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        is_hybrid=False,
        image_size=32,
        patch_size=16,
    )
    estimator = seeded(lambda: dpt.DPTForDepthEstimation(config), seed)
    size = {"height": 32, "width": 32}
    return {"depth_estimator": estimator, "feature_extractor": dpt.DPTImageProcessor(size=size)}


# ------------------------------------------------------------------------------------------------- whole pipelines

_PNDM = ("PNDMScheduler", {**_BETAS, "skip_prk_steps": True, "steps_offset": 1})
_DDIM = {
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd2-v": ("DDIMScheduler", _DDIM),
    "small": ("DDIMScheduler", {**_DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "x4-upscaler": ("DDIMScheduler", {**_DDIM, "beta_start": 0.0001, "beta_end": 0.02}),
    "lcm": ("LCMScheduler", {}),
    "sd-turbo": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "trailing", "steps_offset": 1}),
    "sdxl": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
    "sdxl-refiner": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {**_BETAS, "timestep_spacing": "trailing"}),
    "sdxl-lightning": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "trailing"}),
    "sdxl-lcm": ("LCMScheduler", {}),
    "sd1-edit": ("EulerAncestralDiscreteScheduler", {**_BETAS, "timestep_spacing": "linspace"}),
    "sdxl-edit": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
    "ssd-1b": ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
}
# What pipeline() and save_pipeline() know: all U-Nets but the one that is no family. Those of EDITS and the upscaler
# need an image.
EDITS = ("sd1-edit", "sdxl-edit")
FAMILIES = tuple(name for name in UNETS if name not in ("uneven", "x4-upscaler", "sd2-depth", *EDITS))


def scheduler(family: str) -> Any:
    """The scheduler that checkpoints of the family ship."""
    name, config = _SCHEDULERS.get(family, _PNDM)
    return getattr(peer("diffusers"), name)(**config)


def pipeline(family: str, seed: int = 0, **replaced: Any) -> DiffusionPipeline:
    """A diffusers pipeline of the class that such a checkpoint's model_index.json names.

    `replaced` are components to use instead, by name: `pipeline("sd1", vae=tiny_vae())`.
    """
    sd2 = UNETS[family].get("use_linear_projection", False)
    xl = "addition_embed_type" in UNETS[family]
    components: dict[str, Any] = {
        "unet": unet(family, seed),
        "vae": vae(family, seed + 1),
        "text_encoder": text_encoder("h" if sd2 and not xl else "l", seed + 2),
        "tokenizer": tokenizer("!" if sd2 and not xl else "<|endoftext|>"),
        "scheduler": scheduler(family),
    }
    if xl:
        components |= {"text_encoder_2": text_encoder("bigg", seed + 3), "tokenizer_2": tokenizer("!")}
        if family == "sdxl-refiner":
            components |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True, **replaced}
            return peer("diffusers").StableDiffusionXLImg2ImgPipeline(**components, force_zeros_for_empty_prompt=False)
        name = f"StableDiffusionXL{'InstructPix2Pix' * (family in EDITS)}Pipeline"
        return getattr(peer("diffusers"), name)(**{**components, **replaced})
    if family == "sd2-depth":
        components |= depth_estimator(seed + 4)
        return peer("diffusers").StableDiffusionDepth2ImgPipeline(**{**components, **replaced})
    if family == "x4-upscaler":
        noise = peer("diffusers").DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
        components |= {"low_res_scheduler": noise, "max_noise_level": 350}
        return peer("diffusers").StableDiffusionUpscalePipeline(**{**components, **replaced})
    components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    names = {"sd1-inpaint": "StableDiffusionInpaintPipeline", "lcm": "LatentConsistencyModelPipeline"}
    names["sd1-edit"] = "StableDiffusionInstructPix2PixPipeline"
    return getattr(peer("diffusers"), names.get(family, "StableDiffusionPipeline"))(**{**components, **replaced})


def save_pipeline(family: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write the family's pipeline as a diffusers folder. `options` go to save_pretrained (variant, max_shard_size)."""
    pipeline(family, seed).save_pretrained(folder, **options)
    return folder


def save_pixel_upscaler(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """What enlarges the default model's pictures, in its layout: pixels in patches of 4, twice as wide, no text."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 96,
        "out_channels": 48,
        "block_out_channels": (16, 32),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    make = peer("diffusers").UNet2DConditionModel
    seeded(lambda: make(**{**config, **changes}), seed).save_pretrained(folder / "unet")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    peer("diffusers").DDIMScheduler(**{**_DDIM, **options, "steps_offset": 0}).save_pretrained(folder / "scheduler")
    vae = {"_class_name": "PixelResidual", "patch_size": 4, "upscale_factor": 2, "scaling_factor": 4.0}
    index = {
        "_class_name": "PixelUpscalePipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["fastldm", "PixelResidual"],
    }
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
