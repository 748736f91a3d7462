"""The engine cache: engines on disk that later processes load instead of building them again.

An engine is code for one device, one version of its backend and one network. Its key contains all of that, so a lookup
never returns an engine that does not fit. The cache is a folder with a folder per key:

    KEY/engine        the serialised engine
    KEY/entry.json    the fields of the key, and the engine's hash
    aside-KEY         an engine that was damaged or that its backend refused
    tmp-...           an engine that is being written, or was left behind by a process that died
    lock              held while an engine is built: one at a time, since backends time kernels during builds

A folder gets its final name by a rename once it is complete on disk, so readers need no lock and writers may die at any
time. Engines are executed: the folder must belong to its user, and nobody else may write to it. The hash detects
damaged files; only permissions protect from other users.
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
    """Everything that an engine depends on. Different keys are different engines."""

    network: str  # "unet"; for messages: `graph` identifies the network
    graph: str  # sha256 of the ONNX file
    weights: str  # sha256 of its external data, in the order of their names
    backend: str  # "tensorrt_rtx"
    version: str  # of the backend, in full: "1.7.1.116"
    precision: str  # "float16"
    ranges: str  # of dynamic axes, least:best:most: "batch=1:2:8 height=32:64:128"
    flags: str  # other build options
    device: str
    """Name and capability of the GPU, or of the processor with its instructions, or only capabilities if it is built
    for other GPUs."""
    driver: str = ""  # if the engine depends on it

    @property
    def digest(self) -> str:
        """The name of the entry's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:40]

    @property
    def machine(self) -> str:
        """Backend, version, device and driver, for messages."""
        return f"{self.backend} {self.version} on {self.device}" + (f", driver {self.driver}" if self.driver else "")

    def same_work(self, other: Key) -> bool:
        """Whether the keys differ at most in version, device and driver."""
        return replace(self, version=other.version, device=other.device, driver=other.driver) == other


@dataclass(frozen=True)
class Entry:
    """A folder of the cache."""

    folder: Path
    key: Key | None  # None if entry.json cannot be read
    bytes: int
    used: float  # seconds since 1970

    @property
    def aside(self) -> bool:
        """Whether it was taken out of use."""
        return self.folder.name.startswith(_ASIDE)


class EngineCache:
    """Engines by key in a folder of at most `limit` bytes; the least recently used are removed first.

    folder: by default `engines` in fastldm's cache (`FASTLDM_CACHE`).
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_root() / "engines" if folder is None else folder
        self.limit = limit

    def fetch(self, key: Key, build: Callable[[], bytes], load: Callable[[bytes], T]) -> T:
        """The engine of a key: loaded from the cache, or built, loaded and stored.

        build: returns the serialised engine. If several processes need it at once, one builds and the others wait.
        load: turns serialised engines into engines. If it raises EngineError for a cached one, that is built again.

        If the folder cannot be written to (disk full, read-only), the engine is built and used but not stored, and a
        warning says so. Raises EngineError if other users may write to the folder, and whatever `build` and `load`
        raise for an engine that was just built.
        """
        # Missing and unusable engines are handled below, under the lock.
        with contextlib.suppress(OSError), self._opened() as folder, contextlib.suppress(OSError, EngineError):
            return load(self._read(folder, key))
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(self._opened(create=True))
                held.enter_context(self._locked(folder))
            except OSError as error:
                logger.warning(
                    "engines cannot be stored in %s (%s): building %s for this process", self.folder, error, key.network
                )
                return load(build())
            try:
                return load(self._read(folder, key))
            except (EngineError, OSError) as error:
                self._set_aside(folder, key, error)
            data = build()
            engine = load(data)
            self._store(folder, key, data)
            return engine

    def entries(self) -> list[Entry]:
        """All entries, last used first. Raises EngineError if other users may write to the folder."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._opened() as folder:
            return _entries(folder)
        return []

    def verify(self) -> Iterator[tuple[Entry, str]]:
        """Each entry in use, with its problem or "". Reads all of them."""
        for entry in self.entries():
            if entry.aside:
                continue
            try:
                if entry.key is None or entry.key.digest != entry.folder.name:
                    raise EngineError("its description is not the one it was stored under")
                with self._opened() as folder:
                    self._read(folder, entry.key, used=False)
            except (EngineError, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, ""

    def prune(self, keep: int | None = None) -> list[Entry]:
        """Remove entries that are set aside or cannot be read, then the least recently used until `keep` bytes remain.

        keep: by default the cache's limit. Returns the removed entries. Raises OSError if the folder cannot be written
        to.
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
        """Hold the lock that is needed to change the folder. It is freed when its process dies."""
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
        """The serialised engine. FileNotFoundError if there is none, EngineError if it must not be loaded."""
        with folder.folder(key.digest) as entry:
            try:
                description = entry.read_json(_ENTRY)
                cached_key, cached_hash = description["key"], description["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise EngineError(f"{entry.path / _ENTRY} is damaged") from error
            if cached_key != asdict(key):
                raise EngineError(f"{entry.path} holds an engine of another key")
            data = entry.read(_ENGINE)
            if hashlib.sha256(data).hexdigest() != cached_hash:
                raise EngineError(f"{entry.path / _ENGINE} is not what was written: its hash differs")
            if used:
                with contextlib.suppress(OSError):  # a read-only cache can still be used
                    entry.touch(_ENTRY)
            return data

    def _store(self, folder: Folder, key: Key, data: bytes) -> None:
        """Write an engine, under the lock. If that fails, only a warning remains."""
        if len(data) > self.limit:
            logger.warning("the engine of %s is larger than the limit of the cache: not stored", key.network)
            return
        description = {"key": asdict(key), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            _evict(folder, self.limit - len(data))
            name = _UNFINISHED + key.digest  # unique, under the lock
            with folder.make(name) as unfinished:
                unfinished.write(_ENGINE, data)
                unfinished.write(_ENTRY, json.dumps(description, indent=1).encode())
                unfinished.sync()
            folder.rename(name, key.digest)
            folder.sync()
        except OSError as error:
            logger.warning("the engine of %s runs, but cannot be stored in %s: %s", key.network, self.folder, error)
            _sweep(folder)

    def _set_aside(self, folder: Folder, key: Key, error: Exception) -> None:
        """Make room for an engine, and log why the cached one cannot be used. Under the lock."""
        if folder.stat(key.digest) is not None:
            logger.warning("the cached engine of %s is set aside and built again: %s", key.network, error)
            with contextlib.suppress(OSError):  # if it cannot be moved, storing the new one warns
                _move(folder, key.digest, _ASIDE + key.digest)
            return
        similar = [entry.key for entry in _entries(folder) if entry.key is not None and entry.key.same_work(key)]
        similar = [candidate for candidate in similar if folder.stat(candidate.digest) is not None]
        if similar:
            logger.warning(
                "the cached engine of %s is for %s, which is left aside: building one for %s",
                key.network,
                similar[0].machine,
                key.machine,
            )


# ----------------------------------------------------------------------------------------------------- in the folder


def _entries(folder: Folder) -> list[Entry]:
    """Entries in use and set aside, last used first. Anything else with such a name is an unreadable entry."""
    names = [name for name in folder.names() if _NAMES.fullmatch(name)]
    entries = [entry for name in names if (entry := _describe(folder, name)) is not None]
    return sorted(entries, key=lambda entry: -entry.used)


def _describe(folder: Folder, name: str) -> Entry | None:
    """The entry of this name; None if it has just been removed."""
    status = folder.stat(name)
    if status is None:
        return None
    size, used, key = status.st_size * stat.S_ISREG(status.st_mode), status.st_mtime, None
    with contextlib.suppress(OSError, EngineError, ValueError, KeyError, TypeError), folder.folder(name) as entry:
        files = {name: file for name in entry.names() if (file := entry.stat(name)) is not None}
        size = sum(file.st_size for file in files.values())
        used = files[_ENTRY].st_mtime if _ENTRY in files else 0.0
        values = entry.read_json(_ENTRY)["key"]
        key = Key(**{field.name: str(values[field.name]) for field in fields(Key)})
    return Entry(folder.path / name, key, size, used)


def _sweep(folder: Folder) -> None:
    """Remove unfinished entries. Under the lock: their processes have died."""
    for name in folder.names():
        if name.startswith(_UNFINISHED):
            folder.remove(name)


def _evict(folder: Folder, room: int) -> list[Entry]:
    """Remove entries until the remaining ones take at most `room` bytes. Under the lock."""
    removed, remaining = [], _entries(folder)
    remaining.sort(key=lambda entry: (not entry.aside, entry.used))
    while remaining and sum(entry.bytes for entry in remaining) > room:
        removed.append(remaining.pop(0))
        _remove(folder, removed[-1].folder.name)
    return removed


def _remove(folder: Folder, name: str) -> None:
    """Rename an entry before removing it, so that no reader finds it incomplete."""
    temporary = _UNFINISHED + name
    _move(folder, name, temporary)
    folder.remove(temporary)


def _move(folder: Folder, name: str, new: str) -> None:
    folder.remove(new)  # if there is one
    folder.rename(name, new)


def hash_files(*paths: Path, hashes: Mapping[str, str] | None = None) -> str:
    """sha256 over the concatenated contents of files. hashes: of single files, by name."""
    if hashes and len(paths) == 1 and paths[0].name in hashes:
        return hashes[paths[0].name]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def instructions() -> str:
    """The vector and matrix instructions of this CPU, which compiled code depends on: processors of one name may differ
    in them, as in virtual machines."""
    for line in _lines("/proc/cpuinfo"):
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(set(filter(_VECTORS.match, flags.split()))))
    return torch.backends.cpu.get_cpu_capability()


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


_VECTORS = re.compile(r"avx|amx|sse|ssse|fma|f16c|bmi|vnni|asimd|sve|sme|neon|bf16|i8mm|fphp")
