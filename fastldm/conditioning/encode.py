"""The prompts of a request to Conditioning: texts, tensors in place of texts, or one branch of each.

Source of the rules: `encode_prompt` and `_get_add_time_ids` of diffusers' Stable Diffusion and SDXL pipelines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastldm import checks
from fastldm.conditioning.text import MAX_PROMPT_WINDOWS, Call, Conditioning, TextStage, encode_prompts
from fastldm.device import send, send_numbers
from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.request import Request


XL_ALONE = (
    "prompt_2",
    "negative_prompt_2",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
)
"""Fields of a request that only SDXL reads: its second text encoder, its pooled text and its sizes."""


def check(request: Request, needs_added: bool) -> None:
    """InputError for what a model does not read. needs_added: whether it is SDXL."""
    for name in () if needs_added else XL_ALONE:
        value = getattr(request, name)
        if value is not None and not (name == "crops_coords_top_left" and value == (0, 0)):
            raise InputError(f"{name} is {checks.show(value)}: only SDXL reads it, and this model is none")


def encode(
    request: Request,
    stages: Sequence[TextStage],
    *,
    width: int,
    pooled_width: int | None,
    guided: bool,
    zero_negative: bool,
    dtype: torch.dtype,
    device: torch.device,
    run: Call,
) -> Conditioning:
    """The Conditioning of a request's prompts, one row each: not repeated yet for several images of a prompt.

    width: the U-Net's cross_attention_dim. pooled_width: SDXL's, else None. guided: whether negatives are read at all.
    zero_negative: zeros stand for negatives where none are given (SDXL's `force_zeros_for_empty_prompt`).

    A branch (positive, negative) is texts or tensors. Beside prompt_embeds of T tokens, negative texts are read in
    windows of T, where that is less than the encoder's, as in diffusers; two branches of unequal length are repeated to
    a common one, which attention does not notice. A pooled vector that is given replaces that of its branch's texts.

    Raises InputError as `encode_prompts` and `given` do, and for branches whose lengths have no small common multiple.
    """
    texts, negative_texts = request.prompt_embeds is None, request.negative_prompt_embeds is None
    read = guided and negative_texts
    zeros = read and zero_negative and request.negative_prompt is None and request.negative_prompt_2 is None
    negatives = request.negative_prompt or "" if read and not zeros else None
    options: dict[str, Any] = {"literal": request.literal_prompt, "run": run}

    hidden = request.prompt_embeds
    pooled, negative_pooled = request.pooled_prompt_embeds, request.negative_pooled_prompt_embeds
    negative = request.negative_prompt_embeds if guided else None
    if texts:
        both = encode_prompts(
            stages,
            request.prompt or "",
            negatives,
            prompts_2=request.prompt_2,
            negatives_2=request.negative_prompt_2,
            clip_skip=request.clip_skip,
            zero_negative=zeros,
            **options,
        )
        hidden, pooled = both.hidden, both.pooled if pooled is None else pooled
        if negative is None:
            negative = both.negative_hidden
            negative_pooled = both.negative_pooled if negative_pooled is None else negative_pooled
    elif negatives is not None:
        tokens = int(hidden.shape[1])  # type: ignore[union-attr]
        negatives_2 = request.negative_prompt_2
        alone = encode_prompts(
            stages, _one_each(negatives, request.count), prompts_2=negatives_2, length=tokens, **options
        )
        negative = alone.hidden
        negative_pooled = alone.pooled if negative_pooled is None else negative_pooled
    elif zeros:
        negative = torch.zeros_like(hidden)  # type: ignore[arg-type]
        if negative_pooled is None and pooled is not None:
            negative_pooled = torch.zeros_like(pooled)

    both = given(
        hidden,
        negative,
        pooled,
        negative_pooled,
        width=width,
        pooled_width=pooled_width,
        guided=guided,
        dtype=dtype,
        device=device,
    )
    return _leveled(both, stages[0].window)


def _one_each(texts: str | Sequence[str], count: int) -> list[str]:
    return [texts] * count if isinstance(texts, str) else list(texts)


def _leveled(conditioning: Conditioning, window: int) -> Conditioning:
    """Both branches repeated along T to one length."""
    hidden, negative = conditioning.hidden, conditioning.negative_hidden
    if negative is None or negative.shape[1] == hidden.shape[1]:
        return conditioning
    length = math.lcm(hidden.shape[1], negative.shape[1])
    if length > MAX_PROMPT_WINDOWS * window:
        raise InputError(
            f"prompts have {hidden.shape[1]} tokens and negatives {negative.shape[1]}, which cannot be brought to one "
            "length: give prompt_embeds and negative_prompt_embeds of one"
        )
    return dataclasses.replace(
        conditioning,
        hidden=hidden.repeat(1, length // hidden.shape[1], 1),
        negative_hidden=negative.repeat(1, length // negative.shape[1], 1),
    )


def given(
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    *,
    width: int,
    pooled_width: int | None = None,
    guided: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Conditioning:
    """A Conditioning of tensors, checked, in `dtype` on `device`.

    prompt_embeds, negative_prompt_embeds: (B, T, width), any T; width is the U-Net's cross_attention_dim.
    pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, pooled_width), for SDXL; left alone when that is None.
    guided: whether the negative branch is needed; without it the negative tensors are left alone.
    Raises InputError that names the argument: missing, no floating point tensor, another shape, not finite.
    """
    hidden = _embeds("prompt_embeds", prompt_embeds, (None, None, width))
    pooled = negative = negative_pooled = None
    if guided:
        negative = _embeds("negative_prompt_embeds", negative_prompt_embeds, (len(hidden), None, width))
    if pooled_width is not None:
        shape = (len(hidden), pooled_width)
        pooled = _embeds("pooled_prompt_embeds", pooled_prompt_embeds, shape)
        if guided:
            negative_pooled = _embeds("negative_pooled_prompt_embeds", negative_pooled_prompt_embeds, shape)
    tensors = Conditioning(hidden, pooled, negative, negative_pooled)
    return tensors.map(lambda x: send(x.detach(), device, dtype))


def _embeds(name: str, value: Tensor | None, shape: tuple[int | None, ...]) -> Tensor:
    if value is None:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{name} is missing: expected a tensor ({sizes}) beside the embeds that were given")
    value = checks.tensor(name, value, shape)
    # The caller's thread has checked tensors on a GPU: here the check would wait between other requests' steps.
    return checks.finite(name, value) if value.device.type == "cpu" else value


def size_ids(request: Request, rows: int, *, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's time ids (rows, 6) of a request, float32, negatives first: of each U-Net row the original (height, width),
    the crop's (top, left) and the target's (height, width), in pixels.

    rows: as many as images, or twice as many. Source: arXiv:2307.01952, section 2.2.
    """
    own = (int(request.height or 0), int(request.width or 0))
    original, target = request.original_size or own, request.target_size or own
    ids = (*original, *request.crops_coords_top_left, *target)
    crop = request.negative_crops_coords_top_left
    if crop is None:
        sizes = request.negative_original_size or request.negative_target_size
        crop = (0, 0) if sizes and request.image is None else request.crops_coords_top_left
    negative_ids = (*(request.negative_original_size or original), *crop, *(request.negative_target_size or target))
    images = request.batch
    table = [negative_ids] * (rows - images) + [ids] * images
    return send_numbers(table, torch.float32, device)
