"""planning/tune.py, planning/warm.py and their commands, as far as they go without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import networks
from fastldm.cli import main
from fastldm.errors import InputError
from fastldm.kernels import dispatch
from fastldm.loading import spec as loading
from fastldm.planning import tune, warm


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_shapes_of_the_default_model() -> None:
    shapes = tune.shapes_of(loading.describe(), width=64, height=64, batch=1, dtype=torch.float16)
    assert {"attention", "group_norm", "linear"} <= {op for op, _ in shapes}
    assert all(args[0].is_meta for args, _ in shapes.values())


def test_every_shape_of_a_real_step_has_configurations_to_try() -> None:
    with dispatch.targeting(dispatch.Target(90)):
        for call in networks.calls("sd15-512 step", torch.float16):
            op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
            if op.space and op.supports(*args, **kwargs):
                tried = [config for config in op.space if op.is_candidate(config, *args, **kwargs)]
                assert 1 <= len(tried) <= 100, f"{call}: {len(tried)} configurations"


def test_tables_merge_whole(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    tune.merge_into(file, {"sm_90": {"geglu": {"c320": {"config": {"ROWS": 1}}}}})
    tune.merge_into(file, {"sm_90": {"geglu": {"c640": {"config": {"ROWS": 2}}}}, "sm_80": {}})
    assert json.loads(file.read_text())["sm_90"]["geglu"].keys() == {"c320", "c640"}
    assert [one.name for one in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_commands_that_need_to_know_a_gpu_say_so(tmp_path: Path) -> None:
    assert run("warm") == (
        2,
        f"fastldm: torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}\n",
    )
    code, said = run("tune", "-o", str(tmp_path / "tuned.json"))
    assert code == 2
    assert "torch sees none here" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["sm_75", "90a", "hopper", ""])
def test_an_unknown_arch_lists_those_there_are(arch: str) -> None:
    with pytest.raises(InputError, match=r"expected sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120"):
        warm.parse_arch(arch)


def test_doctor_lists_the_path_of_each_op_for_a_gpu() -> None:
    code, said = run("doctor", "--arch", "sm_90")
    assert code == 0
    assert "ops of one guided step, text and decode in float16 on sm_90" in said
    assert "geglu            triton  10 calls" in said
    assert "conv2d           torch" in said


@pytest.mark.gpu
def test_tuning_finds_a_configuration(tmp_path: Path) -> None:
    shapes = tune.shapes_of(loading.describe(), width=64, height=64, batch=1, dtype=torch.float16)
    one = {key: shapes[key] for key in list(shapes)[:1]}
    table = tune.tune(one, rounds=2)
    entry = next(iter(next(iter(next(iter(table.values())).values())).values()))
    assert entry["us"] > 0
    assert entry["path"] in ("triton", "torch")
