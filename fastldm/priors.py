"""Kandinsky 2.2's prior, as users load and call it: a prompt to the vectors that its decoder reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm import checks
from fastldm.conditioning.prior import TextPrior
from fastldm.device import choose_device, choose_dtype, send
from fastldm.errors import InputError
from fastldm.loading import adoption
from fastldm.loading.checkpoint import Checkpoint
from fastldm.loading.open_checkpoint import open_checkpoint
from fastldm.loading.prior import load_prior
from fastldm.loading.spec import check_options
from fastldm.loading.state import load_module
from fastldm.models.clip_vision import CLIPVision
from fastldm.request import Request, as_list, picture_seeds
from fastldm.runtime.prior import SCALE, STEPS, draw_prior, sample_prior
from fastldm.samplers.table import make_table


class PriorVectors(NamedTuple):
    """What a prior makes, by the names of a request's fields: `pipe(**vectors._asdict())`."""

    image_embeds: Tensor  # (B, D) float32
    negative_image_embeds: Tensor  # (B, D) float32


class KandinskyPrior:
    """A loaded prior; diffusers' KandinskyV22PriorPipeline. It never changes."""

    def __init__(self, prior: TextPrior, image_encoder: CLIPVision) -> None:
        """Most callers want `from_pretrained` or `from_diffusers`."""
        self.prior, self.image_encoder = prior, image_encoder

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

        return cls._of(checkpoint, fill)

    @classmethod
    def from_diffusers(cls, pipe: Any) -> KandinskyPrior:
        """Adopts a loaded KandinskyV22PriorPipeline, whose weights are shared. InputError and CheckpointError as of
        `Pipeline.from_diffusers`."""
        return cls._of(
            adoption.describe_diffusers(pipe), lambda module, name: adoption.adopt(module, getattr(pipe, name))
        )

    @classmethod
    def _of(cls, checkpoint: Checkpoint, fill: Any) -> KandinskyPrior:
        return cls(*load_prior(checkpoint, fill))

    @torch.no_grad()
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
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            generator=None if isinstance(generator, list | tuple) else generator,
            literal_prompt=literal_prompt,
        )
        model, count, doubled = self.prior.model, request.batch, negative_prompt is not None
        if request.prompt is None:
            raise InputError("prompt is None: give a text, or a list of texts")
        rows = count * (1 + doubled)
        if isinstance(generator, list | tuple) and len(generator) != rows:
            raise InputError(f"generator has {len(generator)} generators for {rows} vectors: give one, or one each")
        if latents is not None:
            latents = checks.finite("latents", checks.tensor("latents", latents, (rows, model.config.text_dim)))
        sources: Any = generator
        dtype = model.proj_in.weight.dtype
        if sources is None:
            dtype = torch.float32
            seeds = picture_seeds(request) * (1 + doubled)
            sources = [torch.Generator().manual_seed(each) for each in seeds]
        texts = as_list(request.prompt)
        negatives = as_list(request.negative_prompt) or [""]
        if doubled:
            negatives = negatives * (len(texts) // len(negatives))
            texts, negatives = [*texts, *negatives], 2 * negatives
        table = make_table(self.prior.schedule, num_inference_steps)
        noise = draw_prior(model, table, rows, sources, dtype, latents)
        prompts, away = (self.prior.read(each, literal=literal_prompt) for each in (texts, negatives))
        made = sample_prior(model, table, prompts, away, noise, guidance_scale).float()
        if doubled:
            return PriorVectors(made[:count], made[count:])
        return PriorVectors(made, self.zero_embeds().expand(count, -1))

    @torch.no_grad()
    def zero_embeds(self) -> Tensor:
        """The image encoder's vector (1, D) of zeros, in float32."""
        encoder = self.image_encoder
        side = encoder.config.image_size
        return encoder(send(torch.zeros(1, 3, side, side), encoder.device, encoder.dtype)).float()
