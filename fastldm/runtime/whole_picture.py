"""Requests as inputs of the graph of a whole picture, see `export.graphs`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastldm.conditioning.text import split_windows
from fastldm.errors import InputError
from fastldm.export.spec import NetworkSpec
from fastldm.request import Request, as_list
from fastldm.runtime.noise import noise_rates
from fastldm.runtime.read_picture import PictureRead
from fastldm.runtime.stages import Stages
from fastldm.runtime.steps import rows_of, start_of


def picture_inputs(stages: Stages, request: Request, spec: NetworkSpec) -> dict[str, Tensor]:
    """What the graph of a whole picture reads for a request, all its rows in one call.

    Raises InputError as `Stages.complete` and `prepare` do, and for what the graph does not read: a prompt of several
    windows or with weights, embeddings, clip_skip.
    """
    request = stages.complete(request)
    _check_plain(request)
    run = stages.prepare(request)
    images, count = run.batch, len(run.table)
    guided = run.max_rows > images
    read = request.image_embeds
    if isinstance(read, PictureRead) and read.source.ndim == 2:
        raise InputError("image_embeds was given, and the graph of a whole picture reads pictures: give image")
    inputs = rows_of(run, 0, count, spec)
    inputs |= {"decode": torch.ones(1, dtype=torch.int32), **start_of(run)}
    inputs["timesteps"] = torch.from_numpy(run.table.timesteps)[:, None].expand(count, images)
    if stages.unet.config.needs_guidance:
        inputs["guidance"] = torch.full((count, images), float(request.guidance_scale or 0))
    inputs["class_labels"] = torch.full((count, images), run.noise_level)
    if run.labels is not None:
        inputs["class_labels"] = run.labels.expand(count, -1)
    if isinstance(read, PictureRead):
        inputs["pixel_values"] = read.source.repeat_interleave(images // len(read.source), 0)
        width = read.encoder.model.config.projection_dim
        inputs["negative_image_embeds"] = torch.zeros(images if guided else 0, width)
    if run.vector_noise is not None and stages.spec.low_res is not None:
        level = int(request.noise_level or 0)
        inputs["image_noise"] = run.vector_noise
        inputs["image_noise_rates"] = torch.tensor([noise_rates(stages.spec.low_res, level)]).expand(images, -1)
        inputs["noise_level"] = torch.full((images,), float(level))
    zeros = stages.zero_negative and request.negative_prompt is None and request.negative_prompt_2 is None
    inputs["negative_weight"] = torch.full((1,), 0.0 if zeros else 1.0)
    texts = _token_ids(stages, request) if stages.text_stages else ([], [])
    for suffix, ids, negative_ids in zip(("", "_2"), *texts, strict=False):
        inputs[f"input_ids{suffix}"] = ids.repeat_interleave(request.num_images_per_prompt, 0)
        negatives = negative_ids.repeat_interleave(request.num_images_per_prompt, 0)
        inputs[f"negative_ids{suffix}"] = negatives if guided else negatives[:0]
    if run.embeds is not None and run.embeds.add_time_ids is not None:
        inputs["time_ids"] = run.embeds.add_time_ids
    return {port.name: inputs[port.name].to(port.torch_dtype).contiguous() for port in spec.inputs}


def _token_ids(stages: Stages, request: Request) -> tuple[list[Tensor], list[Tensor]]:
    """Of the prompts and of the negatives, by text encoder (prompts, T) int32."""
    prompts = as_list(request.prompt)

    def broadcast(texts: Any, otherwise: list[str]) -> list[str]:
        found = as_list(texts) or otherwise
        return found * (len(prompts) // len(found))

    negatives = broadcast(request.negative_prompt, [""])
    negatives_2 = broadcast(request.negative_prompt_2, negatives)
    sides = []
    for texts, texts_2 in ((prompts, broadcast(request.prompt_2, prompts)), (negatives, negatives_2)):
        pairs = list(zip(texts, texts_2, strict=True))
        by_encoder = []
        for rows in split_windows(stages.text_stages, pairs, request.literal_prompt, None):
            if any(len(windows) > 1 for windows in rows):
                raise InputError("a prompt has several windows of tokens: the graph of a whole picture reads one")
            if any(weight != 1.0 for (window,) in rows for weight in window.weights):
                raise InputError("a prompt has weights, which the graph of a whole picture does not read")
            by_encoder.append(torch.tensor([window.ids for (window,) in rows], dtype=torch.int32))
        sides.append(by_encoder)
    return sides[0], sides[1]


def _check_plain(request: Request) -> None:
    embeds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name in (*embeds, "clip_skip"):
        if getattr(request, name) is not None:
            raise InputError(f"{name} was given, which the graph of a whole picture does not read")
