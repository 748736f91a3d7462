"""A Ray cluster of two cores of this machine, and what Serve says of the application on it."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
from ray import serve
from servers import ROOT, free_port, wait_until


@contextmanager
def cluster() -> Iterator[Path]:
    """Its folder. In the end none of its processes is left."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: sockets' names are
    before = dict(os.environ)
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/support"))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32), PYTHONPATH=path)
    # Of a proxy, on a machine that others keep busy.
    os.environ.update(RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60", RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60")
    options = {"object_store_memory": 200_000_000, "include_dashboard": False, "_temp_dir": str(folder)}
    try:
        ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", **options)
        yield folder
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
        wait_until(lambda: not of_folder(folder), 30)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serving() -> Iterator[str]:
    """Serve's proxy on a cluster; its address."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def of_folder(folder: Path, title: str = "") -> list[psutil.Process]:
    """A cluster's processes; workers, whose titles are what they run, are the raylet's children."""
    raylets = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]
    every = {child for one in raylets for child in [one, *_children(one)]}
    return [one for one in every if title in _title(one)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def running(deployment: str = "Replica") -> int:
    """How many replicas take requests."""
    found = serve.status().applications.get("default")
    if found is None or deployment not in found.deployments:
        return 0
    return int(found.deployments[deployment].replica_states.get("RUNNING", 0))  # type: ignore[call-overload]
