"""A loaded model and what is done with it: each stage of the way from a request to its images.

request -> Conditioning -> (StepTable, noise) -> latents -> images

A session's worker asks for them one by one: `prepare` is all before the first step, a `Batch` takes the steps, `decode`
is all after the last. `make` is one request from end to end.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm import image as images
from fastldm.conditioning import encode as conditioning
from fastldm.conditioning.text import Conditioning
from fastldm.device import Mark, send, to_host
from fastldm.errors import NonFinite
from fastldm.kernels.step import fuses
from fastldm.loading import spec as loading
from fastldm.loading.mapped import Mapped
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import Decode, Pieces, decode_pieces, finish
from fastldm.request import Request, Result, Timings, picture_seeds
from fastldm.runtime.complete import complete
from fastldm.runtime.denoise import (
    Batch,
    Conditions,
    EagerBatch,
    Embeds,
    Guidance,
    Run,
    Work,
    check_finite,
)
from fastldm.runtime.graph import CUDA, Graphs
from fastldm.runtime.slots import Slots, StaticBuffers, graph_rows, step_capacity
from fastldm.runtime.start import start_work
from fastldm.samplers import table as schedule

logger = logging.getLogger("fastldm")

_GRAPHS_SHARE = 0.25  # of a GPU's memory, that graphs may take
_PREVIEW_LATENTS = 16
_WORK_PER_THREAD = 1e9  # multiply-adds of a step, about


@dataclass(frozen=True)
class Change:
    """What a callback wants from the next step on."""

    guidance: tuple[float, float]  # scale and rescale
    latents: Tensor | None = None  # (B, C, h, w); None where they are as they were
    embeds: Embeds | None = None  # likewise


class Stages:
    """What a session runs. A pipeline has one."""

    def __init__(
        self, spec: loading.Spec, networks: loading.LoadedModel, name: str, mapped: Mapped | None = None
    ) -> None:
        """mapped: files that the networks' weights lie in."""
        self.name, self.family, self.spec = name, spec.family, spec
        self.unet, self.vae, self.text_stages = networks.unet, networks.vae, networks.text_stages
        self.schedule = spec.schedule
        self.zero_negative = bool(spec.checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self.device, self.dtype, self.backend = networks.device, networks.dtype, networks.backend
        self.precision = networks.precision or str(self.dtype).removeprefix("torch.")
        """What the networks compute in: "float32", "float16" or "bfloat16"."""
        self.prepared, self._latents = networks.prepared, networks.latents
        self._unet_parameters = sum(p.numel() for p in self.unet.parameters()) if isinstance(self.unet, UNet) else 0
        self._mapped = mapped or Mapped()
        self.graphs: Graphs | None = None
        if self.device.type == "cuda" and self.backend == "torch":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self.graphs = Graphs(CUDA(self.device), budget=int(_GRAPHS_SHARE * total))
        self.vae_decode: Decode = "whole"

    def complete(self, request: Request) -> Request:
        """The request with the family's defaults filled in, and checked against this model."""
        self._mapped.check()
        return complete(request, self.unet.config, self.vae.config, self.family, self._latents)

    def guided(self, request: Request) -> bool:
        """Whether there are two network rows a picture; a model that reads the scale itself needs one."""
        return request.guidance_scale > 1 and not self.unet.config.needs_guidance  # type: ignore[operator]

    def unet_rows(self, pictures: int) -> int:
        """The most U-Net rows that a graph of so many pictures has."""
        return graph_rows(pictures if self.unet.config.needs_guidance else 2 * pictures)

    def prepare(self, request: Request) -> Run:
        """prompt -> Conditioning -> (StepTable, noise): all that comes before the first step."""
        changed = self.prepared.refresh()
        if changed:
            logger.info("weights changed: %s", ", ".join(changed))
        encoded = self._encode(request)
        table = self._table(request)
        return Run(self._work(request, table), self._conditions(request, encoded, table))

    def _encode(self, request: Request) -> Conditioning:
        config = self.unet.config
        encoded = conditioning.encode(
            request,
            self.text_stages,
            width=config.cross_attention_dim,
            pooled_width=self._pooled_width,
            guided=self.guided(request),
            zero_negative=self.zero_negative,
            dtype=self.dtype,
            device=self.device,
            run=self.run,
        )
        return encoded.repeat(request.num_images_per_prompt)

    @property
    def _pooled_width(self) -> int | None:
        config = self.unet.config
        return config.addition_input_dim - 6 * config.addition_time_embed_dim if config.needs_added else None

    def _table(self, request: Request) -> schedule.StepTable:
        return schedule.make_table(
            self.schedule,
            request.num_inference_steps,  # type: ignore[arg-type]
            sampler=request.sampler,
            strength=float(request.strength or 0) if request.image is not None else 1.0,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            eta=request.eta,
        )

    def _conditions(self, request: Request, encoded: Conditioning, table: schedule.StepTable) -> Conditions:
        """What does not change at each step, computed once."""
        hidden, pooled = encoded.network_rows()  # (R, T, D), (R, P): all negatives, then all prompts
        embeds = Embeds(hidden)
        if self.unet.config.needs_added and pooled is not None:
            embeds = Embeds(hidden, pooled, conditioning.size_ids(request, pooled.shape[0], device=self.device))
        return self._conditioned(embeds, table, float(request.guidance_scale or 0))

    def _conditioned(self, embeds: Embeds, table: schedule.StepTable, guidance_scale: float) -> Conditions:
        """What the steps of a table read, of U-Net rows that are conditioned so."""
        timesteps = send(torch.from_numpy(table.timesteps), self.device)  # (S,)
        rows = 1  # a step: the network's rows differ only where their conditioning enters the time embedding
        added = scale = None
        if embeds.add_text_embeds is not None and embeds.add_time_ids is not None:
            rows, steps = len(embeds.add_text_embeds), len(table)
            added = AddedConditions(embeds.add_text_embeds.repeat(steps, 1), embeds.add_time_ids.repeat(steps, 1))
        if self.unet.config.needs_guidance:
            scale = torch.full((len(table) * rows,), guidance_scale, device=self.device)
        temb = self.unet.time_rows(timesteps.repeat_interleave(rows), added=added, guidance=scale)
        text_kv = self.run("text keys and values", self.unet.cross_kv, embeds.prompt_embeds)
        return Conditions(temb.unflatten(0, (len(table), rows)), text_kv, embeds)

    def _work(self, request: Request, table: schedule.StepTable) -> Work:
        scale = float(request.guidance_scale or 0) if self.guided(request) else 1.0
        guidance = Guidance(scale, request.guidance_rescale, *request.guidance_interval)
        in_channels = self.unet.config.in_channels
        return start_work(request, table, guidance, self.vae, in_channels, dtype=self.dtype, device=self.device)

    def change(self, batch: Batch, run: Run, change: Change) -> None:
        """Go on as a callback wants."""
        if change.latents is not None:
            batch.go_on_from(run, change.latents)
        scale, rescale = change.guidance
        guidance = dataclasses.replace(
            run.work.guidance, scale=1.0 if self.unet.config.needs_guidance else scale, rescale=rescale
        )
        conditions = run.conditions
        if change.embeds is not None:
            conditions = self._conditioned(change.embeds, run.work.table, scale)
        if conditions is not run.conditions or guidance != run.work.guidance:
            batch.recondition(run, conditions, guidance)

    def new_batch(self, run: Run, max_batch: int) -> Batch:
        """For runs of the size of this one: what has room for it, and for `max_batch` pictures."""
        if not isinstance(self.unet, UNet) or not fuses(run.work.x):
            return EagerBatch(self.unet, self.backend)
        pictures = max(run.batch, max_batch)
        buffers = StaticBuffers.empty(
            self.unet.config,
            slots=pictures,
            rows=self.unet_rows(pictures),
            height=run.work.x.shape[2],
            width=run.work.x.shape[3],
            tokens=max(self.text_stages[0].window, *(kv.shape[1] for kv in run.conditions.text)),
            steps=step_capacity(len(run.work.table)),
            dtype=self.dtype,
            device=self.device,
        )
        return Slots(self.unet, buffers, self.graphs)

    def threads(self, request: Request, pictures: int, most: int) -> int:
        """How many CPU threads a step of so many pictures has work for.

        Ops of a small step are over before threads have met: on two cores the default model's picture at 32x32 takes as
        long with two as with one, at 64x64 three quarters, at 128x128 half. (How they wait where others want the cores
        too is openmp.Contention's to see to.) An engine has threads of its own, and little is left to do.
        """
        cells = int(request.height or 0) * int(request.width or 0) / self.vae.config.factor**2
        work = self._unet_parameters * cells * pictures
        return max(1, min(most, int(work / _WORK_PER_THREAD)))

    def run(self, key: Hashable, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """work(*inputs), on a GPU by a graph when it has run often enough. key: says all but the tensors."""
        return work(*inputs) if self.graphs is None else self.graphs.call(key, work, *inputs)

    def preview(self, latents: Tensor, c_in: float) -> Tensor:
        """What latents (B, C, h, w) between two steps look like: small pictures (B, H, W, 3) uint8, on the host when
        the device has come so far. They are decoded from at most 16 latents a side, a sixteenth of the work at 512x512
        pixels and less beyond. c_in: what the next step scales them by."""
        longest = max(latents.shape[2:])
        if longest > _PREVIEW_LATENTS:
            size = [max(1, round(n * _PREVIEW_LATENTS / longest)) for n in latents.shape[2:]]
            latents = torch.nn.functional.interpolate(latents, size, mode="area")
        return to_host(images.to_pixels(finish(self._decoding(latents * c_in)), "pil"))

    def decode(
        self, request: Request, table: schedule.StepTable, latents: Tensor, first_bad: Callable[[], int | None]
    ) -> Generator[Any, None, Any]:
        """latents -> image, in pieces, between which others' steps may run; returns the images.

        Yields None, or a mark that the device has to reach before the next piece: nothing here waits for another.
        """
        kind, pixels, finite = request.output_type, latents, None
        if kind != "latent":
            decoded = yield from self._decoding(latents)
            pixels, finite = images.to_pixels(decoded, kind), to_host(decoded.isfinite().all())
            if kind != "pt":
                pixels = to_host(pixels)
        mark = Mark(self.device)
        yield mark
        mark.wait()
        first = first_bad()
        if first == -1 and request.image is not None:
            raise NonFinite(
                f"encoding the picture in {self.dtype} gave NaN or infinity: load the model in float32 or bfloat16"
            )
        check_finite(first, table)
        if finite is None:
            return latents
        if not bool(finite):
            pixels = self._decoded_in_float32(latents, kind)
        return images.to_images(pixels, kind)

    def _decoding(self, latents: Tensor) -> Pieces:
        """Latents (B, C, h, w) as the U-Net has them to pictures (B, 3, H, W), about -1..1, in pieces."""
        z = self._unscaled(latents).to(self.dtype)
        if self.graphs is not None and self.vae_decode == "whole":
            yield
            return self.run("decode", self.vae.decode, z)  # one piece: about as long as a step
        return (yield from decode_pieces(self.vae, z, self.vae_decode))

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def _decoded_in_float32(self, latents: Tensor, kind: str) -> Tensor:
        """The pixels of a picture whose decoding was not finite; NonFinite where float32 does not help. Waits."""
        decoded = None
        if self.dtype != torch.float32 and isinstance(self.vae, torch.nn.Module):
            logger.warning("decoding in %s overflowed: decoding once more in float32", self.dtype)
            vae = copy.deepcopy(self.vae).float()
            decoded = finish(decode_pieces(vae, self._unscaled(latents).float(), self.vae_decode))
        if decoded is None or not bool(decoded.isfinite().all()):
            how = f"on {self.backend}" if self.backend != "torch" else "in float32 too"
            raise NonFinite(f"decoding the latents gave NaN or infinity, {how}: the VAE's weights may be damaged")
        pixels = images.to_pixels(decoded, kind)
        return pixels if kind == "pt" else pixels.cpu()

    def result(
        self, request: Request, table: schedule.StepTable, images: Any, timings: Timings, backend: str
    ) -> Result:
        seeds = picture_seeds(request) if request.generator is None and request.latents is None else ()
        steps = request.num_inference_steps
        if request.timesteps is not None or request.sigmas is not None:
            steps = table.steps  # of a caller's own list, what ran
        ran = request.replace(sampler=table.sampler, num_inference_steps=steps)
        return Result(images, seeds, timings, backend, self.precision, ran)

    def release_memory(self) -> None:
        """Give back what a failed allocation may have left: the next, smaller request should find room."""
        if self.graphs is not None:
            self.graphs.clear()
            torch.cuda.empty_cache()

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.config.latent_channels

    @torch.no_grad()
    def make(self, request: Request) -> Any:
        """The images of one request, from end to end in this thread, with nothing beside it."""
        request = self.complete(request)
        run = self.prepare(request)
        batch = self.new_batch(run, run.batch)
        batch.admit(run)
        while not run.done:
            batch.step([run])
        latents = batch.latents(run)
        return finish(self.decode(request, run.work.table, latents, batch.release(run)))
