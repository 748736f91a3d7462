"""Every scheduler configuration that diffusers' classes can have, against ours: what agrees, differs or is refused.

The arguments and their values are below, in ARGUMENTS; which a class has is read from its own signature. Each pair of
values of two arguments of a class occurs together in some configuration, and so does each with every number of steps,
start and strength. Values that ours does not support are tried one at a time.

    python tests/support/peer_schedulers.py        writes benchmarks/results/peer_schedulers.md
"""

from __future__ import annotations

import collections
import functools
import itertools
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from named import OWN_MODELS
from scheduler_judge import DIFFERENCES, REFUSALS, Verdict, judge
from scheduler_runs import SD, Case, arguments_of, fast_diffusers

from fastldm.samplers.classes import DIFFUSERS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/peer_schedulers.md"
KINDS = ("agree", "differ", "refused", "unknown", "crashed")
STEPS = (1, 2, 3, 5, 10, 25, 50)
MANY_STEPS = (999, 1000)


def half_noise(t: float) -> float:
    """SA-Solver's tau, of a timestep."""
    return 0.5 if t > 300 else 0.0


ARGUMENTS: dict[str, tuple[Any, ...]] = {  # of these a class takes those that its signature has
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "trained_betas": (None, np.linspace(0.0009, 0.013, 1000, dtype=np.float32)),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "steps_offset": (1, 0),
    "rescale_betas_zero_snr": (False, True),
    "set_alpha_to_one": (True, False),
    "clip_sample": (False, True),  # switched off, as diffusers' pipelines do
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "sigma_min": (None, 0.05),
    "sigma_max": (None, 12.0),
    "lambda_min_clipped": (-float("inf"), -5.1),
    "algorithm_type": (
        *("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        *("data_prediction", "noise_prediction"),
    ),
    "solver_order": (2, 1, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    "predict_x0": (True, False),
    "disable_corrector": ((), (0,), (1, 2)),
    "original_inference_steps": (50, 100),
    "timestep_scaling": (10.0, 7.0),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "predictor_order": (2, 1, 3),
    "corrector_order": (2, 1, 3, 4),
    "tau_func": (None, half_noise),
    "sigma_data": (0.5, 1.0),
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0, 3.0),
    "s_noise": (1.0, 0.7),
    "clip_denoised": (False, True),
}
_LEVELS: dict[str, tuple[Any, ...]] = {"sigma_min": (0.002, 0.05), "sigma_max": (80.0, 12.0)}
OWN_ARGUMENTS = {  # in place of those
    f"{name}Scheduler": _LEVELS for name in ("EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative")
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
EVERYWHERE = ("rescale_betas_zero_snr",)  # ours takes it in classes that drop it, too
RUNS: dict[str, tuple[Any, ...]] = {  # how a configuration is run
    "steps": STEPS,
    "start": ("noise", "picture 0.3", "picture 0.5", "picture 0.8", "mask 0.5", "mask 1.0"),
}
CHURN = ({}, {"s_churn": 3.0}, {"s_churn": 40.0, "s_tmin": 0.3, "s_tmax": 7.0, "s_noise": 1.02})
OWN_RUNS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDIMScheduler": {"eta": (0.0, 0.5, 1.0)},
    "TCDScheduler": {"eta": (0.0, 0.3, 1.0)},
    "EulerDiscreteScheduler": {"churn": CHURN},
    "EDMEulerScheduler": {"churn": CHURN, "steps": STEPS[1:]},
    "EDMDPMSolverMultistepScheduler": {"steps": STEPS[1:]},
    "CMStochasticIterativeScheduler": {"steps": STEPS[:6]},
    "UnCLIPScheduler": {"steps": STEPS[1:]},
    "DDIMInverseScheduler": {"start": ("noise",)},
    "DPMSolverMultistepInverseScheduler": {"start": ("noise",)},
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "thresholding": (True,),
    "use_flow_sigmas": (True,),
    "use_dynamic_shifting": (True,),
    "variance_type": ("learned", "fixed_large_log"),
    "beta_schedule": ("laplace", "sigmoid"),
    "algorithm_type": ("deis",),
    "solver_order": (4,),
    "predictor_order": (4,),
    "sigmas": (SIGMAS[:2],),
}
WITH_DEFAULTS = (  # where ours takes the class's default for another class's value, and diffusers raises
    ("SASolverScheduler", "algorithm_type"),
)
CUSTOM = {
    "timesteps": ([999, 839, 639, 299, 39], [999, 700, 700, 20], [750, 500], [999.5, 400.25, 3.75]),
    "sigmas": ([14.6, 6.3, 2.5, 0.9, 0.1, 0.0], [9.0, 1.0, 0.05, 0.05]),
}


def choices(name: str) -> dict[str, tuple[Any, ...]]:
    """The arguments of a class and of its runs, with the values that ours supports."""
    has = arguments_of(getattr(diffusers, name).__init__)
    arguments = {}
    for key, values in {**ARGUMENTS, **OWN_ARGUMENTS.get(name, {})}.items():
        if key == "variance_type" and key not in DIFFUSERS[name].keys:
            continue  # what does not use it
        if key in has or (key in EVERYWHERE and name not in OWN_MODELS):
            allowed = DIFFUSERS[name].choices.get(key)
            arguments[key] = values if allowed is None else tuple(v for v in values if v in allowed) or values[:1]
    sigmas = tuple(key for key in SIGMAS if key in has)
    return {**arguments, **({"sigmas": (None, *sigmas)} if sigmas else {}), **RUNS, **OWN_RUNS.get(name, {})}


def pairs(options: Mapping[str, tuple[Any, ...]], seed: str) -> Iterator[dict[str, Any]]:
    """Choices of a value each, until each pair of values of two arguments has occurred: the best of some at random."""
    rng, names = random.Random(seed), list(options)
    indices = {name: range(len(values)) for name, values in options.items()}
    uncovered = {
        (a, i, b, j) for a, b in itertools.combinations(names, 2) for i, j in itertools.product(indices[a], indices[b])
    }

    def covered(row: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & uncovered

    while uncovered:
        a, i, b, j = rng.choice(sorted(uncovered))
        tries = [{name: rng.choice(indices[name]) for name in names} | {a: i, b: j} for _ in range(12)]
        best = max(tries, key=lambda row: len(covered(row)))
        uncovered -= covered(best)
        yield {name: options[name][best[name]] for name in names}


def case_of(name: str, values: Mapping[str, Any]) -> Case:
    config = {**SD, **{key: value for key, value in values.items() if key in ARGUMENTS or key in UNSUPPORTED}}
    if name == "UnCLIPScheduler" and "beta_schedule" not in values:
        config["beta_schedule"] = "squaredcos_cap_v2"  # its only one
    sigmas = config.pop("sigmas", None)
    config |= dict.fromkeys((sigmas,) if isinstance(sigmas, str) else sigmas or (), True)
    if config.get("trained_betas") is None:
        config.pop("trained_betas", None)
    if config.get("algorithm_type") == "sde-dpmsolver" or (
        name.startswith("EDM") and config.get("algorithm_type") == "sde-dpmsolver++"
    ):
        config["solver_order"] = min(config["solver_order"], 2)  # diffusers raises on reaching the third
    if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver", "deis"):
        config["final_sigmas_type"] = "sigma_min"  # diffusers refuses "zero" with it
    steps = values.get("steps", 10)
    for key, custom in values.get("custom", {}).items():
        steps = len(custom) - (key == "sigmas")
    start, strength = ([*str(values.get("start", "noise")).split(), "1.0"])[:2]
    return Case(
        name,
        config,
        steps,
        eta=values.get("eta", 0.0),
        churn=values.get("churn", {}),
        strength=float(strength),
        image_to_image=start == "picture",
        mask=start == "mask",
        custom=values.get("custom", {}),
    )


@functools.cache
def cases(name: str) -> tuple[Case, ...]:
    """All of a class, in an order drawn once."""
    cases = [case_of(name, row) for row in pairs(choices(name), name)]
    own = choices(name)
    v = {"prediction_type": "v_prediction"} if "v_prediction" in own.get("prediction_type", ()) else {}
    for steps, spaced in itertools.product(MANY_STEPS, own.get("timestep_spacing", ("linspace",))):
        if name != "CMStochasticIterativeScheduler":  # of 40 levels
            cases.append(case_of(name, {"steps": steps, "timestep_spacing": spaced, **v}))
    has = arguments_of(getattr(diffusers, name).__init__)
    for key, values in UNSUPPORTED.items():
        if (key in has or (key == "sigmas" and SIGMAS[0] in has)) and (name, key) not in WITH_DEFAULTS:
            cases += [case_of(name, {key: value}) for value in values]
    for key, lists in CUSTOM.items():
        for values, start in itertools.product(lists, ("noise", "picture 0.6")):
            cases.append(case_of(name, {"custom": {key: values}, "start": start}))
    return tuple(random.Random(name).sample(cases, len(cases)))


def judged(cases: Iterable[Case]) -> list[tuple[Case, Verdict]]:
    with warnings.catch_warnings(), fast_diffusers():
        warnings.simplefilter("ignore")
        diffusers.logging.set_verbosity_error()
        return [(case, judge(case)) for case in cases]


def table(results: Mapping[str, list[tuple[Case, Verdict]]]) -> str:
    """The counts, by class and by reason, as Markdown."""
    counts = {name: collections.Counter(v.kind for _, v in judgements) for name, judgements in results.items()}
    reasons = collections.Counter(
        reason for judgements in results.values() for _, v in judgements for reason in v.reasons
    )
    total = collections.Counter[str]()
    for count in counts.values():
        total.update(count)
    lines = [
        "# diffusers' scheduler configurations against fastldm's",
        "",
        f"{total.total():,} configurations and runs of diffusers {diffusers.__version__}, whole trajectories with the",
        "same noise. `python tests/support/peer_schedulers.py` writes this. A relative error below 1e-4 in float32",
        "agrees. Where the two differ, diffusers was asked as the reason says, and then agrees.",
        "",
        "| class | " + " | ".join(KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]
    for name, count in [*counts.items(), ("all", total)]:
        lines.append(f"| {name} | " + " | ".join(str(count[kind]) for kind in KINDS) + " |")
    for title, rows in (("Differ", DIFFERENCES), ("Refused", REFUSALS)):
        lines += ["", f"## {title}", "", "| times | what | why |", "|---|---|---|"]
        lines += [f"| {reasons[row.name]} | {row.name} | {row.reason} |" for row in rows if reasons[row.name]]
    return "\n".join(lines) + "\n"


def main() -> None:
    np.set_printoptions(threshold=6)
    results = {}
    for name in DIFFUSERS:
        start = time.perf_counter()
        results[name] = judged(cases(name))
        count = collections.Counter(v.kind for _, v in results[name])
        print(f"{name}: {dict(count)}, {time.perf_counter() - start:.0f} s", flush=True)
        for _, verdict in results[name]:
            if verdict.kind in ("unknown", "crashed"):
                print("  ", verdict.kind, verdict.reasons[0][:1500])
    RESULTS.write_text(table(results))


if __name__ == "__main__":
    main()
