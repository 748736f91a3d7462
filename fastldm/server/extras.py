"""AUTOMATIC1111's extras: pictures that are sent, enlarged. `/sdapi/v1/upscalers`, `extra-single-image` and
`extra-batch-images`.

What enlarges is a filter of pixels, or a model of this server that does.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.image import encode_image
from fastldm.request import UPSCALERS
from fastldm.server.errors import A1111Error, ApiError, documented
from fastldm.server.service import Service, decoded

NONE = "None"
FILTERS = {name: Image.Resampling[name.upper()] for name in UPSCALERS if not name.startswith("Latent")}
"""Of pixels: Pillow's, by AUTOMATIC1111's names."""
_MOST_PASSES = 3
"""Of a network, until a picture is as large as it shall be, as in AUTOMATIC1111."""
_STEP = 8
"""Pixels, of whose multiples the sides are where a factor is given, likewise."""


class _Extras(BaseModel):
    """What both endpoints take. What is not named here is ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    resize_mode: int = Field(0, ge=0, le=1, description="0: upscaling_resize; 1: upscaling_resize_w and _h.")
    upscaling_resize: float = Field(2.0, gt=0, le=64)
    upscaling_resize_w: int = Field(512, ge=1, le=1 << 16)
    upscaling_resize_h: int = Field(512, ge=1, le=1 << 16)
    upscaling_crop: bool = Field(True, description="Whether what of the shape is beyond width and height is cut off.")
    upscaler_1: str = Field(NONE, max_length=200)
    upscaler_2: str = Field(NONE, max_length=200)
    extras_upscaler_2_visibility: float = Field(0.0, ge=0, le=1)

    # Not there: errors where they are switched on.
    gfpgan_visibility: float | None = None
    codeformer_visibility: float | None = None


class ExtrasSingle(_Extras):
    """The body of extra-single-image."""

    image: str


class _FileData(BaseModel):
    data: str
    name: str = ""


class ExtrasBatch(_Extras):
    """The body of extra-batch-images."""

    imageList: list[_FileData] = Field(min_length=1, max_length=10_000)


_ABSENT = ("gfpgan_visibility", "codeformer_visibility")


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=documented(A1111Error))

    @routes.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """Filters of pixels, and the models that are loaded and enlarge a picture."""
        unknown = {"model_path": None, "model_url": None}
        filters = [{"name": name, "model_name": None, "scale": 1, **unknown} for name in (NONE, *FILTERS)]
        models = [(model.name, model.enlarges) for model in service.models.loaded if model.enlarges > 1]
        return filters + [{"name": name, "model_name": name, "scale": scale, **unknown} for name, scale in models]

    @routes.post("/extra-single-image")
    async def extra_single_image(fields: ExtrasSingle, request: HTTPRequest) -> dict[str, Any]:
        """A picture, enlarged."""
        _check(service, fields)
        image, info = await _enlarged(service, request, fields, fields.image, "image", 0)
        return {"html_info": info, "image": image}

    @routes.post("/extra-batch-images")
    async def extra_batch_images(fields: ExtrasBatch, request: HTTPRequest) -> dict[str, Any]:
        """Several, one after the other; the information is the last one's, as in AUTOMATIC1111."""
        if (count := len(fields.imageList)) > service.settings.max_n:
            raise InputError(f"imageList has {count} pictures: expected at most {service.settings.max_n}")
        _check(service, fields)
        images, info = [], ""
        for number, file in enumerate(fields.imageList):
            image, info = await _enlarged(service, request, fields, file.data, f"imageList[{number}]", number)
            images.append(image)
        return {"html_info": info, "images": images}

    return routes


def _check(service: Service, fields: _Extras) -> None:
    """Before any picture is looked at."""
    for name in _ABSENT:
        if value := getattr(fields, name):
            message = f"{name} is {value:g}, which is not there: faces are not restored; leave it out"
            raise ApiError(422, message, "not_supported")
    for name in ("upscaler_1", "upscaler_2"):
        value = getattr(fields, name)
        if value not in (NONE, *FILTERS) and not _may_enlarge(service, value):
            raise _unknown(service, name, value)


def _may_enlarge(service: Service, name: str) -> bool:
    """Whether a model of this name enlarges, or is not loaded yet."""
    model = next((model for model in service.models if model.name == name), None)
    return model is not None and (model.session is None or model.enlarges > 1)


def _unknown(service: Service, field: str, name: str) -> InputError:
    models = [model.name for model in service.models.loaded if model.enlarges > 1]
    names = ", ".join((NONE, *FILTERS, *models))
    more = "" if models else "; `fastldm serve -m default -m upscaler` has a model that enlarges, too"
    return InputError(f"{field} is {show(name)}: expected one of {names}{more}")


async def _enlarged(
    service: Service, request: HTTPRequest, fields: _Extras, content: str, name: str, number: int
) -> tuple[str, str]:
    """A picture in base64, enlarged, as a PNG in base64, and what was done, as HTML. name: the field's. number: which
    of the request's it is."""
    sent = await service.picture(decoded(content, name), name)
    image, done = sent.convert("RGB"), {}
    if fields.upscaler_1 != NONE:
        ids = (f"{request.scope['request_id']}-{number}-{k}" for k in range(2 * _MOST_PASSES))
        scale, size = _target(service, fields, image)
        asked = f"{fields.upscaling_resize_w}x{fields.upscaling_resize_h}"
        key, value = ("by", f"{fields.upscaling_resize:g}") if fields.resize_mode == 0 else ("to", asked)
        done = {f"Postprocess upscale {key}": value, "Postprocess upscaler": fields.upscaler_1}
        large = await _upscaled(service, request, "upscaler_1", fields.upscaler_1, image, scale, size, ids)
        if fields.upscaler_2 != NONE and fields.extras_upscaler_2_visibility > 0:
            other = await _upscaled(service, request, "upscaler_2", fields.upscaler_2, image, scale, size, ids)
            large = Image.blend(large, other, fields.extras_upscaler_2_visibility)
            done["Postprocess upscaler 2"] = fields.upscaler_2
        if fields.resize_mode == 1 and fields.upscaling_crop:
            width, height = fields.upscaling_resize_w, fields.upscaling_resize_h
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            large = large.crop((left, top, left + width, top + height))
            done["Postprocess crop to"] = asked
        image = large
    text = sent.info.get("parameters")
    file = await service.in_pool(encode_image, image, "PNG", text if isinstance(text, str) else None)
    info = ", ".join(f"{key}: {value}" for key, value in done.items())
    return base64.b64encode(file).decode(), f"<p>{escape(info)}</p>"


def _target(service: Service, fields: _Extras, image: Image.Image) -> tuple[float, tuple[int, int]]:
    """The factor, and the size that a picture is enlarged to. InputError for one that is too large."""
    sides = image.size
    if fields.resize_mode == 0:
        scale = fields.upscaling_resize
        size = tuple(max(_STEP, int(side * scale) // _STEP * _STEP) for side in sides)
    else:  # so that it covers what is asked, in its own shape
        asked = fields.upscaling_resize_w, fields.upscaling_resize_h
        scale = max(wanted / side for wanted, side in zip(asked, sides, strict=True))
        size = tuple(max(wanted, round(side * scale)) for wanted, side in zip(asked, sides, strict=True))
    if (pixels := size[0] * size[1]) > service.settings.max_pixels:
        raise InputError(
            f"width times height is {pixels} after enlarging: expected at most {service.settings.max_pixels} pixels"
        )
    return scale, (size[0], size[1])


async def _upscaled(
    service: Service,
    request: HTTPRequest,
    field: str,
    name: str,
    image: Image.Image,
    scale: float,
    size: tuple[int, int],
    ids: Any,
) -> Image.Image:
    """A picture at a size. By a model, as often as is needed, and brought to the size by Lanczos' filter."""
    if name in FILTERS:
        return await service.in_pool(image.resize, size, FILTERS[name])
    for number in range(_MOST_PASSES):
        if _covers(image.size, size) and (number or scale != 1):
            break
        arguments = {"prompt": "", "image": image, "seed": 0, "guidance_scale": 1.0}  # nothing to guide by
        async with service.models.use(name) as model:
            if model.enlarges == 1:
                raise _unknown(service, field, name)
            work = await service.submit(next(ids), request.scope["owner"], name, arguments, dialect="a1111")
        files = await service.while_connected(request.receive, work, service.files(work))
        image = files.result.images[0]  # type: ignore[assignment]
    return image if image.size == size else await service.in_pool(image.resize, size, Image.Resampling.LANCZOS)


def _covers(size: Sequence[int], other: Sequence[int]) -> bool:
    return size[0] >= other[0] and size[1] >= other[1]
