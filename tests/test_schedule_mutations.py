"""The tests of schedules can fail: each fault planted in where and how samplers step leads them astray."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
from scheduler_judge import SD
from test_samplers import lead

from fastldm import samplers
from fastldm.errors import InputError

pytestmark = pytest.mark.full
MODULES = ("solvers", "spacing", "table")  # each imports those before


class Mutation(NamedTuple):
    module: str
    old: str
    new: str
    check: Callable[[ModuleType], None]
    why: str


def leads(sampler: str, spaced: str, strength: float = 1.0, **config: Any) -> Callable[[ModuleType], None]:
    def check(schedule: ModuleType) -> None:
        given = {"_class_name": "DDIMScheduler", **SD, "timestep_spacing": spaced, "set_alpha_to_one": True, **config}
        read = schedule.ScheduleConfig.from_dict(given)
        assert lead(read, 10, sampler=sampler, strength=strength, make_table=schedule.make_table) < 4e-3

    return check


def starts_from_noise(schedule: ModuleType) -> None:
    given = {"_class_name": "DDIMScheduler", **SD, **ZERO_SNR, "timestep_spacing": "trailing"}
    table = schedule.make_table(schedule.ScheduleConfig.from_dict(given), 5, sampler="heun")
    assert table.start[1] > 4000


def levels_may_repeat(schedule: ModuleType) -> None:
    config = schedule.ScheduleConfig.from_dict({"_class_name": "EulerDiscreteScheduler", **SD})
    assert schedule.make_table(config, 1, sigmas=[9.0, 0.05, 0.05]).steps == 2


def lies_inside(schedule: ModuleType) -> None:
    config = schedule.ScheduleConfig.from_dict({"_class_name": "LCMScheduler"})
    assert schedule.make_table(config, 4, strength=0.5).timesteps.tolist() == [499, 379, 259, 139]


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
MUTATIONS = [
    Mutation(
        "solvers",
        "grid.past(i, min(i + 1, 4))",
        "grid.past(i, 4)",
        leads("lms", "leading", 0.5),
        "a polynomial through steps that never ran",
    ),
    Mutation(
        "solvers",
        "(Y, t + stride) if i == 1",
        "(Y, t + stride) if i == 1 - min(grid.begin, 1)",
        leads("plms", "leading", 0.5),
        "the first step repeated only from the beginning",
    ),
    Mutation(
        "solvers",
        'timestep_spacing != "linspace"',
        'timestep_spacing != ""',
        leads("ddim", "linspace"),
        "one stride for all on linspace",
    ),
    Mutation(
        "spacing",
        "inside = int(trained * asked.strength)",
        "inside = trained",
        lies_inside,
        "cut from all steps",
    ),
    Mutation("spacing", "bar[-1] = 2**-24", "bar[-1] = bar[-2]", starts_from_noise, "a last level like the one before"),
    Mutation("table", '    "rescale_betas_zero_snr": False,\n', "", starts_from_noise, "zero terminal SNR dropped"),
    Mutation(
        "table",
        "(np.diff(numbers) <= 0).all() if repeats",
        "(np.diff(numbers) < 0).all() if repeats",
        levels_may_repeat,
        "noise levels that may not repeat",
    ),
]


@contextmanager
def planted(mutation: Mutation, new: str) -> Iterator[ModuleType]:
    """fastldm.samplers.table, and the modules under it, with the text replaced in one of them."""
    modules = [importlib.import_module(f"fastldm.samplers.{name}") for name in MODULES]
    sources = [inspect.getsource(module) for module in modules]
    with mock.patch.dict(sys.modules), mock.patch.multiple(samplers, **dict(zip(MODULES, modules, strict=True))):
        for name, source in zip(MODULES, sources, strict=True):
            if name == mutation.module:
                assert source.count(mutation.old) == 1, "the mutation no longer fits the source: rewrite it"
                source = source.replace(mutation.old, new)
            made = ModuleType(f"fastldm.samplers.{name}")
            sys.modules[made.__name__] = made
            setattr(samplers, name, made)
            exec(compile(source, made.__name__, "exec"), made.__dict__)
        yield made


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.module}: {m.why}")
def test_a_planted_fault_is_found(mutation: Mutation) -> None:
    with planted(mutation, mutation.old) as sound:
        mutation.check(sound)
    with planted(mutation, mutation.new) as faulty, pytest.raises((AssertionError, InputError)):
        mutation.check(faulty)
