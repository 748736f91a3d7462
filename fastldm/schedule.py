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

COLUMNS = ("c_in", "p", "q", "a", "a1", "b0", "b1", "b2", "b3", "d", "e", "e1", "f0", "f1", "f2", "f3", "r", "s")
X, Y, M0, M1, M2, M3, N = np.eye(7)  # the symbols a sampler is written in: latent, anchor, history newest first, noise


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
    keys = CLASSES[class_name].keys
    values: dict[str, Any] = {**keys, **{k: v for k, v in given.items() if k in keys}}
    for key, (allowed, why) in _REFUSED.items():
        if given.get(key) not in allowed:
            raise InputError(f"scheduler_config.json: {key}={given[key]!r} is not supported: {why}.")
    kinds = [kind for kind in ("karras", "exponential", "beta", "lu") if values.get(_KIND_KEYS[kind])]
    if len(kinds) > 1:
        raise InputError(f"scheduler_config.json: only one sigma schedule can be used, got {' and '.join(kinds)}.")
    if "use_karras_sigmas" in keys:
        values |= {k: given.get(k) for k in ("sigma_min", "sigma_max")}
    for key in ("trained_betas", "disable_corrector"):
        if values.get(key) is not None:
            values[key] = tuple(values[key])
    for key, names in CLASSES[class_name].names.items():
        if values[key] in names:
            values[key] = names[values[key]]
        elif values[key] not in names.values():
            raise InputError(
                f"{class_name}: {key}={values[key]!r} is not supported; it must be one of {', '.join(map(str, set(names.values())))}."
            )
    known = {f.name for f in fields(ScheduleConfig)}
    values = {k: v for k, v in values.items() if k in known}
    return ScheduleConfig(class_name=class_name, sigma_kind=kinds[0] if kinds else "", given=dict(given), **values)
