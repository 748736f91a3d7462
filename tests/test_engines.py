"""Engines that travel with a bundle: kept whole or not at all, handed out where they fit, and only if nobody else can
have written them. What TensorRT makes is in test_bundle.py; here, engines are bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cached import ENGINE
from cached import KEY as ANY_KEY
from filelock import FileLock

from fastldm.errors import EngineError, InputError
from fastldm.export.cache import Key
from fastldm.export.engines import PORTABLE, Engines, Record

ROOT = Path(__file__).resolve().parent.parent
KEY = dataclasses.replace(ANY_KEY, ranges="batch=1:2:16", device="sm_89")
FILE = "some/unet.engine"


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    return Engines(tmp_path)


def keep(
    engines: Engines, file: str = FILE, data: bytes = ENGINE, key: Key = KEY, gpus: tuple[int, ...] = (89,)
) -> Path:
    with engines.writing():
        record = engines.keep(data, file, key, gpus, 21)
    assert engines.records()[-1] == record
    return engines.folder / file


def test_engine_runs_on_named_gpus_or_since_ampere(engines: Engines) -> None:
    assert engines.find(KEY, 89) is None
    keep(engines)
    assert {gpu for gpu in (75, 80, 86, 89, 90, 120) if engines.find(KEY, gpu)} == {89}
    keep(engines, "portable/unet.engine", b"portable", dataclasses.replace(KEY, device=PORTABLE), ())
    assert {gpu for gpu in (75, 80, 86, 89, 90, 120) if engines.find(KEY, gpu)} == {80, 86, 89, 90, 120}
    assert engines.find(KEY, 89) == b"portable"  # the one that was built last
    keep(engines)
    assert engines.find(KEY, 89) == ENGINE
    assert len(engines.records()) == 2


def test_index_describes_each_engine(engines: Engines) -> None:
    keep(engines)
    (output,) = json.loads((engines.folder / "engines.json").read_text())["engines"]
    assert (output["network"], output["file"], output["bytes"], output["opset"]) == ("unet", FILE, len(ENGINE), 21)
    assert (output["capabilities"], output["digest"]) == ([89], KEY.digest)
    assert (output["key"]["version"], output["key"]["ranges"]) == ("1.7.1.116", "batch=1:2:16")
    assert Record.from_dict(output) == engines.records()[0]
    assert engines.has(KEY) == engines.records()[0]
    assert engines.has(dataclasses.replace(KEY, ranges="batch=2:2:2")) is None


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("version", "it is for tensorrt_rtx 1.7.1.116, and here is tensorrt_rtx other"),
        ("backend", "it is for tensorrt_rtx 1.7.1.116, and here is other 1.7.1.116"),
        ("graph", "it was built from another network"),
        ("weights", "it was built from another network"),
        ("precision", "it was built from another network"),
    ],
)
def test_unfit_engine_is_set_aside_with_reason(
    field: str, reason: str, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    keep(engines)
    keep(engines, "some/vae_decoder.engine", b"vae", dataclasses.replace(KEY, network="vae_decoder"))
    assert engines.find(dataclasses.replace(KEY, **{field: "other"}), 89) is None
    assert [record.getMessage() for record in caplog.records] == [f"the bundle's engine of unet is set aside: {reason}"]


def test_engine_for_other_gpu_is_set_aside(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    keep(engines)
    assert engines.find(KEY, 120) is None
    assert "is set aside: it is for sm_89, and here is sm_120" in caplog.text


def truncated(path: Path) -> None:
    os.truncate(path, 1000)


def edited(path: Path) -> None:
    path.write_bytes(b"E" + path.read_bytes()[1:])


def pointing_outside(path: Path) -> None:
    (path.parents[2] / "evil").write_bytes(path.read_bytes())
    index = path.parents[1] / "engines.json"
    index.write_text(index.read_text().replace(FILE, "../evil"))


def behind_a_link(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    truncated: "its sha256 differs",
    edited: "its sha256 differs",
    pointing_outside: "which is not in the bundle",
    (lambda path: path.unlink()): "is missing",
    (lambda path: path.chmod(0o666)): "can be written to by others",
    (lambda path: path.parent.chmod(0o777)): "can be written to by others",
    behind_a_link: "cannot be read",
    a_pipe: "is no file",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_engine_is_never_returned(
    damage: Callable[[Path], None], engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    damage(keep(engines))
    assert engines.find(KEY, 89) is None
    assert DAMAGE[damage] in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_folder_writable_by_others_is_refused(mode: int, engines: Engines) -> None:
    keep(engines)
    engines.folder.chmod(mode)
    with pytest.raises(EngineError, match=r"can be written to by others.*chmod -R go-w"):
        engines.find(KEY, 89)
    with pytest.raises(EngineError, match="can be written to by others"):
        keep(engines)
    engines.folder.chmod(0o700)
    (engines.folder / "engines.json").chmod(0o666)
    with pytest.raises(EngineError, match=r"engines\.json can be written to by others"):
        engines.find(KEY, 89)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"engines": [{}]}', '{"engines": {"a": 1}}'])
def test_a_damaged_index_is_named(text: str, engines: Engines) -> None:
    keep(engines)
    (engines.folder / "engines.json").write_text(text)
    with pytest.raises(EngineError, match=r"engines\.json is damaged"):
        engines.find(KEY, 89)


@pytest.mark.parametrize(
    ("field", "value"), [("file", 1), ("bytes", "1"), ("capabilities", ["89"]), ("sha256", None), ("opset", True)]
)
def test_an_index_of_wrong_types_is_named(field: str, value: object, engines: Engines) -> None:
    keep(engines)
    index = engines.folder / "engines.json"
    output = json.loads(index.read_text())
    output["engines"][0][field] = value
    index.write_text(json.dumps(output))
    with pytest.raises(EngineError, match=r"engines\.json is damaged"):
        engines.find(KEY, 89)


def test_new_files_are_private_for_any_umask(engines: Engines) -> None:
    before = os.umask(0)
    try:
        path = keep(engines)
    finally:
        os.umask(before)
    for written in (engines.folder, path.parent, path, engines.folder / "engines.json"):
        assert written.stat().st_mode & 0o077 == 0


def test_one_process_builds_at_a_time(engines: Engines) -> None:
    keep(engines)
    with FileLock(engines.folder / "lock"), pytest.raises(InputError, match="another process builds engines in"):
        keep(engines)


@pytest.mark.parametrize("call", range(4))  # while the engine, its folder, the index and the engines' folder are synced
def test_killed_writer_leaves_existing_engines(call: int, engines: Engines) -> None:
    second = dataclasses.replace(KEY, network="vae_decoder")
    keep(engines)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from fastldm.export.cache import Key
from fastldm.export.engines import Engines
calls, fsync = [], os.fsync
def dying(file):
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(file)
    fsync(file)
os.fsync = dying
engines = Engines(Path({str(engines.folder.parent)!r}))
with engines.writing():
    engines.keep(b"new", "some/vae_decoder.engine", {second!r}, (89,), 21)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert engines.find(KEY, 89) == ENGINE
    assert (engines.find(second, 89) == b"new") == (call == 3)  # its place in the index is the last of all
    keep(engines, "some/vae_decoder.engine", b"new", second)
    assert engines.find(second, 89) == b"new"
    assert not list(engines.folder.rglob("*.tmp"))


def test_full_disk_is_named_and_leaves_existing_engines(small_disk: Path) -> None:
    engines = Engines(small_disk)
    keep(engines)
    second = dataclasses.replace(KEY, network="vae_decoder")
    with pytest.raises(EngineError, match=r"vae_decoder\.engine could not be written .*No space left.* goes on with"):
        keep(engines, "some/vae_decoder.engine", os.urandom(400_000), second)
    assert engines.find(KEY, 89) == ENGINE
    assert not list(engines.folder.rglob("*.tmp"))
    keep(engines, "some/vae_decoder.engine", b"small", second)


def test_copied_bundle_has_its_engines(engines: Engines, tmp_path: Path) -> None:
    keep(engines)
    copied = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    assert Engines(copied).find(KEY, 89) == ENGINE
