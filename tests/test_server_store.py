"""What is kept for clients: for a time, up to a size, and for the key that it is of."""

from __future__ import annotations

import pytest

from fastldm.server import store
from fastldm.server.store import Store

KIB = 1024


def test_what_is_put_is_got() -> None:
    kept = Store(100 * KIB, 60)
    id = kept.put("a", {"x": 1}, 10, prefix="file-")
    assert kept.get(id, "a") == {"x": 1}
    assert kept.get(id, "a") == {"x": 1}  # again


def test_another_owner_gets_nothing() -> None:
    kept = Store(100 * KIB, 60)
    id = kept.put("a", 1, 10)
    assert kept.get(id, "b") is None
    assert kept.get(id, "") is None
    assert kept.get(id, "a") == 1


def test_ids_cannot_be_guessed() -> None:
    kept = Store(100 * KIB, 60)
    ids = {kept.put("a", k, 0, prefix="file-") for k in range(50)}
    assert len(ids) == 50
    assert all(len(id.removeprefix("file-")) >= 32 for id in ids)  # 192 bits


def test_what_is_too_old_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(store.time, "monotonic", lambda: now)
    kept = Store(100 * KIB, 60)
    id = kept.put("a", 1, 10)
    now += 59
    assert kept.get(id, "a") == 1
    now += 2
    assert kept.get(id, "a") is None
    assert kept.size == 0


def test_putting_again_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(store.time, "monotonic", lambda: now)
    kept = Store(100 * KIB, 60)
    id = kept.put("a", 1, 10)
    now += 50
    assert kept.put("a", 2, 20, id=id) == id
    now += 50
    assert kept.get(id, "a") == 2
    assert kept.size < 2 * KIB  # counted once


def test_the_oldest_go_beyond_the_size() -> None:
    kept = Store(10 * KIB, 60)
    ids = [kept.put("a", k, 3 * KIB) for k in range(4)]  # 4 KiB each, with what an item takes
    assert [kept.get(id, "a") for id in ids] == [None, None, 2, 3]
    assert kept.size <= 10 * KIB


def test_small_items_are_bounded_too() -> None:
    kept = Store(100 * KIB, 60)
    for k in range(1000):
        kept.put("a", k, 0)
    assert len(kept) <= 100


def test_items_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_ITEMS", 5)
    kept = Store(10**9, 60)
    ids = [kept.put("a", k, 0) for k in range(9)]
    assert [kept.get(id, "a") for id in ids] == [None] * 4 + [4, 5, 6, 7, 8]


def test_what_is_larger_than_all_is_not_kept() -> None:
    kept = Store(10 * KIB, 60)
    kept.put("a", 1, 2 * KIB)
    id = kept.put("a", 2, 20 * KIB)
    assert kept.get(id, "a") is None
    assert kept.size <= 10 * KIB


def test_removing_frees_its_bytes() -> None:
    kept = Store(100 * KIB, 60)
    id = kept.put("a", 1, 10)
    kept.remove(id)
    kept.remove(id)
    assert (kept.size, len(kept)) == (0, 0)
