"""Whether the components of one model fit each other, as far as their configs say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastldm.errors import CheckpointError
from fastldm.models.clip_vision import VisionConfig
from fastldm.models.config import PIXEL_SPACE, AutoencoderConfig, PixelResidualConfig, TextConfig, UNetConfig
from fastldm.models.prior import PriorConfig
from fastldm.models.text_projection import TextProjectionConfig
from fastldm.models.unet_config import NOISE_LEVEL_CHANNELS
from fastldm.samplers.config import ScheduleConfig


def check_noise_levels(unet: UNetConfig, low_res: ScheduleConfig | None, highest: int, source: str) -> None:
    """CheckpointError if a small picture is read, and its noise levels are not all known."""
    if not unet.needs_class or unet.needs_label:
        return
    if low_res is None:
        raise CheckpointError(f"{source}: the U-Net reads a small picture with noise, and has no low_res_scheduler")
    if unet.num_class_embeds is None:  # it reads a level as a time
        return
    levels = min(unet.num_class_embeds, low_res.num_train_timesteps)
    if highest >= levels:
        raise CheckpointError(
            f"{source}: 'max_noise_level' is {highest}, expected less than {levels}: the U-Net has "
            f"{unet.num_class_embeds} ('num_class_embeds'), the low_res_scheduler {low_res.num_train_timesteps}"
        )


def check_fit(
    unet: UNetConfig,
    vae: AutoencoderConfig,
    text: Sequence[TextConfig],
    names: Sequence[str],
    source: str,
    vision: VisionConfig | None = None,
    prior: PriorConfig | None = None,
    projection: TextProjectionConfig | None = None,
) -> None:
    """CheckpointError if components belong to different models: each would load, but not work with the others."""

    def check(fits: bool, problem: str) -> None:
        if not fits:
            raise CheckpointError(f"{source}: {problem}: its components are not of one model")

    text_channels, latent_channels = [encoder.hidden for encoder in text], vae.latent_channels
    if projection is not None:
        _check_projection(unet, vae, text, vision, prior, projection, check)
        return
    check(
        unet.needs_vector == bool((vision or prior) and text),
        "the U-Net reads the vector of a picture beside text ('class_embed_type'), and there is no image_encoder, or "
        "the reverse",
    )
    if prior is not None:
        check(
            unet.class_input_dim == 2 * prior.out_dim,
            f"the U-Net reads {unet.class_input_dim} channels ('projection_class_embeddings_input_dim'), and the prior "
            f"makes {prior.out_dim}, of which twice as many are expected",
        )
    if vision is not None and unet.needs_vector:
        check(
            unet.class_input_dim == 2 * vision.projection_dim and unet.in_channels == latent_channels,
            f"the U-Net reads {unet.class_input_dim} channels ('projection_class_embeddings_input_dim') beside latents "
            f"of {unet.in_channels} ('in_channels'), and the image encoder makes {vision.projection_dim} "
            f"('projection_dim'), of which twice as many are expected, and the latents have {latent_channels}",
        )
    elif vision is not None:
        check(
            vision.projection_dim == unet.cross_attention_dim and not unet.needs_added,
            f"the U-Net reads {unet.cross_attention_dim} channels ('cross_attention_dim'), and the image encoder makes "
            f"{vision.projection_dim} ('projection_dim')",
        )
    reads = bool(text or vision) or unet.reads_image_embeds or unet.reads_original
    check(reads or not unet.reads_text, "the U-Net reads text, and there is no text_encoder")
    check(
        unet.reads_text or not reads,
        "the U-Net reads no text, as its blocks have no attention to it ('down_block_types', 'up_block_types', "
        "'transformer_layers_per_block'), and there is a text_encoder",
    )
    pixels = isinstance(vae, PixelResidualConfig)
    check(
        vae == PIXEL_SPACE or not (pixels and unet.reads_text),
        "the U-Net reads text, and the VAE is a PixelResidual, which goes without",
    )
    check(
        pixels or unet.reads_text or unet.in_channels - latent_channels in (0, 3),
        f"the U-Net reads {unet.in_channels} channels ('in_channels'), and latents of {latent_channels} beside a "
        "picture's 3 were expected",
    )
    check(
        not text or sum(text_channels) == unet.text_width,
        f"the U-Net reads text of {unet.text_width} channels "
        f"('{'encoder_hid_dim' if unet.encoder_hid_dim_type else 'cross_attention_dim'}'), "
        f"and {' + '.join(map(str, text_channels))} come from the text encoder{'s' * (len(text) > 1)} ('hidden_size')",
    )
    twice = ", twice as many, as of a learned variance, and the scheduler's 'variance_type' is not 'learned_range'"
    check(
        unet.latent_channels == latent_channels,
        f"the U-Net makes {unet.out_channels} channels ('out_channels'), and the VAE's latents have {latent_channels} "
        f"('latent_channels'){twice * (unet.out_channels == 2 * latent_channels)}",
    )
    check(
        vae.in_channels == vae.out_channels == 3,
        f"the VAE reads images of {vae.in_channels} channels ('in_channels') and makes {vae.out_channels} "
        "('out_channels'), expected 3",
    )
    if not text:
        return
    pooled = text[-1].projection_dim
    if unet.adds_pooled:
        check(
            pooled == unet.pooled_width,
            f"the U-Net's time has {unet.pooled_width} channels, and the text encoder makes {pooled} for it",
        )
        return
    if not unet.needs_added:
        check(
            len(text) == 1 and pooled is None,
            "the U-Net reads no pooled text ('addition_embed_type'), and a text encoder returns one",
        )
        check(
            not unet.enlarges_latents or unet.pooled_width == text[0].hidden,
            f"the U-Net reads {unet.time_cond_proj_dim} channels with the time ('time_cond_proj_dim'), expected "
            f"{NOISE_LEVEL_CHANNELS} of a noise level and {text[0].hidden} of pooled text ('hidden_size')",
        )
        return
    check(
        "text_encoder_2" in names, "the U-Net reads pooled text ('addition_embed_type'), and there is no text_encoder_2"
    )
    check(
        pooled is not None,
        "the U-Net reads pooled text ('addition_embed_type'), and text_encoder_2 is no CLIPTextModelWithProjection",
    )
    refiner = unet.added_ids == 5
    sizes = (unet.addition_input_dim - (pooled or 0)) / unet.addition_time_embed_dim
    check(
        sizes == unet.added_ids,
        f"the U-Net's added embedding has {unet.addition_input_dim} channels "
        f"('projection_class_embeddings_input_dim'), expected {pooled} of pooled text ('projection_dim') and "
        f"{unet.added_ids} x {unet.addition_time_embed_dim} of sizes ('addition_time_embed_dim')"
        f"{', as of the XL refiner, which requires_aesthetics_score' * refiner}"
        f"{', not 5 x as in the XL refiner' * (sizes == 5)}",
    )


def _check_projection(
    unet: UNetConfig,
    vae: AutoencoderConfig,
    text: Sequence[TextConfig],
    vision: VisionConfig | None,
    prior: PriorConfig | None,
    projection: TextProjectionConfig,
    check: Callable[[bool, str], None],
) -> None:
    """What the decoder of unCLIP, its text projection and what makes vectors have to agree on."""
    widths = {text[0].hidden, text[0].projection_dim or 0}
    widths |= {vision.projection_dim} if vision else {prior.out_dim} if prior else set()
    check(
        widths == {projection.vector_dim},
        f"text_proj reads vectors and texts of {projection.vector_dim} channels ('clip_embeddings_dim'), and those of "
        f"the encoders, and of the prior if there is one, have {', '.join(map(str, sorted(widths)))}",
    )
    check(
        (projection.time_dim, projection.context) == (unet.time_embedding_dim, unet.cross_attention_dim),
        f"text_proj makes {projection.time_dim} channels for the time ('time_embed_dim') and a text of "
        f"{projection.context} ('cross_attention_dim'), and the decoder reads {unet.time_embedding_dim} and "
        f"{unet.cross_attention_dim}",
    )
    check(
        unet.in_channels == unet.latent_channels == vae.latent_channels,
        f"the decoder reads {unet.in_channels} channels ('in_channels') and makes {unet.out_channels} "
        f"('out_channels'): expected {vae.latent_channels}, a picture's, and as many or, with the scheduler's "
        "'variance_type' 'learned_range', twice as many",
    )
