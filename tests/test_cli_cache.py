"""`fastldm cache`: what its commands print and remove, and their exit status. test_cache.py has the cache itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import run

from fastldm.export.cache import EngineCache, Key


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the engines."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def put(network: str, size: int = 3 << 19) -> Path:
    """An engine of 1.5 MiB, and its entry's folder."""
    ranges, device = "batch=1:2:8", "NVIDIA H100 sm_90"
    key = Key(network, "a" * 64, "b" * 64, "tensorrt_rtx", "1.7.1.116", "float16", ranges, "", device)
    engines = EngineCache()
    engines.fetch(key, lambda: bytes(size), bytes)
    return engines.folder / key.digest


def line_of(network: str, entry: Path) -> str:
    """A regular expression for its line in `cache ls`."""
    text = f"{network}  float16  tensorrt_rtx 1.7.1.116 on NVIDIA H100 sm_90  batch=1:2:8"
    return rf"{entry.name[:12]} +1\.5 MiB  \d{{4}}-\d\d-\d\d \d\d:\d\d  {re.escape(text)}"


def test_empty_cache_names_its_folder(folder: Path) -> None:
    assert run("cache", "ls").stdout == f"no engines in {folder}\n"
    assert json.loads(run("cache", "ls", "--json").stdout) == []
    assert run("cache", "verify").stdout == ""
    assert run("cache", "prune").stdout == "0.0 KiB freed\n"


def test_ls_has_a_line_for_each_engine(folder: Path) -> None:
    entries = {network: put(network) for network in ("unet", "vae_decoder")}
    done = run("cache", "ls")
    assert (done.exit_code, done.stderr) == (0, "")
    *lines, total = done.stdout.splitlines()
    assert total == f"3.0 MiB of 32.0 GiB in {folder}"
    for network, entry in entries.items():
        assert sum(bool(re.fullmatch(line_of(network, entry), line)) for line in lines) == 1, network
    records = json.loads(run("cache", "ls", "--json").stdout)
    assert {record["folder"] for record in records} == {str(entry) for entry in entries.values()}
    assert {record["key"]["network"] for record in records} == entries.keys()
    assert all(record.keys() == {"folder", "key", "bytes", "used", "set_aside"} for record in records)


def test_verify_names_the_damaged_engine() -> None:
    sound, damaged = put("unet"), put("vae_decoder")
    done = run("cache", "verify")
    assert (done.exit_code, done.stderr) == (0, "")
    assert all(line.startswith("ok  ") for line in done.stdout.splitlines())
    (damaged / "engine").write_bytes(bytes([1]) * (3 << 19))
    done = run("cache", "verify")
    assert done.exit_code == 1
    assert re.search(rf"^ok  {line_of('unet', sound)}$", done.stdout, re.MULTILINE)
    assert re.search(rf"^BAD {line_of('vae_decoder', damaged)}\n    .*hash", done.stdout, re.MULTILINE)
    assert done.stderr == "1 will be built again when next asked for; `fastldm cache prune` does not wait\n"


def test_prune_names_what_it_removes() -> None:
    entry = put("unet")
    nothing = run("cache", "prune")
    assert (nothing.exit_code, nothing.stdout) == (0, "0.0 KiB freed\n")
    done = run("cache", "prune", "--keep", "1MiB")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(rf"removed {line_of('unet', entry)}\n1\.5 MiB freed\n", done.stdout)
    assert not entry.exists()
