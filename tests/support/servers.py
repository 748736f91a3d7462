"""`fastldm serve` as a process, and what its metrics say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import uvicorn
from starlette.testclient import TestClient

from fastldm.server.service import Service

ROOT = Path(__file__).resolve().parents[2]
BODY = {"prompt": "a red apple", "num_inference_steps": 1, "seed": 0, "size": "32x32"}
"""The smallest request for a picture."""
LONG = {**BODY, "num_inference_steps": 150, "size": "64x64"}


class Server:
    """`fastldm serve` with the default model, as a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0, key: str | None = None) -> None:
        """options: of the command. port: 0 is a free one. key: one, or several divided by commas; the first is used."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        keys = {} if key is None else {"FASTLDM_API_KEYS": key}
        command = [sys.executable, "-m", "fastldm", "serve", "--port", str(self.port), *options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **keys}
            )
        self.headers = {} if key is None else {"authorization": f"Bearer {key.split(',')[0]}"}
        self.client = httpx.Client(base_url=self.url, timeout=300, headers=self.headers)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)

    def make(self, **fields: Any) -> httpx.Response:
        """The answer to a request for a picture."""
        return self.client.post("/v1/images/generations", json={**BODY, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 where it was never counted; the sum over labels that are not given."""
        return metric(self.client.get("/metrics").text, name, **labels)

    def wait_until(self, name: str, value: float, seconds: float = 30, **labels: str) -> None:
        """Until a metric has a value, or more."""
        wait_until(lambda: self.metric(name, **labels) >= value, seconds)

    def wait_until_idle(self, seconds: float = 60) -> None:
        wait_until(lambda: not self.metric("fastldm_num_running_reqs") + self.metric("fastldm_num_queue_reqs"), seconds)

    def is_open(self, connection: socket.socket) -> bool:
        """Whether the server has a client's connection open, which may have closed it."""
        return connection.getsockname()[1] in self.ports_of_clients()

    def ports_of_clients(self) -> set[int]:
        """Of the connections that the server has open."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return {one.raddr.port for one in connections if one.raddr and one.laddr.port == self.port}

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def connect(self) -> socket.socket:
        """A connection on which a client can do as it likes."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def request(self, body: bytes = b"", path: str = "/v1/images/generations", *headers: str) -> bytes:
        """The bytes of a POST of JSON with this server's key."""
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
        if not any(header.startswith(("content-length", "transfer-encoding")) for header in headers):
            lines.append(f"content-length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def metric(text: str, name: str, **labels: str) -> float:
    """A sample's value in Prometheus' text format, the sum over labels that are not given."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    total = 0.0
    for line in text.splitlines():
        sample, _, value = line.rpartition(" ")
        found, _, rest = sample.partition("{")
        if found == name and wanted <= set(rest.rstrip("}").split(",")):
            total += float(value)
    return total


def wait_until(condition: Any, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def service_of(client: TestClient) -> Service:
    return client.app.state.service  # type: ignore[attr-defined]


@contextmanager
def in_thread(app: Any) -> Iterator[str]:
    """An application behind uvicorn in a thread of this process; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@contextmanager
def threads(gate: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """For clients whose requests wait for a gate, which is opened in the end, come what may."""
    with ThreadPoolExecutor(8) as pool:
        try:
            yield pool
        finally:
            gate.set()
