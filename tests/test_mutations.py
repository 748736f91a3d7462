"""The checks of the kernels can fail: each fault planted in a kernel's source makes one fail."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mutations import FAULTS, Fault
from ops import modules

from fastldm.kernels import dispatch


def test_every_op_has_faults_to_find() -> None:
    assert modules() == set(FAULTS)


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


@pytest.mark.full
@pytest.mark.usefixtures("_ops_restored")
@pytest.mark.parametrize(
    ("module", "fault"),
    [(module, fault) for module, faults in FAULTS.items() for fault in faults],
    ids=lambda value: value.title if isinstance(value, Fault) else value,
)
def test_a_planted_fault_is_found(module: str, fault: Fault, tmp_path: Path) -> None:
    source = inspect.getsource(importlib.import_module(f"fastldm.kernels.{module}"))
    assert source.count(fault.old) == 1, "the fault no longer fits the source: rewrite it"
    fault.check(load(module, source, tmp_path))  # passes without the fault
    with pytest.raises(AssertionError):
        fault.check(load(module, source.replace(fault.old, fault.new), tmp_path))
