"""fastldm/batches/ray.py: lines that actors on a cluster make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import ROOT, wait_until
from sessions import tiny_pipeline

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

import ray
from ray_cluster import cluster, of_folder

from fastldm import Session
from fastldm.batches import Batch, Maker, read_lines
from fastldm.batches import ray as module
from fastldm.batches.ray import RayMaker
from fastldm.errors import EngineError, InputError

SMALL = {"num_inference_steps": 8, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with cluster() as folder:
        yield folder


def open_tiny() -> Maker:
    return Maker(Session(tiny_pipeline()), "tiny")


def open_nothing() -> Maker:
    raise InputError("there is no such model")


def prompts(folder: Path, count: int) -> Path:
    (folder / "prompts.txt").write_text("".join(f"a fish {k}\n" for k in range(count)))
    return folder / "prompts.txt"


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines() if line[-1:] == "}"]


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "share"),
    [
        ([{"CPU": 16.0}] * 4, 4, True, {"num_cpus": 16}),
        ([{"CPU": 16.0}] * 4, 6, True, {"num_cpus": 8}),
        ([{"CPU": 16.0}, {"CPU": 4.0}, {}], 3, True, {"num_cpus": 5}),
        ([{"CPU": 2.0}], 2, True, {"num_cpus": 1}),
        ([{"CPU": 2.0}], 3, True, "has 2 cores"),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, 4, True, {"num_gpus": 1, "num_cpus": 1}),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, 5, True, "has 4 GPUs"),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, 5, False, {"num_cpus": 2}),
    ],
)
def test_actors_share_the_cluster(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Any], actors: int, gpus: bool, share: Any
) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(module.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}])
    if isinstance(share, str):
        with pytest.raises(InputError, match=share):
            module._share(actors, gpus)
    else:
        assert module._share(actors, gpus) == share


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(module.ray, "init", none)
    with pytest.raises(EngineError, match="there is no Ray cluster at this machine: set RAY_ADDRESS"):
        RayMaker(open_tiny, 1)


@pytest.mark.full
def test_lines_of_an_actor_that_dies_are_made_again(tmp_path: Path, folder: Path) -> None:
    lines, out = read_lines(prompts(tmp_path, 60), SMALL), tmp_path / "out"
    with RayMaker(open_tiny, 2, at_a_time=4) as maker:
        outcomes = []
        for outcome in Batch(lines, out).run(maker, ahead=12):
            outcomes.append(outcome)
            if len(outcomes) == 20:
                of_folder(folder, "ray::_Actor")[0].send_signal(signal.SIGKILL)
    assert sorted(one.line.number for one in outcomes) == [*range(1, 61)]
    assert not [one.error for one in outcomes if one.error]
    assert sorted(record["line"] for record in records(out)) == [*range(1, 61)]


@pytest.mark.full
def test_what_cannot_be_opened_says_why(tmp_path: Path, folder: Path) -> None:
    work = Batch(read_lines(prompts(tmp_path, 3), SMALL), tmp_path / "out")
    with RayMaker(open_nothing, 1) as maker, pytest.raises(InputError, match=r"^there is no such model$"):
        next(work.run(maker))
    with pytest.raises(InputError, match="has 2 cores"):
        RayMaker(open_nothing, 3)


@pytest.mark.full
def test_command_that_is_killed_makes_the_rest(tmp_path: Path, folder: Path) -> None:
    file, out = prompts(tmp_path, 40), tmp_path / "out"
    command = [sys.executable, "-m", "fastldm", "batch", str(file), "-o", str(out), "--ray", "2", "--steps", "4"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def made() -> int:
        return len([*out.glob("0*.png")])

    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        wait_until(lambda: made() >= 12 or process.poll() is not None, 180)
        process.kill()
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    done = {record["line"] for record in records(out)}
    assert 12 <= len(before) < 40
    wait_until(lambda: not of_folder(folder, "ray::_Actor"), 60)
    start = time.perf_counter()
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    print(f"{40 - len(done)} lines in {time.perf_counter() - start:.1f} s, start and end included")
    assert sorted(record["line"] for record in records(out)) == [*range(1, 41)]
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} <= {
        out / record["files"][0] for record in records(out) if record["line"] not in done
    }
    for record in records(out):
        with Image.open(out / record["files"][0]) as image:
            image.load()
    assert {path.name for path in out.iterdir()} == {"results.jsonl", *(record["files"][0] for record in records(out))}
