"""Engines that were built ahead and travel with a bundle, for GPUs that need not be here.

    engines/engines.json                                       what each engine is, and its hash
    engines/tensorrt_rtx-1.7.1.116-portable/unet.engine
    engines/tensorrt_rtx-1.7.1.116-sm_89-512x512/unet.engine

They are no part of the bundle's manifest, which is older than they are. Each takes its name by one rename when it is on
the disk, and then its place in engines.json, so a build that was stopped goes on with those that are missing. Engines
are run as they are: as in the engine cache, the folder has to be its user's own, and nobody else may write to it.
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
    key: Key  # what it is: network, hashes of graph and weights, backend with full version, precision, ranges, GPUs
    sha256: str
    bytes: int
    capabilities: tuple[int, ...]  # of the GPUs that it is for, such as 89; none for any from Ampere on
    opset: int

    def runs_on(self, capability: int) -> bool:
        """Whether it is for GPUs of this compute capability."""
        return capability in self.capabilities if self.capabilities else capability >= 80

    def to_dict(self) -> dict[str, Any]:
        """As engines.json has it."""
        return {"network": self.key.network, **asdict(self), "digest": self.key.digest}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Of what engines.json says; ValueError, KeyError or TypeError where that is something else."""
        key = Key(**data["key"])
        record = cls(data["file"], key, data["sha256"], data["bytes"], tuple(data["capabilities"]), data["opset"])
        words, numbers = (record.file, record.sha256, *vars(key).values()), (record.bytes, record.opset)
        if not all(isinstance(one, str) for one in words):
            raise TypeError("a text was expected")
        if not all(type(one) is int for one in (*numbers, *record.capabilities)):
            raise TypeError("a whole number was expected")
        return record


class Engines:
    """The engines of the bundle in `bundle`."""

    def __init__(self, bundle: Path) -> None:
        self.folder = bundle / FOLDER

    def records(self) -> list[Record]:
        """Those that are there, last built last. EngineError where others may write there, or the index is damaged."""
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
            return [Record.from_dict(one) for one in folder.read_json(INDEX)["engines"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{self.folder / INDEX} is damaged ({error!r}): delete {self.folder} and build the engines again"
            ) from error

    def find(self, wanted: Key, capability: int) -> bytes | None:
        """A serialised engine that does the work of `wanted` on a GPU of this capability; of several the one built
        last. None where there is none, and where one had to be set aside a warning says why.

        wanted: the network by its hashes, the precision, and the backend by its full version; engines have the ranges
            that they were built for.
        """
        why = []
        for record in reversed(self.records()):
            key = record.key
            if key.network != wanted.network:
                continue
            if (key.graph, key.weights, key.precision) != (wanted.graph, wanted.weights, wanted.precision):
                why.append("it was built from another network")
            elif (key.backend, key.version) != (wanted.backend, wanted.version):
                why.append(f"it is for {key.backend} {key.version}, and here is {wanted.backend} {wanted.version}")
            elif not record.runs_on(capability):
                why.append(f"it is for {key.device}, and here is sm_{capability}")
            else:
                try:
                    return self._read(record)
                except EngineError as error:
                    why.append(str(error))
        if why:
            logger.warning("the bundle's engine of %s is set aside: %s", wanted.network, why[0])
        return None

    def _read(self, record: Record) -> bytes:
        """An engine's content, which is what was built. EngineError where it is not, or must not be run."""
        path, parts = self.folder / record.file, record.file.split("/")
        if len(parts) != 2 or {"", ".", ".."} & set(parts):
            raise EngineError(f"{self.folder / INDEX} names {show(record.file)}, which is not in the bundle")
        try:
            with Folder.open(self.folder, parents=False) as folder, folder.folder(parts[0]) as inside:
                data = inside.read(parts[1])
        except FileNotFoundError:
            raise EngineError(f"{path} is missing") from None
        except OSError as error:  # a link, for one
            raise EngineError(f"{path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise EngineError(f"{path} is not what was built (its sha256 differs)")
        return data

    def has(self, key: Key) -> Record | None:
        """The engine of just this key, if it is here whole."""
        for record in self.records():
            with contextlib.suppress(EngineError):
                if record.key == key and self._read(record):
                    return record
        return None

    def keep(self, data: bytes, file: str, key: Key, capabilities: tuple[int, ...], opset: int) -> Record:
        """Write an engine and enter it in the index. Inside `writing`. EngineError where the disk does not take it.
        file: its folder and its name."""
        record = Record(file, key, hashlib.sha256(data).hexdigest(), len(data), capabilities, opset)
        name, _, engine = file.partition("/")
        try:
            with Folder.open(self.folder, parents=False) as folder:
                with folder.folder(name) if folder.stat(name) is not None else folder.make(name) as inside:
                    inside.replace(engine, data)
                others = [one for one in self._records(folder) if one.file != file]
                index = {"engines": [one.to_dict() for one in (*others, record)]}
                folder.replace(INDEX, json.dumps(index, indent=1).encode())
        except OSError as error:
            raise EngineError(
                f"{self.folder / file} could not be written ({error}): the same command goes on with what is missing"
            ) from error
        return record

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Held by the one process that builds. InputError where another one does, EngineError where others than the
        user may write there, or nobody can."""
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(Folder.open(self.folder, parents=False, create=True))
                held.enter_context(folder.locked("lock", timeout=0))
            except TimeoutError:
                raise InputError(f"another process builds engines in {self.folder}: wait for it") from None
            except OSError as error:
                raise EngineError(f"engines cannot be written to {self.folder}: {error}") from error
            yield
