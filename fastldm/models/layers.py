"""The layers that the networks share. Network ops reach fastldm.kernels through this module only.

Layers hold parameters under diffusers' and transformers' names and leave them uninitialised: a network is built on the
meta device and given a checkpoint's weights. Images are (B, C, H, W) in channels-last memory, so that their pixels as
tokens, (B, H*W, C), are a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.kernels.attention import attention
from fastldm.kernels.conv import conv2d, upsample_conv2d
from fastldm.kernels.conv_group_norm import conv_group_norm
from fastldm.kernels.dispatch import device_type
from fastldm.kernels.fp8 import E4M3, linear_fp8, quantize
from fastldm.kernels.geglu import geglu
from fastldm.kernels.group_norm import add_group_norm, group_norm
from fastldm.kernels.layer_norm import add_layer_norm, layer_norm
from fastldm.kernels.linear import fast_library, linear, linear_geglu
from fastldm.kernels.lora import Places, Rows, add_conv, add_lora, lora_geglu, lora_linear

M = TypeVar("M", bound=nn.Module)


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) in channels-last memory, which all layers preserve."""
    return x.contiguous(memory_format=torch.channels_last)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, height: int) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), a view in channels-last memory."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class Layers(nn.ModuleList, Generic[M]):
    """An nn.ModuleList with a type for its items."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Beside:
    """Of a network: the adapters that the rows of the call under way have beside the weights."""

    rows: Rows | Places | None = None
    """None for none: the layers are as without."""

    @contextmanager
    def having(self, rows: Rows | Places | None) -> Iterator[None]:
        """Inside, calls of the network have these."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None


class LowRank(NamedTuple):
    """The pages of adapters of a layer, see kernels/lora.py; those of layers that are one product are one."""

    down: Tensor
    """(P, J, 16, I), or (P, 16, C, kh, kw) of a convolution; of places without P, and R for 16."""
    up: Tensor
    """(P, J * O, 16), the same."""
    beside: Beside


class Adaptable(nn.Module):
    """A layer that may have adapters beside its weight. low_rank: set by runtime/pages.py, and by export/reference.py
    while it traces."""

    low_rank: LowRank | None = None

    @property
    def adapters(self) -> tuple[Tensor, Tensor, Rows | Places] | None:
        """Pages down and up, and the rows' adapters; None where there are none now."""
        own = self.low_rank
        return None if own is None or own.beside.rows is None else (own.down, own.up, own.beside.rows)


class EightBits(NamedTuple):
    """What a linear layer multiplies by in place of its weight, see kernels/fp8.py."""

    weight: Tensor  # (O, I) e4m3
    scale: Tensor  # (O,) float32, of the input and the weight's row
    x_scale: float  # of the input alone

    def quantized(self, x: Tensor) -> Tensor:
        """The input in e4m3, unless the layer before has written it so."""
        return x if x.dtype == E4M3 else quantize(x.contiguous(), self.x_scale)


class Linear(Adaptable):
    """eight_bits: set by runtime/eight_bits.py, on demand."""

    eight_bits: EightBits | None = None

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = parameter(out_channels, in_channels)
        self.bias = parameter(out_channels) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.adapters is not None:
            return self._adapted(self.adapters, x, self.bias, residual)
        if self.eight_bits is not None:
            return self._multiply(self.eight_bits, x, self.bias, residual)
        return linear(x, self.weight, self.bias, residual=residual)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x weight^T, without the bias, possibly in the residual's memory."""
        if self.adapters is not None:
            return self._adapted(self.adapters, x, None, residual)
        if self.eight_bits is not None:
            return self._multiply(self.eight_bits, x, None, residual)
        return linear(x, self.weight, residual=residual, overwrite=True)

    def _adapted(
        self, adapters: tuple[Tensor, Tensor, Rows | Places], x: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        if self.eight_bits is not None:
            return add_lora(self._multiply(self.eight_bits, x, bias, residual), x, *adapters)
        return lora_linear(x, self.weight, bias, *adapters, residual=residual)

    def _multiply(self, by: EightBits, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return linear_fp8(by.quantized(x), by.weight, by.scale, bias, dtype=self.weight.dtype, residual=residual)


def scale_for(reader: Linear | None) -> float | None:
    """The scale that a layer's input is written with in eight bits, if it multiplies by such and reads it for nothing
    else."""
    if reader is None or reader.eight_bits is None or reader.adapters is not None:
        return None
    return reader.eight_bits.x_scale


def project(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """x (B, N, I) through all layers, their outputs concatenated: (B, N, O1 + O2 + ...). One matrix product."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = stacked(biases) if biases else None
    adapters = layers[0].adapters
    parts = [layer.eight_bits for layer in layers if layer.eight_bits is not None]
    if len(parts) == len(layers):  # they read the same x, and so have the same scale of it
        weight, scale = stacked([part.weight for part in parts]), stacked([part.scale for part in parts])
        out = linear_fp8(parts[0].quantized(x), weight, scale, bias, dtype=layers[0].weight.dtype)
        return out if adapters is None else add_lora(out, x, *adapters)
    weight = stacked([layer.weight for layer in layers])
    return linear(x, weight, bias) if adapters is None else lora_linear(x, weight, bias, *adapters)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors concatenated along their first dimension: a view if they are adjacent in memory (as loading/prepare.py
    arranges them), else a copy. Only the memory layout is checked, so replaced tensors are always read."""
    first, *rest = tensors
    end = first.storage_offset() + first.numel()
    for other in rest:
        if (
            torch.compiler.is_compiling()  # which cannot see addresses, and folds constants
            or other.untyped_storage()._cdata != first.untyped_storage()._cdata
            or other.storage_offset() != end
            or not (first.is_contiguous() and other.is_contiguous())
        ):
            return torch.cat(list(tensors))
        end += other.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class Pointwise(Adaptable):
    """A 1x1 convolution in the checkpoint, applied to tokens (B, N, C) as a linear layer."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = parameter(out_channels, in_channels, 1, 1)
        self.bias = parameter(out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.adapters is not None:
            return lora_linear(x, self.weight.flatten(1), self.bias, *self.adapters, residual=residual)
        return linear(x, self.weight.flatten(1), self.bias, residual=residual)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """As `Linear.add_to`."""
        if self.adapters is not None:
            return lora_linear(x, self.weight.flatten(1), None, *self.adapters, residual=residual)
        return linear(x, self.weight.flatten(1), residual=residual, overwrite=True)


class Pending:
    """The output of a convolution that has not run: the GroupNorm that reads it first runs both as one op. Where none
    does, `as_tensor` runs it. Until then, neither its input nor the residual may be written.
    """

    def __init__(
        self, conv: Conv, x: Tensor, padding: int, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        self.conv, self.x, self.padding, self.bias, self.residual = conv, x, padding, bias, residual
        self.output: Tensor | None = None


def as_tensor(x: Tensor | Pending) -> Tensor:
    if not isinstance(x, Pending):
        return x
    if x.output is None:
        options: dict[str, Any] = {"stride": x.conv.stride, "padding": x.padding, "residual": x.residual}
        x.output = conv2d(x.x, x.conv.weight, x.bias, **options)
    return x.output


class Conv(Adaptable):
    """A convolution with an odd kernel that preserves height and width, or divides them by its stride, rounded up."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, bias: bool = True, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.weight = parameter(out_channels, in_channels, kernel, kernel)
        self.weight.data = channels_last(self.weight.data)  # as loading.prepare lays weights out
        self.bias = parameter(out_channels) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.weight.shape[-1] // 2
        return self.adapt(conv2d(x, self.weight, self.bias, stride=self.stride, padding=padding, residual=residual), x)

    def pending(self, x: Tensor, residual: Tensor | None = None, padding: int | None = None) -> Tensor | Pending:
        """As `forward`, which on a GPU waits for who reads it; not where adapters add to it."""
        pending = Pending(self, x, self.weight.shape[-1] // 2 if padding is None else padding, self.bias, residual)
        return pending if fast_library(x) and self.adapters is None else self.adapt(as_tensor(pending), x, padding)

    def adapt(self, out: Tensor, x: Tensor, padding: int | None = None) -> Tensor:
        """The convolution's output (B, O, H', W') of x, plus what adapters add, possibly in place."""
        if self.adapters is not None:
            padding = self.weight.shape[-1] // 2 if padding is None else padding
            return add_conv(out, x, *self.adapters, self.stride, padding)
        return out


class GroupNorm(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = parameter(channels), parameter(channels)
        self.groups, self.eps = groups, eps

    def forward(
        self,
        x: Tensor | Pending,
        *,
        silu: bool = False,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> Tensor:
        """affine (B, 2C): weight | bias of each row of x, in place of the norm's own."""
        if isinstance(x, Pending) and x.output is None:
            x.output, out = self.add(x, silu=silu, shift=shift, skip=skip, affine=affine)
            return out
        weight, bias = (self.weight, self.bias) if affine is None else affine.chunk(2, dim=1)
        return group_norm(as_tensor(x), self.groups, weight, bias, self.eps, silu=silu, shift=shift, skip=skip)

    def add(
        self,
        x: Tensor | Pending,
        *,
        silu: bool = False,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        ahead: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (+ ahead), and x normalised, as `forward` does. shift: only of what is pending."""
        weight, bias = (self.weight, self.bias) if affine is None else affine.chunk(2, dim=1)
        norm = (self.groups, weight, bias, self.eps)
        if isinstance(x, Pending) and x.output is None:
            terms = (x.x, x.conv.weight, x.bias, x.residual)
            options: dict[str, Any] = {"stride": x.conv.stride, "padding": x.padding, "shift": shift}
            return conv_group_norm(*terms, *norm, silu=silu, skip=skip, ahead=ahead, **options)
        return add_group_norm(as_tensor(x), None, None, *norm, silu=silu, skip=skip, ahead=ahead)


class LayerNorm(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = parameter(channels), parameter(channels)
        self.eps = eps

    def forward(self, x: Tensor, then: Linear | None = None) -> Tensor:
        """then: the layer that alone reads the output, which is in its eight bits if it multiplies by such."""
        return layer_norm(x, self.weight, self.bias, self.eps, out_scale=scale_for(then))

    def add(
        self, x: Tensor, residual: Tensor, ahead: Tensor | None = None, then: Linear | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + residual (+ ahead), and x + residual normalised, as `forward` does."""
        out_scale = scale_for(then)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, ahead=ahead, out_scale=out_scale)


class Resnet(nn.Module):
    """Two normalised convolutions around a residual; diffusers' ResnetBlock2D.

    In a U-Net (resnet.py), channels that depend on the timestep are added between them: `shift` (B, out_channels). It
    includes conv1's bias (see UNet.time_rows), so conv1 runs without. A U-Net's decoder passes a part of the input as
    `skip`. norm: applies a GroupNorm, by default as usual; tiled decoding uses shared statistics.
    """

    conv_shortcut: Conv | None

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, kernel=1)

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        norm: Callable[..., Tensor] = GroupNorm.__call__,
    ) -> Tensor:
        return as_tensor(self.pending(x, shift, skip, norm))

    def pending(
        self,
        x: Tensor | Pending,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        norm: Callable[..., Tensor] = GroupNorm.__call__,
    ) -> Tensor | Pending:
        """As `forward`, whose last convolution on a GPU waits for who reads it."""
        h = norm(self.norm1, x, silu=True, skip=skip)
        bias = self.conv1.bias if shift is None else None
        if bias is not None and device_type(h) != "cpu":
            # On a GPU, a convolution adds the bias in a separate pass, while the norm fuses it.
            shift, bias = bias.expand(h.shape[0], -1), None
        inner: Tensor | Pending = Pending(self.conv1, h, 1, bias)
        if norm is not GroupNorm.__call__ or self.conv1.adapters is not None or not fast_library(h):
            inner = self.conv1.adapt(as_tensor(inner), h)
        h = norm(self.norm2, inner, silu=True, shift=shift)
        return self.conv2.pending(h, residual=self.shortcut(as_tensor(x), skip))

    def shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """x, or a 1x1 convolution of x and skip: one matrix product for each, so that they are not concatenated."""
        if self.conv_shortcut is None:
            return x
        weight = self.conv_shortcut.weight.flatten(1)  # (out, in)
        out = linear(to_tokens(x), weight[:, : x.shape[1]], self.conv_shortcut.bias)
        if skip is not None:
            out = linear(to_tokens(skip), weight[:, x.shape[1] :], residual=out, overwrite=True)
        if self.conv_shortcut.adapters is not None:
            inputs = [to_tokens(x)] if skip is None else [to_tokens(x), to_tokens(skip)]
            out = add_lora(out, torch.cat(inputs, dim=-1), *self.conv_shortcut.adapters)
        return to_image(out, x.shape[2])


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2; padding 0 pads one row below and one column right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, stride=2)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return as_tensor(self.pending(x))

    def pending(self, x: Tensor) -> Tensor | Pending:
        """As `forward`, which on a GPU waits for who reads it."""
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv.pending(x, padding=self.padding)


class Upsample(nn.Module):
    """Enlarge to `size` (height, width), by default twice the size, by nearest neighbour, and convolve.

    phases: of the convolution's weight, if `fastldm.loading.prepare` has cached them.
    """

    phases: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)
        self.register_buffer("phases", None, persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        out = upsample_conv2d(x, self.conv.weight, self.conv.bias, size, phases=self.phases)
        return out if self.conv.adapters is None else self.conv.adapt(out, F.interpolate(x, size, mode="nearest"))


class PictureKV(NamedTuple):
    """What R consecutive rows of a cross-attention read beside the text, with a softmax of its own: an IP-Adapter's."""

    kv: Tensor  # (P, T, 2C), keys | values, of P rows or slots
    kv_len: Tensor | None  # (P,) int32
    slots: Tensor | None  # (R,) int32
    rows: slice


class Attention(nn.Module):
    """Multi-head attention of q (B, N, channels) over k and v (S, M, channels), and its output projection.

    The caller projects: `qkv` for self-attention; `to_q` and, once per text, `kv` for cross-attention.
    kv_len and slots as in `kernels.attention`: the number of keys of each of S texts, and the text of each of B rows.
    perturbed (B,) bool: the rows in which each pixel attends to itself alone, of perturbed-attention guidance.
    """

    by_qkv = False
    """Whether the caller projects by `qkv` alone."""

    def __init__(self, channels: int, heads: int, context: int, bias: bool = False) -> None:
        super().__init__()
        self.to_q = Linear(channels, channels, bias)
        self.to_k = Linear(context, channels, bias)
        self.to_v = Linear(context, channels, bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])  # to_out.1 is a dropout in diffusers
        self.heads = heads

    @property
    def packed(self) -> tuple[str, ...]:
        """The projections that are one product in each step, or for each text: loading/prepare.py stacks them."""
        self_attention = self.to_q.weight.shape == self.to_k.weight.shape
        return ("to_q", "to_k", "to_v") if self_attention else ("to_k", "to_v")

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x (B, N, channels), by one matrix product."""
        return project(x, (self.to_q, self.to_k, self.to_v)).chunk(3, dim=-1)

    def kv(self, context: Tensor) -> Tensor:
        """Keys | values of context (S, M, D): (S, M, 2 * channels)."""
        return project(context, (self.to_k, self.to_v))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        residual: Tensor | None = None,
        kv_len: Tensor | None = None,
        slots: Tensor | None = None,
        pictures: Sequence[PictureKV] = (),
        perturbed: Tensor | None = None,
    ) -> Tensor:
        out = attention(q, k, v, self.heads, kv_len=kv_len, slots=slots)
        if perturbed is not None:
            out = torch.where(perturbed[:, None, None], v, out)
        if pictures and out.requires_grad:
            out = out.clone()  # autograd keeps the attention's own
        for own in pictures:
            keys, values = own.kv.chunk(2, dim=-1)
            out[own.rows] += attention(q[own.rows], keys, values, self.heads, kv_len=own.kv_len, slots=own.slots)
        return self.to_out[0](out, residual=residual)


class GEGLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor, then: Linear | None = None) -> Tensor:
        """then: the layer that reads the output, which is written in its eight bits if it multiplies by such."""
        by, adapters = self.proj.eight_bits, self.proj.adapters
        if adapters is not None:
            if by is not None:
                return geglu(self.proj(x))
            return lora_geglu(x, self.proj.weight, self.proj.bias, *adapters)
        if by is None:
            return linear_geglu(x, self.proj.weight, self.proj.bias)
        options: dict[str, Any] = {"dtype": self.proj.weight.dtype, "gated": True, "out_scale": scale_for(then)}
        return linear_fp8(by.quantized(x), by.weight, by.scale, self.proj.bias, **options)
