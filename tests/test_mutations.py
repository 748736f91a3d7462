"""The tests of the kernels can fail: each fault planted in a kernel's source turns one red."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mutations import MUTATIONS, Mutation

from fastldm.kernels import dispatch

pytestmark = pytest.mark.full


@pytest.fixture
def _ops_restored() -> Iterator[None]:
    before = dict(dispatch.OPS)
    yield
    dispatch.OPS.clear()
    dispatch.OPS.update(before)


def load(name: str, source: str, folder: Path) -> ModuleType:
    """A module of fastldm.kernels from this source, under another name."""
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"fastldm.kernels.mutated_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("_ops_restored")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.module}: {m.why}")
def test_a_planted_fault_is_found(mutation: Mutation, tmp_path: Path) -> None:
    original = importlib.import_module(f"fastldm.kernels.{mutation.module}")
    source = inspect.getsource(original)
    assert source.count(mutation.old) == 1, "the mutation no longer fits the source: rewrite it"
    mutation.check(load(mutation.module, source, tmp_path))  # green as it stands
    with pytest.raises(AssertionError):
        mutation.check(load(mutation.module, source.replace(mutation.old, mutation.new), tmp_path))
