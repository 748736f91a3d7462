"""kernels/attention.py: the reference against PyTorch, the kernels against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.kernels import attention as module
from fastldm.kernels import dispatch
from fastldm.kernels.attention import ATTENTION, attention, attention_reference, default, is_candidate, is_short, tiles
from fastldm.kernels.compile import ARCHS, SHARED_MEMORY

# On a GPU there is no float32 kernel.
DTYPES = [dtype for dtype in ops.DTYPES if ops.DEVICE == "cpu" or dtype != torch.float32]
DTYPE = DTYPES[0]
# Small blocks, so that small shapes have many of them.
LONG = {"BLOCK_M": 32, "BLOCK_N": 32, "SPLIT": True, "FMA_EIGHTHS": 0, "num_warps": 4, "num_stages": 2}
SHORT = {"BLOCK_M": 32, "PROGRAMS": 2, "SPLIT": True, "num_warps": 4, "num_stages": 1}
BOTH = pytest.mark.parametrize("config", [LONG, SHORT], ids=["long", "short"])


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=ops.DEVICE).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=ops.DEVICE)


def check(config: dispatch.Config, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> None:
    with dispatch.forced("attention", config):
        ops.check(ATTENTION, q, k, v, heads, **kwargs)


def plainly(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kv_len: list[int], slots: list[int], causal: bool = False
) -> Tensor:
    """Row by row and head by head."""
    out = torch.empty_like(q)
    dim = q.shape[-1] // heads
    for b, slot in enumerate(slots):
        for h in range(heads):
            head = slice(h * dim, (h + 1) * dim)
            s = scale * q[b, :, head] @ k[slot, : kv_len[slot], head].T
            if causal:
                s = s.masked_fill(torch.ones_like(s).triu(1) > 0, -math.inf)
            out[b, :, head] = s.softmax(-1) @ v[slot, : kv_len[slot], head]
    return out


# ------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("causal", [False, True])
def test_reference_matches_formula(causal: bool) -> None:
    q, k, v = (torch.randn(n, t, 3 * 8, dtype=torch.float64) for n, t in ((4, 5), (3, 7), (3, 7)))
    kv_len, slots = [7, 1, 4], [2, 0, 0, 1]
    got = attention_reference(
        q, k, v, 3, scale=0.4, causal=causal, kv_len=torch.tensor(kv_len), slots=torch.tensor(slots)
    )
    assert torch.allclose(got, plainly(q, k, v, 3, 0.4, kv_len, slots, causal), rtol=1e-12)
    assert torch.equal(
        attention_reference(q, k, v, 3, slots=torch.tensor(slots)), attention_reference(q, k[slots], v[slots], 3)
    )


def test_reference_ignores_keys_beyond_kv_len() -> None:
    q, k, v = (torch.randn(2, 5, 16) for _ in range(3))
    kv_len = torch.tensor([3, 5], dtype=torch.int32)
    expected = attention_reference(q, k, v, 2, kv_len=kv_len)
    k[0, 3:], v[0, 3:] = math.nan, math.inf
    assert torch.equal(attention_reference(q, k, v, 2, kv_len=kv_len), expected)
    assert torch.equal(attention_reference(q, k, v, 2, kv_len=torch.tensor([0, 0])), torch.zeros_like(q))


# --------------------------------------------------------------------------------------------------- the kernels

DIMS = {
    8: "less than the 16 that a product of tensor cores takes",
    24: "one tile on sm_90, where the minimum is 16",
    40: "SD1.5: 32 + 16, the last 8 masked",
    56: "one tile with a masked end",
    64: "SDXL",
    80: "SD1.5: 64 + 16",
    96: "64 + 32",
    136: "128 + 16",
    160: "SD1.5: 128 + 32",
    256: "two tiles of 128",
    512: "VAE: two programs share a head's values",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims_match_reference(dim: int, dtype: torch.dtype) -> None:
    """In the shipped configuration: a whole block of queries and a tail; whole blocks of keys and a tail."""
    q, k, v = (normal(1, n, dim, dtype=dtype) for n in (130, 170, 170))
    if not (verdict := ATTENTION.supports(q, k, v, 1)):
        pytest.skip(verdict.reason)
    ops.check(ATTENTION, q, k, v, 1)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [40, 64, 80, 160])
def test_heads_of_the_networks_match_reference(dim: int, dtype: torch.dtype, config: dispatch.Config) -> None:
    check(config, *(normal(2, n, 2 * dim, dtype=dtype) for n in (33, 77, 77)), 2)


@pytest.mark.full
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [*range(8, 257, 8)])
def test_every_head_dim_matches_reference(dim: int, dtype: torch.dtype, config: dispatch.Config) -> None:
    check(config, *(normal(1, n, 2 * dim, dtype=dtype) for n in (33, 70, 70)), 2)


LENGTHS = {
    "one-and-one": (1, 1),
    "one-query": (1, 70),
    "one-key": (40, 1),
    "whole-blocks": (64, 64),
    "one-block": (32, 32),
    "one-more": (33, 33),
    "one-less": (31, 31),
    "seven-keys": (9, 7),  # fewer than the 8 columns of sums
    "text": (50, 77),
    "two-texts": (50, 154),
    "three-texts": (50, 231),
    "odd": (45, 191),
}


@BOTH
@pytest.mark.parametrize(("queries", "keys"), LENGTHS.values(), ids=LENGTHS)
def test_lengths_match_reference(queries: int, keys: int, config: dispatch.Config) -> None:
    check(config, *(normal(1, n, 40) for n in (queries, keys, keys)), 1)


@pytest.mark.parametrize("keys", [77, 154, 231])
def test_text_matches_reference_in_the_default_configuration(keys: int) -> None:
    q, kv = normal(2, 150, 2 * 40), normal(2, keys, 4 * 40)
    ops.check(ATTENTION, q, *kv.chunk(2, -1), 2)


@BOTH
def test_lengths_and_slots_match_reference(config: dispatch.Config) -> None:
    """Rows that share a slot; a slot that no row reads; lengths 1, odd, full, and beyond the keys."""
    q, k, v = normal(5, 40, 2 * 24), normal(6, 77, 2 * 24), normal(6, 77, 2 * 24)
    kv_len, slots = int32(1, 77, 33, 64, 5, 1000), int32(2, 2, 0, 1, 5)
    check(config, q, k, v, 2, kv_len=kv_len, slots=slots)
    check(config, q, k, v, 2, slots=slots)
    check(config, q[:3], k[:3], v[:3], 2, kv_len=int32(77, 1, 50))


@BOTH
def test_keys_beyond_kv_len_are_not_loaded(config: dispatch.Config) -> None:
    q, k, v = normal(2, 40, 40), normal(2, 77, 40), normal(2, 77, 40)
    k[0, 37:], v[0, 37:] = math.nan, math.inf
    check(config, q, k, v, 1, kv_len=int32(37, 77))


@BOTH
def test_a_slot_without_keys_gives_zero(config: dispatch.Config) -> None:
    q, k, v = normal(2, 5, 40), normal(2, 40, 40), normal(2, 40, 40)
    check(config, q, k, v, 1, kv_len=int32(0, 40))
    with dispatch.forced("attention", config):
        assert not ATTENTION.triton(q, k, v, 1, kv_len=int32(0, 40))[0].any()


def packed_qkv() -> tuple[Tensor, ...]:
    return normal(3, 40, 3 * 2 * 40).chunk(3, dim=-1)


def packed_kv() -> tuple[Tensor, ...]:
    return normal(3, 40, 2 * 40), *normal(3, 77, 2 * 2 * 40).chunk(2, dim=-1)


def spaced_rows() -> tuple[Tensor, ...]:
    """Every other token, rows of 16 bytes more than a multiple of 32, batches with a gap."""
    return tuple(normal(4, 90, 88)[1:, ::2, :80] for _ in range(3))


def one_slot_for_all() -> tuple[Tensor, ...]:
    return normal(3, 40, 80), *(normal(1, 50, 80).expand(3, -1, -1) for _ in range(2))


def tokens_first() -> tuple[Tensor, ...]:
    return tuple(normal(40, 3, 80).transpose(0, 1) for _ in range(3))


@BOTH
@pytest.mark.parametrize("views", [packed_qkv, packed_kv, spaced_rows, one_slot_for_all, tokens_first])
def test_views_match_reference(views: Callable[[], tuple[Tensor, ...]], config: dispatch.Config) -> None:
    q, k, v = views()
    check(config, q, k, v, 2)


@BOTH
@pytest.mark.parametrize("scale", [1e-4, 0.25, 3.0])
def test_scale_matches_reference(scale: float, config: dispatch.Config) -> None:
    check(config, *(normal(1, n, 64) for n in (40, 77, 77)), 2, scale=scale)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, config: dispatch.Config) -> None:
    """In the thousands: 2 ** s overflows unless the peak is taken off first."""
    q, k, v = (normal(1, n, 64, dtype=dtype) for n in (40, 77, 77))
    check(config, 30 * q, 30 * k, v, 1)


@BOTH
@pytest.mark.parametrize("falling", [False, True])
def test_rising_peaks_match_reference(falling: bool, config: dispatch.Config) -> None:
    """Every block outgrows what was summed before it, or none does after the first."""
    q, v = normal(1, 40, 40).abs(), normal(1, 150, 40)
    k = normal(1, 150, 40) + torch.linspace(-9, 9, 150, device=ops.DEVICE).to(DTYPE)[None, :, None]
    check(config, q, k.flip(1) if falling else k, v, 1)


@BOTH
def test_a_dominant_key_gives_its_value(config: dispatch.Config) -> None:
    """The last, in the tail: all that was summed before must be forgotten."""
    q, k, v = torch.ones_like(normal(1, 33, 40)), normal(1, 70, 40), normal(1, 70, 40)
    k[:, -1] = 60
    check(config, q, k, v, 1)


@BOTH
def test_equal_scores_give_the_mean(config: dispatch.Config) -> None:
    q, k, v = torch.zeros_like(normal(1, 5, 40)), normal(1, 70, 40), normal(1, 70, 40)
    check(config, q, k, v, 1)


def test_polynomial_exponentials_match_reference() -> None:
    """Within the budget of half types; scores of all sizes, -inf in the tail among them."""
    for dtype in DTYPES:
        if dtype != torch.float32:
            q, k, v = (normal(1, n, 40, dtype=dtype) for n in (40, 150, 150))
            for eighths in (1, 8):
                check(LONG | {"BLOCK_N": 64, "FMA_EIGHTHS": eighths}, 5 * q, k, v, 1)


@BOTH
@pytest.mark.parametrize("dim", [40, 80])
def test_heads_in_one_tile_match_reference(dim: int, config: dispatch.Config) -> None:
    check(config | {"SPLIT": False}, *(normal(1, n, 2 * dim) for n in (33, 70, 70)), 2)


@pytest.mark.skipif(
    ops.DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="Hopper and later copy so"
)
@pytest.mark.parametrize(("dim", "split"), [(40, True), (40, False), (64, False), (80, True)])
def test_descriptors_match_reference(dim: int, split: bool) -> None:
    """Heads whose tiles end inside their neighbours, parts of a packed projection, slots, and keys that are not there
    in whole blocks and in the last."""
    dtype = torch.float16  # as it is used: descriptors of float32 would be twice as wide
    packed = normal(3, 150, 6 * dim, dtype=dtype)
    k, v = packed[..., 2 * dim : 4 * dim], packed[..., 4 * dim :]
    kv_len = torch.tensor([150, 0, 70], dtype=torch.int32, device=ops.DEVICE)
    slots = torch.tensor([2, 0, 1, 0], dtype=torch.int32, device=ops.DEVICE)
    packed[2, 70:, 2 * dim :] = float("nan")
    config = LONG | {"BLOCK_N": 64, "SPLIT": split, "TMA": True}
    check(config, normal(4, 33, 2 * dim, dtype=dtype), k, v, 2, kv_len=kv_len, slots=slots)


@pytest.mark.parametrize(("arch", "dim"), [(80, 40), (86, 136), (80, 256), (121, 200), (100, 40)])
def test_layouts_of_every_gpu_match_reference(arch: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps multiply by 8 columns, warpgroups by 16; only sm_90 has 256 channels of values in one program."""
    if ops.DEVICE == "cuda":
        pytest.skip("this GPU is what it is")
    monkeypatch.setattr(module, "capability", lambda x: arch)
    check(LONG, *(normal(1, n, 2 * dim) for n in (33, 70, 70)), 2)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 100),
    heads=st.integers(1, 3),
    eighths=st.integers(1, 12),
    data=st.data(),
)
def test_any_shape_matches_reference(
    rows: int, queries: int, keys: int, heads: int, eighths: int, data: st.DataObject
) -> None:
    any_shape(rows, queries, keys, heads, 8 * eighths, data)


@pytest.mark.full
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    queries=st.integers(1, 200),
    keys=st.integers(1, 300),
    heads=st.integers(1, 4),
    eighths=st.integers(1, 32),
    data=st.data(),
)
def test_any_long_shape_matches_reference(
    rows: int, queries: int, keys: int, heads: int, eighths: int, data: st.DataObject
) -> None:
    any_shape(rows, queries, keys, heads, 8 * eighths, data)


def any_shape(rows: int, queries: int, keys: int, heads: int, dim: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 3))
    kv_len = data.draw(st.lists(st.integers(1, keys), min_size=slots, max_size=slots))
    slot_of = data.draw(st.lists(st.integers(0, slots - 1), min_size=rows, max_size=rows))
    config = data.draw(st.sampled_from([LONG, SHORT]))
    q, k, v = normal(rows, queries, heads * dim), *normal(slots, keys, 2 * heads * dim).chunk(2, -1)
    check(config, q, k, v, heads, kv_len=int32(*kv_len), slots=int32(*slot_of))


# ---------------------------------------------------------------------------------------------------- around them


def test_public_op_takes_the_requested_path() -> None:
    q, k, v = (normal(2, 20, 48, dtype=DTYPES[-1]) for _ in range(3))
    with dispatch.use("triton"):
        assert ATTENTION.path(q, k, v, 2)
        triton = attention(q, k, v, 2)
    with dispatch.use("torch"):
        torch.testing.assert_close(attention(q, k, v, 2), triton, rtol=0, atol=2e-3)


def test_refusals_name_the_reason() -> None:
    q, k, v = (torch.empty(2, 6, 48) for _ in range(3))

    def refusal(q: Tensor = q, k: Tensor = k, v: Tensor = v, heads: int = 2, **kwargs: Any) -> str:
        verdict = ATTENTION.supports(q, k, v, heads, **kwargs)
        assert not verdict
        return verdict.reason

    assert "float64" in refusal(*(t.double() for t in (q, k, v)))
    assert "float32" in refusal(*(t.to("meta") for t in (q, k, v)))  # stands for a GPU's
    assert "causal" in refusal(causal=True)
    assert "scale -1.0" in refusal(scale=-1.0)
    assert "head dim 12" in refusal(heads=4)
    assert "head dim 264" in refusal(*(torch.empty(1, 1, 264) for _ in range(3)), heads=1)
    assert "2 rows, 1 slots" in refusal(k=k[:1], v=v[:1])
    assert "kv_len is torch.int64" in refusal(kv_len=torch.ones(2, dtype=torch.int64))
    assert "slots is torch.int32 with strides (2,)" in refusal(slots=torch.zeros(4, dtype=torch.int32)[::2])
    assert "empty" in refusal(q=q[:, :0])
    assert "stride" in refusal(q=torch.empty(2, 48, 6).transpose(1, 2))
    assert "16 bytes" in refusal(k=torch.empty(2, 6, 49)[..., :48])
    with dispatch.targeting(dispatch.Target(80)):
        assert "sm_80 spills" in refusal(
            *(torch.empty(1, 4, 512, dtype=torch.half, device="meta") for _ in range(3)), heads=1
        )


def test_cost_of_the_largest_sd15_call() -> None:
    q, k, v = (torch.empty(2, 4096, 320, dtype=torch.float16, device="meta") for _ in range(3))
    assert ATTENTION.cost(q, k, v, 8) == (42_949_672_960, 4 * 2 * 4096 * 320 * 2, 268_435_456)
    assert ATTENTION.cost(q, k, v, 8, causal=True).exp == 134_217_728
    text = torch.empty(2, 77, 320, dtype=torch.float16, device="meta")
    assert ATTENTION.cost(q, text, text, 8).bytes == 2 * (2 * 2 * 4096 * 320 + 2 * 2 * 77 * 320)


def test_tiles_hold_every_size() -> None:
    assert [tiles(dim, 8) for dim in (8, 40, 56, 64, 80, 160, 256)] == [
        (8, 0), (32, 8), (64, 0), (64, 0), (64, 16), (128, 32), (128, 128)
    ]  # fmt: skip
    assert [tiles(dim, 16) for dim in (8, 24, 40, 77, 154, 512)] == [
        (16, 0), (32, 0), (32, 16), (64, 16), (128, 32), (256, 256)
    ]  # fmt: skip
    for size in range(1, 600):
        assert size <= sum(tiles(size, 16)) <= max(16, dispatch.next_power_of_2(size))


@pytest.mark.parametrize("arch", [*ARCHS, 87, 103, 121])
def test_every_shape_has_a_default(arch: int) -> None:
    """Known to the tuner's space or a narrower variant of it, and within the GPU's shared memory by a plain count."""
    for dim in range(8, 257, 8):
        for queries in (1, 64, 256, 1024, 4096, 16384):
            for keys in (1, 64, 77, 154, 231, 1024, 4096, 16384):
                q, k = (torch.empty(2, n, 2 * dim, dtype=torch.float16, device="meta") for n in (queries, keys))
                config = default(ATTENTION.shape_class(q, k, k, 2), arch)
                assert ("BLOCK_N" not in config) == is_short(dim, keys)
                if "BLOCK_N" in config:
                    width = sum(tiles(dim, 16))
                    held = 2 * width * (config["BLOCK_M"] + 2 * config["BLOCK_N"] * max(1, config["num_stages"] - 1))
                    assert held <= SHARED_MEMORY[min(ARCHS, key=lambda sm: (sm > arch, arch - sm))] * 1024


@pytest.mark.parametrize(
    ("dim", "queries", "keys"), [(40, 4096, 4096), (40, 4096, 77), (160, 64, 64), (64, 1024, 1024)]
)
def test_every_shape_has_2_to_64_candidates(dim: int, queries: int, keys: int) -> None:
    q, k = (torch.empty(2, n, 2 * dim, dtype=torch.float16, device="meta") for n in (queries, keys))
    assert 2 <= sum(is_candidate(config, q, k, k, 2) for config in ATTENTION.space) <= 64


@pytest.mark.parametrize("keys", [20, 170])
def test_registered_op_agrees_with_its_schema(keys: int) -> None:
    q, k, v = (normal(2, n, 48) for n in (20, keys, keys))
    ops.check_registered(ATTENTION, q, k, v, 2, scale=0.5, kv_len=int32(3, keys), slots=int32(1, 1))


def test_kernel_matches_pytorch_in_float64() -> None:
    """Against PyTorch's attention on single rows, without the reference."""
    q, k, v = normal(3, 40, 80), normal(2, 77, 80), normal(2, 77, 80)
    kv_len, slots = [77, 50], [1, 0, 1]
    with dispatch.forced("attention", LONG):
        got = ATTENTION.triton(q, k, v, 2, kv_len=int32(*kv_len), slots=int32(*slots))
    for b, slot in enumerate(slots):
        alone = (q[b], k[slot, : kv_len[slot]], v[slot, : kv_len[slot]])
        heads = (t.double().view(-1, 2, 40).transpose(0, 1) for t in alone)
        expected = F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1)
        assert ops.error(got[b], expected) < (2e-3 if DTYPE.itemsize == 2 else 1e-5)
