"""benchmarks/networks.py and the examples of ops: arguments of valid values, for every op."""

from __future__ import annotations

import pytest
import torch

from benchmarks import networks
from fastldm.kernels import dispatch


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
