"""Autoencoders between pictures and latents: Stable Diffusion's KL autoencoder and the tiny one in TAESD's layout.

Pictures are (B, 3, H, W) in -1..1. Latents z are the autoencoder's own; a U-Net works on
(z - shift_factor) * scaling_factor. Parameter names are those of diffusers' AutoencoderKL and AutoencoderTiny.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.config import TinyVAEConfig, VAEConfig
from fastldm.models.layers import (
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    Layers,
    Resnet,
    Upsample,
    channels_last,
    conv2d,
    to_image,
    to_tokens,
    upsample_conv2d,
)

_EPS = 1e-6
HALF_EXPONENT = -4  # of two: activations a sixteenth as large, with which SDXL's stay in float16's range


class AutoencoderKL(nn.Module):
    """The KL autoencoder of Stable Diffusion 1, 2 and XL."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(2 * latents, 2 * latents, kernel=1) if config.quant_conv else None
        self.post_quant_conv = Conv(latents, latents, kernel=1) if config.post_quant_conv else None

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in -1..1 -> (B, 2C, H / factor, W / factor): the latents' mean, then their log variance."""
        moments = self.encoder(channels_last(x))
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), unscaled latents -> (B, 3, h * factor, w * factor), about -1..1."""
        z = channels_last(z)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.channels[0]
        self.conv_in = Conv(config.in_channels, width)
        self.down_blocks: Layers[Block] = Layers()
        for i, channels in enumerate(config.channels):
            block = Block(config, width, channels, config.layers_per_block)
            if i < len(config.channels) - 1:
                block.downsamplers.append(Downsample(channels, padding=0))
            self.down_blocks.append(block)
            width = channels
        self.mid_block = MidBlock(config, width)
        self.conv_norm_out = GroupNorm(config.norm_groups, width, _EPS)
        self.conv_out = Conv(width, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.conv_in = Conv(config.latent_channels, width)
        self.mid_block = MidBlock(config, width)
        self.up_blocks: Layers[Block] = Layers()
        for i, channels in enumerate(reversed(config.channels)):
            block = Block(config, width, channels, config.layers_per_block + 1)
            if i < len(config.channels) - 1:
                block.upsamplers.append(Upsample(channels))
            self.up_blocks.append(block)
            width = channels
        self.conv_norm_out = GroupNorm(config.norm_groups, width, _EPS)
        self.conv_out = Conv(width, config.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Block(nn.Module):
    """The resnets of one resolution, then a change of it."""

    def __init__(self, config: VAEConfig, in_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (layers - 1)
        self.resnets: Layers[Resnet] = Layers(Resnet(width, channels, config.norm_groups, _EPS) for width in widths)
        self.downsamplers: Layers[Downsample] = Layers()
        self.upsamplers: Layers[Upsample] = Layers()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        self.resnets: Layers[Resnet] = Layers(Resnet(channels, channels, config.norm_groups, _EPS) for _ in range(2))
        self.attentions: Layers[PixelAttention] = Layers()
        if config.mid_attention:
            self.attentions.append(PixelAttention(channels, config.norm_groups))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return last(x)


class PixelAttention(Attention):
    """Self-attention over all pixels of (B, C, H, W), one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, context=channels, bias=True)
        self.group_norm = GroupNorm(groups, channels, _EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        h = to_tokens(self.group_norm(x))
        q, k, v = self.qkv(h)
        out = super().forward(q, k, v, residual=to_tokens(x))
        return to_image(out, x.shape[2])


def rescale_for_half(vae: AutoencoderKL, exponent: int = HALF_EXPONENT) -> list[str]:
    """Keep the activations of a `force_upcast` autoencoder in float16's range, without changing what it computes.

    All between conv_in and conv_norm_out becomes 2 ** exponent times as large. Where a layer writes into the residual
    stream or between a resnet's convolutions, weight and bias are scaled; where it maps the stream to itself (shortcut,
    up- and downsampling), the bias alone; each GroupNorm divides the factor out again, its eps scaled by the square. A
    power of two is exact: float32 results are bitwise the same. Parameters are replaced, not written to, for others may
    share them. Returns the names of those that were: each is 2 ** exponent times what it was.
    """
    scale = 2.0**exponent
    names = {module: name for name, module in vae.named_modules()}
    rescaled = []

    def rescale(layer: nn.Module, *leaves: str) -> None:
        for leaf in leaves:
            setattr(layer, leaf, nn.Parameter(getattr(layer, leaf) * scale, requires_grad=False))
            rescaled.append(f"{names[layer]}.{leaf}")

    for half in (vae.encoder, vae.decoder):
        rescale(half.conv_in, "weight", "bias")
        for layer in half.modules():
            if isinstance(layer, GroupNorm):
                layer.eps *= scale**2
            elif isinstance(layer, Resnet):
                rescale(layer.conv1, "weight", "bias")
                rescale(layer.conv2, "weight", "bias")
                if layer.conv_shortcut is not None:
                    rescale(layer.conv_shortcut, "bias")
            elif isinstance(layer, PixelAttention):
                rescale(layer.to_out[0], "weight", "bias")
            elif isinstance(layer, (Downsample, Upsample)):
                rescale(layer.conv, "bias")
    return rescaled


class TinyAutoencoder(nn.Module):
    """A distilled autoencoder in TAESD's layout. Its latents are the U-Net's: nothing is sampled and nothing scaled."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in -1..1 -> latents (B, C, H / factor, W / factor)."""
        return self.encoder(channels_last(x))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> (B, 3, h * factor, w * factor), about -1..1."""
        return self.decoder(channels_last(z))


class TinyEncoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width = config.encoder_width
        self.layers = nn.ModuleList()
        for i, blocks in enumerate(config.encoder_blocks):
            self.layers.append(Conv(config.in_channels, width) if i == 0 else StridedConv(width, width, bias=False))
            self.layers.extend(TinyBlock(width) for _ in range(blocks))
        self.layers.append(Conv(width, config.latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x + 1) / 2  # TAESD sees pictures in 0..1
        for layer in self.layers:
            x = layer(x)
        return x


class TinyDecoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.layers = nn.ModuleList([Conv(config.latent_channels, width), nn.ReLU()])
        for i, blocks in enumerate(config.decoder_blocks):
            if i > 0:  # nn.Identity: diffusers counts the enlargement as a layer of its own
                self.layers.extend([nn.Identity(), EnlargedConv(width, width, bias=False)])
            self.layers.extend(TinyBlock(width) for _ in range(blocks))
        self.layers.append(Conv(width, config.out_channels))

    def forward(self, z: Tensor) -> Tensor:
        x = torch.tanh(z / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1


class StridedConv(Conv):
    """Halves height and width."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return conv2d(x, self.weight, self.bias, stride=2, padding=1)


class EnlargedConv(Conv):
    """Doubles height and width first. phases: as in Upsample."""

    phases: Tensor | None

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, bias=bias)
        self.register_buffer("phases", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        size = (2 * x.shape[2], 2 * x.shape[3])
        return upsample_conv2d(x, self.weight, self.bias, size, phases=self.phases)


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({i: Conv(width, width) for i in ("0", "2", "4")})  # ReLUs between

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv["0"](x))
        h = F.relu(self.conv["2"](h))
        return F.relu(self.conv["4"](h, residual=x))
