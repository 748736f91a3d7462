"""Faults to plant in the kernels' source, each with a check that it has to turn red: data for test_mutations.py.

A mutation is (module, old, new, check, why). `old` stands in the module's source exactly once; `check` gets the
mutated module and calls tests/ops.py on its op.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import ops
import torch


class Mutation(NamedTuple):
    module: str
    old: str
    new: str
    check: Callable[[ModuleType], None]
    why: str


def _geglu(module: ModuleType) -> None:
    ops.check(module.GEGLU, torch.randn(3, 2 * 648, device=ops.DEVICE))


GEGLU = [
    Mutation(
        "geglu",
        "mask = (row < rows) & (channel < channels)",
        "mask = (row < rows) & (channel < channels - 1)",
        _geglu,
        "a tail mask one channel short",
    ),
]

MUTATIONS = [*GEGLU]
