"""Stages that run one after the other, each in processes of its own, so that none can crash another.

    stages = [Stage("ceilings", [[python, "-m", ...]], seconds=30), ...]
    run(stages, folder, seconds=350)             # never raises for a stage's failure; returns the status of each
    for row in read(folder): ...                 # all rows, complete lines only

A stage's process reports a row by `emit(key=value, ...)`: a line of standard output that starts with ASCII's record
separator (RFC 7464). Only this process writes the folder, each row as soon as it arrives:

    results.jsonl    a row a line: {"stage": ..., ...}; of each stage one with "status", its last
    log.txt          all further output of the stages

A stage that raises, hangs, is killed or stops in the middle of a line does not affect the rest. This module does not
import torch: a broken driver must not break its own report.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

RESULTS, LOG = "results.jsonl", "log.txt"
LOG_BYTES = 12 << 20
"""The most bytes of the log: the results that a machine returns are limited."""
_MARK = "\x1e"
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Commands whose rows belong together."""

    name: str
    commands: Sequence[Sequence[str]]
    """In sequence, or in parallel."""
    seconds: float
    """The limit for all of them together; then they are killed."""
    together: bool = False
    """Whether the commands run in parallel: where nothing is timed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """The working folder of the commands."""


def emit(**row: Any) -> None:
    """Report a row to the process that runs this stage. Numbers that JSON lacks become text."""
    line = f"{_MARK}{json.dumps(_finite(row), default=str)}\n"
    os.write(1, line.encode())  # one write: a row is neither mixed with those of other processes nor buffered


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read(folder: Path) -> list[Row]:
    """All rows of a folder. An incomplete line (the machine went away) is skipped."""
    path = folder / RESULTS
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("stage"), str):
                rows.append(row)
    return rows


def ended(rows: Sequence[Row]) -> dict[str, str]:
    """The last status of each stage: "done", "failed", "timed out", "killed" or "no time"."""
    return {row["stage"]: row["status"] for row in rows if "status" in row}


def run(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    *,
    resume: bool = False,
    say: Callable[[str], object] = print,
) -> dict[str, str]:
    """Run the stages, in order, for at most `seconds` in all. Returns the status of each, by name.

    resume: skip the stages that are "done" in this folder; otherwise the folder must have no results yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = ended(read(folder))
    if before and not resume:
        raise FileExistsError(f"{folder} has results already: --resume goes on from them, another folder starts anew")
    deadline = time.monotonic() + seconds
    status: dict[str, str] = {}
    with (folder / RESULTS).open("ab") as results, (folder / LOG).open("ab") as log:
        _end_line(folder / RESULTS, results)

        def write(row: Row) -> None:
            results.write(json.dumps(row).encode() + b"\n")
            results.flush()

        for stage in stages:
            if resume and before.get(stage.name) == "done":
                status[stage.name] = "done"
                say(f"{stage.name:16} done before")
                continue
            remaining = deadline - time.monotonic()
            if remaining < min(5.0, stage.seconds):
                status[stage.name] = "no time"
                write({"stage": stage.name, "status": "no time", "seconds": 0.0})
                say(f"{stage.name:16} no time left")
                continue
            start = time.monotonic()
            ending, reason = _run_stage(stage, min(stage.seconds, remaining), write, log, say)
            elapsed = time.monotonic() - start
            status[stage.name] = ending
            row = {"stage": stage.name, "status": ending, "seconds": round(elapsed, 1)}
            write(row | ({"why": reason} if reason else {}))
            say(f"{stage.name:16} {ending} in {elapsed:.0f} s{': ' + reason if reason else ''}")
    return status


def _end_line(path: Path, file: IO[bytes]) -> None:
    """End the last line of the file, which may have been cut off."""
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write(b"\n")


def _run_stage(
    stage: Stage, seconds: float, write: Callable[[Row], None], log: IO[bytes], say: Callable[[str], object]
) -> tuple[str, str]:
    """The status of the stage, and the reason if it is not "done"."""
    deadline = time.monotonic() + seconds
    groups = [stage.commands] if stage.together else [[command] for command in stage.commands]
    failures: list[tuple[str, str]] = []
    for commands in groups:
        failures += _in_parallel(stage, commands, deadline, write, log, say)
    if not failures:
        return "done", ""
    worst = max((ending for ending, _ in failures), key=("failed", "killed", "timed out").index)
    return worst, "; ".join(reason for _, reason in failures)[:1000]


class _Output:
    """The output of a process, line by line: rows to the results, the rest to the log."""

    def __init__(self, stage: Stage, write: Callable[[Row], None], log: IO[bytes], say: Callable[[str], object]):
        self.stage, self.write, self.log, self.say = stage, write, log, say
        self.pending, self.last = b"", ""

    def take(self, data: bytes) -> None:
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace"))

    def end(self) -> None:
        """After the process has ended: an incomplete line is no row."""
        if self.pending:
            self._log(self.pending.decode(errors="replace"))

    def _line(self, line: str) -> None:
        _, mark, text = line.rpartition(_MARK)
        if mark:
            with contextlib.suppress(ValueError):
                row = json.loads(text)
                if isinstance(row, dict):
                    self.write({**row, "stage": self.stage.name})
                    if "say" in row:
                        self.say(f"{self.stage.name:16} {row['say']}")
                    return
        self._log(line)

    def _log(self, line: str) -> None:
        if line.strip():
            self.last = line.strip()
        if self.log.tell() < LOG_BYTES:
            self.log.write(f"{self.stage.name}: {line}\n".encode())
            self.log.flush()


def _in_parallel(
    stage: Stage,
    commands: Sequence[Sequence[str]],
    deadline: float,
    write: Callable[[Row], None],
    log: IO[bytes],
    say: Callable[[str], object],
) -> list[tuple[str, str]]:
    """(status, reason) of each command that failed. No process is left running."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    failures: list[tuple[str, str]] = []
    processes: list[tuple[Sequence[str], subprocess.Popen[bytes], _Output]] = []
    with selectors.DefaultSelector() as selector:
        try:
            for command in commands:
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=stage.folder,
                        start_new_session=True,  # so that its children can be killed with it
                    )
                except OSError as error:
                    failures.append(("failed", f"{command[0]}: {error.strerror}"))
                    continue
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                output = _Output(stage, write, log, say)
                processes.append((command, process, output))
                selector.register(process.stdout, selectors.EVENT_READ, output)
            _listen(selector, [process for _, process, _ in processes], deadline)
        finally:
            for command, process, output in processes:
                timed_out = process.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and its children
                code = process.wait()
                assert process.stdout is not None
                with contextlib.suppress(BlockingIOError, OSError):
                    while data := process.stdout.read(1 << 16):  # None where it would block
                        output.take(data)
                output.end()
                process.stdout.close()
                name = " ".join(command[1:] if len(command) > 1 else command)
                if timed_out:
                    failures.append(("timed out", f"{name}: stopped at its limit; last said: {output.last[-200:]}"))
                elif code < 0:
                    failures.append(("killed", f"{name}: by signal {-code}; last said: {output.last[-200:]}"))
                elif code:
                    failures.append(("failed", f"{name}: exit status {code}; last said: {output.last[-200:]}"))
    return failures


def _listen(selector: selectors.BaseSelector, processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Read the output of the processes until all have ended or the time is over."""
    while selector.get_map() and time.monotonic() < deadline:
        for key, _ in selector.select(timeout=0.1):
            data = os.read(key.fd, 1 << 16)
            if data:
                key.data.take(data)
            else:
                selector.unregister(key.fileobj)
        if all(process.poll() is not None for process in processes):
            return  # a grandchild may hold a pipe open: its content is read at the end
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def of(rows: Sequence[Row], stage: str) -> Iterator[Row]:
    """The rows of one stage, without its status."""
    return (row for row in rows if row["stage"] == stage and "status" not in row)
