"""Named spans of work, for whoever listens in the thread that does it: a profile, as a rule nobody.

The code that works says where a span begins and ends (`span`) and how an op was served (`served`). It knows nothing of
clocks: what a listener makes of it is profiling's (profiling/clock.py). Without one a span costs one lookup.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Listener(Protocol):
    """Hears of what its thread does."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Entered where a span of this name begins, and left where it ends. Spans lie one inside the other."""

    def served(self, path: str) -> None:
        """What served the op that is running, where it was not what its dispatch says."""


class _Scope(threading.local):
    listener: Listener | None = None


_scope = _Scope()
_SILENT = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """A context manager around work of this name."""
    listener = _scope.listener
    return _SILENT if listener is None else listener.span(name)


def served(path: str) -> None:
    """Report what served the op that is running, such as "oneDNN"."""
    if _scope.listener is not None:
        _scope.listener.served(path)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, the listener hears of what this thread does, and nobody else does."""
    before, _scope.listener = _scope.listener, listener
    try:
        yield
    finally:
        _scope.listener = before
