"""The denoising loop against diffusers' loops: guidance, passes, inpainting, callbacks, noise, non-finite latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastldm import kernels
from fastldm.errors import Cancelled, InputError, NonFinite
from fastldm.runtime.denoise import Guidance, Inpainting, Run, denoise
from fastldm.runtime.noise import draw_step_noise, randn
from fastldm.samplers.names import SAMPLERS
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import StepTable, make_table

SHAPE = (2, 4, 6, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def table(steps: int = 6, sampler: str = "ddim", **arguments: Any) -> StepTable:
    return make_table(read_config({"_class_name": "DDIMScheduler", **SD}), steps, sampler=sampler, **arguments)


class Network:
    """Says something that depends on the row and the branch; records what it was called with."""

    def __init__(self, batch: int = SHAPE[0]) -> None:
        self.batch, self.calls = batch, []

    def __call__(self, model_input: Tensor, i: int, branches: Sequence[int]) -> Tensor:
        self.calls.append((tuple(model_input.shape), model_input.dtype, i, branches))
        prompts = torch.tensor([-0.5, 1.0, 0.4])[list(branches)].repeat_interleave(self.batch)[:, None, None, None]
        return torch.tanh(model_input[:, :4].float() + prompts * (0.3 + 0.1 * i)).to(model_input.dtype)


def draw_noise(
    table: StepTable, shape: Sequence[int], generators: Any, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """What a run starts from, and the noise of its rows, as a text-to-image pipeline draws them."""
    return randn(shape, generators, dtype, "cpu").float(), draw_step_noise(table, shape, generators, dtype, "cpu")


def started(table: StepTable, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    noise, noises = draw_noise(table, SHAPE, torch.Generator().manual_seed(seed), torch.float32)
    return noise * table.init_noise_sigma, noises


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_matches_diffusers(rescale: float) -> None:
    """The whole loop of a guided pipeline, with diffusers' scheduler and its rescale_noise_cfg."""
    steps, network = table(6, "euler"), Network()
    x, noises = started(steps)
    got = denoise(network, Run(steps, x, noises, Guidance(7.5, rescale)))

    scheduler = diffusers.EulerDiscreteScheduler.from_config(SD)
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(torch.cat([x] * 2), t)
        unguided, guided = Network()(model_input, i, (0, 1)).chunk(2)
        out = unguided + 7.5 * (guided - unguided)
        if rescale:
            out = rescale_noise_cfg(out, guided, rescale)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(), [(1,)] * 6),
        (Guidance(1.0), [(1,)] * 6),
        (Guidance(0.0), [(1,)] * 6),
        (Guidance(1.01), [(0, 1)] * 6),
        (Guidance(3.0, 0.0, 0.2, 0.7), [(1,)] * 2 + [(0, 1)] * 3 + [(1,)]),
        (Guidance(3.0, 0.0, 0.2, 0.7, image_scale=1.5), [(1,)] * 2 + [(0, 1, 2)] * 3 + [(1,)]),
        (Guidance(3.0, image_scale=1.0), [(1, 2)] * 6),
        (Guidance(3.0, image_scale=3.0), [(0, 1)] * 6),
        (Guidance(3.0, image_scale=0.99), [(1,)] * 6),
        (Guidance(1.0, image_scale=2.0), [(1,)] * 6),
    ],
)
def test_rows_have_the_branches_they_need(guidance: Guidance, branches: list[tuple[int, ...]]) -> None:
    """One call of so many rows for each image: a branch whose weight is 0 is not computed."""
    steps, network = table(6), Network()
    denoise(network, Run(steps, *started(steps), guidance))
    assert [call[3] for call in network.calls] == branches
    assert [call[0][0] for call in network.calls] == [2 * len(own) for own in branches]
    assert [call[2] for call in network.calls] == list(range(6))


def test_guidance_interval_counts_user_steps() -> None:
    """Heun's and PLMS's extra rows are guided as the step they belong to."""
    assert Guidance(2.0, 0.0, 0.5).branches(table(4, "heun")) == [(1,)] * 4 + [(0, 1)] * 3
    assert Guidance(2.0, 0.0, 0.0, 0.5).branches(table(4, "plms")) == [(0, 1)] * 3 + [(1,)] * 2


@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 1.0), (2.0, 2.0), (1.0, 1.5), (4.0, 0.5)])
def test_three_branches_match_instruct_pix2pix(scales: tuple[float, float]) -> None:
    """The guidance of diffusers' StableDiffusionInstructPix2PixPipeline, with its rows in its order."""
    steps = table(6, "euler")
    x, noises = started(steps)
    got = denoise(Network(), Run(steps, x, noises, Guidance(scales[0], image_scale=scales[1])))
    scheduler = diffusers.EulerDiscreteScheduler.from_config(SD)
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        out = Network()(scheduler.scale_model_input(x, t), i, (1,))
        if scales[0] > 1 and scales[1] >= 1:
            rows = scheduler.scale_model_input(torch.cat([x] * 3), t)
            text, image, none = Network()(rows, i, (1, 2, 0)).chunk(3)
            out = none + scales[0] * (text - image) + scales[1] * (image - none)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_unguided_steps_use_the_conditional_branch() -> None:
    """Guidance at scale 1 + epsilon tends to the single pass."""
    steps = table(5)
    x, noises = started(steps)
    unguided, guided = (denoise(Network(), Run(steps, x, noises, Guidance(scale))) for scale in (1.0, 1.00001))
    torch.testing.assert_close(unguided, guided, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_input_has_extra_channels(dtype: torch.dtype) -> None:
    """The input is scaled, in the model's dtype, with the extra channels unscaled behind; latents stay float32."""
    steps, seen = table(3, "euler a"), []
    x, noises = started(steps)
    extra = torch.randn(SHAPE[0], 5, *SHAPE[2:])

    def network(model_input: Tensor, i: int, branches: Sequence[int]) -> Tensor:
        seen.append(model_input)
        return model_input[:, :4] * 0.1

    got = denoise(network, Run(steps, x, noises, Guidance(2.0), extra=extra.to(dtype), dtype=dtype))
    assert got.dtype == torch.float32
    assert {model_input.dtype for model_input in seen} == {dtype}
    first = seen[0]
    assert first.shape == (4, 9, *SHAPE[2:])
    torch.testing.assert_close(first[:2], first[2:], rtol=0, atol=0)
    torch.testing.assert_close(first[:2, :4], (x * float(steps.rows[0, 0])).to(dtype))
    torch.testing.assert_close(first[:2, 4:], extra.to(dtype), rtol=0, atol=0)


def test_each_row_may_have_channels_of_its_own() -> None:
    """With guidance those of all branches, without it the prompts' alone."""
    steps, seen = table(4), []
    x, noises = started(steps)
    extra = torch.randn(3 * SHAPE[0], 5, *SHAPE[2:])

    def network(model_input: Tensor, i: int, branches: Sequence[int]) -> Tensor:
        seen.append(model_input[:, 4:])
        return model_input[:, :4] * 0.1

    for image_scale, guided in ((None, extra[:4]), (1.5, extra), (1.0, extra[2:])):
        seen.clear()
        denoise(network, Run(steps, x, noises, Guidance(2.0, end=0.5, image_scale=image_scale), extra=extra))
        for own, expected in zip(seen, (guided, guided, extra[2:4], extra[2:4]), strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=0)


def test_inpainting_keeps_the_unmasked_image() -> None:
    """Where the mask is 0 the result is the picture itself (parity of the rest: test_solvers.py)."""
    steps = table(5, "dpm++ 2m", strength=0.8)
    x, noises = started(steps)
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[..., :3] = 1
    init, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    got = denoise(Network(), Run(steps, x, noises, inpainting=Inpainting(mask, init, noise)))
    torch.testing.assert_close(got[..., 3:], init[..., 3:], rtol=0, atol=0)
    assert (got[..., :3] - init[..., :3]).abs().min() > 1e-4


def test_on_step_may_replace_latents() -> None:
    """Called after every row with row, timestep and latents; what it returns replaces them."""
    steps, calls = table(4, "heun"), []
    x, noises = started(steps)
    halfway: list[Tensor] = []

    def on_step(i: int, t: float, latents: Tensor) -> Tensor | None:
        calls.append((i, t))
        halfway.append(latents.clone())
        return torch.zeros(SHAPE, dtype=torch.float64) if i == 6 else None

    got = denoise(Network(), Run(steps, x, noises), on_step=on_step)
    assert calls == [(i, float(t)) for i, t in enumerate(steps.timesteps)]
    assert torch.equal(got, torch.zeros(SHAPE))
    assert not torch.equal(halfway[0], halfway[1])

    def cancel(i: int, t: float, latents: Tensor) -> Tensor | None:
        raise Cancelled

    with pytest.raises(Cancelled):
        denoise(Network(), Run(steps, x, noises), on_step=cancel)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_latents_name_the_step(bad: float) -> None:
    """One bad value is found, and the step that it came from is named, though later steps spread it."""
    steps = table(6, "heun")
    x, noises = started(steps)

    def network(model_input: Tensor, i: int, branches: Sequence[int]) -> Tensor:
        out = model_input * 0.1
        if i == 3:
            out[1, 2, 3, 4] = bad
        return out

    with pytest.raises(NonFinite, match=r"after step 2 of 6 \(row 3, timestep 599.4\)"):
        denoise(network, Run(steps, x, noises))
    x[0, 0, 0, 0] = bad
    with pytest.raises(NonFinite, match="that denoising starts from"):
        denoise(Network(), Run(steps, x, noises))


def test_noises_must_match_the_table() -> None:
    steps, noiseless = table(5, "euler a"), table(5)
    x, noises = started(steps)
    with pytest.raises(InputError, match="not those of this table"):
        Run(noiseless, x, noises)
    with pytest.raises(InputError, match="not those of this table"):
        Run(steps, x, noises[1:])


# ---- noise ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_noise_matches_diffusers(count: int, dtype: torch.dtype) -> None:
    def generators() -> Any:
        drawn = [torch.Generator().manual_seed(5 + k) for k in range(max(count, 1))]
        return drawn if count else drawn[0]

    torch.testing.assert_close(
        randn(SHAPE, generators(), dtype, "cpu"), randn_tensor(SHAPE, generators(), dtype=dtype), rtol=0, atol=0
    )
    steps, g, their = table(3, "euler a"), generators(), generators()
    start, noises = draw_noise(steps, SHAPE, g, dtype)
    for drawn in (start, *noises):
        assert drawn is not None
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn, randn_tensor(SHAPE, their, dtype=dtype).float(), rtol=0, atol=0)


def test_generator_lists_draw_per_image() -> None:
    steps = table(4, "dpm++ 2m sde")
    both = draw_noise(steps, SHAPE, [torch.Generator().manual_seed(s) for s in (1, 2)], torch.float32)
    alone = draw_noise(steps, (1, *SHAPE[1:]), torch.Generator().manual_seed(2), torch.float32)
    torch.testing.assert_close(both[0][1:], alone[0], rtol=0, atol=0)
    for batched, single in zip(both[1], alone[1], strict=True):
        torch.testing.assert_close(batched[1:], single, rtol=0, atol=0)


def test_step_noise_has_the_samplers_dtype() -> None:
    """DPM-Solver's SDE noise is float32 in diffusers whatever the model's dtype, other samplers' is the model's."""
    for sampler, drawn in (("dpm++ 2m sde", torch.float32), ("euler a", torch.float16)):
        noises = draw_step_noise(table(2, sampler), SHAPE, torch.Generator().manual_seed(0), torch.float16, "cpu")
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=drawn).float()
        torch.testing.assert_close(noises[0], expected, rtol=0, atol=0)


def test_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(InputError, match="3 generators for a batch of 2"):
        randn(SHAPE, [torch.Generator() for _ in range(3)], torch.float32, "cpu")


# ---- nothing in the loop waits, and little is done ----


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_never_waits(sampler: str) -> None:
    """To read a value on torch's meta device is an error: the loop runs through, and only the check after it fails."""
    steps, calls = table(7, sampler), []
    latents, x = (torch.empty(SHAPE, device="meta") for _ in range(2))
    noises = [x if draws else None for draws in steps.draws]

    def network(model_input: Tensor, i: int, branches: Sequence[int]) -> Tensor:
        calls.append(i)
        return model_input

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        denoise(network, Run(steps, latents, noises, Guidance(3.0, 0.5), Inpainting(x[:, :1], x, x)))
    assert calls == list(range(len(steps)))


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# Of these 4 are every step's: the two halves put together, split and mixed, and the check.
@pytest.mark.parametrize(("sampler", "most"), [("ddim", 6), ("euler", 6), ("dpm++ 2m", 9), ("unipc", 14)])
def test_a_step_is_few_operators(sampler: str, most: int) -> None:
    """What a step costs besides the network is bounded: small models feel it."""
    counts = []
    for steps in (table(20, sampler), table(30, sampler)):
        x, noises = started(steps)
        with Counted() as counted:
            denoise(lambda model_input, i, branches: model_input, Run(steps, x, noises, Guidance(3.0)))
        counts.append(counted.count)
    assert (counts[1] - counts[0]) / 10 <= most


def test_step_matches_its_definition() -> None:
    """kernels.step on a row without zeros, against the sums of its docstring in float64."""
    g = torch.Generator().manual_seed(0)
    own = dict(zip((*kernels.step.COLUMNS, *kernels.step.EXTRA), torch.randn(28, generator=g).tolist(), strict=True))
    own["clip"] = abs(own["clip"])
    row = list(own.values())
    x, y, out, noise, h1, h2, h3, difference, v = torch.randn(9, *SHAPE, generator=g)
    _c_in, p, q, a, a1, b0, b1, b2, b3, d, e, e1, f0, f1, f2, f3, _r, _s = np.array(row[:18])
    m = (p * x.double() + q * out).clip(-own["clip"], own["clip"])
    assert (m.abs() == own["clip"]).any()
    states = {"difference": difference, "variance": v}
    after, anchor, history = kernels.step.step(row, x, y, (h1, h2, h3), out, noise, **states)
    deviation = d * np.exp(own["d_ratio"]) ** ((v.double() + 1) / 2)
    expected = a * x.double() + a1 * y + b0 * m + b1 * h1 + b2 * h2 + b3 * h3 + deviation * noise
    expected = expected + own["o"] * out + own["gx"] * difference
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)
    expected = e * x.double() + e1 * y + f0 * m + f1 * h1 + f2 * h2 + f3 * h3
    torch.testing.assert_close(anchor.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(history[0].double(), m, rtol=1e-5, atol=1e-5)
    assert [h is k for h, k in zip(history[1:], (h1, h2, h3), strict=True)] == [True] * 3
    mask, init, start = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=g), h1, h2
    expected = mask * x.double() + (1 - mask) * (_r * init + _s * start)
    torch.testing.assert_close(kernels.step.blend(row, x, mask, init, start).double(), expected, rtol=1e-5, atol=1e-5)


def test_step_writes_nothing_in_place() -> None:
    steps = table(6, "unipc")
    x, noises = started(steps)
    before = x.clone()
    first = denoise(Network(), Run(steps, x, noises, Guidance(2.0)))
    assert torch.equal(x, before)
    assert torch.equal(denoise(Network(), Run(steps, x, noises, Guidance(2.0))), first)
