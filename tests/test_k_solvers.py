"""Samplers of k-diffusion and ComfyUI: against k-diffusion's functions, and against plain loops of the papers."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scheduler_runs import SD, SHAPE, error, network
from torch import Tensor

from fastldm.runtime.denoise import Guidance, Run, denoise
from fastldm.runtime.noise import draw_step_noise
from fastldm.samplers.grid import sigma_to_t
from fastldm.samplers.names import is_cfg_pp, resolve_sampler
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.spacing import alphas_cumprod
from fastldm.samplers.table import StepTable, make_table

CONFIG = read_config({"_class_name": "DDIMScheduler", **SD})
BAR = alphas_cumprod(CONFIG).astype(np.float64)
LOG_SIGMAS = np.log(np.sqrt((1 - BAR) / BAR))
CALLS = (1, 2, 3, 4, 9)  # numbers of steps
Denoiser = Callable[[Tensor, float], Tensor]


def denoiser(x: Tensor, sigma: float) -> Tensor:
    """The denoised latent, of a network that predicts noise."""
    sigma = float(sigma)
    t = float(sigma_to_t(np.array([sigma]), LOG_SIGMAS.astype(np.float32))[0])
    return x - sigma * network(x / math.hypot(sigma, 1), t)


def ours(name: str, steps: int) -> tuple[Tensor, StepTable, Tensor, list[Tensor]]:
    """Where a sampler leads, its table, its start, and what it drew."""
    table, g = make_table(CONFIG, steps, sampler=name), torch.Generator().manual_seed(steps)
    x = torch.randn(1, *SHAPE, generator=g) * table.init_noise_sigma
    noises = draw_step_noise(table, (1, *SHAPE), g, torch.float32, "cpu")
    end = denoise(lambda model_input, i, _: network(model_input, table.timesteps[i]), Run(table, x, noises))
    return end, table, x, [noise for noise in noises if noise is not None]


def levels(name: str, steps: int) -> Tensor:
    """The noise levels of the steps, and 0."""
    if "karras" in name:
        ends = np.exp(LOG_SIGMAS[[-1, 0]]) ** (1 / 7)
        sigmas = np.linspace(*ends, steps) ** 7
    else:  # equal steps in time; between those of training, their logarithms are interpolated
        sigmas = np.exp(np.interp(np.linspace(len(BAR) - 1, 0, steps), np.arange(len(BAR)), LOG_SIGMAS))
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


# ---- k-diffusion ----


@pytest.fixture(scope="module")
def k_diffusion() -> Iterator[Any]:
    """Its sampling.py, without the packages that only other functions of it need."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed")
    absent = {name: ModuleType(name) for name in ("torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils")}
    absent["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    absent["k_diffusion"].utils = absent["k_diffusion.utils"]  # type: ignore[attr-defined]
    absent["k_diffusion.utils"].append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    path = Path(spec.submodule_search_locations[0]) / "sampling.py"
    with mock.patch.dict(sys.modules, absent):
        loaded = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
        assert loaded is not None
        assert loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        loaded.loader.exec_module(module)
        yield module


class Brownian:
    """In place of k-diffusion's tree: normalised increments of one Brownian motion in sigma, made of the noise drawn
    by ours. Intervals begin where the last began, or where it ended."""

    def __init__(self, drawn: list[Tensor]) -> None:
        self.drawn, self.last = iter(drawn), (math.nan, math.nan, torch.zeros(()))

    def __call__(self, sigma: Tensor, after: Tensor) -> Tensor:
        begin, end = float(sigma), float(after)
        at, to, before = self.last
        fresh = next(self.drawn)
        if math.isclose(at, begin, rel_tol=1e-4):
            known = (at - to) ** 0.5 * before
            fresh = (known + (to - end) ** 0.5 * fresh) / (begin - end) ** 0.5
        self.last = (begin, end, fresh)
        return fresh


@pytest.mark.parametrize("steps", CALLS)
@pytest.mark.parametrize("name", ["dpm++ 2s a", "dpm++ sde", "dpm++ sde karras", "dpm++ 2s a karras"])
def test_trajectories_equal_k_diffusion(name: str, steps: int, k_diffusion: Any) -> None:
    end, _, x, drawn = ours(name, steps)
    function = getattr(k_diffusion, resolve_sampler(name).class_name)
    model = lambda x, sigma: denoiser(x, float(sigma[0]))  # noqa: E731
    rest = iter(drawn)
    sampler = Brownian(drawn) if "sde" in name else lambda *_: next(rest)
    theirs = function(model, x, levels(name, steps), noise_sampler=sampler, disable=True)
    assert error(end, theirs) < 1e-4


@pytest.mark.parametrize(("steps", "strength"), [*((n, 1.0) for n in range(1, 8)), (8, 0.5), (13, 0.6)])
def test_dpm_fast_equals_k_diffusion(steps: int, strength: float, k_diffusion: Any) -> None:
    """Of all numbers of calls; from the middle of the schedule, too."""
    table = make_table(CONFIG, steps, sampler="dpm fast", strength=strength)
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(steps)) * table.start[1]
    run = Run(table, x, [None] * len(table))
    end = denoise(lambda model_input, i, _: network(model_input, table.timesteps[i]), run)
    model = lambda x, sigma: denoiser(x, float(sigma[0]))  # noqa: E731
    theirs = k_diffusion.sample_dpm_fast(
        model, x, float(np.exp(LOG_SIGMAS[0])), table.start[1], len(table), disable=True
    )
    assert error(end, theirs) < 1e-4
    assert len(table) == int(steps * strength)


# ---- what ComfyUI calls by these names: loops in float64, from the papers ----


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    return (x - denoised) / sigma


def heunpp2(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    """Euler's step at the end, Heun's before it, three slopes else, each of a weight that grows with its sigma."""
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        slopes, at = [], x
        for k in range(min(3, len(sigmas) - 1 - i)):
            slopes.append(slope(at, sigmas[i + k], model(at, sigmas[i + k])))
            at = at + (sigmas[min(i + k + 1, len(sigmas) - 1)] - sigmas[i + k]) * slopes[-1]
        weights = [sigmas[i + k] / (len(slopes) * sigmas[0]) for k in range(1, len(slopes))]
        x = x + (after - sigma) * ((1 - sum(weights)) * slopes[0])
        for weight, later in zip(weights, slopes[1:], strict=True):
            x = x + (after - sigma) * weight * later
    return x


def res_multistep(
    model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float = 0.0
) -> Tensor:
    """The exponential integrator of a line through the last two denoised latents, over log sigma."""
    past: list[tuple[float, Tensor]] = []
    down = 0.0
    for sigma, after in pairwise(sigmas):
        denoised, came_to = model(x, sigma), down
        up = eta * after * math.sqrt(1 - after**2 / sigma**2)
        down = math.sqrt(max(after**2 - up**2, 0.0))
        if after == 0:
            return denoised
        h = math.log(sigma / down)
        first = 1 - math.exp(-h)  # the integral of e^(s - h) over s from 0 to h; of s e^(s - h), by parts:
        second = h - first
        if past:
            change = (denoised - past[-1][1]) / math.log(past[-1][0] / came_to)
            x = down / sigma * x + first * denoised + second * change
        else:
            x = down / sigma * x + first * denoised
        past.append((sigma, denoised))
        x = x + up * draw() if eta else x
    return x


def res_multistep_ancestral(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    return res_multistep(model, x, sigmas, draw, eta=1.0)


def gradient_estimation(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    """Euler's method with the slope 2 d_i - d_(i-1)."""
    before = None
    for sigma, after in pairwise(sigmas):
        now = slope(x, sigma, model(x, sigma))
        better = now if before is None or after == 0 else 2 * now - before
        x, before = x + (after - sigma) * better, now
    return x


def ipndm(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    """Adams and Bashforth, the weights from the integral of the polynomial through equidistant slopes."""
    slopes: list[Tensor] = []
    for sigma, after in pairwise(sigmas):
        slopes = [slope(x, sigma, model(x, sigma)), *slopes][:4]
        count = len(slopes) if after else 1
        nodes = -np.arange(count)
        moments = [1 / (k + 1) for k in range(count)]
        weights = np.linalg.solve(np.vander(nodes, increasing=True).T.astype(float), moments)
        x = x + (after - sigma) * sum(float(w) * d for w, d in zip(weights, slopes, strict=False))
    return x


def er_sde(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    """Equation 17 of the paper, to the third order, with ComfyUI's function of noise; integrals by 200 rectangles."""
    phi = lambda s: s * (math.exp(s**0.3) + 10)  # noqa: E731
    seen: list[tuple[float, Tensor]] = []
    for sigma, after in pairwise(sigmas):
        denoised = model(x, sigma)
        if after == 0:
            return denoised
        seen.append((sigma, denoised))
        ratio, width = phi(after) / phi(sigma), (sigma - after) / 200
        points = [after + k * width for k in range(200)]
        x = ratio * x + (1 - ratio) * denoised
        for order in range(1, min(len(seen), 3)):
            derivative = [d for _, d in seen[-3:]]
            at = [s for s, _ in seen[-3:]]
            if order == 1:
                difference = (derivative[-1] - derivative[-2]) / (at[-1] - at[-2])
                weight = after - sigma + phi(after) * sum(width / phi(s) for s in points)
            else:
                older = (derivative[1] - derivative[0]) / (at[1] - at[0])
                difference = (difference - older) / ((at[2] - at[0]) / 2)
                weight = (after - sigma) ** 2 / 2 + phi(after) * sum(width * (s - sigma) / phi(s) for s in points)
            x = x + weight * difference
        x = x + math.sqrt(after**2 - sigma**2 * ratio**2) * draw()
    return x


def seeds_2(model: Denoiser, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    """Two stages, the second from the start, with the noise of both halves of the step as the SDE has it."""
    for sigma, after in pairwise(sigmas):
        denoised = model(x, sigma)
        if after == 0:
            return denoised
        h = math.log(sigma / after)
        middle, decay = sigma * math.exp(-h / 2), math.exp(-h)
        noise = math.sqrt(1 - decay) * draw()
        halfway = decay * x + (1 - decay) * denoised + middle * noise
        noise = math.exp(-h / 2) * noise + math.sqrt(1 - decay) * draw()
        x = decay**2 * x + (1 - decay**2) * model(halfway, middle) + after * noise
    return x


@pytest.mark.parametrize("steps", CALLS)
@pytest.mark.parametrize(
    "function",
    [heunpp2, res_multistep, res_multistep_ancestral, gradient_estimation, ipndm, er_sde, seeds_2],
    ids=lambda function: function.__name__,
)
def test_trajectories_equal_plain_loops(function: Any, steps: int) -> None:
    name = f"sample_{function.__name__}"
    end, _, x, drawn = ours(name, steps)
    rest = iter(drawn)
    expected = function(denoiser, x.double(), levels(name, steps).double().tolist(), lambda: next(rest).double())
    assert error(end, expected) < 1e-4
    assert next(rest, None) is None


# ---- CFG++: what is denoised with guidance is renoised without ----

SCALE = 0.8
Both = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def guided(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The denoised latents with guidance and without: with the prompt the network sees another input."""
    scaled = x / math.hypot(sigma, 1)
    t = float(sigma_to_t(np.array([sigma]), LOG_SIGMAS.astype(np.float32))[0])
    conditional, without = (x - sigma * network(own, t) for own in (scaled + 0.3, scaled))
    return without + SCALE * (conditional - without), without


def guided_network(model_input: Tensor, t: float) -> Tensor:
    """The same, as the loop calls it: the rows without the prompt first."""
    without, conditional = model_input.chunk(2)
    return torch.cat((network(without, t), network(conditional + 0.3, t)))


def ours_guided(name: str, steps: int) -> tuple[Tensor, StepTable, Tensor, list[Tensor]]:
    table, g = make_table(CONFIG, steps, sampler=name), torch.Generator().manual_seed(steps)
    x = torch.randn(1, *SHAPE, generator=g) * table.init_noise_sigma
    noises = draw_step_noise(table, (1, *SHAPE), g, torch.float32, "cpu")
    run = Run(table, x, noises, Guidance(SCALE, cfg_pp=True))
    end = denoise(lambda model_input, i, _: guided_network(model_input, table.timesteps[i]), run)
    return end, table, x, [noise for noise in noises if noise is not None]


def halves(sigma: float, after: float, eta: float) -> tuple[float, float]:
    up = eta * after * math.sqrt(1 - after**2 / sigma**2)
    return math.sqrt(max(after**2 - up**2, 0.0)), up


def euler_pp(model: Both, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float) -> Tensor:
    for sigma, after in pairwise(sigmas):
        with_, without = model(x, sigma)
        down, up = halves(sigma, after, eta)
        x = with_ + down * slope(x, sigma, without)
        x = x + up * draw() if up else x
    return x


def dpmpp_2m_pp(model: Both, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float) -> Tensor:
    """As ComfyUI's: the last denoised latent without guidance, against the next one with it."""
    before: tuple[float, Tensor] | None = None
    for sigma, after in pairwise(sigmas):
        with_, without = model(x, sigma)
        kept = after / sigma
        new = with_ - kept * without + kept * x
        if before is not None and after:
            change = (with_ - before[1]) / math.log(before[0] / sigma) * math.log(sigma / after)
            new = new + (1 - kept) / 2 * change
        x, before = new, (sigma, without)
    return x


def dpmpp_2s_pp(model: Both, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float) -> Tensor:
    for sigma, after in pairwise(sigmas):
        with_, without = model(x, sigma)
        down, up = halves(sigma, after, eta)
        if not down:
            return with_
        moved, middle = x + with_ - without, math.sqrt(sigma * down)
        halfway = middle / sigma * moved + (1 - middle / sigma) * with_
        x = down / sigma * moved + (1 - down / sigma) * model(halfway, middle)[0] + up * draw()
    return x


def res_multistep_pp(model: Both, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float) -> Tensor:
    past: list[tuple[float, Tensor]] = []
    down = 0.0
    for sigma, after in pairwise(sigmas):
        (with_, without), came_to = model(x, sigma), down
        down, up = halves(sigma, after, eta)
        if not past or not down:
            x = with_ + down * slope(x, sigma, without)
        else:
            h = math.log(sigma / down)
            first = 1 - math.exp(-h)
            change = (without - past[-1][1]) / math.log(past[-1][0] / came_to)
            x = down / sigma * (x + with_ - without) + first * without + (h - first) * change
        past.append((sigma, without))
        x = x + up * draw() if up else x
    return x


def gradient_estimation_pp(
    model: Both, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float
) -> Tensor:
    before = None
    for sigma, after in pairwise(sigmas):
        with_, without = model(x, sigma)
        now = slope(x, sigma, without)
        new = with_ + after * now
        if before is not None and after:
            new = new + (after - sigma) * (now - before)
        x, before = new, now
    return x


@pytest.mark.parametrize("steps", CALLS)
@pytest.mark.parametrize(
    ("name", "function", "eta"),
    [
        ("euler cfg++", euler_pp, 0.0),
        ("euler a cfg++", euler_pp, 1.0),
        ("dpm++ 2m cfg++", dpmpp_2m_pp, 0.0),
        ("dpm++ 2s a cfg++", dpmpp_2s_pp, 1.0),
        ("res multistep cfg++", res_multistep_pp, 0.0),
        ("res multistep a cfg++", res_multistep_pp, 1.0),
        ("gradient estimation cfg++", gradient_estimation_pp, 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cfg_pp_equals_plain_loops(name: str, function: Any, eta: float, steps: int) -> None:
    end, _, x, drawn = ours_guided(name, steps)
    rest = iter(drawn)
    expected = function(guided, x.double(), levels(name, steps).double().tolist(), lambda: next(rest).double(), eta)
    assert error(end, expected) < 1e-4
    assert next(rest, None) is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_cfg_pp_renoises_without_guidance(prediction: str) -> None:
    """Algorithm 1 of the paper, from whatever the network predicts; and diffusers' DDIM where both branches agree."""
    config = replace(CONFIG, prediction_type=prediction, raw={**CONFIG.raw, "prediction_type": prediction})
    table = make_table(config, 6, sampler="ddim cfg++")
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    end = denoise(
        lambda model_input, i, _: guided_network(model_input, table.timesteps[i]),
        Run(table, x, [None] * 6, Guidance(SCALE, cfg_pp=True)),
    )
    x = x.double()
    times = [int(t) for t in table.timesteps]
    for t, later in pairwise([*times, -1]):
        bar, after = BAR[t], BAR[later] if later >= 0 else 1.0
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        without, conditional = network(x, t), network(x + 0.3, t)
        noise = {
            "epsilon": without,
            "v_prediction": alpha * without + sigma * x,
            "sample": (x - alpha * without) / sigma,
        }
        out = without + SCALE * (conditional - without)
        clean = {"epsilon": (x - sigma * out) / alpha, "v_prediction": alpha * x - sigma * out, "sample": out}
        x = math.sqrt(after) * clean[prediction] + math.sqrt(1 - after) * noise[prediction]
    assert error(end, x) < 1e-4


def test_cfg_pp_is_guided_at_every_scale() -> None:
    table = make_table(CONFIG, 4, sampler="euler cfg++")
    assert Guidance(0.6, cfg_pp=True).branches(table) == [(0, 1)] * 4
    assert Guidance(0.6, 0.0, 0.5, 1.0, cfg_pp=True).branches(table) == [(1,), (1,), (0, 1), (0, 1)]
    assert Guidance(0.6, 0.0, 0.5, 1.0, cfg_pp=True).weights(table)[0] == (0.0, 1.0, 0.0, 0.0)
    assert is_cfg_pp("Euler a CFG++ Karras")
    assert not is_cfg_pp("euler a")
    assert not is_cfg_pp(None)
