"""What is kept for clients to fetch, for a time and up to a size."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_ITEMS = 10_000
_OVERHEAD = 1024  # bytes that an item takes beside its content


@dataclass(eq=False)
class Kept:
    """Something of one key's, which no other key sees."""

    owner: str
    value: Any
    size: int = 0
    """Bytes."""
    since: float = 0.0


class Store:
    """By ids that cannot be guessed; used by the event loop alone."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        """max_bytes: of all; beyond it the oldest go. seconds: that each is kept, from its last `put`."""
        self._max_bytes, self._seconds = max_bytes, seconds
        self._items: OrderedDict[str, Kept] = OrderedDict()  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def size(self) -> int:
        """Bytes of all that is kept."""
        return self._bytes

    def put(self, owner: str, value: Any, size: int, id: str | None = None, *, prefix: str = "") -> str:
        """Keep a value, in place of what has this id. Returns the id, by default one that cannot be guessed."""
        id = f"{prefix}{secrets.token_urlsafe(24)}" if id is None else id
        self.remove(id)
        self._items[id] = Kept(owner, value, size + _OVERHEAD, time.monotonic())
        self._bytes += size + _OVERHEAD
        self._expire()
        return id

    def get(self, id: str, owner: str) -> Any:
        """The value; None if it is not there any more, never was, or is another's."""
        self._expire()
        kept = self._items.get(id)
        return kept.value if kept is not None and kept.owner == owner else None

    def remove(self, id: str) -> None:
        kept = self._items.pop(id, None)
        self._bytes -= 0 if kept is None else kept.size

    def _expire(self) -> None:
        before = time.monotonic() - self._seconds
        while self._items:
            id, oldest = next(iter(self._items.items()))
            if oldest.since > before and self._bytes <= self._max_bytes and len(self._items) <= MAX_ITEMS:
                break
            self.remove(id)
