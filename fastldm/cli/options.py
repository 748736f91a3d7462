"""Options and checks that commands share."""

from __future__ import annotations

import re
from typing import Any

import click

from fastldm.export.backends import BACKENDS


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


class ScaledFile(click.ParamType):
    """FILE[:SCALE] as (file, scale)."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        file, colon, scale = str(value).rpartition(":")
        if not colon or not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", scale):  # as of C:\sketch.safetensors
            return str(value), 1.0
        return file, float(scale)


def check_numbers(size: tuple[int, int] | None, images: int = 1, steps: int | None = None) -> None:
    """InputError for numbers that no request may have, before anything is computed from them."""
    from fastldm.request import Request

    width, height = size or (None, None)
    Request("", width=width, height=height, num_inference_steps=steps, num_images_per_prompt=images)


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
reuse_option = click.option(
    "--reuse",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Of every N calls of the U-Net, the first computes all of it, the rest its outermost level.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", *BACKENDS]),
    default="auto",
    show_default=True,
    help="What runs the networks. All but torch need MODEL to be a bundle, which `fastldm export` writes; auto takes, "
    "of a bundle, what `fastldm verify` found fastest here, and of a model that was prepared, what `prepare` did.",
)
lora_option = click.option(
    "--lora",
    "loras",
    type=ScaledFile(),
    multiple=True,
    help="An adapter (LoRA and its relatives): a file, a folder or hub id with one, or the name of one that ships for "
    "the default model: sketch, pixel or gold. Repeatable.",
)
control_option = click.option(
    "--control",
    "controls",
    type=ScaledFile(),
    multiple=True,
    help="A ControlNet or T2I-Adapter: a file, a folder, a hub id, or shape, which ships for the default model and "
    "reads a white silhouette on black; needs a --control-image. Repeatable.",
)
control_image_option = click.option(
    "--control-image", "control_images", multiple=True, metavar="FILE", help="What --control reads, one each."
)
debug_option = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
