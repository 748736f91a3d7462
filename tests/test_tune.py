"""planning/tune.py and its command, as far as they go without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import networks
from fastldm.cli import main
from fastldm.kernels import dispatch
from fastldm.loading import spec as loading
from fastldm.planning import tune


def test_shapes_of_the_default_model() -> None:
    shapes = tune.shapes_of(loading.describe(), width=64, height=64, batch=1, dtype=torch.float16)
    assert {"attention", "group_norm", "linear"} <= {op for op, _ in shapes}
    assert all(args[0].is_meta for args, _ in shapes.values())


def test_every_shape_of_a_step_has_candidates() -> None:
    with dispatch.targeting(dispatch.Target(90)):
        for call in networks.calls("sd15-512 step", torch.float16):
            op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
            if op.space and op.supports(*args, **kwargs):
                candidates = [config for config in op.space if op.is_candidate(config, *args, **kwargs)]
                assert 1 <= len(candidates) <= 100, f"{call}: {len(candidates)} configurations"


def test_tables_merge_by_shape_class(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    tune.merge_into(file, {"sm_90": {"geglu": {"c320": {"config": {"ROWS": 1}}}}})
    tune.merge_into(file, {"sm_90": {"geglu": {"c640": {"config": {"ROWS": 2}}}}, "sm_80": {}})
    assert json.loads(file.read_text())["sm_90"]["geglu"].keys() == {"c320", "c640"}
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_tune_without_a_gpu_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", "-o", str(tmp_path / "tuned.json")])
    assert result.exit_code == 2
    assert "torch sees none here" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_tuning_finds_a_configuration() -> None:
    shapes = tune.shapes_of(loading.describe(), width=64, height=64, batch=1, dtype=torch.float16)
    table = tune.tune({key: shapes[key] for key in list(shapes)[:1]}, rounds=2)
    entry = next(iter(next(iter(next(iter(table.values())).values())).values()))
    assert entry["us"] > 0
    assert entry["path"] in ("triton", "torch")
