"""An engine's key and content, and how it gets into a cache, for the tests of that."""

from __future__ import annotations

from pathlib import Path

from fastldm.export.cache import EngineCache, Key

KEY = Key(
    network="unet",
    graph="a" * 64,
    weights="b" * 64,
    backend="tensorrt_rtx",
    version="1.7.1.116",
    precision="float16",
    ranges="batch=1:2:8 height=32:64:128",
    flags="",
    device="NVIDIA H100 sm_90",
)


ENGINE = b"engine " * 10_000


def never() -> bytes:
    raise AssertionError("built although it was here")


def put(cache: EngineCache, key: Key = KEY, data: bytes = ENGINE) -> Path:
    assert cache.fetch(key, lambda: data, bytes) == data
    return cache.folder / key.digest
