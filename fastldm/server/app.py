"""The application: dialects, health, metrics, and what lies around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from fastldm.pipeline import Pipeline
from fastldm.server import a1111, extras, openai, page
from fastldm.server.errors import ApiError, answer, api_error
from fastldm.server.jobs import Jobs
from fastldm.server.metrics import CONTENT_TYPE
from fastldm.server.middleware import Keyed, Limited, Observed, cors
from fastldm.server.models import Models
from fastldm.server.service import Service
from fastldm.server.settings import Settings
from fastldm.version import __version__


def create_app(settings: Settings, pipelines: Mapping[str, Pipeline] | None = None) -> FastAPI:
    """An ASGI application. pipelines: models of the settings that are loaded already, by name; the others are loaded
    here, unless they are at first use. Raises what loading raises."""
    models = Models(settings, pipelines)
    if settings.load == "start":
        models.load()
    service = Service(settings, models)
    jobs = Jobs(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await service.drain()

    app = FastAPI(
        title="fastldm",
        version=__version__,
        description="Pictures from latent diffusion models.",
        lifespan=lifespan,
        docs_url=None,  # its page loads from elsewhere
        redoc_url=None,
        middleware=[
            Middleware(Observed, log=settings.log, count=service.metrics.http),
            *cors(settings),
            Middleware(Keyed, keys=settings.api_keys),
            Middleware(Limited, settings=settings),
        ],
        # All others are answered by Observed.
        exception_handlers=dict.fromkeys((HTTPException, RequestValidationError), _answered),
    )
    app.state.service = service
    app.include_router(openai.router(service, jobs))
    app.include_router(a1111.router(service))
    app.include_router(extras.router(service))
    app.include_router(page.router(service))

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"], responses={503: {"description": "Not yet, or not any more"}})
    async def ready() -> Response:
        """Whether it takes requests, and its models are warm."""
        state = "draining" if service.draining else "ready" if service.warm else "warming up"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE)

    return app


async def _answered(request: HTTPRequest, error: Exception) -> Response:
    path, request_id = request.scope["path"], request.scope.get("request_id", "")
    if isinstance(error, RequestValidationError) and not _is_json(request):
        error = ApiError(415, "expected a JSON body: send Content-Type: application/json", "unsupported_media_type")
    return answer(api_error(error, request_id), path, request_id)


def _is_json(request: HTTPRequest) -> bool:
    """Whether a body that is wrong was at least said to be JSON, or a form that a form was asked for."""
    kind = request.headers.get("content-type", "").lower()
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    return not has_body or "json" in kind or kind.startswith("multipart/form-data")
