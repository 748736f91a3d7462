"""A prompt to a picture. The body of `Pipeline.__call__` is the whole way through the house:

prompt -> Conditioning -> (StepTable, noise) -> latents -> image
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastldm import image as images
from fastldm import loading, schedule, text, weights
from fastldm.config import TinyVAEConfig
from fastldm.denoise import Guidance, denoise, draw_step_noise, randn
from fastldm.errors import CheckpointError, InputError, NonFinite, OutOfMemory
from fastldm.models.unet import AddedConditions
from fastldm.models.vae import AutoencoderKL
from fastldm.request import Request, Result, Timings, picture_seeds

logger = logging.getLogger("fastldm")

StepCallback = Callable[["Pipeline", int, float, "dict[str, Any]"], "dict[str, Any] | None"]


class Pipeline:
    """A loaded model, ready to be called. It keeps no state between calls, so several threads may call it at once."""

    backend = "torch"

    def __init__(self, spec: loading.Spec, networks: loading.Networks, name: str) -> None:
        """Most callers want `from_pretrained`, `from_single_file`, `from_diffusers` or `default`."""
        self.name, self.family = name, spec.family
        self.unet, self.vae, self.text_stages = networks.unet, networks.vae, networks.text_stages
        self.schedule = schedule.ScheduleConfig.from_dict(spec.checkpoint.scheduler)
        self.zero_negative = bool(spec.checkpoint.index.get("force_zeros_for_empty_prompt", False))
        parameter = next(self.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    # --- loading

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **where: Any,
    ) -> Pipeline:
        """A pipeline from a diffusers folder, a hub id, a .safetensors file, or "default".

        device: a GPU where there is one, else the CPU. dtype (or torch_dtype): what is fastest there, see
        `choose_dtype`.
        where: variant, revision, cache_dir, local_files_only, allow_pickle and prediction_type, see `loading.describe`.

        Raises CheckpointError for what is not a model that fastldm can run, InputError for a device or dtype there
        is not.
        """
        chosen = loading.choose_device(device)
        spec = loading.describe(path_or_id, **where)
        precision = loading.choose_dtype(dtype or torch_dtype, chosen)

        def fill(module: torch.nn.Module, name: str) -> Any:
            part = spec.checkpoint.components[name]
            state = part.state(to_prepare=True)
            return weights.load_module(module, state, dtype=precision, device=chosen, source=part.source)

        name = "default" if str(path_or_id) == "default" else Path(str(path_or_id)).name
        return cls(spec, loading.load(spec, fill), name)

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **options: Any) -> Pipeline:
        """From one .safetensors file in the original Stability layout; options as in `from_pretrained`."""
        if not Path(path).is_file():
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
        """
        spec = loading.spec_of(weights.describe_diffusers(pipe))
        parts = {name: getattr(pipe, name) for name in spec.checkpoint.components}
        networks = loading.load(spec, lambda module, name: weights.adopt(module, parts[name]), parts)
        return cls(spec, networks, type(pipe).__name__)

    # --- a call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | Request | None = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Result:
        """Make pictures.

        prompt: a text, a list of texts, or a whole `Request`.
        options: the other fields of `Request`, which says what each means.
        callback_on_step_end: called as (pipeline, step, timestep, {"latents": x}) after every step; may return
            {"latents": changed}, and may raise `Cancelled` to stop the call.
        progress: draw a bar on stderr.

        Raises InputError for an argument that cannot be used, OutOfMemory, NonFinite, and whatever the callback raises.
        """
        started = perf_counter()
        request = prompt if isinstance(prompt, Request) else Request.from_options({"prompt": prompt, **options})
        with _out_of_memory_named():
            request = self._complete(request)
            generators, seeds = self._generators(request)
            with _threads_for(request, self):
                conditioning = self._encode(request)
                table = self._table(request)
                network = self._network(request, conditioning, table)
                encoded = perf_counter()
                with _progress(len(table), progress) as advance:
                    on_step, marks = self._observer(table, callback_on_step_end, advance)
                    latents = self._sample(request, table, network, generators, on_step)
                sampled = perf_counter()
                pictures = latents if request.output_type == "latent" else self._decode(latents, request.output_type)
        marks = [encoded, *marks]
        timings = Timings(
            text=encoded - started,
            steps=tuple(after - before for before, after in pairwise(marks)),
            decode=perf_counter() - sampled,
            total=perf_counter() - started,
        )
        request = request.replace(sampler=table.sampler)
        dtype = str(self.dtype).removeprefix("torch.")
        return Result(pictures, seeds, timings, self.backend, dtype, request)

    def _complete(self, request: Request) -> Request:
        """The request with the family's defaults filled in, and checked against this model."""
        if request.prompt is None and request.prompt_embeds is None:
            raise InputError("prompt is None: give a text, a list of texts, or prompt_embeds")
        factor, latents = self.vae.config.factor, request.latents
        size = self.unet.config.sample_size * factor
        height, width = size, size
        if latents is not None:
            if latents.dim() != 4 or tuple(latents.shape[:2]) != (request.batch, self.latent_channels):
                raise InputError(
                    f"latents have shape {tuple(latents.shape)}: expected ({request.batch}, {self.latent_channels}, "
                    f"height / {factor}, width / {factor})"
                )
            if not torch.isfinite(latents).all():
                raise InputError("latents hold NaN or infinity before the first step: give finite start noise")
            height, width = (int(n) * factor for n in latents.shape[2:])
        elif request.image is not None and request.mask_image is None:
            height, width = (max(n - n % factor, factor) for n in images.image_size(request.image))
        height, width = request.height or height, request.width or width
        for name, value in (("height", height), ("width", width)):
            if value % factor:
                near = max(factor, round(value / factor) * factor)
                raise InputError(
                    f"{name} is {value}: expected a multiple of {factor} pixels for this model, such as {near}"
                )
        if latents is not None and (height, width) != tuple(int(n) * factor for n in latents.shape[2:]):
            raise InputError(
                f"latents are for {latents.shape[3] * factor}x{latents.shape[2] * factor} pixels, not {width}x{height}"
            )
        if self.unet.config.in_channels > self.latent_channels and request.mask_image is None:
            raise InputError("this model is for inpainting: give it image and mask_image")
        completed = request.replace(
            height=height,
            width=width,
            num_inference_steps=request.num_inference_steps or self.family.num_inference_steps,
            guidance_scale=self.family.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            sampler=request.sampler or self.family.sampler,
            strength=(1.0 if request.mask_image is not None else 0.8) if request.strength is None else request.strength,
        )
        _check_memory(completed, self)
        return completed

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion."""
        return self.vae.config.latent_channels

    def _guided(self, request: Request) -> bool:
        """Whether there are two network rows a picture; a model that reads the scale itself needs one."""
        return request.guidance_scale > 1 and not self.unet.config.needs_guidance  # type: ignore[operator]

    def _generators(self, request: Request) -> tuple[Any, tuple[int, ...]]:
        """What draws the noise (one generator for the batch, or one a picture), and the seeds to report."""
        given = request.generator
        if given is None:
            seeds = picture_seeds(request)
            return [torch.Generator().manual_seed(seed) for seed in seeds], seeds
        one_each = not isinstance(given, torch.Generator)
        every = list(given) if isinstance(given, (list, tuple)) else [given]
        if not all(isinstance(one, torch.Generator) for one in every) or (one_each and len(every) != request.batch):
            raise InputError(
                f"generator is {given!r}: expected a torch.Generator, or a list of one for each of "
                f"{request.batch} pictures"
            )
        return (every if one_each else given), ()

    def _encode(self, request: Request) -> text.Conditioning:
        guided = self._guided(request)
        if request.prompt_embeds is not None:
            config = self.unet.config
            given = text.given_conditioning(
                request.prompt_embeds,
                request.negative_prompt_embeds,
                request.pooled_prompt_embeds,
                request.negative_pooled_prompt_embeds,
                width=config.cross_attention_dim,
                pooled_width=config.addition_input_dim - 6 * config.addition_time_embed_dim
                if config.needs_added
                else None,
                guided=guided,
                dtype=self.dtype,
                device=self.device,
            )
            return given.repeat(request.num_images_per_prompt)
        prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt or [])
        zero = self.zero_negative and request.negative_prompt is None
        negatives = request.negative_prompt or "" if guided and not zero else None
        encoded = text.encode_prompts(
            self.text_stages,
            prompts,
            negatives,
            clip_skip=request.clip_skip,
            literal=request.literal_prompt,
            zero_negative=guided and zero,
        )
        return encoded.repeat(request.num_images_per_prompt)

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

    def _network(
        self, request: Request, conditioning: text.Conditioning, table: schedule.StepTable
    ) -> Callable[..., Tensor]:
        """The denoiser, (u (R, Cin, h, w), row i, guided) -> (R, C, h, w). What does not change at each step is
        computed here, once.

        Rows of a guided pass are all negatives, then all prompts; an unguided one has the prompts alone.
        """
        batch, config = request.batch, self.unet.config
        hidden, pooled = conditioning.network_rows()  # (R, T, D), (R, P)
        cross_kv = self.unet.cross_kv(hidden)
        prompts_kv = tuple(kv[-batch:] for kv in cross_kv)

        timesteps = torch.from_numpy(table.timesteps).to(self.device)  # (S,)
        rows = 1  # a step: the network's rows differ only where their conditioning enters the time embedding
        added = scale = None
        if config.needs_added and pooled is not None:
            rows, size = pooled.shape[0], (int(request.height or 0), int(request.width or 0))
            sizes = text.size_ids(
                rows * len(table),
                request.original_size or size,
                request.crops_coords_top_left,
                request.target_size or size,
                device=self.device,
            )  # (S * R, 6)
            added = AddedConditions(pooled.repeat(len(table), 1), sizes)
        if config.needs_guidance:
            scale = torch.full((len(table) * rows,), float(request.guidance_scale or 0), device=self.device)
        temb = self.unet.time_rows(timesteps.repeat_interleave(rows), added=added, guidance=scale)
        temb = temb.unflatten(0, (len(table), rows))  # (S, 1 or R, channels)

        def network(u: Tensor, i: int, guided_pass: bool) -> Tensor:
            row = temb[i][-batch:] if not guided_pass else temb[i]
            return self.unet.step(u, row.expand(u.shape[0], -1), cross_kv if guided_pass else prompts_kv)

        return network

    def _sample(
        self,
        request: Request,
        table: schedule.StepTable,
        network: Callable[..., Tensor],
        generators: Any,
        on_step: Callable[[int, float, Tensor], Tensor | None],
    ) -> Tensor:
        """Latents (B, C, h, w) in float32: draws all noise in diffusers' order, then runs the loop."""
        height, width = int(request.height or 0), int(request.width or 0)
        factor = self.vae.config.factor
        shape = (request.batch, self.latent_channels, height // factor, width // factor)
        # Noise of a seed is float32 on every device and in every precision; a caller's generator draws in the
        # model's, as in diffusers.
        noise_dtype = torch.float32 if request.generator is None else self.dtype

        def draw() -> Tensor:
            return randn(shape, generators, noise_dtype, self.device).float()  # (B, C, h, w)

        # Inpainting at full strength starts from noise alone, so that nothing of what is repainted shines through.
        from_noise = request.mask_image is not None and request.strength == 1
        init = mask = extra = None
        for_inpainting = self.unet.config.in_channels > self.latent_channels
        if request.image is not None:
            picture = self._picture(request, images.load_image(request.image, (height, width)), "image")
            if not (for_inpainting and from_noise):
                init = self._encode_picture(picture, draw)
        noise = draw() if request.latents is None else request.latents.to(self.device, torch.float32)
        if request.mask_image is not None:
            hole = self._picture(request, images.load_mask(request.mask_image, (height, width)), "mask_image")
            mask = torch.nn.functional.interpolate(hole, shape[2:])  # (B, 1, h, w)
            if for_inpainting:
                masked = self._encode_picture(picture * (hole < 0.5), draw)
                extra = torch.cat([mask, masked], dim=1)  # (B, 1 + C, h, w)
            elif request.generator is not None:
                draw()  # diffusers encodes the masked picture for 4-channel models too: keep its generator in step
        step_noise = draw_step_noise(table, shape, generators, noise_dtype, self.device)
        r, s = table.start
        x = table.init_noise_sigma * noise if init is None or from_noise else r * init + s * noise
        scale = float(request.guidance_scale or 0) if self._guided(request) else 1.0
        return denoise(
            network,
            table,
            x,
            step_noise,
            Guidance(scale, request.guidance_rescale, *request.guidance_interval),
            mask=None if for_inpainting else mask,
            init=init,
            init_noise=noise,
            extra_channels=extra,
            dtype=self.dtype,
            on_step=on_step,
        )

    def _picture(self, request: Request, picture: Tensor, name: str) -> Tensor:
        """One picture for all, or one each: (1 or B, C, H, W) -> (B, C, H, W) on the device."""
        if picture.shape[0] not in (1, request.batch):
            raise InputError(
                f"{name} holds {picture.shape[0]} pictures for a batch of {request.batch}: give one, or one each"
            )
        return picture.expand(request.batch, -1, -1, -1).to(self.device)

    def _encode_picture(self, picture: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w) in float32, drawn from the posterior of a KL
        autoencoder."""
        encoded = self.vae.encode(picture.to(self.dtype)).float()
        if isinstance(self.vae, AutoencoderKL):
            mean, log_variance = encoded.chunk(2, dim=1)
            encoded = mean + (log_variance.clamp(-30, 20) / 2).exp() * draw()
        if not bool(torch.isfinite(encoded).all()):
            raise NonFinite(
                f"encoding the picture in {self.dtype} gave NaN or infinity: load the model in float32 or bfloat16"
            )
        return (encoded - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents (B, C, h, w) to pictures as `output_type` asks."""
        z = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        decoded = self.vae.decode(z.to(self.dtype))  # (B, 3, H, W)
        if not bool(torch.isfinite(decoded).all()) and self.dtype != torch.float32:
            logger.warning("decoding in %s overflowed: decoding once more in float32", self.dtype)
            decoded = copy.deepcopy(self.vae).float().decode(z)  # a copy, since other threads may be using this one
        if not bool(torch.isfinite(decoded).all()):
            raise NonFinite(
                "decoding the latents gave NaN or infinity, in float32 too: the VAE's weights may be damaged"
            )
        return images.to_output(decoded, output_type)

    def _observer(
        self, table: schedule.StepTable, callback: StepCallback | None, advance: Callable[[], object]
    ) -> tuple[Callable[[int, float, Tensor], Tensor | None], list[float]]:
        """What the loop calls after each row, and the list of moments at which it did."""
        marks: list[float] = []

        def on_step(row: int, timestep: float, x: Tensor) -> Tensor | None:
            changed = None
            if callback is not None:
                returned = callback(self, row, timestep, {"latents": x})
                changed = returned.get("latents") if returned else None
                if changed is not None and changed.shape != x.shape:
                    raise InputError(f"the callback returned latents {tuple(changed.shape)}: expected {tuple(x.shape)}")
            advance()
            marks.append(perf_counter())
            return changed

        return on_step, marks


def _call_signature() -> inspect.Signature:
    """What `help(pipe.__call__)` and editors show: the call's own arguments, and every field of Request."""
    own = inspect.signature(Pipeline.__call__, eval_str=False)
    fields = inspect.signature(Request).parameters.values()
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in fields if p.name not in own.parameters]
    return own.replace(parameters=[*kept, *added])


Pipeline.__call__.__signature__ = _call_signature()  # type: ignore[attr-defined]


@contextmanager
def _progress(rows: int, shown: bool) -> Iterator[Callable[[], object]]:
    """What to call after each row: draws a bar on stderr if `shown`."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=rows, unit="step", leave=False) as bar:
        yield bar.update


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free for one more thing, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):
        return None


def _check_memory(request: Request, pipe: Pipeline) -> None:
    """Refuses a size that cannot fit before any work: the decoder's last level alone holds two tensors at full
    resolution."""
    config = pipe.vae.config
    channels = config.decoder_width if isinstance(config, TinyVAEConfig) else config.channels[0]
    pixels = request.batch * int(request.height or 0) * int(request.width or 0)
    needed, free = 2 * channels * pixels * pipe.dtype.itemsize, _free_bytes(pipe.device)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"{request.batch} pictures of {request.width}x{request.height} need more than {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free on {pipe.device}: ask for a smaller size or fewer pictures"
        )


_WORK_PER_THREAD = 8e9  # multiply-adds of a step, about


@contextmanager
def _threads_for(request: Request, pipe: Pipeline) -> Iterator[None]:
    """No more CPU threads than a step has work for; torch's own number again afterwards.

    The ops of a small step are over before threads have met. The default model's eight steps took 0.29 s with one
    thread on two cores and 0.38 s with two; on a busy machine, where every op waits for the thread that is not running
    just then, a picture took 1.3 and 18.6 s.
    """
    before = torch.get_num_threads()
    cells = int(request.height or 0) * int(request.width or 0) / pipe.vae.config.factor**2
    work = sum(p.numel() for p in pipe.unet.parameters()) * cells * request.batch
    if pipe.device.type != "cpu" or work >= before * _WORK_PER_THREAD:
        yield
        return
    torch.set_num_threads(max(1, int(work / _WORK_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _out_of_memory_named() -> Iterator[None]:
    """Turns an allocator's failure on any device into OutOfMemory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_out_of_memory_text(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU's allocator says, in no type of its own
            raise
        raise OutOfMemory(_out_of_memory_text(error)) from error


def _out_of_memory_text(error: BaseException) -> str:
    return f"memory ran out ({str(error).splitlines()[0]}): ask for a smaller size or fewer pictures"
