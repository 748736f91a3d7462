"""Models that read a picture in place of a prompt: image variations.

    image -> (n, 3, S, S) when a request is completed -> (n, D) when it starts -> what the U-Net attends to

Each picture counts as a prompt. Source: diffusers' StableDiffusionImageVariationPipeline.
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
from fastldm.request import Request, as_list

_NOT_READ = (
    *("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds", "strength"),
    *("mask_image", "control_image", "clip_skip", "candidates", "ip_adapter_image", "ip_adapter_image_embeds"),
)
"""Fields of a request that say something of a text, or of an image that the steps start from."""


@dataclass(frozen=True, eq=False)
class PictureRead:
    """The pictures of a completed request. Never changes."""

    source: Tensor
    """(n, 3, S, S) float32, the image encoder's input, on the host; or (n, D), its output."""
    encoder: ImageEncoder

    def __getitem__(self, rows: slice) -> PictureRead:
        return PictureRead(self.source[rows], self.encoder)

    def embeds(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The image encoder's output (n, D)."""
        source = send(self.source, device, dtype)
        return self.encoder.embeds(source) if source.ndim == 4 else source


def read_picture(request: Request, encoder: ImageEncoder | None) -> Request:
    """A request whose pictures are ready to be read, each with an empty prompt. encoder: that of the model, if it reads
    pictures. InputError for a model that does not, for what such a model does not read, and for bad pictures."""
    if encoder is None:
        if request.image_embeds is not None:
            raise InputError("image_embeds was given, and this model reads prompts: give prompt_embeds, or a prompt")
        return request
    if isinstance(request.image_embeds, PictureRead):  # of a request that was completed before
        return request
    for name in _NOT_READ:
        if getattr(request, name) is not None:
            raise InputError(f"{name} was given, and this model reads `image` alone, in place of a prompt")
    if any(as_list(request.prompt)):
        raise InputError("prompt was given, and this model reads `image` in its place: leave it out")
    if (request.image is None) == (request.image_embeds is None):
        raise InputError("this model makes variations of a picture: give image, or image_embeds in its place")
    source: Any = request.image_embeds
    if source is None:
        source = encoder.pixels(read_pictures(request.image, "image", MAX_IMAGES), "image")
    else:
        shape = (None, encoder.model.config.projection_dim)
        source = checks.finite("image_embeds", checks.tensor("image_embeds", source, shape)).detach()
    count = len(source)
    if request.prompt is not None and request.count not in (1, count):
        raise InputError(f"image holds {count} pictures for {request.count} prompts: give one for each, or no prompt")
    prompt = "" if count == 1 else ("",) * count
    return request.replace(prompt=prompt, image=None, image_embeds=PictureRead(source, encoder))
