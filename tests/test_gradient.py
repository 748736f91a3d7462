"""Guidance by gradient: against exact posteriors, autograd through diffusers' and transformers' modules in plain loops,
and finite differences.

Over 500 lines, for what judges a gradient, what it goes through and what becomes of its request are one story.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import ip_adapters
import numpy as np
import ops
import pytest
import tiny
import torch
import torch.nn.functional as F
from sessions import options, tiny_pipeline
from torch import Tensor

from fastldm import Cancelled, ClassifierGuidance, CLIPGuidance, InputError, NonFinite, Pipeline, Request, Session
from fastldm.conditioning.image_encoder import Preprocessing
from fastldm.kernels import linear, observe
from fastldm.models import layers
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import Guidance, Run, denoise
from fastldm.runtime.gradient import Function, cutouts, spherical_distance
from fastldm.runtime.noise import draw_step_noise
from fastldm.samplers.names import SAMPLERS
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.samplers.spacing import alphas_cumprod
from fastldm.samplers.table import StepTable, make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (2, 4, 6, 5)

# ------------------------------------------------------------------------------- data whose posterior is known exactly

MEAN, DEVIATION = 0.3, 0.8  # of each number of x0
SEEN, ERROR = -0.7, 0.5  # y = x0 + ERROR * noise, which is what the gradient is told


class Exact:
    """Gaussian data: the network of a prediction type, and the gradient of log p(y | u). What u is made of is computed
    from the timestep alone."""

    def __init__(self, config: Any) -> None:
        self.config = config
        bar = alphas_cumprod(config).astype(np.float64)
        bar[-1] = max(bar[-1], 2**-24)
        self.log_sigmas = np.log(np.sqrt((1 - bar) / bar))

    def parts(self, t: float) -> tuple[float, float]:
        """signal and noise of u."""
        if self.config.preconditioned:
            sigma = math.exp(4 * t)
            scale = math.hypot(sigma, self.config.sigma_data)
            return 1 / scale, sigma / scale
        sigma = math.exp(np.interp(t, np.arange(len(self.log_sigmas)), self.log_sigmas))
        return 1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)

    def denoised(self, u: Tensor, t: float, mean: float = MEAN, deviation: float = DEVIATION) -> Tensor:
        a, s = self.parts(t)
        return (mean * s**2 + a * deviation**2 * u) / (s**2 + a**2 * deviation**2)

    def output(self, u: Tensor, t: float, *prior: float) -> Tensor:
        (a, s), x0 = self.parts(t), self.denoised(u, t, *prior)
        prediction, data = self.config.prediction_type, self.config.sigma_data
        if self.config.preconditioned:
            sigma = s / a
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
            f = (x0 - skip * u / a) / out
            return -f if prediction == "v_prediction" else f
        noise = (u - a * x0) / s
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[prediction]

    def posterior(self, u: Tensor, t: float) -> Tensor:
        """What the network of x0 given y predicts."""
        variance = DEVIATION**2 * ERROR**2 / (DEVIATION**2 + ERROR**2)
        mean = (MEAN * ERROR**2 + SEEN * DEVIATION**2) / (DEVIATION**2 + ERROR**2)
        return self.output(u, t, mean, math.sqrt(variance))

    def gradient(self, u: Tensor, t: Tensor) -> Tensor:
        """By autograd: y given u is normal around the denoised latent."""
        a, s = self.parts(float(t[0]))
        variance = DEVIATION**2 * s**2 / (s**2 + a**2 * DEVIATION**2)
        u = u.detach().double().requires_grad_()
        log_p = -((SEEN - self.denoised(u, float(t[0]))) ** 2) / (2 * (variance + ERROR**2))
        return torch.autograd.grad(log_p.sum(), u)[0].float()


def latents_of(table: StepTable, network: Callable[[Tensor, float], Tensor], gradient: Any = None) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=g) * table.init_noise_sigma
    noises = draw_step_noise(table, SHAPE, g, torch.float32, "cpu")
    run = Run(table, x, noises, gradient=None if gradient is None else Function(gradient))
    return denoise(lambda u, i, _: network(u.double(), float(table.timesteps[i])).float(), run)


def follows_the_posterior(name: str | None, file: dict[str, Any], steps: int = 6) -> None:
    config = read_scheduler(file, None, "a file")
    try:
        table = make_table(config, steps, sampler=name)
    except InputError as error:
        assert file["prediction_type"] == "sample"
        pytest.skip(f"diffusers' class has none of it: {error}")
    exact = Exact(config)
    expected = latents_of(table, exact.posterior)
    assert ops.error(latents_of(table, exact.output, exact.gradient), expected) < 2e-4
    assert ops.error(latents_of(table, exact.output), expected) > 0.1, "y tells something"


def scheduler(prediction: str) -> dict[str, Any]:
    return {"_class_name": "DDIMScheduler", **SD, "prediction_type": prediction, "timestep_spacing": "leading"}


EDM = {"_class_name": "EDMEulerScheduler", "sigma_max": 10.0}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
MOST = ["ddim", "euler", "dpm++ 2m", "dpm2", "unipc"]
# Of consistency models, of EDM's, from an image to noise, and those whose guidance is CFG++, of two branches.
OTHERS = ("consistency", "edm", "inverse", "cfg++", "unclip")


@pytest.mark.parametrize(
    ("name", "prediction"), [*((name, each) for name in MOST for each in PREDICTIONS[:2]), ("ddim", "sample")]
)
def test_gradients_lead_to_the_exact_posterior(name: str, prediction: str) -> None:
    follows_the_posterior(name, scheduler(prediction))


@pytest.mark.full
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not any(word in name for word in OTHERS)])
def test_every_sampler_takes_gradients(name: str, prediction: str) -> None:
    follows_the_posterior(name, scheduler(prediction))


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("name", [None, "dpm++ 2m", "euler a", "heun"])
def test_preconditioned_models_take_gradients(name: str | None, prediction: str) -> None:
    follows_the_posterior(name, {**EDM, "prediction_type": prediction})


def test_noise_alone_has_no_gradient() -> None:
    """At zero terminal SNR, where the latents say nothing of the image."""
    config = read_scheduler({**scheduler("v_prediction"), "rescale_betas_zero_snr": True}, None, "a file")
    table = make_table(
        read_scheduler({**config.raw, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, None, "a file"),
        4,
    )
    seen: list[float] = []

    def gradient(u: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(u)

    latents_of(table, lambda u, t: u, gradient)
    assert table.levels[0].signal == 0
    assert seen == table.timesteps[1:].tolist()


def test_intervals_bound_gradients_too() -> None:
    config = read_scheduler(scheduler("epsilon"), None, "a file")
    table, seen = make_table(config, 10), []
    g = torch.Generator().manual_seed(0)
    guidance = Guidance(start=0.3, end=0.8)
    run = Run(table, torch.randn(SHAPE, generator=g), [None] * 10, guidance)
    run.gradient = Function(lambda u, t: seen.append(float(t[0])) or torch.zeros_like(u))  # type: ignore[func-returns-value]
    denoise(lambda u, i, _: u, run)
    assert seen == table.timesteps[3:8].tolist()


# ------------------------------------------------------------------------------------------ modules that autograd sees


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel's, with its tokenizer."""
    path = tmp_path_factory.mktemp("clip")
    ip_adapters.whole_clip().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    tiny.peer("transformers").CLIPImageProcessor(size=32, crop_size=32).save_pretrained(path)
    return path


class Peer:
    """diffusers' and transformers' modules, and a plain loop of them."""

    def __init__(self, family: str, clip_folder: Path) -> None:
        self.pipe = tiny.pipeline(
            family, unet=tiny.unet(family, layers_per_block=1), vae=tiny.vae("sd1", sample_size=64)
        )
        clip = tiny.peer("transformers")
        self.clip = clip.CLIPModel.from_pretrained(clip_folder).eval().requires_grad_(False)
        self.tokenizer = clip.CLIPTokenizer.from_pretrained(clip_folder)
        self.ours = Pipeline.from_diffusers(self.pipe)
        self.ours.load_ranker(clip_folder)

    @torch.no_grad()
    def text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """States of negative and prompt (2, T, D), and the CLIP model's unit vector."""
        states = [self.pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("", prompt)]
        ids = self.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt")
        features = self.clip.get_text_features(**ids)
        return torch.cat(states), F.normalize(getattr(features, "pooler_output", features), dim=-1)

    def clip_loss(self, x0: Tensor, text: Tensor) -> Tensor:
        pictures = self.pipe.vae.decode(x0 / self.pipe.vae.config.scaling_factor).sample
        units = (pictures / 2 + 0.5).clamp(0, 1)
        units = F.interpolate(units, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )
        features = self.clip.get_image_features(pixel_values=(units - mean) / std)
        vectors = F.normalize(getattr(features, "pooler_output", features), dim=-1)
        return 2 * ((vectors - text).norm(dim=-1) / 2).arcsin() ** 2

    def sample(self, kind: str, steps: int, seed: int, scale: float, guidance: float, through: bool = True) -> Tensor:
        """Latents of a scheduler of diffusers, whose noise prediction the gradient moves."""
        names = {"ddim": "DDIM", "euler": "EulerDiscrete", "dpm++ 2m": "DPMSolverMultistep"}
        config = {**self.pipe.scheduler.config, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
        scheduler = getattr(diffusers, f"{names[kind]}Scheduler").from_config(config)
        scheduler.set_timesteps(steps)
        states, text = self.text("a cat")
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            bar = scheduler.alphas_cumprod[int(t)]
            u = scheduler.scale_model_input(x, t).detach().requires_grad_()
            if kind == "euler":
                sigma = scheduler.sigmas[scheduler.step_index]
                bar = 1 / (1 + sigma**2)
            with torch.no_grad():
                plain, prompted = self.pipe.unet(u.repeat(2, 1, 1, 1), t, states).sample.chunk(2)
            out = torch.lerp(plain, prompted, guidance)
            own = self.pipe.unet(u, t, states[1:]).sample if through else prompted
            v = config["prediction_type"] == "v_prediction"
            alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
            x0 = alpha * u - sigma * own if v else (u - sigma * own) / alpha
            variable = u if through else (x0 := x0.detach().requires_grad_())
            (g,) = torch.autograd.grad(-scale * self.clip_loss(x0, text).sum(), variable)
            g = g if through else alpha * g
            out = out - sigma / alpha * g if v else out - sigma * g
            x = scheduler.step(out, t, x).prev_sample.detach()
        return x


@pytest.fixture(scope="module")
def peer(clip_folder: Path) -> Peer:
    return Peer("sd1", clip_folder)


STEPS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "seed": 5}


def check_clip(peer: Peer, sampler: str, through: bool = True) -> None:
    own: Any = {"clip_guidance_scale": 300.0}
    if not through:
        own = {"guidance_fn": CLIPGuidance(300.0, through_unet=False)}
    got = peer.ours("a cat", sampler=sampler, **STEPS, **own).images
    plain = peer.ours("a cat", sampler=sampler, **STEPS).images
    expected = peer.sample(sampler, 4, 5, 300.0, 3.0, through)
    assert ops.error(plain, expected) > 1e-2, "it makes a difference"
    assert ops.error(got, expected) < 1e-4


@pytest.mark.parametrize("through", [True, False])
def test_clip_guidance_equals_a_plain_loop(through: bool, peer: Peer) -> None:
    check_clip(peer, "ddim", through)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++ 2m"])
def test_clip_guidance_equals_plain_loops(sampler: str, family: str, clip_folder: Path) -> None:
    check_clip(Peer(family, clip_folder), sampler)


def directional(function: Callable[[Tensor], Tensor], x: Tensor, step: float) -> tuple[float, float]:
    """The derivative of a weighed sum of a function's values along a random direction: by autograd, and by a central
    difference."""
    g = torch.Generator().manual_seed(7)
    direction = torch.randn(x.shape, generator=g).to(x)
    weights = torch.randn(function(x).shape, generator=g).to(x)
    variable = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((function(variable) * weights).sum(), variable)
    with torch.no_grad():
        above, below = (function(x + k * step * direction) for k in (1, -1))
    difference = float(((above - below) * weights).sum() / (2 * step))
    return float((gradient * direction).sum()), difference


def agree(pair: tuple[float, float], tolerance: float) -> None:
    assert abs(pair[1]) > 1e-3, "it changes something"
    assert abs(pair[0] - pair[1]) < tolerance * abs(pair[1])


@pytest.mark.parametrize("part", ["U-Net", "decoder", "image encoder"])
def test_networks_agree_with_finite_differences(part: str) -> None:
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ours = Pipeline.from_diffusers(tiny.pipeline("sd1", unet=tiny.unet("sd1", layers_per_block=1)))
    if part == "image encoder":
        encoder = ip_adapters.own_image_encoder().model.double()
        agree(directional(encoder, random(1, 3, encoder.config.image_size, encoder.config.image_size), 1e-5), 1e-6)
    elif part == "decoder":
        agree(directional(ours.vae.double().decode, random(1, 4, 6, 5), 1e-5), 1e-6)
    else:
        unet = ours.unet.double()
        states = random(1, 7, 32)
        agree(directional(lambda x: unet(x, 250.0, states), random(1, 4, 8, 8), 1e-5), 1e-6)


def test_gpus_way_through_the_network_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of networks in 16 bits on a GPU, which fuses, writes in place and has no gradient."""
    unet = Pipeline.from_diffusers(tiny.pipeline("sd1", unet=tiny.unet("sd1", layers_per_block=1))).unet.bfloat16()
    g = torch.Generator().manual_seed(3)
    x, states = (torch.randn(*shape, generator=g).bfloat16() for shape in ((2, 4, 8, 8), (2, 7, 32)))
    with torch.no_grad():
        temb, kv = unet.time_rows(torch.tensor([250.0])).expand(2, -1), unet.cross_kv(states)

    def gradient() -> tuple[Tensor, set[str]]:
        seen: set[str] = set()
        variable = x.clone().requires_grad_()
        with observe(lambda op, args, kwargs: seen.add(op.name)):
            out = unet.step(variable, temb, kv)
        return torch.autograd.grad(out.float().square().sum(), variable)[0], seen

    plain, _ = gradient()
    for module in (linear, layers):
        monkeypatch.setattr(module, "device_type", lambda x: "cuda")
    got, seen = gradient()
    assert "conv_group_norm" not in seen
    assert ops.error(got, plain) < 0.05  # rounded in another order
    with torch.no_grad(), observe(lambda op, args, kwargs: seen.add(op.name)):
        unet.step(x, temb, kv)
    assert "conv_group_norm" in seen


def runs_with_everything(tmp_path: Path) -> tuple[Pipeline, Request]:
    """Adapters beside the weights, a ControlNet, a T2I-Adapter and an IP-Adapter, PAG and reuse."""
    import controls
    import lora

    peer = tiny.pipeline("sd1")
    lora_file = lora.write(tmp_path / "a.safetensors", tiny.pipeline("sd1"), text=())
    pipe = Pipeline.from_diffusers(peer)
    pipe.load_lora_weights(lora_file, adapter_name="a")
    pipe.attach_control(controls.controlnet("sd1"), "net")
    pipe.attach_control(controls.t2i_adapter("full"), "t2i")
    pipe.load_ip_adapter(ip_adapters.folder(tmp_path / "ip", peer.unet, "base"), "models", "base.safetensors")
    request = Request(
        "a cat",
        seed=0,
        num_inference_steps=4,
        guidance_scale=3.0,
        pag_scale=2.0,
        reuse=2,
        control_image={"net": controls.picture(), "t2i": controls.picture(2)},
        ip_adapter_image=controls.picture(3),
        adapters={"a": 0.8},
        guidance_fn=lambda u, t: torch.zeros_like(u),
    )
    return pipe, request


def test_gradients_go_through_adapters_and_controls(tmp_path: Path) -> None:
    pipe, request = runs_with_everything(tmp_path)
    stages = pipe.stages

    def check() -> None:
        run = stages.prepare(stages.complete(request))
        batch = stages.new_batch(run, 1)
        assert isinstance(batch, EagerBatch)
        assert stages.adapters.enter(run)
        batch.admit(run)
        batch.step([run])  # the next row has reused features

        def network(u: Tensor) -> Tensor:
            return batch._for_autograd(run, u, run.row, (1,))

        u = batch.latents(run).clone()
        assert run.reuses
        with torch.no_grad():
            alone = stages.prepare(stages.complete(request.replace(guidance_scale=1.0, pag_scale=0.0, reuse=1)))
            alone.row = run.row
            assert stages.adapters.enter(alone)
            expected = EagerBatch(pipe.unet)._outputs([alone], [u])[0]
            stages.adapters.leave(alone)
        assert ops.error(network(u), expected) < 1e-6
        agree(directional(network, u, 1e-2), 5e-3)
        stages.adapters.leave(run)

    pipe.session.call(check)


# ------------------------------------------------------------------------------------------------------ in a session


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def towards(target: float, weight: float = 4.0) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda u, t: weight * (target - u)


def test_others_of_the_batch_are_as_alone(pipe: Pipeline) -> None:
    queries = [options(seed=k, steps=5 + k, guidance_scale=3.0) for k in range(4)]
    for k in (1, 2):
        queries[k]["guidance_fn"] = towards(0.5 * k)
    expected = [pipe(**query).images for query in queries]
    with Session(pipe, max_batch=4) as session:
        got = [each.result().images for each in [session.submit(**query) for query in queries]]
    for k, (ours, alone) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(ours - alone).max() < 2e-5
        plain = pipe(**{**queries[k], "guidance_fn": None}).images
        assert (np.abs(ours - plain).max() > 1e-2) == (k in (1, 2))


def test_runs_with_and_without_share_a_batch(pipe: Pipeline) -> None:
    requests = [Request(**options(seed=k, steps=4, guidance_scale=3.0)) for k in range(3)]
    requests[1] = requests[1].replace(guidance_fn=towards(1.0))
    stages = pipe.stages

    def finish(chosen: list[Request]) -> list[Tensor]:
        runs = [stages.prepare(stages.complete(request)) for request in chosen]
        batch = EagerBatch(stages.unet)
        for run in runs:
            batch.admit(run)
        while not runs[0].done:
            batch.step(runs)
        return [batch.latents(run) for run in runs]

    def both() -> tuple[list[Tensor], list[Tensor]]:
        return finish(requests), [finish([request])[0] for request in requests]

    for together, alone in zip(*pipe.session.call(both), strict=True):
        assert ops.error(together, alone) < 1e-5


def test_requests_with_gradients_have_their_own_turns(pipe: Pipeline) -> None:
    """So that a slow function delays others by its own share of the device, and graphs have none of it."""
    with Session(pipe, max_batch=4) as session:
        plain, guided = (session.submit(**options(steps=30, **more)) for more in ({}, {"guidance_fn": towards(1.0)}))
        plain.result(), guided.result()
        sizes = [bucket.size for bucket in session._buckets]
    assert sizes == [(64, 64), (64, 64)]


def raising(error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    def function(u: Tensor, t: Tensor) -> Tensor:
        raise error

    return function


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (raising(ValueError("my own")), InputError, r"at step 1 of 3 \(timestep .*\): ValueError: my own"),
    "none": (lambda u, t: None, InputError, "the gradient is .*None.*expected a floating point tensor"),
    "shape": (lambda u, t: u[:, :1], InputError, r"the gradient has shape \(1, 1, 8, 8\): expected \(1, 4, 8, 8\)"),
    "dtype": (lambda u, t: u.int(), InputError, "the gradient has dtype torch.int32"),
    "nan": (lambda u, t: u / 0 * 0, NonFinite, "at step 1 of 3 .* the gradient holds NaN"),
    "meta": (lambda u, t: u.to("meta"), InputError, "meta device"),
    "memory": (raising(torch.OutOfMemoryError("of a GPU")), MemoryError, "memory ran out"),
    "cancels": (raising(Cancelled("enough")), Cancelled, "^enough$"),
    "ends the thread": (raising(SystemExit(3)), RuntimeError, "the request's own work raised SystemExit"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_functions_are_their_requests(name: str, pipe: Pipeline) -> None:
    function, kind, message = BAD[name]
    good = options(steps=3, guidance_fn=towards(1.0))
    expected = pipe(**good).images
    with Session(pipe, max_batch=4) as session:
        futures = [session.submit(**good) for _ in range(2)]
        failing = session.submit(**{**good, "guidance_fn": function})
        plain = session.submit(**options(steps=3))
        with pytest.raises(kind, match=message):
            failing.result(60)
        for future in futures:
            assert np.abs(future.result(60).images - expected).max() < 2e-5
        assert plain.result(60).images.shape == expected.shape


def test_latents_are_the_networks_input(pipe: Pipeline) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def function(u: Tensor, t: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        seen.append((u.clone(), t))
        return u.mul_(0)  # writing into it does no harm

    images = pipe(**options(steps=3, sampler="euler", guidance_fn=function)).images
    assert np.abs(images - pipe(**options(steps=3, sampler="euler")).images).max() < 2e-5
    table = pipe.stages.table(pipe.stages.complete(Request(**options(steps=3, sampler="euler"))))
    assert [float(t) for _, t in seen] == table.timesteps.tolist()
    assert all(u.dtype == t.dtype == torch.float32 and len(t) == len(u) for u, t in seen)
    assert 0.5 < float(seen[0][0].std()) < 1.5, "scaled as the network reads it"


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Linear(8, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head((self.conv(x) + t[:, None, None, None] / 1000).sigmoid().mean((2, 3)) * 30)


def test_classifier_guidance_equals_a_plain_loop(pipe: Pipeline) -> None:
    torch.manual_seed(1)
    classifier = Classifier()
    query = options(steps=4, num_images_per_prompt=2, output_type="latent", sampler="ddim", guidance_scale=1.0)
    got = pipe(**query, guidance_fn=ClassifierGuidance(classifier, [3, 1], 20.0)).images
    stages = pipe.stages
    run = stages.prepare(stages.complete(Request(**query)))
    bar = alphas_cumprod(stages.schedule)
    x = run.latents
    ends = [*run.table.timesteps[1:], run.table.timesteps[-1] - 250]
    for i, (t, after) in enumerate(zip(run.table.timesteps, ends, strict=True)):
        now, then = (
            float(bar[int(k)]) if k >= 0 else stages.schedule.set_alpha_to_one or float(bar[0]) for k in (t, after)
        )
        u = x.detach().requires_grad_()
        log_p = classifier(u, torch.full((2,), float(t))).log_softmax(1)
        (g,) = torch.autograd.grad(20 * (log_p[0, 3] + log_p[1, 1]), u)
        with torch.no_grad():
            assert run.temb is not None
            out = stages.unet.step(x, run.temb[i].expand(2, -1), run.text_kv)
        out = out - math.sqrt(1 - now) * g
        x0 = (x - math.sqrt(1 - now) * out) / math.sqrt(now)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * out
    assert ops.error(got, x) < 1e-4
    assert ops.error(pipe(**query).images, x) > 1e-2
    invariant = [session_image(pipe, {**query, "guidance_fn": ClassifierGuidance(classifier, [3, 1], 20.0)})]
    assert ops.error(invariant[0], x) < 1e-4


def session_image(pipe: Pipeline, query: dict[str, Any]) -> Tensor:
    """With each image as if it were alone."""
    with Session(pipe, batch_invariant=True) as session:
        return session.submit(**query).result().images  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------- CLIP


def test_pictures_of_tensors_are_prepared_as_pictures() -> None:
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 5, 6, generator=g), (80, 100), mode="bicubic").clamp(0, 1)
    units = (smooth * 255).round() / 255
    picture = diffusers.image_processor.VaeImageProcessor.numpy_to_pil(units.movedim(1, -1).numpy())[0]
    for prepare in (Preprocessing(40, 32), Preprocessing(80, 80)):
        got = prepare.normalised(prepare.cut(units))[0]
        assert (got - prepare(picture)).abs().max() < 0.02  # PIL rounds to bytes in between


@pytest.mark.full
def test_the_default_model_climbs_its_towers_score() -> None:
    pipe = Pipeline.default(device="cpu", dtype="float32")
    query: dict[str, Any] = {"prompt": ["a cat", "guitar"], "candidates": 1, "seed": [0, 0], "num_inference_steps": 8}
    for through in (True, False):
        scores = [pipe(**query, guidance_fn=CLIPGuidance(scale, through_unet=through)).scores for scale in (0, 30, 100)]
        assert all(a < b < c for a, b, c in zip(*scores, strict=True))


def test_images_of_a_request_are_guided_as_alone(peer: Peer) -> None:
    query = {**STEPS, "sampler": "ddim", "guidance_fn": CLIPGuidance(300.0, num_cutouts=3)}
    both = peer.ours(["a cat", "a dog"], **{**query, "seed": [5, 6]}).images
    alone = [peer.ours(text, **{**query, "seed": seed}).images for text, seed in (("a cat", 5), ("a dog", 6))]
    assert ops.error(both, torch.cat(alone)) < 1e-4
    own = peer.ours("a dog", **{**query, "guidance_fn": CLIPGuidance(300.0, "a cat", num_cutouts=3)}).images
    assert (
        ops.error(own, peer.ours("a dog", **{**query, "guidance_fn": CLIPGuidance(300.0, num_cutouts=3)}).images) > 1e-3
    )
    invariant = session_image(peer.ours, {**query, "prompt": ["a cat", "a dog"], "seed": [5, 6]})
    assert ops.error(invariant, torch.cat(alone)) < 1e-4


def test_own_decoders_take_the_autoencoders_place(peer: Peer) -> None:
    factor = peer.ours.vae.config.scaling_factor
    query = {**STEPS, "prompt": "a cat", "sampler": "ddim"}
    own = CLIPGuidance(300.0, decoder=lambda x0: peer.ours.vae.decode(x0 / factor))
    expected = peer.ours(**query, clip_guidance_scale=300.0).images
    assert ops.error(peer.ours(**query, guidance_fn=own).images, expected) < 1e-5
    failing = CLIPGuidance(300.0, decoder=lambda x0: x0.nothing)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"CLIP guidance at step 1 of 4 .*AttributeError"):
        peer.ours(**query, guidance_fn=failing)


def test_cutouts_are_squares_of_the_picture() -> None:
    picture = torch.arange(48 * 40).reshape(1, 48, 40).expand(3, -1, -1) / 1920
    g = torch.Generator().manual_seed(0)
    squares = cutouts(picture, 50, 8, g)
    assert squares.shape == (50, 3, 8, 8)
    sides = (squares[:, 0, 0, -1] - squares[:, 0, 0, 0]) * 1920 / 7 * 8  # columns are 1 / 1920 apart
    assert sides.min() < 12
    assert sides.max() > 36
    assert torch.equal(cutouts(picture, 2, 8, torch.Generator().manual_seed(0)), squares[:2])
    assert cutouts(picture, 1, 64, g).shape == (1, 3, 64, 64)


def test_distance_is_half_the_squared_angle() -> None:
    for angle in (0.1, 1.0, 3.0):
        pair = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert float(spherical_distance(*pair)) == pytest.approx(angle**2 / 2, rel=1e-4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guidance_fn": 3}, "guidance_fn is 3: expected a function"),
    ({"clip_guidance_scale": -1.0}, "clip_guidance_scale is -1"),
    ({"clip_guidance_scale": 1.0, "guidance_fn": print}, "were both given"),
    ({"clip_guidance_scale": 1.0, "prompt": " "}, "there is none"),
    ({"guidance_fn": CLIPGuidance(1.0, ["a", "b"])}, "2 texts for 1 prompts"),
    ({"clip_prompt": "a dog"}, "clip_prompt is not supported: give guidance_fn=CLIPGuidance"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_cannot_guide_is_refused(more: dict[str, Any], message: str, peer: Peer) -> None:
    with pytest.raises(InputError, match=message):
        peer.ours(**{"prompt": "a cat", **more})


def test_models_without_a_tower_refuse_early(pipe: Pipeline, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="CLIP guidance goes by a CLIP image encoder, and this model has none: give"):
        pipe.stages.complete(Request("a cat", clip_guidance_scale=10.0))
    assert pipe.stages.complete(Request("a cat", clip_guidance_scale=0.0)).gradient is None
    stages = peer.ours.stages
    monkeypatch.setattr(stages, "backend", "openvino")
    with pytest.raises(InputError, match=r"bundle on openvino, whose networks have no gradients.*load the checkpoint"):
        stages.complete(Request("a cat", clip_guidance_scale=10.0))
    assert stages.complete(Request("a cat", guidance_fn=towards(1.0))).gradient is not None
    monkeypatch.setattr(stages, "_steps", object())
    with pytest.raises(InputError, match="graph of whole steps, which no gradient enters"):
        stages.complete(Request("a cat", guidance_fn=towards(1.0)))


def test_eight_bits_have_no_gradient(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = peer.ours.stages
    layer = stages.unet.mid_block.attentions[0].proj_out  # type: ignore[union-attr]
    monkeypatch.setattr(layer, "eight_bits", object(), raising=False)
    with pytest.raises(InputError, match=r"fp8 is on.*disable_fp8"):
        stages.complete(Request("a cat", clip_guidance_scale=10.0))
    assert stages.complete(Request("a cat", guidance_fn=CLIPGuidance(10.0, through_unet=False)))
