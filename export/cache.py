"""Engines that were built once, kept for the next process.

An engine is code for one device, one version of its backend and one network. Its key names all of that, so what is
found under a key fits, and what does not fit is never found. One folder holds a folder for each key:

    KEY/engine        what the backend serialised
    KEY/entry.json    the key in words, and the engine's hash
    aside-KEY         an engine that was damaged or that its backend refused
    tmp-...           one being written, or left by a process that died
    lock              held while an engine is built: one at a time, since backends time kernels while they build

A folder takes its final name by one rename when all of it is on the disk, so a reader needs no lock and a writer may
die at any moment. Engines are run as they are: the folder has to be its user's own, and nobody else may write to it.
The hash finds what a disk or a copy has damaged; against people, only the permissions help.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from fastldm.doctor import cache_root
from fastldm.errors import EngineError

logger = logging.getLogger("fastldm")

T = TypeVar("T")

LIMIT = 32 * 2**30  # bytes: SDXL's engines in two sizes, SD 1.5's in four
_ENGINE, _ENTRY = "engine", "entry.json"
_ASIDE, _UNFINISHED = "aside-", "tmp-"


@dataclass(frozen=True)
class Key:
    """All that an engine depends on. Two keys that differ in anything are two engines."""

    network: str  # "unet"; for people: `graph` tells networks apart
    graph: str  # sha256 of the ONNX file
    weights: str  # sha256 of its external data, in the order of their names
    backend: str  # "tensorrt_rtx"
    version: str  # of the backend, in full: "1.7.1.116"
    precision: str  # "float16"
    ranges: str  # of the dynamic axes, least:best:most: "batch=1:2:8 height=32:64:128"
    flags: str  # what else the builder was told
    device: str  # name and capability of the GPU or processor, or capabilities where it is built for GPUs elsewhere
    driver: str = ""  # where the engine depends on it

    @property
    def digest(self) -> str:
        """The name of the entry."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:40]

    @property
    def machine(self) -> str:
        """What it runs with, in words."""
        return f"{self.backend} {self.version} on {self.device}" + (f", driver {self.driver}" if self.driver else "")

    def same_work(self, other: Key) -> bool:
        """Whether the other differs in nothing but version, device and driver."""
        return replace(self, version=other.version, device=other.device, driver=other.driver) == other


@dataclass(frozen=True)
class Entry:
    """What lies in the cache under one name."""

    folder: Path
    key: Key | None  # None where its description cannot be read
    bytes: int
    used: float  # seconds since 1970

    @property
    def aside(self) -> bool:
        """Whether it was taken out of use."""
        return self.folder.name.startswith(_ASIDE)


class EngineCache:
    """Engines by key in one folder, at most `limit` bytes of them: what was used longest ago goes first.

    folder: `engines` in fastldm's cache (`FASTLDM_CACHE`) where it is not given.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_root() / "engines" if folder is None else folder
        self.limit = limit

    def fetch(self, key: Key, build: Callable[[], bytes], load: Callable[[bytes], T]) -> T:
        """The engine of a key: loaded if it is here, else built, loaded and kept.

        build: makes the serialised engine; of all processes that ask at once, one builds and the others wait and load.
        load: makes of it what runs, and raises EngineError where the backend refuses it: it is then built once more.

        Where the folder cannot be written to (disk full, read-only), the engine is built and runs, but is not kept; a
        warning says so. Raises EngineError where others than the user may write to the folder, and what `build` and
        `load` raise for an engine that has just been built.
        """
        self.check_permissions()
        with contextlib.suppress(OSError, EngineError):  # not here, or not usable: dealt with under the lock
            return load(self._read(key))
        with contextlib.ExitStack() as held:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.check_permissions()
                held.enter_context(self._locked())
            except OSError as error:
                logger.warning(
                    "engines cannot be kept in %s (%s): building %s for now", self.folder, error, key.network
                )
                return load(build())
            try:
                return load(self._read(key))
            except (EngineError, OSError) as error:
                self._set_aside(key, error)
            data = build()
            engine = load(data)
            self._keep(key, data)
            return engine

    def entries(self) -> list[Entry]:
        """What is here, last used first. Raises EngineError where others may write to the folder."""
        self.check_permissions()
        folders = [one for one in self._folders() if not one.name.startswith(_UNFINISHED)]
        found = [entry for folder in folders if (entry := _describe(folder)) is not None]
        return sorted(found, key=lambda entry: -entry.used)

    def verify(self) -> Iterator[tuple[Entry, str]]:
        """Each entry in use, with what is wrong with it or "". Reads all of them."""
        for entry in self.entries():
            if entry.aside:
                continue
            try:
                if entry.key is None or entry.key.digest != entry.folder.name:
                    raise EngineError("its description is not the one it was kept under")
                self._read(entry.key, used=False)
            except (EngineError, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, ""

    def prune(self, keep: int | None = None) -> list[Entry]:
        """Remove what is set aside or cannot be read, then what was used longest ago until `keep` bytes are left.

        keep: the cache's limit where it is not given. Returns what was removed. Raises OSError where the folder cannot
        be written to.
        """
        self.check_permissions()
        if not self.folder.exists():
            return []
        with self._locked():
            useless = [entry for entry in self.entries() if entry.aside or entry.key is None]
            for entry in useless:
                self._remove(entry.folder)
            return useless + self._evict(self.limit if keep is None else keep)

    def check_permissions(self) -> None:
        """EngineError where the folder is another user's, or where others may write to it. No folder is fine."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            refuse_what_others_can_write(self.folder)

    # ---- one entry

    def _read(self, key: Key, used: bool = True) -> bytes:
        """The serialised engine. FileNotFoundError where there is none, EngineError where it must not be loaded."""
        folder = self.folder / key.digest
        for path in (folder, folder / _ENTRY, folder / _ENGINE):
            refuse_what_others_can_write(path)
        try:
            entry = json.loads((folder / _ENTRY).read_bytes())
            kept_key, kept_hash = entry["key"], entry["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{folder / _ENTRY} is damaged") from error
        if kept_key != asdict(key):
            raise EngineError(f"{folder} holds an engine of another key")
        data = (folder / _ENGINE).read_bytes()
        if hashlib.sha256(data).hexdigest() != kept_hash:
            raise EngineError(f"{folder / _ENGINE} is not what was written: its hash differs")
        if used:
            with contextlib.suppress(OSError):  # a cache that is read-only is used all the same
                os.utime(folder / _ENTRY)
        return data

    def _keep(self, key: Key, data: bytes) -> None:
        """Write an engine. Under the lock; where it cannot be written, a warning and no trace."""
        if len(data) > self.limit:
            logger.warning("the engine of %s is larger than the whole cache may be: not kept", key.network)
            return
        try:
            self._evict(self.limit - len(data))
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))  # nobody else's to read or write
            about = {"key": asdict(key), "sha256": hashlib.sha256(data).hexdigest()}
            write_private(unfinished / _ENGINE, data)
            write_private(unfinished / _ENTRY, json.dumps(about, indent=1).encode())
            sync_folder(unfinished)
            unfinished.rename(self.folder / key.digest)
            sync_folder(self.folder)
        except OSError as error:
            logger.warning("the engine of %s runs, but cannot be kept in %s: %s", key.network, self.folder, error)
            self._sweep()

    def _set_aside(self, key: Key, error: Exception) -> None:
        """Make room for an engine, with one line on why the one that is here does not do. Under the lock."""
        if (self.folder / key.digest).exists():
            logger.warning("the cached engine of %s is set aside and built again: %s", key.network, error)
            self._move(self.folder / key.digest, _ASIDE + key.digest)
            return
        others = [one.key for one in self.entries() if one.key is not None and one.key.same_work(key) and not one.aside]
        if others:
            logger.warning(
                "the cached engine of %s is for %s, which is left aside: building one for %s",
                key.network,
                others[0].machine,
                key.machine,
            )

    # ---- the folder

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The one that may change the folder. The lock of a process that dies is free at once."""
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another process builds engines in %s: waiting for it", self.folder)
            lock.acquire()
        try:
            self._sweep()
            yield
        finally:
            lock.release()

    def _folders(self) -> list[Path]:
        try:
            return [one for one in self.folder.iterdir() if one.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _sweep(self) -> None:
        """Remove what is unfinished. Under the lock: whoever began it is no more."""
        for folder in self._folders():
            if folder.name.startswith(_UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)

    def _evict(self, room: int) -> list[Entry]:
        """Remove entries until the rest takes at most `room` bytes. Under the lock."""
        removed, left = [], self.entries()
        left.sort(key=lambda entry: (not entry.aside, entry.used))
        while left and sum(entry.bytes for entry in left) > room:
            removed.append(left.pop(0))
            self._remove(removed[-1].folder)
        return removed

    def _remove(self, folder: Path) -> None:
        """Take an entry away whole, so that no reader meets half of it."""
        gone = _UNFINISHED + folder.name
        self._move(folder, gone)
        shutil.rmtree(self.folder / gone, ignore_errors=True)

    def _move(self, folder: Path, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        folder.rename(self.folder / name)


def hash_files(*paths: Path, known: Mapping[str, str] | None = None) -> str:
    """sha256 over the files' contents, one after the other. known: of single files, by name."""
    if known and len(paths) == 1 and paths[0].name in known:
        return known[paths[0].name]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _describe(folder: Path) -> Entry | None:
    """An entry from what lies in its folder; None where it has just been removed."""
    try:
        size = sum(file.stat().st_size for file in folder.iterdir())
        used = (folder / _ENTRY).stat().st_mtime if (folder / _ENTRY).exists() else 0.0
    except FileNotFoundError:
        return None
    try:
        said = json.loads((folder / _ENTRY).read_bytes())["key"]
        key = Key(**{field.name: str(said[field.name]) for field in fields(Key)})
    except (OSError, ValueError, KeyError, TypeError):
        key = None
    return Entry(folder, key, size, used)


def refuse_what_others_can_write(path: Path) -> None:
    """EngineError where somebody else could have put code there. FileNotFoundError where there is nothing."""
    if sys.platform == "win32":  # there, a user's own folders are closed to others by their access lists
        path.stat()
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        raise EngineError(f"{path} belongs to another user: engines are code, and only one's own are run")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path} can be written to by others, and engines are code: delete it, or, if nobody has, "
            f"close it with `chmod -R go-w {path}`"
        )


def write_private(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Names of files reach the disk with their folder; Windows has no such call."""
    if sys.platform != "win32":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
