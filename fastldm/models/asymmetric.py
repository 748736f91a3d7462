"""The decoder of diffusers' AsymmetricAutoencoderKL (arXiv:2306.04632) where a picture is repainted: what the mask
keeps comes from the picture itself, at each resolution, and not through the latents.

Without picture and mask it decodes as `models.vae.AutoencoderKL` does.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.config import VAEConfig
from fastldm.models.interfaces import Layer
from fastldm.models.layers import Layers, channels_last, parameter


class PictureConv(nn.Module):
    """A convolution with bias that keeps the size (kernel 3) or halves it (kernel 4)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(out_channels, in_channels, kernel, kernel), parameter(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=self.weight.shape[-1] - 2, padding=1)


class ConditionEncoder(nn.Module):
    """Features of a picture for each place at which the decoder takes them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = condition_widths(config)
        inputs = (config.out_channels, *widths)
        kernels = (3, 3, *(4 for _ in widths[2:]))
        self.layers: Layers[PictureConv] = Layers(
            PictureConv(*sizes) for sizes in zip(inputs, widths, kernels, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> (B, C_k, H, W) twice, then at each half of that down to the latents' size."""
        features = []
        for layer in self.layers:
            features.append(layer(x))
            x = features[-1].relu()
        return features


def condition_widths(config: VAEConfig) -> tuple[int, ...]:
    """Channels of the condition encoder's layers, of which there are five, as diffusers makes them."""
    first, most = config.decoder_channels[0], config.decoder_channels[-1]
    return (*(min(first * 2**k, most) for k in range(4)), most)


def repainting(vae: Any, picture: Tensor, mask: Tensor) -> list[Layer]:
    """The layers of an AutoencoderKL's `decode` for a picture (B, 3, H, W) in -1..1 and its mask (B, 1, H, W), 1 where
    it was repainted: as `decoding`, with the picture's features mixed in before each block and after the last.
    """
    decoder = vae.decoder
    features = decoder.condition_encoder((1 - mask) * picture)

    def mixed(k: int) -> Layer:
        def mix(x: Tensor) -> Tensor:
            known = F.interpolate(mask, size=x.shape[2:])
            return channels_last(x * known + features[k] * (1 - known))

        return mix

    first = [] if vae.post_quant_conv is None else [vae.post_quant_conv]
    layers: list[Layer] = [channels_last, *first, decoder.conv_in, *decoder.mid_block.layers()]
    blocks = list(decoder.up_blocks)
    for k, block in enumerate(blocks):
        layers += [mixed(len(blocks) - k), *block.resnets, *block.upsamplers]
    return [*layers, mixed(0), lambda x: decoder.conv_out(decoder.conv_norm_out(x, silu=True))]
