"""Models that read a picture, in place of a prompt (image variations) or beside it (stable unCLIP).

    image -> (n, 3, S, S) when a request is completed -> (n, D) when it starts -> what the U-Net attends to
                                                                               -> or noised, a part of its time rows

Each picture counts as a prompt, or is read with each. Sources: diffusers' StableDiffusionImageVariationPipeline and
StableUnCLIPImg2ImgPipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm import checks
from fastldm.checks import MAX_IMAGES
from fastldm.conditioning.image_encoder import ImageEncoder, read_pictures
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.models.config import UNetConfig
from fastldm.models.interfaces import VectorNormalizer
from fastldm.request import Request, as_list
from fastldm.runtime.noise import noise_rates
from fastldm.samplers.config import ScheduleConfig

_START = ("strength", "mask_image", "control_image", "candidates", "ip_adapter_image", "ip_adapter_image_embeds")
"""Fields of a request that say something of an image that the steps start from, or of other pictures."""
_TEXT = ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds", "clip_skip")
"""Those that say something of a text."""


@dataclass(frozen=True, eq=False)
class PictureRead:
    """The pictures of a completed request. Never changes."""

    source: Tensor
    """(n, 3, S, S) float32, the image encoder's input, on the host; or (n, D), its output."""
    encoder: ImageEncoder

    def __getitem__(self, rows: slice) -> PictureRead:
        return PictureRead(self.source[rows], self.encoder)

    def embeds(self, dtype: torch.dtype, device: torch.device, one_by_one: bool = False) -> Tensor:
        """The image encoder's output (n, D). one_by_one: of each picture by itself."""
        source = send(self.source, device, dtype)
        if source.ndim == 2:
            return source
        return torch.cat([self.encoder.embeds(part) for part in (source.split(1) if one_by_one else [source])])


def noise_vectors(
    normalizer: VectorNormalizer, embeds: Tensor, noise: Tensor, level: int, schedule: ScheduleConfig
) -> Tensor:
    """unCLIP's input (n, 2D) of vectors (n, D): those with noise (n, D) of a level, a timestep of the schedule, and the
    level itself as sinusoids."""
    rates = torch.tensor([noise_rates(schedule, level)], device=embeds.device).expand(len(embeds), -1)
    return normalizer(embeds, noise, rates, rates.new_full((len(embeds),), level))


PRIOR_FIELDS = ("prior_num_inference_steps", "prior_guidance_scale", "prior_latents")
"""Of a request, that a prior reads."""


def check_prior_fields(request: Request, prior: bool) -> None:
    """InputError for those where there is no prior."""
    unread = [name for name in PRIOR_FIELDS if getattr(request, name) is not None]
    if unread and not prior:
        raise InputError(f"{unread[0]} was given, and no prior makes what this request reads: leave it out")


def check_prior(request: Request) -> None:
    """InputError for what unCLIP's text to image does not read."""
    if request.image_embeds is not None:
        raise InputError("image_embeds was given, and this model reads prompts, of which its prior makes them")
    for name in ("image", *_START, "prompt_embeds"):
        if getattr(request, name) is not None:
            raise InputError(f"{name} was given, and this model's prior reads a prompt, and starts from noise")


def check_projected(request: Request) -> None:
    """InputError for what the decoder of unCLIP, which is led away from an empty text, does not read."""
    for name in ("negative_prompt", "negative_prompt_embeds", "clip_skip"):
        value = getattr(request, name)
        if value is not None and (name != "negative_prompt" or any(as_list(value))):
            raise InputError(f"{name} was given, and this model reads prompts alone, and guides away from an empty one")


def read_vectors(request: Request, unet: UNetConfig, prior: bool = False) -> Request:
    """A request of Kandinsky 2.2, whose vectors (n, D), each an image's in place of a prompt, are checked and on the
    host; or with a prior, which makes them, one with prompts. InputError for bad ones, for none, and for what such a
    model does not read."""
    of_prompt, width = prior and request.image_embeds is None, unet.text_width
    reads = ["strength"] * (request.image is not None) + ["mask_image"] * unet.inpaints
    reads += ["negative_prompt"] * of_prompt
    for name in (*_START, *_TEXT):
        if getattr(request, name) is not None and name not in reads:
            raise InputError(f"{name} was given, and this model reads image_embeds, which a prior makes of a prompt")
    if unet.inpaints and request.strength not in (None, 1.0):
        raise InputError(f"strength is {request.strength:g}: this model repaints from noise alone, leave it out")
    if of_prompt:
        if request.negative_image_embeds is not None:
            raise InputError("negative_image_embeds was given without image_embeds: give both, or negative_prompt")
        return request
    if any(as_list(request.prompt)):
        attach = "Pipeline.from_pretrained(..., prior=) or --prior attaches one"
        advice = "leave out the one or the other" if prior else attach
        raise InputError(f"prompt was given, and this model reads image_embeds, which a prior makes of it: {advice}")
    if request.image_embeds is None:
        raise InputError(
            "image_embeds is None: this model reads what its prior makes, (n, D) with negative_image_embeds; "
            "Pipeline.from_pretrained(..., prior=) or --prior attaches one, which makes them of prompts"
        )
    given = {"image_embeds": request.image_embeds, "negative_image_embeds": request.negative_image_embeds}
    vectors: dict[str, Tensor] = {}
    for name, source in given.items():
        if isinstance(source, list | tuple):
            parts = [checks.tensor(f"{name}[{k}]", part, (None, width)) for k, part in enumerate(source)]
            source = torch.cat(parts) if parts else source
        if source is not None:
            source = checks.finite(name, checks.tensor(name, source, (None, width))).detach()
            vectors[name] = send(source, torch.device("cpu"), torch.float32)
    count = len(vectors["image_embeds"])
    if not 0 < count <= MAX_IMAGES:
        raise InputError(f"image_embeds has {count} vectors: expected 1 to {MAX_IMAGES}")
    negatives = vectors.get("negative_image_embeds")
    if negatives is not None and len(negatives) not in (1, count):
        raise InputError(
            f"negative_image_embeds has {len(negatives)} vectors for {count} images: give one, or one each"
        )
    if negatives is not None:
        vectors["negative_image_embeds"] = negatives.expand(count, -1)
    return request.replace(prompt="" if count == 1 else ("",) * count, **vectors)


def read_picture(request: Request, encoder: ImageEncoder | None) -> Request:
    """A request whose pictures are ready to be read, each with an empty prompt where there is none. encoder: that of
    the model, if it reads pictures. InputError for a model that does not, for what such a model does not read, and for
    bad pictures."""
    if request.negative_image_embeds is not None:
        raise InputError("negative_image_embeds was given, and this model does not read it: only Kandinsky 2.2 does")
    if encoder is None:
        if request.image_embeds is not None:
            raise InputError("image_embeds was given, and this model reads prompts: give prompt_embeds, or a prompt")
        return request
    if isinstance(request.image_embeds, PictureRead):  # of a request that was completed before
        return request
    reads_text = encoder.normalizer is not None
    how = "what `image` shows, and starts from noise" if reads_text else "`image` alone, in place of a prompt"
    for name in _START if reads_text else (*_START, *_TEXT):
        if getattr(request, name) is not None:
            raise InputError(f"{name} was given, and this model reads {how}")
    if any(as_list(request.prompt)) and not reads_text:
        raise InputError("prompt was given, and this model reads `image` in its place: leave it out")
    if (request.image is None) == (request.image_embeds is None):
        raise InputError("this model makes variations of a picture: give image, or image_embeds in its place")
    source: Any = request.image_embeds
    if source is None:
        source = encoder.pixels(read_pictures(request.image, "image", MAX_IMAGES), "image")
    else:
        shape = (None, encoder.model.config.projection_dim)
        source = checks.finite("image_embeds", checks.tensor("image_embeds", source, shape)).detach()
    count, prompt = len(source), request.prompt
    prompts = 0 if prompt is None and request.prompt_embeds is None else request.count
    if prompts and prompts != count and not (count == 1 if reads_text else prompts == 1):
        raise InputError(f"image holds {count} pictures for {prompts} prompts: give one for each, or no prompt")
    if not (prompts and reads_text):
        prompt = "" if count == 1 else ("",) * count
    return request.replace(prompt=prompt, image=None, image_embeds=PictureRead(source, encoder))
