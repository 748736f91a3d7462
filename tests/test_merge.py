"""runtime/merge.py: adapters in weights, and back."""

from __future__ import annotations

import ops
import pytest
import torch

from fastldm.adapters.forms import Difference, LoHa, LoRA
from fastldm.adapters.selection import Parameter
from fastldm.runtime import merge
from fastldm.runtime.merge import Merged, on_device

P = Parameter("unet", "layer", "weight")


def lora(shape: tuple[int, ...], rank: int, seed: int) -> LoRA:
    g = torch.Generator().manual_seed(seed)
    return LoRA(torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (6, 5, 3, 3), (6, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("memory", ["usual", "channels-last", "padded"])
def test_merged_weights_are_sums(dtype: torch.dtype, shape: tuple[int, ...], memory: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    if memory != "usual" and len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    if memory == "padded":
        wide = torch.zeros(shape[0], shape[1] + 3, *shape[2:], dtype=dtype)
        if len(shape) == 4:
            wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, : shape[1]] = weight
        weight = wide[:, : shape[1]]
    before, merged = weight.clone(), Merged(lambda _: weight)
    a, b = lora(shape, 3, 1), lora(shape, 2, 2)
    assert merged.switch({P: ((a, 0.7), (b, -0.4))})
    expected = before.float() + a.delta(before, 0.7) + b.delta(before, -0.4)
    assert ops.error(weight, expected) < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert not merged.switch({P: ((a, 0.7), (b, -0.4))}), "the same again writes nothing"
    assert merged.switch({})
    assert torch.equal(weight, before)
    assert merged.writes == 2


def test_other_forms_are_added_in_float32() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6).half()
    before, merged = weight.clone(), Merged(lambda _: weight)
    loha = LoHa(*((torch.randn(4, 2), torch.randn(2, 6)) for _ in range(2)), scale=0.5, rank=2)
    difference = Difference(torch.randn(4, 6))
    merged.switch({P: ((loha, 1.0), (difference, 0.5))})
    expected = before.float() + loha.delta(before) + difference.delta(before, 0.5)
    assert torch.equal(weight, expected.half())


def test_large_factors_do_not_overflow_in_float16() -> None:
    weight = torch.zeros(2, 2, dtype=torch.float16)
    merged = Merged(lambda _: weight)
    merged.switch({P: ((LoRA(torch.full((1, 2), 1e-4), torch.full((2, 1), 1e5), 1.0), 1.0),)})
    assert torch.allclose(weight.float(), torch.full((2, 2), 10.0))


def test_forgotten_parameters_have_a_new_original() -> None:
    weight = torch.ones(2, 2)
    merged = Merged(lambda _: weight)
    deltas = {P: ((Difference(torch.ones(2, 2)), 1.0),)}
    merged.switch(deltas)
    weight.fill_(5)
    merged.forget(P)
    merged.switch(deltas)
    assert torch.equal(weight, torch.full((2, 2), 6.0))
    merged.switch({})
    assert torch.equal(weight, torch.full((2, 2), 5.0))
    assert merged.nbytes == 16


def test_failure_leaves_what_the_next_switch_mends() -> None:
    weight = torch.ones(2, 2)
    merged = Merged(lambda _: weight)
    with pytest.raises(RuntimeError):
        merged.switch({P: ((Difference(torch.ones(3, 3)), 1.0),)})
    merged.switch({})
    assert torch.equal(weight, torch.ones(2, 2))


def test_half_written_weights_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a switch to none, after a failure in the middle of writing."""
    weight = torch.randn(4, 6)
    before, merged, change = weight.clone(), Merged(lambda _: weight), {P: ((lora((4, 6), 2, 1), 1.0),)}

    def half(weight: torch.Tensor, original: torch.Tensor, deltas: object) -> None:
        weight[:2] = 0
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(merge, "_write", half)
        with pytest.raises(MemoryError):
            merged.switch(change)
    assert not torch.equal(weight, before)
    merged.switch({})
    assert torch.equal(weight, before)


def test_forms_move_with_all_their_tensors() -> None:
    form = LoHa((torch.ones(2, 1), torch.ones(1, 2)), (torch.ones(2, 1), torch.ones(1, 2)), scale=1.0, rank=1)
    moved = on_device(form, torch.device("meta"))
    assert all(factor.is_meta for factors in (moved.first, moved.second) for factor in factors)
    assert on_device(form, torch.device("cpu")) is form
