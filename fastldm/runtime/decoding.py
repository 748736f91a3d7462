"""From latents to images, in pieces between which other requests take their steps.

By the autoencoder as a whole, image by image or in tiles, on a GPU by a graph; what is not finite in 16 bits is decoded
once more in float32.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from fastldm import image as pictures
from fastldm.device import Mark, to_host
from fastldm.errors import NonFinite
from fastldm.loading import spec as loading
from fastldm.mask_crop import mask_crop
from fastldm.models.config import PIXEL_SPACE
from fastldm.models.latents import unscaled
from fastldm.models.vae import Decode, Pieces, PixelResidual, decode_pieces, finish
from fastldm.request import Request
from fastldm.runtime.denoise import Run, check_finite
from fastldm.runtime.graph import Graphs

logger = logging.getLogger("fastldm")

_PREVIEW_LATENTS = 16


class Decoder:
    """What makes images of a model's latents."""

    def __init__(
        self, vae: loading.Autoencoder, dtype: torch.dtype, device: torch.device, graphs: Graphs | None, backend: str
    ) -> None:
        self.vae, self.dtype, self.device, self.graphs, self.backend = vae, dtype, device, graphs, backend
        self.mode: Decode = "whole"

    def images(self, latents: Tensor) -> Tensor:
        """Latents as the U-Net has them to images (B, 3, H, W) in about -1..1, for autograd."""
        return self.vae.decode(self._unscaled(latents).to(self.dtype))

    def preview(self, latents: Tensor, run: Run | None = None) -> Tensor:
        """Small images (B, H, W, 3) uint8 of latents (B, C, h, w) between two steps, on the host when the device has
        come so far. They are decoded from at most 16 latents a side, a sixteenth of the work at 512x512 pixels and less
        beyond. run: whose they are."""
        latents = self._with_base(latents, run)
        longest = max(latents.shape[2:])
        if longest > _PREVIEW_LATENTS:
            size = [max(1, round(n * _PREVIEW_LATENTS / longest)) for n in latents.shape[2:]]
            latents = torch.nn.functional.interpolate(latents, size, mode="area")
        return to_host(pictures.to_pixels(finish(self._decoding(latents)), "pil"))

    def decode(
        self, request: Request, run: Run, latents: Tensor, first_bad: Callable[[], int | None]
    ) -> Generator[Any, None, Any]:
        """The images of a run's latents, decoded in pieces, between which steps of other runs may be taken.

        Yields None, or a mark that the device has to reach before the next piece: nothing here waits for another.
        first_bad: as `Batch.release` gives it. Raises NonFinite.
        """
        kind, pixels, finite = request.output_type, latents, None
        if kind != "latent":
            latents = self._with_base(latents, run)
            if run.repainted is None:
                decoded = yield from self._decoding(latents, bool(run.images))
            else:
                decoded = yield from self._repainted(latents, *run.repainted)
            pixels, finite = pictures.to_pixels(decoded, kind), to_host(decoded.isfinite().all())
            if kind != "pt":
                pixels = to_host(pixels)
        mark = Mark(self.device)
        yield mark
        mark.wait()
        first = first_bad()
        if first == -1 and request.image is not None:
            raise NonFinite(
                f"encoding the picture in {self.dtype} gave NaN or infinity: load the model in float32 or bfloat16"
            )
        check_finite(first, run.table)
        if finite is None:
            return latents
        if not bool(finite):
            pixels = self._decoded_in_float32(latents, kind, run)
        crop = mask_crop(request)
        shown = pictures.to_images(pixels, kind)
        return shown if crop is None else [crop.overlay(image) for image in shown]

    def _decoding(self, latents: Tensor, apart: bool = False) -> Pieces:
        """Latents (B, C, h, w) as the U-Net has them to images (B, 3, H, W), about -1..1, in pieces. apart: each image
        as if it were alone."""
        z = self._unscaled(latents).to(self.dtype)
        if self.graphs is None or self.mode != "whole":
            return (yield from decode_pieces(self.vae, z, self._decode_mode(apart)))
        decoded = []
        for part in z.split(1) if apart else (z,):
            yield
            decoded.append(self.graphs.call("decode", self.vae.decode, part))  # one piece: about as long as a step
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def _with_base(self, latents: Tensor, run: Run | None) -> Tensor:
        """Latents of a picture in place of those of what it has beyond a small one, where they are such."""
        residual = isinstance(self.vae, PixelResidual) and self.vae.config != PIXEL_SPACE
        if run is None or run.extra is None or not residual:
            return latents
        return latents + run.extra.float() * self.vae.config.scaling_factor

    def _decode_mode(self, apart: bool) -> Decode:
        return "sliced" if apart and self.mode == "whole" else self.mode

    def _unscaled(self, latents: Tensor) -> Tensor:
        return unscaled(self.vae.config, latents)

    def _repainted(self, latents: Tensor, picture: Tensor, mask: Tensor) -> Pieces:
        """Latents to images, each by itself, by an asymmetric VAE that reads what was repainted."""
        z, decoded = self._unscaled(latents).to(self.dtype), []
        for parts in zip(z.split(1), picture.split(1), mask.split(1), strict=True):
            decoded.append((yield from self.vae.decode_repainted(*parts)))  # type: ignore[attr-defined]
        return torch.cat(decoded)

    def _decoded_in_float32(self, latents: Tensor, kind: str, run: Run) -> Tensor:
        """The pixels of an image whose decoding was not finite; NonFinite where float32 does not help. Waits."""
        decoded = None
        if self.dtype != torch.float32 and isinstance(self.vae, torch.nn.Module) and run.repainted is None:
            logger.warning("decoding in %s overflowed: decoding once more in float32", self.dtype)
            vae = copy.deepcopy(self.vae).float()
            decoded = finish(decode_pieces(vae, self._unscaled(latents).float(), self._decode_mode(bool(run.images))))
        if decoded is None or not bool(decoded.isfinite().all()):
            where = f"on {self.backend}" if self.backend != "torch" else "in float32 too"
            raise NonFinite(f"decoding the latents gave NaN or infinity, {where}: the VAE's weights may be damaged")
        pixels = pictures.to_pixels(decoded, kind)
        return pixels if kind == "pt" else pixels.cpu()
