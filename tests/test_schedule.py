"""Samplers against diffusers' schedulers: whole trajectories with the same noise, and what bad configurations get."""

from __future__ import annotations

import itertools
import logging
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers import schedulers as diffusers_schedulers
from scheduler_judge import (
    NUMBERS,
    PARITY,
    SD,
    Asked,
    Case,
    Difference,
    diffusers_run,
    error,
    exact_table,
    fast_diffusers,
    judge,
    our_run,
)

from fastldm.errors import InputError
from fastldm.kernels import step as step_kernel
from fastldm.samplers.classes import CLASSES
from fastldm.samplers.names import SAMPLERS, resolve_sampler
from fastldm.samplers.scheduler_config import read_config
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
    assert not wrong, f"{len(wrong)} of {len(verdicts)} cases:\n" + "\n".join(v.why[0] for v in wrong[:10])


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
        as_it_is = error(ours, diffusers_run(case)[0])
    except IndexError:
        as_it_is = math.nan
    if difference.name in ("float32 roots", "eta 1 at zero SNR") and as_it_is < PARITY:
        pytest.skip("torch's roots are the nearest here")
    assert difference.where(case, case.table())
    assert not as_it_is < PARITY
    assert error(ours, diffusers_run(case, Asked() | difference.options)[0]) < PARITY


# ---- the grid: prediction types x spacings x sigmas ----


def grid(name: str) -> Iterator[dict[str, Any]]:
    keys = CLASSES[name].keys
    predictions = CLASSES[name].choices.get("prediction_type", ("epsilon", "v_prediction", "sample"))
    spacings = ("linspace", "leading", "trailing") if "timestep_spacing" in keys else (None,)
    kinds = [{}] + [{key: True} for key in keys if key.startswith("use_")]
    if "rescale_betas_zero_snr" in keys:
        kinds.append({"rescale_betas_zero_snr": True})
    for prediction, spaced, kind in itertools.product(predictions, spacings, kinds):
        yield {**SD, "prediction_type": prediction, **kind, **({"timestep_spacing": spaced} if spaced else {})}


@pytest.mark.parametrize("name", CLASSES)
def test_trajectories_are_diffusers(name: str) -> None:
    """Every cell of the grid at two step counts, all step counts in every class."""
    cells = list(grid(name))
    check(Case(name, config, STEPS[(i + k) % 7]) for i, config in enumerate(cells) for k in (0, 3))


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_trajectories_are_diffusers_at_all_steps(name: str) -> None:
    """Every cell at every number of steps up to 16, where the orders of solvers change; above, one prediction type at
    a time, to which `test_prediction_types_are_one_sampler` holds the others, but for PLMS, of which it knows nothing.
    """
    cells, several = list(grid(name)), len({config["prediction_type"] for config in grid(name)})
    share = 1 if name == "PNDMScheduler" else several
    chosen = itertools.product(enumerate(cells), range(1, 51))
    check(
        Case(name, config, steps)
        for (i, config), steps in chosen
        if steps <= 16 or steps % share == i // (len(cells) // several) % share
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "PNDMScheduler"])
def test_prediction_types_are_one_sampler(name: str) -> None:
    """Every cell of the grid at every number of steps: networks that say the same as noise, as a picture and as v lead
    to the same latents, in float64. (Not with PLMS, whose history holds outputs of other noise levels.)
    """
    cells: dict[str, list[Case]] = {}
    for config, steps in itertools.product(grid(name), range(1, 51)):
        cells.setdefault(str({**config, "prediction_type": steps}), []).append(Case(name, config, steps))
    for cases in cells.values():
        ends = [end for case in cases if (end := said_as(case)) is not None]
        for end in ends[1:]:
            assert np.abs(end - ends[0]).max() < 1e-9 * np.abs(ends[0]).max(), cases[0]


def said_as(case: Case) -> np.ndarray | None:
    """Where the table leads, in float64, a network that predicts one and the same picture, said as the case has it."""
    try:
        _, rows, numbers = exact_table(case)
    except InputError:  # noise at zero terminal SNR, and what no prediction type can do
        return None
    drawn = np.random.default_rng(0).standard_normal((len(rows) + 1, 3))
    state = np.zeros((7, 3))  # x, y, m0, m1, m2, m3, noise
    state[0] = drawn[-1] * rows[0].level[1]
    for row, n, noise in zip(rows, numbers, drawn, strict=False):
        u, alpha = row.c_in * state[0], row.c_in * row.level[0]  # u = alpha * picture + sigma * noise
        sigma = math.sqrt(1 - alpha**2)
        said = picture = np.tanh(u + math.sin(row.t / 300))
        if case.config["prediction_type"] == "epsilon":
            said = (u - alpha * picture) / sigma
        elif case.config["prediction_type"] == "v_prediction":
            said = (alpha * u - picture) / sigma
        state[3:6] = state[2:5]
        state[2], state[6] = n[1] * state[0] + n[2] * said, noise
        state[:2] = np.stack([n[3:10], [*n[10:16], 0.0]]) @ state
    return state[0]


@pytest.mark.parametrize("name", CLASSES)
def test_noise_of_batches_and_generators(name: str) -> None:
    """Batch 3 from one generator, and from a list of three; eta makes DDIM and TCD draw."""
    config = {**SD, **({"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPMSolver") else {})}
    check(Case(name, config, 4, eta=0.6, batch=3, generators=count) for count in (0, 3))


@pytest.mark.parametrize("name", CLASSES)
def test_image_to_image_and_inpainting(name: str) -> None:
    cases = []
    for strength, spaced in itertools.product((0.25, 0.6, 1.0), ("leading", "trailing", "linspace")):
        config = {**SD, "timestep_spacing": spaced}
        cases += [Case(name, config, 8, eta=0.3, strength=strength, picture=True, batch=2)]
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
    known, config = CLASSES[name], {}
    for key, values in OPTIONS.items():
        if key in known.keys:
            allowed = known.choices.get(key, values)
            config[key] = rng.choice([value for value in values if value in allowed] or [known.keys[key]])
    kinds = [key for key in known.keys if key.startswith("use_")]
    if kinds and (kind := rng.choice(["", *kinds])):
        config[kind] = True
    if name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        config |= {"sigma_min": rng.choice([None, 0.05]), "sigma_max": rng.choice([None, 12.0])}
    if config.get("algorithm_type") == "sde-dpmsolver":
        config["solver_order"] = min(config["solver_order"], 2)  # we refuse the third at once, diffusers on reaching it
    return Case(name, config, rng.randint(1, 50), eta=rng.choice([0.0, 0.0, 0.5, 1.0]))


@pytest.mark.parametrize("name", CLASSES)
def test_any_options(name: str) -> None:
    rng = random.Random(name)
    check(any_case(name, rng) for _ in range(8))


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_any_options_many(name: str) -> None:
    rng = random.Random(f"many {name}")
    check(any_case(name, rng) for _ in range(250))


def test_custom_timesteps_and_sigmas() -> None:
    given = [999, 839, 639, 299, 39]
    cases = [Case(name, SD, 5, custom={"timesteps": given}) for name in CLASSES if "timesteps" in CLASSES[name].custom]
    assert len(cases) == 7
    sigmas = [14.6, 6.3, 2.5, 0.9, 0.1, 0.0]
    check([*cases, Case("EulerDiscreteScheduler", SD, 5, custom={"sigmas": sigmas})])


def test_steps_of_a_table() -> None:
    """The user's steps, the start and the header, where samplers differ in them."""
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    euler, heun, plms = (make_table(config, 4, sampler=name) for name in ("euler", "heun", "plms"))
    assert (euler.steps, euler.index) == (4, (0, 1, 2, 3))
    assert (heun.steps, heun.index) == (4, (0, 0, 1, 1, 2, 2, 3))
    assert (plms.steps, plms.index, plms.depth, plms.anchored) == (4, (0, 0, 1, 2, 3), 3, True)
    assert make_table(config, 8, sampler="plms").depth == 4
    assert (euler.depth, euler.anchored, make_table(config, 9, sampler="unipc").depth) == (1, False, 3)
    assert make_table(config, 4, sampler="ddim").init_noise_sigma == 1.0
    assert make_table(config, 10, strength=0.35).steps == 3
    assert euler.rows.dtype == euler.timesteps.dtype == np.float32
    assert not any(make_table(config, 4, sampler="ddim").draws)
    assert all(make_table(config, 4, sampler="ddim", eta=0.1).draws)
    assert [make_table(config, 4, sampler=name).float32_noise for name in ("euler a", "dpm++ 2m sde")] == [False, True]


def test_columns_are_the_kernels() -> None:
    assert step_kernel.COLUMNS == COLUMNS


def test_no_torch() -> None:
    code = "import sys; import fastldm.samplers.table; assert not {'torch', 'scipy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde_gpu", "dpm++ 2m sde"),
        ("sample_dpmpp_2m", "dpm++ 2m"),
        ("dpm++ 3m sde exponential", "dpm++ 3m sde exponential"),
        ("Euler a", "euler a"),
        ("k_euler_ancestral", "euler a"),
        ("DPM2 a Karras", "dpm2 a karras"),
        ("dpm_2_ancestral", "dpm2 a"),
        ("uni_pc_bh2", "unipc"),
        ("UniPC", "unipc"),
        ("PNDM", "plms"),
        ("K_LMS", "lms"),
        ("DDIM", "ddim"),
        ("heun beta", "heun beta"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("kdpm2discrete", "KDPM2DiscreteScheduler"),
    ],
)
def test_names(name: str, meant: str) -> None:
    assert resolve_sampler(name).name == meant


def test_every_name_makes_a_table() -> None:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    for name in SAMPLERS:
        assert make_table(config, 6, sampler=name).sampler == name
        assert make_table(config, 6, sampler=SAMPLERS[name].class_name).steps == 6
    assert make_table(config, 6, sampler="dpm++ 2m sde karras").sampler == "dpm++ 2m sde karras"
    with pytest.raises(
        InputError, match=r"unknown sampler 'oiler a'. Did you mean 'euler a'\? There are: ddpm, ddim, "
    ):
        resolve_sampler("oiler a")
    with pytest.raises(InputError, match="EulerAncestralDiscreteScheduler takes no karras sigmas"):
        resolve_sampler("euler a karras")


@pytest.mark.parametrize("sampler", ["dpm++ 2m", "unipc", "lcm", "deis", "heun karras"])
def test_another_sampler_on_a_checkpoints_schedule(sampler: str) -> None:
    """As diffusers' `from_config`: keys of the file stay, keys that it lacks get the new class's defaults."""
    file = {
        "_class_name": "PNDMScheduler",
        **SD,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction",
    }
    chosen = resolve_sampler(sampler)
    plain = {key: value for key, value in file.items() if key not in ("_class_name", "skip_prk_steps")}
    case = Case(chosen.class_name, {**plain, **chosen.options}, 6)
    table = make_table(read_config(file), 6, sampler=sampler)
    np.testing.assert_array_equal(table.rows, case.table().rows)
    check([case])


# ---- what is refused ----

BAD_CONFIGS = [
    ({"_class_name": "DPMSolverSDEScheduler"}, "_class_name 'DPMSolverSDEScheduler' is not supported; these are: DDPM"),
    ({}, "_class_name None is not supported"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True is not supported: dynamic"),
    ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one kind"),
    ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of epsilon, v_"),
    ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type='learned_range' is none of"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range"},
        "variance_type='learned_range' is not supported: the U-Net would have to predict it",
    ),
    ({"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}, "beta_schedule='cosine' is none of linear, scaled_"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "log"}, "timestep_spacing='log' is none of"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        "needs final_sigmas_type 'sigma_min'",
    ),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_order": 3,
        },
        "has no third order",
    ),
    (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "use_flow_sigmas=True is not supported: flow",
    ),
    ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order=4 is none of 1, 2, 3"),
]


@pytest.mark.parametrize(("given", "message"), BAD_CONFIGS)
def test_bad_configurations(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(given)


BAD_CALLS = [
    ("ddim", {"num_inference_steps": 0}, "whole number from 1 to 1000, got 0"),
    ("ddim", {"num_inference_steps": 2.5}, "whole number from 1 to 1000, got 2.5"),
    ("ddim", {"num_inference_steps": 1001}, "whole number from 1 to 1000, got 1001"),
    ("ddim", {"strength": 0.05}, "strength 0.05 leaves none of 10 steps: take 20 steps"),
    ("ddim", {"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
    ("ddim", {"eta": -1.0}, "eta must be from 0 to 1, got -1.0"),
    ("ddim", {"timesteps": [999, 500]}, "DDIMScheduler takes no timesteps, here as in diffusers; these do: DDPM"),
    ("heun", {"sigmas": [1.0, 0.0]}, "takes no sigmas, here as in diffusers; these do: EulerDiscreteScheduler"),
    ("heun karras", {"timesteps": [999, 500]}, "timesteps cannot be given together with karras sigmas"),
    ("euler", {"timesteps": [500, 999]}, "timesteps must be descending"),
    ("euler", {"timesteps": []}, "timesteps must be descending and not empty"),
    ("euler", {"timesteps": [999, 500], "sigmas": [1.0, 0.0]}, "not both"),
    ("euler", {"timesteps": [1000, 500]}, "leave the trained timesteps, 0 to 999"),
    ("lcm", {"num_inference_steps": 51}, "more than the 50 of distillation"),
]


@pytest.mark.parametrize(("sampler", "arguments", "message"), BAD_CALLS)
def test_bad_calls(sampler: str, arguments: dict[str, Any], message: str) -> None:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    with pytest.raises(InputError, match=message):
        make_table(config, **{"num_inference_steps": 10, "sampler": sampler, **arguments})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm", "tcd"])
def test_epsilon_at_zero_snr(sampler: str) -> None:
    """diffusers divides by zero here."""
    given = {"_class_name": "DDIMScheduler", **SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="epsilon prediction cannot start at zero terminal SNR"):
        make_table(read_config(given), 4, sampler=sampler)
    make_table(replace(read_config(given), prediction_type="v_prediction"), 4)


def test_what_pipelines_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastldm"):
        config = read_config({"_class_name": "DDIMScheduler"})
        read_config({"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1})
    assert [r.message for r in caplog.records] == [
        "scheduler: clip_sample is off, steps_offset is 1, as in diffusers' latent pipelines"
    ]
    assert config.steps_offset == 1


def test_all_of_diffusers_classes_are_known() -> None:
    """Those that diffusers says can be exchanged for one another, but for two."""
    missing = {e.name for e in diffusers_schedulers.KarrasDiffusionSchedulers} - set(CLASSES)
    assert missing == {"DPMSolverSDEScheduler", "EDMEulerScheduler"}  # Brownian tree noise; another family
