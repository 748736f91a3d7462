"""adapters/locate.py: where an adapter's file is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastldm.adapters.locate import SHIPPED, find_weights
from fastldm.errors import CheckpointError, InputError


def test_files_and_folders_are_found(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    assert find_weights(file) == find_weights(tmp_path) == find_weights(tmp_path, weight_name=file.name) == file
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has 2 files .*: give weight_name"):
        find_weights(tmp_path)
    preferred = tmp_path / "pytorch_lora_weights.safetensors"
    preferred.touch()
    assert find_weights(tmp_path) == preferred


def test_pickles_count_only_where_allowed(tmp_path: Path) -> None:
    (tmp_path / "old.pt").touch()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        find_weights(tmp_path)
    assert find_weights(tmp_path, allow_pickle=True) == tmp_path / "old.pt"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", "a/../../x"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected a name in"):
        find_weights(tmp_path, weight_name=name)


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="there is no file 'b'"):
        find_weights(tmp_path, weight_name="b")
    with pytest.raises(InputError, match="weight_name is for a folder"):
        find_weights(file, weight_name="b")
    with pytest.raises(CheckpointError, match="does not exist here"):
        find_weights(tmp_path / "nothing")


def test_shipped_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in SHIPPED.glob("*.safetensors"):
        assert find_weights(file.stem) == file
    with pytest.raises(CheckpointError, match="does not exist here"):
        find_weights("../default/unet/model")
