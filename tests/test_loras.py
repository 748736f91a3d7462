"""cli/loras.py: adapters on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastldm.cli.loras import find, split_tags
from fastldm.cli.options import ScaledFile
from fastldm.errors import CheckpointError, InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.0)),
        ("C:\\a.safetensors:-.5", ("C:\\a.safetensors", -0.5)),
        ("owner/name:2", ("owner/name", 2.0)),
        ("sketch", ("sketch", 1.0)),
    ],
)
def test_scale_follows_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert ScaledFile().convert(text, None, None) == expected


def test_tags_leave_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    assert split_tags("a cat <lora:mine:0.8>, red <lora:sketch>") == (
        "a cat, red",
        [("mine.safetensors", 0.8), ("sketch", 1.0)],
    )
    assert split_tags("a <b> cat <loras:x:1>") == ("a <b> cat <loras:x:1>", [])
    with pytest.raises(InputError, match="expected a number"):
        split_tags("a cat <lora:mine:much>")


def test_files_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "style.safetensors").touch()
    first, second = tmp_path / "a" / "style.safetensors", tmp_path / "b"
    assert find([(str(first), 1.0), (str(second), 0.5)]) == [
        ("style", first, 1.0),
        ("style 2", second / "style.safetensors", 0.5),
    ]
    with pytest.raises(CheckpointError, match="does not exist here"):
        find([(str(tmp_path / "c"), 1.0)])
    with pytest.raises(InputError, match="expected a number from"):
        find([(str(first), 1e9)])
