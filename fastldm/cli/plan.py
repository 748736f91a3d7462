"""`fastldm plan`: what memory a request takes, and whether it fits."""

from __future__ import annotations

import json
import os
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
    from fastldm.planning.memory import MemoryPlan


@click.command()
@model_option
@click.option("--size", type=Size(), help="In pixels, such as 1024x1024.  [default: the model's]")
@click.option(
    "-n", "--n", "--batch", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures."
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Sampler steps.  [default: the model's]")
@decode_option
@click.option("--init-image", is_flag=True, help="It starts from a picture, which is encoded.")
@reuse_option
@lora_option
@control_option
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
    reuse: int,
    loras: tuple[tuple[str, float], ...],
    controls: tuple[tuple[str, float], ...],
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
    """
    with reported(debug):
        import torch

        from fastldm import sizes
        from fastldm.adapters.control import describe_control
        from fastldm.adapters.read import merged_numbers, read_adapter
        from fastldm.cli.loras import find
        from fastldm.device import choose_device, choose_dtype
        from fastldm.kernels.dispatch import device_capability
        from fastldm.model import (
            backend_device,
            backend_for,
            choose_backend,
            describe,
            latents,
            or_prepared,
            precisions,
        )
        from fastldm.planning import memory
        from fastldm.planning.warm import parse_arch

        check_numbers(size, batch, steps)
        if arch is not None and device is not None:
            raise InputError("give --arch for a GPU that need not be here, or --device for one that is, not both")
        target_device = torch.device("cuda")
        if arch is None:
            target_device = choose_device(backend_device(backend, device))
        capability = parse_arch(arch) if arch is not None else 0
        if arch is None and target_device.type == "cuda":
            capability = device_capability(target_device.index or 0)
        path: str | os.PathLike[str] = model
        if arch is None:
            backend = backend_for(model, backend, on_torch=bool(loras or controls or reuse > 1 or decode == "tiled"))
            path, backend = or_prepared(model, backend, target_device, dtype)
        spec = describe(path)
        width, height = size or spec.default_size
        selected = choose_backend(backend, path, target_device, dtype)
        options: dict[str, Any] = {} if steps is None else {"steps": steps}
        if selected == "torch":
            options["dtype"] = choose_dtype(dtype, target_device)
        else:
            if reuse > 1:
                raise InputError(f"--reuse {reuse} runs on torch alone, and {model} is a bundle for {selected}")
            sizes.check_size(latents(path), spec.vae.factor, width, height)
            options["backend"] = selected
            options["dtype"], options["precision"] = precisions(path, selected, target_device, dtype)
        if loras:
            adapters = [read_adapter(file, spec) for _, file, scale in find(loras) if scale]
            options["originals"] = merged_numbers(adapters, spec) * options["dtype"].itemsize
        if controls:
            configs = [(describe_control(source, spec), scale) for source, scale in controls]
            options["attached"] = tuple(config for config, _ in configs)
            options["controls"] = tuple(config for config, scale in configs if scale)
        memory_plan = memory.plan(
            memory.Workload.of_spec(
                spec,
                width=width,
                height=height,
                batch=batch,
                arch=capability,
                decode=decode,
                encode=(init_image or spec.unet.edits) and not spec.unet.upscales,
                reuse=reuse > 1,
                **options,
            )
        )
        free = memory.free_bytes(target_device) if arch is None else None
        if as_json:
            fits = None if free is None else {"fits": memory_plan.fits(free), "free": free}
            remedies = () if free is None or memory_plan.fits(free) else memory_plan.remedies(free)
            record = {"model": model, **memory_plan.to_dict(), "here": fits}
            click.echo(json.dumps({**record, "would_fit": [remedy.to_dict() for remedy in remedies]}, indent=2))
        else:
            click.echo(_plan_table(memory_plan, free))


def _plan_table(plan: MemoryPlan, free: int | None) -> str:
    """A plan as text. Entries of less than 50 KiB share a line."""
    from fastldm.planning.memory import size

    workload, factor = plan.workload, plan.workload.vae.factor
    rows: list[tuple[str, int, str]] = []
    for title, lines in (("weights", plan.weights), ("buffers", plan.buffers), ("libraries", plan.libraries)):
        if not (total := sum(line.bytes for line in lines)):
            continue
        small = [line for line in lines if line.bytes < 50 * 1024]
        rows.append((title, total, ""))
        rows += [(f"  {line.name}", line.bytes, line.note) for line in lines if line not in small]
        if small:
            rows.append(("  others", sum(line.bytes for line in small), ", ".join(line.name for line in small)))
    rows.append(("all the time", plan.resident, ""))
    rows += [(f"  and in {line.name}", line.bytes, line.note) for line in plan.phases]
    largest = max(plan.phases, key=lambda line: line.bytes)
    rows += [("needed", plan.needed, f"all the time, and in {largest.name}"), plan.cached, ("peak", plan.peak, "")]
    width = max(len(name) for name, _, _ in rows)
    device = f"sm_{workload.arch}" if workload.arch else "a CPU"
    dtype = str(workload.precision or workload.dtype).removeprefix("torch.")
    output = [
        f"{workload.batch} x {workload.width * factor}x{workload.height * factor}{', guided' * workload.guided}, "
        f"{workload.steps} steps, {workload.backend} {dtype} on {device}, {workload.decode} decode",
        "",
        *(f"{name:<{width}}  {size(count):>10}  {note}".rstrip() for name, count, note in rows),
    ]
    if free is None:
        return "\n".join(output)
    if not plan.fits(free):
        fits = f"does not fit: {size(free)} are free; what would: {plan.advice(free)}"
    else:
        fits = f"fits: {size(free)} are free" + (", if PyTorch gives back what it caches" if plan.peak > free else "")
    return "\n".join([*output, "", fits])
