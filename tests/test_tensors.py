"""Files of tensors: what other programs leave in them beside tensors, and files that are none."""

from __future__ import annotations

import os
import pickle
import re
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastldm.errors import CheckpointError
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


def test_a_trainers_own_classes_are_passed_over(tmp_path: Path, lightning: Any) -> None:
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


def test_a_dict_within_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {**STATE}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.ckpt")
    assert same(read_tensors(tmp_path / "a.ckpt", None, allow_pickle=True))


def test_torchscript_and_other_zips_are_named(tmp_path: Path) -> None:
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
def test_names_of_wrappers_are_taken_off(tmp_path: Path, suffix: str) -> None:
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
def test_a_pipe_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (lambda path: read_shapes(path, True), lambda path: read_tensors(path, None, True)):
        with pytest.raises(CheckpointError, match="it is a pipe, not a file"):
            read(tmp_path / "model.safetensors")
