"""How a command ends: one line, the right status, whatever the streams are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fastldm
from fastldm.cli import main
from fastldm.cli.report import reported
from fastldm.errors import Cancelled, CheckpointError, InputError

ROOT = Path(fastldm.__file__).resolve().parent.parent
ERRORS: list[tuple[BaseException, int, str]] = [
    (InputError("steps is 0:\n expected more"), 2, "fastldm: steps is 0: expected more\n"),
    (CheckpointError("no weights"), 1, "fastldm: no weights\n"),
    (Cancelled(), 130, "\nstopped\n"),
    (KeyboardInterrupt(), 130, "\nstopped\n"),
    (OSError(28, "No space left on device", "a.png"), 1, "fastldm: 'a.png': No space left on device\n"),
    (OSError(28, "No space left on device"), 1, "fastldm: the output: No space left on device\n"),
    (ConnectionError("no network"), 1, "fastldm: no network\n"),
    (BrokenPipeError(32, "Broken pipe"), 1, ""),
    (MemoryError(), 1, "fastldm: memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1, "fastldm: memory ran out"),
    (KeyError("x"), 1, "fastldm: KeyError: 'x' (--debug shows where; this may be a bug)\n"),
]


@pytest.mark.parametrize(("error", "status", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_end_in_one_line_and_status(error: BaseException, status: int, message: str) -> None:
    @click.command()
    def command() -> None:
        with reported(debug=False):
            raise error

    done = CliRunner().invoke(command)
    assert done.exit_code == status
    assert done.stderr.startswith(message) if message else done.stderr == ""
    assert done.stderr.strip().count("\n") == 0
    assert len(done.stderr) <= 2001


BODY = """
import sys, click
from fastldm.cli import report

@click.command()
def command():
    with report.reported(False):
        {}

report.run(command)
"""


def run(body: str, redirects: str) -> tuple[int, str]:
    """A command with such a body, started by a shell with such redirections: its status and standard error."""
    program = BODY.format(body)
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {redirects}', sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("body", "redirects", "status", "message"),
    [
        ("click.echo('x')", ">/dev/full", 1, "fastldm: the output: No space left on device\n"),
        ("print('x')", ">/dev/full", 1, "fastldm: the output: No space left on device\n"),
        ("click.echo('x')", ">/dev/full 2>/dev/full", 1, ""),
        ("click.echo('x', err=True)", "2>/dev/full", 1, ""),
        ("sys.stderr.isatty(), click.echo('x')", ">&- 2>&- <&-", 0, ""),
        ("raise ValueError", "2>&-", 1, ""),
        ("click.echo('\\udcff', err=True)", "", 0, "\\udcff\n"),
        # What a file opened later would get, were the closed stream's number free for it.
        ("f = open('/dev/null'); assert f.fileno() > 2, f; print('x')", ">&-", 0, ""),
    ],
)
def test_full_and_closed_streams_are_survived(body: str, redirects: str, status: int, message: str) -> None:
    assert run(body, redirects) == (status, message)


def test_closed_pipe_is_no_error() -> None:
    assert run("print('x\\n' * 10**6)", "| head -1 >/dev/null") == (0, "")  # the shell's status is that of head


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_help_into_a_full_disk_fails() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m fastldm --help >/dev/full', sys.executable],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (1, "fastldm: the output: No space left on device\n")


NINES = "9" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "--seed", NINES),
        ("generate", "a", "--steps", NINES[:4000]),
        ("generate", "a", "--guidance", NINES),
        ("generate", "a", "--guidance", "1e400"),
        ("generate", "a", "--size", NINES),
        ("generate", "a", "--size", f"64x{NINES}"),
        ("generate", "a", "--n", NINES),
        ("generate", NINES * 10),
        ("plan", "--n", NINES[:4000]),
        ("plan", "--n", str(10**12)),
        ("plan", "--steps", str(10**12)),
        ("plan", "--size", "999999999"),
        ("warm", "--arch", "sm_90", "--n", str(10**12)),
        ("profile", "--n", str(10**12)),
        ("bench", "--n", str(10**12)),
        ("cache", "prune", "--keep", NINES),
        (NINES,),
        (f"--{NINES}",),
        ("generate", "a", f"--{NINES}"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_endless_arguments_are_refused_briefly(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert "bug" not in done.output
    assert len(done.output) < 1000
    assert not list(tmp_path.iterdir())


def test_root_folder_cannot_be_a_bundle() -> None:
    done = CliRunner().invoke(main, ["export", "/"])
    assert (done.exit_code, done.output) == (
        2,
        "fastldm: / cannot be a bundle: give the name of a new folder\n",
    )
