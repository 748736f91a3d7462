"""A request against a model: defaults filled in, and everything checked that needs no work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastldm import checks, sizes
from fastldm import image as images
from fastldm.conditioning import encode as conditioning
from fastldm.errors import InputError
from fastldm.mask_crop import check_mask_crop
from fastldm.models.config import AutoencoderConfig, PixelResidualConfig, UNetConfig
from fastldm.models.families import Family
from fastldm.request import PER_PROMPT, Request, as_list, picture_seeds
from fastldm.runtime.controls import ControlSelection
from fastldm.runtime.guidance import apg_field, apg_of
from fastldm.runtime.read_picture import check_prior, check_prior_fields, check_projected, read_vectors
from fastldm.samplers.names import for_xl, is_cfg_pp

if TYPE_CHECKING:
    from fastldm.loading.spec import Spec
    from fastldm.sizes import Axis

_CFG_PP_SCALE = 0.6  # that of the paper's pictures, arXiv:2406.08070
_IMAGE_SCALE = 1.5  # of InstructPix2Pix, diffusers' default


def complete(
    request: Request,
    spec: Spec,
    vae: AutoencoderConfig,
    family: Family,
    ranges: Sequence[tuple[Axis, Axis]] = (),
) -> Request:
    """The request with every default of the model filled in, seeds drawn. InputError for what the model cannot run.

    ranges: the heights and widths of latents that the model runs with, where those are limited.
    """
    unet = spec.unet
    if not spec.conditioned:
        request = _without_text(request, unet)
    if request.prompt is None and request.prompt_embeds is None:
        raise InputError("prompt is None: give a text, a list of texts, or prompt_embeds")
    scored = unet.needs_added and unet.added_ids == 5
    conditioning.check(request, unet.needs_added, scored=scored, reads_pooled=unet.reads_pooled)
    if request.clip_skip and spec.text and spec.text[0].kind:
        raise InputError(
            f"clip_skip is {request.clip_skip}: this model's text encoder is {spec.text[0].kind}: leave it out"
        )
    check_mask_crop(request)
    for name in ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        embeds = getattr(request, name)
        if embeds is not None and embeds.device.type != "cpu":  # of others `conditioning.from_tensors` sees it
            checks.finite(name, embeds)
    if unet.inpaints and request.mask_image is None:
        raise InputError("this model is for inpainting: give it image and mask_image")
    image_scale = request.image_guidance_scale
    if unet.edits or unet.upscales:
        _check_reading(request, unet)
    if request.original_image is not None and not unet.reads_original:
        raise InputError("original_image was given: only DeepFloyd IF's super-resolution reads it, this model image")
    if unet.upscales and not unet.needs_class and request.noise_level is not None:
        raise InputError(f"noise_level is {request.noise_level}: this model enlarges a picture without noise")
    if spec.low_res is not None and (request.noise_level or 0) > spec.max_noise_level:
        name = "num_train_timesteps" if unet.needs_vector or unet.resizes else "max_noise_level"
        raise InputError(
            f"noise_level is {request.noise_level}: expected at most {spec.max_noise_level} for this model ({name!r})"
        )
    if unet.reads_depth:
        _check_depth(request, spec)
    elif request.depth_map is not None:
        raise InputError("depth_map was given: only models of depth to image read it, and this is another")
    if request.noise_level is not None and not (unet.upscales or unet.needs_vector):
        raise InputError(
            f"noise_level is {request.noise_level}: only models that enlarge a picture read it, and unCLIP"
        )
    if unet.edits:
        image_scale = _IMAGE_SCALE if image_scale is None else image_scale
    elif image_scale is not None:
        raise InputError(
            f"image_guidance_scale is {image_scale:g}: only InstructPix2Pix reads it, and this is another model"
        )
    start = request.image if not (unet.edits or unet.upscales) else request.original_image
    family = family.defaults(image=start is not None, mask=request.mask_image is not None)
    sampler = request.sampler or family.sampler
    sampler = for_xl(sampler) if sampler is not None and unet.needs_added else sampler
    cfg_pp = is_cfg_pp(sampler)
    reasons = {
        "this model reads the guidance scale itself": unet.needs_guidance,
        "guidance_rescale is above 0": request.guidance_rescale > 0,
        "this model has two guidance scales": unet.edits,
        "pag_scale is above 0": bool(request.pag_scale),
        "this model reads no text to be guided by": not spec.conditioned,
    }
    kinds = {f"sampler {sampler!r} is CFG++": cfg_pp, **reasons}
    kinds.pop("guidance_rescale is above 0")
    if apg_of(request) is not None and any(kinds.values()):
        reason = next(reason for reason, applies in kinds.items() if applies)
        raise InputError(
            f"{apg_field(request)}: projected guidance is of a prompt and a negative prompt alone, and {reason}"
        )
    kinds.pop("pag_scale is above 0")
    if request.use_original_formulation and any(kinds.values()):
        reason = next(reason for reason, applies in kinds.items() if applies)
        raise InputError(f"use_original_formulation is True: it is of classifier-free guidance, and {reason}")
    if cfg_pp and any(reasons.values()):
        reason = next(reason for reason, applies in reasons.items() if applies)
        raise InputError(f"sampler {sampler!r} is CFG++, and {reason}: take a sampler without CFG++")
    scale = _CFG_PP_SCALE if cfg_pp else max(0.0, family.guidance_scale - request.use_original_formulation)
    strength = 1.0 if start is None else family.strength
    width, height = _size(request, spec, vae)
    if ranges:
        sizes.check_size(ranges, vae.factor, width, height)
    request = request.replace(seed=picture_seeds(request) if request.generator is None else None)
    return request.replace(
        class_labels=_class_labels(request, unet),
        height=height,
        width=width,
        num_inference_steps=request.num_inference_steps or family.num_inference_steps,
        guidance_scale=scale if request.guidance_scale is None else request.guidance_scale,
        sampler=sampler,
        image_guidance_scale=image_scale,
        strength=strength if request.strength is None else request.strength,
        noise_level=family.noise_level if spec.low_res and request.noise_level is None else request.noise_level,
    )


def check(request: Request, spec: Spec, prior: bool = False) -> None:
    """InputError for what a model cannot run, as far as its configs alone say: before any weights are read. prior:
    whether one will be attached."""
    check_prior_fields(request, prior or spec.prior is not None)
    if spec.follows:
        request = of_first(request, spec)
    if spec.projection is not None:
        check_projected(request)
    if spec.unet.reads_image_embeds:
        request = read_vectors(request, spec.unet, prior)
    elif spec.vision is not None:  # its encoder prepares pictures
        return
    elif spec.prior is not None:
        check_prior(request)
    complete(request, spec, spec.vae, spec.family)


def of_first(request: Request, spec: Spec) -> Request:
    """Of a model whose own networks go on with its pictures, which are of one size: the request of the first of them.
    InputError for what that excludes."""
    for name, own in zip(("width", "height"), spec.default_size, strict=True):
        if getattr(request, name) not in (None, own):
            raise InputError(f"{name} is {getattr(request, name)}: expected {own}, the size of this model's pictures")
    for name in ("denoising_start", "denoising_end", "hires_scale", "hires_height", "hires_width"):
        if getattr(request, name) is not None:
            raise InputError(f"{name} was given, and networks of its own enlarge this model's pictures: leave it out")
    return request.replace(width=None, height=None)


def _without_text(request: Request, unet: UNetConfig) -> Request:
    """A request of a model that reads no text, with empty ones. InputError for others, and for guidance by them."""
    for name in PER_PROMPT:
        value = getattr(request, name)
        if value is not None and (not isinstance(value, str | tuple) or any(as_list(value))):
            raise InputError(f"{name} is {checks.show(value)}: this model reads no text, leave it out")
    if request.guidance_scale is not None and request.guidance_scale > 1:
        raise InputError(f"guidance_scale is {request.guidance_scale:g}: this model reads no text to be guided by")
    if request.candidates is not None:
        raise InputError(f"candidates is {request.candidates}: they are ranked by a prompt, and this model reads none")
    if request.prompt is not None or request.image is None or not unet.upscales:
        return request.replace(prompt=request.prompt or "")
    count = images.measure(request.image)[0]
    return request.replace(prompt="" if count == 1 else ("",) * count)


def _class_labels(request: Request, unet: UNetConfig) -> tuple[int, ...] | None:
    """A class for each image of a request whose seeds are drawn; None of models that read none. InputError for classes
    that there are not, and where there are none to be read."""
    labels = request.class_labels
    if not unet.needs_label:
        if labels is not None:
            raise InputError(f"class_labels is {checks.show(labels)}: only class-conditional models read it")
        return None
    classes = int(unet.num_class_embeds or 0)
    if labels is None:  # of a caller's generator as in diffusers, which draws them from the global one
        sources = [None] * request.batch if request.generator is not None else picture_seeds(request)
        generators = (None if seed is None else torch.Generator().manual_seed(seed) for seed in sources)
        return tuple(int(torch.randint(classes, (1,), generator=generator)) for generator in generators)
    given = (labels,) * request.batch if isinstance(labels, int) else tuple(labels)
    if len(given) != request.batch:
        raise InputError(f"class_labels has {len(given)} classes for {request.batch} images: give one, or one each")
    if max(given) >= classes:
        raise InputError(f"class_labels is {checks.show(labels)}: expected classes from 0 to {classes - 1}")
    return given


def sample_request(
    spec: Spec, height: int | None = None, width: int | None = None, prompt: str = "a red apple", prior: bool = False
) -> dict[str, Any]:
    """Fields of `Request` for an image that nobody has asked for, to warm up with, to measure or to compare: what the
    model cannot do without, and a prompt if it reads one. height, width: in pixels; by default the model's own.
    prior: whether one is attached, which makes vectors of prompts."""
    own_width, own_height = spec.default_size
    needed = needed_images(spec, height or own_height, width or own_width, prior)
    return {"prompt": prompt if spec.text or prior else "", **needed}


def sampled(spec: Spec, prompt: str | Sequence[str] | Request | None, options: Mapping[str, Any]) -> Request:
    """A request as of `Request.of`; one that is not whole already has all that the model cannot do without."""
    if isinstance(prompt, Request):
        return Request.of(prompt, dict(options))
    fields = {**sample_request(spec, options.get("height"), options.get("width")), **options}
    fields |= {} if prompt is None else {"prompt": prompt}
    return Request.of(fields.pop("prompt"), fields)


def needed_images(spec: Spec, height: int, width: int, prior: bool = False) -> dict[str, Any]:
    """The pictures that a model cannot do without, grey, for an image of this size in pixels, and no prompt where it
    reads a picture in its place: fields of `Request`, for a trial. prior: whether one makes what it reads."""
    grey: Any = np.full((height // spec.enlarges, width // spec.enlarges, 3), 0.5, dtype=np.float32)
    if spec.picture_multiple > 1:  # of a tensor it is not asked for
        grey = torch.from_numpy(grey).permute(2, 0, 1)[None]
    if spec.unet.reads_image_embeds:
        vector = torch.zeros(1, spec.unet.text_width)
        read = {} if prior else {"image_embeds": vector, "negative_image_embeds": vector, "prompt": ""}
        return {**read, "image": grey, "mask_image": grey[..., 0] * 2} if spec.unet.inpaints else read
    if spec.unet.pools_text and not spec.text:
        states = torch.zeros(1, spec.window, spec.unet.text_width)
        return {"image": grey, "prompt": None, "prompt_embeds": states, "negative_prompt_embeds": states}
    if spec.vision and (spec.projection is not None or not spec.text):
        return {"image": grey, "prompt": ""}
    if spec.unet.edits or spec.unet.upscales or spec.vision:
        return {"image": grey}
    if spec.unet.reads_depth:
        return {"image": grey, "depth_map": torch.linspace(0, 1, width).expand(1, height, width)}
    return {"image": grey, "mask_image": grey[..., 0] * 2, "strength": 1.0} if spec.unet.inpaints else {}


def start_latents(request: Request, channels: int) -> Tensor | None:
    """Latents (n, C, h, w) in place of pictures of `image`; None where it holds pictures."""
    return None if request.image is None else images.load_latents(request.image, channels)


def _check_depth(request: Request, spec: Spec) -> None:
    """InputError for what depth to image lacks, or does not read."""
    if request.image is None:
        raise InputError("this model reads the depth of an image: give it image")
    if request.mask_image is not None:
        raise InputError("mask_image was given: this model reads depth, and inpainting needs another model")
    if request.depth_map is None and spec.checkpoint.depth is None:
        raise InputError("depth_map is None, and this checkpoint has no depth_estimator: give depth_map")
    if request.depth_map is None and images.load_latents(request.image, spec.vae.latent_channels) is not None:
        raise InputError("image is latents, whose depth cannot be estimated: give depth_map")
    count = 1 if request.depth_map is None else len(images.load_depth(request.depth_map))
    if request.batch % count:
        raise InputError(f"depth_map holds {count} maps for a batch of {request.batch}: give one, or one each")


def _check_reading(request: Request, unet: UNetConfig) -> None:
    """InputError for what a model does not read that edits an image, or enlarges one, and starts from noise."""
    verb = "edits" if unet.edits else "enlarges"
    if request.image is None:
        also = ", and prompt as what to do with it" if unet.edits else ""
        raise InputError(f"this model {verb} an image: give it image{also}")
    if request.pag_scale and unet.edits:
        raise InputError(f"pag_scale is {request.pag_scale:g}: this model's guidance has three rows of its own")
    if request.original_image is not None:
        if request.padding_mask_crop is not None:
            raise InputError("padding_mask_crop was given: this model repaints all of original_image, leave it out")
        return
    if request.mask_image is not None:
        instead = "give original_image, which it changes" if unet.reads_original else "inpainting needs another model"
        raise InputError(f"mask_image was given: this model {verb} all of image, and {instead}")
    if request.denoising_start is not None and request.latents is None:
        raise InputError(
            f"denoising_start was given without latents, with which steps go on: image is what this model {verb}"
        )
    if request.strength not in (None, 1.0):
        how = ", and how much is image_guidance_scale" if unet.edits else ""
        raise InputError(f"strength is {request.strength:g}: this model {verb} image from noise alone{how}")


def _size(request: Request, spec: Spec, vae: AutoencoderConfig) -> tuple[int, int]:
    """(width, height) in pixels: as asked for, or as of latents and image, or the model's own."""
    factor, latents = vae.factor, request.latents
    height, width = (size * factor for size in spec.unet.sample_size)
    measured = None if request.image is None else _measured(request, spec, vae)
    controls = request.control_image if isinstance(request.control_image, ControlSelection) else None
    if latents is not None:
        if tuple(latents.shape[:2]) != (request.batch, vae.latent_channels):
            raise InputError(
                f"latents have shape {tuple(latents.shape)}: expected ({request.batch}, {vae.latent_channels}, "
                f"height / {factor}, width / {factor})"
            )
        if not torch.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity before the first step: give finite start noise")
        height, width = (int(n) * factor for n in latents.shape[2:])
    elif (
        measured is not None
        and (
            request.mask_image is None or spec.fits_pictures or start_latents(request, vae.latent_channels) is not None
        )
        and not (spec.unet.edits and spec.unet.needs_added)  # as in diffusers
        and not spec.unet.resizes
    ):
        height, width = measured
    elif controls is not None and measured is None:
        height, width = controls.size(factor)
    elif request.original_image is not None:
        _check_counts(request, "original_image")
        height, width = fitted(request.original_image, "original_image", (height, width))
    if measured is not None and spec.enlarges > 1:
        height, width = measured  # latents have to be for them
    height, width = request.height or height, request.width or width
    if controls is not None and (height % controls.multiple or width % controls.multiple):
        raise InputError(
            f"width and height are {width}x{height}: expected multiples of {controls.multiple} pixels for this "
            "request's T2I-Adapters"
        )
    multiple = factor**2 if spec.unet.reads_image_embeds else factor  # which diffusers' Kandinsky makes of others
    for name, value in (("height", height), ("width", width)):
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise InputError(
                f"{name} is {value}: expected a multiple of {multiple} pixels for this model, such as {nearest}"
            )
    if latents is not None and (height, width) != tuple(int(n) * factor for n in latents.shape[2:]):
        raise InputError(
            f"latents are for {latents.shape[3] * factor}x{latents.shape[2] * factor} pixels, not {width}x{height}"
        )
    return width, height


def _measured(request: Request, spec: Spec, vae: AutoencoderConfig) -> tuple[int, int]:
    """(height, width) in pixels that `image` asks for; picture and mask are looked at, but not decoded yet."""
    factor = vae.factor
    start = start_latents(request, vae.latent_channels)
    if start is not None:
        if spec.unet.upscales and not spec.unet.enlarges_latents:
            raise InputError("image is latents: a model that enlarges a picture needs its pixels")
        count, height, width = start.shape[0], start.shape[2] * factor, start.shape[3] * factor
        if spec.enlarges == 1 and (request.height or height, request.width or width) != (height, width):
            raise InputError(
                f"image is latents for {width}x{height} pixels, not {request.width or width}x{request.height or height}"
            )
        if spec.unet.inpaints:
            raise InputError("image is latents: this model for inpainting needs pixels, to leave out what is masked")
    else:
        count, height, width = images.measure(request.image)
    _check_counts(request, "image", count)
    if request.mask_image is not None:
        _check_counts(request, "mask_image", images.measure(request.mask_image, "mask_image", mask=True)[0])
    if spec.fits_pictures:
        return fitted(request.image, "image", spec.unet.sample_size)
    if isinstance(vae, PixelResidualConfig):
        factor //= vae.upscale_factor  # the small picture's pixels
    if spec.picture_multiple > 1:  # of a tensor as diffusers, which takes it as it is
        factor = spec.unet.stride if isinstance(request.image, Tensor) else spec.picture_multiple
    if spec.unet.reads_image_embeds:
        factor *= factor
    smallest = factor
    if spec.unet.enlarges_latents and spec.unet.even_sizes:
        # Latents are halved evenly, to no less than two, which a blur's reflected border needs.
        factor *= max(1, spec.unet.stride // spec.enlarges)
        smallest = 2 * factor
        if start is not None and (height % factor or width % factor or min(height, width) < smallest):
            raise InputError(
                f"image is latents of {start.shape[3]}x{start.shape[2]}: expected multiples of {factor // vae.factor} "
                f"for this model, at least {smallest // vae.factor}"
            )
    size = max(height - height % factor, smallest), max(width - width % factor, smallest)
    if spec.enlarges == 1:
        return size
    enlarged = size[0] * spec.enlarges, size[1] * spec.enlarges
    if (request.height or enlarged[0], request.width or enlarged[1]) != enlarged:
        raise InputError(
            f"width and height are {request.width or enlarged[1]}x{request.height or enlarged[0]}: this model makes "
            f"{spec.enlarges} times the picture, {enlarged[1]}x{enlarged[0]}: leave them out, or resize image"
        )
    return enlarged


def _check_counts(request: Request, name: str, count: int | None = None) -> None:
    """InputError unless a field's pictures, which may be counted already, are one each, or divide the batch."""
    count = images.measure(getattr(request, name), name)[0] if count is None else count
    if count > 1 and request.candidates is not None:
        raise InputError(f"{name} holds {count} pictures, and there are candidates: give one picture")
    if request.batch % count:
        raise InputError(
            f"{name} holds {count} pictures for a batch of {request.batch}: give one, or one each, or a number that "
            "divides them"
        )


def fitted(source: Any, name: str, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that a picture to start from gets, see `Spec.fits_pictures`: of arrays and tensors their own."""
    _, height, width = images.measure(source, name)
    if any(
        isinstance(each, np.ndarray | Tensor) for each in (source if isinstance(source, list | tuple) else [source])
    ):
        return height, width
    side, shape = min(size), width / height
    return (side, round(side / 8 * shape) * 8) if shape >= 1 else (round(side / 8 / shape) * 8, side)
