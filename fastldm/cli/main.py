"""The `fastldm` command.

Only click is imported here: `--help` and `--version` answer at once, and each command imports what it runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastldm import __version__
from fastldm.cli.report import Commands, reported
from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.pipeline import Pipeline
    from fastldm.planning.memory import MemoryPlan


class Size(click.ParamType):
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", str(value).strip())
        if not match:
            self.fail(
                f"{value!r} is not a size: write WIDTHxHEIGHT in pixels, such as 768x512, or one number", param, ctx
            )
        width = int(match[1])
        return width, int(match[2] or width)


def check_numbers(size: tuple[int, int] | None, pictures: int = 1, steps: int | None = None) -> None:
    """InputError for numbers that no request may have, before anything is computed of them."""
    from fastldm.request import Request

    width, height = size or (None, None)
    Request("", width=width, height=height, num_inference_steps=steps, num_images_per_prompt=pictures)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastldm")
def main() -> None:
    """Run trained latent diffusion models as fast as the hardware allows.

    \b
    fastldm generate "a red apple" -o apple.png        with the small model that ships inside
    fastldm generate "a castle" -m ./my-sd15 --steps 20 --sampler "dpm++ 2m karras"
    fastldm doctor                                     what this machine has, and what it lacks
    fastldm warm -m ./my-sd15 --arch sm_90             compile its kernels before the first request
    fastldm plan -m ./my-sd15 --size 1024x1024 --n 4   what memory a request takes, and whether it fits
    fastldm profile -m ./my-sd15                       where the time goes, and what would help most
    fastldm bench -m ./my-sd15                         beside diffusers, in turns
    fastldm export -m ./my-sd15 ./bundle --split       for ONNX Runtime, OpenVINO and TensorRT: see its --help
    """


model_option = click.option(
    "-m",
    "--model",
    default="default",
    show_default=True,
    metavar="MODEL",
    help="A diffusers folder, a hub id, a .safetensors file, an exported bundle, or 'default' for the model that ships "
    "inside.",
)
decode_option = click.option(
    "--decode",
    type=click.Choice(["whole", "sliced", "tiled"]),
    default="whole",
    show_default=True,
    help="Picture by picture, or in tiles too, takes less memory.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "onnxruntime", "openvino", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the networks. All but torch need MODEL to be a bundle, which `fastldm export` writes; auto takes, "
    "of a bundle, what `fastldm verify` found fastest here.",
)


def _list_things(ctx: click.Context, param: click.Parameter, group: str | None) -> None:
    """`--list`: as `--help`, it answers in place of the command."""
    if group is None:
        return
    with reported(debug=False):
        from fastldm.cli.things import listing

        click.echo(listing(group))
    ctx.exit()


debug_option = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")


@main.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where the picture goes; with --n 4, a.png becomes a-0.png to a-3.png.  [default: fastldm-SEED.png]",
)
@model_option
@click.option("--negative", metavar="TEXT", help="What to avoid.")
@click.option("--steps", type=int, metavar="N", help="Sampler steps.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 or less is off.  [default: the model's]")
@click.option("--sampler", metavar="NAME", help="Such as 'euler a' or 'dpm++ 2m karras'.  [default: the model's]")
@click.option(
    "--seed", type=int, metavar="S", help="The same seed makes the same picture; picture k of --n uses S + k."
)
@click.option("--size", type=Size(), help="In pixels, such as 768x512.  [default: the model's]")
@click.option("--n", "count", type=click.IntRange(min=1), default=1, show_default=True, help="How many pictures.")
@click.option("--init-image", metavar="FILE", help="Start from this picture instead of noise.")
@click.option("--strength", type=float, help="How much of --init-image is redone, 0 to 1.  [default: 0.8]")
@click.option("--mask", metavar="FILE", help="Repaint only where this picture is white; needs --init-image.")
@click.option("--literal", is_flag=True, help="Take brackets in PROMPT as text, not as weights.")
@click.option("--clip-skip", type=int, metavar="N", help="Leave out the text encoder's last N layers.")
@click.option("--device", metavar="D", help="Such as cpu, cuda or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--variant", metavar="V", help="Weights variant of a folder or hub id, such as fp16.")
@decode_option
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--no-metadata", is_flag=True, help="Do not write prompt and settings into the PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--list",
    is_flag=False,
    flag_value="",
    is_eager=True,
    expose_value=False,
    callback=_list_things,
    metavar="[GROUP]",
    help="Name the things that the model inside knows, of a group such as 'animals', and do nothing else.",
)
@debug_option
def generate(
    prompt: str, output: str | None, model: str, count: int, as_json: bool, debug: bool, **options: Any
) -> None:
    """Make a picture for PROMPT.

    \b
    fastldm generate "a red apple"
    fastldm generate "a (shiny:1.3) car" --n 4 --seed 7 -o car.png
    fastldm generate "a cat, oil painting" -m ./sd15 --init-image cat.png --strength 0.6
    fastldm generate "a cat" -m ./sd15-onnx --backend openvino
    """
    with reported(debug):
        _generate(prompt, output, model, count, as_json, options)


def _generate(prompt: str, output: str | None, model: str, count: int, as_json: bool, options: dict[str, Any]) -> None:
    from fastldm.request import Request, picture_seeds

    width, height = options["size"] or (None, None)
    given = {
        "negative_prompt": options["negative"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"],
        "sampler": options["sampler"],
        "image": options["init_image"],
        "strength": options["strength"],
        "mask_image": options["mask"],
        "literal_prompt": options["literal"],
        "clip_skip": options["clip_skip"],
        "seed": options["seed"],
        "height": height,
        "width": width,
        "num_images_per_prompt": count,
    }
    # All that can be wrong is found before the model is loaded: the request itself, then the place to write to.
    request = Request(prompt=prompt, **{name: value for name, value in given.items() if value is not None})
    request = request.replace(seed=picture_seeds(request))
    seeds = picture_seeds(request)

    from fastldm.image import measure, output_paths, save_result

    paths = output_paths(output or f"fastldm-{seeds[0]}.png", count, force=options["force"])
    for name, path in (("--init-image", options["init_image"]), ("--mask", options["mask"])):
        if path is not None:
            measure(path, name)

    from fastldm.pipeline import Pipeline

    where = {name: options[name] for name in ("device", "dtype", "backend", "variant")}
    pipe = Pipeline.from_pretrained(model, **where)
    if options["decode"] != "whole":
        (pipe.enable_vae_tiling if options["decode"] == "tiled" else pipe.enable_vae_slicing)()
    if model == "default":
        _name_nearest(pipe, prompt)
    result = pipe(request, progress=not as_json and sys.stderr.isatty())
    save_result(result, paths, pipe.name, metadata=not options["no_metadata"])

    timings = result.timings
    if as_json:
        record = {
            "files": [str(path) for path in paths],
            "seeds": list(result.seeds),
            "model": pipe.name,
            "backend": result.backend,
            "device": str(pipe.device),
            "dtype": result.dtype,
            "timings": {"text": timings.text, "steps": timings.steps, "decode": timings.decode, "total": timings.total},
        }
        click.echo(json.dumps(record))
        return
    for path, seed in zip(paths, result.seeds, strict=True):
        click.echo(f"{path}  seed {seed}")
    steps = len(timings.steps)
    click.echo(
        f"{result.backend} {result.dtype} on {pipe.device}: {timings.total:.2f} s (text {timings.text:.2f}, "
        f"{steps} steps {sum(timings.steps):.2f}, decode {timings.decode:.2f})"
    )


def _name_nearest(pipe: Pipeline, prompt: str) -> None:
    """Say on stderr what the model inside takes a prompt for that names nothing it knows."""
    from fastldm.cli import things

    if prompt.strip() and not things.knows_a_word(prompt):
        near = ", ".join(repr(name) for name in things.nearest(pipe, prompt))
        click.echo(
            f"warning: the prompt names nothing that the default model knows; what it knows nearest to it: {near} "
            "(all: fastldm generate --list)",
            err=True,
        )


@main.command()
@model_option
@click.option("--arch", multiple=True, metavar="A", help="Such as sm_90; may be repeated.  [default: this machine's]")
@click.option("--size", type=Size(), multiple=True, help="In pixels; may be repeated.  [default: the model's]")
@click.option(
    "--n", "batch", type=click.IntRange(min=1), multiple=True, default=(1,), help="Pictures; may be repeated."
)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--cache", metavar="DIR", help="Where the kernels go.  [default: Triton's cache]")
@debug_option
def warm(
    model: str,
    arch: tuple[str, ...],
    size: tuple[tuple[int, int], ...],
    batch: tuple[int, ...],
    dtype: str,
    cache: str | None,
    debug: bool,
) -> None:
    """Compile a model's kernels, so that the first request does not have to. Needs no GPU.

    \b
    fastldm warm -m ./sd15 --arch sm_90 --arch sm_89
    RUN fastldm warm -m ./sdxl --arch sm_90 --size 1024x1024 --cache /opt/kernels      in a Dockerfile, with
    ENV TRITON_CACHE_DIR=/opt/kernels
    """
    with reported(debug):
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache
        import torch
        from tqdm import tqdm

        from fastldm.loading import spec as loading
        from fastldm.planning import warm

        for pictures in batch:
            for one_size in size or (None,):
                check_numbers(one_size, pictures)
        if not arch:
            if not torch.cuda.is_available():
                raise InputError(f"torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}")
            arch = tuple(f"sm_{a}{b}" for a, b in {torch.cuda.get_device_capability()})
        for one in arch:
            warm.parse_arch(one)
        spec = loading.describe(model)
        for one in arch:
            with tqdm(desc=one, bar_format="{desc}: {elapsed} {postfix}", disable=not sys.stderr.isatty()) as bar:
                sizes = size or [spec.default_size]
                made = warm.warm(
                    spec, one, sizes=sizes, batches=batch, dtype=getattr(torch, dtype), on_kernel=bar.set_postfix_str
                )
            click.echo(f"{one}: {made} kernels in {warm.cache_folder()}")


@main.command()
@model_option
@click.option("--size", type=Size(), help="In pixels, such as 1024x1024.  [default: the model's]")
@click.option(
    "-n", "--n", "--batch", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures."
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Sampler steps.  [default: the model's]")
@decode_option
@click.option("--init-image", is_flag=True, help="It starts from a picture, which is encoded.")
@click.option("--arch", metavar="A", help="A GPU that need not be here, such as sm_90.  [default: this machine's]")
@click.option("--device", metavar="D", help="Such as cpu, cuda or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@debug_option
def plan(
    model: str,
    size: tuple[int, int] | None,
    batch: int,
    steps: int | None,
    decode: str,
    init_image: bool,
    arch: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what memory a request would take, by name. Allocates none of it and reads no weights.

    \b
    fastldm plan -m ./sdxl --size 1024x1024 --n 4
    fastldm plan -m ./sdxl --n 4 --arch sm_89 --json
    """
    with reported(debug):
        import torch

        from fastldm import engine
        from fastldm.kernels.dispatch import device_capability
        from fastldm.loading import spec as loading
        from fastldm.planning import memory
        from fastldm.planning.warm import parse_arch

        check_numbers(size, batch, steps)
        if arch is not None and device is not None:
            raise InputError("give --arch for a GPU that need not be here, or --device for one that is, not both")
        place = torch.device("cuda")
        if arch is None:
            place = loading.choose_device(engine.choose_device(backend, device))
        target = parse_arch(arch) if arch is not None else 0
        if arch is None and place.type == "cuda":
            target = device_capability(place.index or 0)
        spec = loading.describe(model)
        width, height = size or spec.default_size
        runs = engine.choose(backend, model, place, dtype)
        given: dict[str, Any] = {} if steps is None else {"steps": steps}
        if runs == "torch":
            given["dtype"] = loading.choose_dtype(dtype, place)
        else:
            engine.check_size(engine.latents(model), spec.vae.factor, width, height)
            given["backend"] = runs
            given["dtype"], given["precision"] = engine.precisions(model, runs, place, dtype)
        made = memory.plan(
            memory.Workload.of_spec(
                spec,
                width=width,
                height=height,
                batch=batch,
                arch=target,
                decode=decode,
                encode=init_image,
                **given,
            )
        )
        free = memory.free_bytes(place) if arch is None else None
        if as_json:
            fits = None if free is None else {"fits": made.fits(free), "free": free}
            ways = [] if free is None or made.fits(free) else [one.to_dict() for one in made.remedies(free)]
            click.echo(json.dumps({"model": model, **made.to_dict(), "here": fits, "would_fit": ways}, indent=2))
        else:
            click.echo(_plan_table(made, free))


def _plan_table(made: MemoryPlan, free: int | None) -> str:
    """A plan for a person; what takes less than 50 KiB in one line."""
    from fastldm.planning.memory import size

    asked, factor = made.workload, made.workload.vae.factor
    rows: list[tuple[str, int, str]] = []
    for title, lines in (("weights", made.weights), ("buffers", made.buffers), ("libraries", made.libraries)):
        if not (whole := sum(line.bytes for line in lines)):
            continue
        small = [line for line in lines if line.bytes < 50 * 1024]
        rows.append((title, whole, ""))
        rows += [(f"  {line.name}", line.bytes, line.note) for line in lines if line not in small]
        if small:
            rows.append(("  others", sum(line.bytes for line in small), ", ".join(line.name for line in small)))
    rows.append(("all the time", made.resident, ""))
    rows += [(f"  and in {line.name}", line.bytes, line.note) for line in made.phases]
    largest = max(made.phases, key=lambda line: line.bytes)
    rows += [("needed", made.needed, f"all the time, and in {largest.name}"), made.cached, ("peak", made.peak, "")]
    wide = max(len(name) for name, _, _ in rows)
    device = f"sm_{asked.arch}" if asked.arch else "a CPU"
    dtype = str(asked.precision or asked.dtype).removeprefix("torch.")
    said = [
        f"{asked.batch} x {asked.width * factor}x{asked.height * factor}{', guided' * asked.guided}, "
        f"{asked.steps} steps, {asked.backend} {dtype} on {device}, {asked.decode} decode",
        "",
        *(f"{name:<{wide}}  {size(count):>10}  {note}".rstrip() for name, count, note in rows),
    ]
    if free is None:
        return "\n".join(said)
    if not made.fits(free):
        fits = f"does not fit: {size(free)} are free; what would: {made.advice(free)}"
    else:
        fits = f"fits: {size(free)} are free" + (", if PyTorch gives back what it caches" if made.peak > free else "")
    return "\n".join([*said, "", fits])


@main.command()
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
        from fastldm.loading import spec as loading
        from fastldm.planning import tune

        check_numbers(size, batch)
        path = Path(output)
        check_output(path, force=True)
        tune.read_table(path)
        tune.check_gpu()
        spec = loading.describe(model)
        width, height = size or spec.default_size
        shapes = tune.shapes_of(spec, width=width, height=height, batch=batch, dtype=getattr(torch, dtype))
        with tqdm(total=len(shapes), unit=" shapes", disable=not sys.stderr.isatty()) as bar:
            table = tune.tune(shapes, on_done=lambda op, shape, entry: bar.update())
        tune.merge_into(path, table)
        entries = sum(len(found) for ops in table.values() for found in ops.values())
        click.echo(f"{path}: {entries} entries; use them with FASTLDM_TUNED={path}")


@main.command()
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


from fastldm.cli import bench, export, profile  # noqa: E402, F401  commands of files of their own
from fastldm.cli import cache as _cache  # noqa: E402, F401
