"""Weights in oneDNN's blocked layout, cached between calls: for CPUs.

On a CPU PyTorch calls oneDNN for convolutions and products, whose kernels read the weight in blocks. PyTorch's usual
ops convert it at each call and discard the copy: 59 MB of bfloat16 take 20 ms, longer than the product itself where
pixels are few. The ops that PyTorch's compiler emits take a weight that is in blocks already, and compute the same.
(Float32 products are MKL's otherwise, which rounds in another order and takes up to twice as long.)

    Layouts(weights)      caches layouts of tensors in the memory of these weights, converted when first needed
    convolve, product     with a cached layout, or None where there is none or caching it is not worth it

A layout is a copy as large as its weight: `Layouts.stale` tells whether a weight has changed since, and
`Layouts.drop_stale` drops the layouts of those that have.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastldm import spans
from fastldm.kernels.dispatch import needs_gradient

# Rows of x up to which a layout is cached: beyond, converting takes 2% of the product's time. And the bytes of a weight
# from which one is cached: below, it stays in the processor's cache and converting costs next to nothing. (Of the
# default model's step in bfloat16, layouts of all weights save 7%, those from here on 6%, and from 1 MiB on 0.)
_ROWS = 2048
_BYTES = 1 << 18
_SERVED = "oneDNN: its layout of the weight is kept"


class _CachedLayout:
    """The layout of a weight that its first call needs. A call that needs another takes PyTorch's usual op, for its
    kernel would convert the layout each time, which may take a hundred times as long as the product.
    """

    def __init__(self, weight: Tensor, make: Callable[..., Tensor], options: tuple[int, ...]) -> None:
        self.weight = weight.detach()
        self.sums = row_sums(self.weight)
        self.layout = make(self.weight, *options)
        self.serves = {(make, options): True}

    def get(self, make: Callable[..., Tensor], options: tuple[int, ...]) -> Tensor | None:
        serves = self.serves.get((make, options))
        if serves is None:
            serves = torch.equal(_format(make(self.weight, *options)), _format(self.layout))
            self.serves[make, options] = serves
        return self.layout if serves else None

    def fresh(self) -> bool:
        return torch.equal(row_sums(self.weight), self.sums)


class Layouts:
    """The layouts of some weights. It holds references to the weights, so their addresses are not reused."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._cached: dict[tuple[object, ...], _CachedLayout] = {}
        for weight in self._weights:
            _owners[_storage(weight)] = self

    def get(self, weight: Tensor, make: Callable[..., Tensor], *options: int) -> Tensor | None:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        cached = self._cached.get(key)
        if cached is None:
            cached = self._cached[key] = _CachedLayout(weight, make, options)
        return cached.get(make, options)

    def stale(self) -> bool:
        """Whether a weight has changed since its layout was converted."""
        return not all(cached.fresh() for cached in list(self._cached.values()))

    def drop_stale(self) -> list[Tensor]:
        """Drop the layouts of weights that changed, which are converted again when needed. Returns those weights."""
        stale = [key for key, cached in self._cached.items() if not cached.fresh()]
        return [self._cached.pop(key).weight for key in stale]

    @property
    def nbytes(self) -> int:
        """Bytes of all cached layouts."""
        return sum(cached.weight.nbytes for cached in self._cached.values())


def worth_caching(weight: Tensor) -> bool:
    """Whether a weight is so large that its layout may be cached."""
    return weight.numel() * weight.element_size() >= _BYTES


_owners: WeakValueDictionary[int, Layouts] = WeakValueDictionary()  # by the address of a storage


def _storage(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def _layouts(x: Tensor, weight: Tensor, rows: int) -> Layouts | None:
    if not _owners or needs_gradient(x) or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None  # these ops have no gradient, and a traced call, whose rows are a symbol, must have the usual ones
    if rows > _ROWS or not worth_caching(weight) or x.dtype != weight.dtype:
        return None
    return _owners.get(_storage(weight)) if _available(x.dtype) else None


@functools.cache
def _available(dtype: torch.dtype) -> bool:
    names = (
        "_linear_pointwise",
        "_convolution_pointwise",
        "_reorder_linear_weight",
        "_reorder_convolution_weight",
        "_get_mkldnn_serialized_md",
        "_is_mkldnn_bf16_supported",
    )
    ops = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64") or not all(hasattr(ops, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x weight^T + bias: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    layouts = _layouts(x, weight, x.numel() // x.shape[-1])
    layout = layouts and layouts.get(weight, _matrix_layout)
    if layout is None:
        return None
    spans.served(_SERVED)
    return torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor | None:
    """F.conv2d(x, weight, bias, stride, padding) of channels-last x (B, C, H, W)."""
    layouts = _layouts(x, weight, x.shape[0] * x.shape[2] * x.shape[3] // stride**2)
    if layouts is None or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    layout = layouts.get(weight, _filter_layout, stride, padding, *x.shape)
    if layout is None:
        return None
    spans.served(_SERVED)
    paddings, strides, dilation = [padding, padding], [stride, stride], [1, 1]
    return torch.ops.mkldnn._convolution_pointwise(x, layout, bias, paddings, strides, dilation, 1, "none", [], "")


def _matrix_layout(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # one layout for products of any size


def _filter_layout(weight: Tensor, stride: int, padding: int, *size: int) -> Tensor:
    paddings, strides = [padding, padding], [stride, stride]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, paddings, strides, [1, 1], 1, list(size))


def _format(layout: Tensor) -> Tensor:
    return torch.ops.mkldnn._get_mkldnn_serialized_md(layout)


def row_sums(x: Tensor) -> Tensor:
    """For each row of x (O, ...) the sum of its bits, read as integers: (O,) int64. It detects any change that does not
    keep the sum of every row.
    """
    x = x.detach()
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)  # the order in memory
    unit = 8 // x.element_size()
    if x.is_contiguous() and x.shape[-1] % unit == 0 and x.storage_offset() % unit == 0:
        bits = x.view(torch.int64)  # several numbers at once: 30 times as fast on a CPU
    else:
        bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    if x.dim() == 1:
        return bits.to(torch.int64)
    return bits.sum(tuple(range(1, bits.dim())), dtype=torch.int64)
