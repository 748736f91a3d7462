"""The tensors of one module in an adapter's file, and the alpha that the file states for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastldm.errors import CheckpointError


class Misfit(Exception):
    """The tensors are of a module of another shape."""


class Tensors:
    """The tensors of one module by our names. `take` marks them as used."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._tensors, self._source, self._used = tensors, source, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """A tensor. CheckpointError if the file has none of that name."""
        if name not in self._tensors:
            present = ", ".join(sorted(self._tensors))
            raise self.error(f"has {present} and no {name}: the file is incomplete")
        self._used.add(name)
        return self._tensors[name]

    def optional(self, name: str) -> Tensor | None:
        return self.take(name) if name in self else None

    def unused(self) -> list[str]:
        return [name for name in self._tensors if name not in self._used]

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._source} {problem}.")


class Alpha(NamedTuple):
    """What the header of a file states for a module; a tensor `alpha` beside the module's others replaces `value`."""

    value: float | None = None
    rank_stabilised: bool = False
