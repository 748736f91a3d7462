"""Autoencoders between images and latents: Stable Diffusion's KL autoencoder, VQ-GAN's, the tiny one in TAESD's
layout, and one without weights, whose latents are pixels.

Images are (B, 3, H, W) in -1..1. Latents z are unscaled; a U-Net works on those of `latents.scaled`. Parameter names
are those of diffusers' AutoencoderKL, VQModel and AutoencoderTiny.

Over 500 lines, for decoding in pieces is of all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.asymmetric import ConditionEncoder, repainting
from fastldm.models.codebook import Codebook, Kept, Norm, SpatialAttention, SpatialNorm, spatial_resnet, spatially
from fastldm.models.config import PixelResidualConfig, TinyVAEConfig, VAEConfig
from fastldm.models.interfaces import Autoencoder, Layer
from fastldm.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    Layers,
    Resnet,
    Upsample,
    channels_last,
    conv2d,
    upsample_conv2d,
)
from fastldm.models.transformer import PixelAttention

Pieces = Generator[None, None, Tensor]  # a computation that pauses after each piece and returns its result

_EPS = 1e-6
HALF_EXPONENT = -4  # of two: scales activations by 1/16, which keeps SDXL's in float16's range


class AutoencoderKL(nn.Module):
    """The KL autoencoder of Stable Diffusion 1, 2 and XL; with a codebook that of VQ-GAN (arXiv:2012.09841), which is
    the first stage of latent diffusion's first models (arXiv:2112.10752)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latents, inner, moments = config.latent_channels, config.inner_channels, 1 + config.moments
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(moments * inner, moments * latents, kernel=1) if config.quant_conv else None
        self.quantize = Codebook(config.codes, latents) if config.codes else None
        self.post_quant_conv = Conv(latents, inner, kernel=1) if config.post_quant_conv else None

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in -1..1 -> (B, 2C, H / factor, W / factor): the latents' mean, then their log variance; with
        a codebook (B, C, H / factor, W / factor), the latents, which `decode` takes the nearest codes of."""
        moments = self.encoder(channels_last(x))
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), unscaled latents -> (B, 3, h * factor, w * factor), about -1..1."""
        return finish(_in_turn(self.decoding(), z))

    def decode_repainted(self, z: Tensor, picture: Tensor, mask: Tensor) -> Pieces:
        """As `decode`, in pieces, of a repainted picture, of a config that is `conditioned`: see `asymmetric`."""
        return _in_turn(repainting(self, picture, mask), z)

    def decoding(self) -> list[Layer]:
        """The layers of `decode`, in order."""
        codes = Kept()
        return [*self.low(codes), *self.high(codes=codes)]

    def low(self, codes: Kept | None = None) -> list[Layer]:
        """The first layers, at the latents' resolution, including attention. codes: keeps the latents, or the nearest
        codes, that the norms of all layers read where the config is `spatial`."""
        codes = codes or Kept()
        first: list[Layer] = [channels_last]
        if self.quantize is not None and self.config.takes_nearest:
            first.append(self.quantize)
        if self.config.spatial:
            first.append(codes)
        if self.post_quant_conv is not None:
            first.append(self.post_quant_conv)
        return [*first, *self.decoder.low(self._norm(GroupNorm.__call__, codes))]

    def high(self, norm: Norm = GroupNorm.__call__, codes: Kept | None = None) -> list[Layer]:
        """The remaining layers, which enlarge. norm: applies their GroupNorms, as in `Resnet`. codes: of `low`."""
        return self.decoder.high(self._norm(norm, codes or Kept()))

    def _norm(self, norm: Norm, codes: Kept) -> Norm:
        return spatially(norm, codes.get) if self.config.spatial else norm


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.channels[0]
        self.conv_in = Conv(config.in_channels, width)
        self.down_blocks: Layers[Block] = Layers()
        for i, channels in enumerate(config.channels):
            innermost = i == len(config.channels) - 1
            attends = innermost and config.attends[0]
            block = Block(config, width, channels, config.layers_per_block, attends=attends)
            if not innermost:
                block.downsamplers.append(Downsample(channels, padding=0))
            self.down_blocks.append(block)
            width = channels
        self.mid_block = MidBlock(config, width)
        self.conv_norm_out = GroupNorm(config.norm_groups, width, _EPS)
        self.conv_out = Conv(width, (1 + config.moments) * config.inner_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (layer for block in self.down_blocks for layer in (*block.layers(), *block.downsamplers)):
            x = layer(x)
        for layer in self.mid_block.layers():
            x = layer(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.decoder_channels[-1]
        self.conv_in = Conv(config.inner_channels, width)
        codes = config.latent_channels if config.spatial else None
        self.mid_block = MidBlock(config, width, codes)
        self.up_blocks: Layers[Block] = Layers()
        for i, channels in enumerate(reversed(config.decoder_channels)):
            attends = i == 0 and config.attends[1]
            block = Block(config, width, channels, config.decoder_layers + 1, codes, attends=attends)
            if i < len(config.decoder_channels) - 1:
                block.upsamplers.append(Upsample(channels))
            self.up_blocks.append(block)
            width = channels
        self.conv_norm_out = GroupNorm(config.norm_groups, width, _EPS) if codes is None else SpatialNorm(width, codes)
        self.conv_out = Conv(width, config.out_channels)
        if config.conditioned:
            self.condition_encoder = ConditionEncoder(config)

    def low(self, norm: Norm) -> list[Layer]:
        first, *_ = self.up_blocks
        return [self.conv_in, *self.mid_block.layers(norm), *first.layers(norm)]

    def high(self, norm: Norm) -> list[Layer]:
        first, *rest = self.up_blocks
        layers: list[Layer] = [*first.upsamplers]
        for block in rest:
            layers += [*block.layers(norm), *block.upsamplers]

        def to_pixels(x: Tensor) -> Tensor:
            return self.conv_out(norm(self.conv_norm_out, x, silu=True))

        return [*layers, to_pixels]


class Block(nn.Module):
    """The resnets of one resolution, each followed by attention or not, then down- or upsampling. codes: channels of
    latents that their norms read."""

    def __init__(
        self,
        config: VAEConfig,
        width: int,
        channels: int,
        layers: int,
        codes: int | None = None,
        *,
        attends: bool = False,
    ) -> None:
        super().__init__()
        widths = [width] + [channels] * (layers - 1)
        self.resnets: Layers[Resnet] = Layers(_resnet(config, width, channels, codes) for width in widths)
        self.attentions: Layers[PixelAttention] = Layers(_attention(config, channels, codes) for _ in widths if attends)
        self.downsamplers: Layers[Downsample] = Layers()
        self.upsamplers: Layers[Upsample] = Layers()

    def layers(self, norm: Norm = GroupNorm.__call__) -> list[Layer]:
        """All but down- and upsampling."""
        resnets, attentions = _normed(self.resnets, norm), _normed(self.attentions, norm)
        if not attentions:
            return resnets
        return [layer for pair in zip(resnets, attentions, strict=True) for layer in pair]


def _resnet(config: VAEConfig, in_channels: int, channels: int, codes: int | None) -> Resnet:
    if codes is not None:
        return spatial_resnet(in_channels, channels, codes)
    return Resnet(in_channels, channels, config.norm_groups, _EPS)


def _attention(config: VAEConfig, channels: int, codes: int | None) -> PixelAttention:
    if codes is not None:
        return SpatialAttention(channels, codes)
    return PixelAttention(channels, 1, config.norm_groups, _EPS)


def _normed(layers: Iterable[nn.Module], norm: Norm) -> list[Layer]:
    """Layers whose norms are applied so: not that of attention, which reads the full image, unless it is spatial."""
    return [
        layer
        if isinstance(layer, PixelAttention) and not isinstance(layer, SpatialAttention)
        else partial(layer, norm=norm)
        for layer in layers
    ]


class MidBlock(nn.Module):
    """codes: as of `Block`."""

    def __init__(self, config: VAEConfig, channels: int, codes: int | None = None) -> None:
        super().__init__()
        self.resnets: Layers[Resnet] = Layers(_resnet(config, channels, channels, codes) for _ in range(2))
        attentions = (_attention(config, channels, codes) for _ in range(config.mid_attention))
        self.attentions: Layers[PixelAttention] = Layers(attentions)

    def layers(self, norm: Norm = GroupNorm.__call__) -> list[Layer]:
        first, last = _normed(self.resnets, norm)
        return [first, *_normed(self.attentions, norm), last]


def rescale_for_half(vae: AutoencoderKL, exponent: int = HALF_EXPONENT) -> list[str]:
    """Keep the activations of a `force_upcast` autoencoder in float16's range, without changing its outputs.

    All activations between conv_in and conv_norm_out are multiplied by 2 ** exponent: weights and biases of layers that
    write to the residual stream or between a resnet's convolutions are scaled; of layers that map the stream to itself
    (shortcut, up- and downsampling), only the bias; each GroupNorm divides the factor out, with eps scaled by the
    square. A power of two is exact: float32 results are bitwise the same. Parameters are replaced, not overwritten,
    since other modules may share them. Returns the names of the scaled parameters.
    """
    scale = 2.0**exponent
    names = {module: name for name, module in vae.named_modules()}
    rescaled = []

    def rescale(layer: nn.Module, *leaves: str) -> None:
        for leaf in leaves:
            setattr(layer, leaf, nn.Parameter(getattr(layer, leaf) * scale, requires_grad=False))
            rescaled.append(f"{names[layer]}.{leaf}")

    for branch in (vae.encoder, vae.decoder):
        rescale(branch.conv_in, "weight", "bias")
        for layer in branch.modules():
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
    """A distilled autoencoder in TAESD's layout. Its latents are the U-Net's, without sampling and scaling."""

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
        return finish(_in_turn(self.decoding(), z))

    def decoding(self) -> list[Layer]:
        """The layers of `decode`, in order."""
        return [*self.low(), *self.high()]

    def low(self) -> list[Layer]:
        """The first layers, at the latents' resolution."""
        layers = self.decoder.layers[: self.decoder.first_enlarged]
        return [channels_last, lambda z: torch.tanh(z / 3) * 3, *layers]

    def high(self, norm: Norm = GroupNorm.__call__) -> list[Layer]:
        """The remaining layers, which enlarge. None of them normalises."""
        return [*self.decoder.layers[self.decoder.first_enlarged :], lambda x: x * 2 - 1]


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
        x = (x + 1) / 2  # TAESD expects images in 0..1
        for layer in self.layers:
            x = layer(x)
        return x


class TinyDecoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.layers = nn.ModuleList([Conv(config.latent_channels, width), nn.ReLU()])
        for i, blocks in enumerate(config.decoder_blocks):
            if i > 0:  # nn.Identity: in diffusers, the enlargement is a separate layer
                self.layers.extend([nn.Identity(), EnlargedConv(width, width, bias=False)])
            self.layers.extend(TinyBlock(width) for _ in range(blocks))
        self.layers.append(Conv(width, config.out_channels))
        self.first_enlarged = 2 + config.decoder_blocks[0]


class StridedConv(Conv):
    """Halves height and width."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return conv2d(x, self.weight, self.bias, stride=2, padding=1)


class EnlargedConv(Conv):
    """Doubles height and width before the convolution. phases: as in Upsample."""

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


class PixelResidual(nn.Module):
    """The pixels of each patch as channels. Latents are of a picture less its `base`: what decodes them adds that of
    the small picture, as channels too, before."""

    def __init__(self, config: PixelResidualConfig) -> None:
        super().__init__()
        self.config = config

    def base(self, small: Tensor) -> Tensor:
        """A small picture (B, 3, h, w), enlarged by bicubic interpolation, as channels (B, C, H / patch, W / patch) for
        H = upscale_factor * h."""
        large = F.interpolate(small, scale_factor=self.config.upscale_factor, mode="bicubic", align_corners=False)
        return self.encode(large)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, C, H / patch, W / patch)."""
        return F.pixel_unshuffle(x, self.config.patch_size)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> (B, 3, h * patch, w * patch)."""
        return F.pixel_shuffle(z, self.config.patch_size)

    def decoding(self) -> list[Layer]:
        """The layers of `decode`, in order."""
        return [self.decode]

    def low(self) -> list[Layer]:
        """None: all of it enlarges."""
        return []

    def high(self, norm: Norm = GroupNorm.__call__) -> list[Layer]:
        """The one layer there is, which does not normalise."""
        return self.decoding()


# ------------------------------------------------------------------------------------------------- decoding in pieces

TILE = 64  # latents a side
Decode = Literal["whole", "sliced", "tiled"]


def decode_pieces(vae: Autoencoder, z: Tensor, mode: Decode = "whole", tile: int = TILE) -> Pieces:
    """`vae.decode(z)` in pieces of one layer (of one image, of one tile), so that other work can run between them.

    z (B, C, h, w), unscaled latents -> (B, 3, h * factor, w * factor). Call next() to continue; it raises StopIteration
    with the images as its value. Or use `finish` or `yield from`.

    mode: "whole" is `decode`, layer by layer. "sliced" decodes one image after the other, with the memory of one.
    "tiled" also decodes squares of `tile` x `tile` latents, with the memory of one tile and a part that grows with the
    image, at most a sixteenth of that of "whole": the layers at the latents' resolution, including attention, run on
    the full image.

    Tiles overlap by a quarter, with a linear transition. All tiles are normalised with the same statistics, so that all
    are the same function of the latents, and no tile differs in tone. (With its own statistics, a tile of sky and a
    tile of faces would each be stretched to the same mean and deviation.) The shared statistics are those of the
    latents' features scaled down to one tile by taking every n-th, since averages would be too smooth. That costs as
    much as one more tile, and slightly changes the tone of the image. Measured with the default model's VAE, in levels
    of 255, against the "whole" decoding of two photographs and an emoji of 512x512:

        statistics        mean difference     max
        each tile's own   2.7  12.2  2.9      22  115  100
        shared            0.7   2.0  0.5       6   11    6

    A tiled image and one that is decoded as a whole with the shared statistics differ by less than 0.01: tiles have no
    visible borders.
    """
    if mode == "whole":
        return _in_turn(vae.decoding(), z)
    return _one_by_one(vae, z, tile if mode == "tiled" else max(z.shape[2:]))


def finish(pieces: Pieces) -> Tensor:
    """Run the remaining pieces and return their result."""
    while True:
        try:
            next(pieces)
        except StopIteration as done:
            return done.value


def _in_turn(layers: list[Layer], x: Tensor) -> Pieces:
    for layer in layers:
        x = layer(x)
        yield
    return x


def _one_by_one(vae: Autoencoder, z: Tensor, tile: int) -> Pieces:
    images = []
    for latents in z.split(1):
        images.append((yield from _tiled(vae, latents, tile)))
    return torch.cat(images)


def _tiled(vae: Autoencoder, z: Tensor, tile: int) -> Pieces:
    height, width = z.shape[2:]
    if max(height, width) <= tile:
        return (yield from _in_turn(vae.decoding(), z))
    assert isinstance(vae, AutoencoderKL | TinyAutoencoder | PixelResidual)  # engines have no separate layers
    codes = Kept()
    x = yield from _in_turn(vae.low(codes) if isinstance(vae, AutoencoderKL) else vae.low(), z)  # (1, C, h, w)

    statistics: list[tuple[Tensor, Tensor]] = []
    if isinstance(vae, AutoencoderKL):
        smaller = partial(F.interpolate, size=(min(height, tile), min(width, tile)), mode="nearest-exact")
        yield from _in_turn(vae.high(_recording(statistics), codes.then(smaller)), smaller(x))

    def of_tile(down: slice, across: slice) -> list[Layer]:
        norm, part = _sharing(iter(statistics)), codes.then(lambda x: x[:, :, down, across])
        return vae.high(norm, part) if isinstance(vae, AutoencoderKL) else vae.high(norm)

    factor = vae.config.factor
    image = x.new_zeros((1, vae.config.out_channels, height * factor, width * factor), dtype=torch.float32)
    rows, columns = (list(_spans(size, tile, factor, x.device)) for size in (height, width))
    for down, fade_down in rows:
        for across, fade_across in columns:
            pixels = yield from _in_turn(of_tile(down, across), channels_last(x[:, :, down, across]))
            location = (..., _scaled(down, factor), _scaled(across, factor))
            image[location] += pixels * fade_down[:, None] * fade_across
    return image.to(z.dtype)


def _spans(size: int, tile: int, factor: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The tiles along a side of `size` latents, with the weights (tile * factor,) of their pixels.

    All tiles have the same size and are evenly spaced. The weights of a pixel sum to 1. In an overlap they change
    linearly in the middle half: pixels next to a tile's edge depend on zero padding.
    """
    tile = min(tile, size)
    last = -(-(size - tile) // (tile - tile // 4))  # the index of the last tile
    starts = [i * (size - tile) // last if last else 0 for i in range(last + 1)]
    for i, start in enumerate(starts):
        weights = torch.ones(tile * factor, device=device)
        if i > 0:
            fade = _fade((starts[i - 1] + tile - start) * factor, device)
            weights[: len(fade)] *= fade
        if i < last:
            fade = _fade((start + tile - starts[i + 1]) * factor, device)
            weights[-len(fade) :] *= 1 - fade
        yield slice(start, start + tile), weights


def _fade(pixels: int, device: torch.device) -> Tensor:
    """Weights from 0 to 1."""
    x = (torch.arange(pixels, device=device) + 0.5) / pixels
    return (2 * x - 0.5).clamp(0, 1)


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def _recording(statistics: list[tuple[Tensor, Tensor]]) -> Norm:
    """Normalises, and records each layer's mean and variance (C,) of each channel's group, in float32."""

    def norm(layer: GroupNorm, x: Tensor, silu: bool, shift: Tensor | None = None, skip: None = None) -> Tensor:
        shifted = x if shift is None else x + shift[:, :, None, None]
        groups, size, dims = shifted.unflatten(1, (layer.groups, -1)), x.shape[1] // layer.groups, (0, 2, 3, 4)
        mean = groups.mean(dims, dtype=torch.float32)  # reductions of 16-bit tensors without a float32 copy
        power = torch.linalg.vector_norm(groups, dim=dims, dtype=torch.float32).square() * (layer.groups / x.numel())
        statistics.append((mean.repeat_interleave(size), (power - mean.square()).repeat_interleave(size)))
        return layer(x, silu=silu, shift=shift)

    return norm


def _sharing(statistics: Iterator[tuple[Tensor, Tensor]]) -> Norm:
    """Normalises one image with recorded statistics, as a trained batch norm does."""

    def norm(layer: GroupNorm, x: Tensor, silu: bool, shift: Tensor | None = None, skip: None = None) -> Tensor:
        mean, variance = next(statistics)
        if shift is not None:
            mean = mean - shift[0]
        out = F.batch_norm(x, mean, variance, layer.weight.float(), layer.bias.float(), eps=layer.eps)
        return F.silu(out, inplace=True) if silu else out

    return norm
