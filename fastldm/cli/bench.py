"""`fastldm bench`: fastldm and its peers, timed in turns."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastldm.cli.options import Size, check_numbers, debug_option, model_option
from fastldm.cli.report import reported
from fastldm.errors import EngineError, InputError
from fastldm.export.backends import BACKENDS

if TYPE_CHECKING:
    from fastldm.profiling.compare import Row, Task

# compare.PEERS, which costs torch to import; a test holds them equal
PEERS = ("diffusers", "diffusers-compile", "onnxruntime", "openvino", "optimum", "openvino-genai")


@click.command()
@model_option
@click.option(
    "--compare", default="diffusers", show_default=True, metavar="PEERS", help=f"Some of {','.join(PEERS)}, by commas."
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="DIR",
    help="A bundle of MODEL, for fastldm to run too; may be repeated. Peers other than diffusers run the first that "
    "was exported without --split.",
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="PEER=PATH",
    help="An interpreter that has this peer, in an environment of its own; may be repeated.",
)
@click.option(
    "--what",
    type=click.Choice(["picture", "step"]),
    default="picture",
    show_default=True,
    help="Prompt to picture, or one guided evaluation of the U-Net.",
)
@click.option("--size", type=Size(), help="In pixels.  [default: the model's]")
@click.option("--n", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Sampler steps.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale.  [default: the model's]")
@click.option(
    "--sampler",
    metavar="NAME",
    help="A scheduler of diffusers, such as EulerDiscreteScheduler.  [default: the model's]",
)
@click.option("--prompt", default="a red apple", show_default=True)
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="By commas.")
@click.option(
    "--backend",
    type=click.Choice(["all", "torch", *(name for name, backend in BACKENDS.items() if "cpu" in backend.devices)]),
    default="all",
    show_default=True,
    help="Of fastldm; all but torch run the bundles.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of each contender.  [default: as many as PyTorch takes]")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each contender.  [default: 7, of cpu-step 3]")
@click.option(
    "--suite",
    type=click.Choice(["cpu-step", "ladder"]),
    help="cpu-step: one guided step of an SD1.5-size U-Net at 256x256, random weights. ladder: from "
    "eager diffusers to captured steps, one idea at a time, from a checkout and on a GPU.",
)
@click.option("--json", "out", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures here, too.")
@debug_option
def bench(model: str, debug: bool, out: Path | None, suite: str | None, **options: Any) -> None:
    """Run fastldm and its peers in turns on the same weights and inputs, and say how many times faster each is.

    \b
    fastldm bench                                                     the model that ships, against diffusers
    fastldm export ./bundle --split
    fastldm bench --compare diffusers,diffusers-compile --bundle ./bundle
    fastldm bench -m ./sd15 --what step --size 256x256 --bundle ./sd15-split --bundle ./sd15-onnx \\
        --compare diffusers,onnxruntime,openvino --json sd15.json

    Every contender is a process of its own. Each is first compared with the first peer in float32: one that does not
    compute the same is red, and its time means nothing. A ratio is the median of the rounds' ratios, in brackets the
    quarter and three quarters of them. The peers onnxruntime and openvino are diffusers' pipeline with its networks
    replaced, so that their memory and their time to load count its weights too. optimum needs an older transformers
    than fastldm, and so an environment of its own: --python optimum=PATH. In all of them malloc keeps memory
    between ops, as in this command itself.
    """
    with reported(debug):
        from fastldm.files import check_output, whole_file
        from fastldm.profiling import compare

        check_numbers(options["size"], options["batch"], options["steps"])
        if out is not None:
            check_output(out, force=True)
        if suite == "ladder":
            if out is not None:
                raise InputError("--suite ladder writes its figures to benchmarks/results itself: leave out --json")
            _ladder()
            return
        if find_spec("diffusers") is None:
            raise EngineError("diffusers is not installed, and is what is compared with: pip install 'fastldm[bench]'")
        peers = [peer.strip() for peer in options["compare"].split(",") if peer.strip()]
        unknown = [peer for peer in peers if peer not in PEERS]
        if unknown or not peers:
            raise InputError(f"--compare {options['compare']!r}: expected some of {', '.join(PEERS)}")
        task = _cpu_step(options) if suite == "cpu-step" else _task(model, options)
        dtypes = [dtype.strip() for dtype in options["dtypes"].split(",")]
        if not set(dtypes) <= {"float32", "bfloat16"} or dtypes[0] != "float32":
            raise InputError(f"--dtypes {options['dtypes']!r}: expected float32, then bfloat16 if you like")
        pythons = dict(_python(option) for option in options["pythons"])
        contenders = compare.contenders(peers, options["bundles"], dtypes, options["backend"], pythons)
        is_terminal = sys.stderr.isatty()

        def show(text: str) -> None:
            if is_terminal:
                click.echo(text, err=True)

        rows = compare.compare(task, contenders, options["rounds"] or (3 if suite == "cpu-step" else 7), show)
        click.echo(table(task, rows))
        if out is not None:
            with whole_file(out) as file:
                file.write(f"{json.dumps(record(task, rows), indent=1)}\n".encode())


def _python(option: str) -> tuple[str, str]:
    peer, _, path = option.partition("=")
    if peer not in PEERS or not Path(path).is_file():
        raise InputError(f"--python {option!r}: expected PEER=PATH, such as optimum=/opt/optimum/bin/python")
    return peer, str(Path(path).absolute())  # as it is: an environment's interpreter is a link


def _ladder() -> None:
    """benchmarks/ladder.py, which a checkout has and an installation has not."""
    import subprocess

    from fastldm.system import CHECKOUT

    if not (CHECKOUT / "benchmarks" / "ladder.py").is_file():
        raise InputError("the ladder is part of a checkout of fastldm: run it there, by `fastldm bench --suite ladder`")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.ladder"], cwd=CHECKOUT).returncode)


def _cpu_step(options: dict[str, Any]) -> Task:
    import torch

    from fastldm.profiling import compare

    fixed = [name for name in ("bundles", "size", "steps", "guidance", "sampler") if options[name]]
    engines = [peer for peer in compare.OF_A_BUNDLE if peer in options["compare"].split(",")]
    if fixed or engines:
        raise InputError(
            f"--suite cpu-step is one step at 256x256 of a network with random weights, of which there is no bundle: "
            f"leave out {', '.join([*fixed, *engines])}, or leave out --suite and give -m MODEL --what step"
        )
    threads = options["threads"] or torch.get_num_threads()
    return compare.Task(compare.RANDOM, "step", 256, 256, "DDIMScheduler", 1, 7.5, threads, batch=options["batch"])


def _task(model: str, options: dict[str, Any]) -> Task:
    import diffusers
    import torch

    from fastldm.export.engine import is_bundle
    from fastldm.model import describe
    from fastldm.profiling import compare
    from fastldm.runtime.complete import sample_request

    if is_bundle(model):
        raise InputError(f"{model} is a bundle, which diffusers cannot load: give it as --bundle, and its model as -m")
    if Path(model).is_file():
        raise InputError(f"{model} is one file: --compare needs a diffusers folder, or a hub id")
    sampler = options["sampler"]
    if sampler is not None and not hasattr(diffusers, sampler):
        raise InputError(f"--sampler {sampler!r}: expected a scheduler of diffusers, such as EulerDiscreteScheduler")
    spec = describe(model)
    sample = sample_request(spec, 64, 64)
    if spec.family.by_class or sample.keys() != {"prompt"} or not sample["prompt"]:
        raise InputError(
            f"{model} is {spec.family.name}, and what is compared are pictures of a prompt alone by Stable Diffusion's "
            f"pipelines: `fastldm profile -m {model}` says where its time goes"
        )
    if options["what"] == "step" and (spec.unet.needs_added or spec.unet.time_cond_proj_dim is not None):
        raise InputError(f"--what step is for U-Nets that read a text alone, not for {spec.family.name}: leave it out")
    width, height = options["size"] or spec.default_size
    guidance = spec.family.guidance_scale if options["guidance"] is None else options["guidance"]
    return compare.Task(
        str(Path(model).absolute()) if Path(model).exists() else model,
        options["what"],
        width,
        height,
        sampler or spec.checkpoint.scheduler["_class_name"],
        options["steps"] or spec.family.num_inference_steps,
        guidance,
        options["threads"] or torch.get_num_threads(),
        prompt=options["prompt"],
        batch=options["batch"],
    )


def record(task: Task, rows: list[Row]) -> dict[str, Any]:
    """What `--json` writes."""
    from dataclasses import asdict
    from importlib import metadata

    import torch

    from fastldm.system import machine

    versions: dict[str, str | None] = {}
    for name in ("diffusers", "transformers", "onnxruntime", "openvino", "openvino-genai"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    info = {"machine": machine(torch.device("cpu")), "versions": versions, "task": asdict(task)}
    return {**info, "command": " ".join(["fastldm", *sys.argv[1:]]), "rows": [row.to_dict() for row in rows]}


def table(task: Task, rows: list[Row]) -> str:
    """The rows for a person."""
    size = f"{task.batch} x {task.width}x{task.height}"
    workload = (
        "one guided step" if task.what == "step" else f"{task.steps} steps, {task.sampler}, guidance {task.guidance:g}"
    )
    lines = [f"{task.model}, {size}, {workload}; {task.threads} threads each, {len(rows[0].seconds)} rounds", ""]
    width = max(len(str(row.contender)) for row in rows)
    lines.append(f"{'':{width}}   seconds   times faster           load   first    memory   difference")
    for row in rows:
        title = f"{row.contender!s:{width}}"
        if row.failure:
            lines.append(click.style(f"{title}   cannot run: {row.failure}", fg="red"))
            continue
        low, high = row.spread
        load = "     -" if row.load is None else f"{row.load:6.1f}"
        costs = f"{load}  {row.first:6.2f}  {row.peak / 2**20:5.0f} MiB"
        if row.wrong:
            text = f"{title}   does not compute the same: {row.difference:.1e} off"
            lines.append(click.style(text, fg="red"))
            continue
        ratio = f"{row.ratio:6.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{title}   {row.median:7.3f}  {ratio:<22} {costs}   {row.difference:.0e}")
    return "\n".join(lines)
