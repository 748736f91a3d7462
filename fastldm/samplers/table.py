"""From a sampler and a number of steps to a table: float32 numbers, one row per call of the network.

    model input   u  = c_in * x
    output        out = u + gm * g * (c - u)            where guided, at the request's scale g; else c
    history       m  = p * x + q * out                  the denoised latent or the noise, depending on the sampler
                  m  = clamp(m, -clip, clip)            where clip > 0
    next latent   x' = a * x + a1 * y + sum_k b_k * m_(i-k) + d * noise          k = 0..3, newest first
                       + o * out + gx * g * (c - u)     c and u: what the network predicts with and without the prompt
                  where d_ratio is not 0, d is times exp(d_ratio * (v + 1) / 2), v the network's learned variance
    next anchor   y' = e * x + e1 * y + sum_k f_k * m_(i-k)                      y: a second state tensor
    inpainting    x' = mask * x' + (1 - mask) * (r * init + s * noise0)          only where a mask is set
    deep          1 where all of the network is computed, 0 where only its shallow half is, with the deep features of
                  the last row that computed them

Prediction type, spacing, Karras / exponential / beta sigmas, zero terminal SNR and image-to-image strength only
change the numbers. The solvers are in solvers.py, the timesteps and sigmas in spacing.py, the names in names.py. All is
computed in float64 and rounded once. These files need only numpy.

Tables are those of diffusers' schedulers, except where diffusers deviates from the requested schedule:

- All classes support zero terminal SNR; diffusers drops it in seven.
- DDIM and PLMS with linspace spacing end each step where the next one starts; diffusers ends elsewhere.
- PLMS and LMS start their history at the first step after an image; diffusers' includes steps that were never run.
- EDM's exponential sigmas of one step are sigma_max; diffusers' sigma_min.
- TCD spaces the steps after an image within the strength, like LCM and as its scheduler can; diffusers' pipelines skip
  steps of the full schedule. A caller's own `timesteps` are skipped here too, so the full schedule's do the same.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.samplers import k_solvers, solvers
from fastldm.samplers.classes import CLASSES, SchedulerClass
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.grid import NO_CHURN, Array, Array32, Churn, Grid, Level, SolverRow, Span
from fastldm.samplers.names import resolve_sampler, sampler_name
from fastldm.samplers.scheduler_config import config_of
from fastldm.samplers.spacing import (
    StepRequest,
    on_consistency,
    on_inverse_lambdas,
    on_inverse_timesteps,
    on_lambdas,
    on_preconditioned,
    on_sigmas,
)

_STEP = ("c_in", "p", "q", "a", "a1", "b0", "b1", "b2", "b3", "d", "e", "e1", "f0", "f1", "f2", "f3", "r", "s")
COLUMNS = (*_STEP, "deep", "clip", "o", "d_ratio", "gm", "gx")
NEUTRAL = {"deep": 1.0, "clip": 0.0, "o": 0.0, "d_ratio": 0.0, "gm": 1.0, "gx": 0.0}
"""What the columns behind the first are where a sampler does not use them."""


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler's steps: `rows[i]` holds the numbers of call i in the order of COLUMNS."""

    sampler: str
    timesteps: Array32  # (S,) the network's timesteps, which may be fractional
    rows: Array32  # (S, len(COLUMNS))
    draws: tuple[bool, ...]  # (S,) whether diffusers draws noise at this row, even where d is 0
    float32_noise: bool  # whether diffusers draws that noise in float32 for models of any dtype
    init_noise_sigma: float  # a start from noise alone: x = init_noise_sigma * noise
    start: tuple[float, float]  # a start from an image: x = r * init + s * noise
    steps: int  # number of the user's steps; some samplers have more rows
    index: tuple[int, ...]  # (S,) the user's step, from 0, of each row
    spans: tuple[Span, ...] = ()  # (S,) of a Brownian motion in sigma, if noise is of one
    motion: tuple[float, float] = (0.0, 0.0)  # the lowest and the highest sigma of that motion
    noise_seed: int | None = None  # what the configuration has it drawn from
    threshold: tuple[float, float] | None = None  # m is thresholded: see `kernels.threshold`
    levels: tuple[Level, ...] = ()  # (S,) what the network sees, and what it says of it
    deep: tuple[bool, ...] = field(init=False)  # (S,) whether each row computes all of the network
    rare: bool = field(init=False)  # whether any row has a number that most samplers have not: `kernels.columns.RARE`

    def __post_init__(self) -> None:
        object.__setattr__(self, "deep", tuple((self.rows[:, COLUMNS.index("deep")] != 0).tolist()))
        rare = [COLUMNS.index(name) for name in ("clip", "o", "d_ratio", "gx")]
        rare_rows = bool((self.rows[:, rare] != 0).any())
        object.__setattr__(self, "rare", rare_rows or self.threshold is not None)

    def __len__(self) -> int:
        return len(self.timesteps)

    def without_noise(self) -> StepTable:
        """The same, but that what a mask keeps stays as it is: it does not come back at each step's noise level."""
        rows = self.rows.copy()
        rows[:, [COLUMNS.index("r"), COLUMNS.index("s")]] = 1.0, 0.0
        return replace(self, rows=rows)

    @property
    def depth(self) -> int:
        """The length of the history that the table reads, 1 to 4."""
        b, f = COLUMNS.index("b0"), COLUMNS.index("f0")
        read = (self.rows[:, b : b + 4] != 0).any(0) | (self.rows[:, f : f + 4] != 0).any(0)
        return 1 + max((k for k in range(4) if read[k]), default=0)

    @property
    def anchored(self) -> bool:
        """Whether the table reads the anchor."""
        return bool((self.rows[:, COLUMNS.index("a1")] != 0).any())


def make_table(
    config: ScheduleConfig,
    num_inference_steps: int,
    *,
    sampler: str | None = None,
    strength: float = 1.0,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
    churn: Churn = NO_CHURN,
    reuse: int = 1,
) -> StepTable:
    """The table of the configuration's sampler, or of another sampler on its schedule, as with diffusers'
    `from_config`.

    num_inference_steps: the user's steps. Descending `timesteps`, or `sigmas` (one more than steps, the last being the
        remaining noise), replace them if the scheduler class supports that. Timesteps may be fractional, which samplers
        of whole ones truncate, and of samplers that step from sigma to sigma negative and beyond those of training.
    sampler: a name for `resolve_sampler`.
    strength: in (0, 1], the fraction of the schedule that a start from an image runs. The first steps are skipped, as
        in diffusers' image-to-image `get_timesteps`; LCM and TCD space all steps within that fraction of the distilled.
    denoising_start, denoising_end: between 0 and 1, only the steps between these fractions of the noise that is
        removed, as of SDXL's base and refiner: those below the timestep that the first leaves, whatever the strength,
        and the calls at or above the one that the second leaves. Of samplers with two calls a step, diffusers ends
        after the first call of a step, and begins with all of it. No history crosses the cut.
    eta: from 0 to 1, the noise of DDIM and TCD; other samplers ignore it.
    churn: of Euler's method, which alone has it.
    reuse: of every so many rows, the first computes all of the network.

    Raises InputError.
    """
    if sampler is not None:
        selected = resolve_sampler(sampler)
        config = config_of(selected.class_name, {**config.raw, **selected.options}, config)
    entry, trained = CLASSES[config.class_name], config.num_train_timesteps
    custom = _custom(config, timesteps, sigmas)
    for name, values in custom.items():
        num_inference_steps = len(values) - (name == "sigmas")
    steps = num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= trained:
        raise InputError(f"num_inference_steps must be a whole number from 1 to {trained}, got {show(steps)}.")
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}.")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}.")
    if churn.s_churn and entry.solver is not solvers.euler:
        raise InputError(f"s_churn is of the sampler euler, and this is {sampler_name(config)!r}: leave it out.")
    if isinstance(reuse, bool) or not isinstance(reuse, (int, np.integer)) or reuse < 1:
        raise InputError(f"reuse must be a whole number from 1, got {show(reuse)}.")

    if denoising_start is not None:
        strength = 1.0
    spacing = on_preconditioned if config.preconditioned else entry.spacing
    ascends = spacing in (on_inverse_timesteps, on_inverse_lambdas)
    trains = config.timestep_type == "discrete" and spacing not in (on_preconditioned, on_consistency)
    whole = ascends or not trains or entry.solver is k_solvers.dpm_fast
    if whole and (denoising_start is not None or denoising_end is not None):
        raise InputError(
            f"denoising_start and denoising_end are of descending timesteps of training, and those of "
            f"{config.class_name} are not: leave them out."
        )
    arrays = spacing(config, StepRequest(int(steps), float(strength), **custom))
    times = arrays["timesteps"]
    # A caller's own timesteps may lie beyond, where noise is that of the nearest one, as with diffusers.
    beyond_has_noise = timesteps is not None and spacing in (on_sigmas, on_lambdas)
    if times.size == 0 or (trains and not beyond_has_noise and (times.min() < 0 or times.max() >= trained)):
        what = f"{steps} steps, {config.timestep_spacing}," if timesteps is None else "timesteps"
        why = "" if timesteps is None else f", and {config.class_name} has a noise level at those alone"
        raise InputError(f"{what} leave the trained timesteps, 0 to {trained - 1}{why}.")
    if arrays["begin"] >= len(times):  # lambda_min_clipped may leave less than `steps`
        enough = next((n for n in range(steps + 1, trained + 1) if int(n * strength) > 0), None)
        take = f"take {enough} steps, or more strength" if enough and len(times) == steps else "take more strength"
        raise InputError(f"strength {strength} leaves none of {steps} steps: {take}.")
    grid = Grid(config, steps=len(times), eta=eta, churn=churn, **arrays)
    rows, numbers = _rows(entry, grid)
    if denoising_start is not None:
        arrays["begin"] = _first_step(entry, rows, times, _cutoff("denoising_start", denoising_start, trained))
        if arrays["begin"] == len(times):
            raise InputError(f"denoising_start {denoising_start:g} leaves none of {steps} steps: take more steps.")
        rows, numbers = _rows(entry, replace(grid, begin=arrays["begin"]))
    if denoising_end is not None:
        cutoff = _cutoff("denoising_end", denoising_end, trained)
        rows = list(itertools.takewhile(lambda row: np.float32(row.t) >= cutoff, rows))
        if not rows:
            raise InputError(f"denoising_end {denoising_end:g} leaves none of {steps} steps: take more steps.")
        numbers = _pack(rows)
    numbers[:, COLUMNS.index("deep")] = [i % reuse == 0 for i in range(len(rows))]
    levels = arrays.get("sigmas", np.zeros(0))
    noisy = levels[levels > 0]
    motion = (float(noisy.min()), float(noisy.max())) if len(noisy) else (0.0, 0.0)
    highest = 1.0
    if spacing in (on_sigmas, on_preconditioned, on_consistency):
        highest = float(arrays["sigmas"].max())
        if spacing is on_preconditioned or (spacing is on_sigmas and config.timestep_spacing == "leading"):
            highest = math.hypot(highest, 1)
    highest *= config.noise_scale
    return StepTable(
        sampler=sampler_name(config),
        timesteps=np.array([row.t for row in rows], np.float32),
        rows=numbers.astype(np.float32),
        draws=tuple(row.draws for row in rows),
        float32_noise=entry.float32_noise and not config.preconditioned,
        init_noise_sigma=highest,
        start=rows[0].level,
        steps=rows[-1].step + 1,
        index=tuple(row.step for row in rows),
        spans=tuple(row.span for row in rows if row.span is not None),
        motion=motion,
        noise_seed=config.noise_sampler_seed,
        threshold=config.threshold,
        levels=tuple(grid.level(row) for row in rows),
    )


def _cutoff(name: str, fraction: float, trained: int) -> int:
    """The timestep at which a fraction of the noise has been removed, as diffusers rounds it."""
    if not 0 < fraction < 1:
        raise InputError(f"{name} must be above 0 and below 1, got {fraction}.")
    return round(trained - fraction * trained)


def _first_step(entry: SchedulerClass, rows: Sequence[SolverRow], times: Array, cutoff: int) -> int:
    """The first step of those below a timestep: whose last call is. PLMS' second call only repeats the first."""
    ends = list(times) if entry.solver is solvers.plms else list({row.step: row.t for row in rows}.values())
    return next((step for step, t in enumerate(ends) if np.float32(t) < cutoff), len(ends))


def _rows(entry: SchedulerClass, grid: Grid) -> tuple[list[SolverRow], Array]:
    """All rows, in symbols and packed. InputError if a step is not finite."""
    numbers, times = np.full(1, np.nan), grid.timesteps
    try:
        with np.errstate(all="ignore"):
            rows = list(entry.solver(grid))
            numbers = _pack(rows)
            finite = bool(np.isfinite(numbers.astype(np.float32)).all())
    except InputError:
        raise
    except (ArithmeticError, ValueError):  # Python floats raise where numpy returns infinity
        finite = False
    if finite:
        return rows, numbers
    repeated = times[1:][times[1:] == times[:-1]]
    reason = "has no finite steps with this configuration"
    if len(repeated):
        reason = (
            f"cannot step from timestep {repeated[0]:g} to itself: take fewer than {grid.steps} steps, or other spacing"
        )
    raise InputError(f"{grid.config.class_name} {reason}.")


def _pack(rows: Sequence[SolverRow]) -> Array:
    """The numbers of all rows, (S, len(COLUMNS)), in float64.

    With a mask, the image is blended in at the noise level of the next row, and without noise at the end.
    """
    blends = [*(row.level for row in rows[1:]), (1.0, 0.0)]
    return np.array(
        [
            (row.c_in, *row.m, *row.x, *row.y[:6], *rs, *({**NEUTRAL, **row.more}.values()))
            for row, rs in zip(rows, blends, strict=True)
        ]
    )


def _custom(
    config: ScheduleConfig, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> dict[str, Array]:
    """The caller's own timesteps or sigmas, checked."""
    provided = {name: values for name, values in (("timesteps", timesteps), ("sigmas", sigmas)) if values is not None}
    if len(provided) > 1:
        raise InputError("give timesteps or sigmas, not both.")
    custom: dict[str, Array] = {}
    for name, values in provided.items():
        supporting = [key for key, entry in CLASSES.items() if name in entry.custom]
        if config.class_name not in supporting:
            listed = ", ".join(supporting)
            raise InputError(f"{config.class_name} takes no {name}, here as in diffusers; these do: {listed}.")
        if config.preconditioned and name == "timesteps":
            raise InputError("timesteps of training are none of models in EDM's preconditioning: give sigmas.")
        if config.sigma_kind and name == "timesteps":
            raise InputError(f"timesteps cannot be given together with {config.sigma_kind} sigmas.")
        try:
            numbers = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be numbers, got {reprlib.repr(values)}.") from None
        valid = numbers.ndim == 1 and len(numbers) > (name == "sigmas") and bool(np.isfinite(numbers).all())
        if valid:
            # Noise levels may repeat, as the last one does in diffusers' `sigmas` that end at sigma_min.
            repeats = CLASSES[config.class_name].spacing in (on_sigmas, on_lambdas)
            descends = bool((np.diff(numbers) <= 0).all() if repeats else (np.diff(numbers) < 0).all())
            valid = descends and (name == "timesteps" or numbers[0] > 0 <= numbers[-1])
        if not valid:
            expected = "two or more noise levels, from above 0" if name == "sigmas" else "finite numbers"
            raise InputError(
                f"{name} must be descending and not empty: {expected}, got {reprlib.repr(numbers.tolist())}."
            )
        custom[name] = numbers
    return custom
