"""A server process: uvicorn, with a time for a request's header, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastldm.errors import InputError
from fastldm.server.app import create_app
from fastldm.server.errors import ApiError, answer, retry_after
from fastldm.server.service import Service
from fastldm.server.settings import Settings

_GRACE = 1.0
"""Seconds in which requests that were cancelled at the end are answered."""

logger = logging.getLogger("fastldm.server")


def serve(settings: Settings) -> None:
    """Load the models, and answer until SIGTERM or Ctrl-C: what is under way then has `Settings.drain` seconds, or
    until a second signal. Raises what loading raises, and InputError for an address that cannot be had."""
    with _listening(settings) as listening:
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            http=_protocol(settings.body_timeout, settings.max_connections),
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=settings.drain + _GRACE,  # type: ignore[arg-type]
        )
        host, port = listening.getsockname()[:2]
        logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        _Server(config, app.state.service).run([listening])


def _listening(settings: Settings) -> socket.socket:
    """Before models are loaded, which takes time."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{settings.host}:{settings.port} cannot be served ({reason}): choose another port") from error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once."""
        loop, seconds = asyncio.get_running_loop(), self._service.settings.drain
        if self.should_exit:
            self.force_exit = True
            loop.call_soon_threadsafe(self._service.stop_now)
            loop.call_soon_threadsafe(loop.call_later, 0.05, self._abort)
        else:
            logger.info("stopping: requests under way have %g s, or until a second signal", seconds)
            loop.call_soon_threadsafe(self._service.stop)
            loop.call_soon_threadsafe(loop.call_later, seconds, self._service.stop_now)
        self.should_exit = True

    def _abort(self) -> None:
        """Close what is open, be it in the middle of something: newer Pythons' servers wait for that."""
        for connection in [*self.server_state.connections]:
            connection.transport.abort()


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """What the connection that is one too many is answered, before it is closed."""
    message = "this server has as many connections as it takes: try again later"
    headers = {"connection": "close", **retry_after(1.0)}
    error = ApiError(503, message, "too_many_connections", kind="server_error", headers=headers)
    await answer(error, scope["path"], secrets.token_hex(8))(scope, receive, send)


def _protocol(seconds: float, connections: int) -> type[asyncio.Protocol]:
    """uvicorn's, which would wait for ever for a header, or half of one, and for a client to read: each has so many
    seconds here. So many `connections` are served at a time."""

    class Timed(H11Protocol):
        _header: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                logger.warning("a connection beyond the %d of --max-connections is refused", connections)
                self.app = _busy
            # asyncio does so for sockets that were made with this protocol's number: an answer's second packet would
            # wait 40 ms for the client to confirm the first.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport.set_write_buffer_limits(high=0)  # to be told of all that is not read
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._header)
            _cancel(self._reading)
            super().connection_lost(exc)

        def _wait(self) -> None:
            """Begin to count, unless it is counted already, or the header is whole."""
            if self.cycle is not None and not self.cycle.response_complete:
                _cancel(self._header)
                self._header = None
            elif self._header is None:
                self._header = self.loop.call_later(seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader()

        def resume_writing(self) -> None:
            _cancel(self._reading)
            super().resume_writing()

        def _watch_reader(self, before: float = math.inf) -> None:
            """Until all is read. before: how much was not, so many seconds ago."""
            left = self.transport.get_write_buffer_size()
            if left < before:
                self._reading = self.loop.call_later(seconds, self._watch_reader, left)
            else:
                self.transport.abort()

    return Timed


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
