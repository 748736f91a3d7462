"""Output files: checked before any work starts, and written atomically."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastldm.errors import InputError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_TEST_BYTES = 2**16  # that a folder must accept to count as writable: an empty file fits on a full disk


def output_paths(output: str | Path, count: int, *, force: bool = False) -> list[Path]:
    """The files of `count` images: `a.png`, or `a-0.png`, `a-1.png`, ... Checked before any work starts.

    InputError if the format is unknown, a name is invalid, the folder is missing or cannot be written to, or a file
    exists and `force` is not set.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{_show(path)} does not end in a picture format that can be written: use one of {', '.join(FORMATS)}"
        )
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(count)]
    check_output(paths[-1], force=True)  # the longest name, and the folder
    for candidate in paths:
        _check_free(candidate, force)
    return paths


def check_output(path: Path, *, force: bool = False) -> None:
    """InputError if a file of this name cannot be written: because of its folder, its name, or an existing file."""
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        raise InputError(f"{_show(path)} is not a name in UTF-8: choose another with -o") from None
    if "\0" in str(path):
        raise InputError(f"{_show(path)} holds a zero byte: choose another name with -o")
    check_folder(path.parent)
    _check_free(path, force)


def _check_free(path: Path, force: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{_show(path)} cannot be written ({error.strerror}): choose another name with -o") from error
    replaceable = stat.S_ISREG(mode) or stat.S_ISLNK(mode)  # not a folder, a device, a FIFO
    if not (force and replaceable) or path.is_dir():
        hint = ", or overwrite it with --force" if replaceable and not path.is_dir() else ""
        raise InputError(f"{_show(path)} exists: choose another name with -o{hint}")


def check_folder(folder: Path) -> None:
    """InputError if files cannot be created in a folder."""
    try:
        if not folder.exists():
            raise InputError(f"the folder {_show(folder)} does not exist: make it first, or write somewhere else")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TEST_BYTES))
            file.flush()
    except OSError as error:
        raise InputError(
            f"the folder {_show(folder)} cannot be written to ({error.strerror}): choose another with -o"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that replaces it when all is written; on failure, an existing file stays.

    OSErrors have `path` as their file name.
    """
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _show(path: Path) -> str:
    text = repr(str(path))
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
