"""A prior as a model that a session runs: of a text the vector of a picture of it, by the loop that makes images.

    prior = PriorStages(loaded)                       a stage of cascades (serving/cascade.py), before that of images
    vectors, generators = prior.make(prior.request_of(completed))

Its latents are the vectors, (B, 1, 1, D), its network the prior, and its table that of the prior's own schedule: what
texts and times are is computed when a request starts, and a step, which all requests share, is of a vector's own two
tokens. Sources: diffusers' UnCLIPPipeline, StableUnCLIPPipeline and KandinskyV22PriorPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm import spans
from fastldm.conditioning.prior import TextPrior
from fastldm.device import Mark, send
from fastldm.errors import InputError
from fastldm.kernels.step import BRANCHES, fuses
from fastldm.models.prior import Prior
from fastldm.models.vae import finish
from fastldm.request import Request, as_list, picture_seeds
from fastldm.runtime.batch import Batch, BatchInvariant, EagerBatch
from fastldm.runtime.denoise import Guidance, Run, check_finite
from fastldm.runtime.graph import CUDA, Graphs
from fastldm.runtime.noise import Generators, draw_step_noise, randn
from fastldm.runtime.slots import Slots, StaticBuffers, graph_rows, step_capacity
from fastldm.samplers.table import StepTable, make_table

STEPS, SCALE = 25, 4.0
"""Of a prior, as in diffusers."""

ROWS_AT_ONCE = 64
"""Of times, each of which reads a copy of its prompt's keys and values."""
_GRAPH_MEMORY = 0.05  # the fraction of a GPU's memory that its graphs may take
_OPERATIONS_PER_THREAD = 1e9  # as of a U-Net's step


class NoAdapters:
    """What a prior has in place of `Adapted`: every run may take its steps at any time."""

    def admits(self, run: Run) -> bool:
        return True

    enter = admits

    def leave(self, run: Run) -> None:
        """Nothing changes."""


class PriorStages:
    """A loaded prior, with what a session's worker asks of a model, see `Stages`. It never changes."""

    backend, revision, adapters = "torch", 0, NoAdapters()

    def __init__(self, loaded: TextPrior, name: str = "prior") -> None:
        self.loaded, self.name = loaded, name
        self.model = loaded.model
        self.device, self.dtype = self.model.device, self.model.dtype
        self.graphs: Graphs | None = None
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self.graphs = Graphs(CUDA(self.device), budget=int(_GRAPH_MEMORY * total))
        self._zero_embeds: Tensor | None = None
        self._size = sum(p.numel() for p in self.model.parameters()) if isinstance(self.model, Prior) else 0

    @property
    def makes_negatives(self) -> bool:
        """Whether what is made of negative prompts is read too, as by Kandinsky's decoder: without any, the vector of a
        black picture is."""
        return self.loaded.image_encoder is not None

    # --- requests

    def complete(self, request: Request) -> Request:
        """A request for images with the prior's defaults filled in. InputError for latents of another shape."""
        if request.prior_latents is not None:
            width, rows = self.model.config.text_dim, (request.batch, self._vectors(request))
            if request.prior_latents.shape not in {(count, width) for count in rows}:
                expected = " or ".join(f"({count}, {width})" for count in sorted(set(rows)))
                shape = tuple(request.prior_latents.shape)
                raise InputError(f"prior_latents has shape {shape}: expected {expected} for this request")
        scale, steps = request.prior_guidance_scale, request.prior_num_inference_steps
        return request.replace(
            prior_guidance_scale=SCALE if scale is None else scale,
            prior_num_inference_steps=STEPS if steps is None else steps,
        )

    def _vectors(self, request: Request) -> int:
        """How many are made for a request: one for each image, and one for what each leads away from."""
        return request.batch * (1 + (self.makes_negatives and request.negative_prompt is not None))

    def request_of(self, completed: Request) -> Request:
        """Its own request, of vectors, for that of images which `complete` completed.

        Where negative prompts are vectors too, they are prompts behind the others, and each leads away from itself, as
        in diffusers. A vector and its negative start from noise of one seed.
        """
        texts, negatives = as_list(completed.prompt), None
        doubled = self._vectors(completed) > completed.batch
        latents, generator = completed.prior_latents, completed.generator
        seeds = None if generator is not None else picture_seeds(completed) * (1 + doubled)
        if doubled:
            own = as_list(completed.negative_prompt)
            own = own * (len(texts) // len(own))
            texts, negatives = [*texts, *own], [*own, *own]
            if isinstance(generator, list | tuple):
                generator = (*generator, *generator)
            if latents is not None and len(latents) == completed.batch:
                latents = torch.cat((latents, latents))
        return Request(
            prompt=texts,
            negative_prompt=negatives,
            num_images_per_prompt=completed.num_images_per_prompt,
            num_inference_steps=completed.prior_num_inference_steps,
            guidance_scale=completed.prior_guidance_scale,
            seed=seeds,
            generator=generator,
            latents=None if latents is None else latents[:, None, None],
            eta=completed.eta,
            literal_prompt=completed.literal_prompt,
        )

    @property
    def fields_made(self) -> tuple[str, ...]:
        """The names of `fields`."""
        return ("image_embeds", "negative_image_embeds")[: 1 + self.makes_negatives]

    def fields(self, vectors: Tensor, batch: int) -> dict[str, Tensor]:
        """What is made for a request of so many images, as fields of the one for images."""
        if not self.makes_negatives:
            return {"image_embeds": vectors}
        negatives = vectors[batch:]
        if not len(negatives):
            if self._zero_embeds is None:
                self._zero_embeds = self.loaded.zero_embeds()
            negatives = self._zero_embeds.expand(batch, -1)
        return {"image_embeds": vectors[:batch], "negative_image_embeds": negatives}

    # --- the stages of its own requests

    def table(self, request: Request) -> StepTable:
        """The table of its schedule."""
        return make_table(self.loaded.schedule, int(request.num_inference_steps or STEPS), eta=request.eta)

    @torch.no_grad()
    def prepare(
        self,
        request: Request,
        *,
        batch_invariant: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Run:
        """As `Stages.prepare`: texts read, the table made, all noise drawn in diffusers' order, and what texts and
        times are computed for all steps."""
        table, shape = self.table(request), (request.batch, self.model.config.text_dim)
        sources: Any = request.generator
        dtype = self.dtype if sources is not None else torch.float32  # that noise is drawn in
        if sources is None:
            sources = generators or [torch.Generator().manual_seed(seed) for seed in picture_seeds(request)]
        with spans.span("noise"):
            start = _start(shape, request.latents, sources, dtype, self.device)
            noises = draw_step_noise(table, shape, sources, dtype, self.device)
            run = Run(
                table,
                table.init_noise_sigma * start[:, None, None],
                [None if noise is None else noise[:, None, None] for noise in noises],
                Guidance(float(request.guidance_scale or 0)),
                dtype=self.dtype,
            )
        run.generators = sources if request.generator is None else None
        with spans.span("conditions"):
            if batch_invariant:
                run.take_apart()
                for k, image in enumerate(run.images):
                    self._condition(image, request.alone(k // request.num_images_per_prompt))
            else:
                self._condition(run, request)
        return run

    def _condition(self, run: Run, request: Request) -> None:
        """Give a run what its steps read of its texts: keys and values, and those of the time of each step."""
        texts = self.loaded.read(as_list(request.prompt), literal=request.literal_prompt)
        read = [texts.repeat(run.batch // len(texts.hidden))]
        if run.guidance.guided:
            away = self.loaded.read(as_list(request.negative_prompt) or [""], literal=request.literal_prompt)
            read.insert(0, away.repeat(run.batch // len(away.hidden)))
        hidden, vectors, lengths = (
            torch.cat([getattr(each, name) for each in read]) for name in ("hidden", "vectors", "lengths")
        )
        run.text_kv = self.model.cross_kv(hidden.to(self.dtype), vectors.to(self.dtype), lengths)
        run.text_len = (lengths + 1).int()  # with the token of the text's vector
        steps, rows = len(run.table), len(hidden)
        times = send(torch.from_numpy(run.table.timesteps), self.device).repeat_interleave(rows)
        slots = torch.arange(rows, dtype=torch.int32, device=self.device).repeat(steps)
        parts = zip(times.split(ROWS_AT_ONCE), slots.split(ROWS_AT_ONCE), strict=True)
        temb = [self.model.time_rows(t, run.text_kv, kv_len=run.text_len, slots=own) for t, own in parts]
        run.temb = torch.cat(temb).unflatten(0, (steps, rows))

    def new_batch(self, run: Run, max_batch: int) -> Batch:
        """As `Stages.new_batch`."""
        apart = bool(run.images)
        eager = not fuses(run.latents) or (apart and self.dtype.itemsize != 2)
        if eager or not isinstance(self.model, Prior):
            batch: Batch = EagerBatch(self.model, together=not apart)
            return BatchInvariant(batch) if apart else batch
        vectors = max(run.batch, max_batch)
        buffers = StaticBuffers.empty(
            self.model.config,
            slots=vectors,
            rows=graph_rows(BRANCHES * vectors),
            height=1,
            width=run.latents.shape[3],
            tokens=run.tokens,
            steps=step_capacity(len(run.table)),
            dtype=self.dtype,
            device=self.device,
        )
        slots = Slots(self.model, buffers, self.graphs, batch_invariant=apart)
        return BatchInvariant(slots) if apart else slots

    def decode(
        self, request: Request, run: Run, latents: Tensor, first_bad: Callable[[], int | None]
    ) -> Generator[Any, None, Any]:
        """As `Decoder.decode`: the vectors (B, D) float32, as those of CLIP's image encoder."""
        vectors = self.model.post_process_latents(latents.flatten(1)).float()
        mark = Mark(self.device)
        yield mark
        mark.wait()
        check_finite(first_bad(), run.table)
        return vectors

    def threads(self, request: Request, images: int, limit: int) -> int:
        """As `Stages.threads`: a step is of two tokens for each of a vector's two rows."""
        return max(1, min(limit, int(4 * self._size * images / _OPERATIONS_PER_THREAD)))

    def nbytes(self, request: Request) -> int:
        """More bytes than one of its own requests takes."""
        config, steps = self.model.config, int(request.num_inference_steps or STEPS)
        rows, width = request.batch * (1 + ((request.guidance_scale or 0) > 1)), config.channels
        numbers = (config.tokens + 1) * (2 * sum(config.cross_widths) + 16 * width) + steps * config.time_channels
        copies = min(ROWS_AT_ONCE, steps * rows) * (config.tokens + 1) * 8 * width
        return int(2 * self.dtype.itemsize * (rows * numbers + copies))

    def release_memory(self) -> None:
        """As `Stages.release_memory`."""
        if self.graphs is not None:
            self.graphs.clear()
            torch.cuda.empty_cache()

    def make(
        self, request: Request, *, batch_invariant: bool = False
    ) -> tuple[Tensor, Sequence[torch.Generator] | None]:
        """The vectors of one of its own requests, made from end to end in this thread, and the generators of its seeds
        behind all that was drawn."""
        run = self.prepare(request, batch_invariant=batch_invariant)
        batch = self.new_batch(run, run.batch)
        batch.admit(run)
        while not run.done:
            batch.step([run])
        return finish(self.decode(request, run, batch.latents(run), batch.release(run))), run.generators


def _start(
    shape: Sequence[int], latents: Tensor | None, sources: Generators, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(B, D) float32 that the loop starts from: latents (B, 1, 1, D) in place of what is drawn."""
    if latents is not None:
        return send(latents, device, torch.float32).flatten(1)
    return randn(shape, sources, dtype, device).float()
