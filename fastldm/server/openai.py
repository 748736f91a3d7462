"""OpenAI's Images API: `/v1/images/generations`, `edits`, `variations`, and `/v1/models`.

Fields that OpenAI does not have are those of `fastldm.Request`, by its names. What is not known is ignored, as newer
clients send newer fields; what is known, would change the picture and is not done is refused.

Over 500 lines, for the fields of requests and what each endpoint makes of them are read together.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response, StreamingResponse

from fastldm.errors import InputError
from fastldm.image import encode_image
from fastldm.server.errors import ApiError, OpenAIError, api_error, body, documented
from fastldm.server.jobs import Job, Jobs
from fastldm.server.service import FORMATS, Files, Service, Work, decoded
from fastldm.serving.generation import Progress

_OTHERS = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")
"""Names of OpenAI's own models, which front ends send unasked: here the server's first."""
_NAMED = re.compile(r"adapters\[([^\[\]]+)\]")
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
_MAX_FILES, _MAX_FIELDS = 8, 128


def _adapters(value: Any) -> Any:
    """{"sketch": 0.8}, or [{"name": "sketch", "scale": 0.8}], as a dictionary."""
    if isinstance(value, list):
        if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
            raise ValueError('expected {"NAME": SCALE}, or a list of {"name": NAME, "scale": SCALE}')
        return {item["name"]: item.get("scale", 1.0) for item in value}
    return value


def _listed(value: Any) -> Any:
    """A list; in forms as JSON, or one name."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.lstrip()[:1] in ("[", "{") else [value]
    except (ValueError, RecursionError):
        raise ValueError("expected JSON") from None


class ImageFields(BaseModel):
    """What all image endpoints take."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first where none is named.")
    n: int | None = Field(None, ge=1, description="How many pictures.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: what the model was made for.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures have no transparency.")
    frames: int | None = Field(None, ge=1, le=1)
    quality: str | None = Field(None, max_length=100, description="Ignored: see num_inference_steps.")
    user: str | None = Field(None, max_length=1000, description="Ignored.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of a stream.")

    negative_prompt: str | None = None
    seed: int | None = Field(None, ge=-1, lt=2**63, description="Picture k has seed + k; -1 is a random one.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    image_guidance_scale: float | None = Field(None, description="How much a model that edits keeps of the picture.")
    pag_scale: float | None = Field(None, description="Perturbed-attention guidance; 0 is off.")
    pag_adaptive_scale: float | None = None
    apg_rescale: float | None = Field(None, description="Adaptive projected guidance.")
    apg_eta: float | None = None
    apg_momentum: float | None = None
    use_original_formulation: bool | None = Field(None, description="Whether guidance_scale counts from 0: papers'.")
    clip_guidance_scale: float | None = Field(None, description="CLIP guidance by gradient, such as 100; 0 is off.")
    prior_num_inference_steps: int | None = Field(None, ge=1, description="Of a model with a prior, that one's.")
    prior_guidance_scale: float | None = Field(None, description="Likewise.")
    sampler: str | None = Field(None, max_length=200)
    strength: float | None = None
    noise_level: int | None = Field(None, ge=0, description="Noise of what an upscaler or unCLIP reads of the picture.")
    super_res_num_inference_steps: int | None = Field(None, ge=2, description="Of Karlo: its super-resolution's; 7.")
    class_labels: int | list[int] | None = Field(None, description="Classes that the pictures show: one, or one each.")
    upscalers: Annotated[list[Annotated[str, Field(max_length=200)]] | None, BeforeValidator(_listed)] = Field(
        None, max_length=10, description="Models of this server that enlarge the pictures, one after the other."
    )
    upscaler_options: Annotated[dict[str, Any] | list[dict[str, Any]] | None, BeforeValidator(_listed)] = Field(
        None, description="Fields in place of their defaults: for all, or a list of one for each."
    )
    clip_skip: int | None = None
    reuse: int | None = Field(None, ge=1, description="Of so many calls of the U-Net the first computes all of it.")
    best_of: int | None = Field(None, ge=1, description="Sample so many, and answer the n best by the model's ranking.")
    adapters: Annotated[dict[str, float] | None, BeforeValidator(_adapters)] = Field(
        None, max_length=100, description='Weights of adapters by name, such as {"sketch": 0.8}.'
    )
    control: str | None = Field(None, max_length=200, description="One of this server; the first where none is named.")
    control_image: str | None = Field(None, description="What the control reads, a picture in base64; in forms a file.")
    control_scale: float | None = Field(None, description="How much the control counts; 1 if not given.")
    priority: float | None = Field(None, ge=-10, le=10, description="Each level is worth ten seconds of waiting.")
    deadline: float | None = Field(None, gt=0, description="Seconds from now, after which the request fails.")


class GenerationBody(ImageFields):
    """The body of `/v1/images/generations` and `/v1/jobs`."""

    prompt: str | None = Field(None, description="(word:1.3) and [word] weight words; none of models that read none.")


class PictureBody(BaseModel):
    """A picture in base64."""

    image: str = Field(description="With or without data:image/png;base64, before it.")


class EditFields(ImageFields):
    """The texts in the form of `/v1/images/edits`."""

    prompt: str | None = None


_MORE = (
    *("pag_scale", "pag_adaptive_scale", "apg_rescale", "apg_eta", "apg_momentum", "use_original_formulation"),
    *("clip_skip", "adapters", "reuse", "noise_level", "clip_guidance_scale", "class_labels", "upscaler_options"),
    *("super_res_num_inference_steps", "prior_num_inference_steps", "prior_guidance_scale"),
)


def router(service: Service, jobs: Jobs) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1", tags=["openai"], responses=documented(OpenAIError))

    @routes.post("/images/generations", responses=_EVENTS)
    async def generations(fields: GenerationBody, request: HTTPRequest) -> Response:
        """Pictures for a prompt; with `stream`, as events."""
        arguments = await _controlled(service, fields)
        return await _respond(service, jobs, request, fields, arguments)

    @routes.post("/images/edits", responses=_EVENTS, openapi_extra=_form(EditFields, mask=True))
    async def edits(request: HTTPRequest) -> Response:
        """A picture changed by a prompt: all of it, or where `mask`, or the picture itself, is transparent."""
        fields, arguments = await _edit(service, request)
        return await _respond(service, jobs, request, fields, arguments, of=arguments["image"])

    @routes.post("/images/variations", responses=_EVENTS, openapi_extra=_form(ImageFields, mask=False))
    async def variations(request: HTTPRequest) -> Response:
        """Pictures like one that is sent; `strength` says how unlike."""
        async with _read_form(request) as form:
            fields = _validated(ImageFields, form)
            image, *_ = await _pictures(service, form)
        return await _respond(service, jobs, request, fields, {"prompt": "", "image": image}, of=image)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models of this server; the first is for requests that name none."""
        return {"object": "list", "data": [_model(service, name) for name in service.settings.models]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in service.settings.models:
            raise ApiError(404, f"there is no model {name[:200]!r}", "model_not_found", param="model")
        return _model(service, name)

    @routes.get("/images/files/{id}", response_class=Response)
    async def file(id: str, request: HTTPRequest) -> Response:
        """A picture that was asked for as `url`, with the key that asked for it."""
        kept = service.kept.get(f"file-{id}", request.scope["owner"])
        if kept is None:
            raise ApiError(404, "there is no such picture, or it is not kept any more", "not_found")
        content, media_type = kept
        return Response(content, media_type=media_type, headers={"cache-control": "private, max-age=3600"})

    @routes.post("/jobs", status_code=202, tags=["jobs"])
    async def submit(fields: GenerationBody, request: HTTPRequest) -> dict[str, Any]:
        """The body of `/v1/images/generations`, without waiting: the answer has the job's id."""
        return await _begin(service, jobs, request, fields, await _controlled(service, fields))

    @routes.post("/jobs/edits", status_code=202, tags=["jobs"], openapi_extra=_form(EditFields, mask=True))
    async def submit_edit(request: HTTPRequest) -> dict[str, Any]:
        """The form of `/v1/images/edits`, likewise."""
        fields, arguments = await _edit(service, request)
        return await _begin(service, jobs, request, fields, arguments, of=arguments["image"])

    @routes.get("/jobs/{id}", tags=["jobs"])
    async def job(id: str, request: HTTPRequest, preview: bool = False) -> dict[str, Any]:
        """Its place in the line, its progress, with `preview` a small picture so far, and in the end its result."""
        return await jobs.show(id, request.scope["owner"], preview)

    @routes.delete("/jobs/{id}", tags=["jobs"])
    async def cancel(id: str, request: HTTPRequest) -> dict[str, Any]:
        """Cancel it, and no other."""
        return jobs.cancel(id, request.scope["owner"])

    return routes


def _model(service: Service, name: str) -> dict[str, Any]:
    about = {"id": name, "object": "model", "created": service.started, "owned_by": "fastldm"}
    reads = next(model.reads for model in service.models if model.name == name)
    return {**about, "reads": reads} if reads else about


# --- what is asked


def arguments_of(fields: ImageFields, of: Image.Image | None = None) -> dict[str, Any]:
    """The fields of `fastldm.Request`. of: the picture that it starts from."""
    names = ("negative_prompt", "num_inference_steps", "guidance_scale", "image_guidance_scale", "sampler", "strength")
    values: dict[str, Any] = {name: getattr(fields, name, None) for name in ("prompt", *names, *_MORE)}
    counts = {"num_images_per_prompt": fields.n} if fields.best_of is None else {"keep": fields.n}
    values |= {**counts, "candidates": fields.best_of, "seed": None if fields.seed == -1 else fields.seed}
    if fields.size not in (None, "auto"):
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(fields.size))
        if not match:
            raise InputError(f"size is {str(fields.size)[:60]!r}: expected WIDTHxHEIGHT in pixels, or auto")
        values |= {"width": int(match[1]), "height": int(match[2])}
    if values["strength"] is not None and of is None:
        raise InputError("strength is for pictures that are changed: send it to /v1/images/edits")
    return {name: value for name, value in values.items() if value is not None}


def model_name(service: Service, fields: ImageFields) -> str | None:
    """The model that is meant; None is the first."""
    name = fields.model
    return None if not name or (name not in service.settings.models and _OTHERS.fullmatch(name)) else name


def _form(fields: type[BaseModel], mask: bool) -> dict[str, Any]:
    """The OpenAPI document's part about a form."""
    schema = fields.model_json_schema()
    for name in ("image", *(["mask"] if mask else []), "control_image"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    if mask:
        schema["properties"]["original_image"] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _read_form(request: HTTPRequest) -> Any:
    kind, options = parse_options_header(request.headers.get("content-type"))
    # In some other charsets decoding takes the square of the length.
    if kind != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        message = "expected multipart/form-data in UTF-8, with the picture as `image`"
        raise ApiError(415, message, "unsupported_media_type")
    return request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS)


def _validated(kind: type[Any], form: FormData) -> Any:
    """The fields of a form, where all is text. The openai client writes a list as `adapters[][name]`, a dictionary
    as `adapters[NAME]`."""
    values: dict[str, Any] = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    adapters: dict[str, Any] = {match[1]: values[name] for name in values if (match := _NAMED.fullmatch(name))}
    names, scales = form.getlist("adapters[][name]"), form.getlist("adapters[][scale]")
    if scales and len(scales) != len(names):
        raise InputError(f"adapters has {len(names)} names and {len(scales)} scales: expected one for each")
    adapters |= dict(zip(names, scales or ["1"] * len(names), strict=True))  # type: ignore[arg-type]
    if adapters:
        values["adapters"] = adapters
    try:
        return kind.model_validate({name: value for name, value in values.items() if value != ""} | _prompt(values))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _prompt(values: Mapping[str, Any]) -> dict[str, Any]:
    """An empty prompt is one; any other empty text of a form is a field that was left out."""
    return {"prompt": ""} if values.get("prompt") == "" else {}


async def _edit(service: Service, request: HTTPRequest) -> tuple[EditFields, dict[str, Any]]:
    """What the form of an edit says: its fields, and those of `fastldm.Request` that are in no other form."""
    async with _read_form(request) as form:
        fields = _validated(EditFields, form)
        image, original, mask = await _pictures(service, form)
        controlled = await _controlled(service, fields, form)
    given = {"original_image": original, "mask_image": mask}
    given = {name: picture for name, picture in given.items() if picture is not None}
    return fields, {"image": image, **given, **controlled}


async def _controlled(service: Service, fields: ImageFields, form: FormData | None = None) -> dict[str, Any]:
    """What a control reads, and how much it counts, as fields of `fastldm.Request`."""
    sent = None if form is None else form.get("control_image")
    if isinstance(sent, UploadFile):
        content = await sent.read()
    elif fields.control_image:
        content = decoded(fields.control_image, "control_image")
    elif fields.control or fields.control_scale is not None:
        raise InputError("control_image is missing: a control needs the picture that it reads")
    else:
        return {}
    names = [*service.settings.controls]
    if not names:
        raise InputError("control_image: this server was started without a --control that would read it")
    name = fields.control or names[0]
    if name not in names:
        raise InputError(f"control is {name[:200]!r}: this server has {', '.join(names)}")
    scales = {} if fields.control_scale is None else {name: fields.control_scale}
    kinds = ("controlnet_conditioning_scale", "adapter_conditioning_scale") if scales else ()
    return {"control_image": {name: await service.picture(content, "control_image")}, **dict.fromkeys(kinds, scales)}


async def _pictures(service: Service, form: FormData) -> tuple[Image.Image, Image.Image | None, Image.Image | None]:
    """The picture of a form; the large one to start from, if it is enlarged from one; and where that, or the picture,
    is repainted (white), if not everywhere."""
    images = [*form.getlist("image"), *form.getlist("image[]")]
    if not images or not isinstance(images[0], UploadFile):
        raise InputError("image is missing: expected a file")
    if len(images) > 1:
        raise InputError(f"image is {len(images)} files: one picture can be edited at a time")
    image = repainted = await service.picture(await images[0].read(), "image")
    name, original = "image", None
    if (sent := form.get("original_image")) not in (None, ""):
        if not isinstance(sent, UploadFile):
            raise InputError("original_image is a text: expected a file")
        name, original = "original_image", await service.picture(await sent.read(), "original_image")
        repainted = original
    mask = form.get("mask")
    if mask is None or mask == "":
        return image, original, await service.in_pool(_transparent, repainted)
    if not isinstance(mask, UploadFile):
        raise InputError("mask is a text: expected a file")
    masked = await service.picture(await mask.read(), "mask")
    if masked.size != repainted.size:
        raise InputError(
            f"mask is {masked.width}x{masked.height} and {name} {repainted.width}x{repainted.height}: expected one size"
        )
    hole = await service.in_pool(_transparent, masked)
    if hole is None:
        raise InputError("mask has no transparent pixels, which would be repainted: expected an alpha channel")
    return image, original, hole


def _transparent(image: Image.Image) -> Image.Image | None:
    """White where a picture is wholly transparent; None where it nowhere is."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8)) if (alpha == 0).any() else None


# --- what is answered


async def _respond(
    service: Service,
    jobs: Jobs,
    request: HTTPRequest,
    fields: ImageFields,
    arguments: Mapping[str, Any],
    of: Image.Image | None = None,
) -> Response:
    stream = bool(fields.stream)
    if fields.partial_images and not stream:
        raise InputError("partial_images is for streams: set stream too")
    if stream and fields.response_format == "url":
        raise InputError("response_format is url: a stream has its pictures inside, as b64_json")
    work = await start(service, request, fields, {**arguments, **arguments_of(fields, of)})
    detach = request.headers.get("x-fastldm-detach", "").lower() in ("1", "true", "yes")
    finished = finish(service, work, fields, base_url(service, request))
    if detach:  # then the answer can be fetched as a job's, under the request's id
        finished = _shielded(jobs.begin(work, finished))
    if stream:
        events = _events(service, work, fields, finished, edit=of is not None, detach=detach)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    content = await service.while_connected(request.receive, work, finished, detach=detach)
    return Response(json.dumps(content), media_type="application/json")


async def _begin(
    service: Service,
    jobs: Jobs,
    request: HTTPRequest,
    fields: ImageFields,
    arguments: Mapping[str, Any],
    of: Image.Image | None = None,
) -> dict[str, Any]:
    """A job, and what is known of it."""
    if fields.stream:
        raise InputError("stream is for those who wait: a job's progress is at /v1/jobs/ID")
    work = await start(service, request, fields, {**arguments, **arguments_of(fields, of)})
    jobs.begin(work, finish(service, work, fields, base_url(service, request)))
    return await jobs.show(work.id, work.owner)


async def _shielded(job: Job) -> dict[str, Any]:
    return await asyncio.shield(job.task)


async def start(service: Service, request: HTTPRequest, fields: ImageFields, arguments: Mapping[str, Any]) -> Work:
    """Queue it."""
    return await service.submit(
        request.scope["request_id"],
        request.scope["owner"],
        model_name(service, fields),
        arguments,
        priority=fields.priority or 0,
        deadline=fields.deadline,
        previews=(fields.partial_images or 0) if fields.stream else 0,
        upscalers=fields.upscalers or (),
    )


def base_url(service: Service, request: HTTPRequest) -> str:
    """Where the client reached the server."""
    return (service.settings.public_url or str(request.base_url)).rstrip("/")


async def finish(service: Service, work: Work, fields: ImageFields, base: str) -> dict[str, Any]:
    """OpenAI's answer, when the pictures are done."""
    format = fields.output_format or "png"
    files = await service.files(work, format, fields.output_compression)
    scores = [{"score": score} for score in files.result.scores] or [{}] * len(files.contents)
    return {
        "created": int(time.time()),
        "data": [
            {**_content(service, work, content, format, fields, base), "seed": seed, **score}
            for content, seed, score in zip(files.contents, files.result.seeds, scores, strict=True)
        ],
        **_about(work, files, fields),
    }


def _content(
    service: Service, work: Work, content: bytes, format: str, fields: ImageFields, base: str
) -> dict[str, Any]:
    if fields.response_format == "url":
        id = service.kept.put(work.owner, (content, FORMATS[format][1]), len(content), prefix="file-")
        return {"url": f"{base}/v1/images/files/{id.removeprefix('file-')}"}
    return {"b64_json": base64.b64encode(content).decode()}


def _about(work: Work, files: Files, fields: ImageFields) -> dict[str, Any]:
    result = files.result
    timings = result.timings
    return {
        "background": "opaque",
        "output_format": fields.output_format or "png",
        "quality": fields.quality or "auto",
        "size": f"{result.request.width}x{result.request.height}",
        "model": work.model.name,
        "backend": f"{result.backend} {result.dtype}",
        "id": work.id,
        "timings": {
            "queue": round(work.generation.prepare_start - work.generation.submitted, 4),
            "text": round(timings.text, 4),
            "steps": [round(step, 4) for step in timings.steps],
            "decode": round(timings.decode, 4),
            "total": round(timings.total, 4),
        },
    }


async def _events(
    service: Service, work: Work, fields: ImageFields, finished: Any, *, edit: bool, detach: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: partial pictures, then one completed for each."""
    kind = "image_edit" if edit else "image_generation"
    format, number = fields.output_format or "png", 0
    done, steps = asyncio.ensure_future(finished), asyncio.Queue[Progress]()
    work.watchers.add(steps)
    arrived = asyncio.ensure_future(steps.get())
    try:
        while not done.done() or arrived.done():
            await asyncio.wait({arrived, done}, timeout=service.settings.heartbeat, return_when="FIRST_COMPLETED")
            if not arrived.done():
                if not done.done():
                    yield b": still at work\n\n"
                continue
            step, arrived = arrived.result(), asyncio.ensure_future(steps.get())
            await asyncio.sleep(0)  # lets the next step arrive, if it is there
            for k, image in enumerate(step.preview or ()):
                content = await service.in_pool(encode_image, image, FORMATS[format][0], compress_level=1)
                partial = {
                    "type": f"{kind}.partial_image",
                    "b64_json": base64.b64encode(content).decode(),
                    "partial_image_index": number,
                    "image_index": k,
                    "created_at": int(time.time()),
                    "size": f"{image.width}x{image.height}",
                    "background": "opaque",
                    "output_format": format,
                    "quality": fields.quality or "auto",
                }
                yield _event(partial)
            number += bool(step.preview)
        content = done.result()
        about = {name: value for name, value in content.items() if name not in ("created", "data")}
        for k, data in enumerate(content["data"]):
            event = {"type": f"{kind}.completed", "created_at": content["created"], "image_index": k, **about, **data}
            yield _event(event)
    except Exception as error:
        yield _event({"type": "error", "error": body(api_error(error, work.id))})
    finally:
        work.watchers.discard(steps)
        arrived.cancel()
        if not done.done() and not detach:
            done.cancel()
            work.generation.cancel()


def _event(data: Mapping[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
