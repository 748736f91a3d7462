"""Files of tensors: what other programs leave in them beside tensors, and files that are none."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from original_layout import (
    random_state,
    small,
)
from safetensors.torch import save_file

from fastldm.errors import CheckpointError
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.loading.single_file import open_single_file
from fastldm.loading.tensors import read_shapes, read_tensors

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


@pytest.fixture
def lightning() -> Iterator[types.ModuleType]:
    """A module as trainers have them; it is gone when the file that names its classes is read."""
    module = types.ModuleType("trainer_of_somebody")

    class Attributes(dict[str, Any]):
        pass

    class Callback:
        def __init__(self) -> None:
            self.best, self.path = torch.ones(3), Path("last.ckpt")

    class State(Callback):
        def __reduce__(self) -> tuple[Any, ...]:
            return State, (), {"epoch": 3}

    for cls in (Attributes, Callback, State):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__ if cls is not Attributes else "AttributeDict"
        setattr(module, cls.__qualname__, cls)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def same(got: dict[str, torch.Tensor]) -> bool:
    return got.keys() == STATE.keys() and all(torch.equal(got[key], STATE[key]) for key in STATE)


def test_foreign_classes_in_pickles_are_skipped(tmp_path: Path, lightning: Any) -> None:
    attributes = lightning.AttributeDict(lr=1e-4, inner=lightning.AttributeDict(a=[1, 2]))
    extra = {
        "callbacks": {lightning.Callback: {"best_model_score": np.float64(0.5)}, "state": lightning.State()},
        "hyper_parameters": attributes,
        "loops": [lightning.Callback(), defaultdict(list, {"x": [1]})],
        "path": Path("a/b"),
        "epoch": 7,
    }
    torch.save({"state_dict": OrderedDict(STATE), **extra}, tmp_path / "model.ckpt")
    sys.modules.pop(lightning.__name__)
    allowed = set(torch.serialization.get_safe_globals())
    assert same(read_tensors(tmp_path / "model.ckpt", None, allow_pickle=True))
    assert read_shapes(tmp_path / "model.ckpt", True)[0] == {"a.weight": (2, 3), "b": (2,)}
    assert set(torch.serialization.get_safe_globals()) == allowed  # none of them stays so


class _Exploit:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "call",
    [os.mkdir, Path.mkdir, eval, getattr, __import__, warnings.warn, pickle.loads],
    ids=lambda call: call.__name__,
)
def test_no_code_of_a_pickle_runs(tmp_path: Path, call: Callable[..., Any], zipped: bool) -> None:
    target = tmp_path / "ran"
    arguments: Any = {
        eval: (f"__import__('os').mkdir({str(target)!r})",),
        getattr: (Path(target), "mkdir"),
        __import__: ("this",),
        warnings.warn: ("it ran", UserWarning),
        pickle.loads: (pickle.dumps(_Exploit(os.mkdir, str(target))),),
    }.get(call, (target if call is Path.mkdir else str(target),))
    torch.save({**STATE, "x": _Exploit(call, *arguments)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    sys.modules.pop("this", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        text = ""
        try:
            assert same(read_tensors(tmp_path / "a.ckpt", None, allow_pickle=True))
        except CheckpointError as error:
            text = str(error)
    assert text == "" or "holds objects other than tensors" in text
    assert text.isprintable()
    assert not re.search("add_safe_globals|weights_only", text)  # torch's advice
    assert not target.exists()
    assert "this" not in sys.modules


def test_self_containing_dict_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {**STATE}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.ckpt")
    assert same(read_tensors(tmp_path / "a.ckpt", None, allow_pickle=True))


def test_torchscript_and_other_zips_are_refused_by_name(tmp_path: Path) -> None:
    import zipfile

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript program, not a file of tensors") as refused:
        read_shapes(tmp_path / "script.pt", allow_pickle=True)
    assert str(refused.value).isprintable()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("README", "hello")
    with pytest.raises(CheckpointError, match="is damaged") as refused:
        read_shapes(tmp_path / "other.zip", allow_pickle=True)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_wrapper_prefixes_are_removed(tmp_path: Path, suffix: str) -> None:
    wrapped = {"module._orig_mod.a.weight": STATE["a.weight"], "module._orig_mod.b": STATE["b"]}
    path = tmp_path / f"model.{suffix}"

    def write(state: dict[str, torch.Tensor]) -> None:
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)

    write(wrapped)
    assert same(read_tensors(path, None, allow_pickle=True))
    assert same(read_tensors(path, ["a.weight", "b"], allow_pickle=True, to_prepare=True))
    assert read_shapes(path, True)[0] == {"a.weight": (2, 3), "b": (2,)}
    write({**wrapped, "b": STATE["b"].clone()})
    with pytest.raises(CheckpointError, match="has 'b' twice"):
        read_shapes(path, True)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have names on POSIX systems")
def test_named_pipe_as_weight_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (lambda path: read_shapes(path, True), lambda path: read_tensors(path, None, True)):
        with pytest.raises(CheckpointError, match="it is a pipe, not a file"):
            read(tmp_path / "model.safetensors")


def _good_bytes() -> bytes:
    from safetensors.torch import save

    return save({"weight": torch.arange(64.0), "bias": torch.zeros(3)})


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"is empty \(0 bytes\): fetch it again"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "html": (lambda: b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is an HTML page"),
    "cut off": (lambda: _good_bytes()[:-100], "is cut off, with 296 of 396 bytes there: fetch it again"),
    "cut within the header": (lambda: _good_bytes()[:40], "is cut off within its header"),
    "noise": (lambda: bytes(range(7, 256)) * 4, r"is no safetensors file, or damaged \("),
    "header is no JSON": (lambda: struct.pack("<Q", 16) + b"{" + b"x" * 40, r"is no safetensors file, or damaged \("),
    "offsets overlap": (
        lambda: (lambda h: struct.pack("<Q", len(h)) + h + bytes(64))(
            b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
        ),
        r"is no safetensors file, or damaged \(",
    ),
    "gguf": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
    "pickle": (lambda: pickle.dumps({"weight": 1}), "is a pickle, which can run any code"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline("sd1", tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_refused_by_kind(tmp_path: Path, kind: str, folder: Path) -> None:
    make, message = DAMAGED[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=message):
        open_single_file(path)
    shutil.copytree(folder, tmp_path / "pipeline")
    victim = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    victim.write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as caught:
        open_diffusers(tmp_path / "pipeline").components["unet"].state()
    assert str(caught.value).startswith(str(victim))


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        open_single_file(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        open_single_file(tmp_path)


def test_pickles_need_permission_and_give_only_tensors(tmp_path: Path) -> None:
    state = random_state(small("sd1"))
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run any code.*allow_pickle=True"):
        open_single_file(tmp_path / "model.ckpt")
    got = open_single_file(tmp_path / "model.ckpt", allow_pickle=True).components["unet"].state()
    save_file(state, tmp_path / "model.safetensors")
    expected = open_single_file(tmp_path / "model.safetensors").components["unet"].state()
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in got)

    for name, zipped in (("zip.ckpt", True), ("legacy.ckpt", False)):
        torch.save(
            {"state_dict": state, "x": _Exploit(os.mkdir, str(tmp_path / "ran"))},
            tmp_path / name,
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(CheckpointError, match=r"holds objects other than tensors.* and is refused"):
            open_single_file(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "ran").exists()

    content = (tmp_path / "model.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt is damaged \(.*\): fetch it again"):
        open_single_file(tmp_path / "cut.ckpt", allow_pickle=True)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list; tensors by name were expected"):
        open_single_file(tmp_path / "list.ckpt", allow_pickle=True)
