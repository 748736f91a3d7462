"""The connections of a server process, without its models."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from uvicorn.server import ServerState

from fastldm.server.serve import _listening, _protocol
from fastldm.server.settings import Settings

REQUEST = b"GET /sdapi/v1/progress HTTP/1.1\r\nhost: x\r\n\r\n"


async def answers(clients: int, most: int) -> list[tuple[bytes, bytes, int]]:
    """Of clients that come one after the other and stay: header, body, and their connection's TCP_NODELAY."""
    config = uvicorn.Config(PlainTextResponse("served"), http=_protocol(5.0, most), log_config=None)
    config.load()
    state, made = ServerState(), list[Any]()

    def connected() -> asyncio.Protocol:
        made.append(config.http_protocol_class(config=config, server_state=state, app_state={}))  # type: ignore[operator,call-arg]
        return made[-1]  # type: ignore[no-any-return]

    found, writers = [], []
    server = await asyncio.get_running_loop().create_server(connected, sock=_listening(Settings(port=0)))
    async with server:
        for _ in range(clients):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writers.append(writer)
            while len(made) < len(writers) or made[-1].transport is None:
                await asyncio.sleep(0)
            at_once = made[-1].transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.write(REQUEST)
            header = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in header.split(b"\r\n") if line.startswith(b"content-length: "))
            found.append((header, await reader.readexactly(int(length.split()[1])), at_once))
        assert await reader.read() == b"" if clients > most else not reader.at_eof()
        for writer in writers:
            writer.close()
    return found


def test_answers_leave_at_once() -> None:
    """Not when the client has confirmed their first packet, which takes it 40 ms."""
    assert all(at_once for _, _, at_once in asyncio.run(answers(1, 8)))


def test_one_connection_too_many_is_503_and_closed() -> None:
    *served, (header, body, _) = asyncio.run(answers(3, 2))
    assert [content for _, content, _ in served] == [b"served"] * 2
    assert header.startswith(b"HTTP/1.1 503")
    assert b"connection: close" in header
    assert b"retry-after: 1" in header
    assert "as many connections as it takes" in json.loads(body)["detail"]  # in the path's dialect
