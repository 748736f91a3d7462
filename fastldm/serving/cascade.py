"""Cascades: several stages that make one image, each a request of its own to a model.

    base, to 0.8 of the noise  ->  the refiner, from there              the same latents go on
    64x64                      ->  the same model at 128x128            latents or pixels, enlarged and noised again
    the default model, 64x64   ->  its upscaler, 128x128                pixels, which that reads
    Karlo's decoder, 64x64     ->  super-resolution, 256x256            pixels, which that reads
                               ->  another network for its last step    the same pixels go on
    any of those               ->  upscalers that are attached          pixels, or latents, which those read

A stage is a model, a request of that model, and how it takes what the stage before it made. It is queued with the other
requests of its model and size, so that cascades and requests of many users share the batches of each stage; between
two stages nothing leaves the device but what asks for pixels. The whole is one `Generation`, which moves from bucket to
bucket (bucket.py): its progress, previews, deadline, seed and times go across.

To add a kind of cascade, append a `CascadeStage` in `stages_of`: its request holds, in place of what the stage before
will make, a tensor of the same shape that takes no memory (`_placeholder`), so that all is checked, and refused, before
anything runs; `take` turns what that stage made, as its request's output_type says, into fields of this request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastldm.errors import InputError
from fastldm.loading.spec import Spec
from fastldm.models.config import AutoencoderConfig
from fastldm.request import Request
from fastldm.runtime import enlarge
from fastldm.runtime.complete import fitted, of_first
from fastldm.runtime.prior import PriorStages
from fastldm.runtime.stages import OF_FOLLOWS, Stages

SWITCH_AT = 0.8  # where the refiner goes on, as in diffusers' documentation
_HIRES_STRENGTH = 0.7


AnyStages = Stages | PriorStages
"""What a session's worker runs."""
S = TypeVar("S", bound=AnyStages, covariant=True)


@dataclass(frozen=True)
class CascadeModel(Generic[S]):
    """A model that stages run on."""

    stages: S
    queue: Any
    """The session's buckets."""
    follows: tuple[CascadeModel[Stages], ...] = ()
    """Those that go on with its pictures: see `Spec.follows`."""


def _as_pictures(made: Tensor) -> Mapping[str, Any]:
    return {"image": made}


@dataclass(frozen=True)
class CascadeStage:
    """A stage of a cascade."""

    model: CascadeModel[AnyStages]
    request: Request
    """Completed for its model; a placeholder stands for what the stage before makes."""
    take: Callable[[Tensor], Mapping[str, Any]] = _as_pictures
    """From what the stage before made to fields of `request`."""
    keeps: tuple[str, ...] = ()
    """Fields of `request` that are as the stage before had them."""
    role: str = ""
    """"refiner" or "upscaler" of a model that the base's requests go on with."""
    reads_text: bool = False
    """Whether its text states are those that the stage before read."""
    rows: int = 0
    """Of its table, for who waits."""


def complete(request: Request, base: CascadeModel[Stages], refiner: CascadeModel[Stages] | None) -> Request:
    """A request completed for the model that it was sent to, and where its stages meet. InputError for what they do not
    take."""
    if base.follows:
        return _complete_followed(request, base, refiner)
    completed = base.stages.complete(request)
    switch = request.refiner_switch_at
    if switch is None:
        switch = 1.0 if refiner is None or request.denoising_end is not None else SWITCH_AT
    elif refiner is None and switch < 1:
        raise InputError("refiner_switch_at was given, and no refiner is attached: attach_refiner attaches one")
    elif request.denoising_end is not None and switch < 1:
        raise InputError("refiner_switch_at and denoising_end were both given: give one of them")
    if switch < 1 and request.padding_mask_crop is not None:
        raise InputError("padding_mask_crop was given, which no refiner goes on with: set refiner_switch_at to 1")
    completed = completed.replace(refiner_switch_at=switch if switch < 1 else None)
    if enlarge.wanted(request) is None:
        return completed
    return completed.replace(
        hires_strength=_HIRES_STRENGTH if completed.hires_strength is None else completed.hires_strength,
        hires_steps=completed.hires_steps or completed.num_inference_steps,
        hires_upscaler=completed.hires_upscaler or "Latent",
    )


def _complete_followed(request: Request, base: CascadeModel[Stages], refiner: CascadeModel[Stages] | None) -> Request:
    """Of a model whose pictures go on through others, and are of one size. InputError for what that excludes."""
    width, height = base.stages.spec.default_size
    if refiner is not None and request.refiner_switch_at != 1:
        raise InputError("a refiner is attached, and networks of its own enlarge this model's pictures: detach_refiner")
    completed = base.stages.complete(of_first(request, base.stages.spec))
    steps = request.super_res_num_inference_steps
    first = base.follows[0].stages
    completed = completed.replace(
        refiner_switch_at=None, super_res_num_inference_steps=steps or first.family.num_inference_steps
    )
    latents = request.super_res_latents
    if latents is not None and latents.shape != (shape := (completed.batch, first.latent_channels, height, width)):
        raise InputError(f"super_res_latents have shape {tuple(latents.shape)}: expected {shape}")
    return completed.replace(width=width, height=height)


def stages_of(
    completed: Request,
    sampler: str | None,
    base: CascadeModel[Stages],
    refiner: CascadeModel[Stages] | None,
    enlarger: CascadeModel[Stages] | None = None,
    several: bool = False,
    prior: CascadeModel[PriorStages] | None = None,
    upscalers: Sequence[CascadeModel[Stages]] = (),
) -> tuple[CascadeStage, ...]:
    """The stages of a request that `complete` completed: one, as a rule. sampler: what was asked for. enlarger: of one
    that `is_enlarged`. several: whether it is a part of several. prior: that of the model. upscalers: those that
    enlarge the images, one after the other.

    InputError for what a model of them cannot run.
    """
    upscaler, switch = enlarge.wanted(completed), completed.refiner_switch_at
    stages = [CascadeStage(base, completed.replace(**_OFF))]
    if base.follows:
        width, height = base.stages.spec.own_size
        own = stages[0].request.replace(width=width, height=height, output_type="pt", **dict.fromkeys(OF_FOLLOWS))
        stages = [CascadeStage(base, own)]
    if prior is not None and completed.image_embeds is None:
        if base.stages.unet.config.reads_image_embeds and (upscaler is not None or switch is not None):
            name = "a high-resolution pass" if upscaler is not None else "a refiner"
            raise InputError(f"{name} was asked for, and the vectors that a prior makes are of one stage: leave it out")
        stages = _of_prior(stages[0].request, base, prior)
    if upscaler is not None:
        first = stages.pop()
        stages.append(replace(first, request=first.request.replace(output_type=upscaler.reads)))
        stages.append(_hires(completed, first.request, base, upscaler))
    stages += _following(completed, base)
    if enlarger is not None:
        stages = _enlarged(stages[0].request, base, enlarger)
    if switch is not None:
        assert refiner is not None
        last = stages.pop()
        cut = last.request.replace(denoising_end=switch, output_type="latent")
        stages.append(CascadeStage(base, cut, last.take))
        stages.append(_refiner(completed, sampler, cut, refiner))
    for model, options in zip(upscalers, _options_of(completed, len(upscalers)), strict=True):
        stages[-1:] = _upscaled(stages[-1], completed, model, options)
    if len(stages) == 1 and not several:  # whose table is made when it starts
        return (CascadeStage(base, stages[0].request, rows=int(completed.num_inference_steps or 1)),)
    return tuple(replace(stage, rows=len(stage.model.stages.table(stage.request))) for stage in stages)


def _of_prior(own: Request, base: CascadeModel[Stages], prior: CascadeModel[PriorStages]) -> list[CascadeStage]:
    """The vectors of pictures of the prompts, and the images of those."""
    vectors = prior.stages.request_of(own)
    width, batch = prior.stages.model.config.out_dim, own.batch
    made = {name: _placeholder(batch, width) for name in prior.stages.fields_made}
    images = CascadeStage(
        base, base.stages.of_vectors(own).replace(**made), lambda vectors: prior.stages.fields(vectors, batch)
    )
    return [CascadeStage(prior, vectors), images]


def is_enlarged(completed: Request, base: Stages) -> bool:
    """Whether a request's images are made at the model's own size, and enlarged by another model: text to image, of
    just that other's size."""
    others = ("image", "latents", "denoising_start", "denoising_end", "refiner_switch_at", *_OF_HIRES)
    return (
        (completed.width, completed.height) == base.enlarged_size
        and all(getattr(completed, name) is None for name in others)
        and completed.output_type != "latent"
    )


def _enlarged(completed: Request, base: CascadeModel[Stages], enlarger: CascadeModel[Stages]) -> list[CascadeStage]:
    """The model's own size, and what enlarges its pictures, which reads no text."""
    width, height = base.stages.spec.default_size
    small = completed.replace(width=width, height=height, output_type="pt")
    large = _of_pictures(completed, width, height)
    return [CascadeStage(base, small), CascadeStage(enlarger, enlarger.stages.complete(large))]


def _of_pictures(completed: Request, width: int, height: int) -> Request:
    """A request of a model that reads no text, but the pictures that the stage before makes."""
    return Request(
        image=_placeholder(completed.batch, 3, height, width),
        seed=completed.seed,
        generator=completed.generator,
        output_type=completed.output_type,
    )


def _following(completed: Request, base: CascadeModel[Stages]) -> list[CascadeStage]:
    """The models that go on with the pictures of one: the first enlarges them, and each of the rest takes the last step
    of the one before, with the same latents, and no noise added."""
    if not base.follows:
        return []
    first, *rest = base.follows
    trained = first.stages.schedule.num_train_timesteps
    request = _of_pictures(completed, *base.stages.spec.own_size).replace(
        num_inference_steps=completed.super_res_num_inference_steps, latents=completed.super_res_latents
    )
    stages = [CascadeStage(first, first.stages.complete(request))]
    for model in rest:
        last = stages.pop()
        start = float(last.model.stages.table(last.request).timesteps[-2])  # of the step that is its last one
        cut = 1 - start / trained
        stages.append(replace(last, request=last.request.replace(denoising_end=cut, output_type="latent")))
        request = request.replace(latents=_latents(last.request, model.stages), denoising_start=cut)
        stages.append(CascadeStage(model, model.stages.complete(request), _as_latents, keeps=("image",)))
    return stages


def _rounded(made: Tensor) -> Mapping[str, Any]:
    """Pictures in whole bytes, as GLIDE's second stage reads them."""
    return {"image": (made * 255).round() / 255}


def _as_latents(made: Tensor) -> Mapping[str, Any]:
    """What the stage before made, of which a stage goes on."""
    return {"latents": made}


_OF_HIRES = ("hires_scale", "hires_width", "hires_height", "hires_strength", "hires_steps", "hires_upscaler")
_OFF = dict.fromkeys(("refiner_switch_at", "upscaler_options", *_OF_HIRES))


def _placeholder(*shape: int) -> Tensor:
    """In place of a tensor that is not there yet."""
    return torch.zeros(()).expand(shape)


def _latents(request: Request, stages: Stages) -> Tensor:
    factor = stages.vae.config.factor
    size = int(request.height or 0) // factor, int(request.width or 0) // factor
    return _placeholder(request.batch, stages.latent_channels, *size)


def _hires(completed: Request, first: Request, base: CascadeModel[Stages], upscaler: enlarge.Upscaler) -> CascadeStage:
    """The same model once more, at a larger size, from what the first stage made."""
    stages, factor = base.stages, base.stages.vae.config.factor
    for name in ("image", "denoising_start", "denoising_end", "timesteps", "sigmas"):
        if getattr(first, name) is not None:
            raise InputError(f"{name} was given with a high-resolution pass, which starts from what it makes itself")
    height, width = enlarge.size(completed, factor)
    strength, steps = float(completed.hires_strength or 0), int(completed.hires_steps or 1)
    large = first.replace(height=height, width=width, latents=None)
    pixels = upscaler.reads == "pt"
    large = large.replace(
        image=_placeholder(large.batch, 3, height, width) if pixels else _latents(large, stages), strength=strength
    )
    # As many steps are run: more are of the schedule, unless all of them lie inside the strength, as LCM's.
    large = stages.complete(large.replace(num_inference_steps=math.ceil(steps / strength)))
    if stages.table(large).steps > steps:
        large = large.replace(num_inference_steps=steps)
    shape = (height, width) if pixels else (height // factor, width // factor)
    return CascadeStage(base, large, lambda made: {"image": upscaler.enlarge(made, shape)})


_OF_REFINER = (
    *("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval"),
    *("apg_rescale", "apg_eta", "apg_momentum", "use_original_formulation"),
    *("pag_scale", "pag_adaptive_scale", "pag_applied_layers"),
    *("timesteps", "sigmas", "eta", "num_images_per_prompt", "seed", "generator", "mask_image", "clip_skip"),
    *("literal_prompt", "original_size", "crops_coords_top_left", "negative_original_size", "output_type"),
    *("negative_crops_coords_top_left", "height", "width", "reuse"),
    *("s_churn", "s_tmin", "s_tmax", "s_noise", "noise_sampler_seed"),
)
"""What a refiner reads of the request that its base is asked."""
_NOT_SCORED = ("target_size", "negative_target_size", "prompt_2", "negative_prompt_2")


def _refiner(completed: Request, sampler: str | None, cut: Request, refiner: CascadeModel[Stages]) -> CascadeStage:
    """Another model, which goes on with the latents of a stage that ends at a fraction of the noise."""
    if completed.prompt is None:
        raise InputError("prompt_embeds were given, which the refiner cannot read: give prompt")
    fields = {name: getattr(cut, name) for name in _OF_REFINER}
    if refiner.stages.unet.config.needs_added and refiner.stages.unet.config.added_ids != 5:
        fields |= {name: getattr(cut, name) for name in _NOT_SCORED}
    more = {"image": _latents(cut, refiner.stages), "denoising_start": cut.denoising_end, "sampler": sampler}
    fields |= {**more, "output_type": completed.output_type}
    return CascadeStage(refiner, refiner.stages.complete(Request(**fields)), role="refiner")


def check_device(base: Stages, other: AnyStages, name: str) -> None:
    """InputError for a model that is not where the one is that it goes with."""
    if base.device != other.device:
        raise InputError(f"the {name} is on {other.device}, and the model on {base.device}: load both on one device")


def check_refiner(base: Stages, refiner: Stages) -> None:
    """InputError for a model that cannot go on with another's latents."""
    if base is refiner:
        raise InputError("the refiner is the model itself: give another one")
    check_device(base, refiner, "refiner")
    check_latents(base.vae.config, refiner.vae.config)


def check_latents(ours: AutoencoderConfig, theirs: AutoencoderConfig, name: str = "refiner") -> None:
    """InputError for a refiner, or what `name` says, whose latents are others."""
    for key in ("latent_channels", "factor", "scaling_factor"):
        if getattr(ours, key) != getattr(theirs, key):
            raise InputError(
                f"the {name}'s latents are not this model's: {key} is {getattr(theirs, key)}, expected "
                f"{getattr(ours, key)}"
            )


def _options_of(completed: Request, count: int) -> Sequence[Mapping[str, Any]]:
    """Of each upscaler. InputError for options of others than there are."""
    options = completed.upscaler_options
    if isinstance(options, Mapping):
        options = (options,) * max(1, count)
    if options is not None and len(options) != count:
        attached = f"{count} upscalers are attached" if count else "no upscaler is attached"
        raise InputError(
            f"upscaler_options are of {len(options)} upscalers, and {attached}: attach_upscaler attaches one"
        )
    if count and completed.padding_mask_crop is not None:
        raise InputError(
            "padding_mask_crop was given, and upscalers are attached, which read whole pictures: leave it out"
        )
    return ({},) * count if options is None else options


_OF_UPSCALER = ("num_images_per_prompt", "seed", "generator", "literal_prompt", "output_type")
"""What an upscaler has of the request that its base is asked."""


def _upscaled(
    last: CascadeStage, completed: Request, model: CascadeModel[Stages], options: Mapping[str, Any]
) -> tuple[CascadeStage, CascadeStage]:
    """The last stage, and a model that enlarges its images, with the request's prompts, seeds and pictures."""
    made, base, stages, spec = last.request, last.model.stages, model.stages, model.stages.spec
    assert isinstance(base, Stages)
    latents = spec.unet.enlarges_latents
    fields: dict[str, Any] = {name: getattr(completed, name) for name in _OF_UPSCALER}
    size = int(made.height or 0), int(made.width or 0)
    fields["image"] = _latents(made, base) if latents else _placeholder(made.batch, 3, *size)
    before = base.spec.unet
    width, texts = spec.unet.text_width, {"prompt", "negative_prompt"} & {*options}
    reads_text = spec.unet.pools_text and before.pools_text and before.text_width == width and not texts
    if reads_text:
        states = _placeholder(made.batch, spec.window, width)
        fields |= {"prompt_embeds": states, "num_images_per_prompt": 1}
        guided = base.guided(made)
        fields |= {"negative_prompt_embeds": states} if guided else {"negative_prompt": completed.negative_prompts}
    elif spec.conditioned:
        if completed.prompt is None and "prompt" not in options:
            raise InputError(
                f"prompt_embeds were given, which {stages.name} cannot read: give prompt, or a 'prompt' of it in "
                "upscaler_options"
            )
        fields |= {"prompt": completed.prompt, "negative_prompt": completed.negative_prompt}
        if "prompt" in options:
            fields["prompt"] = (options["prompt"],) * completed.count
    if spec.unet.resizes:
        fields |= _start_of(base, made, completed, spec)
    request = Request(**{**fields, **{name: value for name, value in options.items() if name != "prompt"}})
    enlarged = stages.complete(request)
    if min(int(enlarged.height or 0) - size[0], int(enlarged.width or 0) - size[1]) <= 0:
        raise InputError(
            f"{stages.name} makes {enlarged.width}x{enlarged.height} pixels of {size[1]}x{size[0]}: expected a model "
            "that enlarges them"
        )
    first = replace(last, request=made.replace(output_type="latent" if latents else "pt"))
    take = _rounded if spec.unet.adds_pooled else _as_pictures
    return first, CascadeStage(model, enlarged, take, role="upscaler", reads_text=reads_text)


def _start_of(base: Stages, made: Request, completed: Request, spec: Spec) -> dict[str, Any]:
    """The size of an upscaler that is of any: as many times the last stage's as their own sizes are; and what DeepFloyd
    IF's second stage has of the picture that the first one started from."""
    width, height = spec.enlarged((int(made.width or 0), int(made.height or 0)), base.spec.default_size)
    sized: dict[str, Any] = {"width": width, "height": height}
    given = completed.image is not None and completed.latents is None and not base.spec.unet.upscales
    if not (given and spec.unet.reads_original):
        return sized
    start = {"original_image": completed.image, "mask_image": completed.mask_image}
    own = base.spec.fits_pictures and fitted(completed.image, "image", base.spec.unet.sample_size)
    return start if own == (made.height, made.width) else start | sized


def check_upscaler(base: Stages, upscaler: Stages) -> None:
    """InputError for a model that cannot enlarge what another makes."""
    if base is upscaler:
        raise InputError("the upscaler is the model itself: give another one")
    if not upscaler.spec.unet.upscales:
        raise InputError(f"{upscaler.name} enlarges no picture: give an upscaler, or a super-resolution model")
    check_device(base, upscaler, "upscaler")
    if upscaler.spec.unet.enlarges_latents:
        check_latents(base.vae.config, upscaler.vae.config, "upscaler")
