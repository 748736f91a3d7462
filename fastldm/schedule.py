"""Samplers as tables: a sampler and a number of steps become float32 numbers, one row a model call.

Every sampler here is linear in what it has seen, so a step of any of them is one line of arithmetic (kernels/step.py runs it):

    model input   u  = c_in * x
    history       m  = p * x + q * out                  the denoised latent or the noise, as the sampler likes
    next latent   x' = a * x + a1 * y + sum_k b_k * m_(i-k) + d * noise          k = 0..3, newest first
    next anchor   y' = e * x + e1 * y + sum_k f_k * m_(i-k)                      y: a second state tensor
    inpainting    x' = mask * x' + (1 - mask) * (r * init + s * noise0)          only where a mask is set

Prediction type, spacing, Karras / exponential / beta sigmas, zero terminal SNR and image-to-image strength only change the numbers. The
samplers below are written as their papers write them, on symbols: X, Y, M0..M3 and N are unit vectors, so `X + (s1 - s) * (X - M0) / s` is
a row of the table. Formulas and peculiarities are those of diffusers' scheduler of the same name, which is the judge in the tests.

The training schedule `alphas_cumprod` is float32, as checkpoints and diffusers hold it, reproduced to the bit. All else is float64 and
rounded once. This module needs numpy alone.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastldm.errors import InputError

log = logging.getLogger("fastldm")
Array = npt.NDArray[np.float64]

COLUMNS = (
    "c_in",
    "p",
    "q",
    "a",
    "a1",
    "b0",
    "b1",
    "b2",
    "b3",
    "d",
    "e",
    "e1",
    "f0",
    "f1",
    "f2",
    "f3",
    "r",
    "s",
)
X, Y, M0, M1, M2, M3, N = np.eye(
    7
)  # the symbols a sampler is written in: latent, anchor, history newest first, noise


# ---------------------------------------------------------------------------------------------------------------- what comes out


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: `rows[i]` holds the numbers of model call i under the names in COLUMNS."""

    sampler: str
    timesteps: npt.NDArray[np.float32]  # (S,) what the network is told; some samplers have fractional ones
    rows: npt.NDArray[np.float32]  # (S, len(COLUMNS))
    draws: tuple[bool, ...]  # (S,) whether diffusers draws noise at this row, even where its d is 0
    float32_noise: bool  # diffusers draws that noise in float32 whatever the model's dtype
    init_noise_sigma: float  # a start from noise alone: x = init_noise_sigma * noise
    start: tuple[float, float]  # a start from a picture: x = r * init + s * noise
    steps: int  # the user's steps that run; two-stage samplers have more rows
    index: tuple[int, ...]  # (S,) the user's step, from 0, that each row belongs to

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def depth(self) -> int:
        """How many of m_i, m_(i-1), ... the table ever reads (1 to 4)."""
        used = (self.rows[:, 5:9] != 0).any(0) | (self.rows[:, 12:16] != 0).any(0)
        return max(1, *(k + 1 for k in range(4) if used[k]), 1)

    @property
    def anchored(self) -> bool:
        """Whether the anchor y is ever read."""
        return bool((self.rows[:, 4] != 0).any())


class Row(NamedTuple):
    """One model call, in symbols."""

    step: int
    t: float
    level: tuple[float, float]  # add_noise at this row: r * init + s * noise
    m: tuple[float, float]  # p, q
    x: Array  # next latent as a form over X, Y, M0..M3, N
    y: Array = Y  # next anchor
    c_in: float = 1.0
    draws: bool = False


# --------------------------------------------------------------------------------------------------------------- what comes in


@dataclass(frozen=True)
class ScheduleConfig:
    """A `scheduler_config.json` read for one sampler class. Keys the class does not know are left alone, absent ones get its defaults."""

    class_name: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: str | None = None
    sigma_kind: str = ""  # "", "karras", "exponential", "beta" or "lu"
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

        `steps_offset` replaces the file's: diffusers' Stable Diffusion pipelines run with 1 whatever it says. None keeps the file's.
        Raises InputError for a class there is no sampler for and for what diffusers refuses or a table cannot hold.
        """
        name = given.get("_class_name")
        if name not in CLASSES:
            raise InputError(
                f"scheduler_config.json: _class_name {name!r} is not supported. Supported: {', '.join(CLASSES)}."
            )
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

    def using(self, sampler: str) -> ScheduleConfig:
        """The same schedule under another sampler, as diffusers' `from_config` does it (see `resolve_sampler` for names)."""
        chosen = resolve_sampler(sampler)
        return _read(chosen.class_name, {**self.given, **chosen.options})


def _read(class_name: str, given: Mapping[str, Any]) -> ScheduleConfig:
    known = CLASSES[class_name]
    for key, (allowed, why) in _REFUSED.items():
        if given.get(key) not in allowed:
            raise InputError(f"scheduler configuration: {key}={given[key]!r} is not supported: {why}.")
    values: dict[str, Any] = {**known.keys, **{k: v for k, v in given.items() if k in known.keys}}
    for key, choices in {**_CHOICES, **known.choices}.items():
        if values.get(key) in _FOREIGN.get(key, ()) and values[key] not in choices:
            values[key] = known.keys[key]
        if key in values and values[key] not in choices:
            raise InputError(
                f"{class_name}: {key}={values[key]!r} is not supported; it must be one of {', '.join(map(str, choices))}."
            )
    kinds = [kind for kind, key in _KIND_KEYS.items() if values.get(key)]
    if len(kinds) > 1:
        raise InputError(f"{class_name}: only one sigma schedule can be used, got {' and '.join(kinds)}.")
    values["sigma_kind"] = "".join(kinds)
    values |= {key: given.get(key) for key in ("sigma_min", "sigma_max")}
    for key in ("trained_betas", "disable_corrector"):
        values[key] = (
            tuple(values[key]) if values.get(key) else ScheduleConfig.__dataclass_fields__[key].default
        )
    if values["trained_betas"] and len(values["trained_betas"]) != values["num_train_timesteps"]:
        raise InputError(
            f"{class_name}: {len(values['trained_betas'])} trained_betas for {values['num_train_timesteps']} timesteps."
        )
    algorithm = values.get("algorithm_type", "++")
    if not algorithm.endswith("++") and values["final_sigmas_type"] == "zero":
        raise InputError(
            f"{class_name}: algorithm_type {algorithm!r} cannot end at sigma 0: set final_sigmas_type to 'sigma_min'."
        )
    if algorithm == "sde-dpmsolver" and values["solver_order"] > 2:
        raise InputError(
            f"{class_name}: algorithm_type 'sde-dpmsolver' has no third order: set solver_order to 2."
        )
    names = {f.name for f in fields(ScheduleConfig)}
    return ScheduleConfig(
        class_name=class_name, given=dict(given), **{k: v for k, v in values.items() if k in names}
    )


# ------------------------------------------------------------------------------------------------------- the training schedule


def alphas_cumprod(config: ScheduleConfig) -> npt.NDArray[np.float32]:
    """The training schedule, (num_train_timesteps,) float32, equal to diffusers' buffer to the bit."""
    steps, one = config.num_train_timesteps, np.float32(1)
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        betas = _linspace32(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = _linspace32(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    else:  # squaredcos_cap_v2
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = np.array([min(1 - after / before, 0.999) for before, after in zip(bar, bar[1:])], np.float32)
    if config.rescale_betas_zero_snr:  # algorithm 1 of https://arxiv.org/abs/2305.08891
        root = np.sqrt(_cumprod32(one - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        betas = one - np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
    return _cumprod32(one - betas)


def _linspace32(start: float, end: float, steps: int) -> npt.NDArray[np.float32]:
    """torch.linspace in float32: a float32 step, fused multiply-add, counted from the nearer end."""
    first, last = np.float32(start), np.float32(end)
    step, i = float((last - first) / np.float32(max(steps - 1, 1))), np.arange(steps)
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _cumprod32(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.cumprod(x, dtype=np.float64).astype(np.float32)  # torch accumulates float32 in float64 on a CPU


# ------------------------------------------------------------------------------------------------------------ steps in time


@dataclass(frozen=True)
class Grid:
    """Where a sampler steps: all of the schedule's steps, of which those from `begin` on run."""

    config: ScheduleConfig
    steps: int
    begin: int
    eta: float
    alpha_bar: Array  # (T,) float64 of float32 values
    timesteps: Array  # (steps,) or more for PLMS
    sigmas: Array = field(default_factory=lambda: np.zeros(0))  # (steps + 1,)
    log_sigmas: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (T,)

    def bar(self, t: float, final: float = 1.0) -> float:
        """alphas_cumprod at an integer timestep; `final` before the first."""
        return float(self.alpha_bar[int(t)]) if t >= 0 else final

    @property
    def final_bar(self) -> float:
        return 1.0 if self.config.set_alpha_to_one else float(self.alpha_bar[0])

    def walk(self) -> Iterator[tuple[int, float, float, float]]:
        """(step, timestep, sigma, next sigma) of each step that runs; steps count from 0."""
        for i in range(self.begin, self.steps):
            yield i - self.begin, self.timesteps[i], self.sigmas[i], self.sigmas[i + 1]

    def time_of(self, sigma: float) -> float:
        return float(_sigma_to_t(np.array([sigma]), self.log_sigmas)[0])

    def denoised(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) that make m the denoised latent, for a latent alpha * x0 + sigma * noise."""
        if self.config.prediction_type == "epsilon":
            if alpha == 0:
                raise InputError(
                    "epsilon prediction cannot start at zero terminal SNR, where the latent holds no picture: use timestep_spacing "
                    "'leading', a v-prediction model, or a schedule without rescale_betas_zero_snr."
                )
            return 1 / alpha, -sigma / alpha
        return (alpha, -sigma) if self.config.prediction_type == "v_prediction" else (0.0, 1.0)

    def noise(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) that make m the noise in the latent."""
        if self.config.prediction_type == "epsilon":
            return 0.0, 1.0
        return (
            (sigma, alpha) if self.config.prediction_type == "v_prediction" else (1 / sigma, -alpha / sigma)
        )


def _spaced(config: ScheduleConfig, n: int, last: int, extra: int = 0) -> Array:
    """n timesteps, descending from below `last`; `extra` more are laid out and dropped at the low end."""
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, n + extra)[::-1][:n]
    if config.timestep_spacing == "leading":
        return np.arange(n + extra)[::-1][:n] * (last // (n + extra)) + float(config.steps_offset)
    return np.arange(last, 0, -config.num_train_timesteps / n).round()[:n] - 1


def _alpha_grid(config: ScheduleConfig, n: int, custom: Array | None, _: Array | None) -> dict[str, Any]:
    bar = alphas_cumprod(config).astype(np.float64)
    return {"alpha_bar": bar, "timesteps": _spaced(config, n, len(bar)).round() if custom is None else custom}


def _plms_grid(config: ScheduleConfig, n: int, *_: Array | None) -> dict[str, Any]:
    grid = _alpha_grid(config, n, None, None)
    t = grid["timesteps"]
    return {**grid, "timesteps": np.concatenate([t[:1], t[1:2], t[1:]])}  # the second one twice


def _consistency_grid(
    config: ScheduleConfig, n: int, custom: Array | None, _: Array | None
) -> dict[str, Any]:
    bar, trained = alphas_cumprod(config).astype(np.float64), config.original_inference_steps
    if custom is None:
        if n > trained:
            raise InputError(
                f"{n} steps are more than the {trained} that the model was distilled on (original_inference_steps)."
            )
        origin = np.arange(trained, 0, -1) * (len(bar) // trained) - 1.0
        custom = origin[np.floor(np.linspace(0, trained, n, endpoint=False)).astype(int)]
    return {"alpha_bar": bar, "timesteps": custom}


def _sigma_grid(config: ScheduleConfig, n: int, custom: Array | None, sigmas: Array | None) -> dict[str, Any]:
    """Samplers in the space x0 + sigma * noise."""
    bar, trained = _trained_sigmas(config)
    logs = np.log(trained)
    if sigmas is not None:
        return {
            "alpha_bar": bar,
            "timesteps": _sigma_to_t(sigmas[:-1], logs),
            "sigmas": sigmas,
            "log_sigmas": logs,
        }
    t = (_spaced(config, n, len(bar)) if custom is None else custom).astype(np.float32).astype(np.float64)
    sigmas = np.interp(t, np.arange(len(trained)), trained)
    if config.sigma_kind:
        sigmas = _respaced(config, n, sigmas[0], sigmas[-1])
        t = _sigma_to_t(sigmas, logs)
        t = t.round() if config.sigma_kind == "karras" and "KDPM2" in config.class_name else t
    last = float(trained[0]) if config.final_sigmas_type == "sigma_min" else 0.0
    return {"alpha_bar": bar, "timesteps": t, "sigmas": np.append(sigmas, last), "log_sigmas": logs}


def _lambda_grid(config: ScheduleConfig, n: int, custom: Array | None, _: Array | None) -> dict[str, Any]:
    """Samplers in the variance-preserving space alpha * x0 + sigma * noise that step in lambda = log(alpha / sigma)."""
    bar, trained = _trained_sigmas(config)
    logs = np.log(trained)
    sigma_min = float(trained[0])
    if config.sigma_kind:
        sigmas = _respaced(config, n, float(trained[-1]), sigma_min)
        t = _sigma_to_t(sigmas, logs)
        if config.sigma_kind in ("karras", "lu") and (
            config.beta_schedule != "squaredcos_cap_v2" or config.class_name != "DPMSolverMultistepScheduler"
        ):
            t = t.round()
        if config.class_name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
            sigma_min = sigmas[-1]
    else:
        last = len(bar) - int(np.searchsorted(-logs[::-1], config.lambda_min_clipped))
        t = _spaced(config, n, last, extra=1).round() if custom is None else custom
        sigmas = np.interp(t, np.arange(len(trained)), trained)
    final = (
        sigma_min
        if config.final_sigmas_type == "sigma_min" or config.class_name == "DEISMultistepScheduler"
        else 0.0
    )
    return {
        "alpha_bar": bar,
        "timesteps": np.trunc(t),
        "sigmas": np.append(sigmas, final),
        "log_sigmas": logs,
    }


def _trained_sigmas(config: ScheduleConfig) -> tuple[Array, npt.NDArray[np.float32]]:
    bar = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        bar[-1] = 2**-24  # sigma would be infinite
    return bar.astype(np.float64), np.sqrt((1 - bar) / bar)


def _respaced(config: ScheduleConfig, n: int, high: float, low: float) -> Array:
    """n sigmas from high to low, spaced as `config.sigma_kind` says."""
    high = high if config.sigma_max is None else config.sigma_max
    low = low if config.sigma_min is None else config.sigma_min
    ramp = np.linspace(0, 1, n)
    if config.sigma_kind == "karras":  # https://arxiv.org/abs/2206.00364, equation 5 with rho = 7
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if config.sigma_kind == "beta":  # https://arxiv.org/abs/2407.12173
        return low + beta_quantile(1 - ramp) * (high - low)
    return np.exp(
        np.linspace(math.log(high), math.log(low), n)
    )  # "exponential"; "lu" is the same with rho = 1


def beta_quantile(probability: Array, shape: float = 0.6) -> Array:
    """Quantiles of the symmetric Beta(shape, shape) distribution, as scipy.stats.beta.ppf gives them.

    Newton's method on the regularized incomplete beta function, by its power series on the lower half, where it converges fast.
    """
    lower = np.minimum(probability, 1 - probability)
    k = np.arange(64)
    series = np.cumprod(np.append(1.0, (k[1:] - shape) / k[1:])) / (shape + k)
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = np.minimum((lower * shape * total) ** (1 / shape), 0.5)
    for _ in range(8):
        inside = np.where(x > 0, x, 0.5)
        excess = inside**shape * (inside[:, None] ** k @ series) / total - lower
        slope = (inside * (1 - inside)) ** (shape - 1) / total
        x = np.where(x > 0, np.clip(inside - excess / slope, 0, 0.5), 0.0)
    return np.where(probability > 0.5, 1 - x, x)


def _sigma_to_t(sigmas: Array, log_sigmas: npt.NDArray[np.float32]) -> Array:
    """Timesteps, fractional, at which the training schedule has these sigmas, linear in the logarithm."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, logs, side="right") - 1, 0, len(log_sigmas) - 2)
    weight = np.clip((log_sigmas[low] - logs) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


# --------------------------------------------------------------------- samplers in the space sqrt(bar) * x0 + sqrt(1 - bar) * noise


def ddpm(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2006.11239, equations 6 and 7."""
    times = [*grid.timesteps, -1.0]
    for i in range(grid.begin, grid.steps):
        t, now, after = times[i], grid.bar(times[i]), grid.bar(times[i + 1])
        alpha, sigma, beta = math.sqrt(now), math.sqrt(1 - now), 1 - now / after
        mean = math.sqrt(after) * beta / (1 - now) * M0 + math.sqrt(now / after) * (1 - after) / (1 - now) * X
        variance = (
            beta if grid.config.variance_type == "fixed_large" else max((1 - after) / (1 - now) * beta, 1e-20)
        )
        x = mean + math.sqrt(variance) * N if t > 0 else mean
        yield Row(i - grid.begin, t, (alpha, sigma), grid.denoised(alpha, sigma), x, draws=bool(t > 0))


def ddim(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2010.02502, equation 12. The next time is a constant stride away, whatever the next timestep is."""
    stride = grid.config.num_train_timesteps // grid.steps
    for i in range(grid.begin, grid.steps):
        t = grid.timesteps[i]
        now, after = grid.bar(t), grid.bar(t - stride, grid.final_bar)
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        deviation = grid.eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        noise = (X - alpha * M0) / sigma
        x = math.sqrt(after) * M0 + math.sqrt(1 - after - deviation**2) * noise + deviation * N
        yield Row(i - grid.begin, t, (alpha, sigma), grid.denoised(alpha, sigma), x, draws=grid.eta > 0)


def plms(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2202.09778, the linear multistep method. m is the network's output as it is.

    The second call repeats the first step with what the network says at its end, and is then forgotten: from there on the anchor keeps
    the first output, which the fourth order still asks for four calls later.
    """
    stride = grid.config.num_train_timesteps // grid.steps
    out = (
        M0,
        (M0 + M1) / 2,
        (3 * M0 - Y) / 2,
        (23 * M0 - 16 * M1 + 5 * Y) / 12,
        (55 * M0 - 59 * M1 + 37 * M2 - 9 * Y) / 24,
    )
    keep = (X, M1, Y, Y, Y)  # the latent for the second call, then the first output
    for i, t in enumerate(grid.timesteps[grid.begin :]):
        source = t + stride if i == 1 else t
        now, after = grid.bar(source), grid.bar(source - stride, grid.final_bar)
        x, form = Y if i == 1 else X, out[i] if i < 5 else (55 * M0 - 59 * M1 + 37 * M2 - 9 * M3) / 24
        if grid.config.prediction_type == "v_prediction":
            form = math.sqrt(now) * form + math.sqrt(1 - now) * x
        scale = (after - now) / (now * math.sqrt(1 - after) + math.sqrt(now * (1 - now) * after))
        x = math.sqrt(after / now) * x - scale * form
        level = math.sqrt(grid.bar(t)), math.sqrt(1 - grid.bar(t))
        yield Row(max(i - 1, 0), t, level, (0.0, 1.0), x, keep[i] if i < 5 else Y)


def lcm(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2310.04378, algorithm 3: jump to the denoised latent, then add noise of the next step."""
    for i in range(grid.begin, grid.steps):
        t = grid.timesteps[i]
        now, scaled, final = grid.bar(t), t * grid.config.timestep_scaling, i + 1 == grid.steps
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        denoised = scaled / math.hypot(scaled, 0.5) * M0 + 0.25 / (scaled**2 + 0.25) * X
        after = now if final else grid.bar(grid.timesteps[i + 1])
        x = denoised if final else math.sqrt(after) * denoised + math.sqrt(1 - after) * N
        yield Row(i - grid.begin, t, (alpha, sigma), grid.denoised(alpha, sigma), x, draws=not final)


def tcd(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2402.19159, strategic stochastic sampling: down to (1 - eta) of the next time, then noise up to it."""
    times = [*grid.timesteps, 0.0]
    for i in range(grid.begin, grid.steps):
        t, final = times[i], i + 1 == grid.steps
        now, after = grid.bar(t), grid.bar(times[i + 1])
        between = grid.bar(
            np.floor(np.float32(1 - grid.eta) * np.float32(times[i + 1]))
        )  # float32: the floor depends on it
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        x = math.sqrt(between) * M0 + math.sqrt(1 - between) * (X - alpha * M0) / sigma
        draws = grid.eta > 0 and not final
        if draws:
            x = math.sqrt(after / between) * x + math.sqrt(1 - after / between) * N
        yield Row(i - grid.begin, t, (alpha, sigma), grid.denoised(alpha, sigma), x, draws=draws)


# --------------------------------------------------------------------------------- samplers in the space x0 + sigma * noise


def _stage(
    grid: Grid,
    step: int,
    t: float,
    sigma: float,
    x: Array,
    y: Array = Y,
    *,
    draws: bool = False,
    level: float = -1,
) -> Row:
    c_in = 1 / math.hypot(sigma, 1)
    p, q = grid.denoised(c_in, sigma * c_in)
    return Row(step, t, (1.0, sigma if level < 0 else level), (p * c_in, q), x, y, c_in, draws)


def euler(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2206.00364, algorithm 2 without churn."""
    for i, t, sigma, after in grid.walk():
        yield _stage(grid, i, t, sigma, X + (after - sigma) * (X - M0) / sigma)


def _ancestral(sigma: float, after: float) -> tuple[float, float]:
    """The part of the way down that is a step, and the noise that leads back up."""
    up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    return math.sqrt(max(after**2 - up**2, 0)), up


def euler_ancestral(grid: Grid) -> Iterator[Row]:
    """k-diffusion's sample_euler_ancestral."""
    for i, t, sigma, after in grid.walk():
        down, up = _ancestral(sigma, after)
        yield _stage(grid, i, t, sigma, X + (down - sigma) * (X - M0) / sigma + up * N, draws=True)


def heun(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2206.00364, algorithm 1: the trapezoidal rule, but a plain Euler step down to sigma 0."""
    for i, t, sigma, after in grid.walk():
        yield _stage(grid, i, t, sigma, X + (after - sigma) * (X - M0) / sigma, X)
        if i + grid.begin + 1 < grid.steps:
            slope = ((Y - M1) / sigma + (X - M0) / after) / 2
            yield _stage(grid, i, grid.timesteps[i + grid.begin + 1], after, Y + (after - sigma) * slope)


def dpm2(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2206.00364, algorithm 2 of the appendix: the midpoint rule at the geometric mean."""
    for i, t, sigma, after in grid.walk():
        middle = math.sqrt(sigma * after)
        yield _stage(grid, i, t, sigma, X + (middle - sigma) * (X - M0) / sigma, X)
        if i + grid.begin + 1 < grid.steps:
            yield _stage(
                grid, i, grid.time_of(middle), middle, Y + (after - sigma) * (X - M0) / middle, level=after
            )


def dpm2_ancestral(grid: Grid) -> Iterator[Row]:
    """k-diffusion's sample_dpm_2_ancestral."""
    for i, t, sigma, after in grid.walk():
        down, up = _ancestral(sigma, after)
        middle = math.sqrt(sigma * down)
        yield _stage(grid, i, t, sigma, X + (middle - sigma) * (X - M0) / sigma, X)
        if i + grid.begin + 1 < grid.steps:
            x = Y + (down - sigma) * (X - M0) / middle + up * N
            yield _stage(grid, i, grid.time_of(middle), middle, x, draws=True, level=after)


# ---------------------------------------------------------------------------- samplers in the space alpha * x0 + sigma * noise


def _split(sigma: float) -> tuple[float, float]:
    """alpha and sigma of the variance-preserving latent, from their ratio."""
    return 1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)


def _dpm_update(
    config: ScheduleConfig, x: Array, now: float, after: float, d: Sequence[Array], solver: str
) -> Array:
    """One DPM-Solver update from ratio sigma / alpha `now` to `after`, given D0, D1, ... (https://arxiv.org/abs/2211.01095).

    All four kinds are one formula in z: -h for data prediction, h for noise prediction, with h the step in lambda, twice that for the SDE.
    """
    alpha, sigma = _split(after)
    h = math.log(now / after) if after > 0 else math.inf
    if h == 0:
        return x
    data, sde = config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde")
    z = (-h if data else h) * (2 if data and sde else 1)
    scale = alpha if data else sigma * (2 if sde else 1)
    keep = sigma / _split(now)[1] if data else alpha / _split(now)[0]
    keep *= math.exp(-h) if data and sde else 1
    update = keep * x - scale * math.expm1(z) * d[0]
    if sde:
        update = update + sigma * math.sqrt(max(-math.expm1(-2 * h) if data else math.expm1(2 * h), 0)) * N
    if len(d) == 2 and solver == "midpoint":
        update = update - scale * math.expm1(z) / 2 * d[1]
    elif len(d) > 1:
        update = update - scale * (math.expm1(z) / z - 1) * d[1]
    if len(d) > 2:
        half = -0.5 if data and sde else 0.5  # diffusers' sign, which does not vanish with h
        update = update - scale * ((math.expm1(z) - z) / z**2 - half) * d[2]
    return update


def _model(grid: Grid, sigma: float, data: bool) -> tuple[float, float]:
    return grid.denoised(*_split(sigma)) if data else grid.noise(*_split(sigma))


def dpm_multistep(grid: Grid) -> Iterator[Row]:
    """DPM-Solver and DPM-Solver++, multistep, orders 1 to 3, ODE and SDE: algorithm 2 of https://arxiv.org/abs/2211.01095."""
    config = grid.config
    few = config.lower_order_final and grid.steps < 15
    for i, t, now, after in grid.walk():
        left = grid.steps - grid.begin - i
        order = min(config.solver_order, i + 1)
        if left == 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero"):
            order = 1
        if left == 2 and few:
            order = min(order, 2)
        lam = [-math.log(s) for s in grid.sigmas[grid.begin + i :: -1][:3]]
        h = -math.log(after) - lam[0] if after > 0 else math.inf
        d = [M0]
        if order > 1 and h != 0:
            d.append((M0 - M1) / ((lam[0] - lam[1]) / h))
        if order > 2 and h != 0:
            r0, r1, older = (lam[0] - lam[1]) / h, (lam[1] - lam[2]) / h, (M1 - M2) / ((lam[1] - lam[2]) / h)
            curve = (d[1] - older) / (r0 + r1)
            d = [M0, d[1] + r0 * curve, curve]
        x = _dpm_update(config, X, now, after, d, config.solver_type)
        sde = config.algorithm_type.startswith("sde")
        yield Row(i, t, _split(now), _model(grid, now, config.algorithm_type.endswith("++")), x, draws=sde)


def dpm_singlestep(grid: Grid) -> Iterator[Row]:
    """DPM-Solver++ 2S and 3S: groups of 1, 2 or 3 calls, each group from the latent it began with, which the anchor keeps."""
    config = grid.config
    data, sde = config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde")
    orders = _group_orders(config, grid.steps)
    for i, t, now, after in grid.walk():
        order = min(orders[grid.begin + i], i + 1)
        lam = [-math.log(s) for s in grid.sigmas[grid.begin + i :: -1][:order]]
        h = -math.log(after) - lam[-1] if after > 0 else math.inf
        origin, source, solver = (M0, M1, M2)[order - 1], X if order == 1 else Y, config.solver_type
        d = [origin]
        if order == 2:
            d.append((M0 - M1) / ((lam[0] - lam[1]) / h))
        if order == 3:
            r0, r1 = (lam[0] - lam[2]) / h, (lam[1] - lam[2]) / h
            near, far = (M1 - M2) / r1, (M0 - M2) / r0
            d, solver = [origin, far], "heun"
            if config.solver_type == "heun":
                d = [origin, (r0 * near - r1 * far) / (r0 - r1), 2 * (far - near) / (r0 - r1)]
        x = _dpm_update(config, source, math.exp(-lam[-1]), after, d, solver)
        yield Row(i, t, _split(now), _model(grid, now, data), x, X if order == 1 else Y, draws=sde)


def _group_orders(config: ScheduleConfig, steps: int) -> list[int]:
    order, groups = config.solver_order, steps // config.solver_order
    if not config.lower_order_final and steps % order == 0 and config.final_sigmas_type != "zero":
        return list(range(1, order + 1)) * groups
    if order == 3:
        tail = {0: [1, 2, 1], 1: [1], 2: [1, 2]}[steps % 3]
    else:
        tail = {0: [1, 1], 1: [1]}[steps % 2] if order == 2 else []
    orders = list(range(1, order + 1)) * (groups - (order > 1 and steps % order == 0)) + tail
    if config.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def deis(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2204.13902, tAB-DEIS in log rho: the noise, as a polynomial in log sigma, integrated over sigma."""
    config = grid.config
    few = config.lower_order_final and grid.steps < 15
    for i, t, now, after in grid.walk():
        left = grid.steps - grid.begin - i
        order = min(config.solver_order, i + 1, *([left] if few else []))
        logs = [math.log(s) for s in grid.sigmas[grid.begin + i :: -1][:order]]
        x = X * (_split(after)[0] / _split(now)[0])
        for k, m in zip(range(order), (M0, M1, M2)):
            others = [log for j, log in enumerate(logs) if j != k]
            x = x + _split(after)[0] * _integral(now, after, logs[k], others) * m
        yield Row(i, t, _split(now), _model(grid, now, data=False), x)


def _integral(now: float, after: float, node: float, others: Sequence[float]) -> float:
    """The integral over sigma, from now to after, of the Lagrange polynomial in log sigma that is 1 at node and 0 at the others.

    With u = log(sigma / now): the antiderivatives of 1, u and u^2 over now * e^u are e^u, (u - 1) e^u and (u^2 - 2 u + 2) e^u.
    """
    u, base = math.log(after / now), math.log(now)
    powers = math.expm1(u), (u - 1) * math.exp(u) + 1, (u * u - 2 * u + 2) * math.exp(u) - 2
    roots = [log - base for log in others]
    polynomial = np.polynomial.polynomial.polyfromroots(roots) / math.prod(node - log for log in others)
    return now * float(np.dot(polynomial, powers[: len(polynomial)]))


def unipc(grid: Grid) -> Iterator[Row]:
    """https://arxiv.org/abs/2302.04867: predict, then correct the latent the last prediction came from. The anchor is the corrected one."""
    config = grid.config
    order = 0
    for i, t, now, after in grid.walk():
        sample = X
        if i > 0 and grid.begin + i - 1 not in config.disable_corrector:
            sample = _unified_update(grid, i - 1, order, Y, (M1, M2, M3), M0)
        order = min(config.solver_order, i + 1)
        if config.lower_order_final:
            order = min(order, grid.steps - grid.begin - i)
        x = _unified_update(grid, i, order, sample, (M0, M1, M2), None)
        yield Row(i, t, _split(now), _model(grid, now, config.predict_x0), x, sample)


def _unified_update(grid: Grid, i: int, order: int, x: Array, m: Sequence[Array], new: Array | None) -> Array:
    """From step i to the next: UniP-order, or UniC-order where the model output `new` at the next step is known."""
    config, at = grid.config, grid.begin + i
    now, after = grid.sigmas[at], grid.sigmas[at + 1]
    (alpha_s, sigma_s), (alpha, sigma) = _split(now), _split(after)
    x = sigma / sigma_s * x if config.predict_x0 else alpha / alpha_s * x
    if after == 0:  # order 1, or diffusers' result is not finite
        if order > 1:
            raise InputError("UniPC to sigma 0 needs lower_order_final, or final_sigmas_type 'sigma_min'.")
        return x + alpha * m[0] if config.predict_x0 else x - alpha * now * m[0]
    h = math.log(now / after)
    z, scale = (-h, alpha) if config.predict_x0 else (h, sigma)
    x = x - scale * math.expm1(z) * m[0]
    if h == 0 or (order == 1 and new is None):
        return x
    ratios = [math.log(now / grid.sigmas[at - k]) / h for k in range(1, order)] + [1.0]
    slopes = [(m[k] - m[0]) / ratios[k - 1] for k in range(1, order)] + ([] if new is None else [new - m[0]])
    b_h = z if config.solver_type == "bh1" else math.expm1(z)
    phi, targets = math.expm1(z) / z - 1, []
    for k in range(1, order + 1):
        targets.append(phi * math.factorial(k) / b_h)
        phi = phi / z - 1 / math.factorial(k + 1)
    size = len(slopes)
    weights = np.array([0.5])  # for one slope, as the paper's code has it
    if size > 1:
        weights = np.linalg.solve(np.vander(ratios[:size], increasing=True).T, targets[:size])
    return x - scale * b_h * sum(w * slope for w, slope in zip(weights, slopes))


# ------------------------------------------------------------------------------------------- what diffusers' classes know, as data


@dataclass(frozen=True)
class SchedulerClass:
    """A diffusers scheduler class: how it steps, where, and the keys of its configuration with their defaults."""

    run: Callable[[Grid], Iterator[Row]]
    grid: Callable[[ScheduleConfig, int, Array | None, Array | None], dict[str, Any]]
    keys: Mapping[str, Any]
    custom: tuple[str, ...] = ()  # which of `timesteps` and `sigmas` a caller may give
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # where they differ from _CHOICES


_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_K = {**_COMMON, "beta_start": 0.00085, "beta_end": 0.012}
_LCM = {
    **_K,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_KIND_KEYS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
_KINDS = {key: False for kind, key in _KIND_KEYS.items() if kind != "lu"}
_SOLVER = {"solver_order": 2, "lower_order_final": True}
_NO_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
_TYPES = {
    "solver_type": ("midpoint", "heun"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
}
_DPM = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
}

CLASSES: dict[str, SchedulerClass] = {
    "DDPMScheduler": SchedulerClass(
        ddpm,
        _alpha_grid,
        {**_COMMON, **_LEADING, **_ZERO_SNR, "variance_type": "fixed_small", "clip_sample": True},
        custom=("timesteps",),
    ),
    "DDIMScheduler": SchedulerClass(
        ddim, _alpha_grid, {**_COMMON, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True, "clip_sample": True}
    ),
    "PNDMScheduler": SchedulerClass(
        plms, _plms_grid, {**_COMMON, **_LEADING, "set_alpha_to_one": False}, choices=_NO_SAMPLE
    ),
    "LCMScheduler": SchedulerClass(lcm, _consistency_grid, _LCM, custom=("timesteps",)),
    "TCDScheduler": SchedulerClass(tcd, _consistency_grid, _LCM, custom=("timesteps",)),
    "EulerDiscreteScheduler": SchedulerClass(
        euler,
        _sigma_grid,
        {**_COMMON, **_LINSPACE, **_ZERO_SNR, **_KINDS, "final_sigmas_type": "zero"},
        custom=("timesteps", "sigmas"),
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        euler_ancestral, _sigma_grid, {**_COMMON, **_LINSPACE, **_ZERO_SNR}, choices=_NO_SAMPLE
    ),
    "HeunDiscreteScheduler": SchedulerClass(
        heun, _sigma_grid, {**_K, **_LINSPACE, **_KINDS}, custom=("timesteps",)
    ),
    "KDPM2DiscreteScheduler": SchedulerClass(
        dpm2, _sigma_grid, {**_K, **_LINSPACE, **_KINDS}, choices=_NO_SAMPLE
    ),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(
        dpm2_ancestral, _sigma_grid, {**_K, **_LINSPACE, **_KINDS}, choices=_NO_SAMPLE
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        dpm_multistep,
        _lambda_grid,
        {
            **_COMMON,
            **_LINSPACE,
            **_ZERO_SNR,
            **_KINDS,
            "use_lu_lambdas": False,
            **_SOLVER,
            **_DPM,
            "euler_at_final": False,
        },
        custom=("timesteps",),
        choices=_TYPES,
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        dpm_singlestep,
        _lambda_grid,
        {**_COMMON, **_KINDS, **_SOLVER, **_DPM, "lower_order_final": False},
        custom=("timesteps",),
        choices={**_TYPES, "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")},
    ),
    "DEISMultistepScheduler": SchedulerClass(
        deis, _lambda_grid, {**_COMMON, **_LINSPACE, **_KINDS, **_SOLVER}
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        unipc,
        _lambda_grid,
        {
            **_COMMON,
            **_LINSPACE,
            **_ZERO_SNR,
            **_KINDS,
            **_SOLVER,
            "solver_type": "bh2",
            "final_sigmas_type": "zero",
            "predict_x0": True,
            "disable_corrector": (),
        },
        choices={"solver_type": ("bh1", "bh2")},
    ),
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "solver_order": (1, 2, 3),
}
_FOREIGN = {  # other classes' values: each class takes its own default instead, so that schedulers can be exchanged
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "thresholding": (
        (None, False),
        "dynamic thresholding is not linear, and is meant for pixels, not latents",
    ),
    "use_flow_sigmas": ((None, False), "flow matching models are another family"),
    "use_dynamic_shifting": ((None, False), "flow matching models are another family"),
    "solver_p": ((None,), "a second scheduler as predictor cannot be a table"),
    "timestep_type": ((None, "discrete"), "continuous (EDM) timesteps are another family"),
    "interpolation_type": ((None, "linear"), "only linear interpolation of sigmas is implemented"),
}


# ------------------------------------------------------------------------------------------------------------ names people use


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: a scheduler class and what the name says about its options. Other options stay the checkpoint's."""

    name: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _dpm(order: int, algorithm: str = "dpmsolver++") -> dict[str, Any]:
    return {"solver_order": order, "algorithm_type": algorithm}


SAMPLERS: dict[str, Sampler] = {
    name: Sampler(name, class_name, options)
    for name, class_name, options in (
        ("ddpm", "DDPMScheduler", {}),
        ("ddim", "DDIMScheduler", {}),
        ("plms", "PNDMScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler a", "EulerAncestralDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpm2", "KDPM2DiscreteScheduler", {}),
        ("dpm2 a", "KDPM2AncestralDiscreteScheduler", {}),
        ("dpm++ 2m", "DPMSolverMultistepScheduler", _dpm(2)),
        ("dpm++ 2m sde", "DPMSolverMultistepScheduler", _dpm(2, "sde-dpmsolver++")),
        ("dpm++ 3m", "DPMSolverMultistepScheduler", _dpm(3)),
        ("dpm++ 3m sde", "DPMSolverMultistepScheduler", _dpm(3, "sde-dpmsolver++")),
        ("dpm++ 2s", "DPMSolverSinglestepScheduler", _dpm(2)),
        ("dpm++ 3s", "DPMSolverSinglestepScheduler", _dpm(3)),
        ("deis", "DEISMultistepScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("lcm", "LCMScheduler", {}),
        ("tcd", "TCDScheduler", {}),
    )
}


def _plain(name: str) -> str:
    """A name without case, punctuation and the prefixes and endings that different programs give it."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
    return re.sub(r"^sample|scheduler$|gpu$", "", plain).replace("ancestral", "a")


_LOOKUP = {
    **{_plain(name): Sampler(name, name) for name in CLASSES},
    **{_plain(name): sampler for name, sampler in SAMPLERS.items()},
    "pndm": SAMPLERS["plms"],
}


def resolve_sampler(name: str) -> Sampler:
    """The sampler that a user means: fastldm's names, those of other programs ("DPM++ 2M Karras", "k_euler_a", "dpmpp_2m_sde") and
    diffusers' class names, whatever the case, spaces and punctuation; "karras", "exponential" or "beta" at the end sets the sigmas.

    Raises InputError for an unknown name (it lists what there is) and for sigmas that the sampler does not take.
    """
    plain = _plain(name)
    kind = next((kind for kind in ("karras", "exponential", "beta") if plain.endswith(kind)), "")
    base = plain.removesuffix(kind)
    found = _LOOKUP.get(base) or _LOOKUP.get(base.removeprefix("k"))
    if found is None:
        near = difflib.get_close_matches(base, _LOOKUP, 1, 0.4)
        hint = f" Did you mean {_LOOKUP[near[0]].name!r}?" if near else ""
        raise InputError(
            f"unknown sampler {name!r}.{hint} There are: {', '.join(SAMPLERS)}; with 'karras', 'exponential' or 'beta' at the end where "
            "the sampler takes other sigmas; and diffusers' class names."
        )
    if not kind:
        return found
    if _KIND_KEYS[kind] not in CLASSES[found.class_name].keys:
        raise InputError(
            f"sampler {name!r}: {found.name} does not take {kind} sigmas (nor does diffusers' {found.class_name})."
        )
    off = dict.fromkeys(_KIND_KEYS.values(), False)
    return replace(
        found, name=f"{found.name} {kind}", options={**found.options, **off, _KIND_KEYS[kind]: True}
    )


# ------------------------------------------------------------------------------------------------------------------- the table


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
    """The table of a sampler: the configuration's own, or `sampler` (a name as `resolve_sampler` takes it) on its schedule.

    num_inference_steps: the user's steps; `timesteps` or `sigmas` (the last one where sampling ends, usually 0), descending, replace them
        where diffusers' scheduler takes them.
    strength: in (0, 1], how much of the schedule runs on a given picture, as diffusers' `get_timesteps` counts: the first
        steps - int(steps * strength) are left out.
    eta: noise of DDIM (0 none, 1 as DDPM) and TCD; other samplers ignore it.

    Raises InputError, which says what was wrong.
    """
    chosen = resolve_sampler(sampler) if sampler is not None else None
    if chosen is not None:
        config = _read(chosen.class_name, {**config.given, **chosen.options})
    known = CLASSES[config.class_name]
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if name not in known.custom or config.sigma_kind:
            able = ", ".join(key for key, other in CLASSES.items() if name in other.custom)
            raise InputError(
                f"{config.class_name} does not take {name} (with Karras, exponential or beta sigmas none does); these do: {able}."
            )
        if not len(values) or any(after >= before for before, after in zip(values, values[1:])):
            raise InputError(f"{name} must be descending and not empty, got {list(values)}.")
        num_inference_steps = len(values) if name == "timesteps" else len(values) - 1
    steps = _checked_steps(config, num_inference_steps)
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}.")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}.")
    begin = steps - min(int(steps * strength), steps)
    if begin == steps:
        raise InputError(
            f"strength {strength} of {steps} steps leaves none: use at least {math.ceil(1 / strength)} steps or more strength."
        )
    custom = [None if values is None else np.asarray(values, np.float64) for values in (timesteps, sigmas)]
    placed = known.grid(config, steps, *custom)
    if not (0 <= placed["timesteps"].min() and placed["timesteps"].max() < config.num_train_timesteps):
        raise InputError(
            f"{steps} steps with {config.timestep_spacing} spacing leave the trained timesteps 0 to {config.num_train_timesteps - 1}."
        )
    rows = list(known.run(Grid(config, steps, begin, eta, **placed)))
    levels = [row.level for row in rows]
    numbers = np.array(
        [
            (row.c_in, *row.m, *row.x, *row.y[:6], *level)
            for row, level in zip(rows, [*levels[1:], (1.0, 0.0)])
        ]
    )
    if not np.isfinite(numbers).all():
        raise InputError(
            f"{config.class_name} has no finite steps for this configuration: {dict(config.given)}."
        )
    highest = 1.0
    if known.grid is _sigma_grid:
        highest = float(placed["sigmas"].max())
        highest = highest if config.timestep_spacing != "leading" else math.hypot(highest, 1)
    return StepTable(
        sampler=chosen.name if chosen is not None else config.class_name,
        timesteps=np.array([row.t for row in rows], np.float32),
        rows=numbers.astype(np.float32),
        draws=tuple(row.draws for row in rows),
        float32_noise=known.run is dpm_multistep,
        init_noise_sigma=highest,
        start=levels[0],
        steps=rows[-1].step + 1,
        index=tuple(row.step for row in rows),
    )


def _checked_steps(config: ScheduleConfig, steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}.")
    if steps > config.num_train_timesteps:
        raise InputError(
            f"{steps} steps are more than the {config.num_train_timesteps} that the model was trained on."
        )
    return steps
