"""Files that a loaded model goes on reading: on a CPU, weights that are taken as they are stay in their file, mapped.

A file that is replaced, as hubs, package managers and `mv` do it, leaves the old one to whoever has it open. One that
is written into or cut off changes under the model: its images change, or the process is killed as it reads what is
no longer there. That is noticed at the next request, which is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastldm.errors import CheckpointError


class _Seen(NamedTuple):
    device: int
    inode: int
    size: int
    modified: int  # ns

    @classmethod
    def at(cls, path: Path) -> _Seen | None:
        """The state of the file, or None where there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Mapped:
    """Files as they were before they were mapped."""

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._seen = {path: seen for path in files if (seen := _Seen.at(path)) is not None}

    def __or__(self, other: Mapped) -> Mapped:
        both = Mapped()
        both._seen = {**self._seen, **other._seen}
        return both

    def check(self) -> None:
        """CheckpointError where one of them has been written into."""
        for path, seen in self._seen.items():
            now = _Seen.at(path)
            if now is not None and now != seen and now[:2] == seen[:2]:
                raise CheckpointError(
                    f"{path} was written into after the model was loaded, which still reads it: load the model anew, "
                    "and put a new file in the old one's place instead"
                )
