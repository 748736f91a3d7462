"""`fastldm serve`: a model behind HTTP."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from fastldm.cli.options import backend_option, debug_option
from fastldm.cli.report import reported
from fastldm.errors import EngineError, InputError


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """`--config`: the options' defaults. Those of the command and of the environment count more."""
    if path is None:
        return
    with reported(debug=False):
        from fastldm.reading import read_file

        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        content = read_file(Path(path).expanduser(), error=InputError)
        try:
            values = tomllib.loads(content.decode())
        except ValueError as error:  # no TOML, or no UTF-8
            raise InputError(f"{path}: {error}") from error
        known = {option.name: option for option in ctx.command.params if option.name not in ("config", "debug")}
        defaults: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise InputError(f"{path}: there is no option {key!r}: `fastldm serve --help` lists them")
            many = bool(getattr(known[name], "multiple", False))
            if isinstance(value, dict):
                value = [f"{item}={where}" for item, where in value.items()]
            if many != isinstance(value, list):
                raise InputError(f"{path}: {key} is {value!r}: expected {'a list' if many else 'one value'}")
            defaults[name] = value
        ctx.default_map = {**(ctx.default_map or {}), **defaults}


_SECONDS, _COUNT = click.FloatRange(min=0), click.IntRange(min=1)


@click.command(context_settings={"auto_envvar_prefix": "FASTLDM_SERVE"})
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="A TOML file with these options by their names, such as port = 80, model = {small = './sd15'}.",
)
@click.option(
    "-m",
    "--model",
    "model",
    metavar="[NAME=]PATH",
    multiple=True,
    default=["default"],
    show_default="default, which ships inside",
    help="A model that clients may ask for: what Pipeline.from_pretrained takes. Repeatable; the first is for requests "
    "that name none.",
)
@click.option(
    "--lora",
    metavar="[NAME=]PATH",
    multiple=True,
    help="An adapter that requests may ask for: a file, a folder or hub id, or the name of one that ships. Repeatable.",
)
@click.option(
    "--control",
    metavar="[NAME=]PATH",
    multiple=True,
    help="A ControlNet or T2I-Adapter that requests may use: a file, a folder, a hub id, or shape, which ships. "
    "Repeatable.",
)
@click.option(
    "--ranker",
    metavar="FOLDER_OR_ID",
    help="The CLIP model that ranks what best_of samples, of all models, such as openai/clip-vit-large-patch14.  "
    "[default: each model's own]",
)
@click.option("--prior", metavar="FOLDER_OR_ID", help="Kandinsky's prior, for each model that is its decoder.")
@click.option(
    "--load",
    type=click.Choice(["start", "first"]),
    default="start",
    show_default=True,
    help="Load models at the start, or at their first use, where unused ones make room.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Other addresses need an API key, or --insecure.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any that is free.")
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="API keys, one a line; each request then needs one. So do those of FASTLDM_API_KEYS, divided by commas.",
)
@click.option("--insecure", is_flag=True, help="Serve other machines without a key.")
@click.option("--public-url", metavar="URL", help="Where clients reach the server, if behind a proxy.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="A web page that may use it. Repeatable.")
@click.option("--device", metavar="D", help="Such as cpu or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--allow-pickle", is_flag=True, help="Take tensors from pickled files too.")
@click.option("--max-batch", type=_COUNT, default=8, show_default=True, help="Pictures of one size that share a step.")
@click.option("--max-queue", type=_COUNT, default=256, show_default=True, help="Requests that may wait.")
@click.option("--max-per-key", type=_COUNT, default=64, show_default=True, help="Open requests of one key.")
@click.option("--max-connections", type=_COUNT, default=512, show_default=True)
@click.option("--max-body", type=float, default=64, show_default=True, help="Of a request, in MiB.")
@click.option("--body-timeout", type=_SECONDS, default=60, show_default=True, help="Seconds to send a request in.")
@click.option("--max-pixels", type=_COUNT, default=4194304, show_default=True, help="Of a picture that is made.")
@click.option("--max-input-pixels", type=_COUNT, default=33554432, show_default=True, help="Of one that is sent.")
@click.option("--max-n", type=_COUNT, default=10, show_default=True, help="Pictures of a request.")
@click.option("--max-steps", type=_COUNT, default=150, show_default=True)
@click.option("--max-prompt", type=_COUNT, default=8192, show_default=True, help="Characters.")
@click.option("--keep", type=_SECONDS, default=3600, show_default=True, help="Seconds that results can be fetched.")
@click.option("--max-kept", type=float, default=256, show_default=True, help="MiB of those.")
@click.option("--heartbeat", type=_SECONDS, default=15, show_default=True, help="Seconds between signs of life.")
@click.option("--drain", type=_SECONDS, default=60, show_default=True, help="Seconds to finish in after SIGTERM.")
@click.option(
    "--log", type=click.Choice(["plain", "json", "off"]), default="plain", show_default=True, help="A line a request."
)
@debug_option
def serve(debug: bool, **options: Any) -> None:
    """Serve models over HTTP: OpenAI's Images API, AUTOMATIC1111's, and jobs.

    Each option may also be in the environment, as FASTLDM_SERVE_PORT, or in a file for --config.

    \b
    fastldm serve --lora sketch
    curl localhost:8000/v1/images/generations -H 'content-type: application/json' \\
         -d '{"prompt": "a red apple", "adapters": {"sketch": 0.8}}'
    FASTLDM_API_KEYS=... fastldm serve -m sd15=./my-sd15 -m xl=./my-xl --host 0.0.0.0
    """
    with reported(debug):
        try:
            from fastldm.server.serve import serve as run
            from fastldm.server.settings import from_options
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("fastldm"):
                raise
            raise EngineError(f"{error.name} is not installed: pip install 'fastldm[serve]'") from error
        settings = from_options(options)
        _log()
        run(settings)


def _log() -> None:
    """The server's own lines as they are; what else is said with its origin."""
    from fastldm.server.middleware import write_log

    write_log()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
