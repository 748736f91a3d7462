"""`fastldm tune`: the file it merges into, and what it refuses; the timing on a GPU is a stand-in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from fastldm.planning import tune

ENTRY = {"config": {"ROWS": 2}, "path": "triton", "us": 1.5}


@pytest.fixture(autouse=True)
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Those that would have been timed."""
    shapes: dict[Any, Any] = {}

    def timed(selected: tune.Shapes, *, on_done: Any) -> dict[str, Any]:
        shapes.update(selected)
        for op, shape in selected:
            on_done(op, shape, ENTRY)
        return {"sm_90": {"geglu": {"c640": ENTRY}}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "check_gpu", lambda: None)
    monkeypatch.setattr(tune, "tune", timed)
    return shapes


def test_entries_are_merged_into_the_file(tmp_path: Path, shapes: dict[Any, Any]) -> None:
    existing = {"sm_90": {"geglu": {"c320": {**ENTRY, "us": 2.5}}}, "sm_80": {}}
    Path("own.json").write_text(json.dumps(existing))
    done = run("tune", "-o", "own.json", "--size", "32x64", "--n", "2", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert done.stdout == "own.json: 1 entries; use them with FASTLDM_TUNED=own.json\n"
    table = json.loads(Path("own.json").read_text())
    assert table["sm_90"]["geglu"] == {"c320": {**ENTRY, "us": 2.5}, "c640": ENTRY}
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]
    tensors = [x for args, kwargs in shapes.values() for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
    assert {x.dtype for x in tensors if x.is_floating_point()} >= {torch.bfloat16}


def test_default_file_is_tuned_json(tmp_path: Path) -> None:
    assert run("tune").stdout.startswith("tuned.json: 1 entries; ")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "none/tuned.json"], "the folder 'none' does not exist"),
        (["-o", "bad.json"], "bad.json"),
        (["--size", "0"], "height is 0"),
        (["--dtype", "float32"], "'float32' is not one of"),
        (["-m", "./nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_timing(options: list[str], message: str, shapes: dict[Any, Any]) -> None:
    Path("bad.json").write_text("[")
    done = run("tune", *options)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not shapes
    assert Path("bad.json").read_text() == "["
