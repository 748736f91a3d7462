"""A sampler and a number of steps become a table: float32 numbers, one row for each call of the network.

    model input   u  = c_in * x
    history       m  = p * x + q * out                  the denoised latent or the noise, as the sampler likes
    next latent   x' = a * x + a1 * y + sum_k b_k * m_(i-k) + d * noise          k = 0..3, newest first
    next anchor   y' = e * x + e1 * y + sum_k f_k * m_(i-k)                      y: a second state tensor
    inpainting    x' = mask * x' + (1 - mask) * (r * init + s * noise0)          only where a mask is set

Prediction type, spacing, Karras / exponential / beta sigmas, zero terminal SNR and image-to-image strength only
change the numbers. How a sampler steps is in samplers.py, where it steps in spacing.py; here are the configuration,
the names people use, and the packing. All is computed in float64 and rounded once. None of the three files needs
anything but numpy.

Tables are those of diffusers' schedulers, but where diffusers leaves the schedule that it was asked for:

- Zero terminal SNR is kept by all classes; diffusers drops it in seven.
- DDIM and PLMS on linspace spacing end each step where the next begins; diffusers ends elsewhere.
- PLMS and LMS begin their history where a picture lets them begin; diffusers' goes on from steps that never ran.
- TCD lays a picture's steps inside the strength, like LCM and as its scheduler can; diffusers' pipelines cut them from
  the whole schedule. A caller's own `timesteps` are cut here too, so those of the whole schedule are the way to that.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from fastldm.errors import InputError
from fastldm.samplers import solvers as samplers
from fastldm.samplers.solvers import Array, Array32, Grid, Row
from fastldm.samplers.spacing import (
    Asked,
    Placed,
    alphas_cumprod,
    on_distilled_timesteps,
    on_lambdas,
    on_sigmas,
    on_timesteps,
)

log = logging.getLogger("fastldm")

COLUMNS = ("c_in", "p", "q", "a", "a1", "b0", "b1", "b2", "b3", "d", "e", "e1", "f0", "f1", "f2", "f3", "r", "s")


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: `rows[i]` holds the numbers of call i in the order of COLUMNS."""

    sampler: str
    timesteps: Array32  # (S,) what the network is told; some samplers have fractional ones
    rows: Array32  # (S, len(COLUMNS))
    draws: tuple[bool, ...]  # (S,) whether diffusers draws noise at this row, even where d is 0
    float32_noise: bool  # diffusers draws that noise in float32 whatever the model's dtype
    init_noise_sigma: float  # a start from noise alone: x = init_noise_sigma * noise
    start: tuple[float, float]  # a start from a picture: x = r * init + s * noise
    steps: int  # the user's steps that run; some samplers have more rows
    index: tuple[int, ...]  # (S,) the user's step, from 0, that each row belongs to

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def depth(self) -> int:
        """How much of the history the table reads, 1 to 4."""
        b, f = COLUMNS.index("b0"), COLUMNS.index("f0")
        read = (self.rows[:, b : b + 4] != 0).any(0) | (self.rows[:, f : f + 4] != 0).any(0)
        return 1 + max((k for k in range(4) if read[k]), default=0)

    @property
    def anchored(self) -> bool:
        """Whether the table reads the anchor."""
        return bool((self.rows[:, COLUMNS.index("a1")] != 0).any())


# ---- the configuration ----


@dataclass(frozen=True)
class ScheduleConfig:
    """A `scheduler_config.json` read for one scheduler class, with its defaults, without keys it does not know."""

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] = ()
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: str = "fixed_small"
    sigma_kind: str = ""  # a key of _KINDS
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    algorithm_type: str = ""
    solver_order: int = 2
    solver_type: str = ""
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    given: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], *, steps_offset: int | None = 1) -> ScheduleConfig:
        """Read a `scheduler_config.json`.

        `steps_offset` replaces the file's, since diffusers' Stable Diffusion pipelines run with 1 whatever it says;
        None keeps the file's.

        Raises InputError for a class without a sampler, and for what diffusers refuses or a table cannot hold.
        """
        name = given.get("_class_name")
        if name not in CLASSES:
            raise InputError(f"scheduler: _class_name {name!r} is not supported; these are: {', '.join(CLASSES)}.")
        fixes = []
        if given.get("clip_sample", CLASSES[name].keys.get("clip_sample", False)):
            fixes.append("clip_sample is off")
        if steps_offset is not None and given.get("steps_offset", 0) != steps_offset:
            given = {**given, "steps_offset": steps_offset}
            fixes.append(f"steps_offset is {steps_offset}")
        if name == "PNDMScheduler" and not given.get("skip_prk_steps", False):
            fixes.append("skip_prk_steps is on (PLMS)")
        if fixes:
            log.info("scheduler: %s, as in diffusers' latent pipelines", ", ".join(fixes))
        return _read(name, given)


def _read(name: str, given: Mapping[str, Any]) -> ScheduleConfig:
    known = CLASSES[name]
    values: dict[str, Any] = {**known.keys, **{key: value for key, value in given.items() if key in known.keys}}
    for key, choices in {**_CHOICES, **known.choices}.items():
        if key in values and values[key] in _FOREIGN.get(key, ()) and values[key] not in choices:
            values[key] = known.keys[key]
        if key in values and values[key] not in choices:
            raise InputError(f"{name}: {key}={values[key]!r} is none of {', '.join(map(str, choices))}.")
    for key, (allowed, why) in _REFUSED.items():
        if given.get(key) not in allowed:
            raise InputError(f"{name}: {key}={given[key]!r} is not supported: {why}.")
    kinds = [kind for kind, key in _KINDS.items() if values.get(key)]
    if len(kinds) > 1:
        raise InputError(f"{name}: only one kind of sigmas can be used, got {' and '.join(kinds)}.")
    values |= {"sigma_kind": "".join(kinds), "sigma_min": given.get("sigma_min"), "sigma_max": given.get("sigma_max")}
    for key in ("trained_betas", "disable_corrector"):  # lists, arrays of numpy or torch
        values[key] = () if values.get(key) is None else tuple(np.asarray(values[key]).tolist())
    betas, trained = len(values["trained_betas"]), values["num_train_timesteps"]
    if betas != trained and given.get("trained_betas") is not None:
        raise InputError(f"{name}: {betas} trained_betas for num_train_timesteps {trained}; they must be as many.")
    algorithm = values.get("algorithm_type", "++")
    if not algorithm.endswith("++") and values["final_sigmas_type"] == "zero":
        raise InputError(f"{name}: algorithm_type {algorithm!r} needs final_sigmas_type 'sigma_min', not 'zero'.")
    if algorithm == "sde-dpmsolver" and values["solver_order"] == 3:
        raise InputError(f"{name}: algorithm_type {algorithm!r} has no third order; set solver_order 2.")
    names = {f.name for f in fields(ScheduleConfig)} & set(values)
    config = ScheduleConfig(class_name=name, given=dict(given), **{key: values[key] for key in names})
    alphas_cumprod(config)  # bad betas are refused here
    return config


# ---- what diffusers' classes know ----


@dataclass(frozen=True)
class SchedulerClass:
    """A diffusers scheduler class: how it steps, where, and the keys of its configuration with their defaults."""

    run: Callable[[Grid], Iterator[Row]]
    place: Callable[[ScheduleConfig, Asked], Placed]
    keys: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # where they differ from _CHOICES
    custom: tuple[str, ...] = ()  # which of `timesteps` and `sigmas` a caller may give


_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_ANY = {**_BETAS, "prediction_type": "epsilon"}
_LEADING = {**_ANY, "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {**_ANY, "timestep_spacing": "linspace", "steps_offset": 0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KINDS = {key.split("_")[1]: key for key in (*_SIGMAS, "use_lu_lambdas")}  # "karras" and so on
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_TWO_STAGE = {**_LINSPACE, **_SIGMAS, **_SD_BETAS}
_LCM = {"set_alpha_to_one": True, "original_inference_steps": 50, "timestep_scaling": 10.0}
_DISTILLED = {**_ANY, **_SD_BETAS, **_LCM, "beta_schedule": "scaled_linear"}
_ORDER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_DPM = {**_ORDER, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_DPM_KEYS = {**_LINSPACE, **_SIGMAS, **_DPM, "use_lu_lambdas": False, "euler_at_final": False}
_SINGLE_KEYS = {**_ANY, **_SIGMAS, **_DPM, "lower_order_final": False}
_UNIPC = {**_ORDER, "solver_type": "bh2", "predict_x0": True, "disable_corrector": ()}
_DEIS = {**_ORDER, "solver_type": "logrho", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
_EULER = {**_LINSPACE, **_SIGMAS, "final_sigmas_type": "zero"}
_DDPM = {"variance_type": "fixed_small", "clip_sample": True}
_DDIM = {"set_alpha_to_one": True, "clip_sample": True}

_DEIS_ONLY = {"solver_type": ("logrho",), "algorithm_type": ("deis",), "final_sigmas_type": ("sigma_min",)}
_NO_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
_SINGLE = {"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")}
_MULTI = {"solver_type": ("midpoint", "heun"), "algorithm_type": (*_SINGLE["algorithm_type"], "sde-dpmsolver")}

_FREE = ("timesteps",)
CLASSES: dict[str, SchedulerClass] = {
    f"{name}Scheduler": known
    for name, known in {
        "DDPM": SchedulerClass(samplers.ddpm, on_timesteps, {**_LEADING, **_DDPM}, custom=_FREE),
        "DDIM": SchedulerClass(samplers.ddim, on_timesteps, {**_LEADING, **_DDIM}),
        "PNDM": SchedulerClass(samplers.plms, on_timesteps, {**_LEADING, "set_alpha_to_one": False}, _NO_SAMPLE),
        "LCM": SchedulerClass(samplers.lcm, on_distilled_timesteps, _DISTILLED, custom=_FREE),
        "TCD": SchedulerClass(samplers.tcd, on_distilled_timesteps, _DISTILLED, custom=_FREE),
        "EulerDiscrete": SchedulerClass(samplers.euler, on_sigmas, _EULER, custom=("timesteps", "sigmas")),
        "EulerAncestralDiscrete": SchedulerClass(samplers.euler_ancestral, on_sigmas, _LINSPACE, _NO_SAMPLE),
        "HeunDiscrete": SchedulerClass(samplers.heun, on_sigmas, _TWO_STAGE, custom=_FREE),
        "KDPM2Discrete": SchedulerClass(samplers.dpm2, on_sigmas, _TWO_STAGE, _NO_SAMPLE),
        "KDPM2AncestralDiscrete": SchedulerClass(samplers.dpm2_ancestral, on_sigmas, _TWO_STAGE, _NO_SAMPLE),
        "LMSDiscrete": SchedulerClass(samplers.lms, on_sigmas, {**_LINSPACE, **_SIGMAS}),
        "DPMSolverMultistep": SchedulerClass(samplers.dpm_multistep, on_lambdas, _DPM_KEYS, _MULTI, _FREE),
        "DPMSolverSinglestep": SchedulerClass(samplers.dpm_singlestep, on_lambdas, _SINGLE_KEYS, _SINGLE, _FREE),
        "DEISMultistep": SchedulerClass(samplers.deis, on_lambdas, {**_LINSPACE, **_SIGMAS, **_DEIS}, _DEIS_ONLY),
        "UniPCMultistep": SchedulerClass(
            samplers.unipc,
            on_lambdas,
            {**_LINSPACE, **_SIGMAS, **_UNIPC},
            {"solver_type": ("bh1", "bh2")},
        ),
    }.items()
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "solver_order": (1, 2, 3),
}
_FOREIGN: dict[str, tuple[Any, ...]] = {  # other classes' values, for which a class takes its own default
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
    "final_sigmas_type": ("zero",),
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # what changes a class's steps, whether it is a key of it or not
    "variance_type": ((None, *_CHOICES["variance_type"], "fixed_large_log"), "the U-Net would have to predict it"),
    "thresholding": ((None, False), "dynamic thresholding is not linear, and meant for pixels, not latents"),
    "use_flow_sigmas": ((None, False), "flow matching models are another family"),
    "use_dynamic_shifting": ((None, False), "flow matching models are another family"),
    "solver_p": ((None,), "a second scheduler as the predictor is no table"),
    "timestep_type": ((None, "discrete"), "continuous timesteps belong to EDM models"),
    "interpolation_type": ((None, "linear"), "only 'linear' is implemented"),
}


# ---- names people use ----


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: its scheduler class, and the options that the name settles. All others stay the
    checkpoint's.
    """

    name: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _dpm(name: str, kind: str, order: int, algorithm: str = "dpmsolver++") -> Sampler:
    return Sampler(name, f"DPMSolver{kind}Scheduler", {"solver_order": order, "algorithm_type": algorithm})


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", "DDPMScheduler"),
        Sampler("ddim", "DDIMScheduler"),
        Sampler("plms", "PNDMScheduler"),
        Sampler("euler", "EulerDiscreteScheduler"),
        Sampler("euler a", "EulerAncestralDiscreteScheduler"),
        Sampler("heun", "HeunDiscreteScheduler"),
        Sampler("dpm2", "KDPM2DiscreteScheduler"),
        Sampler("dpm2 a", "KDPM2AncestralDiscreteScheduler"),
        Sampler("lms", "LMSDiscreteScheduler"),
        _dpm("dpm++ 2m", "Multistep", 2),
        _dpm("dpm++ 2m sde", "Multistep", 2, "sde-dpmsolver++"),
        _dpm("dpm++ 3m", "Multistep", 3),
        _dpm("dpm++ 3m sde", "Multistep", 3, "sde-dpmsolver++"),
        _dpm("dpm++ 2s", "Singlestep", 2),
        _dpm("dpm++ 3s", "Singlestep", 3),
        Sampler("deis", "DEISMultistepScheduler", {"algorithm_type": "deis"}),
        Sampler("unipc", "UniPCMultistepScheduler"),
        Sampler("lcm", "LCMScheduler"),
        Sampler("tcd", "TCDScheduler"),
    )
}


def _plain(name: str) -> str:
    """A name without case, punctuation, and the beginnings and endings that other programs give it."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    return re.sub(r"^sample|scheduler$|gpu$", "", plain).replace("ancestral", "a")


_LOOKUP = {
    **{_plain(name): Sampler(name, name) for name in CLASSES},
    **{_plain(name): sampler for name, sampler in SAMPLERS.items()},
    "pndm": SAMPLERS["plms"],
    "unipcbh1": replace(SAMPLERS["unipc"], options={"solver_type": "bh1"}),
    "unipcbh2": replace(SAMPLERS["unipc"], options={"solver_type": "bh2"}),
}


def resolve_sampler(name: str) -> Sampler:
    """The sampler that a user means.

    fastldm's names, other programs' ("DPM++ 2M Karras", "k_euler_a", "dpmpp_2m_sde_gpu") and diffusers' class
    names, whatever the case, spaces and punctuation. "karras", "exponential" or "beta" at the end sets the sigmas;
    without, they stay the checkpoint's.

    Raises InputError for a name that there is not, and for sigmas that the sampler does not take.
    """
    plain = _plain(name)
    kind = next((kind for kind in ("karras", "exponential", "beta") if plain.endswith(kind)), "")
    base = plain.removesuffix(kind)
    found = _LOOKUP.get(base) or _LOOKUP.get(base.removeprefix("k"))
    if found is None:
        near = difflib.get_close_matches(base, _LOOKUP, 1, 0.5)
        hint = f" Did you mean {_LOOKUP[near[0]].name!r}?" if near else ""
        raise InputError(
            f"unknown sampler {name!r}.{hint} There are: {', '.join(SAMPLERS)}; diffusers' class names; and these with "
            "'karras', 'exponential' or 'beta' at the end where they take other sigmas."
        )
    if not kind:
        return found
    if _KINDS[kind] not in CLASSES[found.class_name].keys:
        raise InputError(f"sampler {name!r}: {found.class_name} takes no {kind} sigmas, here as in diffusers.")
    only = {key: other == kind for other, key in _KINDS.items()}
    return replace(found, name=f"{found.name} {kind}", options={**found.options, **only})


def _name(config: ScheduleConfig) -> str:
    """What a configuration is called: the last of SAMPLERS that it fits, or else its class."""
    fits = [config.class_name]
    for name, sampler in SAMPLERS.items():
        if sampler.class_name == config.class_name and all(getattr(config, k) == v for k, v in sampler.options.items()):
            fits.append(name)
    return f"{fits[-1]} {config.sigma_kind}".rstrip()


# ---- the table ----


def make_table(
    config: ScheduleConfig,
    num_inference_steps: int,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> StepTable:
    """The table of the configuration's sampler, or of another one on its schedule, as diffusers' `from_config`
    exchanges them.

    num_inference_steps: the user's steps. `timesteps`, or `sigmas` (one more than there are steps, the last of them the
        noise that stays), replace them where the scheduler class takes them, descending.
    sampler: a name for `resolve_sampler`.
    strength: in (0, 1], how much of the schedule a given picture goes through. The first steps are left out, as in
        diffusers' image-to-image `get_timesteps`; LCM and TCD lay all steps inside that share of the distilled ones.
    eta: from 0 to 1, the noise of DDIM and TCD; other samplers do not look at it.

    Raises InputError.
    """
    if sampler is not None:
        chosen = resolve_sampler(sampler)
        config = _read(chosen.class_name, {**config.given, **chosen.options})
    known, trained = CLASSES[config.class_name], config.num_train_timesteps
    custom = _custom(config, timesteps, sigmas)
    for name, values in custom.items():
        num_inference_steps = len(values) - (name == "sigmas")
    steps = num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= trained:
        raise InputError(f"num_inference_steps must be a whole number from 1 to {trained}, got {steps!r}.")
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}.")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}.")

    placed = known.place(config, Asked(int(steps), float(strength), **custom))
    times = placed["timesteps"]
    if times.size == 0 or times.min() < 0 or times.max() >= trained:
        raise InputError(f"{steps} steps, {config.timestep_spacing}, leave the trained timesteps, 0 to {trained - 1}.")
    if placed["begin"] >= len(times):  # lambda_min_clipped may leave less than `steps`
        enough = next((n for n in range(steps + 1, trained + 1) if int(n * strength) > 0), None)
        take = f"take {enough} steps, or more strength" if enough and len(times) == steps else "take more strength"
        raise InputError(f"strength {strength} leaves none of {steps} steps: {take}.")
    rows, numbers = _rows(known, Grid(config, steps=len(times), eta=eta, **placed))
    highest = float(placed["sigmas"].max()) if known.place is on_sigmas else 1.0
    if known.place is on_sigmas and config.timestep_spacing == "leading":
        highest = math.hypot(highest, 1)
    return StepTable(
        sampler=_name(config),
        timesteps=np.array([row.t for row in rows], np.float32),
        rows=numbers.astype(np.float32),
        draws=tuple(row.draws for row in rows),
        float32_noise=known.run is samplers.dpm_multistep,
        init_noise_sigma=highest,
        start=rows[0].level,
        steps=rows[-1].step + 1,
        index=tuple(row.step for row in rows),
    )


def _rows(known: SchedulerClass, grid: Grid) -> tuple[list[Row], Array]:
    """All rows, in symbols and packed. InputError for a schedule on which a step is not finite."""
    numbers, times = np.full(1, np.nan), grid.timesteps
    try:
        with np.errstate(all="ignore"):
            rows = list(known.run(grid))
            numbers = _pack(rows)
            finite = bool(np.isfinite(numbers.astype(np.float32)).all())
    except InputError:
        raise
    except (ArithmeticError, ValueError):  # Python's numbers raise where numpy's become infinite
        finite = False
    if finite:
        return rows, numbers
    twice = times[1:][times[1:] == times[:-1]]
    why = "has no finite steps with this configuration"
    if len(twice):
        why = f"cannot step from timestep {twice[0]:g} to itself: take fewer than {grid.steps} steps, or other spacing"
    raise InputError(f"{grid.config.class_name} {why}.")


def _pack(rows: Sequence[Row]) -> Array:
    """The numbers of all rows, (S, len(COLUMNS)), in float64.

    Where a mask is set, the picture comes back at the noise of the row that follows, and clean at the end.
    """
    blends = [*(row.level for row in rows[1:]), (1.0, 0.0)]
    return np.array([(row.c_in, *row.m, *row.x, *row.y[:6], *rs) for row, rs in zip(rows, blends, strict=True)])


def _custom(
    config: ScheduleConfig, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> dict[str, Array]:
    """The caller's own timesteps or sigmas, checked."""
    given = {name: values for name, values in (("timesteps", timesteps), ("sigmas", sigmas)) if values is not None}
    if len(given) > 1:
        raise InputError("give timesteps or sigmas, not both.")
    custom: dict[str, Array] = {}
    for name, values in given.items():
        takers = [key for key, known in CLASSES.items() if name in known.custom]
        if config.class_name not in takers:
            these = ", ".join(takers)
            raise InputError(f"{config.class_name} takes no {name}, here as in diffusers; these do: {these}.")
        if config.sigma_kind and name == "timesteps":
            raise InputError(f"timesteps cannot be given together with {config.sigma_kind} sigmas.")
        try:
            numbers = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be numbers, got {reprlib.repr(values)}.") from None
        good = numbers.ndim == 1 and len(numbers) > (name == "sigmas") and bool(np.isfinite(numbers).all())
        if good:
            # Noise levels may repeat, as the last does in diffusers' own `sigmas` where they end at sigma_min.
            repeats = CLASSES[config.class_name].place in (on_sigmas, on_lambdas)
            falls = bool((np.diff(numbers) <= 0).all() if repeats else (np.diff(numbers) < 0).all())
            good = falls and (name == "timesteps" or numbers[0] > 0 <= numbers[-1])
        if not good:
            what = "two or more noise levels, from above 0" if name == "sigmas" else "finite numbers"
            raise InputError(f"{name} must be descending and not empty: {what}, got {reprlib.repr(numbers.tolist())}.")
        custom[name] = numbers
    return custom
