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
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from fastldm.errors import EngineError
from fastldm.export.private import Folder
from fastldm.system import cache_root

logger = logging.getLogger("fastldm")

T = TypeVar("T")

LIMIT = 32 * 2**30  # bytes: SDXL's engines in two sizes, SD 1.5's in four
_ENGINE, _ENTRY = "engine", "entry.json"
_ASIDE, _UNFINISHED = "aside-", "tmp-"
_NAMES = re.compile(rf"(?:{_ASIDE})?[0-9a-f]{{40}}")


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
    device: (
        str  # name and capability of the GPU, or of the processor with its instructions, or capabilities where it is
    )
    # built for GPUs elsewhere
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
        # What is not here, or not usable, is dealt with under the lock.
        with contextlib.suppress(OSError), self._opened() as folder, contextlib.suppress(OSError, EngineError):
            return load(self._read(folder, key))
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(self._opened(create=True))
                held.enter_context(self._locked(folder))
            except OSError as error:
                logger.warning(
                    "engines cannot be kept in %s (%s): building %s for now", self.folder, error, key.network
                )
                return load(build())
            try:
                return load(self._read(folder, key))
            except (EngineError, OSError) as error:
                self._set_aside(folder, key, error)
            data = build()
            engine = load(data)
            self._keep(folder, key, data)
            return engine

    def entries(self) -> list[Entry]:
        """What is here, last used first. Raises EngineError where others may write to the folder."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._opened() as folder:
            return _entries(folder)
        return []

    def verify(self) -> Iterator[tuple[Entry, str]]:
        """Each entry in use, with what is wrong with it or "". Reads all of them."""
        for entry in self.entries():
            if entry.aside:
                continue
            try:
                if entry.key is None or entry.key.digest != entry.folder.name:
                    raise EngineError("its description is not the one it was kept under")
                with self._opened() as folder:
                    self._read(folder, entry.key, used=False)
            except (EngineError, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, ""

    def prune(self, keep: int | None = None) -> list[Entry]:
        """Remove what is set aside or cannot be read, then what was used longest ago until `keep` bytes are left.

        keep: the cache's limit where it is not given. Returns what was removed. Raises OSError where the folder cannot
        be written to.
        """
        try:
            opened = self._opened()
        except (FileNotFoundError, NotADirectoryError):
            return []
        with opened as folder, self._locked(folder):
            useless = [entry for entry in _entries(folder) if entry.aside or entry.key is None]
            for entry in useless:
                _remove(folder, entry.folder.name)
            return useless + _evict(folder, self.limit if keep is None else keep)

    def _opened(self, create: bool = False) -> Folder:
        return Folder.open(self.folder, create=create)

    @contextlib.contextmanager
    def _locked(self, folder: Folder) -> Iterator[None]:
        """The one that may change the folder. The lock of a process that dies is free at once."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(folder.locked("lock", timeout=0))
            except TimeoutError:
                logger.warning("another process builds engines in %s: waiting for it", self.folder)
                held.enter_context(folder.locked("lock"))
            _sweep(folder)
            yield

    # ---- one entry

    def _read(self, folder: Folder, key: Key, used: bool = True) -> bytes:
        """The serialised engine. FileNotFoundError where there is none, EngineError where it must not be loaded."""
        with folder.folder(key.digest) as entry:
            try:
                about = entry.read_json(_ENTRY)
                kept_key, kept_hash = about["key"], about["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise EngineError(f"{entry.path / _ENTRY} is damaged") from error
            if kept_key != asdict(key):
                raise EngineError(f"{entry.path} holds an engine of another key")
            data = entry.read(_ENGINE)
            if hashlib.sha256(data).hexdigest() != kept_hash:
                raise EngineError(f"{entry.path / _ENGINE} is not what was written: its hash differs")
            if used:
                with contextlib.suppress(OSError):  # a cache that is read-only is used all the same
                    entry.touch(_ENTRY)
            return data

    def _keep(self, folder: Folder, key: Key, data: bytes) -> None:
        """Write an engine. Under the lock; where it cannot be written, a warning and no trace."""
        if len(data) > self.limit:
            logger.warning("the engine of %s is larger than the whole cache may be: not kept", key.network)
            return
        about = {"key": asdict(key), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            _evict(folder, self.limit - len(data))
            name = _UNFINISHED + key.digest  # under the lock there is one of it
            with folder.make(name) as unfinished:
                unfinished.write(_ENGINE, data)
                unfinished.write(_ENTRY, json.dumps(about, indent=1).encode())
                unfinished.sync()
            folder.rename(name, key.digest)
            folder.sync()
        except OSError as error:
            logger.warning("the engine of %s runs, but cannot be kept in %s: %s", key.network, self.folder, error)
            _sweep(folder)

    def _set_aside(self, folder: Folder, key: Key, error: Exception) -> None:
        """Make room for an engine, with one line on why the one that is here does not do. Under the lock."""
        if folder.stat(key.digest) is not None:
            logger.warning("the cached engine of %s is set aside and built again: %s", key.network, error)
            with contextlib.suppress(OSError):  # what cannot be moved cannot be replaced either, which is told then
                _move(folder, key.digest, _ASIDE + key.digest)
            return
        others = [one.key for one in _entries(folder) if one.key is not None and one.key.same_work(key)]
        others = [one for one in others if folder.stat(one.digest) is not None]
        if others:
            logger.warning(
                "the cached engine of %s is for %s, which is left aside: building one for %s",
                key.network,
                others[0].machine,
                key.machine,
            )


# ----------------------------------------------------------------------------------------------------- in the folder


def _entries(folder: Folder) -> list[Entry]:
    """What is kept or set aside, last used first. Whatever else has such a name is an entry that cannot be read."""
    names = [name for name in folder.names() if _NAMES.fullmatch(name)]
    found = [entry for name in names if (entry := _describe(folder, name)) is not None]
    return sorted(found, key=lambda entry: -entry.used)


def _describe(folder: Folder, name: str) -> Entry | None:
    """An entry from what lies under its name; None where it has just been removed."""
    about = folder.stat(name)
    if about is None:
        return None
    size, used, key = about.st_size * stat.S_ISREG(about.st_mode), about.st_mtime, None
    with contextlib.suppress(OSError, EngineError, ValueError, KeyError, TypeError), folder.folder(name) as entry:
        found = {name: one for name in entry.names() if (one := entry.stat(name)) is not None}
        size = sum(one.st_size for one in found.values())
        used = found[_ENTRY].st_mtime if _ENTRY in found else 0.0
        said = entry.read_json(_ENTRY)["key"]
        key = Key(**{field.name: str(said[field.name]) for field in fields(Key)})
    return Entry(folder.path / name, key, size, used)


def _sweep(folder: Folder) -> None:
    """Remove what is unfinished. Under the lock: whoever began it is no more."""
    for name in folder.names():
        if name.startswith(_UNFINISHED):
            folder.remove(name)


def _evict(folder: Folder, room: int) -> list[Entry]:
    """Remove entries until the rest takes at most `room` bytes. Under the lock."""
    removed, left = [], _entries(folder)
    left.sort(key=lambda entry: (not entry.aside, entry.used))
    while left and sum(entry.bytes for entry in left) > room:
        removed.append(left.pop(0))
        _remove(folder, removed[-1].folder.name)
    return removed


def _remove(folder: Folder, name: str) -> None:
    """Take an entry away whole, so that no reader meets half of it."""
    gone = _UNFINISHED + name
    _move(folder, name, gone)
    folder.remove(gone)


def _move(folder: Folder, name: str, new: str) -> None:
    folder.remove(new)  # whatever is in the way
    folder.rename(name, new)


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


def instructions() -> str:
    """The vector and matrix instructions of this CPU, which code for another may not find here: processors of one name,
    as virtual machines have it, differ in them."""
    for line in _lines("/proc/cpuinfo"):
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(set(filter(_VECTORS.match, words.split()))))
    return torch.backends.cpu.get_cpu_capability()


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


_VECTORS = re.compile(r"avx|amx|sse|ssse|fma|f16c|bmi|vnni|asimd|sve|sme|neon|bf16|i8mm|fphp")
