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


class Span(NamedTuple):
    """A part of a step from sigma to sigma, over which noise is the increment of a Brownian motion in sigma."""

    sigma: float  # where the step begins
    after: float  # and where it ends
    begin: float  # fractions of the way between the two, in log sigma
    end: float


class Level(NamedTuple):
    """What a call of the network is made with, u = signal * x0 + noise * n, and what it says of it,
    x0 = skip * u + gain * output; gain is 0 where it says nothing."""

    signal: float
    noise: float
    skip: float
    gain: float


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
    span: Span | None = None
    at: tuple[float, float] | None = None  # alpha and sigma of this row's latent; None: they are `level`
    x0: tuple[float, float] | None = None  # (p, q) of the denoised latent; None: `Grid.denoised`


@dataclass(frozen=True)
class Churn:
    """Noise that Euler's method adds before each step from a sigma in s_tmin..s_tmax, and removes in it
    (https://arxiv.org/abs/2206.00364, algorithm 2)."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def raised(self, sigma: float, steps: int) -> float:
        """The noise level that a step of so many starts from."""
        inside = self.s_tmin <= sigma <= self.s_tmax
        return sigma * (1 + min(self.s_churn / steps, math.sqrt(2) - 1)) if inside else sigma


NO_CHURN = Churn()


@dataclass(frozen=True)
class Grid:
    """The steps of a schedule, of which those from `begin` on are run."""

    config: ScheduleConfig
    steps: int
    begin: int
    eta: float
    timesteps: Array  # (steps,)
    alpha_bar: Array = field(default_factory=lambda: np.zeros(0))  # (T,) alphas_cumprod
    sigmas: Array = field(default_factory=lambda: np.zeros(0))  # (steps + 1,) noise over signal
    log_sigmas: Array32 = field(default_factory=lambda: np.zeros(0, np.float32))  # (T,) of the training schedule
    churn: Churn = NO_CHURN

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

    def c_in(self, alpha: float, sigma: float) -> float:
        """The network's input is c_in * latent, for a latent alpha * x0 + sigma * noise."""
        return 1 / math.hypot(alpha * self.config.sigma_data, sigma)

    def time(self, sigma: float) -> float:
        """The network's timestep at a noise level between two steps."""
        if self.config.preconditioned:
            return math.log(sigma) / 4
        return float(sigma_to_t(np.array([sigma]), self.log_sigmas)[0])

    def denoised(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p, q) such that p * latent + q * output is the denoised latent, for a latent alpha * x0 + sigma * noise."""
        prediction, data = self.config.prediction_type, self.config.sigma_data
        if prediction == "v_prediction" or self.config.preconditioned:  # where EDM's "epsilon" is -v
            c_in = self.c_in(alpha, sigma)
            c_out = data * sigma * c_in
            return alpha * (data * c_in) ** 2, -c_out if prediction == "v_prediction" else c_out
        if prediction == "sample":
            return 0.0, 1.0
        if alpha == 0:
            raise InputError(
                "epsilon prediction cannot start at zero terminal SNR, where the latent holds no image: use a "
                "v-prediction model, timestep_spacing 'leading', or a schedule without rescale_betas_zero_snr."
            )
        return 1 / alpha, -sigma / alpha

    def level(self, row: SolverRow) -> Level:
        """That of a row."""
        alpha, sigma = row.at or row.level
        if alpha <= 0 and self.config.prediction_type == "epsilon":
            return Level(0.0, 1.0, 0.0, 0.0)
        p, q = row.x0 or self.denoised(alpha, sigma)
        return Level(*map(float, (row.c_in * alpha, row.c_in * sigma, p / row.c_in, q)))

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
        prediction, plain = self.config.prediction_type, not self.config.preconditioned
        if plain and prediction == "epsilon":
            return 0.0, 1.0
        if plain and prediction == "sample":
            return 1 / sigma, -alpha / sigma
        c_in = self.c_in(alpha, sigma)
        q = alpha * self.config.sigma_data * c_in
        return sigma * c_in**2, q if prediction == "v_prediction" else -q

    def split(self, ratio: float) -> tuple[float, float]:
        """alpha and sigma of a latent alpha * x0 + sigma * noise with sigma / alpha = ratio: by default
        alpha^2 + sigma^2 = 1, in EDM's models alpha = 1."""
        alpha = 1.0 if self.config.preconditioned else 1 / math.hypot(ratio, 1)
        return alpha, ratio * alpha


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
