"""The engine cache, with real processes: what they share, and what is left when one of them dies.

Over 500 lines, for the tests of a module are in one file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cached import ENGINE, KEY, never, put
from click.testing import CliRunner

from fastldm.cli import main
from fastldm.errors import EngineError
from fastldm.export.cache import EngineCache, Key, hash_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def start(code: str, cache: EngineCache) -> subprocess.Popen[str]:
    """A process that knows `cache`, KEY and ENGINE."""
    prelude = f"""
import os, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from fastldm.export.cache import EngineCache, Key
cache, KEY, ENGINE = EngineCache(Path({str(cache.folder)!r}), {cache.limit}), {KEY!r}, {ENGINE!r}
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", prelude + code], cwd="/", **pipes)  # type: ignore[call-overload]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def leftovers(cache: EngineCache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if path.name.startswith("tmp-")]


# ---- keys


def test_what_was_built_is_loaded(cache: EngineCache) -> None:
    put(cache)
    assert cache.fetch(KEY, never, lambda data: data.decode()) == ENGINE.decode()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Key)], ids="of {}".format)
def test_every_key_field_makes_another_engine(cache: EngineCache, field: str) -> None:
    put(cache)
    changed = dataclasses.replace(KEY, **{field: "another"})
    assert put(cache, changed, b"other") != cache.folder / KEY.digest
    assert cache.fetch(KEY, never, bytes) == ENGINE


@pytest.mark.parametrize("field", ["version", "device", "driver"], ids="of {}".format)
def test_engine_for_other_machine_is_ignored_with_warning(
    cache: EngineCache, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache)
    put(cache, dataclasses.replace(KEY, network="vae_decoder", graph="c"))  # another network: not worth a line
    assert not caplog.records
    put(cache, dataclasses.replace(KEY, **{field: "other"}), b"other")
    assert len(caplog.records) == 1
    assert "the cached engine of unet is for tensorrt_rtx 1.7.1.116 on NVIDIA H100 sm_90" in caplog.text
    assert "other" in caplog.text
    assert cache.fetch(KEY, never, bytes) == ENGINE, "the machine that it was built for still has it"


def test_hash_depends_only_on_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    assert hash_files(tmp_path / "a", tmp_path / "b").startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180: "abc"


# ---- several processes


def test_one_process_builds_and_the_other_loads(cache: EngineCache, tmp_path: Path) -> None:
    code = f"""
def build():
    Path({str(tmp_path)!r}, f"built-{{os.getpid()}}").touch()
    while not Path({str(tmp_path / "go")!r}).exists():
        time.sleep(0.01)
    return ENGINE
sys.stdout.write(str(len(cache.fetch(KEY, build, bytes))))
"""
    first = start(code, cache)
    wait_for(tmp_path / f"built-{first.pid}")
    second = start(code, cache)
    assert second.stderr is not None
    assert "another process builds engines in" in second.stderr.readline()
    (tmp_path / "go").touch()
    for process in (first, second):
        output, complaint = process.communicate(timeout=60)
        assert (output, process.returncode) == (str(len(ENGINE)), 0), complaint
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_concurrent_eviction_returns_right_engines(cache: EngineCache) -> None:
    # Room for 3 of 6 engines: nearly every fetch removes what another process may be reading just then.
    cache.limit = 3 * (len(ENGINE) + 2000)
    code = """
import dataclasses, random
order = random.Random(SEED)
for _ in range(40):
    n = order.randrange(6)
    engine = cache.fetch(dataclasses.replace(KEY, graph=str(n)), lambda: ENGINE + bytes([n]), bytes)
    assert engine == ENGINE + bytes([n])
"""
    processes = [start(code.replace("SEED", str(seed)), cache) for seed in range(3)]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    assert sum(entry.bytes for entry in cache.entries()) <= cache.limit
    assert leftovers(cache) == []


def test_killed_builder_leaves_working_cache(cache: EngineCache, tmp_path: Path) -> None:
    put(cache, dataclasses.replace(KEY, graph="before"))
    marker = tmp_path / "building"
    child = start(f"cache.fetch(KEY, lambda: (Path({str(marker)!r}).touch(), time.sleep(60)), bytes)", cache)
    wait_for(marker)
    child.kill()
    child.communicate()
    put(cache)
    assert cache.fetch(dataclasses.replace(KEY, graph="before"), never, bytes) == ENGINE


@pytest.mark.parametrize("call", range(4))  # after the engine, the entry, the unfinished folder, the cache's folder
def test_killed_writer_leaves_working_cache(cache: EngineCache, call: int) -> None:
    code = f"""
calls, fsync = [], os.fsync
def dying(file):
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(file)
    fsync(file)
os.fsync = dying
cache.fetch(KEY, lambda: ENGINE, bytes)
"""
    child = start(code, cache)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    finished = call == 3  # the rename was done
    assert (cache.folder / KEY.digest).exists() == finished
    assert len(leftovers(cache)) == (0 if finished else 1)
    assert cache.fetch(KEY, never if finished else lambda: ENGINE, bytes) == ENGINE
    assert cache.fetch(KEY, never, bytes) == ENGINE
    assert leftovers(cache) == []


# ---- disks


def test_full_disk_engine_runs_without_being_stored(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = EngineCache(small_disk / "engines")
    put(cache)
    large = os.urandom(400_000)
    assert cache.fetch(dataclasses.replace(KEY, graph="large"), lambda: large, bytes) == large
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert leftovers(cache) == [], "its half gives the room back"
    assert cache.fetch(KEY, never, bytes) == ENGINE
    put(cache, dataclasses.replace(KEY, graph="small"))


def test_file_size_limits_count_as_full_disks(cache: EngineCache) -> None:
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
assert cache.fetch(KEY, lambda: ENGINE, bytes) == ENGINE
"""
    child = start(code, cache)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == 0, complaint
    assert "the engine of unet runs, but cannot be stored in" in complaint
    assert leftovers(cache) == []
    assert cache.entries() == []


def test_engine_runs_without_writable_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert EngineCache(tmp_path / "file" / "engines").fetch(KEY, lambda: ENGINE, bytes) == ENGINE
    assert "engines cannot be stored in" in caplog.text


def test_least_recently_used_goes_first(cache: EngineCache) -> None:
    keys = [dataclasses.replace(KEY, graph=str(n)) for n in range(5)]
    entry_bytes = sum(file.stat().st_size for file in put(cache, keys[0]).iterdir())
    cache.limit = 3 * entry_bytes + entry_bytes // 2
    for age, key in enumerate(keys[:3]):
        os.utime(put(cache, key) / "entry.json", (1000 + age, 1000 + age))
    cache.fetch(keys[0], never, bytes)  # the oldest, used again
    put(cache, keys[3])
    assert {entry.key for entry in cache.entries()} == {keys[0], keys[2], keys[3]}
    assert sum(entry.bytes for entry in cache.entries()) <= cache.limit


def test_oversized_engine_displaces_nothing(cache: EngineCache, caplog: pytest.LogCaptureFixture) -> None:
    put(cache)
    cache.limit = 2 * len(ENGINE)
    put(cache, dataclasses.replace(KEY, graph="large"), 3 * ENGINE)
    assert [entry.key for entry in cache.entries()] == [KEY]
    assert "larger than the limit of the cache" in caplog.text


# ---- what must not be run


def edited(folder: Path) -> None:
    data = bytearray((folder / "engine").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "engine").write_bytes(data)


def truncated(folder: Path) -> None:
    os.truncate(folder / "engine", 1000)


def missing(folder: Path) -> None:
    (folder / "engine").unlink()


def for_another_gpu(folder: Path) -> None:
    entry = json.loads((folder / "entry.json").read_text())
    entry["key"]["device"] = "NVIDIA A100 sm_80"
    (folder / "entry.json").write_text(json.dumps(entry))


def no_json(folder: Path) -> None:
    (folder / "entry.json").write_text("{")


def world_writable(folder: Path) -> None:
    (folder / "engine").chmod(0o666)


DAMAGE = {
    edited: "its hash differs",
    truncated: "its hash differs",
    missing: "No such file",
    for_another_gpu: "an engine of another key",
    no_json: "entry.json is damaged",
    world_writable: "can be written to by others",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_built_again(
    cache: EngineCache, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(put(cache))
    rebuilt = b"built again"
    loaded: list[bytes] = []
    cache.fetch(KEY, lambda: rebuilt, loaded.append)
    assert loaded == [rebuilt]
    assert len(caplog.records) == 1
    assert "the cached engine of unet is set aside and built again" in caplog.text
    assert DAMAGE[damage] in caplog.text
    assert cache.fetch(KEY, never, bytes) == rebuilt


def test_refused_engine_is_built_again_once(cache: EngineCache, caplog: pytest.LogCaptureFixture) -> None:
    put(cache)

    def load(data: bytes) -> bytes:
        if data == ENGINE:
            raise EngineError("made by another driver")
        return data

    assert cache.fetch(KEY, lambda: b"new", load) == b"new"
    assert len(caplog.records) == 1
    assert "made by another driver" in caplog.text
    assert [entry.aside for entry in cache.entries()].count(True) == 1


def test_unloadable_engine_is_not_stored(cache: EngineCache) -> None:
    def load(data: bytes) -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        cache.fetch(KEY, lambda: ENGINE, load)
    assert cache.entries() == []


def as_a_file(path: Path) -> None:
    path.write_bytes(b"in the way")


def as_a_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


def as_a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def as_a_loop(path: Path) -> None:
    path.symlink_to(path)


def as_a_link(path: Path) -> None:
    outside = next(parent for parent in path.parents if parent.name == "engines").with_name("outside")
    outside.mkdir()
    cached = outside / path.name
    path.rename(cached) if path.exists() else cached.mkdir()
    path.symlink_to(cached)


def as_a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [as_a_file, as_a_folder, as_a_dangling_link, as_a_loop, as_a_link, as_a_pipe])
@pytest.mark.parametrize("name", ["lock", "aside-KEY", "KEY", "KEY/engine", "KEY/entry.json", "tmp-KEY"])
def test_unexpected_entries_are_replaced(cache: EngineCache, name: str, make: Callable[[Path], None]) -> None:
    entry = put(cache)
    path = cache.folder / name.replace("KEY", KEY.digest)
    if make is not as_a_link or not name.startswith("KEY"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)
    if not name.startswith("KEY"):
        edited(entry)  # so that the lock is taken, and what was there set aside
    cache.entries()
    list(cache.verify())
    assert cache.fetch(KEY, lambda: b"built again", bytes) == b"built again"
    assert cache.fetch(KEY, never, bytes) == b"built again"
    cache.prune()
    assert sorted(child.name for child in cache.folder.iterdir()) == sorted([KEY.digest, "lock"])
    assert not (cache.folder / "nowhere").exists(), "nothing is written through a link"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"key":' * 50_000, "[]", '{"key": [], "sha256": 1}', "\xff", '"key"'])
def test_invalid_entry_json_is_replaced(cache: EngineCache, text: str) -> None:
    (put(cache) / "entry.json").write_text(text)
    assert [entry.key for entry in cache.entries()] == [None]
    assert cache.fetch(KEY, lambda: b"built again", bytes) == b"built again"
    assert [entry.aside for entry in cache.prune()] == [True]


# ---- the command


def command(cache: EngineCache, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["cache", *arguments], env={"FASTLDM_CACHE": str(cache.folder.parent)})
    return done.exit_code, done.output


def test_command_lists_verifies_and_prunes(cache: EngineCache) -> None:
    assert command(cache, "ls") == (0, f"no engines in {cache.folder}\n")
    put(cache)
    vae = put(cache, dataclasses.replace(KEY, network="vae_decoder", graph="v"))
    code, output = command(cache, "ls")
    assert code == 0
    for value in (KEY.digest[:12], "unet", "vae_decoder", "tensorrt_rtx 1.7.1.116 on NVIDIA H100 sm_90", "float16"):
        assert value in output
    assert command(cache, "verify")[0] == 0

    edited(vae)
    code, output = command(cache, "verify")
    assert code == 1
    assert "its hash differs" in output
    assert "unet" in output

    put(cache, dataclasses.replace(KEY, network="vae_decoder", graph="v"), b"again")  # the damaged one is set aside
    assert "set aside" in command(cache, "ls")[1]
    assert command(cache, "prune")[0] == 0
    assert len(cache.entries()) == 2
    assert "set aside" not in command(cache, "ls")[1]
    code, output = command(cache, "prune", "--keep", "0")
    assert (code, cache.entries()) == (0, [])
    assert "unet" in output


@pytest.mark.parametrize(("size", "remaining"), [("1MiB", 3), ("150 KB", 2), ("0.1M", 1), ("70000", 0)])
def test_prune_keeps_given_size(cache: EngineCache, size: str, remaining: int) -> None:
    for n in range(3):
        put(cache, dataclasses.replace(KEY, graph=str(n)))  # 70,000 bytes each, and a description
    assert command(cache, "prune", "--keep", size)[0] == 0
    assert len(cache.entries()) == remaining


def test_prune_refuses_invalid_size(cache: EngineCache) -> None:
    code, output = command(cache, "prune", "--keep", "a lot")
    assert code == 2
    assert "'a lot' is not a size: write such as 10GiB" in output


def test_ls_prints_json(cache: EngineCache) -> None:
    put(cache)
    code, output = command(cache, "ls", "--json")
    (entry,) = json.loads(output)
    assert (code, entry["key"]["device"], entry["set_aside"]) == (0, KEY.device, False)
    assert entry["bytes"] > len(ENGINE)
