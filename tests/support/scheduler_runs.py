"""Trajectories of diffusers' schedulers and of ours, with the same network and the same noise.

A `Case` is a scheduler class, its configuration, and how it is run; `diffusers_run` and `our_run` run it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from fastldm.kernels import step as step_kernel
from fastldm.runtime.denoise import Inpainting, Run, denoise
from fastldm.runtime.noise import draw_step_noise, randn
from fastldm.samplers import spacing
from fastldm.samplers import table as schedule
from fastldm.samplers.classes import CLASSES
from fastldm.samplers.config import ScheduleConfig
from fastldm.samplers.grid import Churn, SolverRow
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import COLUMNS, StepTable, make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PARITY = 1e-4  # relative error of float32
SHAPE = (4, 6, 5)
MIX = 0.5 * torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
MIXES = {dtype: MIX.to(dtype) for dtype in (torch.float32, torch.float64)}


def network(model_input: Tensor, t: float) -> Tensor:
    """Stands in for a U-Net: smooth, nonlinear, mixes channels, and depends on the timestep."""
    mixed = torch.matmul(MIXES[model_input.dtype], model_input.flatten(2))
    return torch.tanh(mixed + math.sin(float(t) / 300)).view_as(model_input)


@contextlib.contextmanager
def fast_diffusers() -> Iterator[None]:
    """Cache or shorten what diffusers repeats in each of ten thousand runs, always with the same result."""
    keys = staticmethod(lambda cls: {*arguments_of(cls.__init__)})
    with mock.patch.object(ConfigMixin, "_get_init_keys", keys), mock.patch("scipy.integrate.quad", quad):
        yield


def quad(f: Callable[[float], Any], low: Any, high: Any, **_: Any) -> tuple[Any]:
    """The integral of a cubic or less, exactly, by Gauss and Legendre: what LMS needs of scipy, in 2 calls, not 21."""
    center, radius = (low + high) / 2, (high - low) / 2
    return ((f(center - radius / 3**0.5) + f(center + radius / 3**0.5)) * radius,)


@functools.cache
def arguments_of(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]
    steps: int
    churn: dict[str, float] = field(default_factory=dict)
    eta: float = 0.0
    batch: int = 1
    generators: int = 0  # 0: one for the whole batch
    strength: float = 1.0
    image_to_image: bool = False
    mask: bool = False  # inpainting by blending
    custom: dict[str, list[float]] = field(default_factory=dict)
    start: float | None = None  # denoising_start: goes on with the image's latents
    end: float | None = None  # denoising_end

    def scheduler(self, exact: bool = False) -> Any:
        cls = in_float64(self.name) if exact else getattr(diffusers, self.name)
        extra = {"PNDMScheduler": {"skip_prk_steps": True}}.get(self.name, {})
        clip = {"clip_sample": False} if "clip_sample" in arguments_of(cls.__init__) else {}
        with mock.patch.object(cls, "set_timesteps", _lay_out_nothing):
            return cls.from_config({**self.config, **extra, **clip})

    def schedule(self) -> ScheduleConfig:
        return read_config({"_class_name": self.name, **self.config}, steps_offset=None)

    def table(self) -> StepTable:
        cut = {"denoising_start": self.start, "denoising_end": self.end}
        return make_table(
            self.schedule(),
            self.steps,
            eta=self.eta,
            strength=self.strength,
            churn=Churn(**self.churn),
            **cut,
            **self.custom,
        )

    def takes(self, argument: str) -> bool:
        """Whether diffusers' class has it in its configuration."""
        return argument in arguments_of(getattr(diffusers, self.name).__init__)

    @property
    def spacing_function(self) -> Any:
        return CLASSES[self.name].spacing

    @property
    def on_sigmas(self) -> bool:
        return self.spacing_function in (spacing.on_sigmas, spacing.on_lambdas, spacing.on_inverse_lambdas)

    @property
    def learned(self) -> bool:
        """Whether the network predicts the variance, too."""
        return self.config.get("variance_type") == "learned_range"

    def network(self, model_input: Tensor, t: float) -> Tensor:
        out = network(model_input, t)
        return torch.cat((out, out.flip(1)), 1) if self.learned else out

    @property
    def started(self) -> bool:
        """Whether it starts in the middle of the schedule."""
        return self.start is not None or ((self.image_to_image or self.mask) and self.strength < 1)

    def cutoff(self, fraction: float) -> int:
        """As diffusers' pipelines of SDXL compute it."""
        trained = self.schedule().num_train_timesteps
        return round(trained - (fraction * trained))

    def randomness(self) -> Any:
        generators = [torch.Generator().manual_seed(7 + k) for k in range(max(self.generators, 1))]
        return generators if self.generators else generators[0]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """An image's latents and a mask."""
        g = torch.Generator().manual_seed(3)
        return torch.randn(self.batch, *SHAPE, generator=g), torch.rand(self.batch, 1, *SHAPE[1:], generator=g).round()


def _lay_out_nothing(scheduler: Any, *_: Any) -> None:
    """For constructors of two-stage schedulers, which take half a second for a thousand steps that nobody uses."""
    scheduler.sigmas = torch.zeros(1)


# ---- diffusers, with other options ----


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


class Stride:
    """In place of a scheduler's num_inference_steps: num_train_timesteps // it is the stride."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __rfloordiv__(self, _: int) -> int:
        return self.stride


@dataclass(frozen=True)
class DiffusersOptions:
    """How diffusers' scheduler is run; the defaults are what its pipelines do."""

    exact: bool = False  # in float64
    nearest: bool = False  # with the nearest float32 roots
    begin: int | None = None  # given where to start
    last: float | None = None  # the last sigma, as a fraction of the previous
    eta: float | None = None
    zero_snr: bool = False  # on betas rescaled as other classes of diffusers rescale them
    next_level: bool = False  # DDIM and PNDM: each step ends where the next begins
    history: bool = False  # PNDM and LMS: their history begins where they do
    inside_strength: bool = False  # TCD: set_timesteps is given the strength
    own_steps: bool = False  # the strength is a fraction of the caller's timesteps, not of the scheduler's calls

    def __or__(self, options: Mapping[str, Any]) -> DiffusersOptions:
        return DiffusersOptions(**{**vars(self), **options})


def lies_inside(case: Case, options: DiffusersOptions) -> bool:
    """Whether the scheduler gets the strength, as LCM's pipelines pass it, and its steps are not cut."""
    return (case.name == "LCMScheduler" or options.inside_strength) and not case.custom and case.start is None


def training_bar(case: Case, options: DiffusersOptions) -> Tensor | None:
    """alphas_cumprod where it is not as the scheduler's constructor makes it."""
    if options.zero_snr:
        bar = diffusers.DDIMScheduler.from_config({**case.config, "clip_sample": False}).alphas_cumprod
        bar[-1] = 2**-24 if case.on_sigmas else 1e-14
    elif options.exact:  # from the same float32 alphas_cumprod; sigmas are made of them in float32, and kept so
        bar = getattr(case.scheduler(), "alphas_cumprod", None)
    else:
        return None
    if bar is None:  # EDM's classes, and consistency models'
        return None
    return bar.double() if options.exact and not case.on_sigmas else bar


def laid_out(case: Case, options: DiffusersOptions) -> Any:
    """diffusers' scheduler with its steps laid out."""
    with nearest_roots() if options.exact or options.nearest else contextlib.nullcontext():
        scheduler = case.scheduler(options.exact)
        bar = training_bar(case, options)
        if bar is not None:
            scheduler.alphas_cumprod = bar
            if options.exact and case.name == "UnCLIPScheduler":  # whose betas are those of float32 in one step
                scheduler.alphas = bar / torch.cat((torch.ones(1), bar[:-1]))
                scheduler.betas = 1 - scheduler.alphas
            if not getattr(scheduler.config, "set_alpha_to_one", True):
                scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = bar[0]
            if hasattr(scheduler, "lambda_t"):
                scheduler.alpha_t, scheduler.sigma_t = bar.sqrt(), (1 - bar).sqrt()
                scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
        strength = {"strength": case.strength} if lies_inside(case, options) else {}
        scheduler.set_timesteps(**(case.custom or {"num_inference_steps": case.steps}), **strength)
    if options.last is not None:
        scheduler.sigmas[-1] = options.last * scheduler.sigmas[-2]
    return scheduler


def diffusers_run(case: Case, options: DiffusersOptions = DiffusersOptions()) -> tuple[Tensor, Any]:
    """What diffusers' pipelines do with a scheduler: latents and generators."""
    dtype, scheduler = torch.float64 if options.exact else torch.float32, laid_out(case, options)
    g, (init, mask), begin, skipped = case.randomness(), case.inputs(), options.begin, 0
    if (case.image_to_image or case.mask) and not lies_inside(case, options):
        steps = len(scheduler.timesteps) if case.custom and not options.own_steps else case.steps
        skipped = max(steps - min(int(steps * case.strength), steps), 0)
        begin = skipped * getattr(scheduler, "order", 1)
    if case.start is not None:
        left = int((scheduler.timesteps < case.cutoff(case.start)).sum())
        left += scheduler.order == 2 and left % 2 == 0
        skipped = begin = len(scheduler.timesteps) - left
    timesteps = scheduler.timesteps[begin or 0 :] if skipped else scheduler.timesteps
    if begin is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if options.history and case.name == "PNDMScheduler" and skipped:
        repeated = case.start is not None and skipped > 1  # which the list has twice
        own = [scheduler.timesteps[0], *scheduler.timesteps[2:]][skipped - repeated :]
        timesteps = torch.stack([*own[:2], *own[1:]])
    strides = [int(a - b) for a, b in zip(timesteps, [*timesteps[1:], -1], strict=True)] if options.next_level else []
    if options.next_level and case.name == "PNDMScheduler" and len(strides) > 2:
        strides[1] = strides[0]  # the second call comes from where the first came from
    if case.end is not None:
        timesteps = timesteps[: int((timesteps >= case.cutoff(case.end)).sum())]
    noise = diffusers.utils.torch_utils.randn_tensor((case.batch, *SHAPE), generator=g).to(dtype)
    if case.start is not None:
        x = init.to(dtype)
    elif case.image_to_image or (case.mask and case.strength < 1):
        x = scheduler.add_noise(init.to(dtype), noise, timesteps[:1].repeat(case.batch))
    else:
        x = noise * scheduler.init_noise_sigma
    takes = arguments_of(type(scheduler).step)
    extra = {"generator": g, "eta": case.eta if options.eta is None else options.eta, **case.churn}
    extra = {key: value for key, value in extra.items() if key in takes}
    for i, t in enumerate(timesteps):
        if options.next_level:
            scheduler.num_inference_steps = Stride(strides[i])
        if options.history and case.name == "LMSDiscreteScheduler":
            extra["order"] = min(i + 1, 4)
        if case.name == "UnCLIPScheduler":  # as its pipelines
            extra["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
        out = case.network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
        if case.mask:
            original = init.to(dtype)
            if i < len(timesteps) - 1:
                original = scheduler.add_noise(original, noise, torch.tensor([timesteps[i + 1]]))
            x = (1 - mask) * original + mask * x
    return x, g


# ---- ours ----


def draw_noise(table: StepTable, case: Case, generators: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What a run starts from, and the noise of its rows, as a text-to-image pipeline draws them."""
    shape = (case.batch, *SHAPE)
    return randn(shape, generators, torch.float32, "cpu"), draw_step_noise(
        table, shape, generators, torch.float32, "cpu"
    )


def our_run(case: Case) -> tuple[Tensor, Any]:
    table, g, (init, mask) = case.table(), case.randomness(), case.inputs()
    noise, noises = draw_noise(table, case, g)
    x = noise * table.init_noise_sigma
    if case.start is not None:
        x = init
    elif case.image_to_image or (case.mask and case.strength < 1):
        x = table.start[0] * init + table.start[1] * noise
    inpainting = Inpainting(mask, init, noise) if case.mask else None
    run = Run(table, x, noises, inpainting=inpainting)
    return denoise(lambda model_input, i, _: case.network(model_input, table.timesteps[i]), run), g


def exact_table(case: Case) -> tuple[StepTable, list[SolverRow], np.ndarray]:
    """The table, the rows it is made of, and its numbers in float64, not yet rounded."""
    packed: list[Any] = []
    pack = schedule._pack
    with mock.patch.object(schedule, "_pack", lambda rows: packed.append((rows, pack(rows))) or packed[0][1]):
        table = case.table()
    return table, *packed[0]


def our_exact_run(case: Case) -> Tensor:
    """A run in float64, with a table that is not rounded to float32."""
    table, rows, numbers = exact_table(case)
    noise, noises = draw_noise(table, case, case.randomness())
    noise, (init, mask) = noise.double(), case.inputs()
    x, history = noise * table.init_noise_sigma, ()
    if case.start is not None:
        x = init.double()
    elif case.image_to_image or (case.mask and case.strength < 1):
        x = rows[0].level[0] * init + rows[0].level[1] * noise
    y = torch.zeros_like(x)
    mixing = [(0.0, 1.0, 0.0, 0.0)] * len(numbers)
    for i, row in enumerate(step_kernel.table_rows(numbers, table.draws, mixing).tolist()):
        drawn = None if noises[i] is None else noises[i].double()
        out, variance = case.network(row[0] * x, rows[i].t).split(SHAPE[0], 1) if case.learned else (None, None)
        out = network(row[0] * x, rows[i].t) if out is None else out
        x, y, history = step_kernel.step(row, x, y, history, out, drawn, variance=variance)
        if case.mask:
            known = row[COLUMNS.index("r")] * init + row[COLUMNS.index("s")] * noise
            x = mask * x + (1 - mask) * known
    return x


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
