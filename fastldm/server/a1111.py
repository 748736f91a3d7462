"""AUTOMATIC1111's API, which most front ends speak: `/sdapi/v1/...`.

A field is an error only where it switches something on that is not there. What a front end sends beside (its own
settings, even passwords) is neither kept, echoed nor logged.
"""

from __future__ import annotations

import base64
import json
import time
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import Image, ImageChops, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

from fastldm.conditioning.prompt import split_lora_tags
from fastldm.errors import InputError
from fastldm.image import read_parameters
from fastldm.metadata import SCHEDULE_LABELS, fields_of, sampler_label, split_sampler
from fastldm.request import UPSCALERS
from fastldm.samplers.names import SAMPLERS, resolve_sampler
from fastldm.server.errors import A1111Error, ApiError, documented
from fastldm.server.service import Files, Service, Work, decoded, size_of
from fastldm.version import __version__

_AUTOMATIC = ("", "automatic", "normal", "none")
_KINDS = {name.lower().replace(" ", "_"): name for name in SCHEDULE_LABELS.values() if name != "Normal"}
SAMPLER_NAMES = {sampler_label(name): name for name in SAMPLERS}
"""As AUTOMATIC1111 writes them, and fastldm."""
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Text2Image(_Body):
    """The body of txt2img. What is not named here is ignored."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = Field(-1, ge=-1, lt=2**63)
    sampler_name: str | None = Field(None, max_length=200)
    sampler_index: str | None = Field(None, max_length=200)
    scheduler: str | None = Field(None, max_length=200)
    batch_size: int | None = Field(1, ge=1, le=10_000)
    n_iter: int | None = Field(1, ge=1, le=10_000)
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    denoising_strength: float | None = None
    enable_hr: bool | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = Field(None, max_length=200)
    hr_second_pass_steps: int | None = Field(None, ge=0)
    hr_resize_x: int | None = Field(None, ge=0)
    hr_resize_y: int | None = Field(None, ge=0)
    refiner_checkpoint: str | None = Field(None, max_length=200)
    refiner_switch_at: float | None = None
    override_settings: dict[str, Any] | None = Field(None, max_length=1000)
    send_images: bool | None = True
    best_of: int | None = Field(None, ge=1)
    """Not AUTOMATIC1111's: sample so many, and answer the best of them by the model's ranking."""
    class_labels: int | list[int] | None = None
    """Not AUTOMATIC1111's either: of class-conditional models, what the pictures show."""

    # Not there: errors where they are switched on.
    restore_faces: bool | None = None
    tiling: bool | None = None
    styles: list[str] | None = Field(None, max_length=1000)
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = Field(None, max_length=1000)
    infotext: str | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    s_churn: float | None = None
    s_min_uncond: float | None = None


class Image2Image(Text2Image):
    """The body of img2img."""

    init_images: list[str] = Field(min_length=1, max_length=16)
    mask: str | None = None
    denoising_strength: float | None = 0.75
    mask_blur: int | None = Field(None, ge=0, le=64)
    inpainting_mask_invert: int | None = Field(None, ge=0, le=1)
    resize_mode: int | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=1 << 14)
    image_cfg_scale: float | None = None


class _Options(BaseModel):
    """All of it comes back from front ends that change one."""

    model_config = ConfigDict(extra="ignore")
    sd_model_checkpoint: str | None = None


class _PngInfo(_Body):
    image: str


_ABSENT = (
    *("restore_faces", "tiling", "styles", "subseed_strength", "script_name", "infotext", "s_churn"),
    *("s_min_uncond", "resize_mode"),
)
_SIZES = ("seed_resize_from_h", "seed_resize_from_w", "firstphase_width", "firstphase_height")


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=documented(A1111Error))
    chosen: dict[str, str] = {}  # by key: the model that POST /options has set

    def model_of(owner: str) -> str:
        return chosen.get(owner, service.models.default.name)

    def check_model(name: Any) -> str:
        if not isinstance(name, str) or name not in service.settings.models:
            known = ", ".join(map(repr, service.settings.models))
            raise ApiError(404, f"there is no model {str(name)[:200]!r}: this server has {known}", "model_not_found")
        return name

    @routes.post("/txt2img")
    async def txt2img(fields: Text2Image, request: HTTPRequest) -> dict[str, Any]:
        """Pictures for a prompt."""
        arguments = _arguments(fields) | (_high_resolution(fields) if fields.enable_hr else {})
        return await _generate(service, request, fields, arguments, model(fields, request))

    @routes.post("/img2img")
    async def img2img(fields: Image2Image, request: HTTPRequest) -> dict[str, Any]:
        """A picture changed, everywhere or where the mask is white."""
        arguments = _arguments(fields)
        if fields.enable_hr:
            raise ApiError(422, "enable_hr is true, which is of txt2img: leave it out", "not_supported")
        if len(fields.init_images) > 1:
            raise InputError(f"init_images has {len(fields.init_images)} pictures: expected one")
        image = await service.picture(decoded(fields.init_images[0], "init_images"), "init_images")
        asked = {"width": fields.width, "height": fields.height}
        size = size_of(image) | {name: length for name, length in asked.items() if length}
        arguments |= {"image": image, "strength": fields.denoising_strength, **size}
        if fields.image_cfg_scale is not None:
            arguments["image_guidance_scale"] = fields.image_cfg_scale
        overlay = None
        if fields.mask:
            if fields.inpainting_fill not in (None, 1):
                raise InputError(f"inpainting_fill is {fields.inpainting_fill}: expected 1, the original")
            mask = await service.picture(decoded(fields.mask, "mask"), "mask")
            mask = await service.in_pool(_prepared, mask, image.size, fields)
            if fields.inpaint_full_res:  # which overlays what it made itself
                arguments["padding_mask_crop"] = fields.inpaint_full_res_padding or 0
            elif fields.mask_blur:
                overlay = partial(_overlaid, image=image, mask=mask)
            arguments["mask_image"] = mask
        return await _generate(service, request, fields, arguments, model(fields, request), overlay)

    def model(fields: Text2Image, request: HTTPRequest) -> str:
        name = (fields.override_settings or {}).get("sd_model_checkpoint")
        return check_model(name) if name else model_of(request.scope["owner"])

    @routes.get("/progress")
    async def progress(request: HTTPRequest, skip_current_image: bool = False) -> dict[str, Any]:
        """Of the oldest request of this key; 0 and no jobs where there is none."""
        works = [work for work in service.of_owner(request.scope["owner"]) if work.dialect == "a1111"]
        if not works:
            return _progress(None, 0, None)
        current = None if skip_current_image else await service.preview(works[0])
        return _progress(works[0], len(works), current)

    @routes.post("/interrupt")
    async def interrupt(request: HTTPRequest) -> dict[str, Any]:
        """Let this key's requests end with what they have."""
        for work in service.of_owner(request.scope["owner"]):
            if work.dialect == "a1111":
                work.interrupted = True
                work.generation.interrupt()
        return {}

    @routes.post("/skip")
    async def skip(request: HTTPRequest) -> dict[str, Any]:
        """As interrupt: each request is one job."""
        return await interrupt(request)

    @routes.get("/options")
    async def options(request: HTTPRequest) -> dict[str, Any]:
        """The settings that there are."""
        return {
            "sd_model_checkpoint": model_of(request.scope["owner"]),
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
        }

    @routes.post("/options")
    async def set_options(fields: _Options, request: HTTPRequest) -> None:
        """Choose the model for this key's later requests; nothing else changes."""
        if fields.sd_model_checkpoint:
            chosen[request.scope["owner"]] = check_model(fields.sd_model_checkpoint)

    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": label, "aliases": [name], "options": {}} for label, name in SAMPLER_NAMES.items()]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        kinds = {"automatic": "Automatic", **_KINDS}
        common = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": label, **common} for name, label in kinds.items()]

    @routes.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        unknown = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **unknown} for name in service.settings.models]

    @routes.get("/sd-vae")
    async def vae() -> list[dict[str, Any]]:
        """None but the models' own."""
        return []

    @routes.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, Any]]:
        return [{"name": name} for name in UPSCALERS if name.startswith("Latent")]

    @routes.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """Names for `<lora:NAME:SCALE>` in a prompt."""
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.settings.loras]

    @routes.post("/png-info")
    async def png_info(fields: _PngInfo) -> dict[str, Any]:
        """How a picture was made, as its PNG says."""
        image = await service.picture(decoded(fields.image, "image"), "image")
        text = image.info.get("parameters")
        if not isinstance(text, str):
            return {"info": "", "items": {}, "parameters": {}}
        request, _ = read_parameters(image)
        parameters = {"Prompt": request.prompt, "Negative prompt": request.negative_prompt or "", **fields_of(text)}
        return {"info": text, "items": {"parameters": text}, "parameters": parameters}

    return routes


def _arguments(fields: Text2Image) -> dict[str, Any]:
    """The fields of `fastldm.Request`."""
    for name in _ABSENT:
        value = getattr(fields, name, None)
        if value and value != "None":
            raise ApiError(422, f"{name} is {str(value)[:60]!r}, which is not there: leave it out", "not_supported")
    for name in _SIZES:
        if (getattr(fields, name) or 0) > 0:
            raise ApiError(422, f"{name} is {getattr(fields, name)}, which is not there: leave it out", "not_supported")
    for name, script in (fields.alwayson_scripts or {}).items():
        if not isinstance(script, dict) or script.get("args"):
            raise ApiError(422, f"always on script {name[:60]} not found", "not_supported")
    override = dict(fields.override_settings or {})
    skip = override.pop("CLIP_stop_at_last_layers", None) or 1
    vae, _ = override.pop("sd_vae", None), override.pop("sd_model_checkpoint", None)
    override.pop("samples_format", None)
    if vae not in (None, "", "None", "Automatic"):
        raise ApiError(422, f"sd_vae is {str(vae)[:60]!r}: expected Automatic, the model's own", "not_supported")
    if override:
        raise ApiError(422, f"override_settings has {next(iter(override))[:60]!r}, which is not there", "not_supported")
    if isinstance(skip, bool) or not isinstance(skip, int) or not 1 <= skip <= 12:
        raise InputError(f"CLIP_stop_at_last_layers is {str(skip)[:60]}: expected a whole number, 1 to 12")
    prompt, adapters = split_lora_tags(fields.prompt)
    images = (fields.batch_size or 1) * (fields.n_iter or 1)
    values = {
        "prompt": prompt,
        "negative_prompt": fields.negative_prompt or None,
        "seed": None if fields.seed in (None, -1) else fields.seed,
        "sampler": _sampler(fields),
        "num_images_per_prompt" if fields.best_of is None else "keep": images,
        "candidates": fields.best_of,
        "num_inference_steps": fields.steps,
        "guidance_scale": fields.cfg_scale,
        "width": fields.width,
        "height": fields.height,
        "eta": fields.eta,
        "class_labels": fields.class_labels,
        "clip_skip": skip - 1 or None,
        "adapters": dict(adapters) or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _high_resolution(fields: Text2Image) -> dict[str, Any]:
    """The fields of a high-resolution pass."""
    for name in ("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt"):
        if (value := getattr(fields, name) or "") and not value.startswith("Use same"):
            raise ApiError(422, f"{name} is {value[:60]!r}: both passes have the same", "not_supported")
    sides = {"hires_width": fields.hr_resize_x or None, "hires_height": fields.hr_resize_y or None}
    values = {
        **sides,
        "hires_scale": None if any(sides.values()) else fields.hr_scale or 2.0,
        "hires_upscaler": fields.hr_upscaler or None,
        "hires_steps": fields.hr_second_pass_steps or None,
        "hires_strength": fields.denoising_strength,
    }
    return {name: value for name, value in values.items() if value is not None}


def _sampler(fields: Text2Image) -> str | None:
    name = fields.sampler_name or fields.sampler_index or ""
    kind = (fields.scheduler or "").lower().replace(" ", "_")  # its name or its label
    if kind not in (*_AUTOMATIC, *_KINDS):
        raise ApiError(404, f"Scheduler not found: {kind[:60]!r}", "not_found")
    if name.lower() in _AUTOMATIC:
        if kind not in _AUTOMATIC:
            raise InputError(f"scheduler is {kind!r} and sampler_name is missing: expected both")
        return None
    try:
        resolve_sampler(name)
    except InputError:
        raise ApiError(404, "Sampler not found", "not_found") from None
    return name if kind in _AUTOMATIC else f"{name} {kind}"


def _prepared(mask: Image.Image, size: tuple[int, int], fields: Image2Image) -> Image.Image:
    """White where a picture of this size is repainted."""
    mask = mask.convert("L").resize(size)
    mask = ImageChops.invert(mask) if fields.inpainting_mask_invert else mask
    return mask.filter(ImageFilter.GaussianBlur(fields.mask_blur)) if fields.mask_blur else mask


def _overlaid(picture: Image.Image, image: Image.Image, mask: Image.Image) -> Image.Image:
    """A repainted picture over what it was, by a soft mask."""
    before = image.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)
    return Image.composite(picture, before, mask.resize(picture.size))


async def _generate(
    service: Service,
    request: HTTPRequest,
    fields: Text2Image,
    arguments: dict[str, Any],
    model: str,
    overlay: Any = None,
) -> dict[str, Any]:
    scope = request.scope
    format = (fields.override_settings or {}).get("samples_format") or "png"
    if not isinstance(format, str) or format not in _FORMATS:
        raise InputError(f"samples_format is {str(format)[:60]!r}: expected png, jpg or webp")
    refiner = fields.refiner_checkpoint if fields.refiner_checkpoint not in (None, "", "None") else None
    if refiner is not None and fields.refiner_switch_at is not None:
        arguments["refiner_switch_at"] = fields.refiner_switch_at
    work = await service.submit(scope["request_id"], scope["owner"], model, arguments, dialect="a1111", refiner=refiner)
    files = service.files(work, _FORMATS[format], change=overlay)
    done = await service.while_connected(request.receive, work, files)
    images = [base64.b64encode(content).decode() for content in done.contents] if fields.send_images else []
    echo = fields.model_dump(exclude={"init_images", "mask"})
    return {"images": images, "parameters": echo, "info": json.dumps(_info(work, done))}


def _info(work: Work, files: Files) -> dict[str, Any]:
    request = files.result.request
    seeds = list(files.result.seeds)
    count = len(seeds)
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [request.negative_prompt or ""] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        **({"all_scores": list(files.result.scores)} if files.result.scores else {}),
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": split_sampler(request.sampler)[0],
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": work.model.name,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": list(files.texts),
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(work.created)),
        "clip_skip": (request.clip_skip or 0) + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"fastldm {__version__}",
    }


def _progress(work: Work | None, jobs: int, current_image: str | None) -> dict[str, Any]:
    step, steps = (0, 0) if work is None else work.steps
    remaining = None if work is None else work.generation.remaining()
    created = "0" if work is None else time.strftime("%Y%m%d%H%M%S", time.localtime(work.created))
    return {
        "progress": step / max(steps, 1),
        "eta_relative": 0.0 if remaining is None else remaining,
        "state": {
            "skipped": False,
            "interrupted": work is not None and work.interrupted,
            "stopping_generation": False,
            "job": "" if work is None else work.id,
            "job_count": jobs,
            "job_timestamp": created,
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": current_image,
        "textinfo": None,
    }
