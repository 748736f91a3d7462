"""`fastldm plan`: what memory a request takes, and whether it fits."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastldm.cli.options import (
    Size,
    backend_option,
    check_numbers,
    control_option,
    debug_option,
    decode_option,
    lora_option,
    model_option,
    reuse_option,
)
from fastldm.cli.report import reported
from fastldm.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastldm.loading.spec import Spec
    from fastldm.planning.beside import Beside
    from fastldm.planning.cascade import CascadePlan
    from fastldm.planning.memory import MemoryPlan
    from fastldm.request import Request


@click.command()
@model_option
@click.option("--size", type=Size(), help="In pixels, such as 1024x1024.  [default: the model's]")
@click.option(
    "-n", "--n", "--batch", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures."
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Sampler steps.  [default: the model's]")
@decode_option
@click.option(
    "--best-of", type=click.IntRange(min=1), metavar="N", help="Candidates, some at a time, and their ranking."
)
@click.option("--ranker", metavar="FOLDER_OR_ID", help="What ranks them, as of `generate`.  [default: the model's own]")
@click.option("--init-image", is_flag=True, help="It starts from a picture, which is encoded.")
@click.option("--mask", is_flag=True, help="A part of that is repainted.")
@click.option("--depth-map", is_flag=True, help="Of depth to image: the depth is given, and not estimated.")
@click.option(
    "--ip-adapter", metavar="FILE", help="An IP-Adapter, with image_encoder/ beside it, and a picture for it."
)
@reuse_option
@click.option("--clip-guidance", is_flag=True, help="It is guided by gradient through U-Net and decoder.")
@lora_option
@control_option
@click.option(
    "--pag-scale", type=float, metavar="S", help="Perturbed-attention guidance: a third row of the U-Net a picture."
)
@click.option("--pag-layer", "pag_layers", multiple=True, metavar="NAME", help="What it perturbs.  [default: mid]")
@click.option("--apg-momentum", type=float, metavar="M", help="Of projected guidance: a latent more for each picture.")
@click.option("--prior", metavar="MODEL", help="Kandinsky's prior, beside its decoder.")
@click.option("--refiner", metavar="MODEL", help="A model that goes on with the latents, such as SDXL's refiner.")
@click.option(
    "--upscaler",
    "upscalers",
    multiple=True,
    metavar="MODEL",
    help="A model that enlarges the picture, as of `generate`.",
)
@click.option("--hires-scale", type=float, metavar="S", help="The picture is enlarged so many times, and sampled on.")
@click.option("--hires-upscaler", metavar="NAME", help="What enlarges it, as of `generate`.  [default: Latent]")
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
    best_of: int | None,
    ranker: str | None,
    init_image: bool,
    mask: bool,
    depth_map: bool,
    ip_adapter: str | None,
    reuse: int,
    clip_guidance: bool,
    loras: tuple[tuple[str, float], ...],
    controls: tuple[tuple[str, float], ...],
    pag_scale: float | None,
    pag_layers: tuple[str, ...],
    apg_momentum: float | None,
    prior: str | None,
    refiner: str | None,
    upscalers: tuple[str, ...],
    hires_scale: float | None,
    hires_upscaler: str | None,
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
    fastldm plan -m ./sdxl --lora style.safetensors       the weights that it is merged into are kept, too
    fastldm plan -m ./sdxl --control ./canny              its weights and buffers
    fastldm plan --best-of 8                              what ranks, beside four pictures at a time
    fastldm plan -m ./sd15 --ip-adapter ip-adapter.safetensors
    fastldm plan -m ./sdxl --refiner ./sdxl-refiner       all stages: all weights, and the largest one's activations
    fastldm plan -m ./IF-I-XL-v1.0 --upscaler ./IF-II-L-v1.0 --upscaler ./x4-upscaler
    fastldm plan -m ./kandinsky-2-2-decoder --prior ./kandinsky-2-2-prior
    fastldm plan --hires-scale 2
    fastldm plan -m ./sd15 --clip-guidance                activations are kept for the way back
    fastldm plan -m ./sdxl --pag-scale 3 --apg-momentum -0.5
    """
    with reported(debug):
        import torch

        from fastldm.adapters.control import describe_control
        from fastldm.adapters.read import merged_numbers, read_adapter
        from fastldm.cli.loras import find
        from fastldm.device import choose_device
        from fastldm.kernels.dispatch import device_capability
        from fastldm.loading.spec import enlarged_size
        from fastldm.model import backend_device, backend_for
        from fastldm.planning import cascade, memory
        from fastldm.planning.memory import Workload
        from fastldm.planning.warm import parse_arch
        from fastldm.request import Request
        from fastldm.runtime import enlarge
        from fastldm.runtime.candidates import own_ranker
        from fastldm.serving import cascade as cascades
        from fastldm.serving.session import MAX_TOGETHER

        check_numbers(size, batch, steps)
        if best_of is not None:
            batch = Request("", candidates=best_of, keep=batch, seed=0).parts(MAX_TOGETHER)[0].batch
        elif ranker is not None and not clip_guidance:
            raise InputError("--ranker is for --best-of and --clip-guidance: give one of them")
        if arch is not None and device is not None:
            raise InputError("give --arch for a GPU that need not be here, or --device for one that is, not both")
        target_device = torch.device("cuda")
        if arch is None:
            target_device = choose_device(backend_device(backend, device))
        capability = parse_arch(arch) if arch is not None else 0
        if arch is None and target_device.type == "cuda":
            capability = device_capability(target_device.index or 0)
        if arch is None:
            on_torch = bool(loras or controls or ip_adapter or reuse > 1 or pag_scale or clip_guidance)
            on_torch = on_torch or decode == "tiled" or (best_of is not None and ranker is None)
            backend = backend_for(model, backend, on_torch=on_torch)

        on_torch_alone = {f"--reuse {reuse}": reuse > 1, f"--pag-scale {pag_scale or 0:g}": bool(pag_scale)}
        on_torch_alone |= {"--clip-guidance": clip_guidance, "--ip-adapter": ip_adapter is not None}
        needs_torch = tuple(option for option, given in on_torch_alone.items() if given)
        opened = functools.partial(_opened, device=target_device, here=arch is None, needs_torch=needs_torch)
        spec, options, check_range, name = opened(model, backend, dtype=dtype)
        width, height = size or spec.default_size
        if spec.follows:
            refused = {"--size": (width, height) != spec.default_size, "--hires-scale": hires_scale is not None}
            refused |= {"--refiner": refiner is not None, "--init-image": init_image, "--mask": mask}
            for option in (name for name, given in refused.items() if given):
                fixed = "x".join(map(str, spec.default_size))
                raise InputError(f"{option} is not for this model, whose own networks make pictures of {fixed}")
            width, height = spec.own_size
        init_image = init_image or mask
        enlarged = (width, height) == enlarged_size(name, spec) and not (init_image or hires_scale or refiner)
        if enlarged:
            width, height = spec.default_size
        asked = Request(
            "",
            width=width,
            height=height,
            hires_scale=hires_scale,
            hires_upscaler=hires_upscaler,
            pag_scale=pag_scale,
            pag_applied_layers=pag_layers or None,
            apg_momentum=apg_momentum,
        )
        upscaler = enlarge.wanted(asked)
        options |= {} if steps is None else {"steps": steps}
        shared: dict[str, Any] = {"batch": batch, "arch": capability, "decode": decode}
        if loras:
            adapters = [read_adapter(file, spec) for _, file, scale in find(loras) if scale]
            options["originals"] = merged_numbers(adapters, spec) * options["dtype"].itemsize
        if controls:
            configs = [(describe_control(source, spec), scale) for source, scale in controls]
            options["attached"] = tuple(config for config, _ in configs)
            options["controls"] = tuple(config for config, scale in configs if scale)
        given = init_image or spec.unet.edits or spec.unet.reads_depth
        options["encode"] = spec.unet.enlarges_latents or (given and not spec.unet.upscales)
        options["repainted"] = mask and memory.is_conditioned(spec.vae)
        if options["repainted"] and decode == "tiled":
            raise InputError("this model's asymmetric VAE decodes what is repainted as a whole, and not in tiles")
        selected: dict[str, Any] = {"depth_map": depth_map, "ip_adapter": ip_adapter, "prior": prior}
        if best_of is not None or clip_guidance:
            selected["ranker"] = ranker or own_ranker(Path(spec.checkpoint.source), options.get("backend", "torch"))
        ranked = 0 if best_of is None else batch
        options["beside"], options["pictures"] = _beside(spec, ranked, **selected)
        check_range(width, height)
        options |= {"gradient": clip_guidance, **_guided(asked, spec)}
        first = Workload.of_spec(spec, width=width, height=height, reuse=reuse > 1, **shared, **options)
        stages = [(model, first)]
        if upscaler is not None:
            factor = spec.vae.factor
            height, width = enlarge.size(asked, factor)
            check_range(width, height)
            large: dict[str, Any] = {
                "height": height // factor,
                "width": width // factor,
                "encode": upscaler.reads == "pt",
                "beside": replace(first.beside, ranked=0),
            }
            stages.append((model, replace(first, **large)))
        if enlarged:
            own_dtype = None if "backend" in options else dtype
            spec, options, *_ = opened("upscaler", "torch", dtype=own_dtype)
            width, height = spec.default_size
            stages.append(("upscaler", Workload.of_spec(spec, width=width, height=height, **shared, **options)))
        if refiner is not None:
            vae = spec.vae
            spec, options, check_range, _ = opened(refiner, backend, dtype=dtype)
            cascades.check_latents(vae, spec.vae)
            check_range(width, height)
            options |= {"steps": first.steps, "guided": first.guided, "reuse": reuse > 1, **_guided(asked, spec)}
            stages.append((refiner, Workload.of_spec(spec, width=width, height=height, **shared, **options)))
        of_latents = [0] * (upscaler is not None and upscaler.reads == "latent")
        of_latents += [len(stages) - 2] * (refiner is not None)
        followed = cascade.of_model(spec, model, first, **shared, dtype=options["dtype"]) if spec.follows else None
        for name in upscalers:
            before, shares_text = spec, spec.unet.pools_text
            spec, options, check_range, _ = opened(name, "auto", dtype=dtype, shares_text=shares_text)
            if not spec.unet.upscales:
                raise InputError(f"{name} enlarges no picture: give an upscaler, or a super-resolution model")
            of_latents += [len(stages) - 1] * spec.unet.enlarges_latents
            width, height = spec.enlarged((width, height), before.default_size)
            check_range(width, height)
            stages.append((name, Workload.of_spec(spec, width=width, height=height, **shared, **options)))
        planned = cascade.plan(stages, of_latents=of_latents, sharing=[1] * (upscaler is not None))
        if followed is not None:
            planned = cascade.CascadePlan((*followed.stages, *planned.stages[1:]))
        free = memory.free_bytes(target_device) if arch is None else None
        alone = len(planned.stages) == 1
        whole = planned.stages[0].plan if alone else planned
        if as_json:
            fits = None if free is None else {"fits": whole.fits(free), "free": free}
            remedies = () if free is None or whole.fits(free) else whole.remedies(free)
            record = {"model": model, **whole.to_dict(), "here": fits}
            click.echo(json.dumps({**record, "would_fit": [remedy.to_dict() for remedy in remedies]}, indent=2))
        else:
            text = _plan_table(planned.stages[0].plan) if alone else _cascade_table(planned)
            click.echo("\n".join([text, *_fits(whole, free)]))


def _opened(
    name: str,
    backend: str,
    device: torch.device,
    *,
    dtype: str | None,
    here: bool,
    needs_torch: Sequence[str],
    shares_text: bool = False,
) -> tuple[Spec, dict[str, Any], Callable[[int, int], None], str]:
    """A model, fields of its workloads, what raises InputError for a size that it does not run, and what it is called.
    here: whether the device is this machine's. needs_torch: options that no bundle has. shares_text: whether it goes
    without a text encoder, if it can."""
    from fastldm import sizes
    from fastldm.device import choose_dtype
    from fastldm.model import choose_backend, describe, latents, model_name, or_prepared, precisions

    path: str | os.PathLike[str] = name
    if here:
        path, backend = or_prepared(name, backend, device, dtype)
    spec = describe(path, text_encoder=None) if shares_text else describe(path)
    selected = choose_backend(backend, path, device, dtype)
    if selected == "torch":
        return spec, {"dtype": choose_dtype(dtype, device)}, lambda width, height: None, model_name(path)
    for option in needs_torch:
        raise InputError(f"{option} runs on torch alone, and {name} is a bundle for {selected}")
    options: dict[str, Any] = {"backend": selected}
    options["dtype"], options["precision"] = precisions(path, selected, device, dtype)
    return spec, options, functools.partial(sizes.check_size, latents(path), spec.vae.factor), model_name(path)


def _beside(
    spec: Spec,
    ranked: int,
    *,
    depth_map: bool,
    ip_adapter: str | None,
    ranker: str | Path | None = None,
    prior: str | None = None,
) -> tuple[Beside, tuple[int, ...]]:
    """What runs beside a model's networks, and for how many tokens of pictures slots have room. ranked: candidates at a
    time."""
    from fastldm.adapters.ip_adapter import describe_ip_adapter
    from fastldm.adapters.locate import find_weights
    from fastldm.image_prompting import encoder_folder
    from fastldm.loading.image_encoder import FILES
    from fastldm.loading.ranker import describe_ranker, find_ranker
    from fastldm.models.clip_vision import VisionConfig
    from fastldm.planning.beside import Beside
    from fastldm.priors import describe_prior
    from fastldm.reading import read_json
    from fastldm.runtime.image_prompts import token_room

    options: dict[str, Any] = {} if prior is None else {"once": describe_prior(prior, spec.unet)}
    room: tuple[int, ...] = ()
    if ranker is not None:
        options |= {"ranker": describe_ranker(find_ranker(ranker)), "ranked": ranked}
    if spec.unet.reads_depth and spec.checkpoint.depth is not None and not depth_map:
        options["depth"] = spec.checkpoint.depth.config
    if ip_adapter is not None:
        config = describe_ip_adapter(find_weights(ip_adapter), spec)
        source = encoder_folder(ip_adapter, None, "image_encoder", {}) / FILES[0]
        encoder = VisionConfig.from_dict(read_json(source), str(source))
        options |= {"adapters": (config,), "encoder": encoder, "prompts": (1,)}
        room = (token_room(config.tokens or 1 + encoder.patches),)
    return Beside(**options), room


def _guided(asked: Request, spec: Spec) -> dict[str, Any]:
    """Fields of a model's workloads: what its guidance has beyond two branches, where the request says so."""
    from fastldm.planning.memory import of_guidance
    from fastldm.runtime.guidance import guidance_of

    if asked.pag_scale and spec.unet.edits:
        raise InputError(f"pag_scale is {asked.pag_scale:g}: this model's guidance has three rows of its own")
    return {name: value for name, value in of_guidance(guidance_of(asked, spec.unet)).items() if value}


def _plan_table(plan: MemoryPlan) -> str:
    """A plan as text. Entries of less than 50 KiB share a line."""
    rows: list[tuple[str, int, str]] = []
    for title, lines in (("weights", plan.weights), ("buffers", plan.buffers), ("libraries", plan.libraries)):
        if not (total := sum(line.bytes for line in lines)):
            continue
        small = [line for line in lines if 0 < line.bytes < 50 * 1024]
        rows.append((title, total, ""))
        rows += [(f"  {line.name}", line.bytes, line.note) for line in lines if line.bytes >= 50 * 1024]
        if small:
            rows.append(("  others", sum(line.bytes for line in small), ", ".join(line.name for line in small)))
    rows.append(("all the time", plan.resident, ""))
    rows += [(f"  and in {line.name}", line.bytes, line.note) for line in plan.phases if line.bytes]
    largest = max(plan.phases, key=lambda line: line.bytes)
    rows += [("needed", plan.needed, f"all the time, and in {largest.name}"), plan.cached, ("peak", plan.peak, "")]
    return "\n".join([_heading(plan), "", *_aligned(rows)])


def _cascade_table(plan: CascadePlan) -> str:
    """All stages as text: each with its model, size and bytes, and what they take together."""
    heading, rows = [f"{len(plan.stages)} stages, one after the other"], []
    for number, stage in enumerate(plan.stages, 1):
        heading.append(f"  {number}. {stage.model}: {_heading(stage.plan)}")
    for number, stage in enumerate(plan.stages, 1):
        if not stage.shares:
            rows.append((f"weights of {number}", stage.plan.loading, stage.model))
    for number, stage in enumerate(plan.stages, 1):
        rows.append((f"buffers of {number}", sum(line.bytes for line in stage.plan.buffers), ""))
    rows += [("libraries", plan.libraries, "")] if plan.libraries else []
    rows.append(("all the time", plan.resident, "all weights, and the buffers of each stage"))
    for number, stage in enumerate(plan.stages, 1):
        rows.append((f"  and in {number}", stage.largest.bytes, f"{stage.largest.name}: {stage.largest.note}"))
    largest = plan.stages.index(plan.largest) + 1
    rows += [("needed", plan.needed, f"all the time, and in {largest}"), ("peak", plan.peak, "with what is cached")]
    return "\n".join([*heading, "", *_aligned(rows)])


def _aligned(rows: list[tuple[str, int, str]]) -> list[str]:
    from fastldm.planning.memory import size

    width = max(len(name) for name, _, _ in rows)
    return [f"{name:<{width}}  {size(count):>10}  {note}".rstrip() for name, count, note in rows]


def _heading(plan: MemoryPlan) -> str:
    """The workload in a line."""
    workload, factor = plan.workload, plan.workload.vae.factor
    device = f"sm_{workload.arch}" if workload.arch else "a CPU"
    dtype = str(workload.precision or workload.dtype).removeprefix("torch.")
    return (
        f"{workload.batch} x {workload.width * factor}x{workload.height * factor}{', guided' * workload.guided}"
        f"{', a third row' * workload.third}{', averaged' * workload.averages}, "
        f"{workload.steps} steps, {workload.backend} {dtype} on {device}, {workload.decode} decode"
    )


def _fits(plan: MemoryPlan | CascadePlan, free: int | None) -> list[str]:
    """Whether it fits the device, as text; nothing where nobody knows what is free."""
    from fastldm.planning.memory import size

    if free is None:
        return []
    if not plan.fits(free):
        return ["", f"does not fit: {size(free)} are free; what would: {plan.advice(free)}"]
    return ["", f"fits: {size(free)} are free" + ", if PyTorch gives back what it caches" * (plan.peak > free)]
