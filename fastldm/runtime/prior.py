"""Sampling of a prior: a text -> the vector of a picture that shows it, by the loop that makes images.

A vector (B, D) is a latent (B, D, 1, 1), its network the prior, and its table that of the prior's own schedule.
Sources: diffusers' UnCLIPPipeline and StableUnCLIPPipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.conditioning.prior import PriorTexts, TextPrior
from fastldm.device import send
from fastldm.models.prior import Prior
from fastldm.request import Request, as_list
from fastldm.runtime.denoise import Branches, Guidance, Run, denoise
from fastldm.runtime.noise import Generators, draw_step_noise, randn
from fastldm.samplers.table import StepTable, make_table

STEPS, SCALE = 25, 4.0
"""Of a prior, as in diffusers."""


@torch.no_grad()
def vectors_of(
    prior: TextPrior, request: Request, generators: Generators, dtype: torch.dtype, one_by_one: bool = False
) -> Tensor:
    """The vectors (B, D) float32 of a completed request's images. generators: what draws, in diffusers' order. dtype:
    what is drawn. one_by_one: each as if it were alone."""
    table = make_table(prior.schedule, STEPS, eta=request.eta)
    start, noises = draw_prior(prior.model, table, request.batch, generators, dtype)
    texts = [text for text in as_list(request.prompt) for _ in range(request.num_images_per_prompt)]
    negatives = prior.read([""])
    calls = [slice(k, k + 1) for k in range(len(texts))] if one_by_one else [slice(None)]
    made = []
    for rows in calls:
        noise = start[rows], [None if each is None else each[rows] for each in noises]
        prompts = prior.read(texts[rows], literal=request.literal_prompt)
        made.append(sample_prior(prior.model, table, prompts, negatives, noise, SCALE))
    return torch.cat(made)


def draw_prior(
    prior: Prior,
    table: StepTable,
    batch: int,
    generators: Generators = None,
    dtype: torch.dtype | None = None,
    latents: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """All noise of B vectors, in diffusers' order: what they start from, (B, D), and that of each row of the table.
    dtype: what it is drawn in, the prior's by default, as in diffusers. latents (B, D): in place of the first."""
    device, shape = prior.proj_in.weight.device, (batch, prior.config.text_dim)
    drawn = dtype or prior.proj_in.weight.dtype
    start = randn(shape, generators, drawn, device) if latents is None else send(latents, device)
    return start.float(), draw_step_noise(table, shape, generators, drawn, device)


@torch.no_grad()
def sample_prior(
    prior: Prior,
    table: StepTable,
    prompts: PriorTexts,
    negatives: PriorTexts,
    noise: tuple[Tensor, list[Tensor | None]],
    guidance_scale: float = 1.0,
) -> Tensor:
    """The vectors (B, out_dim) float32 of B prompts, as those of CLIP's image encoder. negatives: one, or B, read at a
    scale above 1. noise: of `draw_prior`.

    What the texts and the time are is computed once, and in each step the vector's own tokens. NonFinite as of
    `denoise`.
    """
    start, noises = noise
    dtype, guidance = prior.proj_in.weight.dtype, Guidance(guidance_scale)
    texts = [negatives, prompts] if guidance.guided else [prompts]
    rows = [text.repeat(len(start) // len(text.hidden)) for text in texts]
    hidden, vectors, lengths = (
        torch.cat([getattr(text, name) for text in rows]) for name in ("hidden", "vectors", "lengths")
    )
    kv, kv_len = prior.cross_kv(hidden.to(dtype), vectors.to(dtype), lengths), (lengths + 1).int()
    times = send(torch.from_numpy(table.timesteps), start.device).repeat_interleave(len(hidden))
    slots = torch.arange(len(hidden), dtype=torch.int32, device=start.device).repeat(len(table))
    temb = prior.time_rows(times, kv, kv_len=kv_len, slots=slots).unflatten(0, (len(table), -1))  # (S, R, channels)
    run = Run(
        table,
        table.init_noise_sigma * start[..., None, None],
        [None if each is None else each[..., None, None] for each in noises],
        guidance,
        dtype=dtype,
        temb=temb,
        text_kv=kv,
    )

    def network(model_input: Tensor, row: int, branches: Branches) -> Tensor:
        own = (run.texts_of(x, branches) for x in (temb[row], kv_len, *kv))
        of_time, of_text, *context = own
        return prior.step(model_input.flatten(1), of_time, context, kv_len=of_text)[..., None, None]

    return prior.post_process_latents(denoise(network, run).flatten(1))
