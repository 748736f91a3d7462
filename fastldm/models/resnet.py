"""The resnets of a U-Net, into which time enters, and the fixed blur by which some U-Nets halve and enlarge.

A resnet reads its part of a time row (see `UNet.time_rows`), which is one of three things, folded at admission:

    shift       what is added between its convolutions, with the first one's bias               (B, C)
    scale       weight | bias of its second norm                                                (B, 2C)
    adaptive    weight | bias of its first norm, then of its second                             (B, 2 C_in + 2 C)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.config import Level, UNetConfig
from fastldm.models.layers import (
    Conv,
    GroupNorm,
    Linear,
    Pending,
    Resnet,
    as_tensor,
    channels_last,
    device_type,
    fast_library,
    upsample_conv2d,
)
from fastldm.models.unet_blocks import GROUP_SIZE, Layer


class AdaptiveNorm(GroupNorm):
    """A GroupNorm whose weight and bias are of the time embedding; diffusers' AdaGroupNorm."""

    def __init__(self, groups: int, channels: int, eps: float, time_channels: int) -> None:
        nn.Module.__init__(self)
        self.linear = Linear(time_channels, 2 * channels)
        self.groups, self.eps, self.row_channels = groups, eps, 2 * channels

    def row(self, embedding: Tensor) -> Tensor:
        """`affine` (R, 2C) of embeddings (R, time_channels)."""
        scale, shift = self.linear(embedding).chunk(2, dim=1)
        return torch.cat((1 + scale, shift), dim=1)


class TimedResnet(Resnet):
    """A resnet of a U-Net; diffusers' ResnetBlock2D and ResnetBlockCondNorm2D.

    resize: "down" halves the image between its first norm and its first convolution, and the residual too; "up"
        enlarges both. phases: then, of the first convolution's weight, if `fastldm.loading.prepare` has cached them.
    """

    phases: Tensor | None

    def __init__(
        self, config: UNetConfig, level: Level, layer: Layer, resize: Literal["down", "up"] | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.kind, self.resize, self.act, self.scale = config.time_norm, resize, config.act_fn, level.scale
        self.skip_time_act = level.skip_time_act
        in_channels, time_channels = layer.in_channels + layer.skip, config.time_embedding_dim

        def norm(channels: int, of_level: int) -> GroupNorm:
            if self.kind == "adaptive":
                return AdaptiveNorm(of_level // GROUP_SIZE, channels, config.norm_eps, time_channels)
            return GroupNorm(config.norm_groups, channels, config.norm_eps)

        self.norm1 = norm(in_channels, in_channels)
        self.conv1 = Conv(in_channels, layer.channels)
        if self.kind != "adaptive":
            self.row_channels = layer.channels * (1 if self.kind == "shift" else 2)
            self.time_emb_proj = Linear(time_channels, self.row_channels)
        else:
            self.row_channels = 2 * (in_channels + layer.channels)
        self.norm2 = norm(layer.channels, level.channels)
        self.conv2 = Conv(layer.channels, layer.out_channels)
        self.conv_shortcut = None
        if in_channels != layer.out_channels:
            self.conv_shortcut = Conv(in_channels, layer.out_channels, kernel=1, bias=self.kind != "adaptive")
        self.register_buffer("phases", None, persistent=False)
        self.is_plain = (self.kind, resize, self.act, self.scale) == ("shift", None, "silu", 1)

    @property
    def reads_activated(self) -> bool:
        """Whether `row` reads an embedding's activation, and not the embedding itself."""
        return self.kind != "adaptive" and not self.skip_time_act

    def row(self, embedding: Tensor, activated: Tensor) -> Tensor:
        """Its part (R, row_channels) of rows, of embeddings (R, time_channels), with an activation and without."""
        if isinstance(self.norm1, AdaptiveNorm) and isinstance(self.norm2, AdaptiveNorm):
            return torch.cat((self.norm1.row(embedding), self.norm2.row(embedding)), dim=1)
        row = self.time_emb_proj(embedding if self.skip_time_act else activated)
        if self.kind == "shift":
            return row + self.conv1.bias
        scale, shift = row.chunk(2, dim=1)
        return torch.cat(((1 + scale) * self.norm2.weight, (1 + scale) * self.norm2.bias + shift), dim=1)

    def pending(
        self,
        x: Tensor | Pending,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        norm: Callable[..., Tensor] = GroupNorm.__call__,
        size: tuple[int, int] | None = None,
    ) -> Tensor | Pending:
        """shift: its part of a time row. size: of the output, where it enlarges, by default twice the size."""
        if self.is_plain:
            return super().pending(x, shift, skip, norm)
        first = second = None
        if self.kind == "adaptive" and shift is not None:
            filters, channels = self.conv1.weight.shape[:2]
            (first, second), shift = shift.split((2 * channels, 2 * filters), dim=1), None
        elif self.kind == "scale":
            second, shift = shift, None
        h = self._normalise(self.norm1, x, skip=skip, affine=first)
        x = as_tensor(x)
        bias = self.conv1.bias if shift is None else None
        if bias is not None and device_type(h) != "cpu":  # as in Resnet
            shift, bias = bias.expand(h.shape[0], -1), None
        inner: Tensor | Pending
        if self.resize == "up":
            size = size or (2 * x.shape[2], 2 * x.shape[3])
            x = F.interpolate(x, size, mode="nearest")
            enlarged = upsample_conv2d(h, self.conv1.weight, bias, size, phases=self.phases)
            if self.conv1.adapters is not None:
                enlarged = self.conv1.adapt(enlarged, F.interpolate(h, size, mode="nearest"))
            inner = enlarged
        else:
            if self.resize == "down":
                h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
            inner = Pending(self.conv1, h, 1, bias)
            if self.conv1.adapters is not None or not fast_library(h):
                inner = self.conv1.adapt(as_tensor(inner), h)
        h = self._normalise(self.norm2, inner, shift=shift, affine=second)
        out = self.conv2.pending(h, residual=self.shortcut(x, skip))
        return out if self.scale == 1 else as_tensor(out) / self.scale

    def _normalise(self, norm: GroupNorm, x: Tensor | Pending, **options: Any) -> Tensor:
        """With its activation."""
        if self.act == "silu":
            return norm(x, silu=True, **options)
        return F.gelu(norm(x, **options))


class Blur(nn.Module):
    """Halve or enlarge height and width by a fixed filter, (1, 3, 3, 1) / 8 in each direction; diffusers' KDownsample2D
    and KUpsample2D. Height and width are even, where it halves."""

    def __init__(self, resize: Literal["down", "up"]) -> None:
        super().__init__()
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        channels, times = x.shape[1], 1 if self.resize == "down" else 2
        ones = x.new_ones(1)
        line = torch.cat((ones, 3 * ones, 3 * ones, ones)) * (times / 8)
        weight = torch.outer(line, line).expand(channels, 1, 4, 4)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        if self.resize == "down":
            return channels_last(F.conv2d(x, weight, stride=2, groups=channels))
        return channels_last(F.conv_transpose2d(x, weight, stride=2, padding=3, groups=channels))
