"""`fastldm` itself: its help, its version, and what wrong arguments get."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command import run

import fastldm
from fastldm.cli import main

ROOT = Path(fastldm.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
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
def test_mistakes_write_nothing_and_say_why(arguments: list[str], status: int, message: str, tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.exit_code == status, done.output
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def commands(group: click.Group = main, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A group and all below it, each with its words: ("generate",), ("cache", "ls")."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_help_lists_every_command_with_its_summary() -> None:
    done = run("--help")
    assert (done.exit_code, done.stderr) == (0, "")
    listed = done.stdout.partition("\nCommands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(main.commands)
    assert all(len(line.split()) > 3 for line in listed)
    assert run("-h").stdout == done.stdout
    assert run().exit_code == 2


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_each_command_names_its_options(path: tuple[str, ...]) -> None:
    done = run(*path, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["Usage: fastldm", *path, "[OPTIONS]"]))
    assert COMMANDS[path].help
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Option):
            assert all(name in done.stdout for name in parameter.opts)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_examples_in_help_are_accepted(path: tuple[str, ...]) -> None:
    """Each line that begins with `fastldm`, up to the remark beside it."""
    for line in re.sub(r"\\\n\s+", "", COMMANDS[path].help or "").splitlines():
        example = re.fullmatch(r"\s*(?:RUN )?fastldm (\S.*?)(?:  .*)?", line)
        if example:
            name, *arguments = shlex.split(example[1])
            main.commands[name].make_context(name, arguments)  # UsageError where it is wrong


def test_version() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"fastldm, version {fastldm.__version__}\n")


def test_module_runs_from_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastldm", "generate", "an owl", "--steps", "1", "-o", str(tmp_path / "owl.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'owl.png'}  seed ")
    wrong = subprocess.run([*command[:3], "paint"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Error: No such command 'paint'." in wrong.stderr
