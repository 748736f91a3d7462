"""How far it is from a prompt to its PNG, and from a weight to its kernel: see support/hops.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TITLES = ("A prompt's way to a PNG", "A weight's way to a kernel")


class Way(NamedTuple):
    files: set[str]
    hops: int


@pytest.fixture(scope="module")
def ways() -> dict[str, Way]:
    """From a process of its own, whose worker has not started yet: a thread that runs already is not observed."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "hops.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ways = {}
    for title, text in zip(TITLES, done.stdout.split("\n\n"), strict=True):
        *calls, total = text.strip().splitlines()
        assert total.endswith(" hops")
        ways[title] = Way({call.split()[0] for call in calls}, int(total.split()[0]))
    return ways


@pytest.mark.parametrize("title", TITLES)
def test_each_way_takes_at_most_15_hops(title: str, ways: dict[str, Way]) -> None:
    assert 10 < ways[title].hops <= 15


@pytest.mark.parametrize("title", TITLES)
def test_architecture_page_names_every_file_of_a_way(title: str, ways: dict[str, Way]) -> None:
    section = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    first_op = "kernels/layer_norm.py"  # which stands for any other
    assert not [file for file in ways[title].files - {first_op} if f"`{file}`" not in section]
