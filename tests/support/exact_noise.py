"""Where a sampler ends with a network that predicts the exact noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastldm.samplers import spacing
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.table import COLUMNS, make_table


def final_error(config: ScheduleConfig, steps: int, make_table: Any = make_table, **options: Any) -> float:
    """How far from the image a sampler ends if the network predicts the noise exactly.

    Every consistent method is exact then, from wherever it starts, in however few steps. Where nothing is drawn, the
    noise is that of the start; else what is in the latent beside the image, at the timestep that the network gets.
    """
    table = make_table(config, steps, **options)
    bar = spacing.alphas_cumprod(config).astype(np.float64)
    bar[-1] = max(bar[-1], 2**-24)
    levels = np.log((1 - bar) / bar)
    rng = np.random.default_rng(0)
    image, noise = rng.standard_normal((2, 50))
    x = table.start[0] * image + table.start[1] * noise
    y, history = np.zeros_like(x), [np.zeros_like(x)] * 4
    for t, numbers in zip(table.timesteps, table.rows.astype(np.float64), strict=True):
        row = dict(zip(COLUMNS, numbers, strict=True))
        alpha = 1 / np.sqrt(1 + np.exp(np.interp(t, np.arange(len(bar)), levels)))
        sigma, model_input = np.sqrt(1 - alpha**2), row["c_in"] * x
        output = (model_input - alpha * image) / sigma if any(table.draws) else noise
        if config.prediction_type == "v_prediction":
            output = alpha * output - sigma * image
        history = [row["p"] * x + row["q"] * output, *history[:3]]
        x, y = (
            row[a] * x + row[b] * y + sum(row[f"{h}{k}"] * m for k, m in enumerate(history)) + noisy
            for a, b, h, noisy in (
                ("a", "a1", "b", row["d"] * rng.standard_normal(50)),
                ("e", "e1", "f", 0.0),
            )
        )
    return float(np.abs(x - image).max())
