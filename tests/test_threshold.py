"""Dynamic thresholding: the quantile, diffusers' schedulers, and slots whose tables are rewritten."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
import ops
import pytest
import torch
from torch import Tensor

from benchmarks.networks import TINY
from fastldm import Pipeline, Request
from fastldm.errors import InputError
from fastldm.kernels import use
from fastldm.kernels.threshold import quantile
from fastldm.runtime.denoise import Guidance, Run, denoise
from fastldm.runtime.noise import draw_step_noise
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.table import StepTable, make_table

SHAPE = (2, 4, 6, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)


def file(name: str, **options: Any) -> dict[str, Any]:
    return {"_class_name": name, **SD, "thresholding": True, "sample_max_value": 1.5, **options}


def network(x: Tensor, t: Any) -> Tensor:
    """Large, and each sample otherwise, so that limits differ between samples and steps."""
    scale = torch.arange(1, len(x) + 1).view(-1, 1, 1, 1)
    return 0.3 * scale * x + torch.sin(3 * x + float(t) / 300)


def test_quantile_is_that_of_torch() -> None:
    x = torch.randn(5, 333, generator=torch.Generator().manual_seed(0)).abs()
    for ratio in (0.0, 0.5, 0.9, 0.995, 1.0):
        torch.testing.assert_close(quantile(x, ratio), torch.quantile(x, ratio, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_thresholded_samples_equal_diffusers(name: str, prediction: str) -> None:
    options = file(name, prediction_type=prediction, dynamic_thresholding_ratio=0.9)
    table = make_table(read_scheduler(options, None, "a file"), 6)
    assert table.threshold == (0.9, 1.5)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=g)
    noises = draw_step_noise(table, SHAPE, g, torch.float32, "cpu")
    got = denoise(lambda u, i, _: network(u, table.timesteps[i]), Run(table, x * table.init_noise_sigma, noises))
    scheduler = getattr(diffusers, name).from_config(options)
    scheduler.set_timesteps(6)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=g) * scheduler.init_noise_sigma
    extra = {} if name == "DPMSolverSinglestepScheduler" else {"generator": g}
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **extra, return_dict=False)[0]
    assert ops.error(got, x) < 2e-5


class Network:
    def step(self, model_input: Tensor, temb: Tensor, text: Any, **options: Any) -> Tensor:
        return torch.tanh(model_input) * 3 + temb[:, :1, None, None]


@pytest.mark.parametrize("kernel", [False, True])
def test_slots_are_thresholded_beside_others(kernel: bool) -> None:
    """Each image by its own limit, those of earlier rows in the history; with guidance that is rescaled too."""
    sizes: dict[str, Any] = {"slots": 6, "rows": 18, "height": 6, "width": 5, "tokens": 2, "steps": 16}
    buffers = StaticBuffers.empty(TINY, **sizes, dtype=torch.float32, device="cpu")

    def run_of(table: StepTable, guidance: Guidance, seed: int) -> Run:
        g = torch.Generator().manual_seed(seed)
        rows = 2 * (1 + guidance.guided)
        x, temb = torch.randn(SHAPE, generator=g), torch.randn(len(table), rows, TINY.time_channels, generator=g)
        kv = tuple(torch.zeros(rows, 2, 2 * width) for width in TINY.cross_widths)
        noises = draw_step_noise(table, SHAPE, g, torch.float32, "cpu")
        return Run(table, x * table.init_noise_sigma, noises, guidance, temb=temb, text_kv=kv)

    def alone(run: Run) -> Tensor:
        return denoise(lambda u, i, branches: Network().step(u, run.texts_of(run.temb[i], branches), ()), run)  # type: ignore

    def runs() -> list[Run]:
        names = ("DPMSolverMultistepScheduler", "DDIMScheduler")
        tables = [make_table(read_scheduler(file(name), None, "a file"), 7) for name in names]
        plain = make_table(read_scheduler({**file("DDIMScheduler"), "thresholding": False}, None, "a file"), 7)
        guidances = (Guidance(3.0, 0.5), Guidance(2.0), Guidance(4.0))
        return [run_of(table, own, k) for k, (table, own) in enumerate(zip((*tables, plain), guidances, strict=True))]

    expected = [alone(run) for run in runs()]
    batch, joined = Slots(Network(), buffers), runs()  # type: ignore[arg-type]
    for run in joined:
        batch.admit(run)
    with use("triton") if kernel else nullcontext():
        while not joined[0].done:
            batch.step(joined)
            if joined[0].row == 3:
                batch.recondition(joined[0])  # as after a callback: limits of its history are kept
    for run, reference in zip(joined, expected, strict=True):
        assert ops.error(batch.latents(run), reference) < 2e-5


def test_graphs_of_whole_steps_refuse_thresholds_early(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Pipeline.default(device="cpu").stages
    monkeypatch.setattr(stages, "_steps", object())  # of a bundle, where it is an engine
    request = Request("a cat", num_inference_steps=2)
    assert stages.complete(request).num_inference_steps == 2
    monkeypatch.setattr(stages, "schedule", read_scheduler(file("DDIMScheduler"), None, "a file"))
    with pytest.raises(InputError, match="no dynamic thresholding"):
        stages.complete(request.replace(sampler=None))
