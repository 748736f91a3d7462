"""The timesteps and sigmas of a sampler (`Grid`), and one call of the network in symbols (`SolverRow`).

Every sampler here is linear in its state, so a step is a linear form over seven symbols: the latent X, an anchor Y
(a second state tensor), the history M0, M1, M2, M3 (newest first) and noise N. They are unit vectors, in float64, so
that `X + (after - sigma) * slope` is both Euler's method and a row of the table that `make_table` packs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastldm.errors import InputError
from fastldm.samplers.config import ScheduleConfig

Array = npt.NDArray[np.floating[Any]]
Array32 = npt.NDArray[np.float32]

X, Y, M0, M1, M2, M3, N = np.eye(7)


class SolverRow(NamedTuple):
    """One call of the network, in symbols."""

    step: int  # index of the user's step, from 0
    t: float  # the network's timestep
    level: tuple[float, float]  # an image at this row's noise: r * init + s * noise
    x: Array  # the next latent
    y: Array = Y  # the next anchor
    m: tuple[float, float] = (
        0.0,
        1.0,
    )  # (p, q): p * latent + q * output is stored in the history; by default the output
    c_in: float = 1.0  # the network's input is c_in * latent
    draws: bool = False  # whether diffusers draws noise here
    more: Mapping[str, float] = {}


@dataclass(frozen=True)
class Grid:
    """The steps of a schedule, of which those from `begin` on are run."""

    config: ScheduleConfig
    steps: int
    begin: int
    eta: float
    alpha_bar: Array  # (T,) alphas_cumprod
    timesteps: Array  # (steps,)
    sigmas: Array = field(default_factory=lambda: np.zeros(0))  # (steps + 1,) noise over signal
    log_sigmas: Array32 = field(default_factory=lambda: np.zeros(0, np.float32))  # (T,) of the training schedule

    def bar(self, t: float, before_first: float = 1.0) -> float:
        """alphas_cumprod at a timestep."""
        return float(self.alpha_bar[int(t)]) if t >= 0 else before_first

    def stride(self, i: int) -> int:
        """How many timesteps DDIM and PLMS step down from step i of the full schedule.

        A constant stride, as in diffusers, ends within a timestep of the next step. With linspace spacing it does not
        (diffusers ends 51 of 250 timesteps too high at 5 steps), so there the stride is the actual distance.
        """
        if self.config.timestep_spacing != "linspace":
            return self.config.num_train_timesteps // self.steps
        return int(self.timesteps[i] - [*self.timesteps, -1.0][i + 1])

    @property
    def final_bar(self) -> float:
        return 1.0 if self.config.set_alpha_to_one else float(self.alpha_bar[0])

    def walk(self) -> Iterator[tuple[int, float, float, float]]:
        """(step, timestep, sigma, next sigma) of each step that is run; steps count from 0."""
        for i in range(self.begin, self.steps):
            yield i - self.begin, self.timesteps[i], self.sigmas[i], self.sigmas[i + 1]

    def remaining(self, step: int) -> int:
        """The number of steps from this one to the end."""
        return self.steps - self.begin - step

    def past(self, step: int, order: int) -> list[float]:
        """The last `order` sigmas, newest first."""
        return [float(s) for s in self.sigmas[self.begin + step :: -1][:order]]

    def denoised(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) such that p * latent + q * output is the denoised latent, for a latent alpha * x0 + sigma * noise."""
        if self.config.prediction_type == "v_prediction":
            return alpha, -sigma
        if self.config.prediction_type == "sample":
            return 0.0, 1.0
        if alpha == 0:
            raise InputError(
                "epsilon prediction cannot start at zero terminal SNR, where the latent holds no image: use a "
                "v-prediction model, timestep_spacing 'leading', or a schedule without rescale_betas_zero_snr."
            )
        return 1 / alpha, -sigma / alpha

    def x0(self, alpha: float, sigma: float, latent: Array, output: Array) -> Array:
        """The denoised latent, if the history holds the network's unchanged output."""
        p, q = self.denoised(alpha, sigma)
        return p * latent + q * output

    def epsilon(self, alpha: float, sigma: float, latent: Array, output: Array) -> Array:
        """The noise in a latent, likewise."""
        p, q = self.noise(alpha, sigma)
        return p * latent + q * output

    def noise(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) such that p * latent + q * output is the noise in the latent."""
        if self.config.prediction_type == "v_prediction":
            return sigma, alpha
        return (1 / sigma, -alpha / sigma) if self.config.prediction_type == "sample" else (0.0, 1.0)


def ancestral(sigma: float, after: float, eta: float = 1.0) -> tuple[float, float]:
    """The sigma to step down to, and the noise to add after it; at eta 0 `after`, and none.

    Down is sqrt(after^2 - up^2), which cancels if sigma is thousands of times `after`.
    """
    if eta == 1.0:
        return after**2 / sigma, after * math.sqrt(1 - (after / sigma) ** 2)
    up = min(after, eta * after * math.sqrt(1 - (after / sigma) ** 2))
    return math.sqrt(after**2 - up**2), up


def sigma_to_t(sigmas: Array, log_sigmas: Array32) -> Array:
    """Fractional timesteps at which the training schedule has these sigmas, by interpolation of their logarithm."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    reached = np.cumsum(logs >= log_sigmas[:, None], axis=0)  # at zero terminal SNR the last ones may not be ascending
    low = np.minimum(reached.argmax(axis=0), len(log_sigmas) - 2)
    weight = np.clip((log_sigmas[low] - logs) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)
