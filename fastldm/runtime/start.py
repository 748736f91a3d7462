"""Where the denoising loop starts: images and masks encoded, and all noise drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Resampling
from torch import Tensor

from fastldm import image as images
from fastldm.conditioning.depth import normalised
from fastldm.device import send
from fastldm.errors import InputError
from fastldm.mask_crop import mask_crop
from fastldm.models.config import VAEConfig
from fastldm.models.latents import scaled
from fastldm.models.vae import PixelResidual
from fastldm.request import Request, picture_seeds
from fastldm.runtime.complete import start_latents
from fastldm.runtime.denoise import Guidance, Inpainting, Run
from fastldm.runtime.noise import add_noise, draw_brownian_noise, draw_step_noise, randn
from fastldm.runtime.read_picture import PictureRead, noise_vectors
from fastldm.samplers.table import StepTable

if TYPE_CHECKING:
    from fastldm.loading.spec import Spec
    from fastldm.models.interfaces import Autoencoder
    from fastldm.runtime.prior import PriorStages


def start_run(
    request: Request,
    table: StepTable,
    guidance: Guidance,
    vae: Autoencoder,
    spec: Spec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    one_by_one: bool = False,
    edit_scale: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
    prior: PriorStages | None = None,
) -> Run:
    """The run of a completed request, all noise drawn, in diffusers' order; not conditioned yet.

    spec: of the model, for what its U-Net reads behind the latents. dtype: the networks'. one_by_one: encode each image
    of the request by itself. edit_scale: multiplies the latents of an image to edit. generators: of the request's
    seeds, in which state earlier stages of a cascade have left them. prior: of unCLIP that has made the
    vectors in `image_embeds`.
    """

    def encode(inputs: Tensor, size: Sequence[int] | None = None) -> Tensor:
        batches = inputs.split(1) if one_by_one else [inputs]
        return scaled(vae.config, _encode(vae, batches, dtype, lambda count: draw(count, size=size)))

    height, width = int(request.height or 0), int(request.width or 0)
    factor, channels = vae.config.factor, vae.config.latent_channels
    shape = (request.batch, channels, height // factor, width // factor)
    # Noise of a seed is float32 on every device and in every precision; a caller's generator draws in the
    # model's, as in diffusers.
    sources: Any = request.generator
    noise_dtype = dtype if sources is not None else torch.float32
    if sources is None:
        sources = [*generators][: request.batch] if generators else None  # a prior's are of negatives too
        sources = sources or [torch.Generator().manual_seed(s) for s in picture_seeds(request)]

    def draw(count: int = request.batch, channels: int = channels, size: Sequence[int] | None = None) -> Tensor:
        first = sources[:count] if isinstance(sources, Sequence) else sources
        return randn((count, channels, *(size or shape[2:])), first, noise_dtype, device).float()  # (count, C, h, w)

    def each(inputs: Tensor, count: int = request.batch) -> Tensor:
        """n images as so many, in turn: the first, ..., the last, the first, ...; with IF the first of all, ..., the
        last."""
        if unet.reads_image_embeds and len(inputs) == request.count:  # Kandinsky's, each of a vector
            inputs = inputs.repeat_interleave(request.num_images_per_prompt, 0)
        if spec.fits_pictures:
            return inputs.repeat_interleave(count // len(inputs), 0)
        return inputs.repeat(count // len(inputs), 1, 1, 1)

    # Each image's own generator draws of the posterior what it would draw for it alone. As in diffusers, one
    # generator for all draws once for each image of `image`, and a list of them, for inpainting, likewise.
    alone = request.generator is None or (request.mask_image is None and isinstance(sources, Sequence))
    prepared = each if alone else lambda inputs: inputs

    # Inpainting at full strength starts from noise alone, so that nothing of what is repainted shines through;
    # so it does from the caller's own noise, as in diffusers.
    # With IF what is not repainted stays as it is, without noise, from the start on.
    stays = request.mask_image is not None and spec.fits_pictures
    full = request.strength == 1 or request.latents is not None
    from_noise = request.mask_image is not None and full and not stays
    crop = mask_crop(request)
    init = mask = extra = repainted = None
    unet = spec.unet
    start = start_latents(request, channels)
    name = "original_image" if unet.upscales else "image"
    picture = getattr(request, name)  # that steps start from
    filtered = Resampling.BICUBIC if spec.fits_pictures else Resampling.LANCZOS
    vectors = vector_noise = None
    pictures = request.image_embeds
    if prior is not None and prior.loaded.normalizer is not None:
        vectors, normalizer = send(pictures, device, torch.float32), prior.loaded.normalizer
    elif unet.needs_projection:  # which reads them as they are
        made = isinstance(pictures, PictureRead)
        vectors = pictures.embeds(dtype, device, one_by_one) if made else send(pictures, device, dtype)
        vectors = vectors.repeat_interleave(request.batch // len(vectors), 0)
    elif isinstance(pictures, PictureRead) and pictures.encoder.normalizer is not None:
        vectors, normalizer = pictures.embeds(dtype, device, one_by_one), pictures.encoder.normalizer
        if request.generator is None:  # as each picture would be drawn for alone
            vectors = vectors.repeat_interleave(request.batch // len(vectors), 0)
    if vectors is not None and spec.low_res is not None and normalizer is not None:
        first = sources[: len(vectors)] if isinstance(sources, Sequence) else sources
        vector_noise = randn(vectors.shape, first, noise_dtype, device).float()
        vectors = noise_vectors(normalizer, vectors, vector_noise, int(request.noise_level or 0), spec.low_res)
        vectors, vector_noise = (
            x.repeat_interleave(request.batch // len(x), 0) for x in (vectors.to(dtype), vector_noise)
        )
    own_noise = draw() if unet.resizes and request.latents is None else None  # before that of the picture
    if unet.upscales:  # which starts from noise alone, drawn after that of the picture
        small_size = height // spec.enlarges, width // spec.enlarges
        resample = Resampling.LANCZOS if spec.picture_multiple > 1 else Resampling.BICUBIC
        if start is not None:
            small = send(start, device)
        elif unet.resizes:
            small = send(images.load_image(request.image), device)
            filtering = unet.resizes_by or ("aligned" if unet.pools_text else "bilinear")
            small = torch.nn.functional.interpolate(small, (height, width), **_FILTERS[filtering])
            small = small.repeat_interleave(request.batch // len(small), 0)
        else:
            small = send(images.load_image(request.image, small_size, resample=resample), device)
        if unet.enlarges_latents:
            if start is None:
                small = each(small) if request.generator is None else small
                small = encode(small, [side // factor for side in small_size])
            small = torch.nn.functional.interpolate(small, scale_factor=spec.enlarges, mode="nearest")
        if isinstance(vae, PixelResidual) and not unet.resizes:
            small = vae.base(small)
        if spec.low_res is not None:
            small = each(small) if request.generator is None else small
            small = add_noise(spec.low_res, small, draw(len(small), 3), int(request.noise_level or 0))
        extra = each(small).to(dtype)
    if unet.reads_depth:
        if request.depth_map is None and spec.checkpoint.depth is not None:
            depth = spec.checkpoint.depth(images.load_pictures(request.image), device)
        else:
            depth = send(images.load_depth(request.depth_map), device)
        extra = each(normalised(depth, (shape[2], shape[3]))).to(dtype)
    noised = request.latents is not None and request.mask_image is None
    # Steps that go on where others ended add no noise; where a mask needs some, it is drawn.
    goes_on = request.denoising_start is not None
    if unet.edits:
        edited = None if start is None else send(start, device)
        if edited is None:
            pixels = send(images.load_image(request.image, (height, width)), device)
            edited = _encode(vae, pixels.split(1) if one_by_one else [pixels], dtype) * edit_scale
        edited = each(edited)
        extra = torch.cat((torch.zeros_like(edited), edited, edited)).to(dtype)  # of each branch
    elif start is not None and not unet.upscales:
        init = each(send(start, device))
    elif picture is not None and not noised:
        picture = picture if crop is None else crop.cut(crop.image)
        resample = Resampling.BICUBIC if unet.reads_image_embeds else filtered
        source = prepared(send(images.load_image(picture, (height, width), name=name, resample=resample), device))
        if goes_on or not (unet.inpaints and from_noise) or unet.reads_image_embeds:
            init = each(encode(source))
    if request.latents is not None:
        noise = send(request.latents, device, torch.float32)
    elif init is not None and goes_on and request.mask_image is None:
        noise = init
    else:
        noise = draw() if own_noise is None else own_noise
    if request.mask_image is not None:
        white = request.mask_image if crop is None else crop.cut(crop.mask)
        full_mask = prepared(send(images.load_mask(white, (height, width), resample=filtered), device))
        mask = each(torch.nn.functional.interpolate(full_mask, shape[2:]))  # (B, 1, h, w)
        if isinstance(vae.config, VAEConfig) and vae.config.conditioned:
            if start is not None:
                raise InputError("image is latents: an asymmetric VAE reads the pixels of what is repainted")
            repainted = each(source).to(dtype), each(full_mask).to(dtype)
        if unet.reads_image_embeds and init is not None:  # Kandinsky's, which reads what stays, and is blended too
            mask = _grown(mask)
            extra = torch.cat([init * (1 - mask), 1 - mask], dim=1).to(dtype)
        elif start is None:
            counts = sorted((len(source), len(full_mask)))
            count = request.batch if counts[1] % counts[0] else counts[1]
            if unet.inpaints:
                masked = each(source, count) * (each(full_mask, count) < 0.5)
                extra = torch.cat([mask, each(encode(masked))], dim=1).to(dtype)
            elif request.generator is not None and vae.config.moments:
                draw(count)  # diffusers encodes masked images for 4-channel models too: so its generator stays in step
    motion = table.noise_seed if request.noise_sampler_seed is None else request.noise_sampler_seed
    if motion is None:
        step_noise = draw_step_noise(table, shape, sources, noise_dtype, device)
    elif table.spans:
        step_noise = draw_brownian_noise(table, shape, motion, device)
    else:
        raise InputError(f"noise_sampler_seed is of the sampler dpm++ sde, and this is {table.sampler!r}: leave it out")
    r, s = table.start
    if goes_on or (noised and picture is not None and not unet.edits):
        x = noise if init is None or noised else init  # noise and all
    elif init is None or from_noise:
        x = table.init_noise_sigma * noise
    else:
        x = r * init + s * noise
    if stays and mask is not None and init is not None:
        x = (1 - mask) * init + mask * x
    blended = mask is not None and init is not None and (not unet.inpaints or unet.reads_image_embeds)
    inpainting = Inpainting(mask, init, noise) if blended else None  # type: ignore[arg-type]
    run = Run(table, x, step_noise, guidance, inpainting, extra, dtype, noise_level=int(request.noise_level or 0))
    run.generators = sources if request.generator is None else None
    run.repainted, run.vectors, run.vector_noise = repainted, vectors, vector_noise
    if request.class_labels is not None:  # a tuple of a completed request
        run.labels = send(torch.tensor(request.class_labels), device)
    return run


_FILTERS: dict[str, dict[str, Any]] = {
    "aligned": {"mode": "bilinear", "align_corners": True},  # IF's
    "bilinear": {"mode": "bilinear", "align_corners": False},  # GLIDE's
    "bicubic": {"mode": "bicubic", "align_corners": False, "antialias": True},
}
"""By which a small picture is made as large as the image: arguments of PyTorch's `interpolate`, as in diffusers."""


def _grown(mask: Tensor) -> Tensor:
    """A mask (B, 1, h, w) with the latents around: those beside, below, above, and two of the four at corners, as of
    diffusers' `prepare_mask`."""
    height, width = mask.shape[2:]
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    around = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2), (0, 0), (2, 2))
    return torch.stack([padded[..., y : y + height, x : x + width] for y, x in around]).amax(0)


def _encode(
    vae: Autoencoder, batches: Sequence[Tensor], dtype: torch.dtype, draw: Callable[[int], Tensor] | None = None
) -> Tensor:
    """Images (n, 3, H, W) in -1..1, in one call for each batch of them, to latents (n, C, h, w) in float32, not scaled:
    drawn from the posterior of a KL autoencoder, or without draw its mode."""
    encoded = torch.cat([vae.encode(images.to(dtype)) for images in batches]).float()
    if vae.config.moments:
        mean, log_variance = encoded.chunk(2, dim=1)
        encoded = mean if draw is None else mean + (log_variance.clamp(-30, 20) / 2).exp() * draw(len(mean))
    return encoded
