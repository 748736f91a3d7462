"""benchmarks/harness.py: records, contenders that fail, and kernels that are wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, networks
from fastldm.kernels import dispatch
from fastldm.planning.timing import Ceilings


def test_results_are_written_row_by_row(tmp_path: Path) -> None:
    record = harness.Record(tmp_path / "chosen", "geglu-float16", dtype="float16")
    for k in range(2):
        record.add({"call": k})
        content = json.loads((tmp_path / "chosen" / "geglu-float16.json").read_text())
        assert (len(content["rows"]), content["whole"]) == (k + 1, False)
    record.end()
    assert json.loads(record.path.read_text())["whole"]
    record.add({"wrong": "error 1"})
    with pytest.raises(SystemExit, match="wrong"):
        record.end()


def test_a_contender_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (call, *_) = (call for call in networks.calls("tiny step", torch.float32) if call.op == "layer_norm")

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no driver")

    monkeypatch.setattr(harness, "disagreement", lambda *_: None)
    monkeypatch.setattr(dispatch.OPS["layer_norm"], "triton", broken)
    ceilings = Ceilings(1e12, 1e12)
    row = harness.bench(
        call, lambda *args: {"rival": lambda: broken(*args)}, ceilings, device="cpu", copies=1, rounds=1
    )
    assert row["failed"] == {"triton": "no driver", "rival": "no driver"}
    assert row["us"].keys() == {"torch"}
    assert "no driver" in harness.line({"workload": "tiny", "count": 1, **row})
    assert harness.against_rivals({"triton": 2.0}) == {}
    assert harness.against_rivals({"triton": 2.0, "a": 6.0, "b": 3.0}) == {"best_rival": "b", "ratio": 1.5}


def test_wrong_outputs_and_mutations_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """In outputs and in arguments that the op mutates; the arguments of the caller are unchanged."""
    for name in ("layer_norm", "guidance_rescale"):
        (call, *_) = (call for call in networks.calls("tiny step", torch.float32) if call.op == name)
        op, (args, kwargs) = dispatch.OPS[name], call.arguments("cpu")
        before = copy.deepcopy(op.bind(*args, **kwargs))
        monkeypatch.setattr(op, "triton", op.reference)
        assert harness.disagreement(op, args, kwargs) is None

        def wrong(*args: Any, op: Any = op, **kwargs: Any) -> Any:
            out = op.reference(*args, **kwargs)
            changed = out if out is not None else op.bind(*args, **kwargs)[op.mutates[0]]
            changed.mul_(1.001)
            return out

        monkeypatch.setattr(op, "triton", wrong)
        assert "error" in str(harness.disagreement(op, args, kwargs))
        named = op.bind(*args, **kwargs)
        assert all(value.equal(before[key]) for key, value in named.items() if isinstance(value, torch.Tensor))
