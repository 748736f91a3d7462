"""What a run would have in memory, from a run on tensors without storage.

`record` watches storages come and go; `Heap` and `CUDAHeap` say what an allocator would hold for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Trace = tuple[tuple[int, int], ...]  # in order: (storage, its bytes) where one came to be, (storage, -1) where it went

MIB = 2**20


def record(function: Callable[[], object]) -> Trace:
    """The storages that ops of `work` make, as they come and go. It runs on the meta device.

    What an op takes and gives back within itself is not seen: libraries' workspaces, and some scratch of ATen's.
    """
    watch = _Watch()
    with watch, _FusedAttention():
        function()
    return tuple(watch.trace)


class _Watch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be skipped, the method would be wrapped in torch._dynamo, which takes a second to import

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[int, int]] = []
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        for tensor, returned in zip(tensors, func._schema.returns, strict=False):
            if isinstance(tensor, Tensor) and returned.alias_info is None:  # no view, and not written in place
                self._came(tensor.untyped_storage())
        return out

    def _came(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive or storage.nbytes() == 0:  # _unsafe_view is a view that does not say so
            return
        name = len(self.trace)
        self.trace.append((name, storage.nbytes()))
        self._alive[storage._cdata] = weakref.ref(storage, partial(self._went, storage._cdata, name))

    def _went(self, address: int, name: int, _: object) -> None:
        del self._alive[address]
        self.trace.append((name, -1))


class _FusedAttention(TorchFunctionMode):
    """Every device that runs this has an attention that writes no scores; the meta device has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _, v = args[:3]
        batch, heads, queries, _ = q.shape
        out = q.new_empty((batch, queries, heads, v.shape[-1]))
        _ = q.new_empty((batch, heads, queries), dtype=torch.float32)  # logarithms of sums, made for a backward pass
        return out.transpose(1, 2)


class Heap:
    """An allocator that holds what is alive: that of a CPU."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[object, int] = {}

    @property
    def held(self) -> int:
        """The most bytes that were taken from the device."""
        return self.peak

    def take(self, name: object, size: int) -> None:
        self._sizes[name] = size
        self.live += size
        self.peak = max(self.peak, self.live)

    def give(self, name: object) -> None:
        self.live -= self._sizes.pop(name)

    def hold(self, sizes: Iterable[int]) -> int:
        """Takes these for good. Their bytes, rounded as the allocator does."""
        before = self.live
        for size in sizes:
            if size:
                self.take(object(), size)
        return self.live - before

    def run(self, trace: Trace) -> int:
        """All of a trace; what is alive at its end goes too. The most bytes that were alive in it, of its own."""
        before, self.peak, peak_before = self.live, self.live, self.peak
        names: dict[int, object] = {}
        for name, size in trace:
            if size < 0:
                self.give(names.pop(name))
            else:
                names[name] = object()
                self.take(names[name], size)
        for remaining in names.values():
            self.give(remaining)
        most, self.peak = self.peak - before, max(peak_before, self.peak)
        return most


class _Block:
    """Bytes of a segment, and the blocks before and behind it there."""

    __slots__ = ("before", "behind", "free", "size")

    def __init__(self, size: int, before: _Block | None = None, behind: _Block | None = None) -> None:
        self.size, self.before, self.behind, self.free = size, before, behind, False


class CUDAHeap(Heap):
    """PyTorch's caching allocator for GPUs, with its default settings (c10/cuda/CUDACachingAllocator.cpp).

    A size is rounded to 512 bytes. Up to 1 MiB come from segments of 2 MiB, less than 10 MiB from segments of 20 MiB,
    and more from a segment of its own, rounded to 2 MiB. The smallest free block that is large enough is taken, and
    split if 512 bytes or more, in large segments more than 1 MiB, are left. Free neighbours become one. Segments are
    kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reserved = 0
        self._blocks: dict[object, _Block] = {}
        self._free: tuple[set[_Block], set[_Block]] = (set(), set())  # of small segments, of large ones

    @property
    def held(self) -> int:
        return self.reserved

    def take(self, name: object, size: int) -> None:
        size = -(-size // 512) * 512
        super().take(name, size)
        small = size <= MIB
        pool = self._free[not small]
        block = min((free for free in pool if free.size >= size), key=lambda free: free.size, default=None)
        if block is None:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            block = _Block(segment)
            self.reserved += segment
        else:
            pool.remove(block)
        block.free = False
        if block.size - size >= 512 if small else block.size - size > MIB:
            rest = _Block(block.size - size, block, block.behind)
            if rest.behind is not None:
                rest.behind.before = rest
            block.behind, block.size, rest.free = rest, size, True
            pool.add(rest)
        self._blocks[name] = block

    def give(self, name: object) -> None:
        size = self._sizes[name]
        super().give(name)
        block, pool = self._blocks.pop(name), self._free[size > MIB]
        if block.before is not None and block.before.free:
            block = self._joined(block.before, block, pool)
        if block.behind is not None and block.behind.free:
            block = self._joined(block, block.behind, pool)
        block.free = True
        pool.add(block)

    def _joined(self, first: _Block, second: _Block, pool: set[_Block]) -> _Block:
        pool.discard(first)
        pool.discard(second)
        first.size += second.size
        first.behind = second.behind
        if first.behind is not None:
            first.behind.before = first
        return first
