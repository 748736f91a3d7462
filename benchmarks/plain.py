"""A U-Net in plain PyTorch: channels first, no fused op, text and time computed again at each step. It stands for
"eager" where diffusers is not installed, and is checked against fastldm's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.models.layers import Attention, Linear, Pointwise, Resnet
from fastldm.models.transformer import Transformer
from fastldm.models.unet import AddedConditions, UNet


class PlainUNet:
    """The weights of a fastldm U-Net, which are shared but for convolutions, channels first."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self.weights = {name: p.detach().contiguous() for name, p in unet.named_parameters() if p.ndim == 4}
        self.names = {id(module): name for name, module in unet.named_modules()}

    def __call__(
        self, model_input: Tensor, timesteps: Tensor, text: Tensor, added: AddedConditions | None = None
    ) -> Tensor:
        """model_input (B, Cin, H, W), timesteps (B,), text (B, T, D) -> (B, Cout, H, W)"""
        unet = self.unet
        widths = [resnet.row_channels for resnet in unet.row_readers()]
        rows = iter(unet.time_rows(timesteps, added=added).split(widths, dim=1))
        x = self.conv(unet.conv_in, model_input.contiguous())
        skips = [x]
        for block in unet.down_blocks:
            for resnet, transformer in block.layers():
                x = self.layer(x, rows, text, resnet, transformer)
                skips.append(x)
            for down in block.downsamplers:
                x = F.pad(x, (0, 1, 0, 1)) if down.padding == 0 else x
                x = self.conv(down.conv, x, stride=2, padding=down.padding)
                skips.append(x)
        for resnet, transformer in unet.mid_block.layers():
            x = self.layer(x, rows, text, resnet, transformer)
        for block in unet.up_blocks:
            for resnet, transformer in block.layers():
                x = self.layer(torch.cat((x, skips.pop()), 1), rows, text, resnet, transformer)
            for up in block.upsamplers:
                x = self.conv(up.conv, F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv(unet.conv_out, self.norm(unet.conv_norm_out, x))

    def layer(
        self, x: Tensor, rows: Iterator[Tensor], text: Tensor, resnet: Resnet, transformer: Transformer | None
    ) -> Tensor:
        h = F.conv2d(self.norm(resnet.norm1, x), self.weights[f"{self.names[id(resnet)]}.conv1.weight"], padding=1)
        h = self.conv(resnet.conv2, self.norm(resnet.norm2, h + next(rows)[:, :, None, None]))
        x = h + (x if resnet.conv_shortcut is None else self.conv(resnet.conv_shortcut, x, padding=0))
        return x if transformer is None else self.transform(transformer, x, text)

    def conv(self, conv: torch.nn.Module, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        weight = self.weights[f"{self.names[id(conv)]}.weight"]
        return F.conv2d(x, weight, conv.bias, stride, padding)  # type: ignore[arg-type]

    def norm(self, norm: torch.nn.Module, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps))  # type: ignore[arg-type]

    def transform(self, transformer: Transformer, x: Tensor, text: Tensor) -> Tensor:
        norm, (batch, channels, height, width) = transformer.norm, x.shape
        h = F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
        tokens = self.project(transformer.proj_in, h.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
        for layer in transformer.transformer_blocks:
            for norm_, attention, context in ((layer.norm1, layer.attn1, None), (layer.norm2, layer.attn2, text)):
                h = F.layer_norm(tokens, (channels,), norm_.weight, norm_.bias, norm_.eps)
                tokens = tokens + self.attend(attention, h, h if context is None else context)
            h = F.layer_norm(tokens, (channels,), layer.norm3.weight, layer.norm3.bias, layer.norm3.eps)
            value, gate = self.project(layer.ff.net["0"].proj, h).chunk(2, -1)  # type: ignore[arg-type]
            tokens = tokens + self.project(layer.ff.net["2"], value * F.gelu(gate))
        out = self.project(transformer.proj_out, tokens)
        return x + out.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()

    def attend(self, attention: Attention, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            self.project(layer, source).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer, source in ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
        )
        return self.project(attention.to_out[0], F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def project(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, Linear | Pointwise)
        return F.linear(x, layer.weight.flatten(1), layer.bias)
