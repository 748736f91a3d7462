"""A sampler and a number of steps become a table: float32 numbers, one row for each call of the network.

    model input   u  = c_in * x
    history       m  = p * x + q * out                  the denoised latent or the noise, as the sampler likes
    next latent   x' = a * x + a1 * y + sum_k b_k * m_(i-k) + d * noise          k = 0..3, newest first
    next anchor   y' = e * x + e1 * y + sum_k f_k * m_(i-k)                      y: a second state tensor
    inpainting    x' = mask * x' + (1 - mask) * (r * init + s * noise0)          only where a mask is set

Prediction type, spacing, Karras / exponential / beta sigmas, zero terminal SNR and image-to-image strength only
change the numbers. How a sampler steps is in samplers.py; here are the configuration, where it steps, the names
people use, and the packing.

The training schedule `alphas_cumprod` is float32, as checkpoints and diffusers hold it. All
that follows is float64 and rounded once. Neither file needs anything but numpy.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fastldm import samplers
from fastldm.errors import InputError
from fastldm.samplers import Array, Array32, Grid, Row, sigma_to_t

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
    for key, (allowed, why) in _REFUSED.items():
        if given.get(key) not in allowed:
            raise InputError(f"{name}: {key}={given[key]!r} is not supported: {why}.")
    values: dict[str, Any] = {**known.keys, **{key: value for key, value in given.items() if key in known.keys}}
    for key, choices in {**_CHOICES, **known.choices}.items():
        if key in values and values[key] in _FOREIGN.get(key, ()) and values[key] not in choices:
            values[key] = known.keys[key]
        if key in values and values[key] not in choices:
            raise InputError(f"{name}: {key}={values[key]!r} is none of {', '.join(map(str, choices))}.")
    kinds = [kind for kind, key in _KINDS.items() if values.get(key)]
    if len(kinds) > 1:
        raise InputError(f"{name}: only one kind of sigmas can be used, got {' and '.join(kinds)}.")
    values |= {"sigma_kind": "".join(kinds), "sigma_min": given.get("sigma_min"), "sigma_max": given.get("sigma_max")}
    values |= {key: tuple(values.get(key) or ()) for key in ("trained_betas", "disable_corrector")}
    betas, trained = len(values["trained_betas"]), values["num_train_timesteps"]
    if betas not in (0, trained):
        raise InputError(f"{name}: {betas} trained_betas for num_train_timesteps {trained}; they must be as many.")
    algorithm = values.get("algorithm_type", "++")
    if not algorithm.endswith("++") and values["final_sigmas_type"] == "zero":
        raise InputError(f"{name}: algorithm_type {algorithm!r} needs final_sigmas_type 'sigma_min', not 'zero'.")
    if algorithm == "sde-dpmsolver" and values["solver_order"] == 3:
        raise InputError(f"{name}: algorithm_type {algorithm!r} has no third order; set solver_order 2.")
    names = {f.name for f in fields(ScheduleConfig)} & set(values)
    return ScheduleConfig(class_name=name, given=dict(given), **{key: values[key] for key in names})


# ---- the training schedule ----


def alphas_cumprod(config: ScheduleConfig) -> Array32:
    """The training schedule, (num_train_timesteps,) float32.

    Equal to diffusers' buffer to the bit, but for the last digits at zero terminal SNR, where torch's vectorised
    square root is not always the nearest float32.
    """
    steps, one = config.num_train_timesteps, np.float32(1)
    if config.trained_betas:
        betas = np.asarray(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        betas = _linspace32(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = _linspace32(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    else:  # squaredcos_cap_v2
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = np.array([min(1 - after / now, 0.999) for now, after in pairwise(bar)], np.float32)
    if config.rescale_betas_zero_snr:  # https://arxiv.org/abs/2305.08891, algorithm 1
        root = np.sqrt(_cumprod32(one - betas))
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = one - np.append(bar[:1], bar[1:] / bar[:-1])
    return _cumprod32(one - betas)


def _linspace32(start: float, end: float, steps: int) -> Array32:
    """torch.linspace: a float32 step and fused multiply-adds, counted from the nearer end."""
    first, last, i = np.float32(start), np.float32(end), np.arange(steps)
    step = float((last - first) / np.float32(max(steps - 1, 1)))
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _cumprod32(x: Array32) -> Array32:
    """torch.cumprod: on a CPU, float32 accumulates in float64."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


# ---- where samplers step ----

Placed = dict[str, Any]  # the arrays of a Grid


def _spaced(config: ScheduleConfig, n: int, last: int, extra: int = 0) -> Array:
    """n timesteps, descending from below `last`; `extra` more are laid out and left away at the low end."""
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, n + extra)[::-1][:n]
    if config.timestep_spacing == "leading":
        return np.arange(n + extra)[::-1][:n] * (last // (n + extra)) + float(config.steps_offset)
    return np.arange(last, 0, -config.num_train_timesteps / n).round()[:n] - 1.0


def _on_timesteps(config: ScheduleConfig, n: int, timesteps: Array | None, _: Array | None) -> Placed:
    bar = alphas_cumprod(config).astype(np.float64)
    timesteps = _spaced(config, n, len(bar)).round() if timesteps is None else np.trunc(timesteps)
    return {"alpha_bar": bar, "timesteps": timesteps}


def _on_plms_timesteps(config: ScheduleConfig, n: int, *_: Array | None) -> Placed:
    placed = _on_timesteps(config, n, None, None)
    t = placed["timesteps"]
    return {**placed, "timesteps": np.concatenate([t[:2], t[1:]])}  # the second one twice


def _on_distilled_timesteps(config: ScheduleConfig, n: int, timesteps: Array | None, _: Array | None) -> Placed:
    bar, trained = alphas_cumprod(config).astype(np.float64), config.original_inference_steps
    if timesteps is None:
        if n > trained:
            raise InputError(f"{n} steps are more than the {trained} of distillation (original_inference_steps).")
        origin = np.arange(trained, 0, -1) * (len(bar) // trained) - 1.0
        timesteps = origin[np.floor(np.linspace(0, trained, n, endpoint=False)).astype(int)]
    return {"alpha_bar": bar, "timesteps": np.trunc(timesteps)}


def _on_sigmas(config: ScheduleConfig, n: int, timesteps: Array | None, sigmas: Array | None) -> Placed:
    bar, trained, logs = _trained_sigmas(config)
    if sigmas is not None:
        return {"alpha_bar": bar, "timesteps": sigma_to_t(sigmas[:-1], logs), "sigmas": sigmas, "log_sigmas": logs}
    t: Array = (_spaced(config, n, len(bar)) if timesteps is None else timesteps).astype(np.float32).astype(np.float64)
    sigmas = np.interp(t, np.arange(len(bar)), trained)
    if config.sigma_kind:
        sigmas = _respaced(config, n, sigmas[0], sigmas[-1])
        t = sigma_to_t(sigmas, logs)
        t = t.round() if config.sigma_kind == "karras" and config.class_name.startswith("KDPM2") else t
    last = trained[0] if config.final_sigmas_type == "sigma_min" else 0.0
    return {"alpha_bar": bar, "timesteps": t, "sigmas": np.append(sigmas, last), "log_sigmas": logs}


def _on_lambdas(config: ScheduleConfig, n: int, timesteps: Array | None, _: Array | None) -> Placed:
    bar, trained, logs = _trained_sigmas(config)
    last = trained[0]
    if config.sigma_kind:
        sigmas = _respaced(config, n, trained[-1], trained[0])
        if config.sigma_kind == "lu":  # https://arxiv.org/abs/2206.00927, uniform in lambda
            # Python's floats: between float32 ends numpy steps in float32.
            sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), n))
        t = sigma_to_t(sigmas, logs)
        cosine = config.beta_schedule == "squaredcos_cap_v2" and config.class_name == "DPMSolverMultistepScheduler"
        t = t.round() if config.sigma_kind in ("karras", "lu") and not cosine else t
        last = sigmas[-1] if config.class_name in ("DEISMultistepScheduler", "UniPCMultistepScheduler") else last
    else:
        below = len(bar) - int(np.searchsorted(-logs[::-1], config.lambda_min_clipped))
        t = _spaced(config, n, below, extra=1).round() if timesteps is None else timesteps
        sigmas = np.interp(np.trunc(t), np.arange(len(bar)), trained)
    last = 0.0 if config.final_sigmas_type == "zero" else last
    return {"alpha_bar": bar, "timesteps": np.trunc(t), "sigmas": np.append(sigmas, last), "log_sigmas": logs}


def _trained_sigmas(config: ScheduleConfig) -> tuple[Array, Array, Array32]:
    """alphas_cumprod, the ratio of noise to signal, and its float32 logarithm, on which rounded timesteps hang."""
    bar = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        bar[-1] = 2**-24  # diffusers' stand-in for 0
    sigmas = np.sqrt((1 - bar) / bar)
    return bar.astype(np.float64), sigmas.astype(np.float64), np.log(sigmas)


def _respaced(config: ScheduleConfig, n: int, high: float, low: float) -> Array:
    """n sigmas from high to low, spaced as `config.sigma_kind` says."""
    high = high if config.sigma_max is None else config.sigma_max
    low = low if config.sigma_min is None else config.sigma_min
    ramp = np.linspace(0, 1, n)
    if config.sigma_kind == "karras":  # https://arxiv.org/abs/2206.00364, equation 5 with rho = 7
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if config.sigma_kind == "beta":  # https://arxiv.org/abs/2407.12173
        return low + beta_quantile(1 - ramp) * (high - low)
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta_quantile(probability: Array, shape: float = 0.6) -> Array:
    """Quantiles of the Beta(shape, shape) distribution, as scipy.stats.beta.ppf has them.

    Newton's method on the regularized incomplete beta function, by its power series, on the lower half, where that
    converges fast.
    """
    lower = np.minimum(probability, 1 - probability)
    k = np.arange(64)
    series = np.cumprod(np.append(1.0, (k[1:] - shape) / k[1:])) / (shape + k)
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = np.minimum((lower * shape * total) ** (1 / shape), 0.5)
    for _ in range(8):
        inside = np.where(x > 0, x, 0.5)
        excess = inside**shape * (inside[:, None] ** k @ series) / total - lower
        x = np.where(x > 0, np.clip(inside - excess * total / (inside * (1 - inside)) ** (shape - 1), 0, 0.5), 0)
    return np.where(probability > 0.5, 1 - x, x)


# ---- what diffusers' classes know ----


@dataclass(frozen=True)
class SchedulerClass:
    """A diffusers scheduler class: how it steps, where, and the keys of its configuration with their defaults."""

    run: Callable[[Grid], Iterator[Row]]
    place: Callable[[ScheduleConfig, int, Array | None, Array | None], Placed]
    keys: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # where they differ from _CHOICES
    custom: tuple[str, ...] = ()  # which of `timesteps` and `sigmas` a caller may give


_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
_ANY = {**_BETAS, "prediction_type": "epsilon"}
_LEADING = {**_ANY, "timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {**_ANY, "timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KINDS = {key.split("_")[1]: key for key in (*_SIGMAS, "use_lu_lambdas")}  # "karras" and so on
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_TWO_STAGE = {**_LINSPACE, **_SIGMAS, **_SD_BETAS}
_LCM = {"set_alpha_to_one": True, "original_inference_steps": 50, "timestep_scaling": 10.0}
_DISTILLED = {**_ANY, **_ZERO_SNR, **_SD_BETAS, **_LCM, "beta_schedule": "scaled_linear"}
_ORDER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_DPM = {**_ORDER, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_DPM_KEYS = {**_LINSPACE, **_ZERO_SNR, **_SIGMAS, **_DPM, "use_lu_lambdas": False, "euler_at_final": False}
_SINGLE_KEYS = {**_ANY, **_SIGMAS, **_DPM, "lower_order_final": False}
_UNIPC = {**_ORDER, "solver_type": "bh2", "predict_x0": True, "disable_corrector": ()}
_DEIS = {**_ORDER, "solver_type": "logrho", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
_EULER = {**_LINSPACE, **_ZERO_SNR, **_SIGMAS, "final_sigmas_type": "zero"}
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
        "DDPM": SchedulerClass(samplers.ddpm, _on_timesteps, {**_LEADING, **_ZERO_SNR, **_DDPM}, custom=_FREE),
        "DDIM": SchedulerClass(samplers.ddim, _on_timesteps, {**_LEADING, **_ZERO_SNR, **_DDIM}),
        "PNDM": SchedulerClass(samplers.plms, _on_plms_timesteps, {**_LEADING, "set_alpha_to_one": False}, _NO_SAMPLE),
        "LCM": SchedulerClass(samplers.lcm, _on_distilled_timesteps, _DISTILLED, custom=_FREE),
        "TCD": SchedulerClass(samplers.tcd, _on_distilled_timesteps, _DISTILLED, custom=_FREE),
        "EulerDiscrete": SchedulerClass(samplers.euler, _on_sigmas, _EULER, custom=("timesteps", "sigmas")),
        "EulerAncestralDiscrete": SchedulerClass(
            samplers.euler_ancestral, _on_sigmas, {**_LINSPACE, **_ZERO_SNR}, _NO_SAMPLE
        ),
        "HeunDiscrete": SchedulerClass(samplers.heun, _on_sigmas, _TWO_STAGE, custom=_FREE),
        "KDPM2Discrete": SchedulerClass(samplers.dpm2, _on_sigmas, _TWO_STAGE, _NO_SAMPLE),
        "KDPM2AncestralDiscrete": SchedulerClass(samplers.dpm2_ancestral, _on_sigmas, _TWO_STAGE, _NO_SAMPLE),
        "LMSDiscrete": SchedulerClass(samplers.lms, _on_sigmas, {**_LINSPACE, **_SIGMAS}),
        "DPMSolverMultistep": SchedulerClass(samplers.dpm_multistep, _on_lambdas, _DPM_KEYS, _MULTI, _FREE),
        "DPMSolverSinglestep": SchedulerClass(samplers.dpm_singlestep, _on_lambdas, _SINGLE_KEYS, _SINGLE, _FREE),
        "DEISMultistep": SchedulerClass(samplers.deis, _on_lambdas, {**_LINSPACE, **_SIGMAS, **_DEIS}, _DEIS_ONLY),
        "UniPCMultistep": SchedulerClass(
            samplers.unipc,
            _on_lambdas,
            {**_LINSPACE, **_ZERO_SNR, **_SIGMAS, **_UNIPC},
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
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
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

    num_inference_steps: the user's steps. `timesteps`, or `sigmas` (one more than there are steps, 0 at the end),
    replace them where the
        scheduler class takes them, descending.
    sampler: a name for `resolve_sampler`.
    strength: in (0, 1], how much of the schedule a given picture goes through; the first steps are left out, as in
    diffusers'
        image-to-image `get_timesteps`.
    eta: from 0 to 1, the noise of DDIM and TCD; other samplers do not look at it.

    Raises InputError.
    """
    if sampler is not None:
        chosen = resolve_sampler(sampler)
        config = _read(chosen.class_name, {**config.given, **chosen.options})
    known = CLASSES[config.class_name]
    custom = _custom(config, timesteps, sigmas)
    if custom:
        num_inference_steps = len(timesteps) if timesteps is not None else len(sigmas or ()) - 1
    steps, trained = num_inference_steps, config.num_train_timesteps
    if not isinstance(steps, int) or not 1 <= steps <= trained:
        raise InputError(f"num_inference_steps must be a whole number from 1 to {trained}, got {steps!r}.")
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}.")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}.")
    begin = steps - min(int(steps * strength), steps)
    if begin == steps:
        enough = math.ceil(1 / strength)
        raise InputError(f"strength {strength} leaves none of {steps} steps: take {enough} steps, or more strength.")

    placed = known.place(config, steps, custom.get("timesteps"), custom.get("sigmas"))
    if placed["timesteps"].min() < 0 or placed["timesteps"].max() >= trained:
        raise InputError(f"{steps} steps, {config.timestep_spacing}, leave the trained timesteps, 0 to {trained - 1}.")
    if "sigmas" in placed:
        steps = len(placed["sigmas"]) - 1  # fewer where lambda_min_clipped cuts off the first
    rows = list(known.run(Grid(config, steps, begin, eta, **placed)))
    numbers = _pack(rows)
    if not np.isfinite(numbers).all():
        raise InputError(f"{config.class_name} has no finite steps with this configuration: {dict(config.given)}.")
    highest = float(placed["sigmas"].max()) if known.place is _on_sigmas else 1.0
    if known.place is _on_sigmas and config.timestep_spacing == "leading":
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
    for name, values in given.items():
        able = [key for key, known in CLASSES.items() if name in known.custom]
        if config.class_name not in able:
            raise InputError(f"{config.class_name} takes no {name}, here as in diffusers; these do: {', '.join(able)}.")
        if config.sigma_kind and name == "timesteps":
            raise InputError(f"timesteps cannot be given together with {config.sigma_kind} sigmas.")
        if not values or any(after >= before for before, after in pairwise(values)):
            raise InputError(f"{name} must be descending and not empty, got {list(values)}.")
    return {name: np.asarray(values, np.float64) for name, values in given.items()}
