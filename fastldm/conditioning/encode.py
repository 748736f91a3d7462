"""From the prompts of a request to its Conditioning: texts, tensors instead of texts, or one branch of each.

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


XL_ONLY = (
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


SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
"""What SDXL's refiner reads in place of a target size, and its defaults, diffusers' ones."""
NOT_SCORED = {
    "prompt_2": "prompt",
    "negative_prompt_2": "negative_prompt",
    "target_size": "aesthetic_score",
    "negative_target_size": "negative_aesthetic_score",
}
"""Fields of SDXL that its refiner does not read, and what it reads instead."""


POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Of these what the latent x2 upscaler reads too."""


def check(request: Request, needs_added: bool, scored: bool, reads_pooled: bool = False) -> None:
    """InputError for fields that the model does not read. needs_added: whether it is SDXL. scored: or its refiner.
    reads_pooled: whether it reads pooled text, as they do."""
    for name in () if scored else SCORES:
        if getattr(request, name) is not None:
            raise InputError(f"{name} is {getattr(request, name):g}: only SDXL's refiner reads it")
    for name, instead in NOT_SCORED.items() if scored else ():
        if getattr(request, name) is not None:
            raise InputError(f"{name} is {checks.show(getattr(request, name))}: SDXL's refiner reads {instead} instead")
    for name in () if needs_added else XL_ONLY:
        value = None if reads_pooled and name in POOLED else getattr(request, name)
        if value is not None and not (name == "crops_coords_top_left" and value == (0, 0)):
            raise InputError(f"{name} is {checks.show(value)}: only SDXL reads it, and this is another model")


def encode(
    request: Request,
    stages: Sequence[TextStage],
    *,
    width: int,
    window: int,
    pooled_width: int | None,
    guided: bool,
    zero_negative: bool,
    dtype: torch.dtype,
    device: torch.device,
    run: Call,
) -> Conditioning:
    """The Conditioning of a request's prompts, one row per prompt: not yet repeated for several images per prompt.

    width: of the texts that the U-Net reads. window: tokens that the encoder reads at once. pooled_width: of SDXL's
    pooled text, else None. guided: whether negatives are needed. zero_negative: use zeros if there are no negatives
    (SDXL's `force_zeros_for_empty_prompt`).

    Each branch (positive, negative) is either texts or tensors. With prompt_embeds of T tokens, negative texts are read
    in windows of T, if that is less than the encoder's, as in diffusers; branches of unequal length are repeated to a
    common length, which does not change attention. A request's pooled vector replaces that of its branch's texts.

    Raises InputError as `encode_prompts` and `from_tensors` do, and for branches without a small common multiple of
    their lengths.
    """
    negative_texts = request.negative_prompt_embeds is None
    reads_negatives = guided and negative_texts
    zeros = reads_negatives and zero_negative and request.negative_prompt is None and request.negative_prompt_2 is None
    negatives = request.negative_prompt or "" if reads_negatives and not zeros else None
    options: dict[str, Any] = {"literal": request.literal_prompt, "run": run}

    hidden = request.prompt_embeds
    pooled, negative_pooled = request.pooled_prompt_embeds, request.negative_pooled_prompt_embeds
    negative = request.negative_prompt_embeds if guided else None
    if request.prompt_embeds is None:
        encoded = encode_prompts(
            stages,
            request.prompt or "",
            negatives,
            prompts_2=request.prompt_2,
            negatives_2=request.negative_prompt_2,
            clip_skip=request.clip_skip,
            zero_negative=zeros,
            **options,
        )
        hidden, pooled = encoded.hidden, encoded.pooled if pooled is None else pooled
        if negative is None:
            negative = encoded.negative_hidden
            negative_pooled = encoded.negative_pooled if negative_pooled is None else negative_pooled
    elif negatives is not None:
        tokens = int(hidden.shape[1])  # type: ignore[union-attr]
        negatives_2 = request.negative_prompt_2
        texts = [negatives] * request.count if isinstance(negatives, str) else list(negatives)
        encoded = encode_prompts(stages, texts, prompts_2=negatives_2, length=tokens, **options)
        negative = encoded.hidden
        negative_pooled = encoded.pooled if negative_pooled is None else negative_pooled
    elif zeros:
        negative = torch.zeros_like(hidden)  # type: ignore[arg-type]
        if negative_pooled is None and pooled is not None:
            negative_pooled = torch.zeros_like(pooled)

    conditioning = from_tensors(
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
    return _with_equal_lengths(conditioning, window)


def used_embeddings(request: Request, stages: Sequence[TextStage]) -> dict[str, str]:
    """The tokens of textual inversion that a request's texts have, with the short hashes of their files."""
    texts = (request.prompt, request.prompt_2, request.negative_prompt, request.negative_prompt_2)
    used = " ".join(text for each in texts for text in ((each,) if isinstance(each, str) else each or ())).casefold()
    hashes = {token: digest for stage in stages for token, digest in stage.hashes.items()}
    return {token: digest for token, digest in hashes.items() if token.casefold() in used}


def of_pictures(embeds: Tensor, guided: bool, negatives: Tensor | None = None) -> Conditioning:
    """Of a model that reads pictures in place of prompts: an image encoder's output (n, D) as texts of one token, with
    such negatives, by default zeros. Source: diffusers' StableDiffusionImageVariationPipeline."""
    hidden = embeds[:, None]
    negative = torch.zeros_like(hidden) if negatives is None else negatives[:, None]
    return Conditioning(hidden, negative_hidden=negative if guided else None)


def _with_equal_lengths(conditioning: Conditioning, window: int) -> Conditioning:
    """Both branches, repeated along T to a common length."""
    hidden, negative = conditioning.hidden, conditioning.negative_hidden
    if negative is None or negative.shape[1] == hidden.shape[1]:
        return conditioning
    length = math.lcm(hidden.shape[1], negative.shape[1])
    if length > MAX_PROMPT_WINDOWS * window:
        raise InputError(
            f"prompts have {hidden.shape[1]} tokens and negatives {negative.shape[1]}, which cannot be brought to one "
            "length: give prompt_embeds and negative_prompt_embeds of the same length"
        )
    return dataclasses.replace(
        conditioning,
        hidden=hidden.repeat(1, length // hidden.shape[1], 1),
        negative_hidden=negative.repeat(1, length // negative.shape[1], 1),
    )


def from_tensors(
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
    """A Conditioning from a caller's tensors, checked, in `dtype` on `device`.

    prompt_embeds, negative_prompt_embeds: (B, T, width), any T; width is the U-Net's cross_attention_dim.
    pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, pooled_width), for SDXL; ignored if that is None.
    guided: whether the negative branch is needed; otherwise the negative tensors are ignored.
    Raises InputError with the name of an argument that is missing, no floating point tensor, of another shape, or not
    finite.
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
        raise InputError(f"{name} is missing: expected a tensor ({sizes}) with the other embeds")
    value = checks.tensor(name, value, shape)
    # The caller's thread has checked tensors on a GPU: a check here would wait between other requests' steps.
    return checks.finite(name, value) if value.device.type == "cpu" else value


def size_ids(request: Request, rows: int, *, scored: bool = False, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's time ids (rows, 6) of a request, float32, negatives first: the original (height, width), the crop's (top,
    left) and the target (height, width) of each U-Net row, in pixels.

    scored: of its refiner, (rows, 5), with the aesthetic score in place of the target. rows: the number of images, or
    twice as many with guidance. Source: arXiv:2307.01952, section 2.2.
    """
    own = (int(request.height or 0), int(request.width or 0))
    original, target = request.original_size or own, request.target_size or own
    ids: tuple[float, ...] = (*original, *request.crops_coords_top_left, *target)
    crop = request.negative_crops_coords_top_left
    if crop is None:
        sizes = request.negative_original_size or request.negative_target_size
        crop = (0, 0) if scored or (sizes and request.image is None) else request.crops_coords_top_left
    negative_ids: tuple[float, ...] = (
        *(request.negative_original_size or original),
        *crop,
        *(request.negative_target_size or target),
    )
    if scored:
        score, negative_score = (
            default if getattr(request, name) is None else getattr(request, name) for name, default in SCORES.items()
        )
        ids, negative_ids = (*ids[:4], score), (*negative_ids[:4], negative_score)
    images = request.batch
    table = [negative_ids] * (rows - images) + [ids] * images
    return send_numbers(table, torch.float32, device)
