"""benchmarks/networks.py and the examples of ops: arguments of valid values, for every op."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks import networks
from fastldm.kernels import dispatch
from fastldm.models.layers import Linear
from fastldm.planning import dry_run


def test_examples_have_valid_integers() -> None:
    for workload in networks.SMALL:
        for call in networks.calls(workload, torch.float32):
            args, kwargs = call.arguments("cpu")  # TypeError for an integer tensor without example values
            if kwargs.get("kv_len") is not None:
                (slots, tokens, _), lengths, taken = args[1].shape, kwargs["kv_len"], kwargs["slots"]
                assert ((lengths >= 1) & (lengths <= tokens)).all()
                assert ((taken >= 0) & (taken < slots)).all()


def test_integers_without_example_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(2, 64, 40, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    op = dispatch.OPS["attention"]
    (x, *_), kwargs = op.example((q, q, q, 1), {"kv_len": lengths}, "cpu")
    assert x.isfinite().all()
    assert kwargs["kv_len"].tolist() == [64, 64]
    monkeypatch.setattr(op, "example_values", None)
    with pytest.raises(TypeError, match="kv_len"):
        op.example((q, q, q, 1), {"kv_len": lengths}, "cpu")


def test_an_example_of_end_step_takes_a_step() -> None:
    """Its slots are before their last step, and every index is in range."""
    (call,) = [c for c in networks.calls("tiny step", torch.float32) if c.op == "end_step"]
    args, kwargs = call.arguments("cpu")
    op = dispatch.OPS["end_step"]
    named = op.bind(*args, **kwargs)
    before = named["x"].clone()
    op.reference(*args, **kwargs)
    assert named["counter"].eq(1).all()
    assert named["x"].isfinite().all()
    assert not named["x"].equal(before)


def test_calls_include_those_of_the_library_way() -> None:
    """A gate is part of its product by default, and must still be checked by itself."""
    counts = networks.calls("tiny step", torch.float16)
    of = {name: [count for call, count in counts.items() if call.op == name] for name in ("linear_geglu", "geglu")}
    assert min(of["linear_geglu"]) > 0
    assert of["geglu"]
    assert set(of["geglu"]) == {0}


def test_a_network_has_eight_bits_for_one_run() -> None:
    unet = dry_run.network(networks.TINY, torch.float16)
    layers = [layer for layer in unet.modules() if isinstance(layer, Linear)]
    with dispatch.targeting(dispatch.Target(90)):
        step = dry_run.step(networks.TINY, height=8, width=8, rows=2, tokens=77, dtype=torch.float16)
        eight = networks.in_eight_bits(unet, step, least_weight=1, least_rows=64)
        ops: list[str] = []
        with dispatch.observe(lambda op, args, kwargs: ops.append(op.name)):
            eight()
            both = len(ops)
            step()
    assert "linear_fp8" in ops[:both]
    assert "linear_fp8" not in ops[both:]
    assert all(layer.eight_bits is None for layer in layers)


@pytest.mark.parametrize("workload", ["tiny step, adapters", "sd15-512 step, adapters"])
def test_every_linear_layer_applies_its_adapters(workload: str) -> None:
    """Of 16 transformers with a layer each: projections in and out, and six products, queries, keys and values one."""
    counts = Counter[str]()
    for call, count in networks.calls(workload, torch.float16).items():
        counts[call.op] += count
    assert counts["lora_linear"] + counts["lora_geglu"] == 16 * (2 + 6)
    assert counts["lora_geglu"] == 16
