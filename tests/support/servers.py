"""`fastldm serve` as a process, and what its metrics say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from starlette.testclient import TestClient

from fastldm.server.service import Service

ROOT = Path(__file__).resolve().parents[2]
BODY = {"prompt": "a red apple", "num_inference_steps": 1, "seed": 0}
"""The smallest request for a picture."""
LONG = {**BODY, "num_inference_steps": 150}


class Server:
    """`fastldm serve` with the default model, as a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0, key: str | None = None) -> None:
        """options: of the command. port: 0 is a free one."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        keys = {} if key is None else {"FASTLDM_API_KEYS": key}
        command = [sys.executable, "-m", "fastldm", "serve", "--port", str(self.port), *options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **keys}
            )
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=headers)
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

    @property
    def connections(self) -> int:
        """Open connections of clients."""
        of_clients = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == self.port for one in of_clients)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def connect(self) -> socket.socket:
        """A connection on which a client can do as it likes."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

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


def wait_until(condition: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def service_of(client: TestClient) -> Service:
    return client.app.state.service  # type: ignore[attr-defined]
