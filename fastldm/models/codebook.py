"""The codebook of a VQ-GAN (arXiv:2012.09841): vectors, of which each latent becomes the nearest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.clip import Embedding
from fastldm.models.layers import to_image, to_tokens

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
