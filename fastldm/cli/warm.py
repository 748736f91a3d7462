"""`fastldm warm`: a model's kernels, compiled ahead."""

from __future__ import annotations

import itertools
import os
import sys

import click

from fastldm.cli.options import Size, check_numbers, control_option, debug_option, model_option
from fastldm.cli.report import reported
from fastldm.errors import InputError


@click.command()
@model_option
@click.option("--arch", multiple=True, metavar="A", help="Such as sm_90; may be repeated.  [default: this machine's]")
@click.option("--size", type=Size(), multiple=True, help="In pixels; may be repeated.  [default: the model's]")
@click.option(
    "--n", "batch", type=click.IntRange(min=1), multiple=True, default=(1,), help="Pictures; may be repeated."
)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--lora", is_flag=True, help="Those that requests with different adapters in one batch launch, too.")
@control_option
@click.option("--pag", is_flag=True, help="Those of --pag-scale, a third row of the U-Net for each picture, too.")
@click.option("--apg-momentum", is_flag=True, help="Those of projected guidance with momentum, too.")
@click.option("--cache", metavar="DIR", help="Where the kernels go.  [default: Triton's cache]")
@debug_option
def warm(
    model: str,
    arch: tuple[str, ...],
    size: tuple[tuple[int, int], ...],
    batch: tuple[int, ...],
    dtype: str,
    lora: bool,
    controls: tuple[tuple[str, float], ...],
    pag: bool,
    apg_momentum: bool,
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

        from fastldm.adapters.control import describe_control
        from fastldm.loading.spec import enlarged_size
        from fastldm.model import describe
        from fastldm.planning import warm

        for images, pixels in itertools.product(batch, size or (None,)):
            check_numbers(pixels, images)
        if not arch:
            if not torch.cuda.is_available():
                raise InputError(f"torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}")
            arch = tuple(f"sm_{a}{b}" for a, b in {torch.cuda.get_device_capability()})
        for name in arch:
            warm.parse_arch(name)
        spec = describe(model)
        sizes = list(size or [spec.default_size])
        enlarged = enlarged_size(model, spec)
        if enlarged in sizes:  # made at the model's own size, and by another model from there
            sizes.append(spec.default_size)
        configs = list(dict.fromkeys(describe_control(source, spec) for source, _ in controls))
        for name in arch:
            with tqdm(desc=name, bar_format="{desc}: {elapsed} {postfix}", disable=not sys.stderr.isatty()) as bar:
                options = {"dtype": getattr(torch, dtype), "lora": lora, "controls": configs}
                options |= {"pag": pag, "apg_momentum": apg_momentum}
                options["on_kernel"] = bar.set_postfix_str
                count = warm.warm(spec, name, sizes=list(dict.fromkeys(sizes)), batches=batch, **options)
                if enlarged in sizes:
                    own = {**options, "lora": False, "controls": (), "pag": False, "apg_momentum": False}
                    count += warm.warm(describe("upscaler"), name, sizes=[enlarged], batches=batch, **own)
            click.echo(f"{name}: {count} kernels in {warm.cache_folder()}")
