"""Repainting around the mask alone (`padding_mask_crop`): what is cut out of a picture, and laid over it at the end.

The region, its filling and the overlay are those of diffusers' VaeImageProcessor, to the pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from fastldm import image as images
from fastldm.errors import InputError
from fastldm.request import Request

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class MaskCrop:
    """A picture, its mask and the part of both that is repainted, at another size."""

    image: Image.Image  # RGB
    mask: Image.Image  # L, of the image's size; white is repainted
    box: Box
    size: tuple[int, int]  # width and height at which it is repainted

    def cut(self, picture: Image.Image) -> Image.Image:
        """A picture's part in the box, at the size that is repainted. What the box lacks of its shape is made of the
        part's edges."""
        part = picture.crop(self.box)
        (width, height), (w, h) = self.size, _inside(part.size, self.size)
        part = part.resize((w, h), Image.Resampling.LANCZOS)
        left, top = width // 2 - w // 2, height // 2 - h // 2
        whole = Image.new("RGB", self.size)
        whole.paste(part, (left, top))
        if w == width and top > 0:
            whole.paste(part.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            whole.paste(part.resize((width, top), box=(0, h, width, h)), (0, top + h))
        if w < width and left > 0:
            whole.paste(part.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            whole.paste(part.resize((left, height), box=(w, 0, w, height)), (left + w, 0))
        return whole.convert(picture.mode)

    def overlay(self, repainted: Image.Image) -> Image.Image:
        """The picture, and where the mask is white what was repainted; grey mixes the two."""
        left, top, right, bottom = self.box
        width, height = right - left, bottom - top
        w, h = _inside(repainted.size, (width, height), max)
        part = Image.new("RGB", (width, height))
        resized = repainted.resize((w, h), Image.Resampling.LANCZOS)
        part.paste(resized, (width // 2 - w // 2, height // 2 - h // 2))
        base = Image.new("RGB", self.image.size)
        base.paste(part, (left, top))
        kept = Image.new("RGBa", self.image.size)  # of premultiplied colours
        kept.paste(self.image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask))
        result = base.convert("RGBA")
        result.alpha_composite(kept.convert("RGBA"))
        return result.convert("RGB")


def mask_crop(request: Request) -> MaskCrop | None:
    """What a completed request with padding_mask_crop repaints; None without. InputError for a mask that is black."""
    if request.padding_mask_crop is None:
        return None
    image, mask = images.load_picture(request.image), images.load_picture(request.mask_image, "mask_image", mask=True)
    size = int(request.width or 0), int(request.height or 0)
    return MaskCrop(image, mask, _region(mask, size, request.padding_mask_crop), size)


def check_mask_crop(request: Request) -> None:
    """InputError unless padding_mask_crop is None, or there are one picture and one mask of its size, to PIL images."""
    if request.padding_mask_crop is None:
        return
    if request.image is None or request.mask_image is None:
        raise InputError("padding_mask_crop is for inpainting: give image and mask_image, or leave it out")
    if request.output_type != "pil":
        raise InputError(f"padding_mask_crop gives PIL images, and output_type is {request.output_type!r}: set 'pil'")
    sizes = []
    for name, source in (("image", request.image), ("mask_image", request.mask_image)):
        if not images.is_picture(source):
            raise InputError(
                f"{name} is a {type(source).__name__}: expected one PIL image or a path, with padding_mask_crop"
            )
        sizes.append(images.measure(source, name, mask=name == "mask_image")[1:])
    if sizes[0] != sizes[1]:
        (height, width), (h, w) = sizes
        raise InputError(f"mask_image is {w}x{h}: expected {width}x{height} as image, with padding_mask_crop")


def _region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """What holds all that is not black and so much around it, widened within the picture to the shape of `size`."""
    marked = np.asarray(mask) > 0
    if not marked.any():
        raise InputError("mask_image is black: with padding_mask_crop, something has to be repainted")
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, mask.width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, mask.height)
    shape = size[0] / size[1]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _widened(top, bottom, (right - left) / shape, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * shape, mask.width)
    return left, top, right, bottom


def _widened(first: int, last: int, length: float, most: int) -> tuple[int, int]:
    """An interval of that length around another one, moved and if need be cut to lie in 0..most."""
    more = int(length - (last - first))
    first, last = first - more // 2, last + more - more // 2
    over = max(last - most, 0)
    first, last = first - over, last - over
    under = max(-first, 0)
    return first + under, min(last + under, most)


def _inside(
    source: tuple[int, int], size: tuple[int, int], choose: Callable[[float, float], float] = min
) -> tuple[int, int]:
    """The size of a picture of size `source`, scaled to fit into `size`; with `max`, to cover it."""
    ratio, own = size[0] / size[1], source[0] / source[1]
    by_width = choose(ratio, own) == ratio
    if ratio == own:
        return size
    return (size[0], source[1] * size[0] // source[0]) if by_width else (source[0] * size[1] // source[1], size[1])
