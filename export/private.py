"""Folders whose files are run as code: opened once, judged by what was opened, and never looked up again by a path.

Between the check of a path and its use somebody else may put another file there. So a folder is opened part by part
from the root of the file system, each part judged before the next is looked up in it, no link is followed that
somebody else could have laid, and everything inside is reached through the open folder. On Windows, where a folder
cannot be opened and a user's own are closed to others by their access lists, paths are used as they are.
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
_MOST_LINKS = 40  # on the way to a folder, as Linux has it
_JSON_BYTES = 2**24  # more is no description of anything


class Folder:
    """An open folder that nobody but its user can write to.

    What is read, written and renamed here is in the folder that was opened, whatever its path leads to by now. Close
    it, or use it in a `with`.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path, *, parents: bool = True, create: bool = False) -> Folder:
        """Open a folder. parents: the folders that it lies in are judged too. create: made where it is missing, closed
        to others.

        Raises EngineError where somebody else owns it or may write to it, FileNotFoundError or NotADirectoryError where
        there is none.
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
        return cls(path, descriptor)._judged()

    def _judged(self) -> Folder:
        try:
            if self._descriptor is not None:
                _judge(os.fstat(self._descriptor), self.path)
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
        """Arguments of a call of `os` for what is called so in here."""
        return {"path": name, "dir_fd": self._descriptor} if _POSIX else {"path": self.path / name}

    def folder(self, name: str) -> Folder:
        """A folder in it; errors as of `open`."""
        if not _POSIX:
            return Folder.open(self.path / name)
        opened = os.open(**self._at(name), flags=os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        return Folder(self.path / name, opened)._judged()

    def make(self, name: str) -> Folder:
        """A new folder in it, closed to others."""
        os.mkdir(**self._at(name), mode=0o700)  # noqa: PTH102
        return self.folder(name)

    def read(self, name: str) -> bytes:
        """A file's content. EngineError where it is no file, or somebody else's, or others may write to it."""
        # Neither a link nor, without waiting for a writer, a pipe.
        flags = os.O_RDONLY | (os.O_NOFOLLOW | os.O_NONBLOCK if _POSIX else os.O_BINARY)  # type: ignore[attr-defined]
        with os.fdopen(os.open(**self._at(name), flags=flags), "rb", closefd=True) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise EngineError(f"{self.path / name} is no file")
            _judge(found, self.path / name)
            return file.read()

    def read_json(self, name: str) -> Any:
        """What a JSON file says; ValueError where it cannot be read as such."""
        data = self.read(name)
        try:
            if len(data) > _JSON_BYTES:
                raise ValueError(f"{len(data)} bytes")
            return json.loads(data)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write(self, name: str, data: bytes) -> None:
        """A new file, on the disk when this returns. FileExistsError where there is something."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (0 if _POSIX else os.O_BINARY)  # type: ignore[attr-defined]
        with os.fdopen(os.open(**self._at(name), flags=flags, mode=0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Put a file in its place in one go: a reader finds the one before or this one."""
        unfinished = f"{name}.tmp"
        self.remove(unfinished)
        try:
            self.write(unfinished, data)
            self.rename(unfinished, name)
        except OSError:
            self.remove(unfinished)
            raise
        self.sync()

    def rename(self, old: str, new: str) -> None:
        """Give what is here another name, in one go; a file in its way is replaced."""
        if _POSIX:
            os.replace(old, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        else:
            (self.path / old).replace(self.path / new)

    def remove(self, name: str) -> None:
        """Whatever is called so, of a folder all that is in it; nothing where that cannot be."""
        try:
            os.unlink(**self._at(name))
        except FileNotFoundError:
            pass
        except OSError:  # a folder: systems differ in how they say so
            shutil.rmtree(self.path / name, ignore_errors=True)

    def stat(self, name: str) -> os.stat_result | None:
        """Of what is called so, links themselves; None where there is nothing."""
        try:
            return os.stat(**self._at(name), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def touch(self, name: str) -> None:
        """Say that a file was used now."""
        os.utime(**self._at(name))

    def names(self) -> list[str]:
        """Of all that is in it, sorted."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))  # noqa: PTH208

    def sync(self) -> None:
        """Names of files reach the disk with their folder; Windows has no such call."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    @contextlib.contextmanager
    def locked(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Held by one process at a time; that of a process that dies is free at once. Anything but a file that is in
        the lock's place is removed. timeout: seconds to wait; for ever where it is negative. TimeoutError after it."""
        found = self.stat(name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            self.remove(name)
        with locked(self.path / name, timeout):
            yield


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1, *, remove: bool = False) -> Iterator[None]:
    """Hold a file's lock; that of a process that dies is free at once. TimeoutError where it is not free within
    `timeout` seconds, which are without end where they are negative.

    remove: the file goes when the lock does, and who waited for it then takes the next one's.
    """
    if not _POSIX:
        try:
            with FileLock(path, timeout=timeout):
                yield
        except Timeout:
            raise TimeoutError(f"{path} is held by another process") from None
        return
    import fcntl

    end = time.monotonic() + timeout
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            # There is no call that waits for so long and no longer: the lock is tried for now and then.
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if timeout < 0 else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened), path.stat(follow_symlinks=False)):
                    break
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(opened)
                raise TimeoutError(f"{path} is held by another process") from None
            time.sleep(0.02)
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # somebody has it, or has removed it since: the lock is the file that has the name
    try:
        yield
    finally:
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: it can be nobody else's
        os.close(opened)


# ------------------------------------------------------------------------------------------- who could have written it


def _walk(path: Path) -> int:
    """A descriptor of a folder, reached through folders and links that nobody else can have laid."""
    look = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    here, at, links = os.open("/", look), Path("/"), 0
    root = os.fstat(here).st_uid  # who owns that is trusted, by whatever number: in a user namespace not 0
    left = list(reversed(path.parts[1:]))
    try:
        while left:
            name = left.pop()
            _judge_parent(os.fstat(here), at, root)
            found = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise NotADirectoryError(errno.ELOOP, os.strerror(errno.ELOOP), str(at / name))
                if found.st_uid not in (os.getuid(), 0, root):
                    raise EngineError(
                        f"{at / name} is another user's link, and engines are code: only one's own are run"
                    )
                target = Path(os.readlink(name, dir_fd=here))
                left += reversed(target.parts[target.is_absolute() :])
                name = "/" if target.is_absolute() else "."
            there = os.open(name, look, dir_fd=here)
            os.close(here)
            here, at = there, at / name
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
    finally:
        os.close(here)


def _judge(found: os.stat_result, path: Path) -> None:
    """EngineError where somebody else could have put code there."""
    if not _POSIX:
        return
    if found.st_uid not in (os.getuid(), 0):
        raise EngineError(f"{path} belongs to another user: engines are code, and only one's own are run")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path} can be written to by others, and engines are code: delete it, or, if nobody has, "
            f"close it with `chmod -R go-w {path}`"
        )


def _judge_parent(found: os.stat_result, path: Path, root: int) -> None:
    """EngineError where somebody else could put another folder in the place of one that lies in this."""
    if found.st_uid not in (os.getuid(), 0, root):
        raise EngineError(
            f"{path} belongs to another user, and engines lie in it: set FASTLDM_CACHE to a folder elsewhere"
        )
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _own_group(found.st_gid))
    if others and not found.st_mode & stat.S_ISVTX:  # where that is set, only its owner may rename a folder
        raise EngineError(
            f"{path} can be written to by others, and engines, which are code, lie in it: close it with "
            f"`chmod go-w {path}`, or set FASTLDM_CACHE to a folder elsewhere"
        )


def _own_group(group: int) -> bool:
    """Whether a group is of nobody but its user, as many systems give each one, or the system's own."""
    if group == 0:
        return True
    import grp
    import pwd

    try:
        user, named = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return named.gr_gid == user.pw_gid and named.gr_name == user.pw_name and set(named.gr_mem) <= {user.pw_name}
