"""Requests and results.

`Request` defines the names, defaults and checks of all arguments of a generation: `Pipeline.__call__` and the command
are built from it. Names are diffusers'.

Over 500 lines, for the fields of a request and their checks are read together.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastldm import checks
from fastldm.checks import MAX_GUIDANCE, MAX_IMAGES, MAX_PROMPT_LENGTH, MAX_SIDE, MAX_STEPS, MAX_TEXT
from fastldm.errors import InputError
from fastldm.gradients import MAX_SCALE, CLIPGuidance, GuidanceFunction, guidance_function

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
MAX_ADAPTERS = 100  # of a request
MAX_WEIGHT = 1000.0  # of an adapter
MAX_CONTROLS = 100  # of a request
MAX_LAYERS = 1000  # that a request names
MAX_CLASS = 2**20

UNSUPPORTED = {
    "callback": ": use callback_on_step_end",
    "callback_steps": ": use callback_on_step_end",
    "masked_image_latents": ": give image and mask_image",
    "original_inference_steps": "",
    "adaptive_projected_guidance_rescale": ": it is apg_rescale",
    "adaptive_projected_guidance_momentum": ": it is apg_momentum",
    "adaptive_projected_guidance_norm_dim": ": apg_rescale is of all of a picture",
    "use_clipped_model_output": ": a sampler clips as its checkpoint says",
    "text_model_output": ": give prompt",
    "text_attention_mask": ": give prompt",
    "clean_caption": ": prompts are read as they are, but for IF's in lower case",
    "clip_prompt": ": give guidance_fn=CLIPGuidance(scale, prompt)",
    "num_cutouts": ": give guidance_fn=CLIPGuidance(scale, num_cutouts=4)",
    "seg_scale": ", for it blurs queries in each step: pag_scale is its relative that only selects",
    "seg_blur_sigma": ": see pag_scale",
    "seg_applied_layers": ": see pag_applied_layers",
}
"""Arguments of diffusers' pipelines that fastldm does not support, and alternatives. None is accepted."""

UPSCALERS = (
    *("Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)", "Latent (nearest)"),
    *("Latent (nearest-exact)", "Nearest", "Bilinear", "Bicubic", "Lanczos"),
)
"""Of latents, and of pixels; AUTOMATIC1111's names."""

UPSCALER_FIELDS = (
    *("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "noise_level"),
    *("strength", "sampler", "timesteps", "sigmas", "eta"),
)
"""What `upscaler_options` may hold."""
MAX_UPSCALERS = 10

PER_PROMPT = tuple(
    f"{sign}{name}"
    for sign in ("", "negative_")
    for name in ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")
)
"""Fields that may hold one value for each prompt."""


@dataclass(frozen=True)
class Request:
    """A request for B = len(prompt) * num_images_per_prompt images. `None` means the model family's default.

    All checks that need no model are made here. `Pipeline` fills in the family's defaults and makes the other checks.
    """

    prompt: str | Sequence[str] | None = None
    """What to draw: a text, or a list of texts. `(word:1.3)` and `[word]` weight words, BREAK starts a new window of
    the text encoder."""
    negative_prompt: str | Sequence[str] | None = None
    """What to avoid; one text for all or one per prompt. Used if guidance_scale > 1."""
    height: int | None = None
    """Image height in pixels, a multiple of the VAE's factor (8 for Stable Diffusion)."""
    width: int | None = None
    """Image width in pixels, likewise."""
    num_inference_steps: int | None = None
    """Sampler steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance: 1 or less is off, with one U-Net row per image instead of two. For samplers with CFG++
    from 0 to about 1, by default 0.6."""
    image_guidance_scale: float | None = None
    """How much InstructPix2Pix keeps of `image`; None is 1.5, and below 1 there is no guidance at all."""
    pag_scale: float | None = None
    """Perturbed-attention guidance (arXiv:2403.17377): how far from a branch in which the pixels of some layers attend
    to themselves alone; with guidance_scale or without. None and 0 are off, but of an adopted PAG pipeline None is
    3."""
    pag_adaptive_scale: float = 0.0
    """Above 0, pag_scale is so much less for each training timestep below 1000, and at least 0."""
    pag_applied_layers: str | Sequence[str] | None = None
    """The self-attentions that pag_scale perturbs, as of diffusers' PAG pipelines: regular expressions that are looked
    for in names like down_blocks.2.attentions.0.transformer_blocks.0.attn1. None is "mid"."""
    apg_rescale: float | None = None
    """Adaptive projected guidance (arXiv:2410.02416): the longest that the network's output for the prompt differs
    from that for the negative prompt, before guidance_scale multiplies it; 0 is any length. diffusers'
    `adaptive_projected_guidance_rescale`. On where this, apg_eta or apg_momentum is given; by default then 15, as
    diffusers'."""
    apg_eta: float | None = None
    """What remains of that difference along the prompt's own output, from which saturation comes: 0 none, as in the
    paper, 1 all, the default beside apg_rescale."""
    apg_momentum: float | None = None
    """How much of a step's difference is added to the next one's, negative as in the paper (-0.5), which turns guidance
    away from where it went before; 0, the default beside the other two, is none. diffusers'
    `adaptive_projected_guidance_momentum`."""
    use_original_formulation: bool = False
    """Whether guidance_scale is how far guidance goes beyond the prompt's own output, from 0, as papers have it: 6.5 is
    then what is 7.5 else, and what projected guidance shortens is added to the prompt's output, not the negative
    prompt's. The name is that of diffusers' guiders."""
    guidance_fn: Any = None
    """Guidance by gradient, beside any other: a function (latents, t) of what the network reads at a step, (B, C, h, w)
    and (B,) in float32, that returns the gradient of its log-likelihood with respect to the latents, of their shape; or
    a `ClassifierGuidance` or `CLIPGuidance`. See gradients.py. It runs between steps in the thread that drives the
    device, while other requests wait."""
    clip_guidance_scale: float | None = None
    """Short for guidance_fn=CLIPGuidance(scale): how far each step goes up the gradient of a CLIP model's agreement of
    picture and prompt; diffusers' community pipeline has 100. 0 and None are off."""
    guidance_rescale: float = 0.0
    """Rescales the guided prediction's standard deviation to the conditional one's, 0 (off) to 1 (arXiv:2305.08891,
    section 3.4)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these fractions of the steps (arXiv:2404.07724), by whatever guidance there is."""
    sampler: str | None = None
    """A sampler's name, such as "dpm++ 2m karras", "euler a" or a diffusers class name."""
    timesteps: Sequence[float] | None = None
    """Custom training timesteps, descending, instead of num_inference_steps; fractional, negative and beyond those of
    training where the sampler has noise levels there, see `make_table`."""
    sigmas: Sequence[float] | None = None
    """Custom noise levels, descending, instead of num_inference_steps."""
    eta: float = 0.0
    """Fraction of fresh noise of DDIM and TCD, 0 to 1."""
    s_churn: float = 0.0
    """Noise that the sampler euler adds and removes over all steps (arXiv:2206.00364, algorithm 2, as diffusers)."""
    s_tmin: float = 0.0
    """The lowest noise level at which it does."""
    s_tmax: float | None = None
    """The highest one; None: any."""
    s_noise: float = 1.0
    """Factor of that noise."""
    noise_sampler_seed: int | Sequence[int] | None = None
    """Of the sampler dpm++ sde: a seed for the Brownian motion that diffusers' DPMSolverSDEScheduler takes its noise
    from (needs torchsde), or one for each image. None: the request's seed or generator draws that noise."""
    reuse: int = 1
    """Of every so many calls of the U-Net, the first computes all of it and the rest only its outermost level, with the
    deep features of that one: faster, and not quite the same image (DeepCache, arXiv:2312.00858). 1: each computes
    all."""
    num_images_per_prompt: int = 1
    """Images per prompt."""
    candidates: int | None = None
    """Sample so many images per prompt, and return the `keep` of them that show best what the prompt says, best first,
    as a CLIP model's cosine of picture and text says (docs/ranking.md)."""
    keep: int = 1
    """How many of the candidates are returned, per prompt; in place of num_images_per_prompt."""
    seed: int | Sequence[int] | None = None
    """Image k has a CPU generator with seed + k, on every device; a list has one seed per image. None selects a random
    seed."""
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    """Instead of seed: one generator for the full batch, or a list with one per image, both as in diffusers."""
    latents: torch.Tensor | None = None
    """Initial noise (B, C, H / factor, W / factor) of unit variance, instead of random noise. With `image` and no
    `mask_image` these are the noisy latents at which the steps start, and only the size of `image` is used, as in
    diffusers."""
    image: Any = None
    """Initial image, for image to image; of models that enlarge one, the small image. A path, a PIL image, an array
    (H, W, 3) or (B, H, W, 3), a tensor (B, 3, H, W), or a list: RGB, uint8 or floats in 0..1, see `image.load_image`.
    Or latents (B, C, h, w), recognised by their channels and scaled as for the U-Net. Of n images, n dividing the
    batch, image k starts from number k modulo n, as in diffusers; likewise for `mask_image`. Of models that read
    pictures in place of prompts, those, each with its variations."""
    image_embeds: Any = None
    """In place of `image`, of models that read a picture in place of a prompt or, as stable unCLIP, beside it: the
    image encoder's output (n, D). Of Kandinsky 2.2 what its prior makes, in place of prompts: one, or a list."""
    negative_image_embeds: Any = None
    """Of Kandinsky 2.2, what guidance leads away from: (n, D) as `image_embeds`, or (1, D) for all."""
    original_image: Any = None
    """Of DeepFloyd IF's super-resolution, whose `image` is the small picture: what the steps start from, with
    `strength`, as large as the image; types as for `image`. With `mask_image` the rest of it stays."""
    prior_num_inference_steps: int | None = None
    """Of models with a prior, which makes the vectors of pictures of prompts, that one's steps; 25 if None."""
    prior_guidance_scale: float | None = None
    """The prior's guidance: 1 or less is off; 4 if None."""
    prior_latents: torch.Tensor | None = None
    """Noise (B, D) that the prior starts from, or (2B, D) where it makes vectors of negative prompts too, those
    last."""
    super_res_num_inference_steps: int | None = None
    """Of Karlo, the steps of its super-resolution, of which another network takes the last; 7 if None."""
    super_res_latents: torch.Tensor | None = None
    """Of Karlo, noise (B, 3, 256, 256) that its super-resolution starts from, instead of random noise."""
    strength: float | None = None
    """How much `image` is changed, 0 (not at all) to 1 (completely); None is 0.8, with SDXL's refiner 0.3, and 1 with
    `mask_image`; of DeepFloyd IF 0.7 and 1, of its super-resolution 0.8. Models that edit `image` start from noise, and
    have none."""
    denoising_start: float | None = None
    """Go on with `image`, latents from which this fraction of the noise has been removed, above 0 and below 1: take
    only the steps behind it, whatever `strength`, and add no noise. `latents` do in place of `image`. Pictures are
    encoded."""
    denoising_end: float | None = None
    """Take only the steps up to this fraction: with output_type "latent", what a request with denoising_start goes
    on with, as SDXL's refiner does."""
    depth_map: Any = None
    """Of depth to image, how near each pixel of `image` is: a tensor (n, H, W) of any range and size, or grey pictures,
    white near. None: what the checkpoint's own network estimates of `image`."""
    class_labels: int | Sequence[int] | torch.Tensor | None = None
    """Of class-conditional models, what each image shows: a class's number, a list or tensor of one for each image, or
    None for random ones, as diffusers' ConsistencyModelPipeline draws them: with seeds, each of its own."""
    noise_level: int | None = None
    """Of models that enlarge `image`: how much noise is added to it first, a timestep of the low_res_scheduler. None is
    the model's: 20 of the x4 upscaler, as in diffusers. Of stable unCLIP, to what is read of `image`, a timestep of the
    image_noising_scheduler, 0 by default."""
    refiner_switch_at: float | None = None
    """Where an attached refiner goes on with the latents: the fraction of the noise that has been removed. None is 0.8
    if there is one; 1 is without."""
    hires_scale: float | None = None
    """Make the image at height and width, enlarge it so many times, and sample on from there with `hires_strength`."""
    hires_height: int | None = None
    """In place of hires_scale, the height in pixels."""
    hires_width: int | None = None
    """Or the width, or both, of the same shape."""
    hires_strength: float | None = None
    """How much that changes, as `strength`; 0.7 if None."""
    hires_steps: int | None = None
    """Steps that it takes; as many as num_inference_steps if None."""
    hires_upscaler: str | None = None
    """What enlarges, a name of UPSCALERS, as in AUTOMATIC1111: "Latent" if None."""
    upscaler_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    """Of attached upscalers, what each has in place of its own defaults, as a dictionary of fields of UPSCALER_FIELDS:
    one for all, or a list of one for each. Prompts are the request's where it has none."""
    mask_image: Any = None
    """White is repainted, black stays; needs `image`. Types as for `image`, or (H, W), see `image.load_mask`."""
    padding_mask_crop: int | None = None
    """Repaint only the part of `image` that holds what is white in `mask_image`, with so many pixels around it, at
    height x width, and lay it over `image`, which is unchanged elsewhere. None: the whole picture is repainted."""
    control_image: Any = None
    """What attached ControlNets and T2I-Adapters read: a picture if there is one of them, else a list of one for each
    in the order in which they were attached, or a dictionary by name, of these and no others. Types as for `image`.
    In place of a picture there may be a list, one for each prompt."""
    controlnet_conditioning_scale: float | Sequence[float] | Mapping[str, float] | None = None
    """Factor of what ControlNets add: a number for all, a list of one for each, or a dictionary by name. None is
    diffusers' default: 1, with `image` 0.8, and with `mask_image` 0.5, or 1 for SDXL."""
    control_guidance_start: float | Sequence[float] | Mapping[str, float] = 0.0
    """Fraction of the steps at which ControlNets begin; likewise for each."""
    control_guidance_end: float | Sequence[float] | Mapping[str, float] = 1.0
    """Fraction of the steps at which they end."""
    guess_mode: bool = False
    """Whether ControlNets act on the prompt's branch alone, and on the first layers a tenth as much."""
    adapter_conditioning_scale: float | Sequence[float] | Mapping[str, float] = 1.0
    """Factor of T2I-Adapters' features: for all, or for each."""
    adapter_conditioning_factor: float = 1.0
    """Fraction of the steps, from the first, in which T2I-Adapters act."""
    clip_skip: int | None = None
    """Number of text encoder layers to skip at the end, counted as in diffusers."""
    literal_prompt: bool = False
    """Treat brackets and BREAK in prompts as text."""
    prompt_embeds: torch.Tensor | None = None
    """Text states (prompts, T, D) instead of `prompt`."""
    negative_prompt_embeds: torch.Tensor | None = None
    """Text states (prompts, T, D) instead of `negative_prompt`."""
    pooled_prompt_embeds: torch.Tensor | None = None
    """SDXL's pooled vectors (prompts, P), instead of those of `prompt`; needed with prompt_embeds."""
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    """Likewise for the negative prompts."""
    prompt_2: str | Sequence[str] | None = None
    """What SDXL's second text encoder reads instead of `prompt`."""
    negative_prompt_2: str | Sequence[str] | None = None
    """What SDXL's second text encoder reads instead of `negative_prompt`."""
    original_size: tuple[int, int] | None = None
    """SDXL's size condition, (height, width) in pixels; the image's size if None."""
    crops_coords_top_left: tuple[int, int] = (0, 0)
    """SDXL's crop condition, (top, left) in pixels."""
    target_size: tuple[int, int] | None = None
    """As original_size."""
    negative_original_size: tuple[int, int] | None = None
    """The size condition of the negative branch; original_size if None."""
    negative_crops_coords_top_left: tuple[int, int] | None = None
    """The crop condition of the negative branch. None is crops_coords_top_left; with a negative size and no `image`,
    and with SDXL's refiner, it is (0, 0), as in diffusers."""
    negative_target_size: tuple[int, int] | None = None
    """The target size of the negative branch; target_size if None."""
    aesthetic_score: float | None = None
    """What SDXL's refiner reads as how much the image is liked, about 1 to 10; 6 if None."""
    negative_aesthetic_score: float | None = None
    """The same of the negative branch; 2.5 if None."""
    output_type: str = "pil"
    """"pil": PIL images; "np": float32 (B, H, W, 3) in 0..1; "pt": tensor (B, 3, H, W) in 0..1; "latent": latents,
    undecoded."""
    adapters: Mapping[str, Any] | None = None
    """Weights of loaded adapters by name, such as {"sketch": 0.8}: these and no others; None is what is active on the
    pipeline. 0 is as if absent. In place of a number, a dictionary by component and block as for `set_adapters`, or
    {"scale": 0.8, "start": 0.0, "end": 0.5}: in these fractions of the steps only, but for what is computed once."""
    cross_attention_kwargs: Mapping[str, float] | None = None
    """{"scale": s} multiplies the weights of all adapters."""
    ip_adapter_image: Any = None
    """What loaded IP-Adapters read: for each a picture, or a list of its pictures; a single picture where one adapter
    is loaded. Types as for `image`, but that a tensor is the image encoder's own input (P, 3, S, S), as in
    diffusers."""
    ip_adapter_image_embeds: Sequence[torch.Tensor] | None = None
    """In place of ip_adapter_image, the image encoder's output: for each adapter (2, P, D), or (2, P, L, D) for those
    that read hidden states, negatives first; (1, ...) where there is no guidance."""
    ip_adapter_scale: Any = None
    """How strongly: a number, or a dictionary by block as for `set_ip_adapter_scale`, or a list of one for each
    adapter. None is what was set on the pipeline."""

    def __post_init__(self) -> None:
        _check_embeds(self)
        _check_texts(self)
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or _DEFAULTS[name] is not None:
                self._set(name, check(name, value))
        start, end = self.guidance_interval
        if start > end:
            raise InputError(
                f"guidance_interval is {self.guidance_interval}: expected two fractions, 0 <= start <= end <= 1"
            )
        if self.denoising_start is not None:
            _check_slice(self)
        _check_hires(self)
        if self.mask_image is not None and self.image is None:
            raise InputError("mask_image was given without image: inpainting needs both")
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("timesteps and sigmas were both given: give one of them")
        if self.ip_adapter_image is not None and self.ip_adapter_image_embeds is not None:
            raise InputError("ip_adapter_image and ip_adapter_image_embeds were both given: give one of them")
        if self.guidance_fn is not None and self.clip_guidance_scale:
            raise InputError("guidance_fn and clip_guidance_scale were both given: give one of them")
        _check_candidates(self)
        if self.seed is not None and self.generator is not None:
            raise InputError("seed and generator were both given: give one of them")
        if self.batch > MAX_IMAGES:
            raise InputError(f"the request is for {self.batch} pictures: expected at most {MAX_IMAGES}")
        self._set("seed", _check_seed(self))
        _check_generators(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, prompt: str | Sequence[str] | Request | None, options: dict[str, Any]) -> Request:
        """A request from a prompt, or from another request, and keyword arguments; an unknown name is an InputError
        that suggests the most similar one."""
        for name in [name for name in options if name in UNSUPPORTED]:
            if options[name] is not None and options[name] is not False:
                raise InputError(f"{name} is not supported{UNSUPPORTED[name]}")
            options = {key: value for key, value in options.items() if key != name}
        options = _renamed(options)
        if "batch_size" in options:
            options = _counted(prompt, options)
        checks.known(options, list(_DEFAULTS))
        return prompt.replace(**options) if isinstance(prompt, Request) else cls(prompt=prompt, **options)

    @property
    def prompts(self) -> list[str]:
        """The prompts, one per image."""
        return [text for text in as_list(self.prompt) for _ in range(self.batch // max(1, self.count))]

    @property
    def negative_prompts(self) -> list[str] | None:
        """The negative prompts, one per image; None if there are none."""
        if self.negative_prompt is None:
            return None
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * self.batch
        return [text for text in self.negative_prompt for _ in range(self.batch // max(1, self.count))]

    @property
    def gradient(self) -> GuidanceFunction | CLIPGuidance | None:
        """By whose gradient it is guided; None without."""
        return CLIPGuidance(self.clip_guidance_scale) if self.clip_guidance_scale else self.guidance_fn

    @property
    def batch(self) -> int:
        """B, the number of images that are sampled."""
        return self.count * (self.candidates or self.num_images_per_prompt)

    @property
    def kept(self) -> int:
        """The number of images per prompt that are returned."""
        return self.num_images_per_prompt if self.candidates is None else self.keep

    def parts(self, max_batch: int) -> list[Request]:
        """Of a completed request with candidates, the requests that sample so many images at most at a time, if each
        prompt leaves room for that: the first of each prompt, the next of each, and so on. Of any other, itself."""
        if self.candidates is None:
            return [self]
        size, seeds = max(1, max_batch // self.count), picture_seeds(self)
        parts = []
        for first in range(0, self.candidates, size):
            count = min(size, self.candidates - first)
            own = [seeds[p * self.candidates + first + k] for p in range(self.count) for k in range(count)]
            parts.append(self.replace(candidates=None, keep=1, num_images_per_prompt=count, seed=own))
        return parts

    @property
    def count(self) -> int:
        """The number of prompts."""
        return len(as_list(self.prompt)) if self.prompt_embeds is None else int(self.prompt_embeds.shape[0])

    def alone(self, k: int) -> Request:
        """One image of prompt k: what its text is read from. It has neither seed, generator nor latents."""
        changes: dict[str, Any] = dict.fromkeys(
            ("seed", "generator", "latents", "class_labels", "prior_latents", "super_res_latents")
        )
        for name in (*PER_PROMPT, "image_embeds", "negative_image_embeds"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                changes[name] = value[k : k + 1]
        return self.replace(num_images_per_prompt=1, candidates=None, keep=1, **changes)

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Timings:
    """Times of a call in seconds. On a GPU, which runs asynchronously, these are the host's: `decode` includes waiting
    for the steps.
    """

    text: float
    """Tokenising and encoding prompts, and everything else that is computed once per prompt or schedule."""
    steps: tuple[float, ...]
    """Each iteration of the sampler loop."""
    decode: float
    """From latents to images."""
    total: float
    """The full call."""


@dataclass(frozen=True)
class Result:
    """The result of a request."""

    images: list[Image] | numpy.ndarray | torch.Tensor
    """Of the type in `output_type`."""
    seeds: tuple[int, ...]
    """One per image, with which it can be generated again on its own. Empty if the caller's generator or latents were
    used."""
    timings: Timings
    backend: str
    """What ran the networks, such as "torch"."""
    dtype: str
    """The networks' dtype, such as "bfloat16"."""
    request: Request = field(repr=False)
    """The request with every default filled in."""
    adapters: str = ""
    """How the steps had the request's adapters: "merged" into the weights, or "beside" them, where requests with others
    shared them; "" for none."""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    """The tokens of textual inversion in the request's texts, with the short hashes of their files."""
    scores: tuple[float, ...] = ()
    """Of a request with `candidates`, one per image: the cosine of picture and prompt, -1 to 1."""
    refiner: str = ""
    """The name of the model that went on with the latents; "" for none."""
    upscalers: tuple[str, ...] = ()
    """The names of the models that enlarged the images, in this order."""


def as_list(texts: str | Sequence[str] | None) -> list[str]:
    """One or several texts as a list."""
    return [texts] if isinstance(texts, str) else list(texts or [])


Check = Callable[[str, Any], Any]


_OTHER_NAMES = {
    "decoder_num_inference_steps": "num_inference_steps",
    "decoder_guidance_scale": "guidance_scale",
    "decoder_latents": "latents",
    "image_embeddings": "image_embeds",
}
"""What diffusers' pipelines of Karlo call fields that have another name elsewhere."""


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names that they have here. InputError for one that is given by both."""
    renamed = {}
    for name, value in options.items():
        own = _OTHER_NAMES.get(name, name)
        if own != name and options.get(own) is not None and value is not None:
            raise InputError(f"{name} and {own} were both given, which are one: give one of them")
        if own == name or value is not None:
            renamed[own] = value
    return renamed


def _counted(prompt: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options with `batch_size`, by which diffusers' pipelines without a prompt count images, as its name here."""
    if isinstance(prompt, Request):
        prompt = prompt.prompt
    if prompt is not None or options.get("prompt") is not None:
        raise InputError("batch_size counts images of models that read no prompt: give num_images_per_prompt")
    if "num_images_per_prompt" in options:
        raise InputError("batch_size and num_images_per_prompt were both given: give one of them")
    rest = {name: value for name, value in options.items() if name != "batch_size"}
    return {**rest, "num_images_per_prompt": checks.whole("batch_size", options["batch_size"], 1, MAX_IMAGES, "images")}


def _check_texts(request: Request) -> None:
    """Check types, lengths and numbers of texts."""
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        value = getattr(request, name)
        if value is None:
            continue
        texts = checks.texts(name, value, MAX_IMAGES, MAX_PROMPT_LENGTH)
        length = sum(map(len, texts))
        if length > MAX_TEXT:
            raise InputError(f"{name} has {length} characters in {len(texts)} texts: expected at most {MAX_TEXT}")
        request._set(name, texts[0] if isinstance(value, str) else tuple(texts))
        if name == "prompt" or (request.prompt is None and request.prompt_embeds is None):
            continue  # `Request()` is a set of defaults; the pipeline refuses to run one without a prompt
        if not isinstance(value, str) and len(texts) != request.count:
            raise InputError(f"{name} has {len(texts)} texts for {request.count} prompts: give one, or one per prompt")
    if request.prompt_2 is not None and request.prompt is None and request.prompt_embeds is None:
        raise InputError("prompt_2 was given without prompt: it is what the second text encoder reads instead")


def _check_embeds(request: Request) -> None:
    """Check tensors, which replace texts."""
    for prefix in ("", "negative_"):
        for name in (f"{prefix}prompt", f"{prefix}prompt_2"):
            if getattr(request, name) is not None and getattr(request, f"{prefix}prompt_embeds") is not None:
                raise InputError(f"{name} and {prefix}prompt_embeds were both given: give one of them")
        for name, dimensions in ((f"{prefix}prompt_embeds", 3), (f"{prefix}pooled_prompt_embeds", 2)):
            if getattr(request, name) is not None:
                checks.tensor(name, getattr(request, name), (None,) * dimensions)


def _check_slice(request: Request) -> None:
    """Check what steps begin with that do not begin at the start."""
    start, end = request.denoising_start, request.denoising_end
    if end is not None and start is not None and start >= end:
        raise InputError(f"denoising_start is {start} and denoising_end {end}: expected a later end")
    if request.image is None and request.latents is None and request.count:
        raise InputError("denoising_start was given without image: give the latents that the steps go on with")
    if request.latents is not None and request.mask_image is not None:
        raise InputError("latents were given with denoising_start and mask_image: give the latents as image")


def _check_candidates(request: Request) -> None:
    """Check that there are as many as are kept, and nothing that one request alone can have."""
    if request.candidates is None:
        if request.keep != 1:
            raise InputError(f"keep is {request.keep} without candidates: it says how many of those are returned")
        return
    if request.keep > request.candidates:
        raise InputError(f"keep is {request.keep} of {request.candidates} candidates: expected at most as many")
    if request.num_images_per_prompt != 1:
        raise InputError(
            f"num_images_per_prompt is {request.num_images_per_prompt}, and there are candidates: keep says how many "
            "of them are returned"
        )
    for name in ("generator", "latents", "prompt_embeds"):
        if getattr(request, name) is not None:
            raise InputError(f"{name} does not go with candidates, which have a seed each and are ranked by the prompt")
    if request.output_type == "latent":
        raise InputError("output_type is 'latent', and candidates are ranked as pictures: ask for pil, np or pt")


def _check_hires(request: Request) -> None:
    sized = request.hires_height is not None or request.hires_width is not None
    if sized and request.hires_scale is not None:
        raise InputError("hires_scale was given with hires_height or hires_width: give one of them")
    for name in ("hires_strength", "hires_steps", "hires_upscaler"):
        if getattr(request, name) is not None and not sized and request.hires_scale is None:
            raise InputError(f"{name} was given without hires_scale: say how large the image gets")
    if request.hires_strength == 0:
        raise InputError("hires_strength is 0: expected a number above 0, at most 1")


def _upscaler(name: str, value: Any) -> str:
    """As in UPSCALERS."""
    text = checks.short_text(name, value, "an upscaler's name, such as 'Latent' or 'Lanczos'")
    plain = re.sub(r"[^a-z]", "", text.lower())
    for known in UPSCALERS:
        if plain == re.sub(r"[^a-z]", "", known.lower()):
            return known
    network = re.search(r"gan|swinir|scunet|ldsr|dat|ultrasharp|omnisr|4x|x4", text.lower())
    reason = ", which is a network that fastldm does not have" if network else ""
    raise InputError(f"{name} is {checks.show(text)}{reason}: expected one of {', '.join(UPSCALERS)}")


def _check_seed(request: Request) -> int | tuple[int, ...] | None:
    seed = request.seed
    if seed is None:
        return None
    try:
        return checks.whole("seed", seed, 0, MAX_SEED)
    except InputError:
        message = f"seed is {checks.show(seed)}: expected a whole number from 0 to 2**63 - 1, or a list of them"
    try:
        seeds = tuple(
            checks.whole("seed", item, 0, MAX_SEED) for item in checks.listed("seed", seed, MAX_IMAGES, "seeds")
        )
    except InputError:
        raise InputError(message) from None
    if (request.prompt is not None or request.prompt_embeds is not None) and len(seeds) != request.batch:
        raise InputError(f"seed is a list of {len(seeds)} for {request.batch} images: give one seed, or one per image")
    return seeds


def _check_generators(request: Request) -> None:
    """Check that there is one generator, or one per image."""
    import torch

    value = request.generator
    if value is None or isinstance(value, torch.Generator):
        return
    several = isinstance(value, (list, tuple)) and len(value) == (request.batch or len(value))
    if not several or not all(isinstance(item, torch.Generator) for item in value):
        raise InputError(
            f"generator is {checks.show(value)}: expected a torch.Generator, or a list of one for each of "
            f"{request.batch} pictures"
        )


def _upscaler_options(name: str, value: Any) -> Any:
    """A dictionary of fields, or a list of one for each upscaler. Returns a copy."""
    if not isinstance(value, Mapping):
        items = checks.listed(name, value, MAX_UPSCALERS, "dictionaries, one for each upscaler")
        return tuple(_upscaler_options(f"{name}[{k}]", item) for k, item in enumerate(items))
    for key in value:
        if key not in UPSCALER_FIELDS:
            raise InputError(f"{name} has {checks.show(key)}: expected some of {', '.join(UPSCALER_FIELDS)}")
    texts = {key: value[key] for key in ("prompt", "negative_prompt") if value.get(key) is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{name}[{key!r}] is {checks.show(text)}: expected one text")
    Request(**texts)  # which checks their lengths
    checked = {key: _CHECKS[key](f"{name}[{key!r}]", value[key]) for key in value if key in _CHECKS}
    return {**texts, **{key: item for key, item in checked.items() if value[key] is not None}}


def _adapters(name: str, value: Any) -> Mapping[str, Any]:
    """Weights by name; a mapping that is none of dict's own is a selection that was made from one."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {checks.show(value)}: expected a dictionary of weights by name")
    if type(value) is not dict:
        return value
    if len(value) > MAX_ADAPTERS:
        raise InputError(f"{name} is a dict of {len(value)}: expected at most {MAX_ADAPTERS} adapters")
    return {
        checks.short_text(f"a name in {name}", key, "a text"): adapter_weight(f"{name}[{checks.show(key)}]", weight)
        for key, weight in value.items()
    }


def adapter_weight(name: str, value: Any, depth: int = 4) -> Any:
    """A number, or a dictionary by component, by block, of numbers and lists of them. Returns a copy."""
    if isinstance(value, Mapping) and depth:
        keys = [checks.short_text(f"a name in {name}", key, "a text") for key in value]
        return {key: adapter_weight(f"{name}[{key!r}]", value[key], depth - 1) for key in keys}
    if isinstance(value, (list, tuple)):
        items = checks.listed(name, value, 100, "numbers")
        return [checks.real(f"{name}[{k}]", item, -MAX_WEIGHT, MAX_WEIGHT) for k, item in enumerate(items)]
    return checks.real(name, value, -MAX_WEIGHT, MAX_WEIGHT)


def picture_scale(name: str, value: Any) -> Any:
    """A number or a dictionary by block, or a list of one for each IP-Adapter."""
    if isinstance(value, (list, tuple)):
        items = checks.listed(name, value, MAX_ADAPTERS, "scales")
        return tuple(adapter_weight(f"{name}[{k}]", item, 2) for k, item in enumerate(items))
    return adapter_weight(name, value, 2)


def _attention_kwargs(name: str, value: Any) -> Mapping[str, float] | None:
    if not isinstance(value, Mapping) or not set(value) <= {"scale"}:
        raise InputError(f"{name} is {checks.show(value)}: expected {{'scale': a number}}, for adapters")
    scales = {key: checks.real(f"{name}[{key!r}]", scale, -MAX_WEIGHT, MAX_WEIGHT) for key, scale in value.items()}
    return scales or None


def _each(low: float, high: float) -> Check:
    """A number for all controls, a list of one for each, or a dictionary by name."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if len(value) > MAX_CONTROLS:
                raise InputError(f"{name} has {len(value)} items: expected at most {MAX_CONTROLS}")
            names = [checks.short_text(f"a name in {name}", key, "a control's name") for key in value]
            return {key: checks.real(f"{name}[{key!r}]", value[key], low, high) for key in names}
        if isinstance(value, (list, tuple)):
            items = checks.listed(name, value, MAX_CONTROLS, "numbers")
            return tuple(checks.real(f"{name}[{k}]", item, low, high) for k, item in enumerate(items))
        return checks.real(name, value, low, high)

    return check


def _control_images(name: str, value: Any) -> Any:
    """Pictures are read later; of a dictionary, its names are checked."""
    if not isinstance(value, Mapping):
        return value
    if len(value) > MAX_CONTROLS:
        raise InputError(f"{name} has {len(value)} items: expected at most {MAX_CONTROLS}")
    for key in value:
        checks.short_text(f"a name in {name}", key, "a control's name")
    return value if type(value) is not dict else dict(value)  # else a selection that was made from one


def _classes(name: str, value: Any) -> int | tuple[int, ...]:
    """A class, or one for each image."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.ndim > 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{name} is {checks.show(value)}: expected a tensor of whole numbers, one for each image")
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        items = checks.listed(name, value, MAX_IMAGES, "classes")
        return tuple(checks.whole(f"{name}[{k}]", item, 0, MAX_CLASS) for k, item in enumerate(items))
    return checks.whole(name, value, 0, MAX_CLASS)


def _fractions(name: str, value: Any) -> tuple[float, float]:
    items = checks.listed(name, value, 2, "fractions")
    if len(items) != 2:
        raise InputError(f"{name} is {checks.show(value)}: expected two fractions, 0 <= start <= end <= 1")
    return checks.real(f"{name}[0]", items[0], 0.0, 1.0), checks.real(f"{name}[1]", items[1], 0.0, 1.0)


def _layers(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else checks.listed(name, value, MAX_LAYERS, "names of layers")
    layers = tuple(checks.short_text(f"{name}[{k}]", item, "a layer's name") for k, item in enumerate(items))
    for layer in layers:
        if not re.fullmatch(r"[\w.()|*+?\[\]^$-]+", layer):  # as a PNG's settings have it
            raise InputError(
                f"{name} holds {layer!r}: expected a part of a layer's name, or a pattern such as up.(0|1)"
            )
    return layers


def _size(name: str, value: Any) -> tuple[int, int]:
    return checks.pair(name, value, 0, MAX_SIDE, "(height, width) in pixels")


def _crop(name: str, value: Any) -> tuple[int, int]:
    return checks.pair(name, value, 0, MAX_SIDE, "(top, left) in pixels")


def _whole(low: int, high: int, unit: str) -> Check:
    return lambda name, value: checks.whole(name, value, low, high, unit)


def _real(low: float, high: float) -> Check:
    return lambda name, value: checks.real(name, value, low, high)


def _switch(name: str, value: Any) -> float:
    fraction = checks.real(name, value, 0.0, 1.0)
    return 1.0 if fraction == 1 else _inner(name, fraction)


def _inner(name: str, value: Any) -> float:
    fraction = checks.real(name, value, 0.0, 1.0)
    if fraction in (0, 1):
        raise InputError(f"{name} is {fraction:g}: expected a fraction above 0 and below 1; None is all steps")
    return fraction


def _motion_seed(name: str, value: Any) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        seeds = checks.listed(name, value, MAX_IMAGES, "seeds")
        return tuple(checks.whole(f"{name}[{k}]", seed, 0, MAX_SEED, "") for k, seed in enumerate(seeds))
    return checks.whole(name, value, 0, MAX_SEED, "")


_CHECKS: dict[str, Check] = {
    "height": _whole(1, MAX_SIDE, "pixels"),
    "width": _whole(1, MAX_SIDE, "pixels"),
    "num_inference_steps": _whole(1, MAX_STEPS, "steps"),
    "num_images_per_prompt": _whole(1, MAX_IMAGES, "pictures"),
    "candidates": _whole(1, MAX_IMAGES, "pictures"),
    "keep": _whole(1, MAX_IMAGES, "pictures"),
    "clip_skip": _whole(0, 1000, "layers"),
    "guidance_scale": _real(0.0, MAX_GUIDANCE),
    "prior_num_inference_steps": _whole(1, MAX_STEPS, "steps"),
    "prior_guidance_scale": _real(0.0, MAX_GUIDANCE),
    "super_res_num_inference_steps": _whole(1, MAX_STEPS, "steps"),
    "super_res_latents": lambda name, value: checks.finite(name, checks.tensor(name, value, (None,) * 4)),
    "prior_latents": lambda name, value: checks.finite(name, checks.tensor(name, value, (None, None))),
    "image_guidance_scale": _real(0.0, MAX_GUIDANCE),
    "pag_scale": _real(0.0, MAX_GUIDANCE),
    "pag_adaptive_scale": _real(0.0, MAX_GUIDANCE),
    "pag_applied_layers": _layers,
    "apg_rescale": _real(0.0, 1e6),
    "apg_eta": _real(-MAX_GUIDANCE, MAX_GUIDANCE),
    "apg_momentum": _real(-1.0, 1.0),
    "use_original_formulation": checks.flag,
    "guidance_fn": guidance_function,
    "clip_guidance_scale": _real(0.0, MAX_SCALE),
    "guidance_rescale": _real(0.0, 1.0),
    "guidance_interval": _fractions,
    "eta": _real(0.0, 1.0),
    "noise_sampler_seed": _motion_seed,
    "s_churn": _real(0.0, 1000.0),
    "s_tmin": _real(0.0, 1e6),
    "s_tmax": _real(0.0, 1e6),
    "s_noise": _real(0.0, 10.0),
    "reuse": _whole(1, MAX_STEPS, "calls of the U-Net"),
    "strength": _real(0.0, 1.0),
    "refiner_switch_at": _switch,
    "hires_scale": _real(1.0, 16.0),
    "hires_height": _whole(1, MAX_SIDE, "pixels"),
    "hires_width": _whole(1, MAX_SIDE, "pixels"),
    "hires_strength": _real(0.0, 1.0),
    "hires_steps": _whole(1, MAX_STEPS, "steps"),
    "hires_upscaler": _upscaler,
    "upscaler_options": _upscaler_options,
    "aesthetic_score": _real(-1000.0, 1000.0),
    "negative_aesthetic_score": _real(-1000.0, 1000.0),
    "padding_mask_crop": _whole(0, MAX_SIDE, "pixels"),
    "denoising_start": _inner,
    "denoising_end": _inner,
    "noise_level": _whole(0, 10**5, "a noise level"),
    "class_labels": _classes,
    "sampler": lambda name, value: checks.short_text(name, value, "a sampler's name, such as 'euler a'"),
    "timesteps": lambda name, value: checks.numbers(name, value, MAX_STEPS),
    "sigmas": lambda name, value: checks.numbers(name, value, MAX_STEPS),
    "literal_prompt": checks.flag,
    "adapters": _adapters,
    "cross_attention_kwargs": _attention_kwargs,
    "control_image": _control_images,
    "controlnet_conditioning_scale": _each(-MAX_GUIDANCE, MAX_GUIDANCE),
    "control_guidance_start": _each(0.0, 1.0),
    "control_guidance_end": _each(0.0, 1.0),
    "guess_mode": checks.flag,
    "adapter_conditioning_scale": _each(-MAX_GUIDANCE, MAX_GUIDANCE),
    "adapter_conditioning_factor": _real(0.0, 1.0),
    "ip_adapter_image_embeds": lambda name, value: tuple(
        checks.instance(name, value, (list, tuple), "a list of tensors")
    ),
    "ip_adapter_scale": picture_scale,
    "output_type": lambda name, value: checks.choice(name, value, OUTPUT_TYPES),
    "latents": lambda name, value: checks.tensor(name, value, (None,) * 4),
    "original_size": _size,
    "target_size": _size,
    "negative_original_size": _size,
    "negative_target_size": _size,
    "crops_coords_top_left": _crop,
    "negative_crops_coords_top_left": _crop,
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}


def picture_seeds(request: Request) -> tuple[int, ...]:
    """One seed per image, (B,): the list in `seed`, or seed, seed + 1, ...; a random seed if `seed` is None."""
    if isinstance(request.seed, Sequence):
        return tuple(request.seed)
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    return tuple((first + k) % (MAX_SEED + 1) for k in range(request.batch))
