"""Engines that are built ahead of time and stored in a bundle, for GPUs that need not be in this machine.

    engines/engines.json                                       what each engine is, and its hash
    engines/tensorrt_rtx-1.7.1.116-portable/unet.engine
    engines/tensorrt_rtx-1.7.1.116-sm_89-512x512/unet.engine

They are not in the bundle's manifest, which is written before them. Each engine gets its name by a rename once it is on
disk, and then its entry in engines.json, so an interrupted build continues with the missing engines. Engines are
executed: as in the engine cache, the folder must belong to its user, and nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastldm.checks import show
from fastldm.errors import EngineError, InputError
from fastldm.export.cache import Key
from fastldm.export.private import Folder

logger = logging.getLogger("fastldm")

FOLDER, INDEX = "engines", "engines.json"
PORTABLE = "Ampere and later"


@dataclass(frozen=True)
class Record:
    """An engine of a bundle."""

    file: str  # its path under the bundle's engines
    key: Key  # network, hashes of graph and weights, backend with full version, precision, ranges, GPUs
    sha256: str
    bytes: int
    capabilities: tuple[int, ...]  # of GPUs that it runs on, such as 89; empty for all since Ampere
    opset: int

    def runs_on(self, capability: int) -> bool:
        """Whether it runs on GPUs of this compute capability."""
        return capability in self.capabilities if self.capabilities else capability >= 80

    def to_dict(self) -> dict[str, Any]:
        """Its entry in engines.json."""
        return {"network": self.key.network, **asdict(self), "digest": self.key.digest}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Read an entry of engines.json; ValueError, KeyError or TypeError if it is invalid."""
        key = Key(**data["key"])
        record = cls(data["file"], key, data["sha256"], data["bytes"], tuple(data["capabilities"]), data["opset"])
        texts, numbers = (record.file, record.sha256, *vars(key).values()), (record.bytes, record.opset)
        if not all(isinstance(value, str) for value in texts):
            raise TypeError("a text was expected")
        if not all(type(value) is int for value in (*numbers, *record.capabilities)):
            raise TypeError("a whole number was expected")
        return record


class Engines:
    """The engines of the bundle in `bundle`."""

    def __init__(self, bundle: Path) -> None:
        self.folder = bundle / FOLDER

    def records(self) -> list[Record]:
        """All engines, last built last. EngineError if other users may write to the folder, or the index is damaged."""
        try:
            with Folder.open(self.folder, parents=False) as folder:
                return self._records(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise EngineError(f"{self.folder} cannot be read: {error}") from error

    def _records(self, folder: Folder) -> list[Record]:
        if folder.stat(INDEX) is None:
            return []
        try:
            return [Record.from_dict(entry) for entry in folder.read_json(INDEX)["engines"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{self.folder / INDEX} is damaged ({error!r}): delete {self.folder} and build the engines again"
            ) from error

    def find(self, target: Key, capability: int) -> bytes | None:
        """The last serialised engine that does the work of `target` on a GPU of this capability, or None. If an engine
        of the network cannot be used, a warning says why.

        target: its network with hashes, precision and backend with full version must match; ranges may differ.
        """
        reasons = []
        for record in reversed(self.records()):
            key = record.key
            if key.network != target.network:
                continue
            if (key.graph, key.weights, key.precision) != (target.graph, target.weights, target.precision):
                reasons.append("it was built from another network")
            elif (key.backend, key.version) != (target.backend, target.version):
                reasons.append(f"it is for {key.backend} {key.version}, and here is {target.backend} {target.version}")
            elif not record.runs_on(capability):
                reasons.append(f"it is for {key.device}, and here is sm_{capability}")
            else:
                try:
                    return self._read(record)
                except EngineError as error:
                    reasons.append(str(error))
        if reasons:
            logger.warning("the bundle's engine of %s is set aside: %s", target.network, reasons[0])
        return None

    def _read(self, record: Record) -> bytes:
        """The serialised engine. EngineError if it is not the one that was built, or must not be run."""
        path, names = self.folder / record.file, record.file.split("/")
        if len(names) != 2 or {"", ".", ".."} & set(names):
            raise EngineError(f"{self.folder / INDEX} names {show(record.file)}, which is not in the bundle")
        try:
            with Folder.open(self.folder, parents=False) as folder, folder.folder(names[0]) as subfolder:
                data = subfolder.read(names[1])
        except FileNotFoundError:
            raise EngineError(f"{path} is missing") from None
        except OSError as error:  # such as a link
            raise EngineError(f"{path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise EngineError(f"{path} is not what was built (its sha256 differs)")
        return data

    def has(self, key: Key) -> Record | None:
        """The engine with exactly this key, if it is undamaged."""
        for record in self.records():
            with contextlib.suppress(EngineError):
                if record.key == key and self._read(record):
                    return record
        return None

    def keep(self, data: bytes, file: str, key: Key, capabilities: tuple[int, ...], opset: int) -> Record:
        """Write an engine and add it to the index, inside `writing`. EngineError if it cannot be written.

        file: its folder and name."""
        record = Record(file, key, hashlib.sha256(data).hexdigest(), len(data), capabilities, opset)
        name, _, engine = file.partition("/")
        try:
            with Folder.open(self.folder, parents=False) as folder:
                with folder.folder(name) if folder.stat(name) is not None else folder.make(name) as subfolder:
                    subfolder.replace(engine, data)
                rest = [existing for existing in self._records(folder) if existing.file != file]
                index = {"engines": [entry.to_dict() for entry in (*rest, record)]}
                folder.replace(INDEX, json.dumps(index, indent=1).encode())
        except OSError as error:
            raise EngineError(
                f"{self.folder / file} could not be written ({error}): the same command goes on with what is missing"
            ) from error
        return record

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock that building needs. InputError if another process holds it, EngineError if the folder cannot
        be written to, or other users may write to it."""
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(Folder.open(self.folder, parents=False, create=True))
                held.enter_context(folder.locked("lock", timeout=0))
            except TimeoutError:
                raise InputError(f"another process builds engines in {self.folder}: wait for it") from None
            except OSError as error:
                raise EngineError(f"engines cannot be written to {self.folder}: {error}") from error
            yield
