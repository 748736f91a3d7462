"""Samplers against diffusers' schedulers, and where exact noise leads them: trajectories with the same noise."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exact_noise import final_error
from named import EXCHANGEABLE, FORWARD
from samplers_from_source import Edit, samplers_with
from scheduler_judge import NUMBERS, Difference, judge
from scheduler_runs import (
    PARITY,
    SD,
    SHAPE,
    Case,
    DiffusersOptions,
    arguments_of,
    diffusers_run,
    draw_noise,
    error,
    exact_table,
    fast_diffusers,
    network,
    our_run,
)

from fastldm.errors import InputError
from fastldm.runtime.denoise import Run, denoise
from fastldm.samplers.classes import DIFFUSERS
from fastldm.samplers.names import SAMPLERS, resolve_sampler
from fastldm.samplers.scheduler_config import read_config, read_scheduler
from fastldm.samplers.table import COLUMNS, make_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = (1, 2, 3, 5, 10, 25, 50)


@pytest.fixture(scope="module", autouse=True)
def _fast_diffusers() -> Iterator[None]:
    with fast_diffusers():
        yield


def check(cases: Iterator[Case] | list[Case]) -> None:
    verdicts = [judge(case) for case in cases]
    wrong = [verdict for verdict in verdicts if verdict.kind in ("unknown", "crashed")]
    assert not wrong, f"{len(wrong)} of {len(verdicts)} cases:\n" + "\n".join(v.reasons[0] for v in wrong[:10])


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LIMIT = {"final_sigmas_type": "sigma_min", "solver_order": 3, "lower_order_final": False, "use_beta_sigmas": True}
NEEDED = (  # a case for each of NUMBERS
    Case("DEISMultistepScheduler", {**SD, "beta_start": 0.0001, "use_exponential_sigmas": True}, 3),
    Case("DPMSolverMultistepScheduler", {**SD, "use_beta_sigmas": True}, 50),
    Case("HeunDiscreteScheduler", {**COSINE, "prediction_type": "sample"}, 5),
    Case("DDIMScheduler", {**SD, **ZERO_SNR}, 3, eta=1.0),
    Case("UniPCMultistepScheduler", {**SD, "solver_type": "bh1"}, 5),
    Case("UniPCMultistepScheduler", {**SD, **LIMIT, "prediction_type": "sample"}, 27),
)


@pytest.mark.parametrize(("difference", "case"), list(zip(NUMBERS, NEEDED, strict=True)), ids=lambda v: v.name)
def test_each_difference_in_numbers_is_needed(difference: Difference, case: Case) -> None:
    """diffusers as it is raises, gives NaN or is off; asked as its reason says, it agrees with us."""
    ours = our_run(case)[0]
    try:
        unchanged = error(ours, diffusers_run(case)[0])
    except IndexError:
        unchanged = math.nan
    if difference.name in ("float32 roots", "eta 1 at zero SNR") and unchanged < PARITY:
        pytest.skip("torch's roots are the nearest here")
    assert difference.applies(case, case.table())
    assert not unchanged < PARITY
    assert error(ours, diffusers_run(case, DiffusersOptions() | difference.options)[0]) < PARITY


# ---- the grid: prediction types x spacings x sigmas ----


def grid(name: str) -> Iterator[dict[str, Any]]:
    keys = DIFFUSERS[name].keys
    predictions = DIFFUSERS[name].choices.get("prediction_type", ("epsilon", "v_prediction", "sample"))
    spacings = ("linspace", "leading", "trailing") if "timestep_spacing" in keys else (None,)
    kinds = [{}] + [{key: True} for key in keys if key.startswith("use_")]
    if "rescale_betas_zero_snr" in keys:
        kinds.append({"rescale_betas_zero_snr": True})
    for prediction, spaced, kind in itertools.product(predictions, spacings, kinds):
        yield {**SD, "prediction_type": prediction, **kind, **({"timestep_spacing": spaced} if spaced else {})}


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_trajectories_equal_diffusers(name: str) -> None:
    """Every cell of the grid at two step counts, all step counts in every class."""
    cells = list(grid(name))
    check(Case(name, config, STEPS[(i + k) % 7]) for i, config in enumerate(cells) for k in (0, 3))


@pytest.mark.full
@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_trajectories_equal_diffusers_at_all_steps(name: str) -> None:
    """Every cell at every number of steps up to 16, where the orders of solvers change; above, one prediction type at
    a time, to which `test_prediction_types_are_one_sampler` holds the others, but for PLMS, of which it knows nothing.
    """
    cells, several = list(grid(name)), len({config["prediction_type"] for config in grid(name)})
    stride = 1 if name == "PNDMScheduler" else several
    selected = itertools.product(enumerate(cells), range(1, 51))
    check(
        Case(name, config, steps)
        for (i, config), steps in selected
        if steps <= 16 or steps % stride == i // (len(cells) // several) % stride
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in EXCHANGEABLE if name != "PNDMScheduler"])
def test_prediction_types_are_one_sampler(name: str) -> None:
    """Every cell of the grid at every number of steps: networks that say the same as noise, as a picture and as v lead
    to the same latents, in float64. (Not with PLMS, whose history holds outputs of other noise levels.)

    At zero terminal SNR an output is a difference of numbers 4096 times as large, and a second-order step divides by
    that once more: 2^-52 x 4096^2 is 4e-9. All other cells are within 1e-11.
    """
    cells: dict[str, list[Case]] = {}
    for config, steps in itertools.product(grid(name), range(1, 51)):
        cells.setdefault(str({**config, "prediction_type": steps}), []).append(Case(name, config, steps))
    for cases in cells.values():
        ends = [end for case in cases if (end := final_latents(case)) is not None]
        for end in ends[1:]:
            assert np.abs(end - ends[0]).max() < 1e-8 * np.abs(ends[0]).max(), cases[0]


def final_latents(case: Case) -> np.ndarray | None:
    """Where the table leads, in float64, a network that predicts one and the same picture, said as the case has it."""
    try:
        _, rows, numbers = exact_table(case)
    except InputError:  # noise at zero terminal SNR, and what no prediction type can do
        return None
    drawn = np.random.default_rng(0).standard_normal((len(rows) + 1, 3))
    state = np.zeros((7, 3))  # x, y, m0, m1, m2, m3, noise
    state[0] = drawn[-1] * rows[0].level[1]
    for row, n, noise in zip(rows, numbers, drawn, strict=False):
        alpha, _ = row.at or row.level  # SA-Solver's `level` is that of diffusers' add_noise
        model_input, alpha = row.c_in * state[0], row.c_in * alpha  # model_input = alpha * image + sigma * noise
        sigma = math.sqrt(1 - alpha**2)
        output = image = np.tanh(model_input + math.sin(row.t / 300))
        if case.config["prediction_type"] == "epsilon":
            output = (model_input - alpha * image) / sigma
        elif case.config["prediction_type"] == "v_prediction":
            output = (alpha * model_input - image) / sigma
        state[3:6] = state[2:5]
        state[2], state[6] = n[1] * state[0] + n[2] * output, noise
        state[:2] = np.stack([n[3:10], [*n[10:16], 0.0]]) @ state
    return state[0]


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_noise_of_batches_and_generators(name: str) -> None:
    """Batch 3 from one generator, and from a list of three; eta makes DDIM and TCD draw."""
    config = {**SD, **({"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPMSolver") else {})}
    check(Case(name, config, 4, eta=0.6, batch=3, generators=count) for count in (0, 3))


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_image_to_image_and_inpainting(name: str) -> None:
    cases = []
    for strength, spaced in itertools.product((0.25, 0.6, 1.0), ("leading", "trailing", "linspace")):
        config = {**SD, "timestep_spacing": spaced}
        cases += [Case(name, config, 8, eta=0.3, strength=strength, image_to_image=True, batch=2)]
        cases += [Case(name, config, 8, eta=0.3, strength=strength, mask=True, batch=2)]
    check(cases)


# ---- all other options ----

OPTIONS: dict[str, list[Any]] = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_start": [0.00085, 0.0001],
    "beta_end": [0.012, 0.02],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [False, False, True],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
    "solver_order": [1, 2, 2, 3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "predict_x0": [True, True, False],
    "disable_corrector": [[], [], [0], [1, 2]],
    "original_inference_steps": [50, 100],
    "timestep_scaling": [10.0, 7.0],
}


def any_case(name: str, rng: random.Random) -> Case:
    """A configuration that the class takes, drawn from all options, at any number of steps."""
    entry, config = DIFFUSERS[name], {}
    for key, values in OPTIONS.items():
        if key in entry.keys:
            allowed = entry.choices.get(key, values)
            config[key] = rng.choice([value for value in values if value in allowed] or [entry.keys[key]])
    kinds = [key for key in entry.keys if key.startswith("use_")]
    if kinds and (kind := rng.choice(["", *kinds])):
        config[kind] = True
    if name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        config |= {"sigma_min": rng.choice([None, 0.05]), "sigma_max": rng.choice([None, 12.0])}
    if config.get("algorithm_type") == "sde-dpmsolver":
        config["solver_order"] = min(config["solver_order"], 2)  # we refuse the third at once, diffusers on reaching it
    return Case(name, config, rng.randint(1, 50), eta=rng.choice([0.0, 0.0, 0.5, 1.0]))


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_any_options(name: str) -> None:
    rng = random.Random(name)
    check(any_case(name, rng) for _ in range(8))


@pytest.mark.full
@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_any_options_many(name: str) -> None:
    rng = random.Random(f"many {name}")
    check(any_case(name, rng) for _ in range(250))


def test_custom_timesteps_and_sigmas() -> None:
    timesteps = [999, 839, 639, 299, 39]
    cases = [
        Case(name, SD, 5, custom={"timesteps": timesteps})
        for name in EXCHANGEABLE
        if "timesteps" in DIFFUSERS[name].custom
    ]
    assert len(cases) == 7
    sigmas = [14.6, 6.3, 2.5, 0.9, 0.1, 0.0]
    check([*cases, Case("EulerDiscreteScheduler", SD, 5, custom={"sigmas": sigmas})])


@pytest.mark.parametrize("sampler", ["dpm++ 2m", "unipc", "lcm", "deis", "heun karras"])
def test_other_sampler_runs_on_checkpoint_schedule(sampler: str) -> None:
    """As diffusers' `from_config`: keys of the file stay, keys that it lacks get the new class's defaults."""
    file = {
        "_class_name": "PNDMScheduler",
        **SD,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction",
    }
    selected = resolve_sampler(sampler)
    schedule = {key: value for key, value in file.items() if key not in ("_class_name", "skip_prk_steps")}
    case = Case(selected.class_name, {**schedule, **selected.options}, 6)
    table = make_table(read_config(file), 6, sampler=sampler)
    np.testing.assert_array_equal(table.rows, case.table().rows)
    check([case])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "HeunDiscreteScheduler"])
def test_clamped_samples_equal_diffusers(name: str, prediction: str) -> None:
    """clip_sample and its range, as in a scheduler that no pipeline has changed; DDIM in its place clamps too."""
    file = {**SD, "prediction_type": prediction, "clip_sample": True, "clip_sample_range": 0.7, "_class_name": name}
    case = Case(name, {key: value for key, value in file.items() if key != "_class_name"}, 6, eta=0.4)
    config = read_scheduler(file, None, "a file")
    assert make_table(config, 6, sampler="dpm++ 2m").rare is False
    clamped, other = make_table(config, 6, eta=0.4), make_table(config, 6, eta=0.4, sampler="ddim")
    assert clamped.rare
    assert other.rare
    scheduler = getattr(diffusers, name).from_config(file)
    scheduler.set_timesteps(6)
    x, noises = draw_noise(clamped, case, torch.Generator().manual_seed(1))
    end = denoise(lambda u, i, _: network(u, clamped.timesteps[i]), Run(clamped, x * clamped.init_noise_sigma, noises))
    g, takes = torch.Generator().manual_seed(1), arguments_of(scheduler.step)
    x = torch.randn(1, *SHAPE, generator=g) * scheduler.init_noise_sigma
    extra = {key: value for key, value in {"generator": g, "eta": 0.4}.items() if key in takes}
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
    assert error(end, x) < PARITY


ENDS_NOISY = ("deis", "tcd", "sa solver")  # at the noise of timestep 0


SPACINGS = ("linspace", "leading", "trailing")


ZERO_TERMINAL = read_config(
    {
        "_class_name": "DDIMScheduler",
        **SD,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
)


@pytest.mark.parametrize("spaced", SPACINGS)
@pytest.mark.parametrize("sampler", FORWARD)
def test_exact_noise_leads_to_image(sampler: str, spaced: str) -> None:
    """From the start and from everywhere in the middle: with history or without, a step goes where the next begins."""
    file = {"_class_name": "DDIMScheduler", **SD, "timestep_spacing": spaced, "set_alpha_to_one": True}
    config = read_config(file)
    tolerance = 0.15 if sampler in ENDS_NOISY else 2e-3
    for steps in (1, 2, 5, 8, 10, 25):  # divisors of 1000: else trailing rounds, as diffusers does
        for strength in (0.2, 0.35, 0.5, 0.75, 1.0):
            if int(steps * strength) == 0 or (sampler in ("lcm", "tcd") and steps > 50 * strength):
                continue
            for eta in (0.0, 0.7) if sampler in ("ddim", "tcd") else (0.0,):
                off = final_error(config, steps, sampler=sampler, strength=strength, eta=eta)
                assert off < tolerance, (steps, strength, eta, off)


@pytest.mark.parametrize("sampler", [param for param in FORWARD if param.values != ("plms",)])
def test_zero_terminal_snr_leads_to_image(sampler: str) -> None:
    """From noise alone. (PLMS's history holds velocities of other noise levels, which are not one another's.)"""
    tolerance = 0.15 if sampler in ENDS_NOISY else 4e-3
    for steps in (1, 2, 5, 8, 25):
        off = final_error(ZERO_TERMINAL, steps, sampler=sampler)
        assert off < tolerance, (steps, off)


@pytest.mark.parametrize("sampler", FORWARD)
def test_every_sampler_supports_zero_terminal_snr(sampler: str) -> None:
    """It starts from noise alone, told of the last timestep."""
    table = make_table(ZERO_TERMINAL, 5, sampler=sampler)
    assert table.timesteps[0] == 999
    assert table.start[0] <= 3e-4 * table.start[1]


@pytest.mark.parametrize("sampler", ["plms", "lms"])
def test_history_starts_with_first_step(sampler: str) -> None:
    """A start in the middle is the start of a schedule that has no steps before."""
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    full, late = (make_table(config, 20, sampler=sampler, strength=s) for s in (1.0, 0.3))
    assert late.steps == 6
    calls = len(late) - late.steps  # PLMS makes one more
    assert len(full) - full.steps == calls
    assert np.unique(late.timesteps).tolist() == np.unique(full.timesteps)[:6].tolist()
    full, late = (t.rows[:, COLUMNS.index("b0") : COLUMNS.index("b3") + 1] != 0 for t in (full, late))
    assert late.tolist() == full[: len(late)].tolist()


def test_sampler_needs_function_and_entry() -> None:
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
        assert final_error(config, 10, sampler="k_Dummy", make_table=ours.make_table) < 2e-3
        euler = ours.make_table(config, 4, sampler="euler karras")
        table = ours.make_table(config, 4, sampler="Stand-In Karras")
        assert (table.rows == euler.rows).all()
        assert table.sampler == "dummy karras"
        assert ours.make_table(config, 4, sampler="dummy low").timesteps[0] == 999
        file = ours.read_scheduler({"_class_name": "DummyScheduler", **SD}, None, "a file")
        assert len(ours.make_table(file, 3)) == 3
        with pytest.raises(InputError, match="euler a, dummy, dummy low, heun"):
            ours.resolve_sampler("no such sampler")
