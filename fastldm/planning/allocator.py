"""The memory of a run, from a dry run on tensors without storage.

`record` traces the allocations and releases of storages; `Heap` and `CUDAHeap` simulate an allocator on a trace.
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

Trace = tuple[tuple[int, int], ...]  # in order: (storage, its bytes) for an allocation, (storage, -1) for a release

MIB = 2**20


def record(function: Callable[[], object]) -> Trace:
    """The allocations and releases of the function's ops. It runs on the meta device.

    Temporaries within an op are not recorded: workspaces of libraries, and some of ATen's.
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
            if isinstance(tensor, Tensor) and returned.alias_info is None:  # neither a view nor in place
                self._came(tensor.untyped_storage())
        return out

    def _came(self, storage: torch.UntypedStorage) -> None:
        if (
            storage._cdata in self._alive or storage.nbytes() == 0
        ):  # _unsafe_view is a view whose schema does not declare it
            return
        name = len(self.trace)
        self.trace.append((name, storage.nbytes()))
        self._alive[storage._cdata] = weakref.ref(storage, partial(self._went, storage._cdata, name))

    def _went(self, address: int, name: int, _: object) -> None:
        del self._alive[address]
        self.trace.append((name, -1))


class _FusedAttention(TorchFunctionMode):
    """Attention without a tensor of scores, as on every device but the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _Attended.apply(*args[:3])


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries, _ = q.shape
        out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)
        sums = q.new_empty((batch, heads, queries), dtype=torch.float32)  # their logarithms, for the backward pass
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class Heap:
    """An allocator that holds exactly the live bytes: that of a CPU."""

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
        """Allocate these permanently. Returns their bytes, rounded as the allocator does."""
        before = self.live
        for size in sizes:
            if size:
                self.take(object(), size)
        return self.live - before

    def run(self, trace: Trace) -> int:
        """Run a trace, and release what is alive at its end. Returns the peak of the trace's own live bytes."""
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
    """A block of a segment, and the blocks before and behind it."""

    __slots__ = ("before", "behind", "free", "size")

    def __init__(self, size: int, before: _Block | None = None, behind: _Block | None = None) -> None:
        self.size, self.before, self.behind, self.free = size, before, behind, False


class CUDAHeap(Heap):
    """PyTorch's caching allocator for GPUs, with its default settings (c10/cuda/CUDACachingAllocator.cpp).

    A size is rounded to 512 bytes. Up to 1 MiB come from segments of 2 MiB, less than 10 MiB from segments of 20 MiB,
    and more from a segment of its own, rounded to 2 MiB. The smallest free block that is large enough is taken, and
    split if 512 bytes or more, in large segments more than 1 MiB, remain. Free neighbours are merged. No segment is
    released.
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
