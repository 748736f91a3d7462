"""T2I-Adapter: an image's features at each level of a U-Net. They depend on no step: computed once per request.

    features = network(image)
    out = unet.step(..., features=[Features(features)])

Parameter names are those of diffusers' T2IAdapter. Source: arXiv:2302.08453.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.config import UNetConfig
from fastldm.models.layers import Conv, Layers, channels_last
from fastldm.reading import MAX_CHANNELS, Field, Integer, ListOf, OneOf, read_fields

_WIDTH = Integer(1, MAX_CHANNELS)
_KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")
_FIELDS = {
    "_class_name": Field(OneOf("T2IAdapter"), "T2IAdapter"),
    "adapter_type": Field(OneOf(*_KINDS), "full_adapter"),
    "in_channels": Field(_WIDTH, 3),
    "channels": Field(ListOf(_WIDTH, 1, 12), (320, 640, 1280, 1280)),
    "num_res_blocks": Field(Integer(1, 64), 2),
    "downscale_factor": Field(Integer(1, 64), 8),
}


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter (diffusers' T2IAdapter)."""

    kind: str  # "full_adapter", "full_adapter_xl" or "light_adapter"
    image_channels: int  # 1: grey
    channels: tuple[int, ...]  # of each feature
    layers: int  # in each block
    factor: int  # pixels per input of the first layer, in each direction; pictures have a multiple of it

    @property
    def light(self) -> bool:
        return self.kind == "light_adapter"

    @property
    def halves(self) -> tuple[bool, ...]:
        """Whether each block halves its input's size."""
        if self.kind == "full_adapter_xl":
            return tuple(k == 2 for k in range(len(self.channels)))
        return tuple(k > 0 for k in range(len(self.channels)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per value of each feature, in each direction."""
        return tuple(self.factor * 2 ** sum(self.halves[: k + 1]) for k in range(len(self.channels)))

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], source: str = "config.json") -> T2IAdapterConfig:
        """Read diffusers' config.json of a T2I-Adapter; CheckpointError if it needs what is not implemented."""
        values = read_fields(cfg, _FIELDS, source)
        kind, channels = values["adapter_type"], values["channels"]
        if kind == "light_adapter":
            channels = (*channels, channels[-1])  # its last width counts twice
        return cls(kind, values["in_channels"], channels, values["num_res_blocks"], values["downscale_factor"])

    def to_dict(self) -> dict[str, Any]:
        """As diffusers' config.json, which `from_dict` reads."""
        return {
            "_class_name": "T2IAdapter",
            "adapter_type": self.kind,
            "in_channels": self.image_channels,
            "channels": list(self.channels[:-1] if self.light else self.channels),
            "num_res_blocks": self.layers,
            "downscale_factor": self.factor,
        }


class T2IAdapter(nn.Module):
    """Images (B, C, H, W) in 0..1 -> features (B, channels, h, w), the largest first."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = AdapterLayers(config)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.adapter(channels_last(F.pixel_unshuffle(image, self.config.factor)))


class AdapterLayers(nn.Module):
    """diffusers' FullAdapter, FullAdapterXL and LightAdapter."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        widths, first = config.channels, config.image_channels * config.factor**2
        self.conv_in = None if config.light else Conv(first, widths[0])
        inputs = (first if config.light else widths[0], *widths)
        self.body: Layers[AdapterBlock] = Layers(
            AdapterBlock(previous, width, config, halve)
            for previous, width, halve in zip(inputs, widths, config.halves, strict=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.conv_in is not None:
            x = self.conv_in(x)
        features = []
        for block in self.body:
            x = block(x)
            features.append(x)
        return tuple(features)


class AdapterBlock(nn.Module):
    """One feature from the one before; a light one computes it with a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, config: T2IAdapterConfig, halve: bool) -> None:
        super().__init__()
        self.halve, light = halve, config.light
        width = out_channels // 4 if light else out_channels
        self.in_conv = Conv(in_channels, width, kernel=1) if light or in_channels != width else None
        self.resnets: Layers[AdapterResnet] = Layers(
            AdapterResnet(width, last_kernel=3 if light else 1) for _ in range(config.layers)
        )
        self.out_conv = Conv(width, out_channels, kernel=1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.halve:  # rounded up, as the U-Net does
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        if self.in_conv is not None:
            x = self.in_conv(x)
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.out_conv is None else self.out_conv(x)


class AdapterResnet(nn.Module):
    """x + block2(relu(block1(x)))."""

    def __init__(self, channels: int, last_kernel: int) -> None:
        super().__init__()
        self.block1 = Conv(channels, channels)
        self.block2 = Conv(channels, channels, kernel=last_kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x)), residual=x)


def feature_places(unet: UNetConfig) -> tuple[tuple[int, int], ...]:
    """Where a U-Net adds features, see `UNetEncoder.encode`: the channels of each place, and its latents per value, in
    each direction."""
    places = []
    for i, level in enumerate(unet.down):
        halved = level.depths[0] is None and i < unet.levels - 1
        places.append((level.channels, 2 ** (i + halved)))
    return (*places, *([(unet.mid.channels, unet.stride)] if unet.mid.depths else []))
