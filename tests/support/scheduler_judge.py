"""Samplers against diffusers' schedulers: full trajectories with the same noise, and where the two may differ.

A `Case` is a scheduler class, its configuration, and how it is run. `judge` compares the two. diffusers is run as its
pipelines run it; where ours gives another result, a row of DIFFERENCES must give the reason, and the options with which
diffusers agrees: it is run again with those. Where ours refuses, a row of REFUSALS must give the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scheduler_runs import (
    PARITY,
    Case,
    DiffusersOptions,
    diffusers_run,
    error,
    laid_out,
    our_exact_run,
    our_run,
)

from fastldm.errors import InputError
from fastldm.samplers import spacing
from fastldm.samplers.table import StepTable


@dataclass(frozen=True)
class Difference:
    """Where our result differs from diffusers': the reason, the cases, and the options with which diffusers agrees."""

    name: str
    reason: str
    applies: Callable[[Case, StepTable], bool]
    options: Mapping[str, Any]


def depends_on_rounding(case: Case) -> bool:
    """Whether torch's square roots, one unit in the last place off, change diffusers' timesteps by a whole one."""
    unchanged, nearest = (laid_out(case, DiffusersOptions(nearest=n)).timesteps.double() for n in (False, True))
    return len(unchanged) != len(nearest) or bool((unchanged - nearest).abs().max() >= 1)


def _zero_snr(case: Case) -> bool:
    return bool(case.config.get("rescale_betas_zero_snr", False))


RIGHT = (  # where diffusers' result is wrong: all that hold are asked for together
    Difference(
        "zero SNR kept",
        "diffusers drops rescale_betas_zero_snr where the class does not take it, and samples a zero terminal SNR "
        "model on another schedule. Ours rescales in every class, as diffusers' formula does.",
        lambda case, table: _zero_snr(case) and not case.takes("rescale_betas_zero_snr"),
        {"zero_snr": True},
    ),
    Difference(
        "next level on linspace",
        "diffusers' DDIM and PNDM step down by num_train_timesteps // steps, which on linspace is not where the next "
        "step begins. Ours steps there.",
        lambda case, table: (
            case.name in ("DDIMScheduler", "PNDMScheduler") and case.config.get("timestep_spacing") == "linspace"
        ),
        {"next_level": True},
    ),
    Difference(
        "history begins at the start",
        "Where a picture leaves out the first steps, diffusers' PNDM repeats a step that it has not come from, and LMS "
        "takes a polynomial through steps that never ran. Ours begin their history where they begin.",
        lambda case, table: case.name in ("PNDMScheduler", "LMSDiscreteScheduler") and case.started,
        {"history": True},
    ),
    Difference(
        "TCD inside the strength",
        "TCDScheduler lays its steps inside the strength, if told, as LCM's does; diffusers' pipelines tell LCM alone, "
        "and cut TCD's. Ours lays both inside.",
        lambda case, table: case.name == "TCDScheduler" and case.started and not case.custom,
        {"inside_strength": True},
    ),
    Difference(
        "strength of the caller's timesteps",
        "With a caller's timesteps diffusers takes the strength of all calls, of which Heun has two a step, and then "
        "cuts steps. Ours takes it of the steps.",
        lambda case, table: case.name == "HeunDiscreteScheduler" and case.started and bool(case.custom),
        {"own_steps": True},
    ),
)

NUMBERS = (  # where diffusers raises, gives NaN or loses precision: each is added to those before
    Difference(
        "float32 roots",
        "torch's float32 roots are not always the nearest float32. At zero terminal SNR, 1 - alphas_cumprod[0] "
        "magnifies it. Respaced sigmas begin at sigma_max, whose timestep is 999 but for rounding and then truncated: "
        "the last bit decides between 999 and 998. Judged with the nearest roots.",
        lambda case, table: _zero_snr(case) or depends_on_rounding(case),
        {"nearest": True},
    ),
    Difference(
        "first timestep twice",
        "A later timestep is rounded to the first one, and diffusers' text-to-image begins there. Its image-to-image, "
        "which says where to begin, does not.",
        lambda case, table: (table.timesteps == table.timesteps[0]).sum() > 1,
        {"begin": 0},
    ),
    Difference(
        "float32 cancels",
        "diffusers' float32 arithmetic cancels, or takes the root of a rounding error below 0. Judged in float64.",
        lambda case, table: True,
        {"exact": True},
    ),
    Difference(
        "eta 1 at zero SNR",
        "DDIM with eta 1 from zero terminal SNR: 1 - alphas_cumprod - eta^2 variance is 0 but for rounding, and where "
        "that is below 0, in float64 too, its root is NaN. Its limit is judged.",
        lambda case, table: case.name == "DDIMScheduler" and case.eta == 1 and _zero_snr(case),
        {"eta": 1 - 1e-12, "exact": True},
    ),
    Difference(
        "UniPC to sigma 0",
        "UniPC to sigma 0, with 'bh1' or predicting noise: diffusers multiplies 0 by infinity. Its limit is judged.",
        lambda case, table: (
            case.name == "UniPCMultistepScheduler"
            and case.config.get("final_sigmas_type") != "sigma_min"
            and (case.config.get("solver_type") == "bh1" or not case.config.get("predict_x0", True))
        ),
        {"last": 1e-10, "exact": True},
    ),
    Difference(
        "a last step of no length",
        "Respaced sigmas end at sigma_min already, and a last step of order 2 or 3 to sigma_min, of no length, divides "
        "0 by 0. Lu's may end a rounding of float32 below, and the SDE's noise is the root of a negative length. Its "
        "limit is judged.",
        lambda case, table: (
            (case.config.get("final_sigmas_type") == "sigma_min" or case.spacing_function is spacing.on_inverse_lambdas)
            and case.spacing_function in (spacing.on_lambdas, spacing.on_inverse_lambdas, spacing.on_preconditioned)
            and (
                any(key.startswith("use_") or key == "sigma_data" for key in case.config)
                or case.config.get("timestep_spacing") == "trailing"
            )
            and (
                case.config.get("lower_order_final") is False
                or case.steps >= 15
                or (
                    not {"use_lu_lambdas", "sigma_data"}.isdisjoint(case.config)
                    and case.config.get("algorithm_type", "").startswith("sde")
                )
            )
        ),
        {"last": 1 - 1e-12, "exact": True},
    ),
)
DIFFERENCES = (*RIGHT, *NUMBERS)


@dataclass(frozen=True)
class Refusal:
    """What ours refuses: what it says, and why; and whether diffusers gives a picture there."""

    name: str
    message: str
    reason: str
    diffusers_runs: bool = False


REFUSALS = (
    Refusal(
        "noise at zero SNR",
        "epsilon prediction cannot start at zero terminal SNR",
        "At zero terminal SNR the latent is noise alone, and what noise is in it says nothing of the picture: "
        "diffusers divides by 0, but for PNDM, where it drops rescale_betas_zero_snr.",
        diffusers_runs=True,
    ),
    Refusal(
        "outside of training",
        "leave the trained timesteps",
        "The network never saw such a timestep. Classes on sigmas run in diffusers, at the noise of the last timestep.",
        diffusers_runs=True,
    ),
    Refusal(
        "noise predicted to sigma 0",
        "needs final_sigmas_type 'sigma_min', not 'zero'",
        "The step to sigma 0 is infinitely long in lambda where noise is predicted; diffusers refuses it too.",
    ),
    Refusal(
        "UniPC to sigma 0 in a higher order",
        "UniPC ends at sigma 0 with lower_order_final only",
        "The step to sigma 0 is infinitely long in lambda, and only its first order has a limit.",
    ),
    Refusal(
        "more steps than distilled",
        "are more than the [0-9]+ of distillation",
        "A distilled model has no other timesteps. diffusers' pipelines cut TCD's from the whole schedule.",
        diffusers_runs=True,
    ),
    Refusal(
        "no step left",
        "leaves none of [0-9]+ steps",
        "The strength leaves no step. Some of diffusers' pipelines raise, others give the picture back.",
        diffusers_runs=True,
    ),
    Refusal(
        "steps that the class does not take",
        "takes no (timesteps|sigmas), here as in diffusers",
        "diffusers' set_timesteps has no such argument, or only for flow matching.",
    ),
    Refusal(
        "timesteps that do not descend",
        "timesteps must be descending",
        "diffusers refuses them where timesteps are whole ones of training.",
    ),
    Refusal(
        "dynamic thresholding",
        "thresholding=True is not supported",
        "Its history is not of denoised latents.",
        diffusers_runs=True,
    ),
    Refusal(
        "flow matching",
        "(use_flow_sigmas|use_dynamic_shifting)=True is not supported",
        "Models of flow matching are another family.",
        diffusers_runs=True,
    ),
    Refusal(
        "learned variance itself",
        "variance_type='learned' is n",
        "The network's output would be the variance, under a root; 'learned_range', which models use, is a logarithm.",
        diffusers_runs=True,
    ),
    Refusal(
        "variance as a logarithm",
        "variance_type='fixed_large_log' is none of",
        "diffusers takes the root of a negative number.",
    ),
    Refusal(
        "another beta schedule",
        "beta_schedule='(laplace|sigmoid)' is none of",
        "No latent model has it, and of diffusers' classes DDPM alone.",
        diffusers_runs=True,
    ),
    Refusal("a solver of order 4", "solver_order=4 is none of", "There are three orders.", diffusers_runs=True),
    Refusal(
        "a predictor of order 4",
        "predictor_order=4 is none of",
        "Its correction would need five outputs, and a table has four.",
        diffusers_runs=True,
    ),
    Refusal("two kinds of sigmas", "only one kind of sigmas", "diffusers refuses it too."),
    Refusal(
        "a timestep twice",
        "cannot step from timestep [0-9.]+ to itself",
        "Rounding gives two steps one timestep, and a solver of higher order divides by their distance.",
    ),
    Refusal(
        "a timestep twice, to noise",
        "gives two of [0-9]+ steps one timestep",
        "Rounding gives two steps one timestep; diffusers drops one, but not its noise level.",
        diffusers_runs=True,
    ),
    Refusal(
        "noise of an image without noise",
        "DDIMInverseScheduler has no finite steps",
        "The noise of what has none, from a network that predicts the image: diffusers divides 0 by 0.",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """agree, differ (for reasons named), refused (for one), unknown (what is wrong) or crashed (with what)."""

    kind: str
    reasons: tuple[str, ...] = ()


def judge(case: Case) -> Verdict:
    try:
        ours, our_generators = our_run(case)
    except InputError as refusal:
        return _judge_refusal(case, str(refusal))
    except Exception as crash:
        return Verdict("crashed", (f"{case}: {crash!r}",))
    table, complaint = case.table(), f"{case}:"
    right = [d for d in RIGHT if d.applies(case, table)]
    options, names = DiffusersOptions(), []
    for attempt in (None, right, *([d] for d in NUMBERS)):
        if attempt is not None:
            if not attempt or not all(d.applies(case, table) for d in attempt):
                continue
            for difference in attempt:
                options |= difference.options
            names += [d.name for d in attempt]
        try:
            theirs, their_generators = diffusers_run(case, options)
            off = error(ours, theirs)
        except Exception as raised:
            complaint += f" {names}: {raised!r};"
            continue
        same = all(
            torch.equal(a.get_state(), b.get_state())
            for a, b in zip(_listed(our_generators), _listed(their_generators), strict=True)
        )
        if not same and (names or not right):
            return Verdict("unknown", (f"{case}: as much noise was not drawn",))
        agrees = same and off < PARITY
        complaint += f" {names}: {off:.1e};"
        if not agrees and options.exact:  # float32 latents may hold neither result: then both in float64
            off = error(our_exact_run(case), theirs)
            agrees = same and off < PARITY / 10
            complaint += f" both in float64: {off:.1e};"
        if agrees:
            numbers = names[len(right) :][-1:]  # those before did not help
            return Verdict("differ", (*(d.name for d in right), *numbers)) if names else Verdict("agree")
    return Verdict("unknown", (complaint,))


def _judge_refusal(case: Case, message: str) -> Verdict:
    refusal = next((r for r in REFUSALS if re.search(r.message, message)), None)
    if refusal is None:
        return Verdict("unknown", (f"{case}: refused: {message}",))
    if not refusal.diffusers_runs:
        try:
            if diffusers_run(case)[0].isfinite().all():
                return Verdict("unknown", (f"{case}: diffusers runs what is refused: {message}",))
        except Exception:
            pass
    return Verdict("refused", (refusal.name,))


def _listed(generators: Any) -> list[torch.Generator]:
    return generators if isinstance(generators, list) else [generators]
