"""`fastldm bench`: contenders in turns, judged before they are timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bundles
import pytest
from click.testing import CliRunner

from fastldm.cli import bench as cli_bench
from fastldm.cli import main
from fastldm.errors import EngineError
from fastldm.profiling import compare, contender
from fastldm.profiling.compare import Contender, Task

TASK = Task("default", "step", 32, 32, "DDIMScheduler", 1, 2.0, threads=1)
PEER, OURS = Contender("diffusers", "float32"), Contender("fastldm", "float32")
ABSENT = Contender("fastldm", "float32", backend="openvino")  # that runs bundles, and the task has none
DTYPES = ("float32", "bfloat16")


@pytest.mark.full
def test_compare_default_model_with_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.memory, "free_bytes", lambda device: None)  # all in one group, whose ratios these are
    out = tmp_path / "figures.json"
    arguments = ["bench", "--steps", "2", "--size", "32x32", "--rounds", "2", "--threads", "1", "--json", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    rows = {row["contender"]["title"]: row for row in results["rows"]}
    assert list(rows) == [f"{name} {dtype}" for name in ("diffusers", "fastldm on torch") for dtype in DTYPES]
    for title, row in rows.items():
        assert title in done.output
        assert len(row["seconds"]) == len(row["ratios"]) == 2
        assert min(*row["seconds"], row["load"], row["first"]) > 0
        assert not row["wrong"]
    assert rows["fastldm on torch float32"]["difference"] <= 1e-4  # the same picture
    assert rows["diffusers float32"]["ratios"] == [1, 1]
    first, ours = rows["diffusers float32"], rows["fastldm on torch float32"]
    assert ours["ratios"] == [a / b for a, b in zip(first["seconds"], ours["seconds"], strict=True)]
    assert {"machine", "versions", "task", "command"} <= results.keys()


def test_wrong_and_failing_contenders_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bound that no other arithmetic keeps stands for a wrong result."""
    monkeypatch.setitem(compare.TOLERANCES, ("step", "float32"), 0.0)
    rows = compare.compare(TASK, [PEER, ABSENT, OURS], rounds=1)
    assert [row.wrong for row in rows] == [False, True, True]
    assert "openvino runs bundles" in rows[1].failure
    assert not rows[2].failure
    assert 0 < rows[2].difference < 1e-4
    with pytest.raises(EngineError, match=r"fastldm on openvino float32 cannot run: .*openvino runs bundles"):
        compare.compare(TASK, [ABSENT, OURS], rounds=1)


@pytest.mark.full
def test_contenders_are_grouped_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_has_room", lambda free, running: False)
    events: list[str] = []
    rows = compare.compare(TASK, [PEER, OURS, Contender("fastldm", "bfloat16")], 1, events.append)
    assert [str(row.contender) for row in rows] == [f"fastldm on torch {d}" if d else str(PEER) for d in ("", *DTYPES)]
    assert events.count("loading diffusers float32") == 2  # once a group
    assert all(len(row.ratios) == 1 for row in rows)


def test_random_weights_load_together_within_memory() -> None:
    random = replace(TASK, model=compare.RANDOM)
    all_four = [Contender(name, dtype) for name in ("diffusers", "fastldm") for dtype in DTYPES]
    results = [compare._side_by_side(random, all_four, free) for free in (10**9, 8 * 10**9, 64 * 10**9, None)]
    assert results == [1, 2, 4, 4]
    assert compare._side_by_side(TASK, all_four, None) == 1  # whose loading counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "pytorch"], "expected some of diffusers, diffusers-compile, onnxruntime, openvino"),
        (
            ["--compare", "diffusers,openvino"],
            "openvino runs a bundle: give one that was exported in float32",
        ),
        (["--dtypes", "float16"], "expected float32, then bfloat16 if you like"),
        (["--python", "optimum=/no/such/python"], "expected PEER=PATH, such as optimum="),
    ],
)
def test_incomparable_contenders_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", *options])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_schedulers_are_set_like_diffusers_pipelines() -> None:
    """They switch clip_sample off in those that they are made with, and leave one be that is put in later."""
    scheduler = contender._scheduler(replace(TASK, sampler="DDIMScheduler"), {"beta_schedule": "scaled_linear"})
    assert (scheduler.config.clip_sample, scheduler.config.beta_schedule) == (False, "scaled_linear")
    euler = contender._scheduler(replace(TASK, sampler="EulerDiscreteScheduler"), {"steps_offset": 1})
    assert "clip_sample" not in euler.config


def test_bench_knows_every_peer() -> None:
    assert cli_bench.PEERS == compare.PEERS


@pytest.mark.full
@pytest.mark.parametrize("kind", ["step", "picture"])
def test_peer_pipelines_read_bundles(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("openvino_genai", reason="openvino-genai is not installed: pip install 'fastldm[bench]'")
    model, bundle = bundles.exported("sd1", False, bundles.shared(tmp_path_factory))
    task = Task(str(model), kind, 32, 16, "DDIMScheduler", 2, 2.0, threads=1)  # type: ignore[arg-type]
    peers = compare.contenders(["diffusers", "openvino-genai"], [str(bundle)], ["float32"], backend="torch")
    rows = compare.compare(task, peers, rounds=1)
    assert [(row.failure, row.wrong) for row in rows] == [("", False)] * 3
    assert rows[1].difference > 0  # it is another's arithmetic


@pytest.mark.full
def test_the_one_minute_suite_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD1.5's full size: what diffusers computes with the same random weights, fastldm does. One that cannot run beside
    others is named as one that runs alone."""
    monkeypatch.setattr(compare.memory, "free_bytes", lambda device: None)  # side by side, however little is free
    task = Task(compare.RANDOM, "step", 128, 128, "DDIMScheduler", 1, 7.5, threads=2)
    absent = replace(ABSENT, python="/bin/false")
    first, broken, ours = compare.compare(task, [PEER, absent, OURS], rounds=1)
    assert not any(row.wrong or row.failure for row in (first, ours))
    assert 0 < ours.difference < 1e-4
    assert broken.failure == "exit status 1"
    assert [row.load for row in (first, ours)] == [None, None]
