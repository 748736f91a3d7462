"""`fastldm warm`: a model's kernels, compiled ahead."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

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
@click.option("--prior", metavar="MODEL", help="Kandinsky's prior, beside its decoder, too.")
@click.option("--refiner", metavar="MODEL", help="The model that goes on with the latents, too, at the same sizes.")
@click.option(
    "--upscaler",
    "upscalers",
    multiple=True,
    metavar="MODEL",
    help="A model that enlarges the pictures, as of `generate`, too.",
)
@click.option("--hires-scale", type=float, metavar="S", help="Each size so many times as large, too.")
@click.option("--best-of", type=click.IntRange(min=1), metavar="N", help="What ranks candidates, too, and their steps.")
@click.option("--ranker", metavar="FOLDER_OR_ID", help="What ranks them, as of `generate`.  [default: the model's own]")
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
    prior: str | None,
    refiner: str | None,
    upscalers: tuple[str, ...],
    hires_scale: float | None,
    best_of: int | None,
    ranker: str | None,
    cache: str | None,
    debug: bool,
) -> None:
    """Compile a model's kernels, so that the first request does not have to. Needs no GPU.

    Give what requests will have, by the names of `generate`: what a first one launches then is compiled. Samplers,
    steps, guidance scales, strengths and --switch-at are numbers that kernels read: they need none of their own.

    \b
    fastldm warm -m ./sd15 --arch sm_90 --arch sm_89
    fastldm warm -m ./sdxl --arch sm_90 --refiner ./sdxl-refiner
    fastldm warm -m ./IF-I-XL-v1.0 --arch sm_90 --upscaler ./IF-II-L-v1.0 --upscaler ./x4-upscaler
    fastldm warm -m ./sd15 --arch sm_90 --hires-scale 2 --pag --best-of 8 --ranker ./clip
    fastldm warm --arch sm_90 --size 128x128              both models: the one of 64x64, and what enlarges
    fastldm warm -m ./x4-upscaler --arch sm_90 --size 2048x2048      of the large picture
    RUN fastldm warm -m ./sdxl --arch sm_90 --size 1024x1024 --cache /opt/kernels      in a Dockerfile, with
    ENV TRITON_CACHE_DIR=/opt/kernels
    """
    with reported(debug):
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache
        import torch
        from tqdm import tqdm

        from fastldm.adapters.control import describe_control
        from fastldm.loading.ranker import describe_ranker, find_ranker
        from fastldm.loading.spec import enlarged_size
        from fastldm.model import describe, model_name
        from fastldm.planning import warm
        from fastldm.priors import describe_prior
        from fastldm.request import Request
        from fastldm.runtime import enlarge
        from fastldm.runtime.candidates import own_ranker
        from fastldm.runtime.guidance import pag_defaults
        from fastldm.serving.session import MAX_TOGETHER

        for images, pixels in itertools.product(batch, size or (None,)):
            check_numbers(pixels, images)
        if ranker is not None and best_of is None:
            raise InputError("--ranker is for --best-of: give both")
        if not arch:
            if not torch.cuda.is_available():
                raise InputError(f"torch sees no GPU here: say which to compile for with --arch {warm.ARCH_NAMES}")
            arch = tuple(f"sm_{a}{b}" for a, b in {torch.cuda.get_device_capability()})
        for name in arch:
            warm.parse_arch(name)
        spec = describe(model)
        if spec.follows and (set(size) - {spec.default_size} or hires_scale is not None or refiner is not None):
            fixed = "x".join(map(str, spec.default_size))
            raise InputError(f"this model's own networks make pictures of {fixed}: leave out other sizes and models")
        sizes = [spec.own_size] if spec.follows else list(size or [spec.default_size])
        enlarged = enlarged_size(model_name(model), spec)
        if enlarged in sizes:  # made at the model's own size, and by another model from there
            sizes.append(spec.default_size)
        large = sizes
        if hires_scale is not None:
            asked = [Request("", width=width, height=height, hires_scale=hires_scale) for width, height in sizes]
            large = [enlarge.size(request, spec.vae.factor)[::-1] for request in asked]
        guided = {"pag": pag or bool(pag_defaults(spec.checkpoint.index)), "apg_momentum": apg_momentum}
        own: dict[str, Any] = {"lora": lora, **guided}
        own["prior"] = () if prior is None else describe_prior(prior, spec.unet)
        own["controls"] = list(dict.fromkeys(describe_control(source, spec) for source, _ in controls))
        batches = list(batch)
        if best_of is not None:
            folder = own_ranker(Path(spec.checkpoint.source), "torch") if ranker is None else find_ranker(ranker)
            own["ranker"] = describe_ranker(folder)
            batches.append(Request("", candidates=best_of, seed=0).parts(MAX_TOGETHER)[0].batch)
        models = [(spec, [*sizes, *large], own)]
        if enlarged in sizes:
            models.append((describe("upscaler"), [enlarged], {}))
        models += [(each, [each.own_size], {}) for each in spec.follows]
        if refiner is not None:
            models.append((describe(refiner), large, guided))
        for upscaler in upscalers:
            before, sizes, *_ = models[-1]
            each = describe(upscaler, text_encoder=None) if before.unet.pools_text else describe(upscaler)
            if not each.unet.upscales:
                raise InputError(f"{upscaler} enlarges no picture: give an upscaler, or a super-resolution model")
            models.append((each, [each.enlarged(own_size, before.default_size) for own_size in sizes], {}))
        for name in arch:
            with tqdm(desc=name, bar_format="{desc}: {elapsed} {postfix}", disable=not sys.stderr.isatty()) as bar:
                shared: dict[str, Any] = {"dtype": getattr(torch, dtype), "batches": list(dict.fromkeys(batches))}
                shared["on_kernel"] = bar.set_postfix_str
                count = sum(
                    warm.warm(each, name, sizes=list(dict.fromkeys(own_sizes)), **shared, **options)
                    for each, own_sizes, options in models
                )
            click.echo(f"{name}: {count} kernels in {warm.cache_folder()}")
