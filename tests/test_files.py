"""Files that are written: what cannot be is found before the work, and nothing is half-written."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastldm import InputError
from fastldm.files import check_output, output_paths, whole_file
from fastldm.image import save_image


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """To write beyond fails as on a full disk, of which this is the one that a test can make."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_full_disk_leaves_existing_file(name: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    (tmp_path / name).write_bytes(b"before")
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as caught:
        save_image(noise, tmp_path / name)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"before")]


def test_full_disk_is_found_before_work(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written to"):
        output_paths(tmp_path / "a.png", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("\udcff.png", "not a name in UTF-8"),
        ("a\0.png", "zero byte"),
        ("n" * 300 + ".png", "cannot be written"),
        ("no/a.png", "does not exist"),
        ("file/a.png", "Not a directory|not a folder"),
        ("folder.png", "exists"),
        ("fifo.png", "exists"),
        ("link.png", "exists"),
        ("loop/a.png", "does not exist|cannot be written"),
    ],
)
def test_invalid_file_names_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "loop").symlink_to("loop")
    for check in (lambda path: output_paths(path, 1), lambda path: output_paths(path, 3), check_output):
        if name in ("folder.png", "fifo.png", "link.png") and check is not check_output:
            continue
        with pytest.raises(InputError, match=message) as caught:
            check(tmp_path / name)
        assert len(str(caught.value)) < 400
    if name in ("folder.png", "fifo.png"):
        with pytest.raises(InputError, match="exists"):
            check_output(tmp_path / name, force=True)


def test_file_is_written_atomically(tmp_path: Path) -> None:
    def stopped() -> None:
        with whole_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
    with whole_file(tmp_path / "a") as file:
        file.write(b"all")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"all")]
