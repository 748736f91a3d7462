"""export/private.py: files that only their owner may write, and that are read as they were checked."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cached import ENGINE, KEY, never, put

from fastldm.errors import EngineError
from fastldm.export.cache import EngineCache


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_folder_writable_by_others_is_refused(cache: EngineCache, mode: int) -> None:
    put(cache)
    cache.folder.chmod(mode)
    for call in (lambda: cache.fetch(KEY, never, bytes), cache.entries, cache.prune, lambda: list(cache.verify())):
        with pytest.raises(EngineError, match=r"can be written to by others.*chmod -R go-w"):
            call()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_other_user_is_refused(cache: EngineCache) -> None:
    put(cache)
    os.chown(cache.folder, 12345, 12345)
    with pytest.raises(EngineError, match="belongs to another user"):
        cache.fetch(KEY, never, bytes)


def test_new_folder_is_private_for_any_umask(cache: EngineCache) -> None:
    before = os.umask(0)
    try:
        entry = put(cache)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o077 for path in (cache.folder, entry, *entry.iterdir())} == {0}


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_parent_writable_by_others_is_refused(cache: EngineCache, mode: int) -> None:
    put(cache)
    cache.folder.parent.chmod(mode)
    if mode == 0o770:
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder to another group")
        os.chown(cache.folder.parent, -1, 12345)
    for call in (lambda: cache.fetch(KEY, never, bytes), cache.entries, cache.prune, lambda: list(cache.verify())):
        with pytest.raises(EngineError, match=rf"{cache.folder.parent} can be written to by others.*chmod go-w"):
            call()
    cache.folder.parent.chmod(mode | stat.S_ISVTX)  # as /tmp: only its owner may rename a folder there
    assert cache.fetch(KEY, never, bytes) == ENGINE


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give things away")
def test_parent_or_link_of_other_user_is_refused(tmp_path: Path) -> None:
    own = EngineCache(tmp_path / "own" / "engines")
    put(own)
    (tmp_path / "link").symlink_to("own")
    linked = EngineCache(tmp_path / "link" / "engines")
    assert linked.fetch(KEY, never, bytes) == ENGINE, "one's own link is fine"
    os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    with pytest.raises(EngineError, match="link is another user's link"):
        linked.fetch(KEY, never, bytes)
    os.chown(tmp_path / "own", 12345, -1)
    with pytest.raises(EngineError, match="own belongs to another user"):
        own.fetch(KEY, never, bytes)


def test_dangling_links_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert EngineCache(tmp_path / "loop" / "engines").fetch(KEY, lambda: ENGINE, bytes) == ENGINE
    assert EngineCache(tmp_path / "loop" / "engines").entries() == []


@pytest.mark.parametrize("nth", range(1, 16))
def test_checked_file_is_the_one_read(nth: int, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's entry takes the place of one's own after the nth look at it: its engine is never run."""
    entry = put(cache)
    evil = Path(shutil.copytree(entry, cache.folder / "evil"))
    info = json.loads((entry / "entry.json").read_text())
    (evil / "engine").write_bytes(b"evil")
    (evil / "entry.json").write_text(json.dumps({**info, "sha256": hashlib.sha256(b"evil").hexdigest()}))
    for path in (*evil.iterdir(), evil):
        path.chmod(0o777)
    looks = 0

    def look(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal looks
        matches = call(*args, **options)
        looks += 1
        if looks == nth:
            entry.rename(cache.folder / "good")
            evil.rename(entry)
        return matches

    with monkeypatch.context() as patched:
        for name in ("stat", "fstat", "open"):
            patched.setattr(os, name, functools.partial(look, getattr(os, name)))
        assert cache.fetch(KEY, lambda: b"built", bytes) in (ENGINE, b"built")
