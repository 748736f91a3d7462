"""Adaptive projected guidance: diffusers' guider, and slots whose weights are rewritten."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import diffusers
import ops
import pytest
import tiny
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from sessions import guided_runs
from torch import Tensor

from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.kernels import use
from fastldm.kernels.projection import projected_weights
from fastldm.models.unet import UNet
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
@pytest.mark.parametrize(
    ("norm", "eta", "rescale", "interval"),
    [
        *itertools.product((0.0, 1.5, 15.0), (0.0, 1.0, 0.3), (0.0,), ((0.0, 1.0),)),
        (1.5, 0.0, 0.7, (0.0, 1.0)),
        (1.5, 0.2, 0.4, (0.25, 0.75)),
    ],
)
def test_projected_steps_equal_diffusers(
    norm: float, eta: float, rescale: float, interval: tuple[float, float], prediction: str
) -> None:
    options = {"_class_name": "DDIMScheduler", "prediction_type": prediction, "clip_sample": False, **SD}
    table = make_table(read_scheduler(options, None, "a file"), 8)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(6.0, rescale, *interval, apg=(eta, norm))

    def ours(u: Tensor, i: int, branches: tuple[int, ...]) -> Tensor:
        t = float(table.timesteps[i])
        return torch.cat([network(own, t, k) for own, k in zip(u.chunk(len(branches)), branches, strict=True)])

    got = denoise(ours, Run(table, x, [None] * 8, guidance))
    guider = AdaptiveProjectedGuidance(
        6.0,
        adaptive_projected_guidance_rescale=norm,
        eta=eta,
        guidance_rescale=rescale,
        start=interval[0],
        stop=interval[1],
    )
    scheduler = diffusers.DDIMScheduler.from_config(options)
    scheduler.set_timesteps(8)
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(i, 8, t)
        out = guider.forward(network(x, float(t), 1), network(x, float(t), 0)).pred
        x = scheduler.step(out, t, x).prev_sample
    assert ops.error(got, x) < 2e-5


def test_weights_of_nothing_are_finite() -> None:
    zeros, some = torch.zeros(SHAPE), torch.ones(SHAPE)
    for pair in ((zeros, zeros), (some, some), (some, zeros)):
        for norm in (0.0, 5.0):
            assert all(w.isfinite().all() for w in projected_weights(*pair, 7.0, 0.0, norm))


GUIDANCES = [
    Guidance(6.0, apg=(0.0, 2.0)),
    Guidance(4.0),
    Guidance(5.0, 0.6, 0.25, 0.8, apg=(0.3, 1.0)),
    Guidance(3.0, pag_scale=2.0, pag_layers=(6,)),
    Guidance(apg=(0.0, 2.0)),
    Guidance(3.0, 0.5),
]


class OnTorch:
    """A network without Triton, for the interpreter is slow."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet

    def step(self, *args: Any, **options: Any) -> Tensor:
        with use("torch"):
            return self.unet.step(*args, **options)


@pytest.mark.parametrize("kernel", [False, True])
def test_projected_rows_share_a_batch_with_others(kernel: bool) -> None:
    unet = Pipeline.from_diffusers(tiny.pipeline("sd1")).unet
    table = make_table(read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False, **SD}, None, "a file"), 5)

    def runs() -> list[Run]:
        return guided_runs(unet, table, GUIDANCES)

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
        buffers = StaticBuffers.empty(unet.config, **sizes, dtype=torch.float32, device="cpu")
        slots = Slots(OnTorch(unet), buffers)  # type: ignore[arg-type]
        with use("triton") if kernel else nullcontext():
            found = finish(slots, runs())
    for got, reference in zip(found, expected, strict=True):
        assert ops.error(got, reference) < 1e-5
    plain = runs()[0]
    plain.guidance = Guidance(6.0)
    assert ops.error(expected[0], finish(EagerBatch(unet), [plain])[0]) > 1e-3, "it makes a difference"


def test_fields_are_those_of_the_guider() -> None:
    stages = Pipeline.from_diffusers(tiny.pipeline("sd1")).stages
    theirs = AdaptiveProjectedGuidance()
    defaults = (theirs.eta, theirs.adaptive_projected_guidance_rescale)
    for options, expected in (
        ({}, None),
        ({"apg_eta": 0.0}, (0.0, defaults[1])),
        ({"apg_rescale": 3.0}, (defaults[0], 3.0)),
        ({"apg_rescale": 0, "apg_eta": 0.5}, (0.5, 0.0)),
        ({"apg_eta": 0.0, "guidance_scale": 1.0}, None),
    ):
        assert stages.guidance(stages.complete(Request("a cat", **options))).projection == expected


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd1", {"apg_rescale": -1.0}, "apg_rescale is -1"),
        ("sd1", {"apg_eta": 0.0, "sampler": "euler cfg++"}, "apg_eta is 0: .* is CFG"),
        ("sd1", {"apg_rescale": 5.0, "pag_scale": 3.0}, "apg_rescale is 5: .* pag_scale is above 0"),
        ("sd1", {"adaptive_projected_guidance_momentum": -0.5}, "momentum.*running average"),
        ("sd1", {"use_original_formulation": True}, "use_original_formulation"),
        ("sd1-edit", {"apg_eta": 0.0, "image": torch.zeros(3, 64, 64)}, "two guidance scales"),
    ],
)
def test_what_is_not_projected_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.from_diffusers(tiny.pipeline(family))("a cat", **options)
