"""The page at `/`: its files, and what it asks the server before it asks for pictures."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from fastldm.image import read_parameters
from fastldm.samplers.names import SAMPLERS, schedules_of
from fastldm.server.errors import OpenAIError, documented
from fastldm.server.models import Model
from fastldm.server.openai import PictureBody
from fastldm.server.service import Service, decoded
from fastldm.system import ASSETS, LOOK

PAGE = ASSETS / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame; pictures come as data in the server's answers.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def router(service: Service) -> APIRouter:
    """The page and its files, which no key is asked for, and `/v1/options` and `/v1/images/settings`."""
    routes = APIRouter()
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in sorted((*PAGE.iterdir(), *LOOK.iterdir()))}

    def serve(name: str) -> Any:
        content, kind = files[name]
        headers = {**_HEADERS, "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

        async def file(request: HTTPRequest) -> Response:
            if request.headers.get("if-none-match") == headers["etag"]:
                return Response(status_code=304, headers=headers)
            return Response(content, headers=headers, media_type=kind)

        return file

    for name in files:
        path = "/" if name == "index.html" else f"/page/{name}"
        routes.add_api_route(path, serve(name), include_in_schema=False)

    @routes.get("/v1/options", tags=["server"], responses=documented(OpenAIError))
    async def options() -> dict[str, Any]:
        """What requests may choose from: models with their defaults, samplers, adapters, controls, and the limits."""
        settings = service.settings
        limits = ("max_n", "max_steps", "max_pixels", "max_prompt")
        return {
            "models": [_about(model) for model in service.models],
            "samplers": [_sampler(name) for name in SAMPLERS],
            "adapters": list(settings.loras),
            "controls": list(settings.controls),
            "limits": {name: getattr(settings, name) for name in limits},
        }

    @routes.post("/v1/images/settings", tags=["openai"], responses=documented(OpenAIError))
    async def settings(fields: PictureBody) -> dict[str, Any]:
        """How a picture was made, as its PNG says, in the fields of `/v1/images/generations`."""
        request, _ = read_parameters(await service.picture(decoded(fields.image, "image"), "image"))
        names = (
            *("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "strength"),
            *("image_guidance_scale", "pag_scale", "clip_skip", "noise_level", "class_labels"),
        )
        found = {name: getattr(request, name) for name in names}
        found["size"] = f"{request.width}x{request.height}" if request.width and request.height else None
        if request.reuse > 1:
            found["reuse"] = request.reuse
        found["adapters"] = {name: scale for name, scale in (request.adapters or {}).items() if _is_number(scale)}
        return {name: value for name, value in found.items() if value not in (None, {})}

    return routes


def _about(model: Model) -> dict[str, Any]:
    """Its defaults; of one that is not loaded yet, its name."""
    if model.pipe is None:
        return {"id": model.name}
    height, width = model.size
    stages = model.pipe.stages
    return {
        "id": model.name,
        "size": f"{width}x{height}",
        "multiple": model.pipe.vae.config.factor,
        "num_inference_steps": stages.family.num_inference_steps,
        "guidance_scale": stages.family.guidance_scale,
        "reads": model.reads,
        "adapters": list(stages.adapters.loaded),
        "controls": list(model.pipe.controls),
    }


def _sampler(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "schedules": list(schedules_of(name)),
    }


def _is_number(scale: Any) -> bool:
    return isinstance(scale, (int, float))
