"""Samplers against diffusers' schedulers: whole trajectories with the same noise, and what bad configurations get."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import math
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import schedulers as diffusers_schedulers
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from fastldm import schedule
from fastldm.denoise import Inpainting, Work, denoise, draw_step_noise, randn
from fastldm.errors import InputError
from fastldm.kernels import step as step_kernel
from fastldm.samplers import Row
from fastldm.schedule import CLASSES, COLUMNS, SAMPLERS, ScheduleConfig, StepTable, make_table, resolve_sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PARITY = 1e-4  # relative error that the issue sets for float32
STEPS = (1, 2, 3, 5, 10, 25, 50)
SHAPE = (4, 6, 5)
MIX = 0.5 * torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
MIXES = {dtype: MIX.to(dtype) for dtype in (torch.float32, torch.float64)}


def network(u: Tensor, t: float) -> Tensor:
    """Stands in for a U-Net: smooth, nonlinear, mixes channels, and depends on the timestep."""
    return torch.tanh(torch.matmul(MIXES[u.dtype], u.flatten(2)) + math.sin(float(t) / 300)).view_as(u)


@pytest.fixture(scope="module", autouse=True)
def _fast_diffusers() -> Iterator[None]:
    """What diffusers does anew in each of ten thousand runs, and always with the same result, is kept or shortened."""
    keys = staticmethod(lambda cls: {*arguments_of(cls.__init__)})
    with mock.patch.object(ConfigMixin, "_get_init_keys", keys), mock.patch("scipy.integrate.quad", quad):
        yield


def quad(f: Callable[[float], Any], low: Any, high: Any, **_: Any) -> tuple[Any]:
    """The integral of a cubic or less, exactly, by Gauss and Legendre: what LMS asks of scipy, in 2 calls, not 21."""
    middle, half = (low + high) / 2, (high - low) / 2
    return ((f(middle - half / 3**0.5) + f(middle + half / 3**0.5)) * half,)


@functools.cache
def arguments_of(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]
    steps: int
    eta: float = 0.0
    batch: int = 1
    generators: int = 0  # 0: one for the whole batch
    strength: float = 1.0
    picture: bool = False  # image to image
    mask: bool = False  # inpainting by blending
    custom: dict[str, list[float]] = field(default_factory=dict)

    def scheduler(self, exact: bool = False) -> Any:
        cls = in_float64(self.name) if exact else getattr(diffusers, self.name)
        extra = {"PNDMScheduler": {"skip_prk_steps": True}}.get(self.name, {})
        clip = {"clip_sample": False} if "clip_sample" in arguments_of(cls.__init__) else {}
        with mock.patch.object(cls, "set_timesteps", _lay_out_nothing):
            return cls.from_config({**self.config, **extra, **clip})

    def schedule(self) -> ScheduleConfig:
        return ScheduleConfig.from_dict({"_class_name": self.name, **self.config}, steps_offset=None)

    def table(self) -> StepTable:
        return make_table(self.schedule(), self.steps, eta=self.eta, strength=self.strength, **self.custom)

    @property
    def on_sigmas(self) -> bool:
        return CLASSES[self.name].place in (schedule._on_sigmas, schedule._on_lambdas)

    def randomness(self) -> Any:
        made = [torch.Generator().manual_seed(7 + k) for k in range(max(self.generators, 1))]
        return made if self.generators else made[0]

    def given(self) -> tuple[Tensor, Tensor]:
        """A picture's latents and a mask."""
        g = torch.Generator().manual_seed(3)
        return torch.randn(self.batch, *SHAPE, generator=g), torch.rand(self.batch, 1, *SHAPE[1:], generator=g).round()


def _lay_out_nothing(scheduler: Any, *_: Any) -> None:
    """For two-stage schedulers' constructors, which lay out a thousand steps for half a second, to no end."""
    scheduler.sigmas = torch.zeros(1)


@functools.cache
def in_float64(name: str) -> Any:
    """diffusers' class, computing in float64 what it computes in float32; timesteps are still float32, and noise is
    still drawn so.
    """
    source = sys.modules[getattr(diffusers, name).__module__]
    module = types.ModuleType(f"{source.__name__}_float64")
    module.__dict__.update(__package__=source.__package__, __file__=source.__file__)
    sys.modules[module.__name__] = module
    text = re.sub(r"^(?!.*timesteps)(.*)float32", r"\1float64", inspect.getsource(source), flags=re.M)
    exec(compile(text, module.__name__, "exec"), module.__dict__)
    draw = diffusers.utils.torch_utils.randn_tensor
    module.__dict__["randn_tensor"] = lambda shape, generator=None, **_: draw(shape, generator=generator).double()
    return module.__dict__[name]


@contextlib.contextmanager
def nearest_roots() -> Iterator[None]:
    """Square roots of float32 tensors are the nearest float32. torch leaves them to MKL where it has it, and a sixth
    of MKL's are one unit in the last place off.
    """
    root, power = Tensor.sqrt, Tensor.__pow__

    def nearest(x: Tensor) -> Tensor:
        return root(x.double()).to(x.dtype)

    def powers(x: Tensor, exponent: Any) -> Tensor:
        return nearest(x) if isinstance(exponent, float) and exponent == 0.5 else power(x, exponent)

    methods = mock.patch.multiple(Tensor, sqrt=nearest, __pow__=powers)
    with methods, mock.patch.object(torch, "sqrt", nearest):
        yield


def laid_out(case: Case, exact: bool = False, nearest: bool = False, last: float | None = None) -> Any:
    """diffusers' scheduler with its steps laid out. The options are those of EXCEPTIONS."""
    with nearest_roots() if exact or nearest else contextlib.nullcontext():
        scheduler = case.scheduler(exact)
        if exact:  # from the same float32 alphas_cumprod; sigmas are made of them in float32, and kept so
            bar = case.scheduler().alphas_cumprod
            scheduler.alphas_cumprod = bar if case.on_sigmas else bar.double()
            if not getattr(scheduler.config, "set_alpha_to_one", True):
                scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        scheduler.set_timesteps(**(case.custom or {"num_inference_steps": case.steps}))
    if last is not None:
        scheduler.sigmas[-1] = last * scheduler.sigmas[-2]
    return scheduler


def diffusers_run(
    case: Case,
    *,
    exact: bool = False,
    begin: int | None = None,
    nearest: bool = False,
    last: float | None = None,
    eta: float | None = None,
) -> tuple[Tensor, Any]:
    """What diffusers' pipelines do with a scheduler: latents and generators. The options are those of EXCEPTIONS."""
    dtype, scheduler = torch.float64 if exact else torch.float32, laid_out(case, exact, nearest, last)
    timesteps, g, (init, mask) = scheduler.timesteps, case.randomness(), case.given()
    if case.picture or case.mask:
        steps = case.steps
        begin = max(steps - min(int(steps * case.strength), steps), 0) * scheduler.order
        timesteps = timesteps[begin:]
    if begin is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    noise = diffusers.utils.torch_utils.randn_tensor((case.batch, *SHAPE), generator=g).to(dtype)
    if case.picture or (case.mask and case.strength < 1):
        x = scheduler.add_noise(init.to(dtype), noise, timesteps[:1].repeat(case.batch))
    else:
        x = noise * scheduler.init_noise_sigma
    takes = arguments_of(type(scheduler).step)
    extra = {key: value for key, value in (("generator", g), ("eta", case.eta if eta is None else eta)) if key in takes}
    for i, t in enumerate(timesteps):
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
        if case.mask:
            proper = init.to(dtype)
            if i < len(timesteps) - 1:
                proper = scheduler.add_noise(proper, noise, torch.tensor([timesteps[i + 1]]))
            x = (1 - mask) * proper + mask * x
    return x, g


def draw_noise(table: StepTable, case: Case, generators: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What a run starts from, and the noise of its rows, as a text-to-image pipeline draws them."""
    shape = (case.batch, *SHAPE)
    return randn(shape, generators, torch.float32, "cpu"), draw_step_noise(
        table, shape, generators, torch.float32, "cpu"
    )


def our_run(case: Case) -> tuple[Tensor, Any]:
    table, g, (init, mask) = case.table(), case.randomness(), case.given()
    noise, noises = draw_noise(table, case, g)
    x = noise * table.init_noise_sigma
    if case.picture or (case.mask and case.strength < 1):
        x = table.start[0] * init + table.start[1] * noise
    inpainting = Inpainting(mask, init, noise) if case.mask else None
    work = Work(table, x, noises, inpainting=inpainting)
    return denoise(lambda u, i, _: network(u, table.timesteps[i]), work), g


def exact_table(case: Case) -> tuple[StepTable, list[Row], np.ndarray]:
    """The table, the rows it is made of, and its numbers in float64, not yet rounded."""
    kept: list[Any] = []
    pack = schedule._pack
    with mock.patch.object(schedule, "_pack", lambda rows: kept.append((rows, pack(rows))) or kept[0][1]):
        table = case.table()
    return table, *kept[0]


def our_exact_run(case: Case) -> Tensor:
    """A run in float64, with a table that is not rounded to float32."""
    table, rows, numbers = exact_table(case)
    noise, noises = draw_noise(table, case, case.randomness())
    x, history = noise.double() * table.init_noise_sigma, ()
    y = torch.zeros_like(x)
    for i, row in enumerate(numbers.tolist()):
        drawn = None if noises[i] is None else noises[i].double()
        x, y, history = step_kernel.step(row, x, y, history, network(row[0] * x, rows[i].t), drawn)
    return x


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@dataclass(frozen=True)
class Exception_:
    """Where diffusers raises, gives NaN or loses precision: why, where, and how it is asked instead."""

    reason: str
    where: Callable[[Case, StepTable], bool]
    options: Mapping[str, Any]


def hangs_on_a_root(case: Case) -> bool:
    """Whether torch's square roots, one unit in the last place off, change diffusers' timesteps by a whole one."""
    as_it_is, nearest = (laid_out(case, nearest=n).timesteps.double() for n in (False, True))
    return len(as_it_is) != len(nearest) or bool((as_it_is - nearest).abs().max() >= 1)


EXCEPTIONS = (
    Exception_(
        "torch's float32 roots are not always the nearest float32. At zero terminal SNR, 1 - alphas_cumprod[0] "
        "magnifies it. Respaced sigmas begin at sigma_max, whose timestep is 999 but for rounding and then truncated: "
        "the last bit decides between 999 and 998. Judged with the nearest roots.",
        lambda case, table: case.config.get("rescale_betas_zero_snr", False) or hangs_on_a_root(case),
        {"nearest": True},
    ),
    Exception_(
        "A later timestep is rounded to the first one, and diffusers' text-to-image begins there. Its image-to-image, "
        "which says where to begin, does not.",
        lambda case, table: (table.timesteps == table.timesteps[0]).sum() > 1,
        {"begin": 0},
    ),
    Exception_(
        "diffusers' float32 arithmetic cancels, or takes the root of a rounding error below 0. Judged in float64.",
        lambda case, table: True,
        {"exact": True},
    ),
    Exception_(
        "DDIM with eta 1 from zero terminal SNR: 1 - alphas_cumprod - eta^2 variance is 0 but for rounding, and where "
        "that is below 0, in float64 too, its root is NaN. Its limit is judged.",
        lambda case, table: (
            case.name == "DDIMScheduler" and case.eta == 1 and case.config.get("rescale_betas_zero_snr", False)
        ),
        {"eta": 1 - 1e-12, "exact": True},
    ),
    Exception_(
        "UniPC to sigma 0, with 'bh1' or predicting noise: diffusers multiplies 0 by infinity. Its limit is judged.",
        lambda case, table: (
            case.name == "UniPCMultistepScheduler"
            and case.config.get("final_sigmas_type") != "sigma_min"
            and (case.config.get("solver_type") == "bh1" or not case.config.get("predict_x0", True))
        ),
        {"last": 1e-10, "exact": True},
    ),
    Exception_(
        "Respaced sigmas end at sigma_min already, and a last step of order 2 or 3 to sigma_min, of no length, divides "
        "0 by 0. Lu's may end a rounding of float32 below, and the SDE's noise is the root of a negative length. Its "
        "limit is judged.",
        lambda case, table: (
            case.config.get("final_sigmas_type") == "sigma_min"
            and CLASSES[case.name].place is schedule._on_lambdas
            and any(key.startswith("use_") for key in case.config)
            and (
                case.config.get("lower_order_final") is False
                or case.steps >= 15
                or ("use_lu_lambdas" in case.config and case.config.get("algorithm_type", "").startswith("sde"))
            )
        ),
        {"last": 1 - 1e-12, "exact": True},
    ),
)


def verdict(case: Case) -> str | None:
    """None where we agree with diffusers, or where a reason of EXCEPTIONS holds and is shown to; else what is wrong."""
    try:
        ours, our_generators = our_run(case)
    except InputError as refusal:
        try:
            return f"{case}: {refusal}" if diffusers_run(case)[0].isfinite().all() else None
        except Exception:
            return None
    complaint = f"{case}:"
    options: dict[str, Any] = {}
    for exception in (None, *EXCEPTIONS):
        if exception is not None:
            if not exception.where(case, case.table()):
                continue
            options |= exception.options
        try:
            judge, their_generators = diffusers_run(case, **options)
        except (IndexError, AssertionError) as raised:
            complaint += f" {options}: {raised!r};"
            continue
        for mine, other in zip(_listed(our_generators), _listed(their_generators), strict=True):
            if not torch.equal(mine.get_state(), other.get_state()):
                return f"{case}: as much noise was not drawn"
        off = error(ours, judge)
        if off < PARITY:
            return None
        complaint += f" {options}: {off:.1e};"
        if "exact" in options:  # float32 latents may hold neither result: then both in float64
            off = error(our_exact_run(case), judge)
            if off < PARITY / 10:
                return None
            complaint += f" both in float64: {off:.1e};"
    return complaint


def _listed(generators: Any) -> list[torch.Generator]:
    return generators if isinstance(generators, list) else [generators]


def check(cases: Iterator[Case] | list[Case]) -> None:
    wrong = [complaint for case in cases if (complaint := verdict(case)) is not None]
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:10])


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LIMIT = {"final_sigmas_type": "sigma_min", "solver_order": 3, "lower_order_final": False, "use_beta_sigmas": True}
NEEDED = (  # a case for each of EXCEPTIONS
    Case("DEISMultistepScheduler", {**SD, "beta_start": 0.0001, "use_exponential_sigmas": True}, 3),
    Case("DPMSolverMultistepScheduler", {**SD, "use_beta_sigmas": True}, 50),
    Case("HeunDiscreteScheduler", {**COSINE, "prediction_type": "sample"}, 5),
    Case("DDIMScheduler", {**SD, **ZERO_SNR}, 3, eta=1.0),
    Case("UniPCMultistepScheduler", {**SD, "solver_type": "bh1"}, 5),
    Case("UniPCMultistepScheduler", {**SD, **LIMIT, "prediction_type": "sample"}, 27),
)


@pytest.mark.parametrize(("exception", "case"), list(zip(EXCEPTIONS, NEEDED, strict=True)))
def test_each_exception_is_needed(exception: Exception_, case: Case) -> None:
    """diffusers as it is raises, gives NaN or is off; asked as its reason says, it agrees with us."""
    ours = our_run(case)[0]
    try:
        as_it_is = error(ours, diffusers_run(case)[0])
    except IndexError:
        as_it_is = math.nan
    if exception is EXCEPTIONS[0] and not hangs_on_a_root(case):
        pytest.skip("torch's roots are the nearest here")
    assert exception.where(case, case.table())
    assert not as_it_is < PARITY
    assert error(ours, diffusers_run(case, **exception.options)[0]) < PARITY


# ---- the grid: prediction types x spacings x sigmas ----


def grid(name: str) -> Iterator[dict[str, Any]]:
    keys = CLASSES[name].keys
    predictions = CLASSES[name].choices.get("prediction_type", ("epsilon", "v_prediction", "sample"))
    spacings = ("linspace", "leading", "trailing") if "timestep_spacing" in keys else (None,)
    kinds = [{}] + [{key: True} for key in keys if key.startswith("use_")]
    if "rescale_betas_zero_snr" in keys:
        kinds.append({"rescale_betas_zero_snr": True})
    for prediction, spacing, kind in itertools.product(predictions, spacings, kinds):
        yield {**SD, "prediction_type": prediction, **kind, **({"timestep_spacing": spacing} if spacing else {})}


@pytest.mark.parametrize("name", CLASSES)
def test_trajectories_are_diffusers(name: str) -> None:
    """Every cell of the grid at two step counts, all step counts in every class."""
    cells = list(grid(name))
    check(Case(name, config, STEPS[(i + k) % 7]) for i, config in enumerate(cells) for k in (0, 3))


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_trajectories_are_diffusers_at_all_steps(name: str) -> None:
    """Every cell at every number of steps up to 16, where the orders of solvers change; above, one prediction type at
    a time, to which `test_prediction_types_are_one_sampler` holds the others, but for PLMS, of which it knows nothing.
    """
    cells, several = list(grid(name)), len({config["prediction_type"] for config in grid(name)})
    share = 1 if name == "PNDMScheduler" else several
    chosen = itertools.product(enumerate(cells), range(1, 51))
    check(
        Case(name, config, steps)
        for (i, config), steps in chosen
        if steps <= 16 or steps % share == i // (len(cells) // several) % share
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "PNDMScheduler"])
def test_prediction_types_are_one_sampler(name: str) -> None:
    """Every cell of the grid at every number of steps: networks that say the same as noise, as a picture and as v lead
    to the same latents, in float64. (Not with PLMS, whose history holds outputs of other noise levels.)
    """
    cells: dict[str, list[Case]] = {}
    for config, steps in itertools.product(grid(name), range(1, 51)):
        cells.setdefault(str({**config, "prediction_type": steps}), []).append(Case(name, config, steps))
    for cases in cells.values():
        ends = [end for case in cases if (end := said_as(case)) is not None]
        for end in ends[1:]:
            assert np.abs(end - ends[0]).max() < 1e-9 * np.abs(ends[0]).max(), cases[0]


def said_as(case: Case) -> np.ndarray | None:
    """Where the table leads, in float64, a network that predicts one and the same picture, said as the case has it."""
    try:
        _, rows, numbers = exact_table(case)
    except InputError:  # noise at zero terminal SNR, and what no prediction type can do
        return None
    drawn = np.random.default_rng(0).standard_normal((len(rows) + 1, 3))
    state = np.zeros((7, 3))  # x, y, m0, m1, m2, m3, noise
    state[0] = drawn[-1] * rows[0].level[1]
    for row, n, noise in zip(rows, numbers, drawn, strict=False):
        u, alpha = row.c_in * state[0], row.c_in * row.level[0]  # u = alpha * picture + sigma * noise
        sigma = math.sqrt(1 - alpha**2)
        said = picture = np.tanh(u + math.sin(row.t / 300))
        if case.config["prediction_type"] == "epsilon":
            said = (u - alpha * picture) / sigma
        elif case.config["prediction_type"] == "v_prediction":
            said = (alpha * u - picture) / sigma
        state[3:6] = state[2:5]
        state[2], state[6] = n[1] * state[0] + n[2] * said, noise
        state[:2] = np.stack([n[3:10], [*n[10:16], 0.0]]) @ state
    return state[0]


@pytest.mark.parametrize("name", CLASSES)
def test_noise_of_batches_and_generators(name: str) -> None:
    """Batch 3 from one generator, and from a list of three; eta makes DDIM and TCD draw."""
    config = {**SD, **({"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPMSolver") else {})}
    check(Case(name, config, 4, eta=0.6, batch=3, generators=count) for count in (0, 3))


@pytest.mark.parametrize("name", CLASSES)
def test_image_to_image_and_inpainting(name: str) -> None:
    cases = []
    for strength, spacing in itertools.product((0.25, 0.6, 1.0), ("leading", "trailing")):
        config = {**SD, "timestep_spacing": spacing}
        cases += [Case(name, config, 8, eta=0.3, strength=strength, picture=True, batch=2)]
        cases += [Case(name, config, 8, eta=0.3, strength=strength, mask=True, batch=2)]
    check(cases)


# ---- all other options ----

OPTIONS: dict[str, list[Any]] = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_start": [0.00085, 0.0001],
    "beta_end": [0.012, 0.02],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [False, False, True],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
    "solver_order": [1, 2, 2, 3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "predict_x0": [True, True, False],
    "disable_corrector": [[], [], [0], [1, 2]],
    "original_inference_steps": [50, 100],
    "timestep_scaling": [10.0, 7.0],
}


def any_case(name: str, rng: random.Random) -> Case:
    """A configuration that the class takes, drawn from all options, at any number of steps."""
    known, config = CLASSES[name], {}
    for key, values in OPTIONS.items():
        if key in known.keys:
            allowed = known.choices.get(key, values)
            config[key] = rng.choice([value for value in values if value in allowed] or [known.keys[key]])
    kinds = [key for key in known.keys if key.startswith("use_")]
    if kinds and (kind := rng.choice(["", *kinds])):
        config[kind] = True
    if name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        config |= {"sigma_min": rng.choice([None, 0.05]), "sigma_max": rng.choice([None, 12.0])}
    if config.get("algorithm_type") == "sde-dpmsolver":
        config["solver_order"] = min(config["solver_order"], 2)  # we refuse the third at once, diffusers on reaching it
    return Case(name, config, rng.randint(1, 50), eta=rng.choice([0.0, 0.0, 0.5, 1.0]))


@pytest.mark.parametrize("name", CLASSES)
def test_any_options(name: str) -> None:
    rng = random.Random(name)
    check(any_case(name, rng) for _ in range(8))


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_any_options_many(name: str) -> None:
    rng = random.Random(f"many {name}")
    check(any_case(name, rng) for _ in range(250))


def test_custom_timesteps_and_sigmas() -> None:
    given = [999, 839, 639, 299, 39]
    cases = [Case(name, SD, 5, custom={"timesteps": given}) for name in CLASSES if "timesteps" in CLASSES[name].custom]
    assert len(cases) == 7
    sigmas = [14.6, 6.3, 2.5, 0.9, 0.1, 0.0]
    check([*cases, Case("EulerDiscreteScheduler", SD, 5, custom={"sigmas": sigmas})])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_schedule(beta_schedule: str, zero_snr: bool) -> None:
    given = {**SD, "beta_schedule": beta_schedule, "num_train_timesteps": 700, "rescale_betas_zero_snr": zero_snr}
    with nearest_roots():
        wanted = diffusers.DDIMScheduler.from_config(given).alphas_cumprod.numpy()
    got = schedule.alphas_cumprod(ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", **given}))
    np.testing.assert_array_equal(got, wanted)


def test_trained_betas() -> None:
    betas = np.linspace(0.001, 0.015, 100).tolist()
    check([Case("DDIMScheduler", {"trained_betas": betas, "num_train_timesteps": 100}, 10)])
    with pytest.raises(InputError, match="100 trained_betas for num_train_timesteps 1000"):
        ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", "trained_betas": betas})


def test_beta_quantiles_are_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 101)
    np.testing.assert_allclose(schedule.beta_quantile(p), scipy_stats.beta.ppf(p, 0.6, 0.6), rtol=1e-13, atol=1e-15)


def test_steps_of_a_table() -> None:
    """The user's steps, the start and the header, where samplers differ in them."""
    config = ScheduleConfig.from_dict({"_class_name": "EulerDiscreteScheduler", **SD})
    euler, heun, plms = (make_table(config, 4, sampler=name) for name in ("euler", "heun", "plms"))
    assert (euler.steps, euler.index) == (4, (0, 1, 2, 3))
    assert (heun.steps, heun.index) == (4, (0, 0, 1, 1, 2, 2, 3))
    assert (plms.steps, plms.index, plms.depth, plms.anchored) == (4, (0, 0, 1, 2, 3), 3, True)
    assert make_table(config, 8, sampler="plms").depth == 4
    assert (euler.depth, euler.anchored, make_table(config, 9, sampler="unipc").depth) == (1, False, 3)
    assert make_table(config, 4, sampler="ddim").init_noise_sigma == 1.0
    assert make_table(config, 10, strength=0.35).steps == 3
    assert euler.rows.dtype == euler.timesteps.dtype == np.float32
    assert not any(make_table(config, 4, sampler="ddim").draws)
    assert all(make_table(config, 4, sampler="ddim", eta=0.1).draws)
    assert [make_table(config, 4, sampler=name).float32_noise for name in ("euler a", "dpm++ 2m sde")] == [False, True]


def test_columns_are_the_kernels() -> None:
    assert step_kernel.COLUMNS == COLUMNS


def test_no_torch() -> None:
    code = "import sys; import fastldm.schedule; assert not {'torch', 'scipy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde_gpu", "dpm++ 2m sde"),
        ("sample_dpmpp_2m", "dpm++ 2m"),
        ("dpm++ 3m sde exponential", "dpm++ 3m sde exponential"),
        ("Euler a", "euler a"),
        ("k_euler_ancestral", "euler a"),
        ("DPM2 a Karras", "dpm2 a karras"),
        ("dpm_2_ancestral", "dpm2 a"),
        ("uni_pc_bh2", "unipc"),
        ("UniPC", "unipc"),
        ("PNDM", "plms"),
        ("K_LMS", "lms"),
        ("DDIM", "ddim"),
        ("heun beta", "heun beta"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("kdpm2discrete", "KDPM2DiscreteScheduler"),
    ],
)
def test_names(name: str, meant: str) -> None:
    assert resolve_sampler(name).name == meant


def test_every_name_makes_a_table() -> None:
    config = ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", **SD})
    for name in SAMPLERS:
        assert make_table(config, 6, sampler=name).sampler == name
        assert make_table(config, 6, sampler=SAMPLERS[name].class_name).steps == 6
    assert make_table(config, 6, sampler="dpm++ 2m sde karras").sampler == "dpm++ 2m sde karras"
    with pytest.raises(
        InputError, match=r"unknown sampler 'oiler a'. Did you mean 'euler a'\? There are: ddpm, ddim, "
    ):
        resolve_sampler("oiler a")
    with pytest.raises(InputError, match="EulerAncestralDiscreteScheduler takes no karras sigmas"):
        resolve_sampler("euler a karras")


@pytest.mark.parametrize("sampler", ["dpm++ 2m", "unipc", "lcm", "deis", "heun karras"])
def test_another_sampler_on_a_checkpoints_schedule(sampler: str) -> None:
    """As diffusers' `from_config`: keys of the file stay, keys that it lacks get the new class's defaults."""
    file = {
        "_class_name": "PNDMScheduler",
        **SD,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction",
    }
    chosen = resolve_sampler(sampler)
    plain = {key: value for key, value in file.items() if key not in ("_class_name", "skip_prk_steps")}
    case = Case(chosen.class_name, {**plain, **chosen.options}, 6)
    table = make_table(ScheduleConfig.from_dict(file), 6, sampler=sampler)
    np.testing.assert_array_equal(table.rows, case.table().rows)
    check([case])


# ---- what is refused ----

BAD_CONFIGS = [
    ({"_class_name": "DPMSolverSDEScheduler"}, "_class_name 'DPMSolverSDEScheduler' is not supported; these are: DDPM"),
    ({}, "_class_name None is not supported"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True is not supported: dynamic"),
    ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one kind"),
    ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of epsilon, v_"),
    ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction_type='sample' is none of"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type='learned_range' is none of"),
    ({"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}, "beta_schedule='cosine' is none of linear, scaled_"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "log"}, "timestep_spacing='log' is none of"),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        "needs final_sigmas_type 'sigma_min'",
    ),
    (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_order": 3,
        },
        "has no third order",
    ),
    (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "use_flow_sigmas=True is not supported: flow",
    ),
    ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order=4 is none of 1, 2, 3"),
]


@pytest.mark.parametrize(("given", "message"), BAD_CONFIGS)
def test_bad_configurations(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleConfig.from_dict(given)


BAD_CALLS = [
    ("ddim", {"num_inference_steps": 0}, "whole number from 1 to 1000, got 0"),
    ("ddim", {"num_inference_steps": 2.5}, "whole number from 1 to 1000, got 2.5"),
    ("ddim", {"num_inference_steps": 1001}, "whole number from 1 to 1000, got 1001"),
    ("ddim", {"strength": 0.05}, "strength 0.05 leaves none of 10 steps: take 20 steps"),
    ("ddim", {"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
    ("ddim", {"eta": -1.0}, "eta must be from 0 to 1, got -1.0"),
    ("ddim", {"timesteps": [999, 500]}, "DDIMScheduler takes no timesteps, here as in diffusers; these do: DDPM"),
    ("heun", {"sigmas": [1.0, 0.0]}, "takes no sigmas, here as in diffusers; these do: EulerDiscreteScheduler"),
    ("heun karras", {"timesteps": [999, 500]}, "timesteps cannot be given together with karras sigmas"),
    ("euler", {"timesteps": [500, 999]}, "timesteps must be descending"),
    ("euler", {"timesteps": []}, "timesteps must be descending and not empty"),
    ("euler", {"timesteps": [999, 500], "sigmas": [1.0, 0.0]}, "not both"),
    ("euler", {"timesteps": [1000, 500]}, "leave the trained timesteps, 0 to 999"),
    ("lcm", {"num_inference_steps": 51}, "more than the 50 of distillation"),
]


@pytest.mark.parametrize(("sampler", "arguments", "message"), BAD_CALLS)
def test_bad_calls(sampler: str, arguments: dict[str, Any], message: str) -> None:
    config = ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", **SD})
    with pytest.raises(InputError, match=message):
        make_table(config, **{"num_inference_steps": 10, "sampler": sampler, **arguments})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "lcm", "tcd"])
def test_epsilon_at_zero_snr(sampler: str) -> None:
    """diffusers divides by zero here."""
    given = {"_class_name": "DDIMScheduler", **SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="epsilon prediction cannot start at zero terminal SNR"):
        make_table(ScheduleConfig.from_dict(given), 4, sampler=sampler)
    make_table(replace(ScheduleConfig.from_dict(given), prediction_type="v_prediction"), 4)


def test_what_pipelines_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastldm"):
        config = ScheduleConfig.from_dict({"_class_name": "DDIMScheduler"})
        ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1})
    assert [r.message for r in caplog.records] == [
        "scheduler: clip_sample is off, steps_offset is 1, as in diffusers' latent pipelines"
    ]
    assert config.steps_offset == 1


def test_all_of_diffusers_classes_are_known() -> None:
    """Those that diffusers says can be exchanged for one another, but for two."""
    missing = {e.name for e in diffusers_schedulers.KarrasDiffusionSchedulers} - set(CLASSES)
    assert missing == {"DPMSolverSDEScheduler", "EDMEulerScheduler"}  # Brownian tree noise; another family
