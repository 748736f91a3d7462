"""The `fastldm` command in the test's own process: what it prints, and its exit status."""

from __future__ import annotations

from click.testing import CliRunner, Result

from fastldm.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="fastldm")
