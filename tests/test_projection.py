"""Adaptive projected guidance: diffusers' guider, and slots whose weights are rewritten."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext
from typing import Any

import diffusers
import ops
import pytest
import tiny
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from sessions import OnTorch, guided_runs
from torch import Tensor

from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.kernels import use
from fastldm.kernels.projection import Projection, project
from fastldm.kernels.step import guide
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Guidance, Run, denoise
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.table import make_table

SHAPE = (2, 4, 6, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x: Tensor, t: float, text: int) -> Tensor:
    """Each sample otherwise, so that some differences are shortened and others are not."""
    scale = torch.arange(1, len(x) + 1).view(-1, 1, 1, 1)
    return torch.tanh(x) + 0.2 * scale * (text + 0.3) * torch.sin(x + t / 300 + text)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("momentum", [None, -0.5, 0.7])
@pytest.mark.parametrize(
    ("norm", "eta", "rescale", "interval"),
    [
        *itertools.product((0.0, 1.5, 15.0), (0.0, 1.0, 0.3), (0.0,), ((0.0, 1.0),)),
        (1.5, 0.0, 0.7, (0.0, 1.0)),
        (1.5, 0.2, 0.4, (0.25, 0.75)),
    ],
)
def test_projected_steps_equal_diffusers(
    norm: float,
    eta: float,
    rescale: float,
    interval: tuple[float, float],
    momentum: float | None,
    original: bool,
    prediction: str,
) -> None:
    options = {"_class_name": "DDIMScheduler", "prediction_type": prediction, "clip_sample": False, **SD}
    table = make_table(read_scheduler(options, None, "a file"), 8)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    apg = Projection(eta, norm, momentum or 0.0, original)
    guidance = Guidance(6.0, rescale, *interval, apg=apg, original=original)

    def ours(u: Tensor, i: int, branches: tuple[int, ...]) -> Tensor:
        t = float(table.timesteps[i])
        return torch.cat([network(own, t, k) for own, k in zip(u.chunk(len(branches)), branches, strict=True)])

    got = denoise(ours, Run(table, x, [None] * 8, guidance))
    guider = AdaptiveProjectedGuidance(
        6.0,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=norm,
        eta=eta,
        guidance_rescale=rescale,
        use_original_formulation=original,
        start=interval[0],
        stop=interval[1],
    )
    scheduler = diffusers.DDIMScheduler.from_config(options)
    scheduler.set_timesteps(8)
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(i, 8, t)
        guider.prepare_inputs({})
        out = guider.forward(network(x, float(t), 1), network(x, float(t), 0)).pred
        x = scheduler.step(out, t, x).prev_sample
    assert ops.error(got, x) < 2e-5


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_original_guidance_equals_diffusers(interval: tuple[float, float]) -> None:
    g = torch.Generator().manual_seed(0)
    guided, unguided = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    table = make_table(read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False, **SD}, None, "a file"), 8)
    guidance = Guidance(0.8, 0.0, *interval, original=True)
    guider = ClassifierFreeGuidance(0.8, use_original_formulation=True, start=interval[0], stop=interval[1])
    for i, weights in enumerate(guidance.weights(table)):
        guider.set_state(i, 8, table.timesteps[i])
        expected = guider.forward(guided, unguided).pred
        assert ops.error(guide({0: unguided, 1: guided}, weights), expected) < 1e-6


def test_weights_of_nothing_are_finite() -> None:
    zeros, some = torch.zeros(SHAPE), torch.ones(SHAPE)
    for pair in ((zeros, zeros), (some, some), (some, zeros)):
        for norm in (0.0, 5.0):
            assert all(x.isfinite().all() for x in project(*pair, 7.0, Projection(0.0, norm, -0.5)))


GUIDANCES = [
    Guidance(6.0, apg=Projection(0.0, 2.0)),
    Guidance(4.0),
    Guidance(5.0, 0.6, 0.25, 0.8, apg=Projection(0.3, 1.0)),
    Guidance(3.0, pag_scale=2.0, pag_layers=(6,)),
    Guidance(apg=Projection(0.0, 2.0)),
    Guidance(3.0, 0.5),
]
WITH_MOMENTUM = [
    Guidance(6.0, 0.4, 0.2, apg=Projection(0.0, 2.0, -0.5)),
    Guidance(4.0),
    Guidance(5.0, apg=Projection(0.3, 1.0)),
    Guidance(3.0, pag_scale=2.0, pag_layers=(6,)),
    Guidance(5.0, 0.6, apg=Projection(0.2, 3.0, 0.6, True), original=True),
    Guidance(0.7, original=True),
]


@pytest.mark.parametrize(
    ("guidances", "averages", "kernel"),
    [
        (GUIDANCES, False, False),
        (GUIDANCES, False, True),
        (WITH_MOMENTUM, True, False),
        pytest.param(WITH_MOMENTUM, True, True, marks=pytest.mark.full),
    ],
)
def test_projected_rows_share_a_batch_with_others(guidances: list[Guidance], averages: bool, kernel: bool) -> None:
    unet = Pipeline.from_diffusers(tiny.pipeline("sd1")).unet
    table = make_table(read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False, **SD}, None, "a file"), 5)

    def runs() -> list[Run]:
        return guided_runs(unet, table, guidances)

    def finish(batch: Batch, runs: list[Run]) -> list[Tensor]:
        for run in runs:
            batch.admit(run)
        while not runs[0].done:
            batch.step(runs)
            if runs[0].row == 3:
                batch.recondition(runs[0])  # as after a callback
        return [batch.latents(run) for run in runs]

    sizes: dict[str, Any] = {"slots": 9, "rows": 24, "height": 8, "width": 8, "tokens": 9, "steps": 8}
    with torch.no_grad():
        expected = [finish(EagerBatch(unet), [run])[0] for run in runs()]
        for got, reference in zip(finish(EagerBatch(unet), runs()), expected, strict=True):
            assert ops.error(got, reference) < 1e-5
        buffers = StaticBuffers.empty(unet.config, **sizes, dtype=torch.float32, device="cpu", averages=averages)
        slots = Slots(OnTorch(unet), buffers)  # type: ignore[arg-type]
        assert [slots.holds(run) for run in runs()] == [averages or not run.guidance.averages for run in runs()]
        with use("triton") if kernel else nullcontext():
            found = finish(slots, runs())
            for run in list(slots._slots):  # and once more, in slots where others were averaged
                slots.release(run)
            again = finish(slots, runs()) if averages else found
    for got, second, reference in zip(found, again, expected, strict=True):
        assert ops.error(got, reference) < 1e-5
        assert torch.equal(got, second)
    plain = runs()[0]
    plain.guidance = dataclasses.replace(
        plain.guidance, apg=plain.guidance.apg._replace(momentum=0.0) if averages else None
    )
    assert ops.error(expected[0], finish(EagerBatch(unet), [plain])[0]) > 1e-3, "it makes a difference"


def test_fields_are_those_of_the_guider() -> None:
    stages = Pipeline.from_diffusers(tiny.pipeline("sd1")).stages
    theirs = AdaptiveProjectedGuidance()
    defaults = (theirs.eta, theirs.adaptive_projected_guidance_rescale)
    for options, expected in (
        ({}, None),
        ({"apg_eta": 0.0}, Projection(0.0, defaults[1])),
        ({"apg_rescale": 3.0}, Projection(defaults[0], 3.0)),
        ({"apg_rescale": 0, "apg_eta": 0.5}, Projection(0.5, 0.0)),
        ({"apg_momentum": -0.5}, Projection(*defaults, -0.5)),
        ({"apg_eta": 0.0, "use_original_formulation": True}, Projection(0.0, defaults[1], 0.0, True)),
        ({"apg_eta": 0.0, "guidance_scale": 1.0}, None),
    ):
        assert stages.guidance(stages.complete(Request("a cat", **options))).projection == expected


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd1", {"apg_rescale": -1.0}, "apg_rescale is -1"),
        ("sd1", {"apg_eta": 0.0, "sampler": "euler cfg++"}, "apg_eta is 0: .* is CFG"),
        ("sd1", {"apg_rescale": 5.0, "pag_scale": 3.0}, "apg_rescale is 5: .* pag_scale is above 0"),
        ("sd1", {"apg_momentum": -1.5}, "apg_momentum is -1.5"),
        ("sd1", {"adaptive_projected_guidance_momentum": -0.5}, "it is apg_momentum"),
        (
            "sd1",
            {"use_original_formulation": True, "sampler": "euler cfg++"},
            "of classifier-free guidance, and sampler",
        ),
        ("lcm", {"use_original_formulation": True}, "reads the guidance scale itself"),
        ("sd1-edit", {"apg_eta": 0.0, "image": torch.zeros(3, 64, 64)}, "two guidance scales"),
    ],
)
def test_what_is_not_projected_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.from_diffusers(tiny.pipeline(family))("a cat", **options)
