"""`fastldm generate`: from a prompt to files."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from fastldm.cli.options import (
    Size,
    backend_option,
    control_image_option,
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
    from fastldm.pipeline import Pipeline


def _list_things(ctx: click.Context, param: click.Parameter, group: str | None) -> None:
    """`--list`: prints and exits before the command runs, as `--help` does."""
    if group is None:
        return
    with reported(debug=False):
        from fastldm.cli.things import listing

        click.echo(listing(group))
    ctx.exit()


@click.command()
@click.argument("prompt", required=False)
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
@click.option("--s-churn", type=float, default=0.0, metavar="X", help="Noise that the sampler euler adds and removes.")
@click.option("--sampler", metavar="NAME", help="Such as 'euler a' or 'dpm++ 2m karras'.  [default: the model's]")
@click.option(
    "--seed", type=int, metavar="S", help="The same seed makes the same picture; picture k of --n uses S + k."
)
@click.option("--size", type=Size(), help="In pixels, such as 768x512.  [default: the model's]")
@click.option("--n", "count", type=click.IntRange(min=1), default=1, show_default=True, help="How many pictures.")
@click.option(
    "--best-of",
    type=click.IntRange(min=1),
    metavar="N",
    help="Sample N pictures and keep the one, or the --n, that show best what PROMPT says, by a CLIP model's score.",
)
@click.option(
    "--ranker",
    metavar="FOLDER_OR_ID",
    help="The CLIP model for --best-of and --clip-guidance, such as openai/clip-vit-large-patch14.  "
    "[default: the model's own]",
)
@reuse_option
@click.option(
    "--image-guidance-scale",
    type=float,
    metavar="G",
    help="How much InstructPix2Pix keeps of --image; below 1 it is not guided.  [default: 1.5]",
)
@click.option(
    "--pag-scale",
    type=float,
    metavar="S",
    help="Perturbed-attention guidance, beside --guidance or without: such as 3.  [default: 0, off]",
)
@click.option(
    "--pag-layer",
    "pag_layers",
    multiple=True,
    metavar="NAME",
    help="What --pag-scale perturbs, as diffusers names it, such as down_blocks.2. Repeatable.  [default: mid]",
)
@click.option(
    "--apg-rescale",
    type=float,
    metavar="N",
    help="Adaptive projected guidance: shorten guidance to N, such as 15; 0: any length.  [default: off]",
)
@click.option(
    "--apg-eta",
    type=float,
    metavar="E",
    help="Likewise, what remains of guidance along the prompt's own: 0 none, less saturated; 1 all.  [default: off]",
)
@click.option(
    "--apg-momentum",
    type=float,
    metavar="M",
    help="Likewise, what each step adds of the last one's guidance: such as -0.5, away from it.  [default: off]",
)
@click.option(
    "--original-formulation",
    is_flag=True,
    help="--guidance counts from 0, beyond PROMPT's own, as papers have it: 6.5 is then 7.5.",
)
@click.option(
    "--clip-guidance",
    type=float,
    metavar="S",
    help="Have each step go up the gradient of how well a CLIP model, that of --best-of, finds PROMPT in the picture, "
    "such as 100: through U-Net and decoder, several times as slow.  [default: 0, off]",
)
@click.option(
    "--denoising-start",
    type=float,
    metavar="X",
    help="Go on with --image as if this fraction of the noise were gone: no noise is added.",
)
@click.option(
    "--denoising-end", type=float, metavar="X", help="Stop when this fraction of the noise is gone, such as 0.8."
)
@click.option(
    "--image",
    "--init-image",
    "image",
    metavar="FILE",
    help="Start from this picture instead of noise; of a model that enlarges one, the small picture; of one of image "
    "variations, what it reads in place of PROMPT, of stable unCLIP beside PROMPT.",
)
@click.option(
    "--original-image",
    metavar="FILE",
    help="Of DeepFloyd IF's super-resolution: what to start from, where --image is the small picture.",
)
@click.option(
    "--super-res-steps",
    type=click.IntRange(min=2),
    metavar="N",
    help="Of Karlo: steps of its super-resolution.  [default: 7]",
)
@click.option(
    "--strength", type=float, help="How much of --image is redone, 0 to 1.  [default: the model's, 0.8 as a rule]"
)
@click.option(
    "--noise-level",
    type=int,
    metavar="N",
    help="Noise that is added to a picture to be enlarged, or to what unCLIP reads.  [default: the model's]",
)
@click.option(
    "--class-label",
    "class_labels",
    type=int,
    multiple=True,
    metavar="N",
    help="Of class-conditional models: what the pictures show, or repeated what each. [default: any]",
)
@click.option(
    "--depth-map", metavar="FILE", help="Of depth to image: a grey picture, white near.  [default: it is estimated]"
)
@click.option("--prior", metavar="MODEL", help="Kandinsky's prior, which makes of PROMPT what its decoder reads.")
@click.option("--prior-steps", type=int, metavar="N", help="Of a prior, sampler steps.  [default: 25]")
@click.option("--prior-guidance", type=float, metavar="G", help="Likewise guidance.  [default: 4]")
@click.option("--refiner", metavar="MODEL", help="A model that goes on with the latents, such as SDXL's refiner.")
@click.option("--switch-at", type=float, metavar="X", help="Where --refiner does, a part of the noise.  [default: 0.8]")
@click.option("--hires-scale", type=float, metavar="S", help="Enlarge the picture so many times, and sample on.")
@click.option("--hires-strength", type=float, metavar="X", help="How much that changes, 0 to 1.  [default: 0.7]")
@click.option("--hires-steps", type=int, metavar="N", help="Steps that it takes.  [default: --steps]")
@click.option(
    "--hires-upscaler",
    metavar="NAME",
    help="AUTOMATIC1111's: 'Latent (bicubic)', Lanczos, ...  [default: Latent]",
)
@click.option(
    "--upscaler",
    "upscalers",
    multiple=True,
    metavar="MODEL",
    help="A model that enlarges the picture: DeepFloyd IF's second stage, the x4 or the latent x2 upscaler. "
    "Repeatable: one after the other.",
)
@click.option("--upscaler-steps", type=int, multiple=True, metavar="N", help="Its steps; repeated, each one's.")
@click.option("--upscaler-guidance", type=float, multiple=True, metavar="G", help="Likewise, as --guidance.")
@click.option("--upscaler-strength", type=float, multiple=True, metavar="X", help="Likewise, as --strength.")
@click.option("--upscaler-noise-level", type=int, multiple=True, metavar="N", help="Likewise, as --noise-level.")
@click.option("--mask", metavar="FILE", help="Repaint only where this picture is white; needs --image.")
@click.option(
    "--padding-mask-crop",
    type=click.IntRange(min=0),
    metavar="N",
    help="Repaint the part that --mask marks and N pixels around it at --size, and lay it over --image.",
)
@lora_option
@click.option("--prompt-lora", is_flag=True, help="Read <lora:NAME:SCALE> in PROMPT as --lora NAME.safetensors:SCALE.")
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE",
    help="A textual inversion: a file, a folder or hub id with one, or smiley, which ships for the default model. Its "
    "token is what the file says, such as <smiley>, or its name without ending. Repeatable.",
)
@control_option
@control_image_option
@click.option(
    "--ip-adapter",
    metavar="FILE",
    help="An IP-Adapter, with image_encoder/ beside it; needs --ip-image.",
)
@click.option("--ip-image", "ip_images", multiple=True, metavar="FILE", help="A picture as prompt. Repeatable.")
@click.option("--ip-scale", type=float, metavar="S", help="How much --ip-image counts.  [default: 1]")
@click.option("--allow-pickle", is_flag=True, help="Take tensors from pickled files too.")
@click.option("--literal", is_flag=True, help="Take brackets in PROMPT as text, not as weights.")
@click.option("--clip-skip", type=int, metavar="N", help="Leave out the text encoder's last N layers.")
@click.option("--device", metavar="D", help="Such as cpu, cuda or cuda:1.  [default: a GPU where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: what is fastest there]")
@backend_option
@click.option("--variant", metavar="V", help="Weights variant of a folder or hub id, such as fp16.")
@decode_option
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="Make each picture of --n bitwise the one that its seed makes alone, at some cost.",
)
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
    prompt: str | None, output: str | None, model: str, count: int, as_json: bool, debug: bool, **options: Any
) -> None:
    """Make a picture for PROMPT, which may be left out where there is an --image, or where the model reads none.

    \b
    fastldm generate "a red apple"
    fastldm generate "a (shiny:1.3) car" --n 4 --seed 7 -o car.png
    fastldm generate "a cat, oil painting" -m ./sd15 --image cat.png --strength 0.6
    fastldm generate "make it snow" -m ./instruct-pix2pix --image street.png --guidance 7.5
    fastldm generate "flower purple" --best-of 8 -o flower.png
    fastldm generate "a cat" -m ./sd15 --lora style.safetensors:0.8
    fastldm generate "a white cat" -m ./x4-upscaler --image small.png
    fastldm generate -m ./sd-image-variations --image cat.png --n 4
    fastldm generate -m ./ddpm-cat-256 --steps 100
    fastldm generate "a cat" -m ./karlo-v1-alpha --super-res-steps 7
    fastldm generate "a red cat" -m ./kandinsky-2-2-decoder --prior ./kandinsky-2-2-prior
    fastldm generate "a cat" -m ./sdxl --refiner ./sdxl-refiner --switch-at 0.8
    fastldm generate "a kangaroo" -m ./IF-I-XL-v1.0 --upscaler ./IF-II-L-v1.0 --upscaler ./x4-upscaler
    fastldm generate "a cat" -m ./sd15-onnx --backend openvino
    """
    if prompt is None:
        with reported(debug):
            needed = options["image"] is None and reads_text(model, options["allow_pickle"], variant=options["variant"])
        if needed:
            raise click.UsageError("Missing argument 'PROMPT'.")
        prompt = ""
    with reported(debug):
        _generate(prompt, output, model, count, as_json, options)


def reads_text(model: str, allow_pickle: bool, *, variant: str | None = None) -> bool:
    """Whether a model reads a prompt, or a picture in its place."""
    if model == "default":
        return True
    from fastldm.model import describe

    return bool(describe(model, variant=variant, allow_pickle=allow_pickle).encoders)


def _generate(prompt: str, output: str | None, model: str, count: int, as_json: bool, options: dict[str, Any]) -> None:
    from fastldm.cli import controls, loras
    from fastldm.request import Request, picture_seeds

    wanted = list(options["loras"])
    if options["prompt_lora"]:
        prompt, tagged = loras.split_tags(prompt)
        wanted += tagged
    width, height = options["size"] or (None, None)
    arguments = {
        "negative_prompt": options["negative"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"],
        "image_guidance_scale": options["image_guidance_scale"],
        "pag_scale": options["pag_scale"],
        "pag_applied_layers": options["pag_layers"] or None,
        "apg_rescale": options["apg_rescale"],
        "apg_eta": options["apg_eta"],
        "apg_momentum": options["apg_momentum"],
        "use_original_formulation": options["original_formulation"],
        "clip_guidance_scale": options["clip_guidance"],
        "sampler": options["sampler"],
        "reuse": options["reuse"],
        "s_churn": options["s_churn"],
        "image": options["image"],
        "original_image": options["original_image"],
        "strength": options["strength"],
        "prior_num_inference_steps": options["prior_steps"],
        "prior_guidance_scale": options["prior_guidance"],
        "refiner_switch_at": options["switch_at"],
        **{name: options[name] for name in ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler")},
        "upscaler_options": _of_upscalers(options),
        "denoising_start": options["denoising_start"],
        "denoising_end": options["denoising_end"],
        "noise_level": options["noise_level"],
        "super_res_num_inference_steps": options["super_res_steps"],
        "class_labels": _one_or_each(options["class_labels"]),
        "depth_map": options["depth_map"],
        "mask_image": options["mask"],
        "padding_mask_crop": options["padding_mask_crop"],
        "literal_prompt": options["literal"],
        "clip_skip": options["clip_skip"],
        "seed": options["seed"],
        "height": height,
        "width": width,
        "candidates": options["best_of"],
        "num_images_per_prompt" if options["best_of"] is None else "keep": count,
        "ip_adapter_image": [list(options["ip_images"])] if options["ip_images"] else None,
        "ip_adapter_scale": options["ip_scale"],
    }
    if bool(options["ip_adapter"]) != bool(options["ip_images"]):
        raise InputError("--ip-adapter and --ip-image go together: the one reads the other")
    # Mistakes are found before the model is loaded: those in the request itself, then in the files to read and write.
    request = Request(prompt=prompt, **{name: value for name, value in arguments.items() if value is not None})
    request = request.replace(seed=picture_seeds(request))
    if options["ranker"] and request.candidates is None and request.gradient is None:
        raise InputError("--ranker is for --best-of and --clip-guidance: give one of them")
    controls.check(options["controls"], options["control_images"])
    seeds = picture_seeds(request)

    from fastldm.image import measure, output_paths, save_result

    paths = output_paths(output or f"fastldm-{seeds[0]}.png", count, force=options["force"])
    pictures = [("--image", options["image"]), ("--mask", options["mask"]), ("--depth-map", options["depth_map"])]
    pictures.append(("--original-image", options["original_image"]))
    pictures += [("--ip-image", path) for path in options["ip_images"]]
    for name, path in pictures:
        if path is not None:
            measure(path, name)

    adapters = loras.find(wanted, allow_pickle=options["allow_pickle"])
    from fastldm.adapters.textual_inversion import check_encoders, read_textual_inversion
    from fastldm.model import backend_for
    from fastldm.pipeline import Pipeline

    for path in options["embeddings"]:
        read_textual_inversion(path, allow_pickle=options["allow_pickle"])
    placement = ("device", "dtype", "backend", "variant", "batch_invariant", "allow_pickle")
    placed = {name: options[name] for name in placement}
    on_torch = any(options[name] for name in ("embeddings", "ip_adapter", "controls")) or bool(adapters)
    on_torch = on_torch or options["decode"] == "tiled" or request.reuse > 1 or request.gradient is not None
    on_torch = on_torch or (request.candidates is not None and not options["ranker"])
    placed["backend"] = backend_for(model, options["backend"], on_torch=on_torch)
    if options["switch_at"] is not None and options["refiner"] is None:
        raise InputError("--switch-at was given without --refiner: say which model goes on")
    if model != "default":
        from fastldm.model import describe
        from fastldm.runtime import complete

        spec = describe(model, variant=options["variant"], allow_pickle=options["allow_pickle"])
        complete.check(request, spec, prior=options["prior"] is not None)
        if options["embeddings"]:
            check_encoders(spec.text)
    others = {name: options[name] for name in ("refiner", "prior", "ranker")}
    others["upscaler"] = list(options["upscalers"])
    pipe = Pipeline.from_pretrained(model, **others, **placed)
    if options["embeddings"]:
        pipe.load_textual_inversion(options["embeddings"], allow_pickle=options["allow_pickle"])
    if options["ip_adapter"]:
        pipe.load_ip_adapter(options["ip_adapter"], allow_pickle=options["allow_pickle"])
    with_pictures = options["controls"], options["control_images"]
    request = request.replace(**controls.attach(pipe, *with_pictures, allow_pickle=options["allow_pickle"]))
    loras.load(pipe, adapters, allow_pickle=options["allow_pickle"])
    if options["decode"] != "whole":
        (pipe.enable_vae_tiling if options["decode"] == "tiled" else pipe.enable_vae_slicing)()
    if model == "default":
        _warn_if_unknown(pipe, prompt)
    result = pipe(request, progress=not as_json and sys.stderr.isatty())
    save_result(result, paths, pipe.name, metadata=not options["no_metadata"])

    timings = result.timings
    if as_json:
        record = {
            "files": [str(path) for path in paths],
            "seeds": list(result.seeds),
            **({"scores": list(result.scores)} if result.scores else {}),
            "model": pipe.name,
            "backend": result.backend,
            "device": str(pipe.device),
            "dtype": result.dtype,
            "timings": {"text": timings.text, "steps": timings.steps, "decode": timings.decode, "total": timings.total},
        }
        click.echo(json.dumps(record))
        return
    scores = [f"  score {score:.3f}" for score in result.scores] or [""] * len(paths)
    for path, seed, score in zip(paths, result.seeds, scores, strict=True):
        click.echo(f"{path}  seed {seed}{score}")
    steps = len(timings.steps)
    click.echo(
        f"{result.backend} {result.dtype} on {pipe.device}: {timings.total:.2f} s (text {timings.text:.2f}, "
        f"{steps} steps {sum(timings.steps):.2f}, decode {timings.decode:.2f})"
    )


def _of_upscalers(options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Each upscaler's options."""
    names = {
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "strength": "strength",
        "noise_level": "noise_level",
    }
    count = len(options["upscalers"])
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, field in names.items():
        values, option = options[f"upscaler_{name}"], f"--upscaler-{name.replace('_', '-')}"
        if values and not count:
            raise InputError(f"{option} was given without --upscaler: say which model enlarges the picture")
        if len(values) not in (0, 1, count):
            raise InputError(f"{option} was given {len(values)} times for {count} upscalers: give one, or one each")
        for own, value in zip(each, values * (count if len(values) == 1 else 1), strict=False):
            own[field] = value
    return each if any(each) else None


def _one_or_each(numbers: tuple[int, ...]) -> int | tuple[int, ...] | None:
    return numbers[0] if len(numbers) == 1 else numbers or None


def _warn_if_unknown(pipe: Pipeline, prompt: str) -> None:
    """For the default model: name on stderr the nearest things to a prompt that names nothing the model knows."""
    from fastldm.cli import things

    added = [token for stage in pipe.text_stages for token in stage.added]
    if any(token.casefold() in prompt.casefold() for token in added):
        return
    if prompt.strip() and not things.knows_a_word(prompt):
        suggestions = ", ".join(repr(name) for name in things.nearest(pipe, prompt))
        click.echo(
            "warning: the prompt names nothing that the default model knows; what it knows nearest to it: "
            f"{suggestions} (all: fastldm generate --list)",
            err=True,
        )
