"""`fastldm profile`: where the time goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from fastldm.cli.options import (
    Size,
    backend_option,
    check_numbers,
    control_image_option,
    control_option,
    debug_option,
    lora_option,
    model_option,
)
from fastldm.cli.report import reported


@click.command()
@model_option
@click.option(
    "--prompt", metavar="TEXT", help="What the pictures are of.  [default: a red apple, where the model reads a text]"
)
@click.option("--size", type=Size(), help="In pixels, such as 1024x1024.  [default: the model's]")
@click.option(
    "-n", "--n", "--batch", "batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures at once."
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Sampler steps.  [default: the model's]")
@click.option("--sampler", metavar="NAME", help="Such as 'euler a' or 'dpm++ 2m karras'.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 or less is off.  [default: the model's]")
@lora_option
@control_option
@control_image_option
@click.option(
    "--rounds", type=click.IntRange(min=1), metavar="N", help="Pictures that count.  [default: ten seconds of them]"
)
@click.option("--device", metavar="D", help="Such as cpu, cuda or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--json", "json_to", metavar="FILE", help="Write all figures there; - prints them in place of the table.")
@click.option("--html", "html_to", metavar="FILE", help="Write a page with plots there. It needs no network.")
@click.option("--trace", "trace_to", metavar="FILE", help="Write one picture there for Perfetto or chrome://tracing.")
@debug_option
def profile(
    model: str,
    prompt: str | None,
    size: tuple[int, int] | None,
    batch: int,
    rounds: int | None,
    json_to: str | None,
    html_to: str | None,
    trace_to: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Say where the time of a picture goes, and which one change would help most.

    \b
    fastldm profile                                             the small model that ships inside
    fastldm profile -m ./sd15 --steps 5 --html sd15.html        a page with plots
    fastldm profile -m ./sd15-onnx --backend openvino --json -  an exported model, as data
    fastldm profile --lora sketch --control shape --control-image heart.png     a step with them
    """
    with reported(debug):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler logs when it starts and ends
        start = perf_counter()
        from fastldm.cli import controls, loras
        from fastldm.files import check_output, whole_file

        check_numbers(size, batch, options["steps"])
        files = {name: Path(to) for name, to in (("json", json_to), ("html", html_to), ("trace", trace_to)) if to}
        if json_to == "-":
            del files["json"]
        for path in files.values():
            check_output(path, force=True)
        pictured = options["controls"], options["control_images"]
        controls.check(*pictured)
        adapters = loras.find(options["loras"])
        from fastldm.model import describe
        from fastldm.pipeline import Pipeline
        from fastldm.profiling import page as profile_page
        from fastldm.profiling import report as profile_report
        from fastldm.profiling.profile import profile as measure
        from fastldm.runtime import complete

        width, height = size or (None, None)
        arguments = {
            "num_inference_steps": options["steps"],
            "guidance_scale": options["guidance"],
            "sampler": options["sampler"],
            "num_images_per_prompt": batch,
            "width": width,
            "height": height,
        }
        after_imports = perf_counter()
        given = {name: value for name, value in arguments.items() if value is not None}
        spec = describe(model)
        request = complete.sampled(spec, prompt, {"seed": 0, **given})
        complete.check(request, spec)
        selected = {} if options["backend"] == "auto" else {"backend": options["backend"]}
        pipe = Pipeline.from_pretrained(model, device=options["device"], dtype=options["dtype"], **selected)
        loras.load(pipe, adapters)
        controlled = controls.attach(pipe, *pictured)
        first = {"import": after_imports - start, "load": perf_counter() - after_imports}
        result = measure(pipe, request.replace(**controlled), rounds=rounds, first=first)

        contents: dict[str, Callable[[], str]] = {
            "json": lambda: json.dumps(result.to_dict(), indent=1),
            "html": lambda: profile_page.page(result),
            "trace": lambda: json.dumps(profile_report.trace(result)),
        }
        for name, path in files.items():
            with whole_file(path) as file:
                file.write(f"{contents[name]()}\n".encode())
        click.echo(contents["json"]() if json_to == "-" else profile_report.table(result))
