"""What reuse between steps costs in likeness, and what it saves.

    python -m benchmarks.reuse pictures     the default model, 32 prompts at 25 steps, every 2nd and 3rd: minutes
    python -m benchmarks.reuse sizes        a guided step of SD1.5 and of SDXL, random weights, all of it and not

pictures: the PSNR between each picture and the one of the same seed without reuse; the time of the steps without reuse
over that with it, both of one prompt in turns; and a sheet of all pairs, without above and with every 2nd below.
sizes: SD1.5 at 512 and SDXL at 512, at its own 1024 with --side 1024; how much longer all of the U-Net takes than its
shallow part, from which the gain at every 2nd and 3rd row follows.
Results go to benchmarks/results/MACHINE/reuse.json, the sheet to benchmarks/results/reuse.jpg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.default_data import COMMON_WORDS
from benchmarks.networks import SD15, SDXL, with_random_weights
from benchmarks.suite import machine_folder
from fastldm.device import choose_device, choose_dtype
from fastldm.loading.prepare import prepare
from fastldm.models.config import UNetConfig
from fastldm.models.unet import AddedConditions, Reuse, UNet
from fastldm.pipeline import Pipeline
from fastldm.samplers.names import sampler_name
from fastldm.system import machine

STEPS = 25
EVERY = (2, 3)
PROMPTS = [f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in COMMON_WORDS.split()[:64:2]]
SHEET = Path(__file__).resolve().parent / "results" / "reuse.jpg"
Pictures = NDArray[np.float32]  # (B, H, W, 3) in 0..1


def psnr(a: Pictures, b: Pictures) -> list[float]:
    """Of each picture, in dB."""
    errors = np.square(a - b).reshape(len(a), -1).mean(1)
    return [float(-10 * np.log10(max(error, 1e-12))) for error in errors]


def pictures(pipe: Pipeline, sampler: str | None, rounds: int) -> dict[str, Any]:
    def made(reuse: int) -> Pictures:
        options: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "sampler": sampler,
            "output_type": "np",
            "reuse": reuse,
        }
        return np.concatenate([pipe(prompt, seed=k, **options).images for k, prompt in enumerate(PROMPTS)])

    def seconds(reuse: int) -> float:
        """Of the steps."""
        return sum(pipe(PROMPTS[0], seed=0, num_inference_steps=STEPS, sampler=sampler, reuse=reuse).timings.steps)

    by_reuse = {reuse: made(reuse) for reuse in (1, *EVERY)}
    times: dict[int, list[float]] = {reuse: [] for reuse in by_reuse}
    for _ in range(rounds):
        for reuse in by_reuse:
            times[reuse].append(seconds(reuse))
    sheet(by_reuse[1], by_reuse[2])
    row: dict[str, Any] = {"dtype": pipe.precision, "sampler": sampler or sampler_name(pipe.schedule), "steps": STEPS}
    row |= {"prompts": len(PROMPTS), "seconds": round(median(times[1]), 3)}
    for reuse in EVERY:
        likeness = psnr(by_reuse[reuse], by_reuse[1])
        ratios = sorted(all_of_it / own for all_of_it, own in zip(times[1], times[reuse], strict=True))
        row[f"every {reuse}"] = {
            "PSNR, mean": round(mean(likeness), 1),
            "PSNR, worst": round(min(likeness), 1),
            "times as fast": round(median(ratios), 2),
            "quartiles": f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}",
        }
    return row


def sheet(above: Pictures, below: Pictures) -> None:
    """Four rows of eight pairs, each with its prompt."""
    cell, label = 2 * above.shape[1], 18
    image = Image.new("RGB", (8 * cell, 4 * (2 * cell + label)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for k, prompt in enumerate(PROMPTS):
        x, y = k % 8 * cell, k // 8 * (2 * cell + label)
        for half, pixels in enumerate((above[k], below[k])):
            picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
            image.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (x, y + half * cell))
        draw.text((x + cell // 2, y + 2 * cell + label // 2), prompt, fill="black", font=font, anchor="mm")
    image.save(SHEET, optimize=True, quality=92)


@torch.inference_mode()
def step_of(
    name: str, config: UNetConfig, side: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """A guided step: two rows."""
    with torch.device("meta"):
        unet = UNet(config)
    with_random_weights(unet, device, dtype)
    prepare({"unet": unet})
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    added = None
    if config.needs_added:
        pooled = config.addition_input_dim - 6 * config.addition_time_embed_dim
        added = AddedConditions(torch.randn(2, pooled, **to), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2))
    rows = unet.time_rows(torch.full((2,), 500.0, device=device), added=added)
    text = unet.cross_kv(torch.randn(2, 77, config.cross_attention_dim, **to))
    model_input = torch.randn(2, config.in_channels, side // 8, side // 8, **to)
    kept: list[torch.Tensor] = []

    def keep(deep: torch.Tensor | None) -> torch.Tensor:
        if deep is not None:
            kept[:] = [deep]
        return kept[0]

    def seconds(deep: int) -> float:
        start = perf_counter()
        unet.step(model_input, rows, text, reuse=Reuse(deep, keep))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    seconds(2), seconds(0)
    pairs = [(seconds(2), seconds(0)) for _ in range(rounds)]
    ratio = median(all_of_it / shallow for all_of_it, shallow in pairs)
    row: dict[str, Any] = {"model": name, "side": side, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    row |= {"seconds": round(median(a for a, _ in pairs), 3), "shallow": round(median(b for _, b in pairs), 3)}
    row |= {"ratio": round(ratio, 2)}
    row |= {f"every {n}": round(n * ratio / (ratio + n - 1), 2) for n in EVERY}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pictures", "sizes"])
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--sampler", help="[default: the model's]")
    parser.add_argument("--side", type=int, default=512, help="pixels, of SDXL")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = choose_device(args.device)
    rows: list[dict[str, Any]] = []
    if args.part == "pictures":
        rows.append(pictures(Pipeline.default(device=device, dtype=args.dtype), args.sampler, args.rounds))
    else:
        dtype = choose_dtype(args.dtype, device)
        for name, config, side in (("SD1.5", SD15, 512), ("SDXL", SDXL, args.side)):
            rows.append(step_of(name, config, side, device, dtype, args.rounds))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(rows, indent=1))
    path = machine_folder(device) / "reuse.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**record, "machine": machine(device), args.part: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
