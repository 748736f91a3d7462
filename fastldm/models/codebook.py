"""The codebook of a VQ-GAN (arXiv:2012.09841): vectors, of which each latent becomes the nearest; and MoVQ's layers
(arXiv:2209.09002), whose norms read those latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.clip import Embedding
from fastldm.models.config import SPATIAL_GROUPS
from fastldm.models.layers import Conv, GroupNorm, Resnet, to_image, to_tokens
from fastldm.models.transformer import PixelAttention

Norm = Callable[..., Tensor]  # (a GroupNorm, x, silu=...) -> x, normalised

_EPS = 1e-6
_CODES = 2048  # distances to so many at a time: of 512 x 512 pixels and 8,192 codes all would be half a gigabyte


class Codebook(nn.Module):
    """Vectors of which each latent becomes the nearest; diffusers' VectorQuantizer."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> the same, of codes."""
        return to_image(F.embedding(self.nearest(z), self.embedding.weight), z.shape[2])

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> the index of each one's code, the first of equals: (B, h * w)."""
        tokens = to_tokens(z).float()  # (B, N, C)
        best = index = None
        for k, codes in enumerate(self.embedding.weight.float().split(_CODES)):
            # |z - code|^2 without |z|^2, which all have alike
            distance, nearest = (codes.square().sum(1) - 2 * tokens @ codes.T).min(-1)
            if best is None or index is None:
                best, index = distance, nearest
            else:
                index = torch.where(distance < best, nearest + k * _CODES, index)
                best = torch.minimum(distance, best)
        assert index is not None  # there are codes
        return index


class Kept:
    """A layer that changes nothing, and keeps what passed it for later layers."""

    def __init__(self, x: Tensor | None = None) -> None:
        self.x = x

    def __call__(self, x: Tensor) -> Tensor:
        self.x = x
        return x

    def get(self) -> Tensor:
        assert self.x is not None  # it comes first
        return self.x

    def then(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """What it keeps, if anything, changed."""
        return Kept(None if self.x is None else change(self.x))


class SpatialNorm(GroupNorm):
    """A GroupNorm whose output is scaled and shifted, pixel by pixel, by what the latents at that place say; diffusers'
    SpatialNorm. It is applied by `spatially`."""

    def __init__(self, channels: int, codes: int) -> None:
        nn.Module.__init__(self)
        self.groups, self.eps = SPATIAL_GROUPS, _EPS
        self.norm_layer = GroupNorm(SPATIAL_GROUPS, channels, _EPS)
        self.conv_y, self.conv_b = Conv(codes, channels, kernel=1), Conv(codes, channels, kernel=1)


class SpatialAttention(PixelAttention):
    """Self-attention over all pixels after a `SpatialNorm`."""

    def __init__(self, channels: int, codes: int) -> None:
        super().__init__(channels, 1, None, _EPS)
        self.spatial_norm = SpatialNorm(channels, codes)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:  # type: ignore[override]
        return self.attended(norm(self.spatial_norm, x, silu=False), x)


def spatial_resnet(in_channels: int, channels: int, codes: int) -> Resnet:
    """A resnet of MoVQ's decoder; diffusers' ResnetBlockCondNorm2D."""
    resnet = Resnet(in_channels, channels, SPATIAL_GROUPS, _EPS)
    resnet.norm1, resnet.norm2 = SpatialNorm(in_channels, codes), SpatialNorm(channels, codes)
    return resnet


def spatially(norm: Norm, codes: Callable[[], Tensor]) -> Norm:
    """What applies norms as `norm` does, and has a `SpatialNorm` read latents (B, C, h, w): `codes` gives them when the
    first norm runs. Their 1x1 convolutions run before they are enlarged, which is the same and less."""

    def apply(layer: GroupNorm, x: Tensor, silu: bool, **options: Tensor | None) -> Tensor:
        assert isinstance(layer, SpatialNorm)  # as all of this decoder
        out = norm(layer.norm_layer, x, silu=False, **options)
        scale, bias = (
            F.interpolate(conv(codes()), size=out.shape[2:], mode="nearest") for conv in (layer.conv_y, layer.conv_b)
        )
        out = torch.addcmul(bias, out, scale)
        return F.silu(out, inplace=True) if silu else out

    return apply
