"""The configuration of a scheduler: a model's training schedule and the options of a sampler.

`scheduler_config.py` reads it from a file, `classes.py` has the defaults of each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ScheduleConfig:
    """A `scheduler_config.json` for one scheduler class, with its defaults, without keys it does not have."""

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
    use_clipped_model_output: bool = False  # of DDIM: whether the noise is that of the clamped latent
    own_timesteps: tuple[float, ...] = ()  # of a model, where as many steps are asked for as it has
    noise_scale: float = 1.0  # of a start from noise alone
    clip: float = 0.0  # the denoised latent is clamped to -clip..clip; 0: it is not
    threshold: tuple[float, float] | None = None  # it is dynamically: the quantile, and the most that it may be
    variance_type: str = "fixed_small"
    sigma_kind: str = ""  # a key of classes.SIGMA_KINDS, or one of spacing.SCHEDULES
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    log_interpolation: bool = False  # between the sigmas of training: of their logarithms, as k-diffusion
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
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
    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[float], float] | None = None
    preconditioned: bool = False  # as in EDM, arXiv:2206.00364, table 1: the network's timesteps are log(sigma) / 4
    sigma_data: float = 1.0  # the images' standard deviation; 1 where not preconditioned
    rho: float = 7.0
    s_noise: float = 1.0
    noise_sampler_seed: int | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
