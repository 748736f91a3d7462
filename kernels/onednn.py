"""Weights in the layout that oneDNN's kernels want, kept between calls: for CPUs.

On a CPU PyTorch hands convolutions and products to oneDNN, whose kernels read the weight in blocks. The plain ops bring
it into that layout at each call and throw it away: 59 MB of bfloat16 take 20 ms, longer than the product itself where
pixels are few. The ops that PyTorch's compiler emits take a weight that is in blocks already, and compute the same.
(Float32 products are MKL's otherwise, which rounds in another order and takes up to twice as long.)

    Layouts(weights)      keeps layouts of what lies in the memory of these weights, each made when it is first needed
    convolve, product     with a kept layout, or None where none is kept or keeping it would not pay

A layout is as large as its weight, and is a copy: `Layouts.stale` says whether a weight has changed since, and
`Layouts.drop_stale` forgets what was made of it.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastldm import spans

# Rows of x up to which a layout is kept: beyond, the product is so much work that making the layout is 2% of it. And
# bytes of a weight from which one is kept: below, it stays in the processor's cache and costs next to nothing. (Of the
# default model's step in bfloat16, layouts of all weights take 7% off, of those from here on 6%, and from 1 MiB on 0.)
_ROWS = 2048
_BYTES = 1 << 18
_SERVED = "oneDNN: its layout of the weight is kept"


class _Kept:
    """The layout of a weight that the first call with it wants. A call that wants another takes the plain path, for its
    kernel would bring the one into the other each time, which may take a hundred times as long as its work.
    """

    def __init__(self, weight: Tensor, make: Callable[..., Tensor], how: tuple[int, ...]) -> None:
        self.weight = weight.detach()
        self.sums = row_sums(self.weight)
        self.layout = make(self.weight, *how)
        self.serves = {(make, how): True}

    def get(self, make: Callable[..., Tensor], how: tuple[int, ...]) -> Tensor | None:
        serves = self.serves.get((make, how))
        if serves is None:
            serves = torch.equal(_format(make(self.weight, *how)), _format(self.layout))
            self.serves[make, how] = serves
        return self.layout if serves else None

    def fresh(self) -> bool:
        return torch.equal(row_sums(self.weight), self.sums)


class Layouts:
    """The layouts of some weights. It holds their memory, so an address of theirs is never another's."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._kept: dict[tuple[object, ...], _Kept] = {}
        for weight in self._weights:
            _owners[_storage(weight)] = self

    def get(self, weight: Tensor, make: Callable[..., Tensor], *how: int) -> Tensor | None:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(weight, make, how)
        return kept.get(make, how)

    def stale(self) -> bool:
        """Whether a weight is not what its layout was made of."""
        return not all(kept.fresh() for kept in list(self._kept.values()))

    def drop_stale(self) -> list[Tensor]:
        """Forget the layouts of weights that changed, which are made anew when needed, and say whose they were."""
        stale = [key for key, kept in self._kept.items() if not kept.fresh()]
        return [self._kept.pop(key).weight for key in stale]

    @property
    def nbytes(self) -> int:
        """Bytes of all layouts that were made so far."""
        return sum(kept.weight.nbytes for kept in self._kept.values())


def worth_keeping(weight: Tensor) -> bool:
    """Whether a weight is so large that its layout may be kept."""
    return weight.numel() * weight.element_size() >= _BYTES


_owners: WeakValueDictionary[int, Layouts] = WeakValueDictionary()  # by the address of a storage


def _storage(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def _layouts(x: Tensor, weight: Tensor, rows: int) -> Layouts | None:
    if not _owners or rows > _ROWS or not worth_keeping(weight) or x.dtype != weight.dtype:
        return None
    if x.requires_grad or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None  # these ops know no gradient, and whoever records wants the plain ones
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
    layout = layouts and layouts.get(weight, _of_matrix)
    if layout is None:
        return None
    spans.served(_SERVED)
    return torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor | None:
    """F.conv2d(x, weight, bias, stride, padding) of channels-last x (B, C, H, W)."""
    layouts = _layouts(x, weight, x.shape[0] * x.shape[2] * x.shape[3] // stride**2)
    if layouts is None or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    layout = layouts.get(weight, _of_filters, stride, padding, *x.shape)
    if layout is None:
        return None
    spans.served(_SERVED)
    edges, steps, ones = [padding, padding], [stride, stride], [1, 1]
    return torch.ops.mkldnn._convolution_pointwise(x, layout, bias, edges, steps, ones, 1, "none", [], "")


def _of_matrix(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # one serves products of any size


def _of_filters(weight: Tensor, stride: int, padding: int, *size: int) -> Tensor:
    edges, steps = [padding, padding], [stride, stride]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, edges, steps, [1, 1], 1, list(size))


def _format(layout: Tensor) -> Tensor:
    return torch.ops.mkldnn._get_mkldnn_serialized_md(layout)


def row_sums(x: Tensor) -> Tensor:
    """Of each row of x (O, ...) what its bits, read as integers, add up to: (O,) int64. A change is seen in it unless
    it keeps the sum of every row.
    """
    x = x.detach()
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)  # the order in memory
    unit = 8 // x.element_size()
    if x.is_contiguous() and x.shape[-1] % unit == 0 and x.storage_offset() % unit == 0:
        bits = x.view(torch.int64)  # several numbers at once: a CPU sums that 30 times as fast
    else:
        bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    if x.dim() == 1:
        return bits.to(torch.int64)
    return bits.sum(tuple(range(1, bits.dim())), dtype=torch.int64)
