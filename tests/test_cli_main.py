"""The command as a whole: what its help says, and what wrong arguments get."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["generate"], 2, "Missing argument 'PROMPT'"),
        (["generate", "a", "--size", "big"], 2, "'big' is not a size: write WIDTHxHEIGHT"),
        (["generate", "a", "--n", "0"], 2, "0 is not in the range"),
        (["generate", "a", "--steps", "0"], 2, "num_inference_steps is 0: expected a whole number of steps"),
        (["generate", "a", "--seed", "-1"], 2, "seed is -1"),
        (["generate", "a", "-o", "no/where.png"], 2, "the folder 'no' does not exist"),
        (["generate", "a", "-o", "a.gif"], 2, "picture format"),
        (["generate", "a", "--mask", "m.png"], 2, "mask_image was given without image"),
        (["generate", "a", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["generate", "a", "-m", "./nowhere"], 1, "nowhere"),
        (["plan", "--size", "61x64"], 2, "width is 61: expected a positive multiple of 4"),
        (["plan", "--arch", "sm_1"], 2, "arch is 'sm_1'"),
        (["plan", "--arch", "sm_90", "--device", "cpu"], 2, "give --arch for a GPU that need not be here, or --device"),
        (["paint"], 2, "No such command 'paint'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], status: int, says: str, tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.exit_code == status, done.output
    assert says in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
