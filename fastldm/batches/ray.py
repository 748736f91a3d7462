"""Lines that actors on a Ray cluster make. Needs the extra `fastldm[ray]`."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fastldm.batches.lines import Line, Outcome
from fastldm.batches.maker import Maker, ProcessDied, write_files
from fastldm.errors import EngineError, InputError

_PAUSE = 0.5  # seconds until an actor is asked again whether it is there


class RayMaker:
    """Has actors make lines: each takes the next when it has room, wherever it is. Files are written here, so that the
    machines share no folder. Ray starts an actor again where its process dies."""

    def __init__(self, open_maker: Callable[[], Maker], actors: int, *, at_a_time: int = 16, gpus: bool = True) -> None:
        """open_maker: called by each actor, on its machine: a function that can be pickled. What it raises comes from
        the lines. at_a_time: lines that an actor has. gpus: whether to use those of the cluster, one for an actor;
        else its cores are divided. InputError for more actors than fit, EngineError where there is no cluster."""
        self._own, self._closed = not ray.is_initialized(), threading.Event()
        self._lines = queue.SimpleQueue[tuple[Line, Path, Future[Outcome]] | None]()
        if self._own:
            try:
                ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                where = os.environ.get("RAY_ADDRESS", "this machine")
                raise EngineError(
                    f"there is no Ray cluster at {where}: set RAY_ADDRESS, or ray start --head"
                ) from error
        self._actors, self._workers = list[Any](), actors * at_a_time
        try:
            options = {**_share(actors, gpus), "max_concurrency": at_a_time + 1, "max_restarts": -1}
        except InputError:
            self.__exit__()
            raise
        self._actors += [ray.remote(_Actor).options(**options).remote(open_maker) for _ in range(actors)]
        for actor in [*self._actors] * at_a_time:
            threading.Thread(target=self._work, args=(actor,), daemon=True).start()

    def __enter__(self) -> RayMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for actor in self._actors:
            ray.kill(actor)
        for one in [None] * self._workers:
            self._lines.put(one)
        if self._own:
            ray.shutdown()

    def submit(self, line: Line, out: Path) -> Future[Outcome]:
        """As of `Maker`; ProcessDied where the actor's process ends before."""
        future = Future[Outcome]()
        future.set_running_or_notify_cancel()
        self._lines.put((line, out, future))
        return future

    def _work(self, actor: Any) -> None:
        """One line at a time, of those that an actor has."""
        while not self._closed.is_set():
            try:
                ray.get(actor.ready.remote())
            except Exception:  # it died, and is not back yet
                time.sleep(_PAUSE)
                continue
            if (one := self._lines.get()) is None:
                return
            line, out, future = one
            try:
                outcome, contents = ray.get(actor.make.remote(line))
                write_files(out, outcome.files, contents)
                future.set_result(outcome)
            except RayActorError:
                future.set_exception(ProcessDied("of a Ray actor"))
            except RayTaskError as error:
                future.set_exception(error.cause)
            except Exception as error:
                future.set_exception(error)


class _Actor:
    """A maker on a machine of the cluster."""

    def __init__(self, open_maker: Callable[[], Maker]) -> None:
        self._open_maker, self._lock = open_maker, threading.Lock()
        self._maker: Maker | None = None

    def ready(self) -> None:
        """It has what it needs of the cluster."""

    def make(self, line: Line) -> tuple[Outcome, list[bytes]]:
        with self._lock:
            if self._maker is None:
                self._maker = self._open_maker()
        return self._maker.make(line)


def _share(actors: int, gpus: bool) -> dict[str, float]:
    """What each of so many gets of the cluster: a GPU, or as many cores as let all of them fit. InputError where they
    do not."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    devices, cores = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    if gpus and devices:
        if actors > devices:
            raise InputError(f"--ray {actors}: the cluster has {devices} GPUs, one for an actor")
        return {"num_gpus": 1, "num_cpus": 1}
    for share in range(cores // actors, 0, -1):
        if sum(int(node.get("CPU", 0)) // share for node in nodes) >= actors:
            return {"num_cpus": share}
    raise InputError(f"--ray {actors}: the cluster has {cores} cores, and an actor needs one")
