"""From eager diffusers to captured steps, one rung at a time: the end-to-end gain of each optimisation.

    python -m benchmarks.ladder                        SD1.5 512, SDXL 1024, SD-Turbo 512 on this GPU
    python -m benchmarks.ladder --model sd15-512 --compile
    python -m benchmarks.ladder --model tiny --device cpu --steps 3 --rounds 1      the same code, anywhere

Full-size networks with seeded random weights. The rungs run the same steps of the same sampler (DPM-Solver++ 2M), each
with all optimisations of the one before:

    diffusers          its U-Net and its scheduler, eager                    (where diffusers is installed)
    diffusers compiled the same, its U-Net by torch.compile max-autotune     (--compile: takes minutes)
    eager              plain PyTorch, channels first: benchmarks/plain.py, and the sampler's functions
    channels-last      fastldm's layers on PyTorch's ops: the full U-Net at each step
    + kernels          its ops by the kernels that the table selects
    + partial          text keys and values once a prompt, time rows once a schedule
    + graphs           slots in static buffers, the step and its end in one captured graph

A step has two times: host, until it is issued, and full, until the device is done. Rungs take turns; medians of rounds.
Then images through the public Pipeline, by stage, and requests a second: one at a time, and submitted at once to a
session.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.networks import (
    CLIP_G,
    CLIP_H,
    CLIP_L,
    SD15,
    SD_TURBO,
    SDXL,
    TINY,
    TINY_CLIP,
    TINY_VAE,
    VAE,
    with_random_weights,
)
from benchmarks.plain import PlainUNet
from fastldm.conditioning.text import TextStage
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.kernels import use
from fastldm.loading import spec as loading
from fastldm.loading.prepare import prepare
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig, UNetConfig, VAEConfig
from fastldm.models.families import FAMILIES, Family
from fastldm.models.unet import AddedConditions, UNet
from fastldm.pipeline import Pipeline
from fastldm.request import Request
from fastldm.runtime.batch import Batch, EagerBatch
from fastldm.runtime.denoise import Run, State
from fastldm.runtime.graph import WARM_UPS
from fastldm.samplers.scheduler_config import read_scheduler
from fastldm.serving.session import Session

SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULER |= {"beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Model:
    unet: UNetConfig
    text: tuple[TextConfig, ...]
    family: str
    size: int
    steps: int
    floor_ms: float  # of a step, on an H100 at 800 TFLOP/s and 3 TB/s
    best_ms: float | None  # the best published time for an H100
    vae: VAEConfig = VAE


MODELS = {
    "sd15-512": Model(SD15, (CLIP_L,), "sd1", 512, 20, 2.0, 9.56),
    "sdxl-1024": Model(SDXL, (CLIP_L, CLIP_G), "sdxl", 1024, 20, 16.9, 44.6),
    "sd-turbo-512": Model(SD_TURBO, (CLIP_H,), "sd-turbo", 512, 1, 1.0, None),
    "tiny": Model(TINY, (TINY_CLIP,), "sd1", 64, 20, 0.0, None, TINY_VAE),
}


def pipeline(model: Model, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """The model with random weights, as the library would load it."""
    with torch.device("meta"):
        unet, vae = UNet(model.unet), loading.autoencoder(model.vae)
        encoders = [CLIPText(config) for config in model.text]
    stages = tuple(TextStage(Tokenizer(), with_random_weights(encoder, device, dtype)) for encoder in encoders)  # type: ignore[arg-type]
    networks = {"unet": with_random_weights(unet, device, dtype), "vae": with_random_weights(vae, device, dtype)}
    prepared = prepare(networks | {f"text encoder {i}": stage.model for i, stage in enumerate(stages)})
    family: Family = next(family for family in FAMILIES if family.name == model.family)
    checkpoint: Any = SimpleNamespace(scheduler=SCHEDULER, index={}, loaded=False, source="")
    schedule = read_scheduler(SCHEDULER, None, "SCHEDULER")
    spec = loading.Spec(checkpoint, model.unet, model.vae, model.text, family, schedule)
    loaded = loading.LoadedModel(unet, vae, stages, prepared, device=device, dtype=dtype)
    return Pipeline(spec, loaded, model.family)


def request(pipe: Pipeline, model: Model, steps: int) -> Request:
    return pipe.stages.complete(
        Request(prompt="a castle at dusk", height=model.size, width=model.size, num_inference_steps=steps, seed=0)
    )


# ---------------------------------------------------------------------------------------------------------- the rungs


class WholeUNet:
    """A U-Net with no cached tensors: `+ partial` is compared with it."""

    def __init__(self, unet: UNet, run: Run, text: Tensor, added: AddedConditions | None) -> None:
        self.unet, self.text, self.added = unet, text, added
        self.timesteps = torch.from_numpy(run.table.timesteps).to(text.device)
        self.plain = PlainUNet(unet)

    def __call__(self, model_input: Tensor, i: int) -> Tensor:
        rows = self.unet.time_rows(self.timesteps[i].expand(model_input.shape[0]), added=self.added)
        return self.unet.step(model_input, rows, self.unet.cross_kv(self.text[-model_input.shape[0] :]))

    def channels_first(self, model_input: Tensor, i: int) -> Tensor:
        return self.plain(
            model_input, self.timesteps[i].expand(model_input.shape[0]), self.text[-model_input.shape[0] :], self.added
        )


def rungs(pipe: Pipeline, model: Model, steps: int, compiled: bool) -> dict[str, Callable[[], object]]:
    """Functions that take all steps of a run, by name."""
    completed = request(pipe, model, steps)
    run = pipe.stages.prepare(completed)
    conditioning = pipe.stages.encode(completed)
    hidden, pooled, _ = conditioning.network_rows()
    added = None
    if pooled is not None and model.unet.needs_added:
        ids = torch.tensor([[model.size, model.size, 0, 0, model.size, model.size]], device=pipe.device)
        added = AddedConditions(pooled, ids.float().expand(len(pooled), -1))

    full = WholeUNet(pipe.unet, run, hidden, added)

    def loop(route: Any, network: Callable[[Tensor, int], Tensor] = full) -> None:
        with use(route) if route else nullcontext():
            state = State(run)
            for i in range(len(run.table)):
                state.end(i, network(state.input(i), i))

    def batch(make: Callable[[], Batch]) -> Callable[[], None]:
        active = make()

        def steps() -> None:
            run.row = 0
            active.admit(run)
            while not run.done:
                active.step([run])
            active.release(run)

        return steps

    contenders: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("diffusers") and model.family in ("sd1", "sd-turbo"):
        contenders["diffusers"] = diffusers_loop(model, run, hidden, None)
        if compiled:
            contenders["diffusers compiled"] = diffusers_loop(model, run, hidden, "max-autotune")
    return contenders | {
        "eager": lambda: loop("torch", full.channels_first),
        "channels-last": lambda: loop("torch"),
        "+ kernels": lambda: loop(None),
        "+ partial": batch(lambda: EagerBatch(pipe.unet)),
        "+ graphs": batch(lambda: pipe.stages.new_batch(run, 1)),
    }


def diffusers_loop(model: Model, run: Run, hidden: Tensor, mode: str | None) -> Callable[[], None]:
    """diffusers' own loop: its U-Net, guidance as its pipeline does it, its scheduler."""
    import diffusers

    config = model.unet
    with torch.device("meta"):
        module = diffusers.UNet2DConditionModel(
            sample_size=config.sample_size,
            block_out_channels=[level.channels for level in config.down],
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=[level.heads for level in config.down],
            norm_num_groups=config.norm_groups,
            use_linear_projection=config.linear_projection,
        )
    with_random_weights(module, hidden.device, hidden.dtype)
    unet: Any = module if mode is None else torch.compile(module, mode=mode, fullgraph=True)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER)
    scale, guided = run.guidance.scale, run.guidance.scale > 1

    def loop() -> None:
        scheduler.set_timesteps(run.table.steps, device=hidden.device)
        x = run.latents.to(hidden.dtype)
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(torch.cat([x] * 2) if guided else x, t)
            out = unet(model_input, t, encoder_hidden_states=hidden, return_dict=False)[0]
            if guided:
                unguided, text = out.chunk(2)
                out = unguided + scale * (text - unguided)
            x = scheduler.step(out, t, x, return_dict=False)[0]

    return loop


# ------------------------------------------------------------------------------------------------------------- timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def time_rungs(
    pipe: Pipeline,
    model: Model,
    steps: int,
    rounds: int,
    compiled: bool = False,
    on_rung: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
) -> dict[str, dict[str, Any]]:
    """Milliseconds a step of each rung: full, and on the host; the error of a rung that fails.

    on_rung: called with each rung after its first run, and again when all rounds are done.
    """
    times: dict[str, list[tuple[float, float]]] = {}
    failed: dict[str, str] = {}

    def time_once(name: str, run: Callable[[], object]) -> None:
        synchronize(pipe.device)
        start = time.perf_counter()
        run()
        issued = time.perf_counter()
        synchronize(pipe.device)
        times.setdefault(name, []).append((time.perf_counter() - start, issued - start))

    def row(name: str) -> dict[str, Any]:
        if name in failed:
            return {"failed": failed[name]}
        full, host = zip(*times[name], strict=True)
        return {
            "ms": 1e3 * median(full) / steps,
            "host_ms": 1e3 * median(host) / steps,
            "spread": (max(full) - min(full)) / median(full),
            "rounds": len(full),
        }

    def on_the_worker() -> None:
        contenders = rungs(pipe, model, steps, compiled)
        for name, run in contenders.items():
            try:
                for _ in range(WARM_UPS + 1):
                    run()
                time_once(name, run)
            except Exception as error:  # the next rungs may run all the same
                failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            on_rung(name, row(name))
        for _ in range(rounds - 1):
            for name, run in contenders.items():
                if name not in failed:
                    time_once(name, run)

    pipe.session.call(on_the_worker)  # as the library runs it: on the stream of the captures
    for name in times:
        on_rung(name, row(name))
    return {name: row(name) for name in [*times, *failed]}


def stages_of(pipe: Pipeline, model: Model, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the stages of an image, one request after the other."""
    options = _options(model, steps)
    pipe.warmup([(model.size, model.size)], num_inference_steps=steps)
    results = [pipe("a castle at dusk", seed=k, **options) for k in range(max(3, rounds))]
    return {
        "text_ms": 1e3 * median(result.timings.text for result in results),
        "steps_ms": 1e3 * median(sum(result.timings.steps) for result in results),
        "decode_ms": 1e3 * median(result.timings.decode for result in results),
        "total_ms": 1e3 * median(result.timings.total for result in results),
    }


def throughput(pipe: Pipeline, model: Model, steps: int, count: int = 16) -> dict[str, float]:
    """Images a second: one request after the other, and `count` submitted at once to a session that takes eight."""
    options = _options(model, steps)
    pipe.warmup([(model.size, model.size)], num_inference_steps=steps)
    start = time.perf_counter()
    for k in range(count):
        pipe("a castle at dusk", seed=k, **options)
    one_by_one = (time.perf_counter() - start) / count
    with Session(pipe, max_batch=8) as session:

        def together() -> float:
            start = time.perf_counter()
            for future in [session.submit("a castle at dusk", seed=k, **options) for k in range(count)]:
                future.result()
            return time.perf_counter() - start

        together()
        together()
        at_once = min(together() for _ in range(2))
    return {"one_at_a_time_per_s": 1 / one_by_one, "together_per_s": count / at_once}


def _options(model: Model, steps: int) -> dict[str, Any]:
    return {"height": model.size, "width": model.size, "num_inference_steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated  [default: all but tiny]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--steps", type=int, help="[default: the model's]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="diffusers by torch.compile too; takes minutes")
    parser.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: --device cpu runs the same code, for --model tiny in seconds")
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, args.dtype)

    record = None
    if device.type == "cuda":
        record = harness.Record(args.results, f"ladder-{args.dtype}", source=harness.source("ladder"), dtype=args.dtype)
    for name in args.model or [name for name in MODELS if name != "tiny"]:
        model = MODELS[name]
        steps = args.steps or model.steps
        pipe = pipeline(model, device, dtype)
        contenders = time_rungs(pipe, model, max(steps, 4), args.rounds, args.compile)
        first = next((row["ms"] for row in contenders.values() if "ms" in row), 0.0)
        print(f"{name}, {steps} steps, {dtype}; floor {model.floor_ms} ms a step, best published {model.best_ms}")
        for rung, row in contenders.items():
            if "failed" in row:
                print(f"  {rung:20} {row['failed']}")
                continue
            print(f"  {rung:20} {row['ms']:9.3f} ms a step  {first / row['ms']:6.2f} x  host {row['host_ms']:8.3f} ms")
        images = stages_of(pipe, model, steps, args.rounds) | throughput(pipe, model, steps)
        print("  " + ", ".join(f"{key} {value:.2f}" for key, value in images.items()), flush=True)
        if record is not None:
            header = {"steps": steps, "floor_ms": model.floor_ms, "best_published_ms": model.best_ms}
            record.add({"model": name, **header, "rungs": contenders, "pictures": images})
        del pipe
    if record is not None:
        record.end()


if __name__ == "__main__":
    main()
