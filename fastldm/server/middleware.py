"""Pure ASGI around all dialects: what is logged and counted, who may ask, and how much a client may send.

From the outside in: `Observed`, `Keyed`, `Limited`. Errors that are raised here are answered in the dialect's shape.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastldm.server.errors import ApiError, answer, api_error, stopping
from fastldm.server.settings import MIB, Settings

access = logging.getLogger("fastldm.server.access")

OPEN_PATHS = re.compile(r"/(health|ready|page/.*)?")
"""What is answered without a key: the page's files, too, which asks for it then."""


def cors(settings: Settings) -> list[Middleware]:
    """What lets the web pages of `Settings.cors_origins` use the server; it answers their questions without a key."""
    if not settings.cors_origins:
        return []
    methods, headers = ["GET", "POST", "DELETE"], ["authorization", "content-type", "x-fastldm-detach"]
    options = {"allow_origins": settings.cors_origins, "allow_methods": methods, "allow_headers": headers}
    return [Middleware(CORSMiddleware, **options, expose_headers=["x-request-id", "retry-after"])]  # type: ignore[arg-type]


def write_log() -> None:
    """The server's own lines, as they are, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    server = logging.getLogger("fastldm.server")
    server.addHandler(handler)
    server.setLevel(logging.INFO)
    server.propagate = False


class Observed:
    """Gives each request an id, answers what nobody else did, and tells the log and the metrics."""

    def __init__(self, app: ASGIApp, log: str, count: Callable[[str, str, int, float], None]) -> None:
        """count: called with endpoint, method, status and seconds."""
        self._app, self._log, self._count = app, log, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status, size = time.perf_counter(), 0, 0
        request_id = scope.setdefault("request_id", secrets.token_hex(8))  # a router in front has given it one
        scope["owner"] = ""

        async def sent(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-request-id", request_id)
                headers.setdefault("x-content-type-options", "nosniff")
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by the server, when requests under way had their time
            if status:
                raise
            await answer(stopping(), scope["path"], request_id)(scope, receive, sent)
        except Exception as error:
            if not status:
                await answer(api_error(error, request_id), scope["path"], request_id)(scope, receive, sent)
            elif not isinstance(error, OSError):  # of a client that has gone
                api_error(error, request_id)  # logs it: the answer has begun
        finally:
            seconds = time.perf_counter() - start
            endpoint = getattr(scope.get("route"), "path", None) or "other"
            self._count(endpoint, scope["method"], status or 499, seconds)
            if self._log != "off":
                self._write(scope, status or 499, size, seconds)

    def _write(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        """Neither bodies, queries nor keys: passwords come in all of them."""
        path = quote(scope.get("raw_path", b"").partition(b"?")[0][:500], safe="/%:@!$&'()*+,;=")[:500]
        client = str((scope.get("client") or ("-",))[0])  # what a proxy says it is
        record: dict[str, Any] = {
            "client": client if re.fullmatch(r"[\w.:%-]{1,100}", client, re.ASCII) else "-",
            "key": scope["owner"] or None,
            "method": scope["method"][:20] if scope["method"].isalpha() else "-",
            "path": path,
            "status": status,
            "bytes": size,
            "ms": round(1000 * seconds, 1),
            "id": scope["request_id"],
        }
        if self._log == "json":
            access.info("%s", json.dumps({"time": round(time.time(), 3), **record}))
        else:
            access.info("%s", " ".join("-" if value is None else str(value) for value in record.values()))


class Keyed:
    """Asks for one of the keys: `Authorization: Bearer KEY`, or Basic with the key as password or as name:password.

    `scope["owner"]` is then a short name of the key, which is not the key.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._keys = {digest: f"key-{digest.hex()[:8]}" for digest in digests}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not OPEN_PATHS.fullmatch(scope["path"]):
            owner = self._owner(Headers(scope=scope).get("authorization", ""))
            if owner is None:
                path = scope["path"]
                scheme = 'Basic realm="fastldm"' if path.startswith("/sdapi/") else "Bearer"
                error = ApiError(
                    401,
                    "no valid API key was given: send it as `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    kind="authentication_error",
                    headers={"www-authenticate": scheme},
                )
                return await answer(error, path, scope["request_id"])(scope, receive, send)
            scope["owner"] = owner
        return await self._app(scope, receive, send)

    def _owner(self, authorization: str) -> str | None:
        """Compared in constant time with every key."""
        scheme, _, value = authorization.partition(" ")
        candidates = [value.strip()]
        if scheme.lower() == "basic":
            try:
                decoded = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, ValueError):
                return None
            candidates = [decoded, decoded.partition(":")[2]]
        elif scheme.lower() != "bearer":
            return None
        owner = None
        for candidate in candidates:
            digest = hashlib.sha256(candidate.encode()).digest()
            for key, name in self._keys.items():
                if hmac.compare_digest(digest, key):
                    owner = name
        return owner


class Limited:
    """Bounds the size of a body and the time that a client takes to send it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._max, self._seconds = app, int(settings.max_body * MIB), settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # The connection stays open for the rest, which is thrown away: else the client would fail before it is told.
        too_large = ApiError(413, f"the body has more than {self._max} bytes", "too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max:
            return await answer(too_large, scope["path"], scope["request_id"])(scope, receive, send)
        received, whole, until = 0, False, asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal received, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                left = until - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {self._seconds:g} seconds",
                    "body_timeout",
                    retry=False,
                    headers={"connection": "close"},
                ) from None
            received += len(message.get("body", b""))
            if received > self._max:
                raise too_large
            whole = not message.get("more_body", False)
            return message

        return await self._app(scope, limited, send)
