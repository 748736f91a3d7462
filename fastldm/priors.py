"""Kandinsky 2.2's prior, as users load and call it: a prompt to the vectors that its decoder reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm import checks
from fastldm.checks import MAX_IMAGES
from fastldm.conditioning.image_encoder import ImageEncoder, read_pictures
from fastldm.conditioning.prior import PriorConfigs
from fastldm.device import choose_device, choose_dtype, send
from fastldm.errors import InputError
from fastldm.loading import adoption
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.open_checkpoint import open_checkpoint
from fastldm.loading.prior import load_prior, spec_of_prior
from fastldm.loading.spec import check_options
from fastldm.loading.state import load_module
from fastldm.models.config import UNetConfig
from fastldm.models.prior import PriorConfig
from fastldm.request import Request
from fastldm.runtime.prior import SCALE, STEPS, PriorStages
from fastldm.serving.worker import Worker

_MAX_WEIGHT = 1000.0


class PriorVectors(NamedTuple):
    """What a prior makes, by the names of a request's fields: `pipe(**vectors._asdict())`."""

    image_embeds: Tensor  # (B, D) float32
    negative_image_embeds: Tensor  # (B, D) float32


class KandinskyPrior:
    """A loaded prior; diffusers' KandinskyV22PriorPipeline. It never changes.

    `Pipeline.attach_prior` makes it a stage of a decoder's requests, which share its steps. Called by itself it makes
    the vectors of one request.
    """

    def __init__(self, stages: PriorStages) -> None:
        """Most callers want `from_pretrained` or `from_diffusers`."""
        self.stages = stages

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **where: Any,
    ) -> KandinskyPrior:
        """From a diffusers folder or a hub id; arguments as of `Pipeline.from_pretrained`. CheckpointError for another
        model, InputError for a device or dtype there is not."""
        check_options(where)
        checkpoint, on = open_checkpoint(path_or_id, **where), choose_device(device)
        to = {"dtype": choose_dtype(dtype, on), "device": on}

        def fill(module: torch.nn.Module, name: str) -> Any:
            component = checkpoint.components[name]
            return load_module(module, component.state(to_prepare=True), source=component.source, **to)  # type: ignore

        return cls._filled(checkpoint, fill)

    @classmethod
    def from_diffusers(cls, pipe: Any) -> KandinskyPrior:
        """Adopts a loaded KandinskyV22PriorPipeline, whose weights are shared. InputError and CheckpointError as of
        `Pipeline.from_diffusers`."""
        return cls._filled(
            adoption.describe_diffusers(pipe), lambda module, name: adoption.adopt(module, getattr(pipe, name))
        )

    @classmethod
    def _filled(cls, checkpoint: Checkpoint, fill: Any) -> KandinskyPrior:
        return cls(PriorStages(load_prior(checkpoint, fill), Path(checkpoint.source).name))

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = STEPS,
        guidance_scale: float = SCALE,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        literal_prompt: bool = False,
    ) -> PriorVectors:
        """Vectors of B = len(prompt) * num_images_per_prompt pictures that show the prompts, and the negatives: with
        `negative_prompt` what the prior makes of that, else the image encoder's vector of a black input.

        seed: as of `Request`; a vector and its negative start from one noise. generator: as in diffusers, one, or with
        negative prompts one for each of 2B vectors, the prompts' first. latents (B, D), or (2B, D): in place of the
        first noise. guidance_scale: at most 1 is no guidance. InputError for bad arguments.
        """
        several = list(generator) if isinstance(generator, list | tuple) else []
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prior_num_inference_steps=num_inference_steps,
            prior_guidance_scale=guidance_scale,
            prior_latents=latents,
            seed=seed,
            generator=None if several else generator,
            literal_prompt=literal_prompt,
        )
        if request.prompt is None:
            raise InputError("prompt is None: give a text, or a list of texts")
        own, batch = self.stages.request_of(self.stages.complete(request)), request.batch
        if several:
            if len(several) != own.batch:
                raise InputError(
                    f"generator has {len(several)} generators for {own.batch} vectors: give one, or one each"
                )
            own = own.replace(seed=None, generator=several)
        made = Worker.of(self.stages.device).call(lambda: self.stages.fields(self.stages.make(own)[0], batch))
        return PriorVectors(**made)

    def interpolate(
        self,
        images_and_prompts: Sequence[Any],
        weights: Sequence[float],
        *,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> PriorVectors:
        """Vectors (num_images_per_prompt, D) between those of prompts and of pictures: their sum by weights, as of
        diffusers' KandinskyV22PriorPipeline.interpolate.

        images_and_prompts: texts, of which the prior makes vectors, and pictures, or tensors (1, 3, S, S) as the image
        encoder reads them, of which that does. negative_prior_prompt: what the prior is led away from.
        negative_prompt: of which the negatives are made; "" is none. options: the other arguments of a call, of each.
        InputError for bad arguments, and as many weights as there are texts and pictures not being given.
        """
        given = checks.listed("images_and_prompts", images_and_prompts, MAX_IMAGES, "texts and pictures")
        numbers = [
            checks.real(f"weights[{k}]", weight, -_MAX_WEIGHT, _MAX_WEIGHT)
            for k, weight in enumerate(checks.listed("weights", weights, MAX_IMAGES, "numbers"))
        ]
        if len(numbers) != len(given) or not given:
            raise InputError(
                f"weights has {len(numbers)} numbers for {len(given)} texts and pictures: give one for each"
            )
        options |= {"num_images_per_prompt": num_images_per_prompt, "negative_prompt": negative_prior_prompt}
        vectors = [
            self(each, **options).image_embeds
            if isinstance(each, str)
            else self._of_picture(each, f"images_and_prompts[{k}]").repeat(num_images_per_prompt, 1)
            for k, each in enumerate(given)
        ]
        away = self(negative_prompt, **options)
        negatives = away.image_embeds if negative_prompt else away.negative_image_embeds
        total = torch.stack([weight * vector for weight, vector in zip(numbers, vectors, strict=True)]).sum(0)
        return PriorVectors(total, negatives)

    def _of_picture(self, picture: Any, name: str) -> Tensor:
        """The image encoder's vector (1, D) float32 of a picture."""
        loaded = self.stages.loaded
        assert loaded.image_encoder is not None
        assert loaded.preprocessing is not None
        encoder = ImageEncoder(loaded.image_encoder, loaded.preprocessing, self.stages.name)
        pixels = encoder.pixels(read_pictures(picture, name, 1), name)
        sent = send(pixels, self.stages.device, self.stages.dtype)
        return Worker.of(self.stages.device).call(lambda: encoder.embeds(sent)).float()


def describe_prior(path_or_id: str | os.PathLike[str], unet: UNetConfig, **where: Any) -> PriorConfigs:
    """What the networks of a prior for a U-Net are, before any weight is read. InputError for one that does not fit,
    CheckpointError as of `KandinskyPrior.from_pretrained`."""
    check_options(where)
    spec = spec_of_prior(open_checkpoint(path_or_id, **where))
    check_fits(spec.model, unet)
    return spec.networks


def check_fits(prior: PriorConfig, unet: UNetConfig) -> None:
    """InputError for a prior whose vectors a U-Net does not read."""
    if not unet.reads_image_embeds:
        raise InputError("this model reads no vectors that a prior makes: prior is for Kandinsky 2.2's decoder")
    if prior.out_dim != unet.text_width:
        raise InputError(f"the prior makes vectors of {prior.out_dim}, and the model reads some of {unet.text_width}")
