"""What a caller asks for, and what comes back.

`Request` is the one place where the arguments of a generation have their names, defaults and checks:
`Pipeline.__call__`, the command and everything later are built from it. Names are diffusers'.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastldm.errors import InputError

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One call: B = len(prompt) * num_images_per_prompt pictures. `None` means the model family's own default.

    Checked here: all that needs no model. `Pipeline` fills in the family's defaults and checks the rest.
    """

    prompt: str | Sequence[str] | None = None
    """What to draw: one text, or a list with one text a picture. `(word:1.3)` and `[word]` weigh words."""
    negative_prompt: str | Sequence[str] | None = None
    """What to avoid; one text for all or one a prompt. Used where guidance_scale > 1."""
    height: int | None = None
    """Picture height in pixels, a multiple of the VAE's factor (8 for Stable Diffusion)."""
    width: int | None = None
    """Picture width in pixels, likewise."""
    num_inference_steps: int | None = None
    """Sampler steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance: 1 or less is off and costs one network row a picture, not two."""
    guidance_rescale: float = 0.0
    """Pulls the guided prediction's deviation back to the conditional one's, 0 (off) to 1 (arXiv:2305.08891, section
    3.4)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these fractions of the steps (arXiv:2404.07724)."""
    sampler: str | None = None
    """A sampler's name, such as "dpm++ 2m karras", "euler a" or a diffusers class name."""
    timesteps: Sequence[float] | None = None
    """Custom training timesteps, descending, in place of num_inference_steps."""
    sigmas: Sequence[float] | None = None
    """Custom noise levels, descending, in place of num_inference_steps."""
    eta: float = 0.0
    """DDIM's and TCD's share of fresh noise, 0 to 1."""
    num_images_per_prompt: int = 1
    """Pictures a prompt."""
    seed: int | Sequence[int] | None = None
    """Picture k is made from a CPU generator seeded seed + k, on every device; a list gives one seed a picture. None
    draws one."""
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    """In place of seed: one generator draws the whole batch, a list draws a picture each, both as diffusers does."""
    latents: torch.Tensor | None = None
    """Start noise (B, C, H / factor, W / factor), unit variance, in place of drawn noise."""
    image: Any = None
    """Start picture (PIL, array (H, W, 3) or (B, H, W, 3) in 0..1 or uint8, tensor (B, 3, H, W) in 0..1): image to
    image."""
    strength: float | None = None
    """How much of `image` is redone, 0 (nothing) to 1 (everything); None is 0.8, and 1 with `mask_image`."""
    mask_image: Any = None
    """White is repainted, black is kept; needs `image`."""
    clip_skip: int | None = None
    """Text encoder layers left out at the end, as diffusers counts them."""
    literal_prompt: bool = False
    """Take brackets in prompts as text, not as weights."""
    prompt_embeds: torch.Tensor | None = None
    """Text states (B, T, D) in place of `prompt`."""
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    original_size: tuple[int, int] | None = None
    """SDXL's size conditions, (height, width) in pixels; the picture's own size when None."""
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    output_type: str = "pil"
    """"pil": PIL images; "np": float32 (B, H, W, 3) in 0..1; "pt": tensor (B, 3, H, W) in 0..1; "latent": latents,
    undecoded."""

    def __post_init__(self) -> None:
        _check_prompts(self)
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 1, "pixels")
        if self.num_inference_steps is not None:
            _whole("num_inference_steps", self.num_inference_steps, 1, "steps")
        _whole("num_images_per_prompt", self.num_images_per_prompt, 1, "pictures")
        if self.clip_skip is not None:
            _whole("clip_skip", self.clip_skip, 0, "layers")
        if self.guidance_scale is not None:
            _real("guidance_scale", self.guidance_scale, 0.0, math.inf)
        _real("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        _real("eta", self.eta, 0.0, 1.0)
        if self.strength is not None:
            _real("strength", self.strength, 0.0, 1.0)
        start, end = self.guidance_interval
        if not 0.0 <= start <= end <= 1.0:
            raise InputError(
                f"guidance_interval is {self.guidance_interval}: expected two fractions, 0 <= start <= end <= 1"
            )
        if self.output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {self.output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        if self.mask_image is not None and self.image is None:
            raise InputError("mask_image was given without image: inpainting needs both")
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("timesteps and sigmas were both given: give one of them")
        if self.seed is not None and self.generator is not None:
            raise InputError("seed and generator were both given: give one of them")
        object.__setattr__(self, "seed", _check_seed(self))

    @classmethod
    def of(cls, prompt: str | Sequence[str] | Request | None, options: dict[str, Any]) -> Request:
        """A request from a prompt, or from another request, and keyword arguments; an unknown name is an InputError
        that suggests the nearest one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
                raise InputError(f"unknown argument {name!r}: {hint}")
        return prompt.replace(**options) if isinstance(prompt, Request) else cls(prompt=prompt, **options)

    @property
    def prompts(self) -> list[str]:
        """The prompts, one a picture."""
        texts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or [])
        return [text for text in texts for _ in range(self.num_images_per_prompt)]

    @property
    def negative_prompts(self) -> list[str] | None:
        """The negative prompts, one a picture; None where none was given."""
        if self.negative_prompt is None:
            return None
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * self.batch
        return [text for text in self.negative_prompt for _ in range(self.num_images_per_prompt)]

    @property
    def batch(self) -> int:
        """B, the number of pictures."""
        if self.prompt_embeds is not None:
            return int(self.prompt_embeds.shape[0]) * self.num_images_per_prompt
        return len(self.prompts)

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Timings:
    """Where the time of a call went, in seconds. On a GPU, which works behind the host, these are the host's: what a
    step leaves running is waited for in `decode`.
    """

    text: float
    """Tokenising and encoding prompts, and all that is computed once a prompt or schedule."""
    steps: tuple[float, ...]
    """Each pass of the sampler loop."""
    decode: float
    """Latents to pictures."""
    total: float
    """The whole call."""


@dataclass(frozen=True)
class Result:
    """What a call made."""

    images: list[Image] | numpy.ndarray | torch.Tensor
    """As `output_type` says."""
    seeds: tuple[int, ...]
    """One a picture: each makes that picture again, alone. Empty where the caller's generator or latents were used."""
    timings: Timings
    backend: str
    """What ran the networks, such as "torch"."""
    dtype: str
    """The networks' dtype, such as "bfloat16"."""
    request: Request = field(repr=False)
    """The request with every default filled in."""


def _check_prompts(request: Request) -> None:
    prompt, negative, embeds = request.prompt, request.negative_prompt, request.prompt_embeds
    if prompt is not None and embeds is not None:
        raise InputError("prompt and prompt_embeds were both given: give one of them")
    if prompt is None:
        return  # `Request()` is a set of defaults; the pipeline refuses to run one without a prompt
    _check_texts("prompt", prompt)
    if negative is not None:
        _check_texts("negative_prompt", negative)
        if not isinstance(negative, str):
            prompts = 1 if isinstance(prompt, str) else len(prompt)
            if len(negative) != prompts:
                raise InputError(
                    f"negative_prompt has {len(negative)} texts for {prompts} prompts: give one, or one a prompt"
                )


def _check_texts(name: str, value: Any) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{name} is {_show(value)}: expected a text or a list of texts")
    if not value:
        raise InputError(f"{name} is an empty list: give at least one text (an empty text is fine)")


def _check_seed(request: Request) -> int | tuple[int, ...] | None:
    seed = request.seed
    if seed is None:
        return None
    if not isinstance(seed, Sequence):
        if not _is_whole(seed) or not 0 <= int(seed) <= MAX_SEED:
            raise InputError(f"seed is {_show(seed)}: expected a whole number from 0 to 2**63 - 1, or a list of them")
        return int(seed)
    if not all(_is_whole(s) and 0 <= int(s) <= MAX_SEED for s in seed):
        raise InputError(f"seed is {_show(seed)}: expected a whole number from 0 to 2**63 - 1, or a list of them")
    if (request.prompt is not None or request.prompt_embeds is not None) and len(seed) != request.batch:
        raise InputError(f"seed is a list of {len(seed)} for {request.batch} pictures: give one seed, or one a picture")
    return tuple(int(s) for s in seed)


def picture_seeds(request: Request) -> tuple[int, ...]:
    """One seed a picture, (B,): the given list, or seed, seed + 1, ...; a fresh random seed where none was given."""
    if isinstance(request.seed, Sequence):
        return tuple(request.seed)
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    return tuple((first + k) % (MAX_SEED + 1) for k in range(request.batch))


def _is_whole(value: Any) -> bool:
    # numpy's integers count, bool does not
    return hasattr(value, "__index__") and not isinstance(value, bool) and not hasattr(value, "__len__")


def _whole(name: str, value: Any, least: int, unit: str) -> None:
    if not _is_whole(value) or int(value) < least:
        raise InputError(f"{name} is {_show(value)}: expected a whole number of {unit}, {least} or more")


def _real(name: str, value: Any, low: float, high: float) -> None:
    try:
        inside = low <= float(value) <= high and math.isfinite(float(value))
    except (TypeError, ValueError):
        inside = False
    if not inside:
        bounds = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"{name} is {_show(value)}: expected a number {bounds}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
