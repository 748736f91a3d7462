"""What Ray Serve costs on one machine, with two replicas of the default model: `python -m benchmarks.ray_serve`.

Printed: seconds until it is ready, what it adds to a request beside `fastldm serve` in turns, seconds until a replica
that was killed is back, and how many requests go where their adapter lies. docs/ray.md has a run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import ray
from ray import serve

from fastldm.server.ray import app
from fastldm.server.settings import Settings

PORTS = {"fastldm serve": 8124, "proxy": 8123}
BODY = {"prompt": "a red apple", "num_inference_steps": 1, "seed": 0, "size": "32x32"}
LORAS = ["sketch", "pixel", "gold"]
ROUNDS, EACH = 4, 25


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """`fastldm serve` beside it."""
    command = [sys.executable, "-m", "fastldm", "serve", "--port", str(PORTS["fastldm serve"]), "--log", "off"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            wait_until(lambda: ready(PORTS["fastldm serve"]))
            yield
        finally:
            process.terminate()


def client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)


def ready(port: int) -> bool:
    with client(port) as http, contextlib.suppress(httpx.HTTPError):
        return http.get("/ready").status_code == 200
    return False


def wait_until(condition: Callable[[], bool]) -> float:
    start = time.perf_counter()
    while not condition():
        time.sleep(0.05)
    return time.perf_counter() - start


def deployed(target: Any) -> float:
    start = time.perf_counter()
    serve.run(target)
    return time.perf_counter() - start


def replicas() -> list[psutil.Process]:
    """Of this cluster, whose raylet is a child of this process."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica:default:Replica" in " ".join(one.cmdline()):
                found.append(one)
    return found


def added(names: dict[str, int]) -> None:
    """What a request takes beside its session, in turns; medians of rounds."""
    health: dict[str, list[float]] = {name: [] for name in names}
    around: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, port in names.items():
            with client(port) as http:
                times, rests = [], []
                for _ in range(EACH):
                    start = time.perf_counter()
                    http.get("/health")
                    middle = time.perf_counter()
                    answer = http.post("/v1/images/generations", json=BODY).json()
                    times.append(middle - start)
                    rests.append(time.perf_counter() - middle - answer["timings"]["total"])
                health[name].append(1000 * statistics.median(times))
                around[name].append(1000 * statistics.median(rests))
    for name in names:
        cells = [
            f"{statistics.median(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in (health[name], around[name])
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def bare() -> Any:
    """The application as Serve's ingress, in front of which is no Router."""

    def build() -> Any:
        from fastldm.server.app import create_app

        return create_app(Settings(log="off"))

    return serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=64)(serve.ingress(build)()).bind()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32), PYTHONPATH=str(Path.cwd()))
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    common = {"insecure": True, "log": "off"}
    start = time.perf_counter()
    ray.init(
        num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, _temp_dir=folder, log_to_driver=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORTS["proxy"]})
    print(f"load {os.getloadavg()[0]:.1f}; cluster and proxy: {time.perf_counter() - start:.1f} s")
    try:
        print(f"two replicas: {deployed(app({**common, 'num_replicas': 2})):.1f} s more")
        own = [one for one in psutil.Process().children(recursive=True) if one not in replicas()]
        print(f"Ray's own processes: {sum(one.memory_info().rss for one in own) / 2**20:.0f} MiB resident")
        for _ in range(3):
            lost = replicas()[0]
            lost.send_signal(signal.SIGKILL)
            lost.wait()
            back = wait_until(lambda: status() < 2) + wait_until(lambda: status() == 2)
            print(f"killed: both back after {back:.1f} s, load {os.getloadavg()[0]:.1f}")
        with plain():
            added({"fastldm serve": PORTS["fastldm serve"], "with Router": PORTS["proxy"]})
            deployed(bare())
            added({"fastldm serve": PORTS["fastldm serve"], "without Router": PORTS["proxy"]})
        deployed(app({**common, "num_replicas": 2, "load": "first", "lora": LORAS}))
        with client(PORTS["proxy"]) as http:
            places = {name: place(http, name) for name in LORAS}
            time.sleep(1)
            asked = random.Random(0).choices(LORAS, k=100)
            hits = sum(place(http, name) == places[name] for name in asked)
        print(f"{hits} of {len(asked)} requests went where their adapter lies, of {len(set(places.values()))} replicas")
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def status() -> int:
    found = serve.status().applications["default"].deployments["Replica"].replica_states
    return int(found.get("RUNNING", 0))  # type: ignore[call-overload]


def place(http: httpx.Client, name: str) -> str:
    answer = http.post("/v1/images/generations", json={**BODY, "adapters": {name: 0.8}})
    answer.raise_for_status()
    return str(answer.headers["x-fastldm-replica"])


if __name__ == "__main__":
    main()
