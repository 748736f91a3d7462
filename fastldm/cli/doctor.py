"""`fastldm doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import json

import click

from fastldm.cli.options import debug_option, model_option
from fastldm.cli.report import reported


@click.command()
@model_option
@click.option(
    "--arch", metavar="A", help="Which kernels would run on this GPU, such as sm_90.  [default: this machine]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@debug_option
def doctor(model: str, arch: str | None, as_json: bool, debug: bool) -> None:
    """Say what this machine has, what a model would run on here, and what each extra would bring."""
    with reported(debug):
        from fastldm.planning import doctor as checks

        report = checks.examine(model, arch)
        click.echo(json.dumps(report, indent=2) if as_json else checks.render(report))
