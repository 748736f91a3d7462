"""Folders whose files are executed: opened once, checked by their descriptors, and not looked up by path again.

Between the check of a path and its use another user may replace the file. So a folder is opened component by component
from the root of the file system, each checked before the next is looked up in it, links of other users are not
followed, and all files are accessed through the open folder. On Windows, where folders cannot be opened and access
lists protect a user's folders, paths are used directly.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastldm.errors import EngineError

_POSIX = sys.platform != "win32"
_MAX_LINKS = 40  # in a path, as on Linux
_MAX_JSON_BYTES = 2**24


class Folder:
    """An open folder to which only its user can write.

    All methods act on the folder that was opened, even if its path leads elsewhere by now. Close it, or use `with`.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path, *, parents: bool = True, create: bool = False) -> Folder:
        """Open a folder. parents: check its parent folders too. create: create it if missing, closed to other users.

        Raises EngineError if another user owns it or may write to it, FileNotFoundError or NotADirectoryError if it
        does not exist.
        """
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _POSIX:
            if not path.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return cls(path, None)
        if parents:
            descriptor = _walk(path.absolute())
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        return cls(path, descriptor)._checked()

    def _checked(self) -> Folder:
        try:
            if self._descriptor is not None:
                _check_owner(os.fstat(self._descriptor), self.path)
        except EngineError:
            self.close()
            raise
        return self

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _at(self, name: str) -> dict[str, Any]:
        """Arguments for functions of `os`, for a name in this folder."""
        return {"path": name, "dir_fd": self._descriptor} if _POSIX else {"path": self.path / name}

    def folder(self, name: str) -> Folder:
        """Open a subfolder; errors as in `open`."""
        if not _POSIX:
            return Folder.open(self.path / name)
        opened = os.open(**self._at(name), flags=os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        return Folder(self.path / name, opened)._checked()

    def make(self, name: str) -> Folder:
        """Create a subfolder, closed to other users."""
        os.mkdir(**self._at(name), mode=0o700)  # noqa: PTH102
        return self.folder(name)

    def read(self, name: str) -> bytes:
        """A file's content. EngineError if it is no regular file, or another user owns it or may write to it."""
        # Do not follow links, and do not wait for the writer of a pipe.
        flags = os.O_RDONLY | (os.O_NOFOLLOW | os.O_NONBLOCK if _POSIX else os.O_BINARY)  # type: ignore[attr-defined]
        with os.fdopen(os.open(**self._at(name), flags=flags), "rb", closefd=True) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise EngineError(f"{self.path / name} is no file")
            _check_owner(status, self.path / name)
            return file.read()

    def read_json(self, name: str) -> Any:
        """The content of a JSON file; ValueError if it is not valid."""
        data = self.read(name)
        try:
            if len(data) > _MAX_JSON_BYTES:
                raise ValueError(f"{len(data)} bytes")
            return json.loads(data)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a new file, which is on disk when this returns. FileExistsError if the name exists."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (0 if _POSIX else os.O_BINARY)  # type: ignore[attr-defined]
        with os.fdopen(os.open(**self._at(name), flags=flags, mode=0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Replace a file atomically: a reader finds the old one or the new one."""
        temporary = f"{name}.tmp"
        self.remove(temporary)
        try:
            self.write(temporary, data)
            self.rename(temporary, name)
        except OSError:
            self.remove(temporary)
            raise
        self.sync()

    def rename(self, old: str, new: str) -> None:
        """Rename atomically, replacing an existing file."""
        if _POSIX:
            os.replace(old, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        else:
            (self.path / old).replace(self.path / new)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all its content, if possible."""
        try:
            os.unlink(**self._at(name))
        except FileNotFoundError:
            pass
        except OSError:  # a folder: the error differs by system
            shutil.rmtree(self.path / name, ignore_errors=True)

    def stat(self, name: str) -> os.stat_result | None:
        """The status of a name, without following links; None if it does not exist."""
        try:
            return os.stat(**self._at(name), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> None:
        """Set a file's time of use to now."""
        os.utime(**self._at(name))

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))  # noqa: PTH208

    def sync(self) -> None:
        """Write the names of files to disk; Windows has no such call."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    @contextlib.contextmanager
    def locked(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Hold a lock file of this folder, see `private.locked`; anything but a regular file of its name is removed."""
        status = self.stat(name)
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.remove(name)
        with locked(self.path / name, timeout):
            yield


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is freed when its process dies. TimeoutError if it is not free within `timeout`
    seconds; a negative timeout waits forever.

    remove: remove the file on release; processes that wait for it then take the lock of the next file.
    """
    if not _POSIX:
        try:
            with FileLock(path, timeout=timeout):
                yield
        except Timeout:
            raise TimeoutError(f"{path} is held by another process") from None
        return
    import fcntl

    deadline = time.monotonic() + timeout
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            # flock has no timeout: try repeatedly.
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if timeout < 0 else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False)):
                    break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise TimeoutError(f"{path} is held by another process") from None
            time.sleep(0.02)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process holds it, or has removed the file
    try:
        yield
    finally:
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()  # while the lock is held, so that it is no other process's file
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- who can write to a folder


def _walk(path: Path) -> int:
    """Open a folder through parents and links that no other user can have created."""
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    current, current_path, links = os.open("/", flags), Path("/"), 0
    root = os.fstat(current).st_uid  # the trusted owner of /, which is not 0 in a user namespace
    remaining = list(reversed(path.parts[1:]))
    try:
        while remaining:
            name = remaining.pop()
            _check_parent(os.fstat(current), current_path, root)
            status = os.stat(name, dir_fd=current, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    raise NotADirectoryError(errno.ELOOP, os.strerror(errno.ELOOP), str(current_path / name))
                if status.st_uid not in (os.getuid(), 0, root):
                    raise EngineError(
                        f"{current_path / name} is another user's link, and engines are code: only your own are run"
                    )
                target = Path(os.readlink(name, dir_fd=current))
                remaining += reversed(target.parts[target.is_absolute() :])
                name = "/" if target.is_absolute() else "."
            child = os.open(name, flags, dir_fd=current)
            os.close(current)
            current, current_path = child, current_path / name
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=current)
    finally:
        os.close(current)


def _check_owner(status: os.stat_result, path: Path) -> None:
    """EngineError if another user could have written this file or folder."""
    if not _POSIX:
        return
    if status.st_uid not in (os.getuid(), 0):
        raise EngineError(f"{path} belongs to another user: engines are code, and only your own are run")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path} can be written to by others, and engines are code: delete it, or, if nobody has, "
            f"close it with `chmod -R go-w {path}`"
        )


def _check_parent(status: os.stat_result, path: Path, root: int) -> None:
    """EngineError if another user could replace a folder in this parent folder."""
    if status.st_uid not in (os.getuid(), 0, root):
        raise EngineError(
            f"{path} belongs to another user, and engines lie in it: set FASTLDM_CACHE to a folder elsewhere"
        )
    writable = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _own_group(status.st_gid))
    if writable and not status.st_mode & stat.S_ISVTX:  # the sticky bit: only its owner may rename a folder
        raise EngineError(
            f"{path} can be written to by others, and engines, which are code, lie in it: close it with "
            f"`chmod go-w {path}`, or set FASTLDM_CACHE to a folder elsewhere"
        )


def _own_group(group: int) -> bool:
    """Whether a group has no other members than the user, as the default group on many systems, or is the system's."""
    if group == 0:
        return True
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_gid == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}
