"""Samplers as methods: where they lead a network that knows the picture, whatever diffusers does."""

from __future__ import annotations

import numpy as np
import pytest
from exact_noise import lead
from samplers_from_source import Edit, samplers_with
from scheduler_judge import SD

from fastldm.errors import InputError
from fastldm.samplers.names import SAMPLERS
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import COLUMNS, make_table

ENDS_NOISY = ("deis", "tcd")  # at the noise of timestep 0
SPACINGS = ("linspace", "leading", "trailing")
ZERO_SNR = read_config(
    {
        "_class_name": "DDIMScheduler",
        **SD,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
)


@pytest.mark.parametrize("spaced", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_noise_leads_to_the_picture(sampler: str, spaced: str) -> None:
    """From the start and from everywhere in the middle: with history or without, a step goes where the next begins."""
    given = {"_class_name": "DDIMScheduler", **SD, "timestep_spacing": spaced, "set_alpha_to_one": True}
    config = read_config(given)
    near = 0.15 if sampler in ENDS_NOISY else 2e-3
    for steps in (1, 2, 5, 8, 10, 25):  # divisors of 1000: else trailing rounds, as diffusers does
        for strength in (0.2, 0.35, 0.5, 0.75, 1.0):
            if int(steps * strength) == 0 or (sampler in ("lcm", "tcd") and steps > 50 * strength):
                continue
            for eta in (0.0, 0.7) if sampler in ("ddim", "tcd") else (0.0,):
                off = lead(config, steps, sampler=sampler, strength=strength, eta=eta)
                assert off < near, (steps, strength, eta, off)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "plms"])
def test_zero_terminal_snr_leads_to_the_picture(sampler: str) -> None:
    """From noise alone. (PLMS's history holds velocities of other noise levels, which are not one another's.)"""
    near = 0.15 if sampler in ENDS_NOISY else 4e-3
    for steps in (1, 2, 5, 8, 25):
        off = lead(ZERO_SNR, steps, sampler=sampler)
        assert off < near, (steps, off)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_zero_terminal_snr(sampler: str) -> None:
    """It starts from noise alone, told of the last timestep."""
    table = make_table(ZERO_SNR, 5, sampler=sampler)
    assert table.timesteps[0] == 999
    assert table.start[0] <= 3e-4 * table.start[1]


@pytest.mark.parametrize("sampler", ["plms", "lms"])
def test_history_begins_where_the_sampler_does(sampler: str) -> None:
    """A start in the middle is the start of a schedule that has no steps before."""
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    whole, late = (make_table(config, 20, sampler=sampler, strength=s) for s in (1.0, 0.3))
    assert late.steps == 6
    calls = len(late) - late.steps  # PLMS makes one more
    assert len(whole) - whole.steps == calls
    assert np.unique(late.timesteps).tolist() == np.unique(whole.timesteps)[:6].tolist()
    whole, late = (t.rows[:, COLUMNS.index("b0") : COLUMNS.index("b3") + 1] != 0 for t in (whole, late))
    assert late.tolist() == whole[: len(late)].tolist()


def test_a_sampler_is_added_by_a_function_and_an_entry() -> None:
    """Found by its names and by its class, and listed."""
    function = '''
def dummy(grid: Grid) -> Iterator[SolverRow]:
    """Euler's method."""
    for i, t, sigma, after in grid.walk():
        yield _row(grid, i, t, sigma, X + (after - sigma) * _slope(grid, sigma, X, M0))


def heun('''
    entry = """
        "Dummy": SchedulerClass(
            solvers.dummy,
            on_sigmas,
            _EULER,
            {"dummy": {}, "dummy low": {"timestep_spacing": "trailing"}},
            {"stand-in": {}},
        ),
        "HeunDiscrete\""""
    with samplers_with(
        Edit("solvers", "\ndef heun(", function), Edit("classes", '\n        "HeunDiscrete"', entry)
    ) as ours:
        assert list(ours.SAMPLERS) == [*list(SAMPLERS)[:5], "dummy", "dummy low", *list(SAMPLERS)[5:]]
        config = ours.read_config({"_class_name": "DDIMScheduler", **SD})
        assert lead(config, 10, sampler="k_Dummy", make_table=ours.make_table) < 2e-3
        euler = ours.make_table(config, 4, sampler="euler karras")
        table = ours.make_table(config, 4, sampler="Stand-In Karras")
        assert (table.rows == euler.rows).all()
        assert table.sampler == "dummy karras"
        assert ours.make_table(config, 4, sampler="dummy low").timesteps[0] == 999
        file = ours.read_scheduler({"_class_name": "DummyScheduler", **SD}, None, "a file")
        assert len(ours.make_table(file, 3)) == 3
        with pytest.raises(InputError, match="euler a, dummy, dummy low, heun"):
            ours.resolve_sampler("no such sampler")
