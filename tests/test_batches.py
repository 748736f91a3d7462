"""`fastldm batch`: a file of prompts becomes a folder of pictures, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from sessions import tiny_pipeline

from fastldm import Pipeline, Session, batches, read_parameters
from fastldm.batches import Batch, Line, Maker, ProcessMaker, read_lines, shard
from fastldm.cli.main import main
from fastldm.errors import InputError

SMALL = {"num_inference_steps": 1, "width": 32, "height": 32}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def written(folder: Path, text: str, name: str = "prompts.jsonl") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def prompts(folder: Path, *texts: str) -> Path:
    return written(folder, "".join(f"{text}\n" for text in texts), "a.txt")


def request(line: Line) -> Any:
    assert line.request is not None, line.error
    return line.request


def records(out: Path) -> list[dict[str, Any]]:
    """All that are whole."""
    return [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines() if line[-1:] == "}"]


def make(pipe: Pipeline, lines: list[Line], out: Path, **options: Any) -> list[batches.Outcome]:
    with Maker(Session(pipe), "tiny") as maker:
        return [*Batch(lines, out, **options).run(maker)]


# --- what a file says


def test_each_kind_of_file_says_the_same(tmp_path: Path) -> None:
    files = {
        "a.jsonl": '{"prompt": "a, \\"b\\"", "seed": 5, "width": 64}\n\n"a cat"\n',
        "b.csv": 'prompt,seed,width\n"a, ""b""",5,64\n\na cat,,\n',
    }
    for name, text in files.items():
        first, second = map(request, read_lines(written(tmp_path, text, name), SMALL))
        assert (first.prompt, first.seed, first.width) == ('a, "b"', (5,), 64)
        assert (second.prompt, second.width) == ("a cat", 32)
    (line,) = read_lines(written(tmp_path, "\ufeff\n  a cat \r\n", "c.txt"))
    assert (line.number, request(line).prompt) == (2, "a cat")
    assert line.key == read_lines(tmp_path / "c.txt")[0].key, "a seed of its own, the same each time"
    assert line.key != read_lines(tmp_path / "c.txt", {"num_inference_steps": 9})[0].key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "expected an object"),
        ("3", "expected an object"),
        ('{"promt": "a"}', "promt"),
        ('{"prompt": "a", "seed": "x"}', "seed"),
        ('{"prompt": "a", "width": -8}', "width"),
        ('{"prompt": "a", "output_type": "pt"}', "output_type"),
        ('{"seed": 3}', "prompt"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_line_has_its_number(tmp_path: Path, text: str, message: str) -> None:
    good, bad = read_lines(written(tmp_path, f'"a cat"\n{text}\n'))
    assert good.request is not None
    assert (bad.number, bad.request) == (2, None)
    assert message in (bad.error or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.yaml", b"", "expected one of"), ("a.txt", b"\xff\xfe", "UTF-8"), ("none.txt", None, "none.txt")],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / name)


def test_pictures_are_found_beside_the_file(tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in" / "red.png")
    line = json.dumps({**SMALL, "num_inference_steps": 4, "prompt": "a cat", "image": "red.png", "strength": 0.5})
    monkeypatch.chdir(tmp_path)
    (outcome,) = make(pipe, read_lines(written(tmp_path / "in", line)), tmp_path / "out")
    assert outcome.files


# --- what is made


def test_pictures_are_those_of_the_pipeline(tmp_path: Path, pipe: Pipeline) -> None:
    fields = [{**SMALL, "prompt": f"a {k}", "seed": k, "num_images_per_prompt": 1 + k % 2} for k in range(6)]
    lines = read_lines(written(tmp_path, "".join(json.dumps(each) + "\n" for each in fields)))
    assert {one.line.number for one in make(pipe, lines, tmp_path / "out")} == {*range(1, 7)}
    for record in records(tmp_path / "out"):
        expected = pipe(**fields[record["line"] - 1])
        assert record["seeds"] == list(expected.seeds)
        for name, image in zip(record["files"], expected.images, strict=True):
            with Image.open(tmp_path / "out" / name) as made:
                assert np.abs(np.asarray(made).astype(int) - np.asarray(image).astype(int)).max() <= 1
        assert read_parameters(tmp_path / "out" / record["files"][0])[0].seed == record["line"] - 1


def test_only_what_is_missing_is_made_again(tmp_path: Path, pipe: Pipeline) -> None:
    lines, out = read_lines(prompts(tmp_path, *(f"a {k}" for k in range(5))), SMALL), tmp_path / "out"
    make(pipe, lines[:3], out)
    lost = records(out)[1]
    (out / lost["files"][0]).unlink()
    with (out / "results.jsonl").open("a") as file:
        file.write('{"line": 4, "key": "half of a li')  # of a process that died
    assert {one.line.number for one in make(pipe, lines, out)} == {lost["line"], 4, 5}
    assert not make(pipe, lines, out)
    assert [len(record["files"]) for record in records(out)] == [1] * 6


def test_a_bad_line_costs_nothing_else(tmp_path: Path, pipe: Pipeline) -> None:
    text = '"a cat"\n{"prompt": "a", "width": 1}\n{"prompt": "a", "adapters": {"none": 1}}\n"a dog"\n'
    outcomes = make(pipe, read_lines(written(tmp_path, text), SMALL), tmp_path / "out")
    assert {one.line.number: one.error is None for one in outcomes} == {1: True, 2: False, 3: False, 4: True}
    errors = {record["line"]: record.get("error", "") for record in records(tmp_path / "out")}
    assert "width" in errors[2]
    assert "none" in errors[3]


def test_shards_are_all_and_none_twice(tmp_path: Path) -> None:
    lines = read_lines(prompts(tmp_path, *(f"a {k}" for k in range(10))))
    parts = [shard(lines, k, 3) for k in (1, 2, 3)]
    assert sorted(line.number for part in parts for line in part) == [*range(1, 11)]
    assert [len(part) for part in parts] == [4, 3, 3]
    with pytest.raises(InputError, match="4/3"):
        shard(lines, 4, 3)


def test_two_processes_do_not_share_a_part(tmp_path: Path, pipe: Pipeline) -> None:
    lines = read_lines(prompts(tmp_path, "a cat", "a dog"), SMALL)
    with Maker(Session(pipe), "tiny") as maker:
        first = Batch(lines, tmp_path).run(maker, ahead=1)
        next(first)
        with pytest.raises(InputError, match="another process"):
            next(Batch(lines, tmp_path).run(maker))
        assert len([*Batch(lines, tmp_path, name="-2-of-2").run(maker)]) == 2
        first.close()
    assert len(make(pipe, lines, tmp_path)) == 1


def test_a_grid_has_all_pictures(tmp_path: Path, pipe: Pipeline) -> None:
    lines = read_lines(prompts(tmp_path, *(f"a {'very ' * k} long prompt" for k in range(5))), SMALL)
    with Maker(Session(pipe), "tiny") as maker:
        work = Batch(lines, tmp_path / "out")
        assert len([*work.run(maker)]) == 5
    pages = work.write_grid(tmp_path / "grid.png", columns=2, rows=2)
    assert [page.name for page in pages] == ["grid.png", "grid-2.png"]
    with Image.open(pages[0]) as sheet, Image.open(tmp_path / "out" / work.files[lines[0].key][0]) as one:
        assert sheet.size == (192, 260)
        shown = sheet.crop((2, 2, 94, 94)).resize((32, 32))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(one.convert("RGB")).astype(int)).mean() < 25


# --- processes that end


def test_command_makes_pictures_and_a_grid(tmp_path: Path) -> None:
    file, out = prompts(tmp_path, "a red apple", "a fish"), tmp_path / "out"
    done = CliRunner().invoke(main, ["batch", str(file), "-o", str(out), "--steps", "1", "--size", "32", "--grid"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"2 of 2 lines are in {out}", str(out / "grid.png")]
    assert len([*out.glob("0*.png")]) == 2


@pytest.mark.full
def test_command_goes_on(tmp_path: Path) -> None:
    file, out = prompts(tmp_path, "a red apple", "a fish"), tmp_path / "out"
    options = ["-o", str(out), "--steps", "1", "--size", "32"]
    assert CliRunner().invoke(main, ["batch", str(file), *options]).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    file.write_text("a red apple\na fish\n\na rocket\n")
    assert CliRunner().invoke(main, ["batch", str(file), *options]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([*out.glob("0*.png")]) == 3
    bad = CliRunner().invoke(main, ["batch", str(written(tmp_path, '"a cat"\n{"prompt": 3}\n')), *options])
    assert bad.exit_code == 1
    assert "line 2: " in bad.stderr
    assert "1 of 2 lines are in" in bad.stdout


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_makes_the_rest(tmp_path: Path, how: signal.Signals) -> None:
    file, out = prompts(tmp_path, *(f"a fish {k}" for k in range(60))), tmp_path / "out"
    command = [sys.executable, "-m", "fastldm", "batch", str(file), "-o", str(out), "--steps", "2"]

    def made() -> int:
        return len([*out.glob("0*.png")])

    kills = 0
    while kills < 4:
        before, process = made(), subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD)
        while made() < before + 12 and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        process.send_signal(how)
        process.wait(60)
        kills += 1
    assert kills >= 3
    assert subprocess.run(command, cwd=ROOT, env=ONE_THREAD).returncode == 0
    assert made() == 60
    assert {record["line"] for record in records(out)} == {*range(1, 61)}
    for record in records(out):
        with Image.open(out / record["files"][0]) as image:
            image.load()
    assert {path.name for path in out.iterdir()} == {"results.jsonl", *(record["files"][0] for record in records(out))}


class Deadly(Maker):
    """Some prompts end its process."""

    def _make(self, line: Line, out: Path) -> batches.Outcome:
        if request(line).prompt == "a bomb":
            time.sleep(0.3)  # while others are made
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._make(line, out)


def open_deadly() -> Maker:
    return Deadly(Session(tiny_pipeline()), "tiny")


def open_nothing() -> Maker:
    raise InputError("there is no such model")


@pytest.mark.full
def test_a_line_that_ends_the_process_is_set_aside(tmp_path: Path) -> None:
    texts = [*(f"a fish {k}" for k in range(9)), "a bomb", *["a cat"] * 3]
    lines, out = read_lines(prompts(tmp_path, *texts), SMALL), tmp_path / "out"
    with ProcessMaker(open_deadly) as maker:
        outcomes = [*Batch(lines, out).run(maker, ahead=8)]
    (bad,) = (one for one in outcomes if one.error is not None)
    assert (bad.line.number, bad.error) == (10, "it ended the process 2 times (SIGSEGV), and is set aside")
    assert len(outcomes) == 13
    assert {record["line"] for record in records(out) if record.get("files")} == {*range(1, 14)} - {10}
    again = Batch(lines, out)
    assert ([line.number for line in again.set_aside], again.left) == ([10], [])


@pytest.mark.full
def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    work = Batch(read_lines(prompts(tmp_path, "a cat"), SMALL), tmp_path / "out")
    with ProcessMaker(open_nothing) as maker, pytest.raises(InputError, match="no such model"):
        next(work.run(maker))
