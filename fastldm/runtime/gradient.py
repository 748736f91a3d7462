"""Guidance by gradient in a run: the forms of gradients.py, and what they add to the network's output.

A row of a table says what the network sees there and how its output enters, u = signal * x0 + noise * n and
x0 = skip * u + gain * out. So for every sampler and prediction type the denoised latent and the output move by

    x0'  = x0 + noise^2 / signal * g
    out' = out + noise^2 / (signal * gain) * g

    predicts   gain               out' - out
    epsilon    -noise / signal    -noise * g                      Dhariwal & Nichol 2021, arXiv:2105.05233
    v          -noise             -noise / signal * g
    sample     1                  noise^2 / signal * g
    EDM's F    c_out              noise^2 / (signal * c_out) * g  of u = c_in * x

and the step goes on as from any output. It is added behind all guidance by weights, its rescale and its projection, and
before a clamp or thresholding: `denoise.added_output`.

A gradient is computed eagerly, of what the network reads in float32. Where it goes through a network it runs that
network's own modules: an op whose input requires a gradient takes its reference (kernels/dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import checks
from fastldm.conditioning.image_encoder import ImageEncoder
from fastldm.errors import FastLDMError, InputError, NonFinite, out_of_memory_named
from fastldm.gradients import ClassifierGuidance, CLIPGuidance, GuidanceFunction
from fastldm.request import Request, as_list
from fastldm.samplers.grid import Level

LEAST_SIGNAL = 1e-3
"""Of less in what the network reads there is no gradient: at zero terminal SNR the first step is of noise alone."""


class At(NamedTuple):
    """A step, as its gradient sees it."""

    latents: Tensor  # (B, C, h, w) float32: what the network reads, u
    timesteps: Tensor  # (B,) float32: the network's
    row: int
    level: Level
    denoised: Callable[[Tensor], Tensor]  # u -> x0 (B, C, h, w) float32 by the prompt's branch, which autograd sees


class Gradient(Protocol):
    """That of a run of B images."""

    @property
    def name(self) -> str:
        """What errors call it."""

    def __call__(self, at: At) -> Tensor | None:
        """What x0 moves by, (B, C, h, w) float32; None where it does not. Called where autograd records.

        Raises InputError for what is no gradient of these latents, and for what a caller's function raises; NonFinite.
        """

    def image(self, k: int) -> Gradient:
        """That of one image."""


@dataclass(frozen=True, eq=False)
class Function:
    """A caller's own."""

    function: GuidanceFunction
    name = "guidance_fn"

    def __call__(self, at: At) -> Tensor | None:
        if at.level.signal < LEAST_SIGNAL:
            return None
        return _moved(at, _called(self.function, at.latents, at.timesteps), at.level.noise**2 / at.level.signal)

    def image(self, k: int) -> Function:
        return Function(self.function.image(k)) if isinstance(self.function, ClassifierGuidance) else self


def _called(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """What a caller's function returns; what it raises as an error of fastldm."""
    try:
        return function(*inputs)
    except FastLDMError:
        raise
    except Exception as error:
        named = out_of_memory_named(error)
        raise (InputError(f"{type(error).__name__}: {error}") if named is error else named) from error


def _moved(at: At, gradient: Any, factor: float) -> Tensor:
    """factor * gradient; InputError and NonFinite for what is none of these latents."""
    checks.tensor("the gradient", gradient, tuple(at.latents.shape))
    if gradient.device != at.latents.device:
        raise InputError(f"the gradient is on {gradient.device}: expected {at.latents.device}, where the latents are")
    if not bool(gradient.isfinite().all()):
        raise NonFinite("the gradient holds NaN or infinity")
    return factor * gradient.detach().float()


@dataclass(frozen=True, eq=False)
class CLIPGradient:
    """See `CLIPGuidance`."""

    options: CLIPGuidance
    encoder: ImageEncoder
    texts: Tensor  # (B, P) float32 unit vectors
    decode: Callable[[Tensor], Tensor]  # latents as the U-Net has them -> (B, 3, H, W) in -1..1
    seeds: Sequence[int]  # (B,) of the cutouts
    name = "CLIP guidance"

    def __call__(self, at: At) -> Tensor | None:
        level, through = at.level, self.options.through_unet
        if through and level.signal < LEAST_SIGNAL:
            return None
        if through:
            variable = at.latents.requires_grad_()
            x0 = at.denoised(variable)
        else:
            with torch.no_grad():
                x0 = at.denoised(at.latents)
            variable = x0 = x0.detach().requires_grad_()
        own = self.options.decoder
        pictures = self.decode(x0) if own is None else _called(own, x0)
        (gradient,) = torch.autograd.grad(-self.options.scale * self.loss(pictures, at.row).sum(), variable)
        return _moved(at, gradient, level.noise**2 / level.signal if through else level.noise**2)

    def image(self, k: int) -> CLIPGradient:
        return CLIPGradient(self.options, self.encoder, self.texts[k : k + 1], self.decode, self.seeds[k : k + 1])

    def loss(self, pictures: Tensor, row: int) -> Tensor:
        """Of pictures (B, 3, H, W) in -1..1: (B,)."""
        units = (pictures.float() / 2 + 0.5).clamp(0, 1)
        count, prepare = self.options.num_cutouts, self.encoder.preprocessing
        if count:
            # Drawn for each image and each row alone: neither what else there is nor a step that failed changes them.
            draws = [torch.Generator().manual_seed((1_000_003 * row + seed) % 2**63) for seed in self.seeds]
            units = torch.cat([cutouts(own, count, prepare.crop, g) for own, g in zip(units, draws, strict=True)])
        else:
            units = prepare.cut(units)
        vectors = F.normalize(self.encoder.model(prepare.normalised(units)).float(), dim=-1)
        texts = self.texts.repeat_interleave(max(1, count), 0)
        return spherical_distance(vectors, texts).unflatten(0, (len(self.texts), -1)).mean(1)


def clip_texts(request: Request, options: CLIPGuidance) -> list[str]:
    """The text that each image of a request is compared with. InputError where there is none."""
    texts = as_list(request.prompt if options.prompt is None else options.prompt)
    if len(texts) not in (1, request.count):
        raise InputError(
            f"CLIPGuidance's prompt has {len(texts)} texts for {request.count} prompts: give one, or one each"
        )
    if not texts or not all(text.strip() for text in texts):
        raise InputError(
            "CLIP guidance compares pictures with a text, and there is none: give prompt, or CLIPGuidance's"
        )
    texts = texts * (request.count // len(texts))
    return [text for text in texts for _ in range(request.batch // request.count)]


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """Twice the square of half the angle between unit vectors (N, P): (N,)."""
    return (a - b).norm(dim=-1).div(2).clamp(max=1 - 1e-6).arcsin().square() * 2


def cutouts(picture: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random squares of a picture (3, H, W), from `size` pixels up to all of it, by averaging (count, 3, size, size):
    guided diffusion's MakeCutouts with power 1."""
    height, width = picture.shape[1:]
    longest = min(height, width)
    shortest = min(longest, size)
    squares = []
    for _ in range(count):
        side = int(float(torch.rand((), generator=generator)) * (longest - shortest) + shortest)
        top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in (height, width))
        squares.append(F.adaptive_avg_pool2d(picture[:, top : top + side, left : left + side], size))
    return torch.stack(squares)
