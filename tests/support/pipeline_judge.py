"""Our pipelines against diffusers': their own arguments, alone and in pairs, and where the two may differ.

    python tests/support/pipeline_judge.py                          all cases, as benchmarks/results/pipelines.md
    python tests/support/pipeline_judge.py 500                      those of one argument, and 500 of the pairs
    python tests/support/pipeline_judge.py 500 --only PAG --to F    of some pipelines alone, kept in a file ...
    python tests/support/pipeline_judge.py --join F G H             ... and the table of several such files

A `Case` is a pipeline class and some values of its arguments. `judge` generates with both, on the same tiny weights,
and compares the images:

    agree     both ran, and their images are equal within 1/255, or 0.25/255 where they are not rounded; or both refuse
    differ    both ran, with other images: a row of DIFFERENCES gives the reason
    refused   ours refuses in one line, theirs ran: a row of REFUSALS gives the reason
    more      ours ran where theirs fails
    unknown   it differs or is refused, and no row gives a reason
    crashed   ours raised an error that is not fastldm's, or one of several lines
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import ip_adapters
import numpy as np
import picture_readers
import tiny
import torch
from PIL import Image

from fastldm import Pipeline
from fastldm.errors import FastLDMError
from fastldm.request import UNSUPPORTED

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "pipelines.md"
CLASSES = {  # a name: diffusers' class, the tiny family, and its scheduler
    "text to image": (diffusers.StableDiffusionPipeline, "sd1", "ddim"),
    "image to image": (diffusers.StableDiffusionImg2ImgPipeline, "sd1", "ddim"),
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, "sd1", "ddim"),
    "inpainting, 9 channels": (diffusers.StableDiffusionInpaintPipeline, "sd1-inpaint", "ddim"),
    "SDXL text to image": (diffusers.StableDiffusionXLPipeline, "sdxl", "euler"),
    "SDXL image to image": (diffusers.StableDiffusionXLImg2ImgPipeline, "sdxl", "euler"),
    "refiner": (diffusers.StableDiffusionXLImg2ImgPipeline, "sdxl-refiner", "euler"),
    "refiner inpainting": (diffusers.StableDiffusionXLInpaintPipeline, "sdxl-refiner", "euler"),
    "SDXL inpainting": (diffusers.StableDiffusionXLInpaintPipeline, "sdxl", "euler"),
    "PAG": (diffusers.StableDiffusionPAGPipeline, "sd1", "ddim"),
    "PAG image to image": (diffusers.StableDiffusionPAGImg2ImgPipeline, "sd1", "ddim"),
    "PAG inpainting": (diffusers.StableDiffusionPAGInpaintPipeline, "sd1", "ddim"),
    "SDXL PAG": (diffusers.StableDiffusionXLPAGPipeline, "sdxl", "euler"),
    "SDXL PAG image to image": (diffusers.StableDiffusionXLPAGImg2ImgPipeline, "sdxl", "euler"),
    "SDXL PAG inpainting": (diffusers.StableDiffusionXLPAGInpaintPipeline, "sdxl", "euler"),
    "edit": (diffusers.StableDiffusionInstructPix2PixPipeline, "sd1-edit", "ddim"),
    "depth to image": (diffusers.StableDiffusionDepth2ImgPipeline, "sd2-depth", "ddim"),
    "SDXL edit": (diffusers.StableDiffusionXLInstructPix2PixPipeline, "sdxl-edit", "euler"),
    "x4 upscaling": (diffusers.StableDiffusionUpscalePipeline, "x4-upscaler", "ddim"),
    "image variations": (diffusers.StableDiffusionImageVariationPipeline, "variations", "ddim"),
    "stable unCLIP": (diffusers.StableUnCLIPImg2ImgPipeline, "unclip", "ddim"),
    "LCM text to image": (diffusers.LatentConsistencyModelPipeline, "lcm", "lcm"),
    "LCM image to image": (diffusers.LatentConsistencyModelImg2ImgPipeline, "lcm", "lcm"),
}
_BUILT: dict[str, Callable[[], Any]] = {  # what `tiny.pipeline` does not know
    "variations": lambda: picture_readers.variations(vae=tiny.vae("sd1")),
    "unclip": picture_readers.unclip,
}
SIDE = 64  # pixels; 8 latents
WIDTHS = {"sdxl": 72, "sdxl-edit": 72, "sdxl-refiner": 40}  # of text states; of the rest 32
POOLED = 24


class Case(NamedTuple):
    """A pipeline, and which value of which arguments: (argument, name of the value)."""

    pipeline: str
    values: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.pipeline}: {', '.join(f'{name} {value}' for name, value in self.values) or 'nothing else'}"

    def has(self, name: str, value: str = "") -> bool:
        return any(argument == name and value in label for argument, label in self.values)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def image(seed: int = 1) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@functools.cache
def mask(left: int = 8) -> Image.Image:
    array = np.zeros((SIDE, SIDE), np.uint8)
    array[16:48, left : left + 32] = 255
    return Image.fromarray(array)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def scale_latents(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"] = tensors["latents"] * 0.9
    return tensors


def less_guidance(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 2.0
    return tensors


def interrupt(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = i == 0
    return tensors


# Values to try of each argument, created for each call. B is the number of images, W the width of text states.
Value = Callable[[int, int], dict[str, Any]]
VALUES: dict[str, dict[str, Value]] = {
    "prompt": {
        "list": lambda B, W: {"prompt": ["a cat", "two dogs"]},
        "empty": lambda B, W: {"prompt": ""},
    },
    "prompt_2": {"text": lambda B, W: {"prompt_2": "a house by the sea"}},
    "negative_prompt": {"text": lambda B, W: {"negative_prompt": "ugly"}},
    "negative_prompt_2": {"text": lambda B, W: {"negative_prompt_2": "blurry"}},
    "prompt_embeds": {"tensor": lambda B, W: {"prompt": None, "prompt_embeds": noise(B, 77, W, seed=2)}},
    "negative_prompt_embeds": {"tensor": lambda B, W: {"negative_prompt_embeds": noise(B, 77, W, seed=3)}},
    "pooled_prompt_embeds": {"tensor": lambda B, W: {"pooled_prompt_embeds": noise(B, POOLED, seed=4)}},
    "negative_pooled_prompt_embeds": {
        "tensor": lambda B, W: {"negative_pooled_prompt_embeds": noise(B, POOLED, seed=5)}
    },
    "num_images_per_prompt": {"2": lambda B, W: {"num_images_per_prompt": 2}},
    "generator": {"list": lambda B, W: {"generator": [torch.Generator().manual_seed(k) for k in range(B)]}},
    "image": {
        "list": lambda B, W: {"image": [image(1), image(2)]},
        "array": lambda B, W: {"image": pixels(image())[None]},
        "tensor": lambda B, W: {"image": torch.from_numpy(pixels(image())).movedim(-1, 0)[None]},
        "latents": lambda B, W: {"image": noise(1, 4, 8, 8, seed=6) * 0.5},
    },
    "mask_image": {
        "list": lambda B, W: {"mask_image": [mask(8), mask(24)]},
        "tensor": lambda B, W: {"mask_image": torch.from_numpy(pixels(mask()))[None, None]},
    },
    "latents": {"tensor": lambda B, W: {"latents": noise(B, 4, 8, 8, seed=7)}},
    "noise_level": {str(n): lambda B, W, n=n: {"noise_level": n} for n in (0, 200, 400)},  # type: ignore[misc]
    "depth_map": {"tensor": lambda B, W: {"depth_map": noise(B, 16, 24, seed=9)}},
    "image_embeds": {"tensor": lambda B, W: {"image": None, "image_embeds": noise(B, ip_adapters.PROJECTED, seed=10)}},
    "callback": {"function": lambda B, W: {"callback": lambda step, timestep, latents: None}},
    "callback_steps": {"2": lambda B, W: {"callback_steps": 2}},
    "strength": {"0.5": lambda B, W: {"strength": 0.5}, "1": lambda B, W: {"strength": 1.0}},
    "height": {"96": lambda B, W: {"height": 96}},
    "num_inference_steps": {"4": lambda B, W: {"num_inference_steps": 4}},
    "timesteps": {"list": lambda B, W: {"timesteps": [759, 519, 259]}},
    "sigmas": {"list": lambda B, W: {"sigmas": [10.0, 3.0, 1.0]}},
    "guidance_scale": {"1": lambda B, W: {"guidance_scale": 1.0}, "12": lambda B, W: {"guidance_scale": 12.0}},
    "pag_scale": {"0": lambda B, W: {"pag_scale": 0.0}, "5": lambda B, W: {"pag_scale": 5.0}},
    "pag_adaptive_scale": {"0.005": lambda B, W: {"pag_adaptive_scale": 0.005}},
    "image_guidance_scale": {
        "0.5": lambda B, W: {"image_guidance_scale": 0.5},
        "1": lambda B, W: {"image_guidance_scale": 1.0},
        "4": lambda B, W: {"image_guidance_scale": 4.0},
    },
    "guidance_rescale": {"0.7": lambda B, W: {"guidance_rescale": 0.7}},
    "eta": {"0.5": lambda B, W: {"eta": 0.5}},
    "clip_skip": {"1": lambda B, W: {"clip_skip": 1}},
    "original_size": {"pair": lambda B, W: {"original_size": (48, 32)}},
    "crops_coords_top_left": {"pair": lambda B, W: {"crops_coords_top_left": (4, 8)}},
    "target_size": {"pair": lambda B, W: {"target_size": (32, 48)}},
    "negative_original_size": {"pair": lambda B, W: {"negative_original_size": (16, 24)}},
    "negative_crops_coords_top_left": {"pair": lambda B, W: {"negative_crops_coords_top_left": (2, 6)}},
    "negative_target_size": {"pair": lambda B, W: {"negative_target_size": (24, 16)}},
    "output_type": {kind: lambda B, W, kind=kind: {"output_type": kind} for kind in ("pil", "pt", "latent")},  # type: ignore[misc]
    "return_dict": {"False": lambda B, W: {"return_dict": False}},
    "callback_on_step_end": {
        "latents": lambda B, W: {"callback_on_step_end": scale_latents},
        "guidance": lambda B, W: {"callback_on_step_end": less_guidance},
        "interrupt": lambda B, W: {"callback_on_step_end": interrupt},
    },
    "callback_on_step_end_tensor_inputs": {
        "prompt_embeds": lambda B, W: {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    },
    "cross_attention_kwargs": {"scale": lambda B, W: {"cross_attention_kwargs": {"scale": 1.0}}},
    "masked_image_latents": {"tensor": lambda B, W: {"masked_image_latents": noise(1, 4, 8, 8, seed=8)}},
    "padding_mask_crop": {"8": lambda B, W: {"padding_mask_crop": 8, "output_type": "pil"}},
    "denoising_start": {x: lambda B, W, x=x: {"denoising_start": float(x)} for x in ("0.3", "0.6")},  # type: ignore[misc]
    "denoising_end": {x: lambda B, W, x=x: {"denoising_end": float(x)} for x in ("0.5", "0.9")},  # type: ignore[misc]
    "aesthetic_score": {"3": lambda B, W: {"aesthetic_score": 3.0}},
    "negative_aesthetic_score": {"3": lambda B, W: {"negative_aesthetic_score": 3.0}},
    "original_inference_steps": {"20": lambda B, W: {"original_inference_steps": 20}},
    # ip_adapter_image and ip_adapter_image_embeds need an adapter, without which diffusers fails too
    "ip_adapter_image": {"picture": lambda B, W: {"ip_adapter_image": image()}},
    "ip_adapter_image_embeds": {"list": lambda B, W: {"ip_adapter_image_embeds": [noise(2, 1, 8)]}},
}


class Reason(NamedTuple):
    """Why cases differ or are refused."""

    text: str
    applies: Callable[[Case], bool]
    message: str = ""  # a regular expression of a refusal


REFUSALS = [
    Reason(
        "not supported: refused by name",
        lambda case: True,
        r"^(masked_image_latents|original_inference_steps|cross_attention_kwargs|callback|callback_steps)"
        r" is not supported",
    ),
    Reason(
        "pictures for an IP-Adapter where none is loaded: diffusers fails too, in its own way",
        lambda case: case.has("ip_adapter_image") or case.has("ip_adapter_image_embeds"),
        r"^ip_adapter_\w+ was given, and no IP-Adapter is loaded",
    ),
    Reason(
        "latents of another size than height and width: diffusers ignores height and width",
        lambda case: case.has("height") and case.has("latents"),
        "^latents are for",
    ),
    Reason(
        "only the refiner reads a score, and it reads neither a target size nor a second text: diffusers ignores them",
        lambda case: True,
        r"(aesthetic_score is 3: only SDXL's refiner reads it|SDXL's refiner reads \w+ instead$)",
    ),
    Reason(
        "no step is left between denoising_start and denoising_end: diffusers decodes what it was given",
        lambda case: case.has("denoising_start") or case.has("denoising_end"),
        r"^denoising_(start|end) [\d.]+ leaves none of",
    ),
    Reason(
        "pictures or masks whose number does not divide the batch: what diffusers makes of them is what broadcasts",
        lambda case: case.has("image", "list") or case.has("mask_image", "list"),
        "pictures for a batch of",
    ),
]
DIFFERENCES = [
    Reason(
        "diffusers ignores negative_prompt_2 and negative_pooled_prompt_embeds where no negative_prompt is given and "
        "zeros stand for it; ours reads them",
        lambda case: (
            case.pipeline.startswith("SDXL")  # the refiner has no zeros
            and (case.has("negative_prompt_2") or case.has("negative_pooled_prompt_embeds"))
            and not case.has("negative_prompt", "text")
        ),
    ),
    Reason(
        "diffusers' text to image ignores one negative size without the other, and a negative crop without both; ours "
        "takes the positive half's for those that are not given",
        lambda case: (
            case.pipeline in ("SDXL text to image", "SDXL PAG")
            and any(case.has(f"negative_{name}") for name in ("original_size", "target_size", "crops_coords_top_left"))
            and not (case.has("negative_original_size") and case.has("negative_target_size"))
        ),
    ),
    Reason(
        "diffusers' SDXL image to image and inpainting ignore negative_crops_coords_top_left; ours reads it",
        lambda case: case.pipeline.startswith("SDXL") and case.has("negative_crops_coords_top_left"),
    ),
    Reason(
        "diffusers' LCM pipelines decode the last step's denoised latents, not what a callback makes of the latents, "
        "do not look at _interrupt, and read the guidance scale once",
        lambda case: case.pipeline.startswith("LCM") and case.has("callback_on_step_end"),
    ),
    Reason(
        "diffusers' depth to image and InstructPix2Pix do not look at _interrupt",
        lambda case: (
            case.pipeline in ("depth to image", "edit", "SDXL edit") and case.has("callback_on_step_end", "interrupt")
        ),
    ),
    Reason(
        "diffusers' stable unCLIP takes clip_skip, and does not read it; ours does",
        lambda case: case.pipeline == "stable unCLIP" and case.has("clip_skip"),
    ),
]


@functools.cache
def pair(pipeline: str) -> tuple[Any, Pipeline]:
    cls, family, name = CLASSES[pipeline]
    components = _BUILT.get(family, functools.partial(tiny.pipeline, family))().components
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    components["scheduler"] = {
        "ddim": lambda: diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**betas),
        "lcm": diffusers.LCMScheduler,
    }[name]()
    extra: dict[str, Any] = {} if family.startswith("sdxl") else {"requires_safety_checker": False}
    if family == "sdxl-refiner":
        extra = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    accepted = inspect.signature(cls.__init__).parameters
    theirs = cls(**{k: v for k, v in {**components, **extra}.items() if k in accepted})
    theirs.set_progress_bar_config(disable=True)
    return theirs, Pipeline.from_diffusers(theirs)


def parameters(pipeline: str) -> list[str]:
    parameters = inspect.signature(CLASSES[pipeline][0].__call__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


def singles(pipeline: str) -> list[tuple[str, str]]:
    """Every value of every argument that a pipeline has."""
    return [(name, value) for name in parameters(pipeline) for value in VALUES.get(name, ())]


def cases() -> Iterator[Case]:
    """All pipelines with nothing else, with one argument, and with two, neither of which is refused anyway."""
    for pipeline in CLASSES:
        alone = singles(pipeline)
        yield Case(pipeline)
        yield from (Case(pipeline, (single,)) for single in alone)
        pairable = [(name, value) for name, value in alone if name not in UNSUPPORTED and value not in ("pil", "pt")]
        yield from (Case(pipeline, two) for two in itertools.combinations(pairable, 2) if two[0][0] != two[1][0])


def arguments(case: Case) -> dict[str, Any]:
    """What is passed to both, created for each call."""
    names = parameters(case.pipeline)
    base = {
        "prompt": "a cat",
        "image": image().resize((8, 8)) if case.pipeline == "x4 upscaling" else image(),
        "mask_image": mask(),
        "num_inference_steps": 3,
        "strength": 0.7,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        "height": SIDE,
        "width": SIDE,
    }
    arguments = {name: value for name, value in base.items() if name in names}
    prompts = 2 if case.has("prompt", "list") else 1
    images = prompts * (2 if case.has("num_images_per_prompt") else 1)
    width = WIDTHS.get(CLASSES[case.pipeline][1], 32)
    for name, value in case.values:
        count = images if name in ("generator", "latents") else prompts
        arguments |= VALUES[name][value](count, width)
    if case.has("prompt_embeds") and case.has("prompt"):
        arguments["prompt"] = None  # the embeds are as many
    if case.has("timesteps") or case.has("sigmas"):
        arguments["num_inference_steps"] = 3
    return arguments


@dataclass(frozen=True)
class Verdict:
    kind: str
    detail: str = ""


def images(result: Any) -> np.ndarray:
    images = result[0] if isinstance(result, tuple) else result.images
    if isinstance(images, list):
        images = np.stack([pixels(image) for image in images])
    images = images.numpy() if isinstance(images, torch.Tensor) else images
    return np.asarray(images, np.float32)


def distance(ours: np.ndarray, theirs: np.ndarray, case: Case) -> float:
    """The largest difference, in 255ths of a picture's range, or of the latents'."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    scale = np.abs(theirs).max() if case.has("output_type", "latent") else 1.0
    return float(255 * np.abs(ours - theirs).max() / max(scale, 1e-6))


@torch.no_grad()
def judge(case: Case) -> Verdict:
    theirs, ours = pair(case.pipeline)
    failed: Exception | None = None
    expected = None
    try:
        expected = images(theirs(**arguments(case)))
    except Exception as error:
        failed = error
    try:
        actual = images(ours(**arguments(case), literal_prompt=True))
    except FastLDMError as error:
        message = str(error)
        if "\n" in message:
            return Verdict("crashed", message)
        if failed is not None:
            return Verdict("agree", "both refuse")
        return _reason("refused", REFUSALS, case, message)
    except Exception as error:
        return Verdict("crashed", repr(error))
    if expected is None:
        return Verdict("more", f"{type(failed).__name__} in diffusers")
    error = distance(actual, expected, case)
    return (
        Verdict("agree")
        if error <= (1 if case.has("output_type", "pil") or case.has("padding_mask_crop") else 0.25)
        else _reason("differ", DIFFERENCES, case, f"{error:.2g}/255")
    )


def _reason(kind: str, reasons: list[Reason], case: Case, detail: str) -> Verdict:
    for reason in reasons:
        if reason.applies(case) and re.search(reason.message, detail):
            return Verdict(kind, reason.text)
    return Verdict("unknown", f"{kind}: {detail}")


KINDS = ("agree", "differ", "refused", "more", "unknown", "crashed")


def table(verdicts: dict[Case, Verdict], total: int) -> str:
    """Verdicts counted, as Markdown. total: how many cases there are."""
    lines = [
        "# fastldm beside diffusers' pipelines",
        "",
        f"Every argument of diffusers {diffusers.__version__}'s pipelines alone, and pairs of them, on the tests' tiny "
        f"models: {len(verdicts)} of {total} cases. `python tests/support/pipeline_judge.py [NUMBER OF PAIRS]` writes "
        "this, and says what is counted.",
        "",
        f"| pipeline | cases | {' | '.join(KINDS)} |",
        f"|---|{'---|' * (1 + len(KINDS))}",
    ]
    for pipeline in [*CLASSES, "all"]:
        rows = [v for case, v in verdicts.items() if pipeline in (case.pipeline, "all")]
        counts = Counter(v.kind for v in rows)
        lines.append(f"| {pipeline} | {len(rows)} | {' | '.join(str(counts[kind]) for kind in KINDS)} |")
    for kind in ("differ", "refused", "unknown", "crashed"):
        details = Counter(v.detail for v in verdicts.values() if v.kind == kind)
        if details:
            lines += ["", f"## {kind}", "", "| cases | why |", "|---|---|"]
            lines += [f"| {count} | {detail} |" for detail, count in details.most_common(60)]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """All cases; with a number, those of one argument and so many of the pairs, drawn from a seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="?", type=int)
    parser.add_argument("--only", nargs="+", choices=CLASSES)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--join", nargs="+", type=Path)
    options = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    total = len(list(cases()))
    if options.join:
        verdicts = dict(record for path in options.join for record in _read(path))
        TABLE.write_text(table({case: verdicts[case] for case in cases() if case in verdicts}, total))
        return
    every = [case for case in cases() if not options.only or case.pipeline in options.only]
    if options.pairs is not None:
        pairs = [case for case in every if len(case.values) == 2]
        selected = {*random.Random(0).sample(pairs, min(options.pairs, len(pairs)))}
        every = [case for case in every if len(case.values) < 2 or case in selected]
    verdicts = {}
    for k, case in enumerate(every):
        verdicts[case] = judge(case)
        if verdicts[case].kind in ("unknown", "crashed"):
            print(f"{case}: {verdicts[case].kind} {verdicts[case].detail}", flush=True)
        if k % 50 == 49:
            print(f"{k + 1} of {len(every)}: {dict(Counter(v.kind for v in verdicts.values()))}", flush=True)
    if options.to is None:
        TABLE.write_text(table(verdicts, total))
    else:
        records = [[case.pipeline, case.values, v.kind, v.detail] for case, v in verdicts.items()]
        options.to.write_text(json.dumps(records))


def _read(path: Path) -> Iterator[tuple[Case, Verdict]]:
    for pipeline, values, kind, detail in json.loads(path.read_text()):
        yield Case(pipeline, tuple((name, value) for name, value in values)), Verdict(kind, detail)


if __name__ == "__main__":
    main(sys.argv[1:])
