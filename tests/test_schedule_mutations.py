"""The tests of schedules can fail: each fault planted in where and how samplers step leads them astray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from exact_noise import final_error
from samplers_from_source import Edit, samplers_with
from scheduler_runs import SD

from fastldm.errors import InputError

pytestmark = pytest.mark.full


class Mutation(NamedTuple):
    module: str
    old: str
    new: str
    check: Callable[[Any], None]
    label: str


def ends_at_image(sampler: str, spaced: str, strength: float = 1.0, **config: Any) -> Callable[[Any], None]:
    def check(schedule: Any) -> None:
        file = {"_class_name": "DDIMScheduler", **SD, "timestep_spacing": spaced, "set_alpha_to_one": True, **config}
        read = schedule.read_config(file)
        assert final_error(read, 10, sampler=sampler, strength=strength, make_table=schedule.make_table) < 4e-3

    return check


def starts_from_noise(schedule: Any) -> None:
    file = {"_class_name": "DDIMScheduler", **SD, **ZERO_SNR, "timestep_spacing": "trailing"}
    table = schedule.make_table(schedule.read_config(file), 5, sampler="heun")
    assert table.start[1] > 4000


def levels_may_repeat(schedule: Any) -> None:
    config = schedule.read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    assert schedule.make_table(config, 1, sigmas=[9.0, 0.05, 0.05]).steps == 2


def lies_inside(schedule: Any) -> None:
    config = schedule.read_config({"_class_name": "LCMScheduler"})
    assert schedule.make_table(config, 4, strength=0.5).timesteps.tolist() == [499, 379, 259, 139]


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
MUTATIONS = [
    Mutation(
        "solvers",
        "grid.past(i, min(i + 1, 4))",
        "grid.past(i, 4)",
        ends_at_image("lms", "leading", 0.5),
        "a polynomial through steps that never ran",
    ),
    Mutation(
        "solvers",
        "(Y, t + stride) if i == 1",
        "(Y, t + stride) if i == 1 - min(grid.begin, 1)",
        ends_at_image("plms", "leading", 0.5),
        "the first step repeated only from the beginning",
    ),
    Mutation(
        "grid",
        'timestep_spacing != "linspace"',
        'timestep_spacing != ""',
        ends_at_image("ddim", "linspace"),
        "one stride for all on linspace",
    ),
    Mutation(
        "spacing",
        "distilled_steps = int(trained * request.strength)",
        "distilled_steps = trained",
        lies_inside,
        "cut from all steps",
    ),
    Mutation("spacing", "bar[-1] = 2**-24", "bar[-1] = bar[-2]", starts_from_noise, "a last level like the one before"),
    Mutation("classes", '    "rescale_betas_zero_snr": False,\n', "", starts_from_noise, "zero terminal SNR dropped"),
    Mutation(
        "table",
        "(np.diff(numbers) <= 0).all() if repeats",
        "(np.diff(numbers) < 0).all() if repeats",
        levels_may_repeat,
        "noise levels that may not repeat",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.module}: {m.label}")
def test_a_planted_fault_is_found(mutation: Mutation) -> None:
    with samplers_with(Edit(mutation.module, mutation.old, mutation.old)) as sound:
        mutation.check(sound)
    with samplers_with(Edit(*mutation[:3])) as faulty, pytest.raises((AssertionError, InputError)):
        mutation.check(faulty)
