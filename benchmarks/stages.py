"""Stages that run one after the other, each in processes of its own, so that none can take another down.

    stages = [Stage("ceilings", [[python, "-m", ...]], seconds=30), ...]
    run(stages, folder, seconds=350)             # never raises for what a stage does; says how each ended
    for row in read(folder): ...                 # all that was found, whole lines only

A stage's process tells what it finds by `emit(key=value, ...)`: a line of standard output that begins with ASCII's
record separator (RFC 7464). This process alone writes the folder, each row the moment that it comes:

    results.jsonl    a row a line: {"stage": ..., ...}; of each stage one with "status", its last
    log.txt          all else that the stages printed

A stage that raises, hangs, is killed or stops in the middle of a line costs itself and nothing else. This module loads
no torch: a broken driver must not break what reports it.
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
"""Of the log at most so much is kept: what comes back from a machine is limited."""
_MARK = "\x1e"
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Commands that find something out together."""

    name: str
    commands: Sequence[Sequence[str]]
    """One after the other, or side by side."""
    seconds: float
    """What all of them together may take; then they are killed."""
    together: bool = False
    """Whether the commands run side by side: where nothing is timed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """Where the commands run."""


def emit(**row: Any) -> None:
    """Tell the process that runs this stage what was found. Numbers that JSON has none for become texts."""
    line = f"{_MARK}{json.dumps(_finite(row), default=str)}\n"
    os.write(1, line.encode())  # one write: a row is not mixed with others', and is not held back


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read(folder: Path) -> list[Row]:
    """All rows of a folder. A line that is not whole (the machine went away) is passed over."""
    path = folder / RESULTS
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("stage"), str):
                rows.append(row)
    return rows


def ended(rows: Sequence[Row]) -> dict[str, str]:
    """How each stage ended the last time that it ran: "done", "failed", "timed out", "killed" or "no time"."""
    return {row["stage"]: row["status"] for row in rows if "status" in row}


def run(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    *,
    resume: bool = False,
    say: Callable[[str], object] = print,
) -> dict[str, str]:
    """Run the stages, in order, for at most `seconds` in all. Returns how each ended, by name.

    resume: pass over what ended as "done" in this folder before; otherwise the folder must have no results yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = ended(read(folder))
    if before and not resume:
        raise FileExistsError(f"{folder} has results already: --resume goes on from them, another folder begins anew")
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
            left = deadline - time.monotonic()
            if left < min(5.0, stage.seconds):
                status[stage.name] = "no time"
                write({"stage": stage.name, "status": "no time", "seconds": 0.0})
                say(f"{stage.name:16} no time left")
                continue
            began = time.monotonic()
            how, why = _run_stage(stage, min(stage.seconds, left), write, log, say)
            took = time.monotonic() - began
            status[stage.name] = how
            write({"stage": stage.name, "status": how, "seconds": round(took, 1), **({"why": why} if why else {})})
            say(f"{stage.name:16} {how} in {took:.0f} s{': ' + why if why else ''}")
    return status


def _end_line(path: Path, file: IO[bytes]) -> None:
    """What comes next begins a line of its own, whatever the one before was cut off at."""
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write(b"\n")


def _run_stage(
    stage: Stage, seconds: float, write: Callable[[Row], None], log: IO[bytes], say: Callable[[str], object]
) -> tuple[str, str]:
    """How the stage ended, and why if it is not "done"."""
    deadline = time.monotonic() + seconds
    groups = [stage.commands] if stage.together else [[command] for command in stage.commands]
    bad: list[tuple[str, str]] = []
    for commands in groups:
        bad += _side_by_side(stage, commands, deadline, write, log, say)
    if not bad:
        return "done", ""
    worst = max((how for how, _ in bad), key=("failed", "killed", "timed out").index)
    return worst, "; ".join(why for _, why in bad)[:1000]


class _Output:
    """What a process prints, by whole lines: rows to the results, the rest to the log."""

    def __init__(self, stage: Stage, write: Callable[[Row], None], log: IO[bytes], say: Callable[[str], object]):
        self.stage, self.write, self.log, self.say = stage, write, log, say
        self.held, self.last = b"", ""

    def take(self, data: bytes) -> None:
        *lines, self.held = (self.held + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace"))

    def end(self) -> None:
        """The process is gone: a line that it did not end is no row."""
        if self.held:
            self._log(self.held.decode(errors="replace"))

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


def _side_by_side(
    stage: Stage,
    commands: Sequence[Sequence[str]],
    deadline: float,
    write: Callable[[Row], None],
    log: IO[bytes],
    say: Callable[[str], object],
) -> list[tuple[str, str]]:
    """(how, why) of each command that did not end well. None is left running."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    bad: list[tuple[str, str]] = []
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
                        start_new_session=True,  # so that what it starts can be killed with it
                    )
                except OSError as error:
                    bad.append(("failed", f"{command[0]}: {error.strerror}"))
                    continue
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                output = _Output(stage, write, log, say)
                processes.append((command, process, output))
                selector.register(process.stdout, selectors.EVENT_READ, output)
            _listen(selector, [process for _, process, _ in processes], deadline)
        finally:
            for command, process, output in processes:
                late = process.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children too, if it left any
                code = process.wait()
                assert process.stdout is not None
                with contextlib.suppress(BlockingIOError, OSError):
                    while data := process.stdout.read(1 << 16):  # None where it would block
                        output.take(data)
                output.end()
                process.stdout.close()
                name = " ".join(command[1:] if len(command) > 1 else command)
                if late:
                    bad.append(("timed out", f"{name}: stopped at its limit; last said: {output.last[-200:]}"))
                elif code < 0:
                    bad.append(("killed", f"{name}: by signal {-code}; last said: {output.last[-200:]}"))
                elif code:
                    bad.append(("failed", f"{name}: exit status {code}; last said: {output.last[-200:]}"))
    return bad


def _listen(selector: selectors.BaseSelector, processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Take what the processes print until all have ended or the time is over."""
    while selector.get_map() and time.monotonic() < deadline:
        for key, _ in selector.select(timeout=0.1):
            data = os.read(key.fd, 1 << 16)
            if data:
                key.data.take(data)
            else:
                selector.unregister(key.fileobj)
        if all(process.poll() is not None for process in processes):
            return  # a grandchild may hold a pipe open: what is in it is read at the end
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def of(rows: Sequence[Row], stage: str) -> Iterator[Row]:
    """What one stage found."""
    return (row for row in rows if row["stage"] == stage and "status" not in row)
