"""What makes the lines of a batch: a session here, or one in a process of its own, which may die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from fastldm.batches.lines import Line, Outcome
from fastldm.errors import FastLDMError
from fastldm.files import whole_file
from fastldm.image import encode_image, result_parameters
from fastldm.serving.session import Session

_ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


class SubmitsLines(Protocol):
    """What makes lines."""

    def submit(self, line: Line, out: Path) -> Future[Outcome]: ...


class Maker:
    """Makes lines with a session, in this process."""

    def __init__(self, session: Session, model: str, *, kind: str = "PNG") -> None:
        """model: as pictures name it. kind: "PNG", "JPEG" or "WEBP"."""
        self._session, self._model, self._kind = session, model, kind
        self._pool = ThreadPoolExecutor(1024, "fastldm batch")  # each waits for a line

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close(cancel=True)
        self._pool.shutdown(cancel_futures=True)

    def submit(self, line: Line, out: Path) -> Future[Outcome]:
        """Its outcome, when its files are on the disk. OSError where they cannot be written."""
        return self._pool.submit(self._make, line, out)

    def _make(self, line: Line, out: Path) -> Outcome:
        outcome, contents = self.make(line)
        write_files(out, outcome.files, contents)
        return outcome

    def make(self, line: Line) -> tuple[Outcome, list[bytes]]:
        """Its outcome, and the contents of its files, which nobody has written yet."""
        assert line.request is not None
        try:
            result = self._session.submit(line.request).result()
        except (FastLDMError, CancelledError) as error:
            return Outcome(line, error=str(error) or "cancelled"), []
        pairs = zip(result.images, result_parameters(result, self._model), strict=True)
        contents = [encode_image(image, self._kind, text) for image, text in pairs]
        parts = [""] if len(contents) == 1 else [f"-{k}" for k in range(len(contents))]
        names = tuple(f"{line.key}{part}.{_ENDINGS[self._kind]}" for part in parts)
        return Outcome(line, names, result.seeds, result.timings.total), contents


def write_files(out: Path, names: Sequence[str], contents: Sequence[bytes]) -> None:
    """Files that are whole and on the disk, each written beside its name. OSError where they cannot be."""
    for name, content in zip(names, contents, strict=True):
        with whole_file(out / name) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    if names:
        _sync_folder(out)


class ProcessDied(Exception):
    """The process that made a line has ended."""


class ProcessMaker:
    """Has another process make lines, and starts the next where it dies."""

    def __init__(self, open_maker: Callable[[], Maker]) -> None:
        """open_maker: called in that process: a function that can be pickled. What it raises comes from the lines."""
        self._open_maker = open_maker
        self._process: Any = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._open: dict[str, Future[Outcome]] = {}

    def __enter__(self) -> ProcessMaker:
        return self

    def __exit__(self, *_: object) -> None:
        """The process ends when nobody holds the other end of its connection."""
        if self._connection is not None:
            self._connection.close()
            self._process.join(10)
            self._process.kill()

    def submit(self, line: Line, out: Path) -> Future[Outcome]:
        """As of `Maker`; ProcessDied where the process ends before."""
        future = Future[Outcome]()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._open[line.key] = future
            with suppress(OSError):  # it has died, as its reader is about to say
                self._connection.send((line, out))
        return future

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._open_maker), daemon=True)
        self._process.start()
        other.close()
        threading.Thread(target=self._receive, args=(self._connection, self._process), daemon=True).start()

    def _receive(self, connection: Connection, process: Any) -> None:
        with suppress(EOFError, OSError):
            while True:
                key, outcome = connection.recv()
                with self._lock:
                    futures = [self._open.pop(key)] if key else [self._open.pop(one) for one in [*self._open]]
                for future in futures:
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        process.join(10)
        with self._lock:
            lost, self._open = [*self._open.values()], {}
            self._connection = None
        code = process.exitcode
        how = f"exit status {code}" if code is None or code >= 0 else signal.Signals(-code).name
        for future in lost:
            future.set_exception(ProcessDied(how))


def _serve(connection: Connection, open_maker: Callable[[], Maker]) -> None:
    """The other process, until nobody holds the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, which is for who started it
    sending = threading.Lock()

    def send(key: str | None, outcome: Outcome | BaseException) -> None:
        with sending, suppress(OSError):
            connection.send((key, outcome))

    def answer(key: str, future: Future[Outcome]) -> None:
        send(key, future.exception() or future.result())

    try:
        maker = open_maker()
    except Exception as error:
        send(None, error)
        return
    with maker:
        while True:
            try:
                line, out = connection.recv()
            except (EOFError, OSError):
                return
            maker.submit(line, out).add_done_callback(partial(answer, line.key))


def _sync_folder(folder: Path) -> None:
    """So that a name survives a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
