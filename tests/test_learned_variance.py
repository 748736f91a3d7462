"""U-Nets that make a variance beside their prediction: diffusers' DDPMScheduler in a plain loop, slots, and what is
refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import ops
import pytest
import tiny
import torch
from sessions import OnTorch
from torch import Tensor

from fastldm import Pipeline, Request, Session
from fastldm.errors import CheckpointError, InputError
from fastldm.kernels import use
from fastldm.kernels.projection import Projection
from fastldm.model import describe
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import Guidance, Run
from fastldm.runtime.noise import draw_step_noise
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.table import make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NEGATIVE = "blurry"


def scheduler(**options: Any) -> Any:
    return diffusers.DDPMScheduler(**{**SD, "clip_sample": False, "variance_type": "learned_range", **options})


def source(family: str = "sd1", **options: Any) -> Any:
    return tiny.pipeline(family, unet=tiny.unet(family, out_channels=8), scheduler=scheduler(**options))


@torch.no_grad()
def loop(pipe: Any, guidance: float, steps: int, seed: int = 0) -> Tensor:
    """As IF, Kandinsky and unCLIP have it: predictions are guided, and the variance is that of the prompt's row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=g)
    text, negative = pipe.encode_prompt("a cat", "cpu", 1, guidance > 1, NEGATIVE)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        out = pipe.unet(x, t, text).sample
        if guidance > 1:
            (unguided, _), (guided, variance) = pipe.unet(x, t, negative).sample.chunk(2, 1), out.chunk(2, 1)
            out = torch.cat((unguided + guidance * (guided - unguided), variance), 1)
        x = pipe.scheduler.step(out, t, x, generator=g).prev_sample
    return x


def options(guidance: float, steps: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    own = {"guidance_scale": guidance, "num_inference_steps": steps, "seed": seed, "output_type": "latent"}
    return {"prompt": "a cat", "negative_prompt": NEGATIVE, **own, **more}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"thresholding": True, "sample_max_value": 1.5},
        {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_learned_variance_equals_diffusers(config: dict[str, Any], guidance: float) -> None:
    expected = loop(source(**config), guidance, 5)
    got = Pipeline.from_diffusers(source(**config))(**options(guidance, 5)).images
    assert ops.error(got, expected) < 3e-5


def test_requests_with_learned_variance_share_steps(tmp_path: Path) -> None:
    source().save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert pipe.unet.config.learns_variance
    with Session(pipe, max_batch=4) as session:
        queries = [options(4.0, 5), options(1.0, 4, 1), options(3.0, 5, 2, sampler="euler")]
        together = [session.submit(**query) for query in queries]
        for future, query in zip(together, queries, strict=True):
            assert ops.error(future.result().images, pipe(**query).images) < 2e-5
        assert ops.error(together[1].result().images, loop(source(), 1.0, 4, 1)) < 3e-5


def test_other_samplers_read_the_latents_channels_alone() -> None:
    plain = tiny.unet("sd1")
    first = tiny.unet("sd1", out_channels=8).state_dict()
    plain.load_state_dict({k: v[:4] if k.startswith("conv_out") else v for k, v in first.items()})
    fixed = scheduler(variance_type="fixed_small")
    halved = Pipeline.from_diffusers(tiny.pipeline("sd1", unet=plain, scheduler=fixed))
    whole = Pipeline.from_diffusers(source())
    for sampler in ("ddim", "dpm++ 2m", "heun", "euler a"):
        query = options(3.0, 3, sampler=sampler, guidance_rescale=0.5)
        assert ops.error(whole(**query).images, halved(**query).images) < 1e-5


@pytest.mark.parametrize("kernel", [False, True])
def test_slots_read_a_learned_variance(kernel: bool) -> None:
    """Beside others, rescaled, projected with momentum, and of samplers that do not read it."""
    unet = Pipeline.from_diffusers(source()).unet
    ddpm, ddim = (
        make_table(read_scheduler({"_class_name": name, **dict(scheduler().config), **more}, None, "a file"), 4)
        for name, more in (("DDPMScheduler", {}), ("DDIMScheduler", {"variance_type": None}))
    )
    apg = Projection(0.2, 3.0, 0.6)
    guidances = [Guidance(4.0, 0.6), Guidance(), Guidance(3.0, apg=apg), Guidance(5.0, 0.3)]

    def runs() -> list[Run]:
        made = []
        for k, (guidance, table) in enumerate(zip(guidances, (ddpm, ddpm, ddpm, ddim), strict=True)):
            g = torch.Generator().manual_seed(k)
            latents = torch.randn(1, 4, 8, 8, generator=g)
            noises = draw_step_noise(table, latents.shape, g, torch.float32, "cpu")
            text = torch.randn(1 + guidance.guided, 7, 32, generator=g)
            temb = unet.time_rows(torch.from_numpy(table.timesteps))[:, None]
            made.append(Run(table, latents, noises, guidance, temb=temb, text_kv=unet.cross_kv(text)))
        return made

    def finish(batch: Any, own: list[Run]) -> list[Tensor]:
        for run in own:
            batch.admit(run)
        while not own[0].done:
            batch.step(own)
        return [batch.latents(run) for run in own]

    sizes: dict[str, Any] = {"slots": 4, "rows": 12, "height": 8, "width": 8, "tokens": 9, "steps": 8}
    with torch.no_grad():
        expected = [finish(EagerBatch(unet), [run])[0] for run in runs()]
        buffers = StaticBuffers.empty(unet.config, **sizes, dtype=torch.float32, device="cpu", averages=True)
        assert buffers.step.x.shape[1] == 4
        with use("triton") if kernel else nullcontext():
            found = finish(Slots(OnTorch(unet), buffers), runs())  # type: ignore[arg-type]
    for got, reference in zip(found, expected, strict=True):
        assert ops.error(got, reference) < 1e-5


def test_channels_beside_a_variance_tell_the_family(tmp_path: Path) -> None:
    tiny.pipeline("sd1-inpaint", unet=tiny.unet("sd1-inpaint", out_channels=8), scheduler=scheduler()).save_pretrained(
        tmp_path
    )
    spec = describe(tmp_path)
    assert (spec.unet.learns_variance, spec.unet.latent_channels, spec.unet.inpaints) == (True, 4, True)
    assert not spec.unet.edits
    assert not spec.unet.reads_depth


def test_variances_without_their_other_half_are_refused() -> None:
    wide = tiny.unet("sd1", out_channels=8)
    with pytest.raises(CheckpointError, match=r"makes 8 channels.*twice as many, as of a learned variance"):
        Pipeline.from_diffusers(tiny.pipeline("sd1", unet=wide))
    with pytest.raises(CheckpointError, match=r"variance_type is 'learned_range'.*makes 4 channels"):
        Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=scheduler()))
    solver = diffusers.DPMSolverMultistepScheduler(**SD, variance_type="learned_range")
    pipe = Pipeline.from_diffusers(tiny.pipeline("sd1", scheduler=solver))
    with pytest.raises(InputError, match=r"sampler is 'ddpm': .*this one makes none"):
        pipe.stages.complete(Request("a cat", sampler="ddpm"))


@pytest.mark.full
def test_bundles_have_a_learned_variance(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(source())
    with pytest.raises(InputError, match="whole_picture: this model's U-Net makes a variance"):
        pipe.export(tmp_path / "whole", whole_picture=True)
    bundle = Pipeline.from_pretrained(
        pipe.export(tmp_path / "bundle"), backend="onnxruntime", device="cpu", dtype="float32"
    )
    query = options(4.0, 4)
    assert ops.error(bundle(**query).images, pipe(**query).images) < 1e-4
