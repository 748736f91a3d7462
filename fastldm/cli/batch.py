"""`fastldm batch`: a file of prompts to a folder of pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from fastldm.cli.options import Size, backend_option, debug_option, lora_option, model_option
from fastldm.cli.report import reported
from fastldm.errors import EngineError


class Shard(click.ParamType):
    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no shard: write 1/4 to 4/4", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.argument("prompts", metavar="FILE")
@click.option("-o", "--out", required=True, metavar="FOLDER", help="Where pictures and results.jsonl go.")
@model_option
@click.option("--negative", metavar="TEXT", help="What to avoid, in lines that do not say.")
@click.option("--steps", type=int, metavar="N", help="Likewise sampler steps.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Likewise.  [default: the model's]")
@click.option("--sampler", metavar="NAME", help="Likewise.  [default: the model's]")
@click.option("--size", type=Size(), help="Likewise, in pixels, such as 768x512.  [default: the model's]")
@click.option("--n", "count", type=click.IntRange(min=1), help="Likewise, how many pictures of a line.  [default: 1]")
@click.option("--prior", metavar="MODEL", help="Kandinsky's prior, which makes of prompts what its decoder reads.")
@lora_option
@click.option("--shard", type=Shard(), help="Every N-th line, from number I: a part of them for each of N machines.")
@click.option(
    "--ray",
    "actors",
    type=click.IntRange(min=1),
    metavar="N",
    help="Have N actors of a Ray cluster make them, with a GPU each, or their share of the cores.",
)
@click.option("--grid", is_flag=True, help="Write grid.png too: all pictures, with their prompts.")
@click.option("--format", "kind", type=click.Choice(["png", "jpg", "webp"]), default="png", show_default=True)
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures that share a step."
)
@click.option("--device", metavar="D", help="Such as cpu or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--allow-pickle", is_flag=True, help="Take tensors from pickled files too.")
@debug_option
def batch(prompts: str, out: str, debug: bool, **options: Any) -> None:
    """Make the pictures of a file: .jsonl with fields of fastldm.Request, .csv with such columns, or .txt of prompts.

    \b
    fastldm batch prompts.txt -o out/ --steps 8 --grid
    echo '{"prompt": "a red apple", "seed": 3, "width": 96, "adapters": {"sketch": 0.8}}' > prompts.jsonl
    fastldm batch prompts.jsonl -o out/ --lora sketch
    fastldm batch prompts.csv -o out/ --shard 2/4      on the second of four machines

    It may be stopped at any moment, and started again: what is done stays, and the rest is made. A line that is
    wrong is reported with its number. A LoRA is for the lines that name it in `adapters`, and for all that do not say.
    """
    with reported(debug):
        if not _batch(prompts, Path(out).expanduser(), options):
            sys.exit(1)


def _batch(prompts: str, out: Path, options: dict[str, Any]) -> bool:
    """Whether all lines are done."""
    from functools import partial

    from tqdm import tqdm

    from fastldm import batches
    from fastldm.cli import loras
    from fastldm.cli.generate import reads_text

    width, height = options["size"] or (None, None)
    given = {
        "negative_prompt": options["negative"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"],
        "sampler": options["sampler"],
        "width": width,
        "height": height,
        "num_images_per_prompt": options["count"],
    }
    given = {name: value for name, value in given.items() if value is not None}
    reads = options["prior"] is not None or reads_text(options["model"], options["allow_pickle"])
    lines = batches.read_lines(prompts, given, reads_text=reads)
    part = ""
    if options["shard"]:
        lines, part = batches.shard(lines, *options["shard"]), "-{}-of-{}".format(*options["shard"])
    loras.find(options["loras"], allow_pickle=options["allow_pickle"])  # mistakes show before anything starts
    work, failed, most = batches.Batch(lines, out, name=part), 0, options["max_batch"]
    pictures = sum(line.request.batch for line in work.left if line.request is not None)
    with (
        _maker(partial(_open_maker, options), options) as maker,
        tqdm(total=pictures, unit=" pictures", disable=not sys.stderr.isatty()) as bar,
    ):
        for outcome in work.run(maker, ahead=4 * most * (options["actors"] or 1)):
            if outcome.error is not None:
                failed += 1
                bar.write(f"line {outcome.line.number}: {outcome.error}", file=sys.stderr)
            bar.update(len(outcome.files))
    done = sum(line.key in work.files for line in lines)
    others = {"failed": failed, "set aside before": len(work.set_aside)}
    told = "".join(f", {number} {what}" for what, number in others.items() if number)
    click.echo(f"{done} of {len(lines)} lines are in {out}{told}")
    if options["grid"]:
        for path in work.write_grid(out / f"grid{part}.png"):
            click.echo(path)
    return done == len(lines)


def _maker(open_maker: Any, options: dict[str, Any]) -> Any:
    if not options["actors"]:
        from fastldm.batches import ProcessMaker

        return ProcessMaker(open_maker)
    try:
        from fastldm.batches.ray import RayMaker
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastldm"):
            raise
        raise EngineError(f"{error.name} is not installed: pip install 'fastldm[ray]'") from error
    gpus = not (options["device"] or "").startswith("cpu")
    return RayMaker(open_maker, options["actors"], at_a_time=2 * options["max_batch"], gpus=gpus)


def _open_maker(options: dict[str, Any]) -> Any:
    """In the process that makes the pictures."""
    from fastldm.batches import Maker
    from fastldm.cli import loras
    from fastldm.files import FORMATS
    from fastldm.model import backend_for
    from fastldm.pipeline import Pipeline
    from fastldm.serving.session import Session

    placement = {name: options[name] for name in ("device", "dtype", "backend", "allow_pickle")}
    placement["backend"] = backend_for(options["model"], options["backend"], on_torch=bool(options["loras"]))
    pipe = Pipeline.from_pretrained(options["model"], prior=options["prior"], **placement)
    adapters = loras.find(options["loras"], allow_pickle=options["allow_pickle"])
    loras.load(pipe, adapters, allow_pickle=options["allow_pickle"])
    kind = FORMATS[f".{options['kind']}"]
    return Maker(Session(pipe, max_batch=options["max_batch"]), Path(options["model"]).name, kind=kind)
