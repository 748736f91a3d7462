"""A folder that lines become pictures in, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastldm.batches.lines import Line, Outcome
from fastldm.batches.maker import ProcessDied, SubmitsLines
from fastldm.batches.sheet import contact_sheet
from fastldm.errors import InputError
from fastldm.files import check_folder, whole_file
from fastldm.request import Request

_DEATHS = 2  # after which a line is set aside


class Batch:
    """Lines that become files of a folder, by one process at a time."""

    def __init__(self, lines: Sequence[Line], out: str | os.PathLike[str], *, name: str = "") -> None:
        """name: of this part of the lines, where several processes share a folder.

        InputError for a folder that cannot be written to."""
        self.out, self.lines = Path(out).expanduser(), lines
        self._results = self.out / f"results{name}.jsonl"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {self.out} cannot be made ({error.strerror})") from error
        check_folder(self.out)
        records = [*_records(self._results)]
        named = {record["key"]: record["files"] for record in records if record.get("files")}
        self.files: dict[str, Sequence[str]] = {
            key: names for key, names in named.items() if all((self.out / name).is_file() for name in names)
        }
        """By key, of lines that are done."""
        set_aside = {record["key"] for record in records if record.get("set_aside")}
        self.set_aside = [line for line in lines if line.key in set_aside]
        """Those that ended a process again and again, before."""
        self.left = [line for line in lines if line.key not in self.files.keys() | set_aside]
        """What is to be made, or to be told what is wrong with it."""

    def run(self, maker: SubmitsLines, *, ahead: int = 32) -> Iterator[Outcome]:
        """Make what is left, and yield each line's outcome as it comes. ahead: lines that wait or run at a time.

        InputError where another process makes this part. Whoever leaves the iteration loses what is under way, which is
        made the next time."""
        with _locked(self._results) as results:
            self._clean()
            left, suspects, deaths = deque(self.left), deque[Line](), Counter[str]()
            open_: dict[Future[Outcome], Line] = {}

            def may_start() -> bool:
                """A suspect, with which a process died, is alone."""
                if suspects or any(deaths[line.key] for line in open_.values()):
                    return not open_
                return bool(left) and len(open_) < ahead

            while left or suspects or open_:
                while may_start():
                    line = suspects.popleft() if suspects else left.popleft()
                    if line.request is None:
                        yield self._end(results, Outcome(line, error=line.error))
                    else:
                        open_[maker.submit(line, self.out)] = line
                for future in wait(open_, return_when=FIRST_COMPLETED).done:
                    line = open_.pop(future)
                    try:
                        yield self._end(results, future.result())
                    except ProcessDied as error:
                        deaths[line.key] += 1
                        if deaths[line.key] < _DEATHS:
                            suspects.append(line)
                            continue
                        text = f"it ended the process {_DEATHS} times ({error}), and is set aside"
                        yield self._end(results, Outcome(line, error=text), set_aside=True)

    def _end(self, results: IO[bytes], outcome: Outcome, *, set_aside: bool = False) -> Outcome:
        line = outcome.line
        record: dict[str, Any] = {"line": line.number, "key": line.key}
        if line.request is not None and line.request.prompt is not None:
            record["prompt"] = line.request.prompt
        if outcome.error is not None:
            record["error"] = outcome.error
        else:
            self.files[line.key] = outcome.files
            record |= {"files": outcome.files, "seeds": outcome.seeds, "seconds": round(outcome.seconds, 4)}
        record |= {"set_aside": True} if set_aside else {}
        results.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        os.fsync(results.fileno())
        return outcome

    def _clean(self) -> None:
        """Halves of files, of a process that died while it wrote them."""
        numbers = {line.number for line in self.lines}
        for path in self.out.glob(".*"):
            match = re.match(r"\.(\d{6,})-[0-9a-f]{10}-\d+.*-[0-9a-f]{8}\.", path.name)
            if match and int(match[1]) in numbers:
                path.unlink(missing_ok=True)

    def write_grid(self, path: Path, *, columns: int = 8, rows: int = 32, cell: int = 256) -> list[Path]:
        """All pictures that are done, in the order of their lines, each with its prompt or its class below; in files of
        so many rows, which are returned."""
        pictures = [
            (self.out / name, _label(line.request))
            for line in self.lines
            if line.request is not None
            for name in self.files.get(line.key, ())
        ]
        pages = []
        for start in range(0, len(pictures), columns * rows):
            number = start // (columns * rows) + 1
            pages.append(path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}"))
            page = contact_sheet(pictures[start : start + columns * rows], columns, cell)
            with whole_file(pages[-1]) as file:
                page.save(file, "PNG")
        return pages


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Of a file to which a process was writing when it died: its last line may be half of one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("key"), str):
            yield record


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """A file to append to, for one process at a time; the system lets go of it when the process ends, however."""
    with path.open("ab", 0) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # another system than Unix
            pass
        except OSError as error:
            raise InputError(f"another process is at work in {path.parent}: wait for it, or give --shard") from error
        if file.tell():
            with path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read(1) != b"\n":  # of a process that died meanwhile
                    file.write(b"\n")
        yield file


def _label(request: Request) -> str:
    """What is written below a picture."""
    label = request.prompt if request.class_labels is None else f"class {request.class_labels}"
    return str(label or "")
