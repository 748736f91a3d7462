"""Spacing: the training schedule, and the timesteps and noise levels of a number of steps on it.

The training schedule `alphas_cumprod` is float32, as in checkpoints and diffusers; all else is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fastldm.errors import InputError
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.grid import Array, Array32, sigma_to_t

# ---- the training schedule ----


def alphas_cumprod(config: ScheduleConfig) -> Array32:
    """The training schedule, (num_train_timesteps,) float32.

    Bitwise equal to diffusers' buffer, except for the last digits at zero terminal SNR, where torch's vectorised
    square root is not always the nearest float32.

    Raises InputError for betas with which it leaves 0..1, or is 0 before the last timestep (0 there is zero terminal
    SNR).
    """
    steps, one = config.num_train_timesteps, np.float32(1)
    if config.trained_betas:
        betas = np.asarray(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        betas = _linspace32(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = _linspace32(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    else:  # squaredcos_cap_v2
        cosine = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = np.array([min(1 - after / now, 0.999) for now, after in pairwise(cosine)], np.float32)
    with np.errstate(all="ignore"):
        if config.rescale_betas_zero_snr:  # https://arxiv.org/abs/2305.08891, algorithm 1
            root = np.sqrt(_cumprod32(one - betas))
            bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            betas = one - np.append(bar[:1], bar[1:] / bar[:-1])
        bar = _cumprod32(one - betas)
    good = (bar > 0) & (bar <= 1)
    if not good[:-1].all() or not 0 <= bar[-1] <= 1:
        worst = int(good.argmin())
        raise InputError(
            f"betas leave {bar[worst]:g} of the image at timestep {worst} of {steps} (alphas_cumprod): "
            "expected above 0, except at the last, and at most 1."
        )
    return bar


def _linspace32(start: float, end: float, steps: int) -> Array32:
    """torch.linspace: a float32 step and fused multiply-adds, counted from the nearer end."""
    first, last, i = np.float32(start), np.float32(end), np.arange(steps)
    step = float((last - first) / np.float32(max(steps - 1, 1)))
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _cumprod32(x: Array32) -> Array32:
    """torch.cumprod: on a CPU, float32 accumulates in float64."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


# ---- the steps of samplers ----

GridArrays = dict[str, Any]  # arguments of a Grid: its arrays, and `begin`


@dataclass(frozen=True)
class StepRequest:
    """Requested steps: a number of steps and the strength, or the caller's own timesteps or sigmas."""

    steps: int
    strength: float = 1.0
    timesteps: Array | None = None  # (steps,)
    sigmas: Array | None = None  # (steps + 1,)

    @property
    def begin(self) -> int:
        """The number of steps that a start from an image skips, as in diffusers' `get_timesteps`."""
        return self.steps - min(int(self.steps * self.strength), self.steps)


def _spaced(config: ScheduleConfig, n: int, last: int, extra: int = 0) -> Array:
    """n timesteps, descending from below `last`: the first of n + `extra` spaced ones."""
    if config.timestep_spacing == "linspace" and config.log_interpolation:
        return np.linspace(last - 1, 0, n)  # whose one step is from the top: diffusers' is from the bottom
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, n + extra)[::-1][:n]
    if config.timestep_spacing == "leading":
        return np.arange(n + extra)[::-1][:n] * (last // (n + extra)) + float(config.steps_offset)
    return np.arange(last, 0, -config.num_train_timesteps / n).round()[:n] - 1.0


# Noise levels of ten steps, the last of which is replaced by 0, published at
# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html (arXiv:2404.14507): Stable Diffusion 1.5 and XL.
_ALIGNED = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.029),
}
SCHEDULES = ("normal", "simple", "sgm uniform", "ddim uniform", "kl optimal", *_ALIGNED)
"""Of other programs: what `scheduled` makes, for all classes that step from sigma to sigma."""


def scheduled(schedule: str, n: int, trained: Array) -> Array:
    """The sigmas of n steps, or about n with "ddim uniform", without the 0 behind them, as ComfyUI makes them.

    trained: (T,), of the training schedule, ascending.
    """
    last = len(trained) - 1
    if schedule == "kl optimal":  # arXiv:2404.14507, its schedule for Gaussian data
        return np.tan(np.linspace(math.atan(trained[-1]), math.atan(trained[0]), n))
    with np.errstate(divide="ignore"):  # betas that start with 0
        logs = np.log(trained)
    if schedule in _ALIGNED:
        levels = np.log(_ALIGNED[schedule])
        return np.exp(np.interp(np.linspace(0, 1, n + 1)[:-1], np.linspace(0, 1, len(levels)), levels))
    if schedule == "simple":
        times = last - np.floor(np.arange(n) * (len(trained) / n))
    elif schedule == "ddim uniform":
        times = np.arange(1, last + 1, max(len(trained) // n, 1))[::-1]
    elif schedule == "sgm uniform":
        times = np.linspace(last, 0, n + 1)[:-1]
    else:
        times = np.linspace(last, 0, n)
    return np.exp(np.interp(times, np.arange(last + 1), logs))


def on_timesteps(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Whole timesteps of the training schedule."""
    bar, custom = alphas_cumprod(config).astype(np.float64), request.timesteps
    if custom is None and len(config.own_timesteps) == request.steps:
        custom = np.array(config.own_timesteps)
    timesteps = _spaced(config, request.steps, len(bar)).round() if custom is None else np.trunc(custom)
    return {"begin": request.begin, "alpha_bar": bar, "timesteps": timesteps}


def on_inverse_timesteps(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """The same, ascending: from an image to noise."""
    arrays = on_timesteps(config, _whole(config, request))
    return {**arrays, "timesteps": arrays["timesteps"][::-1]}


def _whole(config: ScheduleConfig, request: StepRequest) -> StepRequest:
    """InputError unless all steps are run."""
    if request.strength < 1:
        raise InputError(f"{config.class_name} goes from an image to its noise: set strength 1, with the image.")
    return request


def on_ends(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Whole timesteps from the last of training to the first, both among them."""
    if request.steps == 1:
        raise InputError(f"{config.class_name} takes two steps or more, from the last timestep to the first.")
    bar = alphas_cumprod(config).astype(np.float64)
    timesteps = (np.arange(request.steps)[::-1] * ((len(bar) - 1) / (request.steps - 1))).round()
    return {"begin": request.begin, "alpha_bar": bar, "timesteps": timesteps}


def on_preconditioned(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Noise levels of EDM's models, https://arxiv.org/abs/2206.00364, whose timesteps are log(sigma) / 4."""
    low = float(config.sigma_min or 0.0)
    sigmas = _respaced(config, request.steps, 0.0, low) if request.sigmas is None else request.sigmas[:-1]
    last = (0.0 if config.final_sigmas_type == "zero" else low) if request.sigmas is None else request.sigmas[-1]
    return {"begin": request.begin, "timesteps": np.log(sigmas) / 4, "sigmas": np.append(sigmas, last)}


def on_consistency(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Noise levels of consistency models, https://arxiv.org/abs/2303.01469: of EDM's, every so many.

    A caller's timesteps count the levels of training from the highest, as diffusers' does.
    """
    trained, custom = config.num_train_timesteps, request.timesteps
    index = np.arange(request.steps) * (trained // request.steps) if custom is None else np.trunc(custom)[::-1]
    if index.max() >= trained:
        raise InputError(f"timesteps of {config.class_name} leave the trained timesteps, 0 to {trained - 1}.")
    high, low = (float(level or 0.0) ** (1 / config.rho) for level in (config.sigma_max, config.sigma_min))
    sigmas = (high + index / (trained - 1) * (low - high)) ** config.rho
    last = float(config.sigma_min or 0.0)
    return {"begin": request.begin, "timesteps": 250 * np.log(sigmas), "sigmas": np.append(sigmas, last)}


def on_distilled_timesteps(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Timesteps that a distilled model was trained with.

    A start from an image takes all steps: they are spaced within `strength` of the distilled ones, while other
    schedules skip their first steps. A caller's own timesteps are skipped as in other schedules.
    """
    if request.timesteps is not None:
        return on_timesteps(config, request)
    bar, trained = alphas_cumprod(config).astype(np.float64), config.original_inference_steps
    distilled_steps = int(trained * request.strength)
    if request.steps > distilled_steps:
        raise InputError(
            f"{request.steps} steps are more than the {distilled_steps} of distillation (original_inference_steps "
            f"{trained}) that strength {request.strength:g} leaves: take fewer steps, or more strength."
        )
    distilled = np.arange(distilled_steps, 0, -1) * (len(bar) // trained) - 1.0
    timesteps = distilled[np.floor(np.linspace(0, distilled_steps, request.steps, endpoint=False)).astype(int)]
    return {"begin": 0, "alpha_bar": bar, "timesteps": timesteps}


def on_sigmas(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Fractional timesteps; sigmas are interpolated between those of training."""
    bar, trained, logs = _trained_sigmas(config)
    if request.sigmas is not None:
        t, sigmas = sigma_to_t(request.sigmas[:-1], logs), request.sigmas
    else:
        spaced = _spaced(config, request.steps, len(bar)) if request.timesteps is None else request.timesteps
        t = spaced.astype(np.float32).astype(np.float64)
        if config.interpolation_type == "log_linear":  # so many levels, and 0 behind them, whatever the timesteps
            sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), len(t) + 1))
        elif config.log_interpolation:
            with np.errstate(divide="ignore"):  # betas that start with 0
                sigmas = np.exp(np.interp(t, np.arange(len(bar)), np.log(trained)))
        else:
            sigmas = np.interp(t, np.arange(len(bar)), trained)
        if config.sigma_kind in SCHEDULES:
            sigmas = scheduled(config.sigma_kind, request.steps, trained)
            t = sigma_to_t(sigmas, logs)
        elif config.sigma_kind:
            sigmas = _respaced(config, request.steps, sigmas[0], sigmas[-1])
            t = sigma_to_t(sigmas, logs)
            t = t.round() if config.sigma_kind == "karras" and config.class_name.startswith("KDPM2") else t
        sigmas = np.append(sigmas, trained[0] if config.final_sigmas_type == "sigma_min" else 0.0)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        t = np.log(sigmas[:-1]) / 4
    begin = (replace(request, steps=len(t)) if config.sigma_kind in SCHEDULES else request).begin
    return {"begin": begin, "alpha_bar": bar, "timesteps": t, "sigmas": sigmas, "log_sigmas": logs}


def on_inverse_lambdas(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Whole timesteps, ascending, to the highest one: from an image to noise."""
    bar, trained, logs = _trained_sigmas(config)
    n = _whole(config, request).steps
    if config.sigma_kind:
        sigmas = _respaced(config, n, trained[0], trained[-1])
        t = sigma_to_t(sigmas, logs)
        t, last = t.round() if config.sigma_kind == "karras" else np.trunc(t), sigmas[-1]
    else:
        below = len(bar) - int(np.searchsorted(-logs[::-1], config.lambda_min_clipped))
        t = _spaced(config, n, below, extra=1).round()[::-1]
        if config.timestep_spacing == "leading":  # from the first timestep, not to the last
            t = t - below // (n + 1)
        if config.timestep_spacing == "linspace":
            t = np.linspace(0, below - 1, n + 1).round()[:-1]
        sigmas = np.interp(t, np.arange(len(bar)), trained)
        last = trained[below - 1]
    if (np.diff(t) == 0).any():
        raise InputError(f"{config.class_name} gives two of {n} steps one timestep: take fewer steps.")
    sigmas = np.append(sigmas, last)
    return {"begin": 0, "alpha_bar": bar, "timesteps": t, "sigmas": sigmas, "log_sigmas": logs}


_LAST_TWICE = ("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler")


def on_lambdas(config: ScheduleConfig, request: StepRequest) -> GridArrays:
    """Whole timesteps, without the lowest one."""
    bar, trained, logs = _trained_sigmas(config)
    last, n = trained[0], request.steps
    if config.sigma_kind in SCHEDULES:
        sigmas = scheduled(config.sigma_kind, n, trained)
        t, n = sigma_to_t(sigmas, logs).round(), len(sigmas)
    elif config.sigma_kind:
        sigmas = _respaced(config, n, trained[-1], trained[0])
        if config.sigma_kind == "lu":  # https://arxiv.org/abs/2206.00927, uniform in lambda
            # Python floats: numpy would compute in float32 between float32 ends.
            sigmas = np.exp(np.linspace(float(logs[-1]), float(logs[0]), n))
        t = sigma_to_t(sigmas, logs)
        cosine = config.beta_schedule == "squaredcos_cap_v2" and config.class_name == "DPMSolverMultistepScheduler"
        t = t.round() if config.sigma_kind in ("karras", "lu") and not cosine else t
        last = sigmas[-1] if config.class_name in _LAST_TWICE else last
    else:
        below = len(bar) - int(np.searchsorted(-logs[::-1], config.lambda_min_clipped))
        t = _spaced(config, n, below, extra=1).round() if request.timesteps is None else request.timesteps
        sigmas = np.interp(np.trunc(t), np.arange(len(bar)), trained)
    sigmas = np.append(sigmas, 0.0 if config.final_sigmas_type == "zero" else last)
    begin = replace(request, steps=n).begin
    return {"begin": begin, "alpha_bar": bar, "timesteps": np.trunc(t), "sigmas": sigmas, "log_sigmas": logs}


def _trained_sigmas(config: ScheduleConfig) -> tuple[Array, Array, Array32]:
    """alphas_cumprod, sigmas, and their float32 logarithm, on which rounded timesteps depend."""
    bar = alphas_cumprod(config)
    if bar[-1] == 0:
        bar[-1] = 2**-24  # zero terminal SNR: diffusers' replacement value
    sigmas = np.sqrt((1 - bar) / bar)
    with np.errstate(divide="ignore"):  # betas that start with 0
        return bar.astype(np.float64), sigmas.astype(np.float64), np.log(sigmas)


def _respaced(config: ScheduleConfig, n: int, high: float, low: float) -> Array:
    """n sigmas from high to low, spaced as `config.sigma_kind` says."""
    high = high if config.sigma_max is None else config.sigma_max
    low = low if config.sigma_min is None else config.sigma_min
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise InputError(f"{config.sigma_kind} sigmas go from {high:g} to {low:g}: both must be above 0, and finite.")
    ramp = np.linspace(0, 1, n)
    if config.sigma_kind == "karras":  # https://arxiv.org/abs/2206.00364, equation 5
        first, last = high ** (1 / config.rho), low ** (1 / config.rho)
        return (first + ramp * (last - first)) ** config.rho
    if config.sigma_kind == "beta":  # https://arxiv.org/abs/2407.12173
        return low + beta_quantile(1 - ramp) * (high - low)
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta_quantile(probability: Array, shape: float = 0.6) -> Array:
    """Quantiles of the Beta(shape, shape) distribution, as scipy.stats.beta.ppf.

    Newton's method on the power series of the regularized incomplete beta function, on the lower half, where it
    converges fast.
    """
    lower = np.minimum(probability, 1 - probability)
    k = np.arange(64)
    series = np.cumprod(np.append(1.0, (k[1:] - shape) / k[1:])) / (shape + k)
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = np.minimum((lower * shape * total) ** (1 / shape), 0.5)
    for _ in range(8):
        positive = np.where(x > 0, x, 0.5)
        excess = positive**shape * (positive[:, None] ** k @ series) / total - lower
        x = np.where(x > 0, np.clip(positive - excess * total / (positive * (1 - positive)) ** (shape - 1), 0, 0.5), 0)
    return np.where(probability > 0.5, 1 - x, x)
