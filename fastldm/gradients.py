"""Guidance by gradient: what an image may be guided by beside its prompts, as `Request.guidance_fn`.

A guidance function is called at each step with what the network reads there and returns the gradient of how much it
likes that, in the same units as log p(y | u):

    u      = signal * x0 + noise * n          x_t of DDPM; of samplers with noise levels c_in * x; in EDM's the same
    guide  = guidance_fn(u, t)                the gradient with respect to u, (B, C, h, w)
    x0'    = x0 + noise^2 / signal * guide    the denoised latent (Tweedie's formula of the posterior's score)

which for a network that predicts the noise is eps' = eps - sqrt(1 - alpha_bar) * guide, Dhariwal and Nichol 2021,
arXiv:2105.05233, algorithm 2. runtime/gradient.py adds the same to networks that predict otherwise.

    ClassifierGuidance    of a classifier that was trained on noisy latents
    CLIPGuidance          of a CLIP model that sees the denoised picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastldm import checks
from fastldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SCALE = 1e6
MAX_CUTOUTS = 1024
MAX_CLASS = 10**9

GuidanceFunction = Callable[["Tensor", "Tensor"], "Tensor"]
"""(latents (B, C, h, w) float32, t (B,) float32, the network's timesteps) -> the gradient (B, C, h, w)."""


@dataclass(frozen=True)
class ClassifierGuidance:
    """The gradient of scale * log p(class | u) by a classifier of noisy latents.

        gradient = scale * grad_u log_softmax(model(u, t))[class]

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.
    """

    model: Callable[[Tensor, Tensor], Tensor]
    """(latents (B, C, h, w) float32, t (B,) float32) -> logits (B, K), such as a `torch.nn.Module` on the pipeline's
    device. The latents require a gradient."""
    class_labels: int | Sequence[int]
    """The class of all images, or of each."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        labels: Any = self.class_labels
        if not callable(self.model):
            raise InputError(f"model is {checks.show(self.model)}: expected a classifier (latents, t) -> logits")
        if isinstance(labels, (list, tuple)):
            items = checks.listed("class_labels", labels, checks.MAX_IMAGES, "classes")
            labels = tuple(checks.whole(f"class_labels[{k}]", item, 0, MAX_CLASS) for k, item in enumerate(items))
        else:
            labels = checks.whole("class_labels", labels, 0, MAX_CLASS)
        object.__setattr__(self, "class_labels", labels)
        object.__setattr__(self, "scale", checks.real("scale", self.scale, -MAX_SCALE, MAX_SCALE))

    def image(self, k: int) -> ClassifierGuidance:
        """That of one image."""
        return self if isinstance(self.class_labels, int) else replace(self, class_labels=self.class_labels[k])

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The gradient. InputError for logits that are none, or that have no gradient."""
        import torch

        with torch.enable_grad():
            x = latents.detach().requires_grad_()
            logits = self.model(x, t)
            if not (isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == len(x)):
                shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else checks.show(logits)
                raise InputError(f"the classifier returned {shape}: expected logits ({len(x)}, classes)")
            if not logits.requires_grad:
                raise InputError("the classifier's logits have no gradient: it detaches them, or runs under no_grad")
            labels = self.class_labels
            labels = [labels] * len(x) if isinstance(labels, int) else list(labels)
            if len(labels) != len(x):
                raise InputError(f"class_labels has {len(labels)} classes for {len(x)} images: give one, or one each")
            if max(labels) >= logits.shape[1]:
                raise InputError(f"class_labels has {max(labels)}, and the classifier knows {logits.shape[1]} classes")
            index = torch.tensor(labels, device=logits.device)[:, None]
            log_p = logits.float().log_softmax(1).gather(1, index).sum()
            return self.scale * torch.autograd.grad(log_p, x)[0]


@dataclass(frozen=True)
class CLIPGuidance:
    """The gradient of how well a CLIP model finds that the denoised picture shows a text.

        loss     = 2 * arcsin(|v - w| / 2)^2             v, w: unit vectors of picture and text; the mean over cutouts
        gradient = -scale * grad_u loss(decode(x0(u)))    through the U-Net and the decoder

    Source: guided diffusion's notebooks and diffusers' community pipeline `clip_guided_stable_diffusion`, of which it
    has the loss, the scale and the branch of the prompt alone; it decodes x0 at every step, and they a mixture of x0
    and u, by sqrt(1 - alpha_bar). With the decoded x0: Bansal et al. 2023, arXiv:2302.07121, equation 6.

    The CLIP model is the one that ranks candidates: the model's own, or the one that `load_ranker` has loaded.
    """

    scale: float = 100.0
    """As `clip_guidance_scale`."""
    prompt: str | Sequence[str] | None = None
    """What it compares with, one text or one for each image; None is the request's prompts."""
    num_cutouts: int = 0
    """How many random squares of the picture it sees, whose loss is averaged; 0: the picture as a whole."""
    through_unet: bool = True
    """False is cheaper, without a gradient of the U-Net: x0' = x0 - scale * noise^2 * grad_x0 loss(decode(x0)). That is
    the above with d x0 / d u taken as `signal`, that of data of unit variance. As He et al. 2023, arXiv:2311.16424."""
    decoder: Callable[[Tensor], Tensor] | None = None
    """In place of the autoencoder's: latents (B, C, h, w) float32 as the U-Net has them -> (B, 3, H, W) in -1..1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checks.real("scale", self.scale, 0.0, MAX_SCALE))
        object.__setattr__(self, "num_cutouts", checks.whole("num_cutouts", self.num_cutouts, 0, MAX_CUTOUTS))
        checks.flag("through_unet", self.through_unet)
        if self.prompt is not None:
            texts = checks.texts("prompt", self.prompt, checks.MAX_IMAGES, checks.MAX_PROMPT_LENGTH)
            object.__setattr__(self, "prompt", self.prompt if isinstance(self.prompt, str) else tuple(texts))
        if self.decoder is not None and not callable(self.decoder):
            raise InputError(f"decoder is {checks.show(self.decoder)}: expected a function of latents")


def guidance_function(name: str, value: Any) -> GuidanceFunction | CLIPGuidance:
    """InputError for what is no guidance function."""
    if callable(value) or isinstance(value, CLIPGuidance):
        return value
    raise InputError(f"{name} is {checks.show(value)}: expected a function (latents, t) -> gradient, or a CLIPGuidance")
