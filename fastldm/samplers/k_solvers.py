"""Solvers of k-diffusion and of ComfyUI that diffusers has not, and the CFG++ forms of some.

They work on latents x0 + sigma * noise, and their history is the denoised latent but where a docstring says otherwise.
Each is written from the paper or the function that its docstring names.

CFG++ (https://arxiv.org/abs/2406.08070) denoises with guidance, and renoises with what the network predicts without:
with D and U the denoised latents with and without guidance, Euler's step to sigma' is D + sigma' (X - U) / sigma. D - U
is the guidance scale times what the network predicts with the prompt less what it predicts without, times q: so it is
the column `gx`. Where it enters as M0 does, the column `gm` multiplies the scale, and the history holds D, or U at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from fastldm.samplers.grid import M0, M1, M2, M3, Array, Grid, N, SolverRow, Span, X, Y, ancestral


def _row(
    grid: Grid,
    step: int,
    t: float,
    sigma: float,
    x: Array,
    y: Array = Y,
    *,
    draws: bool = False,
    more: Mapping[str, float] = {},
) -> SolverRow:
    return SolverRow(step, t, (1.0, sigma), x, y, grid.denoised(1.0, sigma), grid.c_in(1.0, sigma), draws, more)


def _towards(latent: Array, denoised: Array, ratio: float) -> Array:
    """The latent at `ratio` of its noise level, on the line to the denoised one."""
    return ratio * latent + (1 - ratio) * denoised


def dpmpp_2s_ancestral(grid: Grid, cfg_pp: bool = False) -> Iterator[SolverRow]:
    """k-diffusion's sample_dpmpp_2s_ancestral: DPM-Solver++(2S), https://arxiv.org/abs/2211.01095, down to the sigma of
    `ancestral`, then noise. With CFG++ each step begins at X + D - U, as in ComfyUI."""
    for i, t, sigma, after in grid.walk():
        down, up = ancestral(sigma, after)
        if down == 0:
            yield _row(grid, i, t, sigma, M0)
            continue
        middle, start = math.sqrt(sigma * down), Y
        if cfg_pp:
            q = grid.denoised(1.0, sigma)[1]
            yield _row(grid, i, t, sigma, _towards(X, M0, middle / sigma), more={"gx": middle / sigma * q})
            start = (X - (1 - middle / sigma) * M1) * sigma / middle
        else:
            yield _row(grid, i, t, sigma, _towards(X, M0, middle / sigma), X)
        x = _towards(start, M0, down / sigma) + up * N
        yield _row(grid, i, grid.time(middle), middle, x, draws=True)


def dpmpp_sde(grid: Grid, brownian: bool = True) -> Iterator[SolverRow]:
    """k-diffusion's sample_dpmpp_sde with r = 1/2, https://arxiv.org/abs/2211.01095: both calls' noise is of one
    Brownian motion in sigma, so that the second's contains the first's. diffusers' DPMSolverSDEScheduler is the same;
    a picture that is masked between the calls has the noise of the step's end there.

    Not brownian: SEEDS-2, https://arxiv.org/abs/2305.14267, whose second noise is what is left of the first's, and
    fresh. Its steps are the same.
    """
    for i, t, sigma, after in grid.walk():
        if after == 0:
            row = _row(grid, i, t, sigma, M0)
            yield row._replace(span=Span(sigma, 0.0, 0.0, 1.0)) if brownian else row
            continue
        middle = math.sqrt(sigma * after)
        down, up = ancestral(sigma, middle)
        first = _towards(X, M0, down / sigma) + up * N
        row = _row(grid, i, t, sigma, first, X, draws=True)
        yield row._replace(span=Span(sigma, after, 0.0, 0.5)) if brownian else row
        noise = (X - _towards(Y, M1, down / sigma)) / up  # of the first call, from where it led
        down, up = ancestral(sigma, after)
        decay = after / sigma
        share = (sigma - middle) / (sigma - after) if brownian else decay / (1 + decay)
        noise = math.sqrt(share) * noise + math.sqrt(1 - share) * N
        x = _towards(Y, M0, down / sigma) + up * noise
        row = _row(grid, i, grid.time(middle), middle, x, draws=True)
        row = row._replace(span=Span(sigma, after, 0.5, 1.0)) if brownian else row
        moved = grid.config.class_name == "DPMSolverSDEScheduler"
        yield row._replace(level=(1.0, after), at=row.level) if moved else row


def dpm_fast(grid: Grid) -> Iterator[SolverRow]:
    """k-diffusion's sample_dpm_fast: DPM-Solver, https://arxiv.org/abs/2206.00927, singlestep, in steps of equal length
    in log sigma from the first noise level to the last one above 0: of order 3, and the last of what calls are left. A
    row is a call; the history holds slopes, the anchor is the latent at the start of its step."""
    calls = grid.remaining(0)
    levels = [float(level) for level in grid.sigmas[grid.begin :] if level > 0]
    if calls == 1:
        levels.append(float(grid.config.sigma_min or math.exp(grid.log_sigmas[0])))
    full, rest = divmod(calls, 3)
    orders = [3] * full + [rest] if rest else [3] * (full - 1) + [2, 1]
    ends = np.exp(np.linspace(math.log(levels[0]), math.log(levels[-1]), len(orders) + 1)).tolist()
    call = 0
    for order, (sigma, after) in zip(orders, pairwise(ends), strict=True):
        h = math.log(sigma / after)
        for k in range(order):
            to = after if k + 1 == order else sigma * math.exp(-h * (k + 1) / order)
            u = h * (k + 1) / order
            change = math.expm1(u) * (M0, M1, M2)[k]
            if k == 1:
                change = change + (math.expm1(u) if order == 2 else 2 * (math.expm1(u) / u - 1)) * (M0 - M1)
            if k == 2:
                change = change + 3 / 2 * (math.expm1(u) / u - 1) * (M0 - M2)
            level = sigma * math.exp(-h * k / order)
            x = (Y if k else X) - to * change
            row = _row(grid, call, grid.time(level), level, x, Y if k else X)
            yield row._replace(m=grid.noise(1.0, level))
            call += 1


def heunpp2(grid: Grid) -> Iterator[SolverRow]:
    """ComfyUI's sample_heunpp2: the slopes at the starts of this step and the next two, weighed by their sigmas."""
    first = float(grid.sigmas[grid.begin])
    for i, t, sigma, after in grid.walk():
        stages = min(grid.remaining(i), 3)
        times = grid.timesteps[grid.begin + i :]
        levels = grid.sigmas[grid.begin + i :]
        step = after - sigma
        yield _row(grid, i, t, sigma, X + step * (X - M0) / sigma, X)
        if stages == 1:
            continue
        weights = [float(level) / (stages * first) for level in levels[1:stages]]
        weights = [1 - sum(weights), *weights]
        calls = (M0, M1, M2)[:stages][::-1]  # the denoised latents of this step's calls, the first one's first
        origin, slopes = Y, []  # of the calls before the last, which is at X
        for level, later, denoised in zip(levels, levels[1:], calls[:-1], strict=False):
            slopes.append((origin - denoised) / level)
            origin = origin + (later - level) * slopes[-1]
        if stages == 3:
            level, later = float(levels[1]), float(levels[2])
            yield _row(grid, i, times[1], level, X + (later - level) * (X - M0) / level)
        slopes.append((X - M0) / levels[stages - 1])
        x = Y + step * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        yield _row(grid, i, times[stages - 1], float(levels[stages - 1]), x)


def res_multistep(grid: Grid, eta: float = 0.0, cfg_pp: bool = False) -> Iterator[SolverRow]:
    """ComfyUI's res_multistep: the second-order exponential multistep method of https://arxiv.org/abs/2308.02157.

    With CFG++ the history holds U, and each step begins at X + D - U.
    """
    came_to = math.nan  # the sigma to which the last step led, before its noise
    for i, t, sigma, after in grid.walk():
        down, up = ancestral(sigma, after, eta)
        q = grid.denoised(1.0, sigma)[1]
        ratio = down / sigma
        if down == 0 or i == 0:
            x, gx = _towards(X, M0, ratio), q
        else:
            h = -math.log(ratio)
            c2 = math.log(came_to / grid.past(i, 2)[1]) / h
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            x, gx = ratio * X + h * ((phi1 - phi2 / c2) * M0 + phi2 / c2 * M1), ratio * q
        came_to = down
        draws = eta > 0 and after > 0
        more = {"gm": 0.0, "gx": gx} if cfg_pp else {}
        yield _row(grid, i, t, sigma, x + up * N if draws else x, draws=draws, more=more)


def gradient_estimation(grid: Grid, cfg_pp: bool = False) -> Iterator[SolverRow]:
    """https://openreview.net/forum?id=o2ND9v0CeK, gamma = 2, as ComfyUI's: Euler's step, and on along the change of the
    slope. The history holds slopes, with CFG++ those without guidance."""
    gamma = 2.0
    for i, t, sigma, after in grid.walk():
        x = X + (after - sigma) * M0
        if after > 0 and i > 0:
            x = x + (gamma - 1) * (after - sigma) * (M0 - M1)
        more = {"gm": 0.0, "gx": grid.denoised(1.0, sigma)[1]} if cfg_pp else {}
        yield _row(grid, i, t, sigma, x, more=more)._replace(m=grid.noise(1.0, sigma))


def er_sde(grid: Grid) -> Iterator[SolverRow]:
    """ER-SDE-Solver-3, https://arxiv.org/abs/2309.06169, as ComfyUI's: noise by x (exp(x^0.3) + 10), whose integrals
    are sums over 200 points."""

    def scale(x: Array | float) -> Array:
        return np.asarray(x * (np.exp(np.asarray(x) ** 0.3) + 10))

    points = 200
    for i, t, sigma, after in grid.walk():
        if after == 0:
            yield _row(grid, i, t, sigma, M0)
            continue
        ratio = float(scale(after) / scale(sigma))
        x = _towards(X, M0, ratio)
        past = grid.past(i, min(i + 1, 3))
        width = (sigma - after) / points
        at = after + np.arange(points) * width
        if len(past) > 1:
            slope = (M0 - M1) / (sigma - past[1])
            x = x + (after - sigma + float((1 / scale(at)).sum() * width * scale(after))) * slope
        if len(past) > 2:
            curve = (slope - (M1 - M2) / (past[1] - past[2])) / ((sigma - past[2]) / 2)
            integral = float(((at - sigma) / scale(at)).sum() * width * scale(after))
            x = x + ((after - sigma) ** 2 / 2 + integral) * curve
        deviation = math.sqrt(max(after**2 - (sigma * ratio) ** 2, 0))
        yield _row(grid, i, t, sigma, x + deviation * N, draws=True)


def ipndm(grid: Grid) -> Iterator[SolverRow]:
    """ComfyUI's sample_ipndm, https://arxiv.org/abs/2204.13902: Adams and Bashforth's fourth order with the weights of
    equal steps. The history holds slopes."""
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    for i, t, sigma, after in grid.walk():
        own = weights[min(i, 3)] if after > 0 else weights[0]
        slope = sum(weight * m for weight, m in zip(own, (M0, M1, M2, M3), strict=False))
        yield _row(grid, i, t, sigma, X + (after - sigma) * slope)._replace(m=grid.noise(1.0, sigma))


def euler_cfg_pp(grid: Grid, eta: float = 0.0) -> Iterator[SolverRow]:
    """CFG++ with Euler's method, and with eta 1 down to the sigma of `ancestral`, then noise."""
    for i, t, sigma, after in grid.walk():
        down, up = ancestral(sigma, after, eta)
        x = _towards(X, M0, down / sigma)
        draws = eta > 0 and after > 0
        yield _row(grid, i, t, sigma, x + up * N if draws else x, draws=draws, more={"gm": sigma / (sigma - down)})


def dpmpp_2m_cfg_pp(grid: Grid) -> Iterator[SolverRow]:
    """DPM-Solver++(2M) with CFG++, as ComfyUI's sample_dpmpp_2m_cfg_pp. The history holds U."""
    for i, t, sigma, after in grid.walk():
        ratio, curve = after / sigma, 0.0
        if i > 0 and after > 0:
            curve = (1 - ratio) * math.log(ratio) / math.log(sigma / grid.past(i, 2)[1]) / 2
        x = ratio * X + (1 + curve - ratio) * M0 - curve * M1
        yield _row(grid, i, t, sigma, x, more={"gm": 0.0, "gx": (1 + curve) * grid.denoised(1.0, sigma)[1]})
