"""One U-Net evaluation on a CPU: fastldm against diffusers, eager, on the same weights in the same process.

    python -m benchmarks.cpu --json benchmarks/results/cpu.json

SD1.5's full size with seeded random weights, one guided step (batch 2). The contenders take turns, in an order that
turns round, and medians are reported, as are the medians of each round's ratios: other work on the machine then slows
all alike. What fastldm computes once a request (time rows, the text's keys and values) is timed apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import SD15
from fastldm.models import UNet
from fastldm.pipeline import Pipeline
from fastldm.prepare import prepare
from fastldm.weights import load_module

TOKENS = 77
PEER = "diffusers float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents (default: 32)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    with torch.inference_mode():
        seconds = take_turns(contenders(args.size), args.rounds)
        gc.collect()
        picture = default_picture(args.rounds)
    rows = {
        name: {
            "seconds": median(times),
            "min": min(times),
            "times_faster_than_diffusers_float32": median(a / b for a, b in zip(seconds[PEER], times, strict=True)),
        }
        for name, times in seconds.items()
    }
    record = {
        "what": f"SD1.5's U-Net, latents {args.size}x{args.size}, batch 2, one evaluation",
        "command": f"python -m benchmarks.cpu --size {args.size} --rounds {args.rounds}",
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "diffusers")},
        "rounds": args.rounds,
        "rows": rows,
        "default_model": picture,
    }
    for name, row in rows.items():
        print(
            f"{name:28} {row['seconds']:7.3f} s  min {row['min']:7.3f} s  "
            f"{row['times_faster_than_diffusers_float32']:5.2f} x {PEER}"
        )
    print(f"{'default model, one picture':28} {picture['seconds']:7.3f} s  min {picture['min']:7.3f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def contenders(size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all compute the same."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    state = random_weights(theirs)
    theirs.load_state_dict(state, assign=True)
    theirs = theirs.eval()

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, size, size, generator=generator)
    text = torch.randn(2, TOKENS, 768, generator=generator)
    timestep = torch.tensor(500)

    half = torch.bfloat16
    with torch.device("meta"):
        theirs_half = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    theirs_half.load_state_dict({name: value.to(half) for name, value in state.items()}, assign=True)
    theirs_half = theirs_half.eval().to(memory_format=torch.channels_last)
    noise_half = noise.to(half, memory_format=torch.channels_last)
    runs: dict[str, Callable[[], object]] = {
        PEER: lambda: theirs(noise, timestep, text).sample,
        "diffusers bfloat16, channels-last": lambda: theirs_half(noise_half, timestep, text.to(half)).sample,
    }
    for dtype in (torch.float32, half):
        runs |= ours(state, dtype, noise, text, timestep)
    expected = runs[PEER]()
    for name, run in runs.items():
        if not name.endswith("request"):
            off = ((run() - expected).abs().max() / expected.abs().max()).item()  # type: ignore[operator, attr-defined]
            assert off < (1e-4 if "float32" in name else 0.1), f"{name} is {off:.1e} off"
    return runs


def ours(
    state: dict[str, Tensor], dtype: torch.dtype, noise: Tensor, text: Tensor, timestep: Tensor
) -> dict[str, Callable[[], object]]:
    """fastldm's step, and what a request computes once before it."""
    with torch.device("meta"):
        unet = UNet(SD15)
    copies = {name: value.clone() for name, value in state.items()}  # preparing would move the peer's
    prepared = prepare({"unet": load_module(unet, copies, dtype=dtype, source="the benchmark")})
    u, text = noise.to(dtype), text.to(dtype)
    rows, kv = unet.time_rows(timestep[None]).expand(2, -1), unet.cross_kv(text)

    def once() -> None:
        prepared.stale()
        unet.time_rows(torch.linspace(0, 999, 20))
        unet.cross_kv(text)

    name = f"fastldm {dtype}".replace("torch.", "")
    return {name: lambda: unet.step(u, rows, kv), f"{name}, once a request": once}


def random_weights(module: nn.Module) -> dict[str, Tensor]:
    """Seeded, of the size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, p in module.state_dict().items():
        value = torch.randn(p.shape, generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
        weights[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    return weights


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):
        for name in [*runs][:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            runs[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def default_picture(rounds: int) -> dict[str, Any]:
    """The model that ships, a picture from its prompt."""
    pipe = Pipeline.default()
    times = [pipe("a red apple", seed=0).timings for _ in range(rounds + 1)][1:]
    return {
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "seconds": median(one.total for one in times),
        "min": min(one.total for one in times),
        "text": median(one.text for one in times),
        "steps": median(sum(one.steps) for one in times),
        "decode": median(one.decode for one in times),
    }


def machine() -> dict[str, Any]:
    """The processor, as torch sees it."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
