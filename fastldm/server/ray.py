"""Ray Serve: the server's application on many machines, a `Session` in each replica. Needs the extra `fastldm[ray]`.

    serve run fastldm.server.ray:app model=./sd15 num_gpus=1 insecure=true

A `Router`, which has no model, reads what a request needs to be loaded, and hands it to a `Replica` that has it. The
replica's answer goes through it message by message; where a replica dies, its requests are told so in their dialect.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastldm.conditioning.prompt import split_lora_tags
from fastldm.errors import FastLDMError, InputError
from fastldm.server.errors import ApiError, body, retry_after
from fastldm.server.middleware import Keyed, Limited, Observed, cors, write_log
from fastldm.server.settings import Settings, from_options, number

_ALONE = ("/", "/v1/jobs", "/metrics", "/sdapi/v1/progress", "/sdapi/v1/interrupt", "/sdapi/v1/skip")
"""What one process keeps, and another replica would not know."""
_MORE = 5.0  # seconds that a replica has beside those that its requests have


def app(options: Mapping[str, Any]) -> Application:
    """What `serve run fastldm.server.ray:app NAME=VALUE ...`, and `import_path` and `args` of a Serve configuration
    build: options of `fastldm serve`, by their names, and those of `build`. A key is needed, or `insecure`; where the
    proxies listen is Serve's. InputError for what is no option."""
    placing = ("num_replicas", "num_cpus", "num_gpus", "max_loaded", "autoscaling_config")
    numbers = {name: number(name, options[name]) for name in placing if name in options}
    for name in ("host", "port", "public_url", "keep", "max_kept"):
        if name in (option.replace("-", "_") for option in options):
            raise InputError(f"there is no option {name!r} here: see docs/ray.md")
    rest = {name: value for name, value in options.items() if name not in placing}
    return build(from_options({"host": "0.0.0.0", **rest}), **numbers)


def build(
    settings: Settings,
    *,
    num_replicas: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_loaded: int = 16,
    autoscaling_config: Mapping[str, Any] | None = None,
) -> Application:
    """An application for `ray.serve.run`.

    num_cpus, num_gpus: of each replica, which torch's threads keep to. autoscaling_config: Ray's, in place of
    `num_replicas`; its target_ongoing_requests is by default what shares a batch. max_loaded: with `Settings.load`
    "first", how many models and adapters a replica keeps, of which the longest unused go first.
    """
    drain = settings.drain + _MORE
    scaling: dict[str, Any] = {"num_replicas": num_replicas}
    if autoscaling_config is not None:
        target = {"target_ongoing_requests": settings.max_batch}
        scaling = {"autoscaling_config": {**target, **autoscaling_config}}
    replicas = serve.deployment(
        max_ongoing_requests=2 * settings.max_batch,  # so that full batches follow each other; others wait in routers
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.2,
        **scaling,
    )(Replica)
    router = serve.deployment(
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.2,
    )(serve.ingress()(Router))
    return router.bind(settings, replicas.bind(settings, max_loaded))


class Replica:
    """The application of `fastldm serve`, which a router calls."""

    async def __init__(self, settings: Settings, max_loaded: int) -> None:  # type: ignore[misc]
        from fastldm.server.app import create_app

        write_log()
        self._app = await asyncio.to_thread(create_app, dataclasses.replace(settings, log="off"))
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        service = self._app.state.service
        while not service.warm:
            await asyncio.sleep(0.02)
        models, self._running = service.models, set[asyncio.Task[None]]()
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

        @serve.multiplexed(max_num_models_per_replica=max_loaded)
        async def hold(need: str) -> _Held:
            model, *adapters = json.loads(need)
            async with models.use(model, adapters):
                return _Held(models, model, adapters)

        self._hold = hold

    async def answer(self, scope: dict[str, Any], content: bytes, needs: list[str]) -> AsyncIterator[list[Message]]:
        """The messages of the application's answer, as many at a time as there are. content: the request's whole body.
        When the iteration is left, the client has gone."""
        for need in needs:
            with suppress(FastLDMError):  # which the application then raises too
                await self._hold(need)
        messages, gone = asyncio.Queue[Message | None](), asyncio.Event()
        received = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> Message:
            for message in received:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app({**scope, "type": "http"}, receive, messages.put))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            ready: list[Message | None] = []
            while None not in ready:
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                yield [self._signed(message) for message in ready if message is not None]
        finally:
            gone.set()

    def _signed(self, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message["headers"], (b"x-fastldm-replica", self._name)]}

    async def check_health(self) -> None:
        """Ray starts another replica where this one's loop does not come to it."""

    async def __del__(self) -> None:
        """The session's pictures have what is left of the time to drain."""
        await self._lifespan.__aexit__(None, None, None)


class _Held:
    """A model, perhaps with an adapter, which goes when Serve says so."""

    def __init__(self, models: Any, model: str, adapters: list[str]) -> None:
        self._models, self._model, self._adapters = models, model, adapters

    def __del__(self) -> None:
        """Serve calls it, and then Python: once."""
        while self._adapters:
            self._models.unload_lora(self._model, self._adapters.pop())


class Router:
    """The ingress: keys, limits, and the replica that a request goes to."""

    def __init__(self, settings: Settings, replicas: Any) -> None:
        write_log()
        self._settings, self._replicas = settings, replicas.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        inner: ASGIApp = Keyed(Limited(self.forward, self._settings), self._settings.api_keys)
        for one in cors(self._settings):
            inner = one.cls(inner, *one.args, **one.kwargs)
        observed = Observed(inner, self._settings.log, lambda *_: None)  # Ray counts

        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                return await _lifespan(receive, send)
            id = Headers(scope=scope).get("x-request-id", "")  # Serve's, or the client's, which Serve answers with
            if re.fullmatch(r"[\w.:-]{1,64}", id, re.ASCII):
                scope["request_id"] = id

            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = [one for one in message["headers"] if one[0].lower() != b"x-request-id"]
                    message = {**message, "headers": headers}
                await send(message)

            return await observed(scope, receive, sent)

        return asgi

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered by a replica. ApiError for what no replica can answer for all."""
        content = await _whole(receive)
        fields = await _fields(scope, content)
        _check_alone(scope, fields, next(iter(self._settings.models)))
        needs = self._needs(fields)
        plain = {name: value for name, value in scope.items() if isinstance(value, (str, bytes, list, tuple, dict))}
        handle = self._replicas.options(multiplexed_model_id=needs[0]) if needs else self._replicas
        plain |= {"extensions": {}, "request_id": f"{scope['request_id']}-{secrets.token_hex(4)}"}
        answer = handle.remote(plain, content, needs)
        begun: Message = {}
        try:
            async for messages in answer:
                for message in messages:
                    begun = begun or message
                    await send(message)
        except (RayActorError, DeploymentUnavailableError):
            message = "the replica that had the request is lost: ask again"
            lost = ApiError(503, message, "worker_lost", kind="server_error")
            if not begun:
                raise lost from None
            if b"text/event-stream" in dict(begun["headers"]).get(b"content-type", b""):
                event = json.dumps({"type": "error", "error": body(lost)})
                await send({"type": "http.response.body", "body": f"event: error\ndata: {event}\n\n".encode()})
        except BackPressureError:
            message = "as many requests wait as may: try again later"
            raise ApiError(429, message, "queue_full", kind="rate_limit_error", headers=retry_after(None)) from None
        finally:
            answer.cancel()  # of one that has ended, nothing

    def _needs(self, fields: Mapping[str, Any]) -> list[str]:
        """What a replica loads for a request: a model, or one with an adapter, for each that it names. Nothing where
        all replicas have everything from the start."""
        if self._settings.load == "start" or "adapters" not in fields:
            return []
        settings = self._settings
        model = next((name for name in settings.models if name == fields["model"]), next(iter(settings.models)))
        adapters = [name for name in settings.loras if name in fields["adapters"]]
        return [json.dumps([model, name]) for name in adapters] or [json.dumps([model])]


async def _lifespan(receive: Receive, send: Send) -> None:
    for _ in range(2):
        await send({"type": f"{(await receive())['type']}.complete"})


async def _whole(receive: Receive) -> bytes:
    """A body, which `Limited` bounds."""
    content, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(content)


async def _fields(scope: Scope, content: bytes) -> dict[str, Any]:
    """Of a request for pictures: model, names of adapters, response_format. Nothing of any other, and of a body that
    the application will refuse."""
    path = scope["path"]
    try:
        if path in ("/v1/images/edits", "/v1/images/variations"):
            return await _of_form(scope, content)
        if path == "/v1/images/generations":
            return _of_json(json.loads(content))
        if path in ("/sdapi/v1/txt2img", "/sdapi/v1/img2img"):
            return _of_a1111(json.loads(content))
        if path == "/sdapi/v1/options" and scope["method"] == "POST":
            return {"model": json.loads(content).get("sd_model_checkpoint")}
    except Exception:
        pass
    return {}


async def _of_form(scope: Scope, content: bytes) -> dict[str, Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": content}

    async with Request(scope, receive).form(max_files=8, max_fields=128) as form:
        texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    named = [name.removeprefix("adapters[").removesuffix("]") for name, _ in texts if name.startswith("adapters[")]
    listed = [value for name, value in texts if name == "adapters[][name]"]
    return {**_of_json(dict(texts)), "adapters": [*named, *listed]}


def _of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    adapters = fields.get("adapters") or ()
    names = [*adapters] if isinstance(adapters, dict) else [one["name"] for one in adapters]
    return {"model": fields.get("model"), "adapters": names, "response_format": fields.get("response_format")}


def _of_a1111(fields: Mapping[str, Any]) -> dict[str, Any]:
    model = (fields.get("override_settings") or {}).get("sd_model_checkpoint")
    return {"model": model, "adapters": [name for name, _ in split_lora_tags(fields.get("prompt") or "")[1]]}


def _check_alone(scope: Scope, fields: Mapping[str, Any], first: str) -> None:
    """ApiError for what would be kept by one replica, where the next request may not find it."""
    path, what = scope["path"].rstrip("/") or "/", ""
    if path in _ALONE or path.startswith(("/v1/jobs/", "/v1/images/files/", "/page/")):
        what = path
    elif "x-fastldm-detach" in Headers(scope=scope):
        what = "x-fastldm-detach"
    elif fields.get("response_format") == "url":
        what = "response_format url"
    elif path == "/sdapi/v1/options" and fields.get("model") not in (None, "", first):
        what = "sd_model_checkpoint for later requests (override_settings has it for one)"
    if what:
        message = f"{what} is not there where replicas serve, which share nothing: see docs/ray.md"
        raise ApiError(422, message, "not_supported")
