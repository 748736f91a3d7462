"""The guidance of a request: from its scales to `denoise.Guidance`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastldm.errors import InputError
from fastldm.kernels.projection import Projection
from fastldm.models.config import UNetConfig
from fastldm.request import Request
from fastldm.runtime.denoise import Guidance
from fastldm.samplers.names import is_cfg_pp

PAG_SCALE, PAG_LAYERS = 3.0, "mid"  # diffusers' defaults
APG_ETA, APG_RESCALE = 1.0, 15.0  # likewise


def guidance_of(request: Request, unet: UNetConfig) -> Guidance:
    """That of a completed request. A model that reads the scale itself is not guided by it."""
    scale = 1.0 if unet.needs_guidance else float(request.guidance_scale or 0)
    options: dict[str, Any] = {"cfg_pp": is_cfg_pp(request.sampler), "image_scale": request.image_guidance_scale}
    options["original"] = request.use_original_formulation
    if request.pag_scale:
        options |= {"pag_scale": request.pag_scale, "pag_adaptive_scale": request.pag_adaptive_scale}
        options["pag_layers"] = perturbed_layers(request, unet)
    if (apg := apg_of(request)) is not None:
        options["apg"] = apg
    return Guidance(scale, request.guidance_rescale, *request.guidance_interval, **options)


def apg_of(request: Request) -> Projection | None:
    """Adaptive projected guidance; None without."""
    eta, norm, momentum = request.apg_eta, request.apg_rescale, request.apg_momentum
    if eta is None and norm is None and momentum is None:
        return None
    eta, norm = APG_ETA if eta is None else eta, APG_RESCALE if norm is None else norm
    return Projection(eta, norm, momentum or 0.0, request.use_original_formulation)


def apg_field(request: Request) -> str:
    """The field that turns it on, with its value, for errors."""
    names = ("apg_rescale", "apg_eta", "apg_momentum")
    return next(f"{name} is {value:g}" for name in names if (value := getattr(request, name)) is not None)


def pag_defaults(index: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request to a diffusers pipeline with perturbed-attention guidance, from its model_index.json."""
    if "PAG" not in str(index.get("_class_name")):
        return {}
    return {"pag_scale": PAG_SCALE, "pag_applied_layers": index.get("pag_applied_layers") or PAG_LAYERS}


def perturbed_layers(request: Request, unet: UNetConfig) -> tuple[int, ...]:
    """The places in `UNetConfig.self_attentions` of those that any of `Request.pag_applied_layers` is found in, as
    diffusers finds them. InputError where one is found in none, or is no regular expression."""
    if not any(unet.self_attentions):
        scale = float(request.pag_scale or 0)
        raise InputError(f"pag_scale is {scale:g}: this model has no self-attention before one that reads a text")
    layers: str | Sequence[str] = request.pag_applied_layers or PAG_LAYERS
    found: set[int] = set()
    for layer in [layers] if isinstance(layers, str) else layers:
        try:
            matches = [k for k, name in enumerate(unet.self_attentions) if name and re.search(layer, name)]
        except re.error:
            raise InputError(f"pag_applied_layers holds {layer!r}, which is no regular expression") from None
        if not matches:
            raise InputError(
                f"pag_applied_layers holds {layer!r}, which is in no name of a self-attention of this model: they are "
                f"like {max(unet.self_attentions)}"
            )
        found.update(matches)
    return tuple(sorted(found))
