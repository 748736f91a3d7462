"""Pictures as what networks are conditioned on: prepared as CLIP's image encoder wants them, and encoded.

    pictures -> (N, 3, S, S) -> projected vectors (N, P), or hidden states (N, L, D)

IP-Adapters, ranking, image variations and unCLIP read pictures this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastldm import checks
from fastldm import image as images
from fastldm.device import send
from fastldm.errors import CheckpointError, InputError
from fastldm.models.clip_vision import CLIPVision, Normalizer
from fastldm.reading import Either, Field, Integer, ListOf, Number, Object, OneOf, read_fields

_SIDE = Integer(1, 4096)
_SIZE = Either(_SIDE, Object({"shortest_edge": Field(_SIDE)}), Object({"height": Field(_SIDE), "width": Field(_SIDE)}))
_DO = {f"do_{step}": Field(OneOf(True), True) for step in ("resize", "center_crop", "rescale", "normalize")}
_PREPROCESSOR = _DO | {
    "size": Field(_SIZE, {"shortest_edge": 224}),
    "crop_size": Field(_SIZE, 224),
    "resample": Field(Integer(0, 5), 3),
    "image_mean": Field(ListOf(Number(), 3, 3), (0.48145466, 0.4578275, 0.40821073)),
    "image_std": Field(ListOf(Number(1e-6), 3, 3), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become the encoder's input: resized so that the short side fits, cut out of the middle, and brought
    to mean 0 and deviation 1 by colour. transformers' CLIPImageProcessor, whose defaults these are."""

    size: int
    """Pixels of the short side."""
    crop: int
    """Height and width in pixels of what is cut out: the encoder's input."""
    resample: Image.Resampling = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = _PREPROCESSOR["image_mean"].default
    std: tuple[float, ...] = _PREPROCESSOR["image_std"].default

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "preprocessor_config.json") -> Preprocessing:
        """Read transformers' preprocessor_config.json; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _PREPROCESSOR, source)
        size, crop = (_sides(values[key]) for key in ("size", "crop_size"))
        if size[0] != size[1] or crop[0] != crop[1] or crop[0] > size[0]:
            raise CheckpointError(
                f"{source}: 'size' is {values['size']} and 'crop_size' {values['crop_size']}, expected squares, of "
                "which the second is no larger"
            )
        return cls(size[0], crop[0], Image.Resampling(values["resample"]), values["image_mean"], values["image_std"])

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture -> (3, crop, crop) float32."""
        width, height = picture.size
        short = min(width, height)
        size = (width * self.size // short, height * self.size // short)
        picture = picture.convert("RGB").resize(size, self.resample)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        pixels = np.asarray(picture.crop((left, top, left + self.crop, top + self.crop)), np.float32)
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        return torch.from_numpy((pixels / np.float32(255) - mean) / std).movedim(-1, 0)

    def cut(self, units: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in 0..1, resized and cut out as `__call__` does: (N, 3, crop, crop), for autograd."""
        height, width = units.shape[2:]
        short = min(height, width)
        if short != self.size:
            mode = "bicubic" if self.resample == Image.Resampling.BICUBIC else "bilinear"
            size = [n * self.size // short for n in (height, width)]
            units = F.interpolate(units, size, mode=mode, antialias=True).clamp(0, 1)
        top, left = ((n - self.crop) // 2 for n in units.shape[2:])
        return units[:, :, top : top + self.crop, left : left + self.crop]

    def normalised(self, units: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in 0..1, brought to mean 0 and deviation 1 by colour as `__call__` does."""
        mean, std = (send(torch.tensor(values), units.device)[:, None, None] for values in (self.mean, self.std))
        return (units - mean) / std


def _sides(value: Any) -> tuple[int, int]:
    if not isinstance(value, Mapping):
        return value, value
    short = value.get("shortest_edge")
    return (value["height"], value["width"]) if short is None else (short, short)


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Pictures -> vectors or hidden states. It never changes."""

    model: CLIPVision
    preprocessing: Preprocessing
    source: str
    """Where it comes from, for errors."""
    normalizer: Normalizer | None = None
    """Of unCLIP, which reads its vectors beside a prompt."""

    @property
    def size(self) -> int:
        """Height and width in pixels of its input."""
        return self.model.config.image_size

    def pixels(self, pictures: Sequence[Image.Image] | Tensor, name: str) -> Tensor:
        """Its input (P, 3, S, S) float32, on the host. A tensor is one already. name: the argument's, for InputError of
        a tensor of another size."""
        if isinstance(pictures, Tensor):
            if tuple(pictures.shape[2:]) != (self.size, self.size):
                raise InputError(
                    f"{name} is a tensor of shape {tuple(pictures.shape)}, which is the image encoder's own "
                    f"input: expected (pictures, 3, {self.size}, {self.size}), or a picture in another form"
                )
            return pictures.detach().to("cpu", torch.float32, copy=True)
        return torch.stack([self.preprocessing(picture) for picture in pictures])

    @torch.no_grad()
    def embeds(self, pixels: Tensor, hidden: bool = False) -> Tensor:
        """(P, 3, S, S) -> the projected vectors (P, D), or the hidden states before the last layer (P, L, D)."""
        return self.model.hidden(pixels) if hidden else self.model(pixels)


def read_pictures(source: Any, name: str, limit: int) -> Tensor | list[Image.Image]:
    """The pictures of an argument, for `ImageEncoder.pixels`: a picture or a list, of the types that `image.load_image`
    takes, but that a tensor is the encoder's input itself, as in diffusers. InputError for more than `limit`."""
    if isinstance(source, Tensor):
        pixels = checks.finite(name, checks.tensor(name, source, (None, 3, None, None)))
        if not 0 < len(pixels) <= limit:
            raise InputError(f"{name} has {len(pixels)} pictures: expected 1 to {limit}")
        return pixels
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    pictures: list[Image.Image] = []
    for each in sources[: limit + 1]:
        units = (images.load_image(each, name=name) + 1) * 127.5
        arrays = units.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
        pictures += [Image.fromarray(array) for array in arrays[: limit + 1]]
    if not 0 < len(pictures) <= limit:
        raise InputError(f"{name} has {len(pictures)} pictures: expected 1 to {limit}")
    return pictures
