"""`fastldm tune`: the fastest launch configuration of each kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fastldm.cli.options import Size, check_numbers, debug_option, model_option
from fastldm.cli.report import reported


@click.command()
@model_option
@click.option("-o", "--output", metavar="FILE", default="tuned.json", show_default=True, help="Entries are merged in.")
@click.option("--size", type=Size(), help="In pixels.  [default: the model's]")
@click.option("--n", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@debug_option
def tune(model: str, output: str, size: tuple[int, int] | None, batch: int, dtype: str, debug: bool) -> None:
    """Find the fastest launch configuration of each kernel for a model on this GPU.

    \b
    fastldm tune -m ./sd15 -o tuned.json
    FASTLDM_TUNED=tuned.json fastldm generate "a castle" -m ./sd15
    """
    with reported(debug):
        import torch
        from tqdm import tqdm

        from fastldm.files import check_output
        from fastldm.model import describe
        from fastldm.planning import tune

        check_numbers(size, batch)
        path = Path(output)
        check_output(path, force=True)
        tune.read_table(path)
        tune.check_gpu()
        spec = describe(model)
        width, height = size or spec.own_size
        shapes = tune.shapes_of(spec, width=width, height=height, batch=batch, dtype=getattr(torch, dtype))
        with tqdm(total=len(shapes), unit=" shapes", disable=not sys.stderr.isatty()) as bar:
            table = tune.tune(shapes, on_done=lambda op, shape, entry: bar.update())
        tune.merge_into(path, table)
        entries = sum(len(shapes_of_op) for ops in table.values() for shapes_of_op in ops.values())
        click.echo(f"{path}: {entries} entries; use them with FASTLDM_TUNED={path}")
