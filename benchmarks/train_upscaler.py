"""Train the default model's second stage: pictures of 64x64 pixels to 128x128, by diffusion in pixels.

    python -m benchmarks.train_upscaler train --work W --data ../shared/data/emoji --minutes 80
    python -m benchmarks.train_upscaler export --work W
    python -m benchmarks.train_upscaler measure --work W --data ../shared/data/emoji     what it is worth, and a sheet

What is sampled is the difference between a picture and the bicubic enlargement of its half size, over that difference's
deviation, each 4x4 pixels as 48 channels of one position: a U-Net of 4.8 M parameters at 32x32 positions, which reads
the enlarged picture the same way behind it. v-prediction with zero terminal SNR, as the default model has. There is no
text.

It learns from emoji of all groups in three styles, each from the small picture itself and from what the default model's
autoencoder makes of that, in colours of any order. One in 20 is kept for `measure`. Sampling invents what the small
picture does not show, so that the distance to the real picture says little; what counts is that the result, made
small again, is the picture that came in, and that it is as sharp as a real one.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.default_data import ASSETS, SIZE, STYLES, WORK
from benchmarks.train_default_model import (
    Every,
    Optimiser,
    build_scheduler,
    draw_timesteps,
    go_on,
    keep_memory,
    save_atomically,
    to_network,
)

OUT = ASSETS / "upscaler"
BLOCK = 4  # pixels of a position's side
FACTOR = 2  # of the enlargement
TEST_EVERY = 20  # of the emoji, one is not learned from


def build_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    channels = (96, 128, 128)
    inner = 3 * BLOCK**2
    unet = UNet2DConditionModel(
        sample_size=FACTOR * SIZE // BLOCK,
        in_channels=2 * inner,  # the noisy difference, then the enlarged picture
        out_channels=inner,
        down_block_types=("DownBlock2D",) * len(channels),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
    )
    return unet.to(memory_format=torch.channels_last)


def load_large(folder: Path) -> tuple[Tensor, Tensor]:
    """All emoji of all styles that have them, uint8 (N, 3, 128, 128), and which are for tests, bool (N,)."""
    codes = sorted(json.loads((folder / "captions.json").read_text()))
    pictures, test = [], []
    for name in STYLES:
        with zipfile.ZipFile(folder / f"{name}_128.zip") as archive:
            there = set(archive.namelist())
            for k, code in enumerate(codes):
                if f"{code}.webp" in there:
                    image = Image.open(io.BytesIO(archive.read(f"{code}.webp"))).convert("RGB")
                    pictures.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
                    test.append(k % TEST_EVERY == 0)
    return torch.stack(pictures), torch.tensor(test)


def enlarge(small: Tensor) -> Tensor:
    """(B, 3, h, w) twice as large, bicubic"""
    return F.interpolate(small, scale_factor=FACTOR, mode="bicubic", align_corners=False)


def default_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(ASSETS / "default" / "vae", torch_dtype=torch.float32).eval()


@torch.no_grad()
def shrink(large: Tensor, vae: Any) -> Tensor:
    """uint8 (N, 3, 128, 128) to what there is to enlarge, float16 (N, 2, 3, 64, 64) in -1..1: the mean of 2x2 pixels,
    and that through the autoencoder."""
    parts = []
    for x in large.split(64):
        small = F.avg_pool2d(to_network(x), FACTOR)
        through = vae.decode(vae.encode(small).latent_dist.mode()).sample.clamp(-1, 1)
        parts.append(torch.stack([small, through], 1).half())
    return torch.cat(parts)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """The pictures, what there is to enlarge, and the deviation of the differences; kept in the work folder."""
    path = args.work / "upscaler-data.pt"
    if not path.exists():
        large, test = load_large(args.data)
        small = shrink(large, default_vae())
        parts = zip(large[~test].split(64), small[~test].split(64), strict=True)
        squares = [(to_network(x) - enlarge(y[:, 0].float())).pow(2).mean() for x, y in parts]
        deviation = float(torch.stack(squares).mean().sqrt())
        save_atomically({"large": large, "small": small, "test": test, "deviation": deviation}, path)
    return torch.load(path)


def train(args: argparse.Namespace) -> None:
    """train it, or go on where it was stopped"""
    keep_memory()
    data = prepare(args)
    rows = (~data["test"]).nonzero()[:, 0]
    scale = 1 / data["deviation"]
    alphas = build_scheduler().alphas_cumprod
    signal, noise = (x.sqrt()[:, None, None, None] for x in (alphas, 1 - alphas))
    torch.manual_seed(0)
    model = build_unet()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = Optimiser(model)
    path = args.work / "upscaler.pt"
    steps, budget = go_on(path, model, average, optimiser, args.minutes)
    torch.manual_seed(1000 + steps)
    report, save = Every(1), Every(4)
    total = count = 0.0
    while budget.progress < 1:
        large, small = draw(data, rows[torch.randint(len(rows), (args.batch,))])
        base = enlarge(small)
        x = F.pixel_unshuffle((large - base) * scale, BLOCK)
        t, eps = draw_timesteps(args.batch), torch.randn_like(x)
        noisy = signal[t] * x + noise[t] * eps
        reads = torch.cat([noisy, F.pixel_unshuffle(base, BLOCK)], 1).contiguous(memory_format=torch.channels_last)
        v = model(reads, t, None).sample
        loss = (v - (signal[t] * eps - noise[t] * x)).pow(2).mean()
        loss.backward()
        budget.tick()
        optimiser.step(budget.learning_rate(args.peak))
        model.zero_grad()
        steps += 1
        keep = min(0.999, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        total, count = total + loss.item(), count + 1
        done = budget.progress >= 1
        if report(done):
            print(f"{budget.used / 60:6.1f} min  step {steps}  loss {total / count:.4f}", flush=True)
            total = count = 0.0
        if save(done):
            state = {"model": model.state_dict(), "ema": average.state_dict(), "deviation": data["deviation"]}
            state |= {"adamw": optimiser.adamw.state_dict(), "used": budget.used, "steps": steps}
            save_atomically(state, path)


def draw(data: dict[str, Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row (3, 128, 128) and something to enlarge (3, 64, 64) in -1..1: mirrored or not, moved, its colours in
    any order, between the small picture and what the autoencoder makes of it, with a little noise."""
    count = len(rows)
    large, both = to_network(data["large"][rows]), data["small"][rows].float()
    part = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.8)
    small = torch.lerp(both[:, 0], both[:, 1], part.sqrt())
    small = small + 0.03 * torch.rand(count, 1, 1, 1) * torch.randn_like(small) * (part > 0)
    out_large, out_small = torch.empty_like(large), torch.empty_like(small)
    for k in range(count):
        colours = torch.randperm(3) if torch.rand(()) < 0.5 else torch.arange(3)
        shift = torch.randint(-8, 9, (2,)).tolist()
        flip = bool(torch.rand(()) < 0.5)
        for image, out, unit in ((large[k], out_large, FACTOR), (small[k], out_small, 1)):
            moved = torch.ones_like(image)  # white around
            (a, b), side = (unit * s for s in shift), image.shape[-1]
            moved[:, max(a, 0) : side + min(a, 0), max(b, 0) : side + min(b, 0)] = image[
                :, max(-a, 0) : side - max(a, 0), max(-b, 0) : side - max(b, 0)
            ]
            out[k] = (moved.flip(-1) if flip else moved)[colours]
    return out_large, out_small


@torch.no_grad()
def upscale(unet: nn.Module, small: Tensor, deviation: float, steps: int) -> Tensor:
    """(B, 3, 64, 64) in -1..1 to (B, 3, 128, 128), by DDIM"""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    base = enlarge(small)
    reads = F.pixel_unshuffle(base, BLOCK)
    x = torch.randn(reads.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        v = unet(torch.cat([x, reads], 1), t, None).sample
        x = scheduler.step(v, t, x).prev_sample
    return (F.pixel_shuffle(x * deviation, BLOCK) + base).clamp(-1, 1)


def sharpness(x: Tensor) -> float:
    """Mean absolute value of the discrete Laplacian."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return float(F.conv2d(x.flatten(0, 1)[:, None], kernel).abs().mean())


def measure(args: argparse.Namespace) -> None:
    """how its enlargements of the emoji that it never saw compare with bicubic ones and with the real ones"""
    data = prepare(args)
    state = torch.load(args.work / "upscaler.pt")
    unet = build_unet().eval()
    unet.load_state_dict(state["ema"])
    rows = data["test"].nonzero()[:, 0][:: args.stride]
    large, real = to_network(data["large"][rows]), data["small"][rows].float()
    shown = []
    for name, small in (("the small picture", real[:, 0]), ("through the autoencoder", real[:, 1])):
        for how, made in (
            ("bicubic", enlarge(small).clamp(-1, 1)),
            *((f"{n} steps", upscale(unet, small, data["deviation"], n)) for n in args.steps),
        ):
            back = -10 * ((F.avg_pool2d(made, FACTOR) - small) / 2).pow(2).mean((1, 2, 3)).log10()
            away = -10 * ((made - large) / 2).pow(2).mean((1, 2, 3)).log10()
            print(
                f"{name}, {how}: made small again {back.mean():.1f} dB of it (worst {back.min():.1f}), "
                f"sharpness {sharpness(made) / sharpness(large):.2f} of the real one, {away.mean():.1f} dB from it"
            )
            shown.append(made)
        shown.append(large)
    columns = torch.stack([x[:8] for x in shown], 0)  # (K, 8, 3, 128, 128)
    sheet = ((columns.permute(1, 3, 0, 4, 2).reshape(8 * 128, -1, 3) + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(sheet.numpy()).save(args.work / "upscaler.png")


def export(args: argparse.Namespace) -> None:
    """write the averaged weights in float16, as a diffusers folder without text"""
    from diffusers import __version__ as version

    state = torch.load(args.work / "upscaler.pt")
    unet = build_unet()
    unet.load_state_dict(state["ema"])
    unet.half().save_pretrained(args.out / "unet")
    build_scheduler().save_pretrained(args.out / "scheduler")
    vae = {"_class_name": "PixelResidual", "patch_size": BLOCK, "upscale_factor": FACTOR}
    index = {
        "_class_name": "PixelUpscalePipeline",
        "_diffusers_version": version,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["fastldm", "PixelResidual"],
    }
    (args.out / "vae").mkdir(exist_ok=True)
    for path, config in (
        (args.out / "vae" / "config.json", vae | {"scaling_factor": round(1 / state["deviation"], 6)}),
        (args.out / "model_index.json", index),
    ):
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in (train, measure, export):
        formatter, text = argparse.ArgumentDefaultsHelpFormatter, stage.__doc__
        added = stages.add_parser(stage.__name__, help=text, description=text, formatter_class=formatter)
        added.set_defaults(run=stage)
        added.add_argument("--work", type=Path, default=WORK, help="folder for data and checkpoints")
        added.add_argument("--threads", type=int, default=1, help="CPU threads")
        if stage is export:
            added.add_argument("--out", type=Path, default=OUT, help="where to")
            continue
        added.add_argument("--data", type=Path, required=True, help="folder of pictures that were drawn before")
        if stage is train:
            added.add_argument("--minutes", type=float, default=80, help="time to train for, of one processor")
            added.add_argument("--batch", type=int, default=16, help="pictures a step")
            added.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
        else:
            added.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="of the sampler")
            added.add_argument("--stride", type=int, default=4, help="take every so many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
