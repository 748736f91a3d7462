"""`fastldm prepare`: a model exported into the cache, so that it runs on what is fastest on this CPU."""

from __future__ import annotations

import click

from fastldm.cli.options import debug_option, model_option
from fastldm.cli.report import reported


@click.command()
@model_option
@click.option("--variant", metavar="V", help="Weights variant of a folder or hub id, such as fp16.")
@click.option("--allow-pickle", is_flag=True, help="Take tensors from pickled files too.")
@debug_option
def prepare(model: str, variant: str | None, allow_pickle: bool, debug: bool) -> None:
    """Export a model once into fastldm's cache, prove and measure it on ONNX Runtime and OpenVINO, where they are
    installed, and on PyTorch: what is fastest on this CPU then runs it, wherever no backend is named.

    \b
    fastldm prepare                      the model that ships inside
    fastldm prepare -m ./my-sd15         a folder, file or hub id
    fastldm generate "a castle" -m ./my-sd15

    A model that runs so takes no adapters, controls or embeddings of tokens: with `--lora` and the like it runs on
    PyTorch, and in Python with backend="torch". Where its files have changed it does, too, until it is prepared anew.
    """
    with reported(debug):
        from fastldm.model import need_exporter

        need_exporter()
        from fastldm.profiling.prepare import prepare

        options = {"variant": variant, "allow_pickle": allow_pickle}
        taken = prepare(model, {k: v for k, v in options.items() if v}, say=lambda text: click.echo(text, err=True))
        click.echo(f"{model} runs on {taken} here")
