"""planning/allocator.py: traces of allocations, and the simulated allocators on them."""

from __future__ import annotations

import torch

from fastldm.planning.allocator import MIB, CUDAHeap, Heap, record


def test_trace_has_allocations_and_releases_but_no_views() -> None:
    existing = torch.empty(100, device="meta")

    def run() -> None:
        a = existing + 1  # 400 bytes
        b = a.view(10, 10).t()[2:]
        a += 1
        del a
        c = torch.cat([b, b])  # 640 bytes, with a still alive by its view
        del b
        c.mul(2)  # 640 more, without a

    heap = Heap()
    assert heap.run(record(run)) == 640 + 640
    assert heap.live == 0
    assert record(lambda: existing[2:]) == ()


def test_attention_allocates_no_scores() -> None:
    q = torch.empty(2, 3, 1000, 16, device="meta")
    run = torch.nn.functional.scaled_dot_product_attention
    assert Heap().run(record(lambda: run(q, q, q))) == 4 * 2 * 3 * 1000 * (16 + 1)


def test_cuda_heap_follows_the_rules_of_pytorch() -> None:
    """By hand: segments of 2 MiB for small sizes, of 20 MiB for those below 10 MiB, and their own for larger ones."""
    heap = CUDAHeap()
    assert heap.hold([1]) == 512
    assert heap.reserved == 2 * MIB
    heap.take("a", 6 * MIB)
    assert heap.reserved == 22 * MIB
    heap.take("b", 6 * MIB)  # beside it
    heap.take("c", 6 * MIB)
    assert heap.reserved == 22 * MIB
    heap.give("a")
    heap.give("c")
    heap.take("d", 8 * MIB)  # c and the 2 MiB behind it are one block, a is too small
    assert heap.reserved == 22 * MIB
    heap.take("e", 8 * MIB)  # a's 6 MiB and b's
    assert heap.reserved == 42 * MIB
    heap.take("f", 13 * MIB + 1)
    assert heap.reserved == 42 * MIB + 14 * MIB
    heap.take("g", 12 * MIB)  # behind e
    heap.give("f")
    heap.take("h", 13 * MIB - 512)  # more than 1 MiB would remain: split
    heap.take("i", MIB + 512)
    heap.take("j", 512 * 1024)  # small ones have segments of their own
    assert heap.reserved == 56 * MIB
    assert heap.live == 512 + (6 + 8 + 8 + 12 + 13 - 0 + 1) * MIB + 512 * 1024


def test_cuda_heap_never_holds_less_than_live_bytes() -> None:
    generator, heap, alive, model = torch.Generator().manual_seed(0), CUDAHeap(), [], 0
    for name in range(3000):
        draw = torch.rand(3, generator=generator).tolist()
        if alive and draw[0] < 0.49:
            heap.give(alive.pop(int(draw[1] * len(alive))))
        else:
            heap.take(name, int(2 ** (8 + 18 * draw[2])))
            alive.append(name)
        assert heap.live <= heap.reserved
        model = max(model, heap.live)
    assert heap.peak == model
    for name in alive:
        heap.give(name)
    assert heap.live == 0
    # all free blocks were merged into full segments again
    segments = [block.size for pool in heap._free for block in pool]
    assert sum(segments) == heap.reserved
    assert all(block.before is None and block.behind is None for pool in heap._free for block in pool)
