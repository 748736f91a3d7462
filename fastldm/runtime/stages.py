"""A loaded model and the stages from a request to its images.

Request -> Run (Conditioning, StepTable, noise) -> latents -> images

A session's worker calls them one by one: `prepare` is all before the first step, a `Batch` takes the steps, `decode`
is all after the last. `make` is one request from end to end.

Over 500 lines, for what a session's worker asks of a model is one object, whose stages are read in their order.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm import spans
from fastldm.adapters.selection import Selection
from fastldm.conditioning import encode as conditioning
from fastldm.conditioning.prior import read_texts
from fastldm.conditioning.text import Conditioning, TextStage
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.gradients import CLIPGuidance
from fastldm.kernels.step import BRANCHES, fuses
from fastldm.loading import spec as loading
from fastldm.loading.mapped import Mapped
from fastldm.models.controlnet import ControlNet
from fastldm.models.embeddings import pooled_condition
from fastldm.models.t2i_adapter import T2IAdapter
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import PixelResidual, finish
from fastldm.request import Request, Result, Timings, as_list, picture_seeds
from fastldm.runtime import candidates
from fastldm.runtime.adapted import Adapted
from fastldm.runtime.batch import Batch, BatchInvariant, EagerBatch
from fastldm.runtime.candidates import Ranking
from fastldm.runtime.complete import complete
from fastldm.runtime.controls import Controls, start_controls
from fastldm.runtime.decoding import Decoder
from fastldm.runtime.denoise import Embeds, Guidance, Run
from fastldm.runtime.gradient import CLIPGradient, Function, Gradient, clip_texts
from fastldm.runtime.graph import CUDA, Graphs
from fastldm.runtime.guidance import apg_field, apg_of, guidance_of, pag_defaults, perturbed_layers
from fastldm.runtime.image_prompts import ImagePrompts, PictureSelection, per_image, start_pictures
from fastldm.runtime.prior import PriorStages
from fastldm.runtime.read_picture import (
    PRIOR_FIELDS,
    PictureRead,
    check_prior,
    check_prior_fields,
    check_projected,
    read_picture,
    read_vectors,
)
from fastldm.runtime.slots import Slots, StaticBuffers, graph_rows, step_capacity
from fastldm.runtime.start import start_run
from fastldm.runtime.steps import StepsBatch
from fastldm.samplers import table as schedule
from fastldm.samplers.grid import Churn
from fastldm.samplers.table import StepTable

logger = logging.getLogger("fastldm")

OF_FOLLOWS = ("super_res_num_inference_steps", "super_res_latents")
"""Fields of a request that are of what goes on with the pictures."""
_GRAPH_MEMORY = 0.25  # the fraction of a GPU's memory that graphs may take
_OPERATIONS_PER_THREAD = 1e9  # multiply-adds of a step, about


@dataclass(frozen=True)
class Change:
    """What a callback changes from the next step on."""

    guidance_scale: float
    guidance_rescale: float
    image_guidance_scale: float | None = None
    pag_scale: float | None = None
    pag_adaptive_scale: float | None = None
    latents: Tensor | None = None  # (B, C, h, w); None: unchanged
    embeds: Embeds | None = None  # None: unchanged


class Stages:
    """A loaded model that a session runs; a pipeline has one. The attributes are those of `Pipeline`."""

    def __init__(
        self, spec: loading.Spec, networks: loading.LoadedModel, name: str, mapped: Mapped | None = None
    ) -> None:
        """mapped: files that the networks' weights lie in."""
        self.name, self.family, self.spec = name, spec.family, spec
        self.unet, self.vae, self.text_stages = networks.unet, networks.vae, networks.text_stages
        self.image_encoder = networks.image_encoder
        self.prior = None if networks.prior is None else PriorStages(networks.prior)
        """What makes the vectors of pictures that the U-Net reads, of texts: unCLIP's own, or Kandinsky's, attached."""
        self.projection = networks.projection
        pairs = zip(spec.follows, networks.follows, strict=True)
        self.follows = tuple(Stages(own, loaded, own.component, mapped) for own, loaded in pairs)
        """Those that go on with its pictures: see `Spec.follows`."""
        self.schedule = spec.schedule
        self._pag = pag_defaults(spec.checkpoint.index) if networks.backend == "torch" else {}
        self.zero_negative = bool(spec.checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self._scales_edits = bool(spec.checkpoint.index.get("is_cosxl_edit", False))
        self.device, self.dtype, self.backend = networks.device, networks.dtype, networks.backend
        self.precision = networks.precision or str(self.dtype).removeprefix("torch.")
        """What the networks compute in: "float32", "float16" or "bfloat16"."""
        self.prepared = networks.prepared
        self.latents = networks.latents
        """The allowed ranges of latent height and width; empty if every size is allowed."""
        self._unet_parameters = sum(p.numel() for p in self.unet.parameters()) if isinstance(self.unet, UNet) else 0
        self._mapped = mapped or Mapped()
        self.graphs: Graphs | None = None
        if self.device.type == "cuda" and self.backend == "torch":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self.graphs = Graphs(CUDA(self.device), budget=int(_GRAPH_MEMORY * total))
        self._steps = networks.steps
        self.decoder = Decoder(self.vae, self.dtype, self.device, self.graphs, self.backend)
        """Makes images of latents."""
        adapted: dict[str, Any] = {"unet": self.unet, **{name: stage.model for name, stage in self.encoders.items()}}
        options: dict[str, Any] = {"shared": spec.checkpoint.loaded, "packed": networks.packed}
        self.adapters = Adapted(adapted, spec.unet, self.prepared.refresh, **options)
        """LoRA and its relatives: those that are loaded, and what is merged into the weights."""
        self.controls = Controls()
        """ControlNets and T2I-Adapters that are attached."""
        for control_name, control in networks.controls.items():
            self.controls.attach(control_name, control)
        self.image_prompts = ImagePrompts(spec.unet)
        """IP-Adapters: those that are loaded."""
        self.ranking = Ranking(spec.checkpoint.source, self.dtype, self.device)
        """What ranks candidates."""
        self.enlarged_size: tuple[int, int] | None = None
        """(width, height) at which `enlarger` makes pictures of those of this model's own size."""
        self.enlarger: Callable[[], Stages] | None = None
        """Opens another model, which enlarges this one's pictures."""
        self._switches = 0
        self.batch_invariant = False
        """Whether an image is bitwise the one made alone, whatever shares its batch: of sessions that do not say."""

    @property
    def encoders(self) -> dict[str, TextStage]:
        """The text stages by component."""
        return dict(zip(self.spec.encoder_names, self.text_stages, strict=True))

    @property
    def revision(self) -> int:
        """Counts changes of the networks that a captured step does not follow: a batch made before takes no new run."""
        return self._switches + self.adapters.layers_added

    @property
    def weight_bytes(self) -> int:
        """Bytes of the networks' weights; engines keep theirs to themselves."""
        encoder = self.image_encoder
        pictures = [x for x in (encoder.model, encoder.normalizer) if x is not None] if encoder else []
        beside: list[Any] = [*pictures, self.projection]
        if (prior := self.prior) is not None:
            loaded = prior.loaded
            beside += [loaded.model, loaded.text.model, loaded.normalizer, loaded.image_encoder]
        networks = [self.unet, self.vae, *(stage.model for stage in self.text_stages), *beside]
        modules = [network for network in networks if isinstance(network, torch.nn.Module)]
        storages = [p.untyped_storage() for module in modules for p in (*module.parameters(), *module.buffers())]
        own = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return own + sum(each.weight_bytes for each in self.follows)

    def layers_changed(self) -> None:
        """Layers compute another way from now on."""
        self._switches += 1

    def need_torch(self, reason: str) -> None:
        """InputError for a bundle. reason: what it cannot do, and what else helps."""
        if self.backend != "torch":
            raise InputError(f"this pipeline runs a bundle on {self.backend}, {reason}")

    def complete(self, request: Request) -> Request:
        """The request with the family's defaults filled in, and checked against this model."""
        self._mapped.check()
        factor = 1.0 if request.cross_attention_kwargs is None else request.cross_attention_kwargs["scale"]
        adapters = self.adapters.select(request.adapters, factor)
        self.adapters.check(adapters)
        request = request.replace(adapters=adapters, cross_attention_kwargs=None)
        if (network := self.spec.unet).reads_image_embeds:
            request = read_vectors(request, network, self.prior is not None)
        elif self.prior is not None:
            check_prior(request)
        else:
            request = read_picture(request, self.image_encoder)
        if self.prior is not None and request.image_embeds is None:
            request = self.prior.complete(request)
        else:
            check_prior_fields(request, False)
        if self.projection is not None:
            check_projected(request)
        if not self.follows and (unread := [name for name in OF_FOLLOWS if getattr(request, name) is not None]):
            raise InputError(f"{unread[0]} was given, and this model has no super-resolution of its own: leave it out")
        request = self.controls.complete(request, self.unet.config.needs_added)
        if request.reuse > 1:
            self._check_reuse(request.reuse)
        if request.pag_scale is None:
            request = request.replace(**self._pag)
        if request.pag_scale:
            self.need_torch(
                f"whose attention is as it was exported, and pag_scale is {request.pag_scale:g}: leave it out, or load "
                "the checkpoint, not a bundle"
            )
            perturbed_layers(request, self.unet.config)
        if self._steps is not None and apg_of(request) is not None:
            raise InputError(
                f"this pipeline runs a bundle on {self.backend} by a graph of whole steps, which knows no adaptive "
                f"projected guidance, and {apg_field(request)}: leave it out, or load the checkpoint"
            )
        request, unet = complete(request, self.spec, self.vae.config, self.family, self.latents), self.unet.config
        if request.gradient is not None:
            self._check_gradient(request)
        lacks_negatives = request.image_embeds is not None and request.negative_image_embeds is None
        if unet.pools_text and not self.text_stages:
            self._check_states(request)
        if unet.reads_image_embeds and lacks_negatives and self.guided(request):
            raise InputError(
                f"negative_image_embeds is None, and guidance_scale is {request.guidance_scale:g}: give what guidance "
                "leads away from, which the prior makes too, or guidance_scale=1"
            )
        if self._steps is not None and self.table(request).threshold is not None:
            raise InputError(
                f"this pipeline runs a bundle on {self.backend} by a graph of whole steps, which knows no dynamic "
                "thresholding: take another sampler, or load the checkpoint"
            )
        lacks_variance = self.schedule.raw.get("variance_type") == "learned_range" and not unet.learns_variance
        if lacks_variance and self.table(request).rows[:, schedule.COLUMNS.index("d_ratio")].any():
            raise InputError(
                f"sampler is {request.sampler!r}: with the scheduler's variance_type 'learned_range' it reads a "
                "variance that the network makes, and this one makes none: take another sampler"
            )
        if unet.timesteps is not None and not set(self.table(request).timesteps.tolist()) <= {*range(unet.timesteps)}:
            raise InputError(
                f"sampler is {request.sampler!r}: this model has a vector for each of {unet.timesteps} whole timesteps "
                "('num_train_timesteps'), and this sampler takes others: take DDPM or DDIM"
            )
        if request.candidates is not None:
            self.ranking.need(self.text_stages, self.backend)
        return self.image_prompts.complete(request, self.guided(request))

    def scores(self, request: Request, images: Any) -> list[float]:
        """How well images of a request show what its prompts say, see `conditioning.ranking`."""
        ranker = self.ranking.need(self.text_stages, self.backend)
        return candidates.scores(ranker, request, images, self.text_stages[0])

    def _check_states(self, request: Request) -> None:
        """InputError for texts that no text encoder is there to read."""
        names = ("prompt_embeds", "negative_prompt_embeds") if self.guided(request) else ("prompt_embeds",)
        for name in names:
            if getattr(request, name) is None:
                raise InputError(
                    f"{name} is None, and {self.name} has no text encoder to read texts: give it, or make this model "
                    "the upscaler of IF's first stage, whose text it then reads"
                )

    def share_text(self, other: Stages) -> None:
        """Read texts by another model's text encoder from now on, if this one has none of its own and can: DeepFloyd
        IF's super-resolution by that of the first stage. InputError for text states of another width."""
        ours, theirs = self.spec.unet, other.spec.unet
        if self.text_stages or not ours.pools_text or not other.text_stages:
            return
        if not theirs.pools_text or ours.text_width != theirs.text_width:
            raise InputError(
                f"{self.name} has no text encoder, and reads text of {ours.text_width} channels; {other.name} has "
                f"{theirs.text_width}: load it with its own"
            )
        self.spec, self.text_stages = dataclasses.replace(self.spec, text=other.spec.text), other.text_stages

    def _check_reuse(self, reuse: int) -> None:
        self.need_torch(
            f"whose step is one network, and reuse is {reuse}: leave it out, or load the checkpoint, not a bundle"
        )
        if self.unet.config.levels < 2:
            raise InputError(f"reuse is {reuse}, and this model's U-Net has one level, of which nothing is deep")

    def _check_gradient(self, request: Request) -> None:
        """InputError for guidance by gradient that a completed request cannot have here."""
        options = request.gradient
        if self._steps is not None:
            raise InputError(
                f"this pipeline runs a bundle on {self.backend} by a graph of whole steps, which no gradient enters: "
                "leave out guidance_fn and clip_guidance_scale, or load the checkpoint"
            )
        if not isinstance(options, CLIPGuidance):
            return
        self.need_torch(
            "whose networks have no gradients, and CLIP guidance goes through them: leave out clip_guidance_scale, or "
            "load the checkpoint, not a bundle"
        )
        layers = self.unet.modules() if isinstance(self.unet, UNet) else ()
        if options.through_unet and any(getattr(layer, "eight_bits", None) is not None for layer in layers):
            raise InputError(
                "fp8 is on, through which there is no gradient: call disable_fp8, or leave CLIP guidance out"
            )
        if options.decoder is None and isinstance(self.vae, PixelResidual):
            has = "of what a small picture lacks" if self.spec.enlarges > 1 else "pixels, which nothing decodes"
            raise InputError(f"CLIP guidance sees decoded latents, and this model's are {has}")
        ranker = self.ranking.need(self.text_stages, self.backend, "CLIP guidance goes")
        if ranker.text is None and not self.text_stages:
            raise InputError("CLIP guidance reads a text, and this model has no text encoder: load a whole CLIPModel")
        clip_texts(request, options)

    def _gradient(self, request: Request) -> Gradient | None:
        """Of a completed request."""
        options = request.gradient
        if not isinstance(options, CLIPGuidance):
            return None if options is None else Function(options)
        ranker = self.ranking.need(self.text_stages, self.backend)
        stage = ranker.text or self.text_stages[0]
        texts = ranker.text_vectors(clip_texts(request, options), stage, literal=request.literal_prompt)
        seeds = range(request.batch) if request.generator is not None else picture_seeds(request)
        return CLIPGradient(options, ranker.images, texts, self.decoder.images, seeds)

    def of_vectors(self, request: Request) -> Request:
        """A completed request whose vectors a prior makes, as a request of those, which are still to be given: where
        the U-Net reads them in place of texts, each is an image's."""
        own = request.replace(**dict.fromkeys(PRIOR_FIELDS))
        if not self.unet.config.reads_image_embeds:
            return own
        prompt = "" if request.batch == 1 else ("",) * request.batch
        return own.replace(prompt=prompt, negative_prompt=None, num_images_per_prompt=1)

    def guided(self, request: Request) -> bool:
        """Whether negatives are needed, for a network row of their own: none where a model reads the scale itself."""
        return self.guidance(request).guided

    def guidance(self, request: Request) -> Guidance:
        """That of a completed request."""
        return guidance_of(request, self.unet.config)

    def unet_rows(self, images: int) -> int:
        """The most U-Net rows that a graph of so many images has."""
        return graph_rows((BRANCHES - self.unet.config.needs_guidance) * images)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, no graph is captured or replayed, by batches made there: a GPU's ops are launched one by one."""
        kept = self.graphs, self.decoder.graphs
        self.graphs = self.decoder.graphs = None
        try:
            yield
        finally:
            self.graphs, self.decoder.graphs = kept

    def prepare(
        self,
        request: Request,
        *,
        batch_invariant: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Run:
        """All that comes before the first step: prompts encoded, the sampler's table made, all noise drawn.

        batch_invariant: whether to take the run apart, so that each image is computed as if it were alone. generators:
        of the request's seeds, in which state earlier stages of a cascade have left them.
        """
        self.adapters.check(_selection(request), batch_invariant=batch_invariant)
        with spans.span("check weights"):
            changed = self.prepared.refresh()
            if changed:
                logger.info("weights changed: %s", ", ".join(changed))
                self.adapters.renewed(changed)
        gradient = self._gradient(request)
        with self.adapters.conditioned(selection := _selection(request)):
            # Prompts share the encoder's calls, unless each has to be as if it were alone.
            requests = [request.alone(k) for k in range(request.count)] if batch_invariant else [request]
            with spans.span("tokenise"):
                encoded = [self.encode(each) for each in requests]
            with spans.span("noise"):
                run = self._start(request, batch_invariant, generators)
                run.adapters, run.gradient = selection, gradient
                run.embeddings = conditioning.used_embeddings(request, self.text_stages)
            with spans.span("conditions"):
                rows, to = len(run.table), {"dtype": self.dtype, "device": self.device}
                run.controls, run.features = start_controls(request, rows, **to, one_by_one=batch_invariant)  # type: ignore
                scale = float(request.guidance_scale or 0)
                embeds = [self._embeds(each, text) for each, text in zip(requests, encoded, strict=True)]
                if batch_invariant:
                    run.take_apart()
                    embeds = [own for own in embeds for _ in range(request.num_images_per_prompt)]
                    for image, own in zip(run.images, embeds, strict=True):
                        self._condition(image, own, scale)
                    run.embeds = Embeds.join(embeds)
                else:
                    self._condition(run, embeds[0], scale)
            with spans.span("image prompts"):
                pictures = start_pictures(request, self.guided(request), self.device, self.dtype)
                for image in run.images or (run,):
                    image.pictures = per_image(pictures, image.batch)
        return run

    def _embeds(self, request: Request, encoded: Conditioning) -> Embeds:
        hidden, pooled, lengths = encoded.network_rows()  # (R, T, D), (R, P), (R,): all negatives, then all prompts
        if pooled is None or not self.unet.config.needs_added:
            return Embeds(hidden, pooled, lengths=lengths)
        scored = self.unet.config.added_ids == 5
        return Embeds(hidden, pooled, conditioning.size_ids(request, len(pooled), scored=scored, device=self.device))

    def encode(self, request: Request) -> Conditioning:
        """Prompts and negatives as what the U-Net reads, a row for each image."""
        config = self.unet.config
        if config.reads_image_embeds:
            embeds = send(request.image_embeds, self.device, self.dtype)
            negatives = None
            if request.negative_image_embeds is not None:
                negatives = send(request.negative_image_embeds, self.device, self.dtype)
            read = conditioning.of_pictures(embeds, self.guided(request), negatives)
            return read.repeat(request.num_images_per_prompt)
        if config.needs_projection:
            return self._read(request)
        if isinstance(request.image_embeds, PictureRead) and not config.needs_vector:
            embeds = request.image_embeds.embeds(self.dtype, self.device)
            return conditioning.of_pictures(embeds, self.guided(request)).repeat(request.num_images_per_prompt)
        if not self.text_stages and not config.pools_text:
            return Conditioning(torch.zeros(request.batch, 1, 1, dtype=self.dtype, device=self.device))
        pooled_width = config.pooled_width if config.reads_pooled else None
        if config.enlarges_latents and request.guidance_scale == 0 and request.prompt is not None:
            request = request.replace(prompt=("",) * request.count)  # as in diffusers, which then reads no prompt

        def run(key: Hashable, encoder: Callable[..., Any], *inputs: Tensor) -> Any:
            with spans.span("text"):
                return self.run(key, encoder, *inputs)

        encoded = conditioning.encode(
            request,
            self.text_stages,
            width=config.text_width,
            window=self.spec.window,
            pooled_width=pooled_width,
            guided=self.guided(request),
            zero_negative=self.zero_negative,
            dtype=self.dtype,
            device=self.device,
            run=run,
        )
        return encoded.repeat(request.num_images_per_prompt)

    def _read(self, request: Request) -> Conditioning:
        """Of unCLIP's decoder, a row for each image: an encoder's last states and vectors, of no text for negatives."""
        prompts = read_texts(self.text_stages[0], as_list(request.prompt), literal=request.literal_prompt)
        texts, none = prompts.repeat(request.num_images_per_prompt), None
        if not self.guided(request):
            return Conditioning(texts.hidden, texts.vectors, lengths=texts.lengths)
        none = read_texts(self.text_stages[0], [""]).repeat(request.batch)
        return Conditioning(
            texts.hidden, texts.vectors, none.hidden, none.vectors, texts.lengths, negative_lengths=none.lengths
        )

    def table(self, request: Request) -> StepTable:
        """The sampler's table of a completed request."""
        highest = math.inf if request.s_tmax is None else request.s_tmax
        table = schedule.make_table(
            self.schedule,
            request.num_inference_steps,  # type: ignore[arg-type]
            sampler=request.sampler,
            strength=float(request.strength or 0) if request.image is not None else 1.0,
            denoising_start=request.denoising_start,
            denoising_end=request.denoising_end,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            eta=request.eta,
            churn=Churn(request.s_churn, request.s_tmin, highest, request.s_noise),
            reuse=request.reuse,
        )
        return table.without_noise() if request.mask_image is not None and self.spec.fits_pictures else table

    def _start(self, request: Request, apart: bool, generators: Sequence[torch.Generator] | None) -> Run:
        guidance = self.guidance(request)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "one_by_one": apart}
        options["edit_scale"] = self.vae.config.scaling_factor if self._scales_edits else 1.0
        options["generators"], options["prior"] = generators, self.prior
        run = start_run(request, self.table(request), guidance, self.vae, self.spec, **options)
        if run.repainted is not None and self.decoder.mode == "tiled":
            raise InputError("this model's asymmetric VAE decodes what is repainted as a whole, and not in tiles")
        return run

    def _condition(self, run: Run, embeds: Embeds, guidance_scale: float) -> None:
        """Give a run what its steps read of its conditioning: computed once, for all rows of its table."""
        table = run.table
        timesteps = send(torch.from_numpy(table.timesteps), self.device)  # (S,)
        rows = 1  # a step: the network's rows differ only where their conditioning enters the time embedding
        added = scale = labels = None
        text = embeds.prompt_embeds
        more: dict[str, Any] = {}
        if embeds.add_text_embeds is not None and embeds.add_time_ids is not None:
            rows, steps = len(embeds.add_text_embeds), len(table)
            added = AddedConditions(embeds.add_text_embeds.repeat(steps, 1), embeds.add_time_ids.repeat(steps, 1))
        elif self.projection is not None:
            rows, vectors = len(embeds.prompt_embeds), run.vectors
            assert vectors is not None
            assert embeds.add_text_embeds is not None
            text, labels = self.projection(vectors, embeds.add_text_embeds, embeds.prompt_embeds)
            labels = labels.repeat(len(table), 1)
        elif embeds.add_text_embeds is not None and self.unet.config.adds_pooled:
            rows = len(embeds.add_text_embeds)
        elif embeds.add_text_embeds is not None:
            rows = len(embeds.add_text_embeds)
            more["timestep_cond"] = pooled_condition(embeds.add_text_embeds).repeat(len(table), 1)
        elif self.unet.config.pools_text:
            rows = len(embeds.prompt_embeds)
            more["encoder_hidden_states"] = embeds.prompt_embeds
        if self.unet.config.needs_guidance:
            scale = torch.full((len(table) * rows,), guidance_scale, device=self.device)
        if self.unet.config.reads_image_embeds:
            text = text[:, 0]  # (R, D)
            rows = len(text)
            more["image_embeds"] = text.repeat(len(table), 1)
        if self.unet.config.adds_pooled and embeds.add_text_embeds is not None:
            labels = embeds.add_text_embeds.repeat(len(table), 1)
        if run.vectors is not None and self.projection is None:  # of negatives zeros
            rows = len(embeds.prompt_embeds)
            negatives = run.vectors.new_zeros((rows - run.batch, run.vectors.shape[1]))
            labels = torch.cat((negatives, run.vectors)).repeat(len(table), 1)
        elif run.labels is not None:
            rows = run.batch
            labels = run.labels.repeat(len(table))
        timesteps = timesteps.repeat_interleave(rows)
        if self.unet.config.needs_class and labels is None:
            labels = torch.full_like(timesteps, run.noise_level)
        temb = self.unet.time_rows(timesteps, added=added, guidance=scale, class_labels=labels, **more)
        text_kv: tuple[Tensor, ...] = ()
        if self.unet.config.cross_widths:
            text_kv = self.run("text keys and values", self.unet.cross_kv, text)
        run.temb, run.text_kv, run.embeds = temb.unflatten(0, (len(table), rows)), text_kv, embeds
        if embeds.lengths is not None:
            run.text_len = embeds.lengths + (text.shape[1] - embeds.prompt_embeds.shape[1])
        for control in run.controls:
            network = control.network
            temb = network.time_rows(timesteps, added=added if network.needs_added else None)
            control.temb = temb.unflatten(0, (len(table), rows))
            if network.config.cross_widths:
                control.text_kv = network.cross_kv(embeds.prompt_embeds)

    def change(self, batch: Batch, run: Run, change: Change) -> None:
        """Go on as a callback wants."""
        if change.latents is not None:
            batch.go_on_from(run, change.latents)
        scale = 1.0 if self.unet.config.needs_guidance else change.guidance_scale
        guidance = dataclasses.replace(run.guidance, scale=scale, rescale=change.guidance_rescale)
        if self.unet.config.edits and change.image_guidance_scale is not None:
            guidance = dataclasses.replace(guidance, image_scale=change.image_guidance_scale)
        for name in ("pag_scale", "pag_adaptive_scale"):
            if (value := getattr(change, name)) is not None:
                guidance = dataclasses.replace(guidance, **{name: value})
        images = run.images or (run,)
        if change.embeds is not None:
            each = change.embeds.split(len(images)) if run.images else [change.embeds]
            with self.adapters.conditioned(run.adapters):
                for image, embeds in zip(images, each, strict=True):
                    self._condition(image, embeds, change.guidance_scale)
            run.embeds = change.embeds
        if change.embeds is not None or guidance != run.guidance:
            for changed in (run, *run.images):
                changed.guidance = guidance
                changed.branches_kept = ()  # deep features of another text
            batch.recondition(run)

    def new_batch(self, run: Run, max_batch: int) -> Batch:
        """For runs of the size of this one: a batch with room for it, and for `max_batch` images."""
        apart = bool(run.images)
        if self._steps is not None:
            steps = StepsBatch(self._steps, self.backend, together=not apart)
            return BatchInvariant(steps) if apart else steps
        invariant_kernels = self.dtype.itemsize == 2  # float32 on a GPU is PyTorch's own
        eager = run.gradient is not None or not fuses(run.latents) or (apart and not invariant_kernels)
        if eager or not isinstance(self.unet, UNet):
            batch = EagerBatch(self.unet, self.backend, together=not apart)
            return BatchInvariant(batch) if apart else batch
        images = max(run.batch, max_batch)
        # Room for all that are attached: their requests can then join.
        networks = [control.network for control in self.controls.attached.values()]
        networks += [control.network for control in (run.images or (run,))[0].controls]
        buffers = StaticBuffers.empty(
            self.unet.config,
            slots=images,
            rows=self.unet_rows(images),
            height=run.latents.shape[2],
            width=run.latents.shape[3],
            tokens=max(self.spec.window, run.tokens),
            steps=step_capacity(len(run.table)),
            dtype=self.dtype,
            device=self.device,
            controls=list(dict.fromkeys([network for network in networks if isinstance(network, ControlNet)])),
            features=run.features is not None or any(isinstance(network, T2IAdapter) for network in networks),
            pictures=self.image_prompts.capacity(run.picture_tokens),
            reuse=run.reuses,
            averages=run.guidance.averages,
        )
        slots = Slots(self.unet, buffers, self.graphs, batch_invariant=apart)
        return BatchInvariant(slots) if apart else slots

    def threads(self, request: Request, images: int, limit: int) -> int:
        """How many CPU threads a step of so many images has work for, at most `limit`.

        Ops of a small step are over before threads have met: on two cores the default model's image at 32x32 takes as
        long with two as with one, at 64x64 three quarters, at 128x128 half. (`openmp.Contention` sees to how they wait
        where other processes want the cores.) An engine has threads of its own, and little remains for these.
        """
        latents = int(request.height or 0) * int(request.width or 0) / self.vae.config.factor**2
        operations = self._unet_parameters * latents * images
        return max(1, min(limit, int(operations / _OPERATIONS_PER_THREAD)))

    def run(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), on a GPU by a graph when it has run often enough. key: tells apart all but the tensors."""
        return function(*inputs) if self.graphs is None else self.graphs.call(key, function, *inputs)

    def preview(self, latents: Tensor, c_in: float, run: Run | None = None) -> Tensor:
        """As `Decoder.preview`. c_in: the factor that the next step scales the latents by."""
        return self.decoder.preview(latents * c_in, run)

    def decode(
        self, request: Request, run: Run, latents: Tensor, first_bad: Callable[[], int | None]
    ) -> Generator[Any, None, Any]:
        """As `Decoder.decode`."""
        return self.decoder.decode(request, run, latents, first_bad)

    def result(self, request: Request, run: Run, images: Any, timings: Timings, backend: str) -> Result:
        """backend: what ran the steps."""
        drawn = request.generator is None and request.latents is None and request.prior_latents is None
        seeds = picture_seeds(request) if drawn else ()
        steps = request.num_inference_steps
        if request.timesteps is not None or request.sigmas is not None:
            steps = run.table.steps  # as many of the caller's own list as were taken
        request = request.replace(sampler=run.table.sampler, num_inference_steps=steps)
        if isinstance(request.ip_adapter_image, PictureSelection):
            request = request.replace(ip_adapter_image=request.ip_adapter_image.released())
        adapters = "beside" if run.applied else "merged" if run.adapters.own_step else ""
        return Result(images, seeds, timings, backend, self.precision, request, adapters, run.embeddings)

    def release_memory(self) -> None:
        """Free what a failed allocation may have left: the next, smaller request should find room."""
        if self.graphs is not None:
            self.graphs.clear()
            torch.cuda.empty_cache()

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.config.latent_channels

    def with_vectors(self, request: Request) -> tuple[Request, Sequence[torch.Generator] | None]:
        """A completed request with the vectors that a prior makes of its prompts, made in this thread, and the
        generators of its seeds behind what that drew; where no prior has to make any, as it is, and None."""
        if self.prior is None or request.image_embeds is not None:
            return request, None
        own = self.prior.request_of(request)
        vectors, generators = self.prior.make(own, batch_invariant=self.batch_invariant)
        return self.of_vectors(request).replace(**self.prior.fields(vectors, request.batch)), generators

    @torch.no_grad()
    def make(self, request: Request) -> Any:
        """The images of one request, made from end to end in this thread."""
        request, generators = self.with_vectors(self.complete(request))
        run = self.prepare(request, batch_invariant=self.batch_invariant, generators=generators)
        batch = self.new_batch(run, run.batch)
        if not self.adapters.enter(run):
            raise InputError("requests with other adapters are under way")
        try:
            batch.admit(run)
            while not run.done:
                batch.step([run])
            latents = batch.latents(run)
        finally:
            self.adapters.leave(run)
        return finish(self.decode(request, run, latents, batch.release(run)))


def _selection(request: Request) -> Selection:
    """Of a completed request."""
    assert isinstance(request.adapters, Selection)
    return request.adapters
