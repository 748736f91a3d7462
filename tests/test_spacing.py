"""The training schedule and the steps on it: what betas, timesteps, noise levels and strengths are taken, and how."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from named import EXCHANGEABLE, FORWARD
from scheduler_judge import judge
from scheduler_runs import SD, Case, nearest_roots

from fastldm.errors import InputError
from fastldm.samplers import spacing
from fastldm.samplers.classes import DIFFUSERS
from fastldm.samplers.names import SAMPLERS, for_xl, schedules_of
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DDIM = read_config({"_class_name": "DDIMScheduler", **SD})


# ---- the training schedule ----


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_schedule(beta_schedule: str, zero_snr: bool) -> None:
    file = {**SD, "beta_schedule": beta_schedule, "num_train_timesteps": 700, "rescale_betas_zero_snr": zero_snr}
    with nearest_roots():
        expected = diffusers.DDIMScheduler.from_config(file).alphas_cumprod.numpy()
    got = spacing.alphas_cumprod(read_config({"_class_name": "DDIMScheduler", **file}))
    np.testing.assert_array_equal(got, expected)


def test_trained_betas() -> None:
    betas = np.linspace(0.001, 0.015, 100).tolist()
    assert judge(Case("DDIMScheduler", {"trained_betas": betas, "num_train_timesteps": 100}, 10)).kind == "agree"
    with pytest.raises(InputError, match="100 trained_betas for num_train_timesteps 1000"):
        read_config({"_class_name": "DDIMScheduler", "trained_betas": betas})


def test_beta_quantiles_are_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 101)
    np.testing.assert_allclose(spacing.beta_quantile(p), scipy_stats.beta.ppf(p, 0.6, 0.6), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, tuple])
def test_trained_betas_of_any_kind(kind: Any) -> None:
    betas = np.linspace(0.001, 0.015, 100).tolist()
    scaled_linear, trained = (
        read_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "trained_betas": values})
        for values in (betas, kind(betas))
    )
    np.testing.assert_allclose(spacing.alphas_cumprod(trained), spacing.alphas_cumprod(scaled_linear), rtol=1e-6)


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_betas_that_end_in_noise_are_zero_snr(name: str) -> None:
    """However the last alpha came to be 0."""
    rescaled = diffusers.DDIMScheduler.from_config({**SD, "rescale_betas_zero_snr": True}).betas.numpy()
    common = {"_class_name": name, **SD, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    tables = [
        make_table(read_config({**common, **options}), 5)
        for options in ({"rescale_betas_zero_snr": True}, {"trained_betas": rescaled})
    ]
    np.testing.assert_allclose(tables[1].rows, tables[0].rows, rtol=1e-3, atol=1e-3)
    assert np.isfinite(tables[1].rows).all()


BETAS = [
    ({"trained_betas": [0.1, 1.0, 0.1]}, "betas leave 0 of the image at timestep 1 of 3"),
    ({"trained_betas": [0.1, 2.5, 0.1]}, "betas leave -1.35 of the image at timestep 1 of 3"),
    ({"trained_betas": [-0.1, 0.1, 0.1]}, "betas leave 1.1 of the image at timestep 0 of 3"),
    ({"trained_betas": [0.1, math.nan, 0.1]}, "betas leave nan of the image at timestep 1 of 3"),
    ({"trained_betas": [0.1, 0.1, 0.1], "rescale_betas_zero_snr": True, "beta_start": 0}, None),
    ({"trained_betas": [0.0, 0.0, 0.0], "rescale_betas_zero_snr": True}, "betas leave nan of the image"),
    ({"trained_betas": []}, "0 trained_betas for num_train_timesteps 3"),
]


@pytest.mark.parametrize(("options", "message"), BETAS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_invalid_betas_are_refused(name: str, options: dict[str, Any], message: str | None) -> None:
    config = {"_class_name": name, "num_train_timesteps": 3, **options}
    if message is None:
        read_config(config)
        return
    with pytest.raises(InputError, match=message):
        read_config(config)


@pytest.mark.parametrize("sampler", FORWARD)
def test_betas_that_begin_with_zero(sampler: str) -> None:
    """A picture without noise at timestep 0: a step that has to divide by that noise says so."""
    for spaced, steps in itertools.product(("leading", "linspace", "trailing"), (1, 2, 5)):
        file = {"_class_name": "DDIMScheduler", **SD, "beta_start": 0.0, "timestep_spacing": spaced}
        config = read_config(file)
        try:
            table = make_table(config, steps, sampler=sampler)
        except InputError as refused:
            reason = str(refused)
            assert re.search("has no finite steps|to itself|of distillation|leave the trained|UniPC ends", reason), (
                reason
            )
        else:
            assert np.isfinite(table.rows).all()


# ---- schedules of other programs ----


def plain_schedule(name: str, n: int, sigmas: np.ndarray) -> list[float]:
    """By the sentences that describe them. sigmas: of the training schedule, ascending."""

    def at(t: float) -> float:
        low = min(int(t), len(sigmas) - 2)
        return float(sigmas[low] ** (1 - (t - low)) * sigmas[low + 1] ** (t - low))

    last = len(sigmas) - 1
    if name == "simple":  # every 1 / n of the way down, rounded towards the noisier one
        return [float(sigmas[last - int(k * len(sigmas) / n)]) for k in range(n)]
    if name == "ddim uniform":  # from the second on, in strides of T / n
        return [float(sigma) for sigma in sigmas[1 :: len(sigmas) // n]][::-1]
    if name == "kl optimal":
        high, low = math.atan(sigmas[-1]), math.atan(sigmas[0])
        return [math.tan(high + (low - high) * k / (n - 1)) for k in range(n)]
    steps = n if name == "sgm uniform" else n - 1  # "normal" has its last step at the end
    return [at(last * (1 - k / steps)) for k in range(n)]


@pytest.mark.parametrize("schedule", ["normal", "simple", "sgm uniform", "ddim uniform", "kl optimal"])
def test_schedules_of_other_programs(schedule: str) -> None:
    """As their sentences say, and as a caller's own sigmas; in strides that do not divide 1000 there is one more."""
    config = read_config({"_class_name": "DDIMScheduler", **SD, "timestep_spacing": "leading"})
    bar = spacing.alphas_cumprod(config).astype(np.float64)
    trained = np.sqrt((1 - bar) / bar)
    for n in (4, 7, 20, 30):
        expected = plain_schedule(schedule, n, trained)
        got = spacing.scheduled(schedule, n, trained)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        own = make_table(config, n, sampler="euler", sigmas=[*got, 0.0])
        table = make_table(config, n, sampler=f"euler {schedule.replace(' ', '_').upper()}")
        np.testing.assert_allclose(table.rows, own.rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(table.timesteps, own.timesteps, atol=1e-3)
        assert table.steps == n + (schedule == "ddim uniform" and 1000 % n != 0)
        assert table.sampler == f"euler {schedule}"


@pytest.mark.parametrize("model", ["", "XL"])
def test_aligned_steps_are_those_of_diffusers(model: str) -> None:
    """At ten steps the published ones; at others their logarithms are interpolated, between the same ends."""
    published = AysSchedules[f"StableDiffusion{model}Sigmas"]
    config = read_config({"_class_name": "EulerDiscreteScheduler", **SD})
    name = f"euler align your steps {model}".rstrip()
    table, own = make_table(config, 10, sampler=name), make_table(config, 10, sigmas=published)
    np.testing.assert_allclose(table.rows, own.rows, rtol=1e-6)
    assert np.abs(table.timesteps - AysSchedules[f"StableDiffusion{model}Timesteps"]).max() < 2
    twenty = make_table(config, 20, sampler=name)
    np.testing.assert_allclose(twenty.timesteps[::2], table.timesteps, atol=1e-3)
    assert for_xl("DPM++ 2M Align Your Steps") == "dpm++ 2m ays xl"
    assert for_xl("euler karras") == "euler karras"


@pytest.mark.parametrize("sampler", FORWARD)
def test_every_schedule_of_a_sampler_makes_a_table(sampler: str) -> None:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    for schedule in schedules_of(sampler):
        table = make_table(config, 5, sampler=f"{sampler} {schedule}", strength=0.8)
        assert table.sampler == f"{sampler} {schedule}"
        assert table.steps == 4
    if not schedules_of(sampler):
        with pytest.raises(InputError, match="takes no simple sigmas"):
            make_table(config, 5, sampler=f"{sampler} simple")


# ---- a caller's own ----


def test_custom_noise_levels_as_diffusers_has_them() -> None:
    """Its own `scheduler.sigmas`, whose last repeats where they end at sigma_min, too."""
    euler = diffusers.EulerDiscreteScheduler(**SD, final_sigmas_type="sigma_min")
    euler.set_timesteps(6)
    own = euler.sigmas.tolist()
    assert own[-1] == own[-2]
    for sigmas in (own, [14.6, 6.3, 6.3, 0.9, 0.1, 0.0]):
        assert judge(Case("EulerDiscreteScheduler", SD, 5, custom={"sigmas": sigmas})).kind == "agree"


@pytest.mark.parametrize("name", [name for name in EXCHANGEABLE if DIFFUSERS[name].custom])
@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_custom_timesteps_of_any_kind(name: str, kind: Any) -> None:
    config = read_config({"_class_name": name, **SD})
    expected = make_table(config, 1, timesteps=[999, 600, 250, 30], strength=0.5)
    got = make_table(config, 1, timesteps=kind([999, 600, 250, 30]), strength=0.5)
    np.testing.assert_array_equal(got.rows, expected.rows)
    assert got.steps == 2
    assert got.timesteps[0] == 250


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_custom_timesteps_and_noise_levels_are_cut(strength: float) -> None:
    """By the strength, as diffusers' pipelines cut them: all samplers that take them."""
    cases = [
        Case(name, SD, 5, custom={"timesteps": [999, 839, 639, 299, 39]}, strength=strength, image_to_image=True)
        for name in EXCHANGEABLE
        if "timesteps" in DIFFUSERS[name].custom
    ]
    sigmas = {"sigmas": [14.6, 6.3, 2.5, 0.9, 0.1, 0.0]}
    cases.append(Case("EulerDiscreteScheduler", SD, 5, custom=sigmas, strength=strength, image_to_image=True))
    for case in cases:
        verdict = judge(case)
        assert verdict.kind == "agree" or verdict.reasons == ("strength of the caller's timesteps",), verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [999, math.nan]}, "timesteps must be descending and not empty: finite numbers, got"),
        ({"timesteps": [[999, 1]]}, "timesteps must be descending"),
        ({"timesteps": "many"}, "timesteps must be numbers, got 'many'"),
        ({"timesteps": [3, object()]}, "timesteps must be numbers"),
        ({"timesteps": list(range(2000, 0, -1))}, "whole number from 1 to 1000, got 2000"),
        ({"timesteps": [500, 500]}, "timesteps must be descending"),
        ({"sigmas": [0.5]}, "two or more noise levels, from above 0, got"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must be descending"),
        ({"sigmas": [0.5, -0.1]}, "sigmas must be descending"),
        ({"sigmas": [math.inf, 0.5]}, "sigmas must be descending"),
        ({"sigmas": [0.0, 0.0]}, "sigmas must be descending"),
    ],
)
def test_bad_custom_steps(options: dict[str, Any], message: str) -> None:
    sampler = "euler" if "sigmas" in options else "ddpm"
    with pytest.raises(InputError, match=message):
        make_table(DDIM, 4, sampler=sampler, **options)


# ---- the strength ----


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (4, 0.8), (8, 0.3), (1, 0.02), (15, 0.3), (50, 1.0)])
def test_distilled_steps_lie_inside_the_strength(sampler: str, steps: int, strength: float) -> None:
    """All of them, at timesteps of distillation, as diffusers' schedulers lay them."""
    table = make_table(DDIM, steps, sampler=sampler, strength=strength)
    scheduler = getattr(diffusers, SAMPLERS[sampler].class_name)()
    scheduler.set_timesteps(steps, strength=strength)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert table.steps == steps


@pytest.mark.parametrize(
    ("sampler", "steps", "strength", "message"),
    [
        (
            "lcm",
            4,
            0.06,
            "4 steps are more than the 3 of distillation .original_inference_steps 50. that strength 0.06",
        ),
        ("tcd", 1, 0.01, "1 steps are more than the 0 of distillation"),
        ("euler", 1, 0.9, "leaves none of 1 steps: take 2 steps, or more strength"),
        ("euler", 1, 1 / 49, "leaves none of 1 steps: take 50 steps, or more strength"),  # 49 / 49 is below 1
        ("heun", 4, 5e-324, "leaves none of 4 steps: take more strength"),
        ("heun", 4, math.nan, "strength must be above 0 and at most 1, got nan"),
    ],
)
def test_a_strength_that_leaves_nothing(sampler: str, steps: int, strength: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_table(DDIM, steps, sampler=sampler, strength=strength)


def test_a_strength_that_leaves_nothing_of_clipped_steps() -> None:
    """lambda_min_clipped takes the first steps away, and the strength may take the others."""
    file = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": 2.0,
        "timestep_spacing": "trailing",
    }
    config = read_config(file)
    assert make_table(config, 20).steps < 10
    with pytest.raises(InputError, match=r"strength 0\.2 leaves none of 20 steps: take more strength"):
        make_table(config, 20, strength=0.2)
    with pytest.raises(InputError, match="20 steps, trailing, leave the trained timesteps"):
        make_table(read_config({**file, "lambda_min_clipped": 99.0}), 20)


# ---- many steps ----


@pytest.mark.parametrize("sampler", FORWARD)
@pytest.mark.parametrize("spaced", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [999, 1000])
def test_as_many_steps_as_there_are(sampler: str, spaced: str, steps: int) -> None:
    """A table, or one line that says why there is none."""
    file = {"_class_name": "DDIMScheduler", **SD, "timestep_spacing": spaced}
    config, reason = read_config(file, steps_offset=0), None
    solver = sampler.startswith(("dpm++ 2m", "dpm++ 3m", "deis", "unipc", "sa solver")) and not sampler.endswith(
        "cfg++"
    )
    if sampler in ("lcm", "tcd"):
        reason = "more than the 50 of distillation"
    elif steps == 1000 and solver and spaced != "trailing":
        reason = "cannot step from timestep [0-9]+ to itself: take fewer than 1000 steps"
    if reason:
        with pytest.raises(InputError, match=reason):
            make_table(config, steps, sampler=sampler)
        return
    table = make_table(config, steps, sampler=sampler)
    assert np.isfinite(table.rows).all()
    assert table.steps == steps
