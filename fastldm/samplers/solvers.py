"""Solvers: each is a pure function from a `Grid` to its rows, written as in its paper.

Formulas and details are those of diffusers' scheduler of the same name, with which the tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastldm.errors import InputError
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.grid import M0, M1, M2, M3, Array, Grid, N, SolverRow, X, Y, ancestral

# ---- on latents sqrt(bar) * x0 + sqrt(1 - bar) * noise ----


def _clamped(grid: Grid, row: SolverRow, m: tuple[float, float], o: float = 0.0) -> SolverRow:
    """The row with the denoised latent, p * latent + q * output, in the history, clamped as the configuration says, and
    `o` of the unchanged output in the next latent."""
    return row._replace(m=m, more={"clip": grid.config.clip, "o": o})


def ddpm(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2006.11239, equations 6 and 7."""
    times = [*grid.timesteps, -1.0]
    for i in range(grid.begin, grid.steps):
        t, now, after = times[i], grid.bar(times[i]), grid.bar(times[i + 1])
        alpha, sigma, beta = math.sqrt(now), math.sqrt(1 - now), 1 - now / after
        x0 = M0 if grid.config.clip else grid.x0(alpha, sigma, X, M0)
        x = math.sqrt(after) * beta / (1 - now) * x0 + math.sqrt(now / after) * (1 - after) / (1 - now) * X
        more = {}
        if t > 0:
            small = max((1 - after) / (1 - now) * beta, 1e-20)
            x = x + math.sqrt(beta if grid.config.variance_type == "fixed_large" else small) * N
            if grid.config.variance_type == "learned_range":
                more["d_ratio"] = math.log(beta / small) / 2
        row = SolverRow(i - grid.begin, t, (alpha, sigma), x, draws=bool(t > 0))
        row = _clamped(grid, row, grid.denoised(alpha, sigma)) if grid.config.clip else row
        yield row._replace(more={**row.more, **more})


def ddim(grid: Grid, cfg_pp: bool = False, inverse: bool = False) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2010.02502, equation 12; with CFG++ https://arxiv.org/abs/2406.08070, algorithm 1.

    Inverse: https://arxiv.org/abs/2105.05233, section 4.2 of its appendix F: from an image to its noise.
    """
    eta = 0.0 if inverse else grid.eta
    for i in range(grid.begin, grid.steps):
        t = grid.timesteps[i]
        now, after = grid.bar(t), grid.bar(t - grid.stride(i), grid.final_bar)
        now, after = (after, now) if inverse else (now, after)
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        deviation = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after)) if eta else 0.0
        noise = math.sqrt(max(1 - after - deviation**2, 0))
        if grid.config.clip:  # the denoised latent is clamped; the noise is that of the unchanged output
            p, q = grid.noise(alpha, sigma)
            clamped = math.sqrt(after) * M0 + noise * p * X + deviation * N
            if grid.config.use_clipped_model_output:  # or that of the clamped latent
                clamped, q = math.sqrt(after) * M0 + noise * (X - alpha * M0) / sigma + deviation * N, 0.0
            row = SolverRow(i - grid.begin, t, (alpha, sigma), clamped, draws=eta > 0)
            yield _clamped(grid, row, grid.denoised(alpha, sigma), noise * q)
            continue
        x = math.sqrt(after) * grid.x0(alpha, sigma, X, M0)
        x = x + noise * grid.epsilon(alpha, sigma, X, M0) + deviation * N
        # With CFG++ guidance changes x0 alone, not the noise: as a factor of what it does to both.
        more = {"gm": sigma / (sigma - noise * alpha / math.sqrt(after))} if cfg_pp else {}
        yield SolverRow(i - grid.begin, t, (alpha, sigma), x, draws=eta > 0, more=more)


def plms(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2202.09778, the linear multistep method, on the network's unchanged output.

    The second call repeats the first step with the network's output at its end, and is not used afterwards: the history
    skips it, and the anchor stores the first output, which the fourth order needs three calls later. The repeated step
    is the first that is run: diffusers repeats the first of the full schedule, and if a start from an image skips that,
    it steps to the same level twice and lags by one step from then on.
    """
    third, fourth = 23 * M0 - 16 * M1 + 5 * Y, 55 * M0 - 59 * M1 + 37 * M2  # Adams-Bashforth, without the last term
    forms = M0, (M0 + M1) / 2, (3 * M0 - Y) / 2, third / 12, (fourth - 9 * Y) / 24, (fourth - 9 * M3) / 24
    steps = grid.timesteps[grid.begin :]
    for i, t in enumerate([*steps[:2], *steps[1:]]):
        step = max(i - 1, 0)
        stride = grid.stride(grid.begin + step)
        form, (origin, source) = forms[min(i, 5)], (Y, t + stride) if i == 1 else (X, t)
        now, after = grid.bar(source), grid.bar(source - stride, grid.final_bar)
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        x = math.sqrt(after) * grid.x0(alpha, sigma, origin, form)
        x = x + math.sqrt(1 - after) * grid.epsilon(alpha, sigma, origin, form)
        anchor = (X, M1)[i] if i < 2 else Y
        yield SolverRow(step, t, (math.sqrt(grid.bar(t)), math.sqrt(1 - grid.bar(t))), x, anchor)


def lcm(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2310.04378, algorithm 3: jump to the denoised latent, then add the noise of the next
    step.
    """
    for i in range(grid.begin, grid.steps):
        t, final = grid.timesteps[i], i + 1 == grid.steps
        now, scaled = grid.bar(t), t * grid.config.timestep_scaling
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        x0 = M0 if grid.config.clip else grid.x0(alpha, sigma, X, M0)
        x = scaled / math.hypot(scaled, 0.5) * x0 + 0.25 / (scaled**2 + 0.25) * X
        if not final:
            after = grid.bar(grid.timesteps[i + 1])
            x = math.sqrt(after) * x + math.sqrt(1 - after) * N
        row = SolverRow(i - grid.begin, t, (alpha, sigma), x, draws=not final)
        yield _clamped(grid, row, grid.denoised(alpha, sigma)) if grid.config.clip else row


def tcd(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2402.19159, strategic stochastic sampling: down to (1 - eta) of the next time, then
    noise up to it.
    """
    times = [*grid.timesteps, 0.0]
    for i in range(grid.begin, grid.steps):
        t, now, after = times[i], grid.bar(times[i]), grid.bar(times[i + 1])
        between = grid.bar(np.floor(np.float32(1 - grid.eta) * np.float32(times[i + 1])))  # diffusers' rounding
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        x = math.sqrt(between) * grid.x0(alpha, sigma, X, M0)
        x = x + math.sqrt(1 - between) * grid.epsilon(alpha, sigma, X, M0)
        draws = grid.eta > 0 and i + 1 < grid.steps
        if draws:
            x = math.sqrt(after / between) * x + math.sqrt(1 - after / between) * N
        yield SolverRow(i - grid.begin, t, (alpha, sigma), x, draws=draws)


# ---- on latents x0 + sigma * noise ----


def _row(grid: Grid, step: int, t: float, sigma: float, x: Array, y: Array = Y, draws: bool = False) -> SolverRow:
    return SolverRow(step, t, (1.0, sigma), x, y, c_in=grid.c_in(1.0, sigma), draws=draws)


def _slope(grid: Grid, sigma: float, latent: Array, output: Array) -> Array:
    """d latent / d sigma."""
    return (latent - grid.x0(1.0, sigma, latent, output)) / sigma


def euler(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2206.00364, algorithm 2. The network is called before the noise of `grid.churn`, as in
    diffusers; where it predicts v, its output is also read at that noise level."""
    for i, t, sigma, after in grid.walk():
        raised = grid.churn.raised(sigma, len(grid.sigmas) - 1)
        x = X + grid.churn.s_noise * math.sqrt(raised**2 - sigma**2) * N
        v = grid.config.prediction_type == "v_prediction" and not grid.config.preconditioned
        denoised = grid.x0(1.0, sigma if v else raised, x, M0)
        yield _row(grid, i, t, sigma, x + (after - raised) * (x - denoised) / raised, draws=raised > sigma)


def euler_ancestral(grid: Grid) -> Iterator[SolverRow]:
    """k-diffusion's sample_euler_ancestral."""
    for i, t, sigma, after in grid.walk():
        down, up = ancestral(sigma, after)
        yield _row(grid, i, t, sigma, X + (down - sigma) * _slope(grid, sigma, X, M0) + up * N, draws=True)


def heun(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2206.00364, algorithm 1: the trapezoidal rule, with an Euler step at the end."""

    def slope(sigma: float, latent: Array, m: Array) -> Array:
        return (latent - m) / sigma if grid.config.clip else _slope(grid, sigma, latent, m)

    def row(*args: Any) -> SolverRow:
        row = _row(grid, *args)
        return _clamped(grid, row, grid.denoised(*row.level)) if grid.config.clip else row

    for i, t, sigma, after in grid.walk():
        yield row(i, t, sigma, X + (after - sigma) * slope(sigma, X, M0), X)
        if grid.remaining(i) > 1:
            mean = (slope(sigma, Y, M1) + slope(after, X, M0)) / 2
            yield row(i, grid.timesteps[grid.begin + i + 1], after, Y + (after - sigma) * mean)


def dpm2(grid: Grid) -> Iterator[SolverRow]:
    """k-diffusion's sample_dpm_2: the midpoint rule, at the geometric mean, with an Euler step at the end."""
    for i, t, sigma, after in grid.walk():
        yield from _midpoint(grid, i, t, sigma, after, 0.0, after)


def dpm2_ancestral(grid: Grid) -> Iterator[SolverRow]:
    """k-diffusion's sample_dpm_2_ancestral."""
    for i, t, sigma, after in grid.walk():
        down, up = ancestral(sigma, after)
        yield from _midpoint(grid, i, t, sigma, down, up, after)


def _midpoint(grid: Grid, i: int, t: float, sigma: float, down: float, up: float, after: float) -> Iterator[SolverRow]:
    midpoint = math.sqrt(sigma * down)
    yield _row(grid, i, t, sigma, X + (midpoint - sigma) * _slope(grid, sigma, X, M0), X)
    if grid.remaining(i) > 1:
        x = Y + (down - sigma) * _slope(grid, midpoint, X, M0) + up * N
        row = _row(grid, i, grid.time(midpoint), midpoint, x, draws=up > 0)
        yield row._replace(level=(1.0, after), at=row.level)  # as diffusers' add_noise, which ignores the midpoint


def consistency(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2303.01469, algorithm 1: to the denoised latent, itself at sigma_min, then noise."""
    low, data = float(grid.config.sigma_min or 0), grid.config.sigma_data
    for i, t, sigma, after in grid.walk():
        m = data**2 / ((sigma - low) ** 2 + data**2), (sigma - low) * data / math.hypot(sigma, data)
        x = M0 + grid.config.s_noise * math.sqrt(max(after**2 - low**2, 0)) * N
        row = _row(grid, i, t, sigma, x, draws=grid.steps > 1)
        row = _clamped(grid, row, m) if grid.config.clip else row._replace(m=m)
        yield row._replace(x0=m)


def lms(grid: Grid) -> Iterator[SolverRow]:
    """k-diffusion's sample_lms, order 4: the last slopes, as a polynomial in sigma, integrated over the step."""
    for i, t, sigma, after in grid.walk():
        nodes = (
            np.array(grid.past(i, min(i + 1, 4))) - sigma
        )  # of steps that were run; diffusers also takes earlier ones
        x: Array = X
        for k in range(len(nodes)):
            lagrange, integral = _lagrange(nodes, k), np.polynomial.polynomial.polyint
            x = x + np.polynomial.polynomial.polyval(after - sigma, integral(lagrange)) * (M0, M1, M2, M3)[k]
        yield _row(grid, i, t, sigma, x)._replace(m=grid.noise(1.0, sigma))  # the slope is the noise


def _lagrange(nodes: Array, k: int) -> Array:
    """The polynomial, lowest coefficient first, that is 1 at nodes[k] and 0 at the other nodes."""
    rest = np.delete(nodes, k)
    return np.polynomial.polynomial.polyfromroots(rest) / np.prod(nodes[k] - rest)


# ---- on latents alpha * x0 + sigma * noise, as `Grid.split`; `now` and `after` are ratios, sigma / alpha ----


def _vp_row(
    grid: Grid, i: int, t: float, now: float, data: bool, x: Array, y: Array = Y, draws: bool = False
) -> SolverRow:
    """A row with the denoised latent as history (data), or else the noise."""
    level = grid.split(now)
    m = grid.denoised(*level) if data else grid.noise(*level)
    c_in = grid.c_in(*level) if grid.config.preconditioned else 1.0
    return SolverRow(i, t, level, x, y, m, c_in, draws)


def _dpm_step(grid: Grid, x: Array, now: float, after: float, d: Sequence[Array], solver: str) -> Array:
    """One DPM-Solver update from x, given D0, D1, ... (https://arxiv.org/abs/2211.01095).

    Its four variants are one formula in z: with h the step in lambda = log(alpha / sigma), z is h for noise prediction,
    -h for data prediction, and -2h for the SDE with data prediction.
    """
    (alpha_s, sigma_s), (alpha, sigma) = grid.split(now), grid.split(after)
    data, sde = grid.config.algorithm_type.endswith("++"), grid.config.algorithm_type.startswith("sde")
    h = math.log(now / after) if after > 0 else math.inf
    if h == 0:
        return x
    if data:
        z, scale, keep = (-2 * h if sde else -h), alpha, sigma / sigma_s * (math.exp(-h) if sde else 1)
    else:
        z, scale, keep = h, (2 * sigma if sde else sigma), alpha / alpha_s
    x = keep * x - scale * math.expm1(z) * d[0]
    if sde:
        x = x + sigma * math.sqrt(max(-math.expm1(-2 * h) if data else math.expm1(2 * h), 0)) * N
    if len(d) == 2:
        x = x - scale * (math.expm1(z) / 2 if solver == "midpoint" else math.expm1(z) / z - 1) * d[1]
    if len(d) == 3:
        c = -0.5 if data and sde else 0.5  # diffusers' sign for the SDE, with which the term does not vanish with h
        x = x - scale * (math.expm1(z) / z - 1) * d[1] - scale * ((math.expm1(z) - z) / z**2 - c) * d[2]
    return x


def dpm_multistep(grid: Grid) -> Iterator[SolverRow]:
    """DPM-Solver and DPM-Solver++, multistep, ODE and SDE: https://arxiv.org/abs/2211.01095, algorithm 2."""
    config = grid.config
    data, sde = config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde")
    few = config.lower_order_final and grid.steps < 15
    for i, t, now, after in grid.walk():  # of growing noise where the class is the inverse one
        order = min(config.solver_order, i + 1, grid.remaining(i) if few else 3)
        final = config.euler_at_final or config.final_sigmas_type == "zero"
        if grid.remaining(i) == 1 and (final or now == after):
            order = 1
        d = [M0]
        if order > 1:
            past = grid.past(i, order)
            r = [math.log(older / newer) / math.log(now / after) for newer, older in pairwise(past)]
            d.append((M0 - M1) / r[0])
            if order > 2:
                curve = (d[1] - (M1 - M2) / r[1]) / (r[0] + r[1])
                d = [M0, d[1] + r[0] * curve, curve]
        yield _vp_row(grid, i, t, now, data, _dpm_step(grid, X, now, after, d, config.solver_type), draws=sde)


def dpm_singlestep(grid: Grid) -> Iterator[SolverRow]:
    """The same, singlestep: groups of 1, 2 or 3 calls, each from the latent at the start of its group, the anchor."""
    config = grid.config
    data, sde = config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde")
    orders = _group_orders(config, grid.steps)
    for i, t, now, after in grid.walk():
        order = min(orders[grid.begin + i], i + 1)
        past = grid.past(i, order)
        h = math.log(past[-1] / after) if after > 0 else math.inf
        r = [math.log(past[-1] / sigma) / h for sigma in past[:-1]]  # position of each call in its group
        d, solver = [(M0, M1, M2)[order - 1]], config.solver_type
        if order == 2:
            d.append((M0 - M1) / r[0])
        if order == 3:
            first, second = (M0 - M2) / r[0], (M1 - M2) / r[1]
            if solver == "heun":
                d += [(r[0] * second - r[1] * first) / (r[0] - r[1]), 2 * (first - second) / (r[0] - r[1])]
            else:
                d, solver = [M2, first], "heun"
        x = _dpm_step(grid, X if order == 1 else Y, past[-1], after, d, solver)
        yield _vp_row(grid, i, t, now, data, x, X if order == 1 else Y, draws=sde)


def _group_orders(config: ScheduleConfig, steps: int) -> list[int]:
    order = config.solver_order
    groups, rest = divmod(steps, order)
    group, tail = list(range(1, order + 1)), list(range(1, rest + 1))
    if rest == 0 and order > 1 and (config.lower_order_final or config.final_sigmas_type == "zero"):
        groups, tail = groups - 1, [1, 2, 1] if order == 3 else [1, 1]
    orders = group * groups + tail
    return [*orders[:-1], 1] if config.final_sigmas_type == "zero" else orders


def deis(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2204.13902, tAB-DEIS: the noise, as a polynomial in log sigma, integrated over sigma."""
    config = grid.config
    few = config.lower_order_final and grid.steps < 15
    for i, t, now, after in grid.walk():
        alpha, u = grid.split(after)[0], math.log(after / now)
        # The integrals of 1, v and v^2 over v = log(sigma / now), of d sigma = now * e^v dv, to v = u.
        powers = math.expm1(u), (u - 1) * math.exp(u) + 1, (u * u - 2 * u + 2) * math.exp(u) - 2
        order = min(config.solver_order, i + 1, grid.remaining(i) if few else 3)
        nodes = np.log(np.array(grid.past(i, order)) / now)
        x = alpha / grid.split(now)[0] * X
        for k in range(order):
            x = x + alpha * now * np.dot(_lagrange(nodes, k), powers[:order]) * (M0, M1, M2)[k]
        yield _vp_row(grid, i, t, now, False, x)


def unipc(grid: Grid) -> Iterator[SolverRow]:
    """https://arxiv.org/abs/2302.04867: correct the latent of the last prediction, then predict the next from it.

    The anchor is the corrected latent.
    """
    config, order = grid.config, 0
    for i, t, now, _ in grid.walk():
        x: Array = X
        if i > 0 and grid.begin + i - 1 not in config.disable_corrector:
            x = _uni_step(grid, i - 1, order, Y, (M1, M2, M3), M0)
        order = min(config.solver_order, i + 1, grid.remaining(i) if config.lower_order_final else 3)
        yield _vp_row(grid, i, t, now, config.predict_x0, _uni_step(grid, i, order, x, (M0, M1, M2)), x)


def _uni_step(grid: Grid, i: int, order: int, x: Array, m: Sequence[Array], corrected: Array | None = None) -> Array:
    """From step i to the next: UniP, or UniC if `corrected`, the network's output at the end, is known."""
    config, past = grid.config, grid.past(i, order)
    now, after = past[0], float(grid.sigmas[grid.begin + i + 1])
    (alpha_s, sigma_s), (alpha, sigma) = grid.split(now), grid.split(after)
    if after == 0:
        if order > 1:
            raise InputError(
                "UniPC ends at sigma 0 with lower_order_final only; set it, or final_sigmas_type 'sigma_min'."
            )
        return alpha * m[0] if config.predict_x0 else alpha / alpha_s * x - alpha * now * m[0]
    h = math.log(now / after)
    z, scale = (-h, alpha) if config.predict_x0 else (h, sigma)
    x = (sigma / sigma_s if config.predict_x0 else alpha / alpha_s) * x - scale * math.expm1(z) * m[0]
    r = [math.log(now / older) / h for older in past[1:]] if h else []
    slopes = [(older - m[0]) / ratio for older, ratio in zip(m[1:], r, strict=False)]
    if corrected is not None:
        r, slopes = [*r, 1.0], [*slopes, corrected - m[0]]
    if not slopes:
        return x
    b_h = z if config.solver_type == "bh1" else math.expm1(z)
    phi, targets = math.expm1(z) / z - 1, []
    for k in range(1, len(r) + 1):
        targets.append(phi * math.factorial(k) / b_h)
        phi = phi / z - 1 / math.factorial(k + 1)
    weights = np.linalg.solve(np.vander(r, increasing=True).T, targets) if len(r) > 1 else [0.5]
    return x - scale * b_h * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


def sa_solver(grid: Grid) -> Iterator[SolverRow]:
    """SA-Solver, https://arxiv.org/abs/2309.05019: correct the latent of the last prediction, then predict the next.

    Noise of strength tau is added by the prediction. The correction keeps that noise and what is left of the latent
    before it, and so is a difference of two sums over the history.
    """
    config, tau, corrects = grid.config, 0.0, 0  # of the last step, as is the prediction's sum
    predicted: Array = np.zeros_like(X)
    own_tau = config.tau_func or (lambda t: 1.0 if 200 <= t <= 800 else 0.0)
    for i, t, now, after in grid.walk():
        x: Array = X
        if i > 0:
            weights = _sa_weights(grid, i - 1, min(corrects, i + 1), tau, at_end=True)
            x = X - np.roll(predicted, 1) + _weighed(weights)  # what was M0 is M1
        left = grid.remaining(i) if config.lower_order_final else 4
        predicts, corrects = min(config.predictor_order, left), min(config.corrector_order, left + 1)
        tau = float(own_tau(t))
        predicted = _weighed(_sa_weights(grid, i, min(predicts, i + 1), tau))
        (alpha_s, sigma_s), (alpha, sigma) = grid.split(now), grid.split(after)
        h, data = math.log(now / after), config.algorithm_type == "data_prediction"
        keep = math.exp(-(tau**2) * h) * sigma / sigma_s if data else alpha / alpha_s
        noise = sigma * math.sqrt(-math.expm1(-2 * tau**2 * h)) if data else tau * sigma * math.sqrt(math.expm1(2 * h))
        x = keep * x + predicted + noise * N
        row = _vp_row(grid, i, t, now, data, x, draws=True)
        if len(grid.alpha_bar):  # as in diffusers' add_noise, which goes by the whole timestep
            row = row._replace(level=(math.sqrt(grid.bar(t)), math.sqrt(1 - grid.bar(t))), at=row.level)
        yield row


def _weighed(weights: Sequence[float]) -> Array:
    """The sum of the last outputs, newest first."""
    return sum((weight * m for weight, m in zip(weights, (M0, M1, M2, M3), strict=False)), np.zeros_like(X))


_LEGENDRE = np.polynomial.legendre.leggauss(32)  # nodes in -1..1, and their weights


def _sa_weights(grid: Grid, i: int, order: int, tau: float, at_end: bool = False) -> list[float]:
    """The weights of the last `order` outputs, newest first, in step i: their polynomial in lambda, integrated by Gauss
    and Legendre. At end: with the output there."""
    data = grid.config.algorithm_type == "data_prediction"
    now, after = grid.past(i, 1)[0], float(grid.sigmas[grid.begin + i + 1])
    alpha, sigma = grid.split(after)
    h = math.log(now / after)
    nodes = np.log(after / np.array(grid.past(i + at_end, order)))  # lambda, less lambda at the end
    rate = 1 + tau**2
    points, weights = _LEGENDRE
    points, weights = (points - 1) * h / 2, weights * h / 2  # from -h to 0
    factor = rate * (alpha * np.exp(rate * points) if data else -sigma * np.exp(-points)) * weights
    sums = [float(factor @ np.polynomial.polynomial.polyval(points, _lagrange(nodes, k))) for k in range(order)]
    if data and order == 2 and h > 0:  # the authors' term of third order, for few steps
        rest = (h * rate - 1 + math.exp(-rate * h)) / rate**2
        extra = rate * alpha * ((h / 2 - rest / h) if at_end else (h**2 / 2 - rest) / (nodes[0] - nodes[1]))
        sums = [sums[0] + extra, sums[1] - extra]
    return sums
