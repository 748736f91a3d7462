"""fastldm.samplers from source that a test has changed: a fault planted in it, or a sampler added to it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from fastldm import samplers

# Each imports from those before it only.
MODULES = ("config", "grid", "spacing", "solvers", "k_solvers", "classes", "scheduler_config", "names", "table")


class Edit(NamedTuple):
    module: str
    old: str  # stands in the source once
    new: str


@contextmanager
def samplers_with(*edits: Edit) -> Iterator[Any]:
    """The public names of fastldm.samplers' modules, each of them run from its source with the edits made."""
    modules = [importlib.import_module(f"fastldm.samplers.{name}") for name in MODULES]
    sources = {name: inspect.getsource(module) for name, module in zip(MODULES, modules, strict=True)}
    for module, old, new in edits:
        assert sources[module].count(old) == 1, f"{old!r} no longer stands in {module}.py once: rewrite the edit"
        sources[module] = sources[module].replace(old, new)
    names: dict[str, Any] = {}
    with mock.patch.dict(sys.modules), mock.patch.multiple(samplers, **dict(zip(MODULES, modules, strict=True))):
        for name, source in sources.items():
            module = ModuleType(f"fastldm.samplers.{name}")
            sys.modules[module.__name__] = module
            setattr(samplers, name, module)
            exec(compile(source, module.__name__, "exec"), module.__dict__)
            names |= {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
        yield SimpleNamespace(**names)
