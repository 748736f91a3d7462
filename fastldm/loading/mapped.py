"""Memory-mapped weight files, which a model on a CPU keeps reading if their tensors need no conversion.

Replacing a file, as hubs, package managers and `mv` do, is safe: processes that have the old file open keep it.
Overwriting or truncating it in place changes the model's weights, or kills the process when it reads a missing page.
The next request detects that and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastldm.errors import CheckpointError


class _FileState(NamedTuple):
    device: int
    inode: int
    size: int
    modified: int  # ns

    @classmethod
    def of(cls, path: Path) -> _FileState | None:
        """The state of the file, or None if it does not exist."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Mapped:
    """Weight files and their state before they were mapped."""

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._states = {path: state for path in files if (state := _FileState.of(path)) is not None}

    def __or__(self, other: Mapped) -> Mapped:
        both = Mapped()
        both._states = {**self._states, **other._states}
        return both

    def check(self) -> None:
        """CheckpointError if one of the files was overwritten in place."""
        for path, state in self._states.items():
            now = _FileState.of(path)
            if now is not None and now != state and now[:2] == state[:2]:
                raise CheckpointError(
                    f"{path} was overwritten after the model was loaded, which still reads it: load the model again, "
                    "and replace files instead of overwriting them"
                )
