"""A prompt to a picture, and each stage of the way:

prompt -> Conditioning -> (StepTable, noise) -> latents -> image

A call submits a request to the pipeline's session (session.py), whose worker asks for the stages one by one: `_begin`
is all before the first step, a `denoise.Batch` takes the steps, `_finish` is all after the last.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import os
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastldm import checks
from fastldm import image as images
from fastldm.conditioning import encode as conditioning
from fastldm.conditioning.text import Conditioning
from fastldm.device import Mark, send, to_host
from fastldm.errors import CheckpointError, InputError, NonFinite
from fastldm.kernels.step import fuses
from fastldm.loading import adoption
from fastldm.loading import spec as loading
from fastldm.loading.mapped import Mapped
from fastldm.model import export, open_model
from fastldm.models.unet import AddedConditions, UNet
from fastldm.models.vae import Decode, Pieces, decode_pieces, finish
from fastldm.planning import memory
from fastldm.reading import check_path
from fastldm.request import MAX_IMAGES, MAX_SIDE, Request, Result, Timings, picture_seeds
from fastldm.runtime.complete import complete, start_latents
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
from fastldm.runtime.graph import CUDA, WARM_UPS, Graphs
from fastldm.runtime.slots import Slots, StaticBuffers, graph_rows, step_capacity
from fastldm.runtime.start import start_work
from fastldm.samplers import table as schedule
from fastldm.serving.callback import Calls, CallState, Change, Steered, StepCallback, tensor_names
from fastldm.serving.session import Progress, Session

logger = logging.getLogger("fastldm")

Prompt = str | Sequence[str] | Request | None


class Pipeline(Steered):
    """A loaded model, ready to be called, by several threads at once too."""

    def __init__(self, spec: loading.Spec, networks: loading.Networks, name: str, mapped: Mapped | None = None) -> None:
        """Most callers want `from_pretrained`, `from_single_file`, `from_diffusers` or `default`. mapped: files that
        the networks' weights lie in."""
        self.name, self.family, self._spec = name, spec.family, spec
        self.unet, self.vae, self.text_stages = networks.unet, networks.vae, networks.text_stages
        self.schedule = spec.schedule
        self.zero_negative = bool(spec.checkpoint.index.get("force_zeros_for_empty_prompt", False))
        self.device, self.dtype, self.backend = networks.device, networks.dtype, networks.backend
        self.precision = networks.precision or str(self.dtype).removeprefix("torch.")
        """What the networks compute in: "float32", "float16" or "bfloat16"."""
        self._prepared, self._latents = networks.prepared, networks.latents
        self._parameters = sum(p.numel() for p in self.unet.parameters()) if isinstance(self.unet, UNet) else 0
        self._mapped = mapped or Mapped()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._graphs: Graphs | None = None
        if self.device.type == "cuda" and self.backend == "torch":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._graphs = Graphs(CUDA(self.device), budget=int(_GRAPHS_SHARE * total))
        self._vae_decode: Decode = "whole"
        self._calls = Calls()

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        **where: Any,
    ) -> Pipeline:
        """A pipeline from a diffusers folder, a hub id, a .safetensors file, a bundle that `fastldm export` wrote, or
        "default".

        device: a GPU where there is one, else the CPU. dtype (or torch_dtype): what is fastest there, see
        `choose_dtype`; of a bundle, ONNX Runtime and TensorRT compute in what it was exported in.
        backend: what runs the networks: "torch", or for a bundle "onnxruntime", "openvino" or "tensorrt". "auto" is
        PyTorch, and for a bundle what `fastldm verify` found to be fastest on this machine, see `model.choose`.
        where: variant, revision, cache_dir, local_files_only, allow_pickle and prediction_type, see `loading.describe`.

        Raises CheckpointError for what is not a model that fastldm can run, InputError for a device or dtype there
        is not, BundleError for a bundle that is damaged, EngineError for a backend that is not installed or cannot
        run it.
        """
        if torch_dtype is not None:
            checks.instance("torch_dtype", torch_dtype, (str, torch.dtype), "float32, float16 or bfloat16")
        if None not in (dtype, torch_dtype):
            raise InputError("dtype and torch_dtype were both given: give one of them")
        return cls(*open_model(path_or_id, device=device, dtype=dtype or torch_dtype, backend=backend, **where))

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **options: Any) -> Pipeline:
        """From one .safetensors file in the original Stability layout; options as in `from_pretrained`."""
        if not check_path(path, "path").is_file():
            raise CheckpointError(f"there is no file {str(path)!r}; a folder or a hub id is for from_pretrained")
        return cls.from_pretrained(path, **options)

    @classmethod
    def default(cls, **options: Any) -> Pipeline:
        """The small model of everyday things in emoji style that ships inside; options as in `from_pretrained`."""
        return cls.from_pretrained("default", **options)

    @classmethod
    def from_diffusers(cls, pipe: Any) -> Pipeline:
        """Adopts a loaded diffusers pipeline: Stable Diffusion 1, 2 or XL, for text, image to image or inpainting.

        The weights are shared, not copied: what changes in one changes in the other. Device and dtype stay as they are.
        Compiled and fused networks are taken as what they are made of, and tiled or sliced decoding goes on.

        Raises InputError for what is no diffusers pipeline, and CheckpointError for one whose pictures are made by more
        than its class, its weights and its configs: by FreeU, hooks, adapters, replaced methods, changed layers.
        """
        spec = loading.spec_of(adoption.describe_diffusers(pipe))
        parts = {name: getattr(pipe, name) for name in spec.checkpoint.components}
        networks = loading.load(spec, lambda module, name: adoption.adopt(module, parts[name]), parts)
        adopted = cls(spec, networks, type(pipe).__name__)
        if pipe.vae.use_tiling:
            adopted.enable_vae_tiling()
        elif pipe.vae.use_slicing:
            adopted.enable_vae_slicing()
        return adopted

    # --- a call

    @overload
    def __call__(self, prompt: Prompt = None, *, return_dict: Literal[False], **options: Any) -> tuple[Any, ...]: ...

    @overload
    def __call__(self, prompt: Prompt = None, *, return_dict: Literal[True] = True, **options: Any) -> Result: ...

    def __call__(
        self,
        prompt: Prompt = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Result | tuple[Any, ...]:
        """Make pictures. Calls from several threads share the model: those of one size take their steps together.

        prompt: a text, a list of texts, or a whole `Request`.
        options: the other fields of `Request`, which says what each means; those of a whole one are replaced.
        callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step, in this thread; may return
            a dict of changed ones, may set `_guidance_scale`, `_guidance_rescale` or `_interrupt` of the pipeline as
            with diffusers, see callback.py, and may raise `Cancelled` to stop the call.
        callback_on_step_end_tensor_inputs: which tensors it is given: latents (B, C, h, w) float32, prompt_embeds
            (B or, guided, 2B, T, D), negative_prompt_embeds, and with SDXL add_text_embeds and add_time_ids.
        progress: draw a bar on stderr.
        return_dict: False gives what diffusers' pipelines give then, a tuple whose first item is the images.

        Raises InputError for an argument that cannot be used, OutOfMemory, NonFinite, and whatever the callback raises.
        """
        request = Request.of(prompt, options)
        checks.flag("progress", progress), checks.flag("return_dict", return_dict)
        callback, xl = callback_on_step_end, self.unet.config.needs_added
        names = () if callback is None else tensor_names(callback, callback_on_step_end_tensor_inputs, xl)
        generation = self.session._submit(request, answered=callback is not None)
        try:
            with self._calls.open(generation):
                if progress or callback is not None:
                    call = CallState(generation, self.unet.config.needs_guidance)
                    with _progress(progress) as advance:
                        for step in generation.progress():
                            if callback is not None:
                                with self._calls.entered(call):
                                    generation._answer(call.call(self, callback, names, step))
                            advance(step)
                result = generation.result()
        except BaseException:  # Ctrl-C too
            generation.cancel()
            raise
        if return_dict:
            return result
        return (result.images,) if xl else (result.images, None)  # diffusers says whether it found something unsafe

    @property
    def session(self) -> Session:
        """What calls of this pipeline are submitted to; `Session(pipe, ...)` makes one with other limits."""
        with self._lock:
            if self._session is None:
                self._session = Session(self)
            return self._session

    def warmup(
        self, sizes: Sequence[tuple[int, int]] | None = None, batches: Sequence[int] = (1,), **options: Any
    ) -> None:
        """Do before the first request what else it would wait for: kernels and plans, and on a GPU the graphs.

        sizes: (width, height) in pixels, the model's own when None. batches: pictures a request. options: other fields
        of Request, such as guidance_scale=1. The largest goes first: what it takes of memory serves the others.
        """
        height, width = (size * self.vae.config.factor for size in self.unet.config.sample_size)
        places = [(width, height)] if sizes is None else checks.listed("sizes", sizes, 1000, "sizes (width, height)")
        places = [checks.pair(f"sizes[{k}]", one, 1, MAX_SIDE, "(width, height)") for k, one in enumerate(places)]
        counts = checks.listed("batches", batches, 1000, "numbers of pictures")
        counts = [checks.whole(f"batches[{k}]", one, 1, MAX_IMAGES, "pictures") for k, one in enumerate(counts)]
        asked = [(width, height, batch) for width, height in places for batch in counts]
        # A step is captured after two; so are text and decoder, which run once a request.
        times = WARM_UPS + 1 if self._graphs is not None else 1
        for width, height, batch in sorted(asked, key=lambda one: -one[0] * one[1] * one[2]):
            given = {"prompt": "a prompt", "num_inference_steps": times, "output_type": "pt", "seed": 0, **options}
            for _ in range(times):
                self(**given, width=width, height=height, num_images_per_prompt=batch)

    def weights_changed(self) -> list[str]:
        """Bring the model up to date with weights that were replaced, or changed where something is made of them.
        Returns the names of what was not.

        Each request does so before it begins; a call of this makes it so for those under way, from their next step on.
        Raises InputError for a parameter of another shape, dtype or device.
        """
        return self.session.call(self._prepared.weights_changed)

    def export(self, out: str | os.PathLike[str], **options: Any) -> Path:
        """Write the model as a bundle, with the weights that it has now: adopted, merged or edited ones too. Returns
        the bundle's folder.

        options: dtype ("float32" or "float16"), opset, split and fused_ops, see `fastldm.export.writing.export`, whose
        errors these are. InputError for a pipeline that itself runs a bundle.
        """
        if self.backend != "torch":
            raise InputError(f"this pipeline runs a bundle on {self.backend}, which has no weights to export: copy it")
        self.weights_changed()
        modules: dict[str, Any] = {"unet": self.unet, "vae": self.vae}
        names = [name for name in ("text_encoder", "text_encoder_2") if name in self._spec.checkpoint.components]
        modules |= {name: stage.model for name, stage in zip(names, self.text_stages, strict=True)}
        return export(self._spec, modules, Path(out).expanduser(), name=self.name, **options)

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in tiles: less memory for a difference that is not visible, see `decode_pieces`.

        InputError for a bundle: an exported decoder does not give the statistics that tiles share.
        """
        if self.backend != "torch":
            raise InputError(f"{self.backend} cannot decode in tiles: decode sliced or whole, or run on backend torch")
        self._vae_decode = "tiled"

    def enable_vae_slicing(self) -> None:
        """Decode a batch picture by picture: less memory, the same pictures."""
        self._vae_decode = "sliced"

    def disable_vae_tiling(self) -> None:
        """Decode in one go, as by default."""
        self._vae_decode = "whole"

    disable_vae_slicing = disable_vae_tiling

    # --- what a session's worker asks of it: everything from here to `_result` runs on the worker's thread

    def _begin(self, request: Request) -> Run:
        """prompt -> Conditioning -> (StepTable, noise): all that comes before the first step."""
        changed = self._prepared.refresh()
        if changed:
            logger.info("weights changed: %s", ", ".join(changed))
        encoded = self._encode(request)
        table = self._table(request)
        return Run(self._work(request, table), self._conditions(request, encoded, table))

    def _new_batch(self, run: Run, max_batch: int) -> Batch:
        """For runs of the size of this one: what has room for it, and for `max_batch` pictures."""
        if not isinstance(self.unet, UNet) or not fuses(run.work.x):
            return EagerBatch(self.unet, self.backend)
        pictures = max(run.batch, max_batch)
        buffers = StaticBuffers.empty(
            self.unet.config,
            slots=pictures,
            rows=self._rows(pictures),
            height=run.work.x.shape[2],
            width=run.work.x.shape[3],
            tokens=max(self.text_stages[0].window, *(kv.shape[1] for kv in run.conditions.text)),
            steps=step_capacity(len(run.work.table)),
            dtype=self.dtype,
            device=self.device,
        )
        return Slots(self.unet, buffers, self._graphs)

    def _rows(self, pictures: int) -> int:
        """The most U-Net rows that a graph of so many pictures has."""
        return graph_rows(pictures if self.unet.config.needs_guidance else 2 * pictures)

    def _run(self, key: Hashable, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """work(*inputs), on a GPU by a graph when it has run often enough. key: says all but the tensors."""
        return work(*inputs) if self._graphs is None else self._graphs.call(key, work, *inputs)

    def _finish(
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

    def _result(
        self, request: Request, table: schedule.StepTable, images: Any, timings: Timings, backend: str
    ) -> Result:
        seeds = picture_seeds(request) if request.generator is None and request.latents is None else ()
        steps = request.num_inference_steps
        if request.timesteps is not None or request.sigmas is not None:
            steps = table.steps  # of a caller's own list, what ran
        ran = request.replace(sampler=table.sampler, num_inference_steps=steps)
        return Result(images, seeds, timings, backend, self.precision, ran)

    def _preview(self, latents: Tensor, c_in: float) -> Tensor:
        """What latents (B, C, h, w) between two steps look like: small pictures (B, H, W, 3) uint8, on the host when
        the device has come so far. They are decoded from at most 16 latents a side, a sixteenth of the work at 512x512
        pixels and less beyond. c_in: what the next step scales them by."""
        longest = max(latents.shape[2:])
        if longest > _PREVIEW_LATENTS:
            size = [max(1, round(n * _PREVIEW_LATENTS / longest)) for n in latents.shape[2:]]
            latents = torch.nn.functional.interpolate(latents, size, mode="area")
        return to_host(images.to_pixels(finish(self._decoding(latents * c_in)), "pil"))

    def _release_memory(self) -> None:
        """Give back what a failed allocation may have left: the next, smaller request should find room."""
        if self._graphs is not None:
            self._graphs.clear()
            torch.cuda.empty_cache()

    def _threads(self, request: Request, pictures: int, most: int) -> int:
        """How many CPU threads a step of so many pictures has work for.

        Ops of a small step are over before threads have met: on two cores the default model's picture at 32x32 takes as
        long with two as with one, at 64x64 three quarters, at 128x128 half. (Where others want the cores too, threads
        wait for each other: a caller that knows so sets torch.set_num_threads(1).) An engine has threads of its own,
        and little is left to do.
        """
        cells = int(request.height or 0) * int(request.width or 0) / self.vae.config.factor**2
        work = self._parameters * cells * pictures
        return max(1, min(most, int(work / _WORK_PER_THREAD)))

    def _complete(self, request: Request) -> Request:
        """The request with the family's defaults filled in, and checked against this model."""
        self._mapped.check()
        completed = complete(request, self.unet.config, self.vae.config, self.family, self._latents)
        self._check_memory(completed)
        return completed

    def _check_memory(self, request: Request) -> None:
        """OutOfMemory for what cannot fit, before any work."""
        free = memory.free_bytes(self.device)
        if free is None:
            return
        width, height, batch = int(request.width or 0), int(request.height or 0), request.batch
        pictures = max(batch, self.session.max_batch) if self.device.type == "cuda" else batch
        workload = memory.Workload.of_pipeline(
            self,
            width=width,
            height=height,
            batch=batch,
            guided=self._guided(request),
            steps=step_capacity(int(request.num_inference_steps or 1)),
            tokens=self.text_stages[0].window,
            decode=self._vae_decode,
            encode=request.image is not None and start_latents(request, self.latent_channels) is None,
            slots=pictures,
            rows=self._rows(pictures),
        )
        memory.check(
            workload, free + self.session.held(height, width), f"{batch} picture{'s' * (batch > 1)} of {width}x{height}"
        )

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.config.latent_channels

    def _guided(self, request: Request) -> bool:
        """Whether there are two network rows a picture; a model that reads the scale itself needs one."""
        return request.guidance_scale > 1 and not self.unet.config.needs_guidance  # type: ignore[operator]

    def _encode(self, request: Request) -> Conditioning:
        config = self.unet.config
        encoded = conditioning.encode(
            request,
            self.text_stages,
            width=config.cross_attention_dim,
            pooled_width=self._pooled_width,
            guided=self._guided(request),
            zero_negative=self.zero_negative,
            dtype=self.dtype,
            device=self.device,
            run=self._run,
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
        text_kv = self._run("text keys and values", self.unet.cross_kv, embeds.prompt_embeds)
        return Conditions(temb.unflatten(0, (len(table), rows)), text_kv, embeds)

    def _change(self, batch: Batch, run: Run, change: Change) -> None:
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

    def _work(self, request: Request, table: schedule.StepTable) -> Work:
        scale = float(request.guidance_scale or 0) if self._guided(request) else 1.0
        guidance = Guidance(scale, request.guidance_rescale, *request.guidance_interval)
        in_channels = self.unet.config.in_channels
        return start_work(request, table, guidance, self.vae, in_channels, dtype=self.dtype, device=self.device)

    def _decoding(self, latents: Tensor) -> Pieces:
        """Latents (B, C, h, w) as the U-Net has them to pictures (B, 3, H, W), about -1..1, in pieces."""
        z = self._unscaled(latents).to(self.dtype)
        if self._graphs is not None and self._vae_decode == "whole":
            yield
            return self._run("decode", self.vae.decode, z)  # one piece: about as long as a step
        return (yield from decode_pieces(self.vae, z, self._vae_decode))

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def _decoded_in_float32(self, latents: Tensor, kind: str) -> Tensor:
        """The pixels of a picture whose decoding was not finite; NonFinite where float32 does not help. Waits."""
        decoded = None
        if self.dtype != torch.float32 and isinstance(self.vae, torch.nn.Module):
            logger.warning("decoding in %s overflowed: decoding once more in float32", self.dtype)
            vae = copy.deepcopy(self.vae).float()
            decoded = finish(decode_pieces(vae, self._unscaled(latents).float(), self._vae_decode))
        if decoded is None or not bool(decoded.isfinite().all()):
            how = f"on {self.backend}" if self.backend != "torch" else "in float32 too"
            raise NonFinite(f"decoding the latents gave NaN or infinity, {how}: the VAE's weights may be damaged")
        pixels = images.to_pixels(decoded, kind)
        return pixels if kind == "pt" else pixels.cpu()


def _call_signature() -> inspect.Signature:
    """What `help(pipe.__call__)` and editors show: the call's own arguments, and every field of Request."""
    own = inspect.signature(Pipeline.__call__, eval_str=False)
    fields = inspect.signature(Request).parameters.values()
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in fields if p.name not in own.parameters]
    return own.replace(parameters=[*kept, *added])


Pipeline.__call__.__signature__ = _call_signature()  # type: ignore[attr-defined]


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[Progress], object]]:
    """What to call after each step: draws a bar on stderr if `shown`."""
    if not shown:
        yield lambda step: None
        return
    from tqdm import tqdm

    with tqdm(unit="step", leave=False) as bar:

        def advance(step: Progress) -> None:
            bar.total = step.steps
            bar.update()

        yield advance


_GRAPHS_SHARE = 0.25  # of a GPU's memory, that graphs may take
_PREVIEW_LATENTS = 16
_WORK_PER_THREAD = 1e9  # multiply-adds of a step, about
