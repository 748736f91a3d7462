from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
STYLES = {"noto": "noto", "fluent-emoji-flat": "flat", "fluent-emoji": "3d"}  # icon set -> its word in a prompt
GROUPS = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}
CONCEPTS = 324
SIZE = 64
TWIN = 4 / 255  # two pictures closer than this (RMSE, RGB at 32x32, in one style) are one picture


def word_ranks(merges: list[str]) -> dict[str, int]:
    """Rank of every word that is one CLIP token: CLIP's merges are sorted by how common they are."""
    return {"".join(m.split())[:-4]: i for i, m in enumerate(merges) if m.endswith("</w>")}


def choose_concepts(captions: dict[str, Any], ranks: dict[str, int]) -> list[dict[str, Any]]:
    """The everyday things among the emoji, by a rule fixed before training.

    In: five groups of things, drawn in all three styles, named by one or two plain words that CLIP knows as
    single tokens. Order: the rank of the rarest word, four times that for a two-word name (so `penguin` comes
    before `card index`, and `red apple` is still in).
    """
    ranked = []
    for code, c in captions.items():
        words = c["name"].lower().split(" ")
        if c["group"] not in GROUPS or not STYLES.keys() <= set(c["sets"]) or len(words) > 2:
            continue
        if all(re.fullmatch("[a-z]+", w) and w in ranks for w in words):
            rank = max(ranks[w] for w in words) * (4 if len(words) == 2 else 1)
            ranked.append((rank, c["name"].lower(), code, c["tags"]))
    return [{"names": [name], "codes": [code], "tags": tags} for _, name, code, tags in sorted(ranked)[:CONCEPTS]]


def load_pictures(folder: Path, codes: list[str]) -> Tensor:
    """uint8 (N, 3 styles, 3, 64, 64)"""
    out = np.empty((len(codes), len(STYLES), 3, SIZE, SIZE), np.uint8)
    for s, name in enumerate(STYLES):
        with zipfile.ZipFile(folder / f"{name}_128.zip") as z:
            for i, code in enumerate(codes):
                picture = Image.open(io.BytesIO(z.read(f"{code}.webp"))).convert("RGB")
                out[i, s] = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX)).transpose(2, 0, 1)
    return torch.from_numpy(out)


def stage_data(args):
    merges = gzip.open(args.data.parent / "clip_bpe/bpe_simple_vocab_16e6.txt.gz", "rt").read().split("\n")[1 : 49152 - 512 + 255]
    captions = json.loads((args.data / "captions.json").read_text())
    concepts = choose_concepts(captions, word_ranks(merges))
    pictures = load_pictures(args.data, [c["codes"][0] for c in concepts])
    small = F.avg_pool2d(pictures.flatten(0, 1).float() / 255, 2).unflatten(0, pictures.shape[:2])
    n = len(concepts)
    for i in range(n):
        rm = (small[i] - small).pow(2).mean((2, 3, 4)).sqrt()
        for j in range(i + 1, n):
            if rm[j].min() < 8 / 255:
                print("close", concepts[i]["names"], concepts[j]["names"], (rm[j] * 255).tolist())
    print([c["names"][0] for c in concepts])
    torch.save({"pictures": pictures, "concepts": concepts}, args.work / "data.pt")



def keep_memory() -> None:
    """Keep freed blocks in the process: giving 30 MB activations back to the kernel costs 6% of the time."""
    import ctypes

    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def learning_rate(progress: float, peak: float, warm: float = 0.02, floor: float = 0.01) -> float:
    """Linear warm-up, then a cosine to `floor` of the peak, over the share of the time budget already used."""
    if progress < warm:
        return peak * progress / warm + 1e-6
    x = min((progress - warm) / (1 - warm), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def build_autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


@torch.no_grad()
def psnr(vae: nn.Module, pictures: Tensor) -> Tensor:
    """PSNR of each picture after encoding to the posterior's mode and decoding; uint8 (N, 3, H, W) -> (N,)"""
    out = []
    for batch in pictures.split(32):
        x = batch.float() / 255
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        out.append(-10 * (y.clamp(0, 1) - x).pow(2).mean((1, 2, 3)).log10())
    return torch.cat(out)


def stage_autoencoder(args) -> None:
    keep_memory()
    torch.manual_seed(0)
    pictures = torch.load(args.work / "data.pt")["pictures"].flatten(0, 1)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    path = args.work / "autoencoder.pt"
    used = 0.0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        used = state["used"]

    def loss_of(x: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            y = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        rmse = ((y - x).pow(2).mean((1, 2, 3)) + 1e-6).sqrt().mean()  # what PSNR measures
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return rmse + (y - x).abs().mean() + 1e-4 * kl

    step_fn = torch.compile(loss_of) if args.compile else loss_of
    budget, batch = args.minutes * 60, 16
    test = pictures[torch.linspace(0, len(pictures) - 1, 64).long()]
    clock, saved, steps, total = time.monotonic(), time.monotonic(), 0, 0.0
    while used < budget:
        for rows in torch.randperm(len(pictures))[: len(pictures) // batch * batch].split(batch):
            x = (pictures[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            loss = step_fn(x, torch.randn(batch, 4, SIZE // 4, SIZE // 4))
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(used / budget, 1e-3)
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            now = time.monotonic()
            used, clock = used + now - clock, now
            steps, total = steps + 1, total + loss.item()
        if now - saved > 120 or used >= budget:
            save_atomically({"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "used": used}, path)
            quality = psnr(vae, test)
            print(f"{used / 60:5.1f} min  loss {total / steps:.4f}  {quality.mean():.2f} dB  {steps * batch / (now - saved):.1f}/s", flush=True)
            clock = saved = time.monotonic()
            steps, total = 0, 0.0


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("stage")
    p.add_argument("--data", type=Path)
    p.add_argument("--work", type=Path)
    p.add_argument("--minutes", type=float, default=25)
    p.add_argument("--compile", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(2)
    {"data": stage_data, "autoencoder": stage_autoencoder}[a.stage](a)
