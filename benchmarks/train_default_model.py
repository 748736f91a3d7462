from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WORK = HERE / "runs"
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


def read_merges(data: Path) -> list[str]:
    """CLIP's 48,894 merges, most common first."""
    with gzip.open(data.parent / "clip_bpe/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as f:
        return f.read().split("\n")[1 : 49152 - 256 - 2 + 1]


def stage_data(args):
    merges = read_merges(args.data)
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


def load_data(work: Path) -> tuple[list[dict[str, Any]], Tensor]:
    """The concepts, and their pictures as uint8 (C, styles, 3, 64, 64)."""
    data = torch.load(work / "data.pt")
    return data["concepts"], data["pictures"]


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
    with torch.no_grad():  # start with little noise (deviation 0.03): unit noise on tiny means collapses the posterior
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-7)
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
        return rmse + (y - x).abs().mean() + 1e-5 * kl

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



VOCABULARY, CONTEXT = 8192, 32


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE, in CLIP's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def build_tokenizer(merges: list[str], folder: Path) -> Any:
    """CLIP's tokenizer with its most common 8,192 tokens, written to `folder` as transformers reads it."""
    from transformers import CLIPTokenizer

    letters = byte_characters()
    merges = merges[: VOCABULARY - 2 * len(letters) - 2]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges]
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    pairs = [tuple(m.split()) for m in merges]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    return tokenizer


def build_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        projection_dim=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    return CLIPTextModel(config)


def build_unet(widths: tuple[int, ...] = (64, 128, 192)) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=tuple(w // 32 for w in widths),  # diffusers' name for the number of heads
        cross_attention_dim=192,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


FORMS = [
    *["a {x}"] * 4, *["{x}"] * 3, "the {x}", "one {x}", "a small {x}", "an icon of {x}", "an icon of a {x}", "{x} icon",
    "a drawing of {x}", "image of {x}", "photo of a {x}", "{x} emoji", "sticker of {x}", "painting of a {x}",
]  # fmt: skip
STYLED = [
    *["a {s} {x}"] * 4, *["{s} {x}"] * 2, "{x}, {s} style", "{x}, {s}", "a {x} in {s} style", "a {x}, {s} style", "{x} {s}",
    "{s} icon of {x}", "{s} style {x}", "an icon of a {x}, {s}",
]  # fmt: skip
ONE_TAG = ["a {s} {t}", "{s} {t}", "{t}, {s} style", "something {t}", "{t} icon", "a {t} thing"]


def plain_tags(concept: dict[str, Any]) -> list[str]:
    return [tag.replace("-", " ").replace("_", " ") for tag in concept["tags"]]


def caption(rng: np.random.Generator, concept: dict[str, Any], style: str) -> str:
    """A caption for the concept drawn in the style. Never `picture of ...` and never just two tags: those test it."""

    def pick(items: list[str]) -> str:
        return items[rng.integers(len(items))]

    name, tags = pick(concept["names"]), [str(t) for t in rng.permutation(plain_tags(concept))]
    kind = rng.random()
    if kind < 0.10:
        return ""  # classifier-free guidance needs the model without a prompt too
    if kind < 0.40:
        return pick(FORMS).format(x=name)
    if kind < 0.68:
        return pick(STYLED).format(x=name, s=style)
    if kind < 0.80:
        text = pick([" ", ", "]).join(rng.permutation([name, *tags[: rng.integers(1, 4)]]))
    elif kind < 0.96 and len(tags) > 2:
        text = pick([" ", ", "]).join(tags[: rng.integers(3, 5)])
    else:
        return pick(ONE_TAG).format(t=tags[0], s=style)
    return f"{text}, {style}" if rng.random() < 0.4 else text


def normalise_latents(vae: nn.Module, pictures: Tensor) -> Tensor:
    """Fold mean and deviation of each latent channel into the 1x1 convolutions around the latent space: exact, and
    a pipeline knows only one scaling factor for all channels and no shift. Returns the latents (N, 4, 16, 16)."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mode() for x in pictures.split(64)])
        std, mean = torch.std_mean(latents, (0, 2, 3))  # (4,)
        into, out = vae.quant_conv, vae.post_quant_conv
        into.weight[:4] /= std[:, None, None, None]
        into.bias[:4] = (into.bias[:4] - mean) / std
        into.bias[4:] -= 2 * std.log()
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return (latents - mean[:, None, None]) / std[:, None, None]


class Denoiser(nn.Module):
    def __init__(self, widths=(64, 128, 192)) -> None:
        super().__init__()
        self.text = build_text_encoder()
        self.unet = build_unet(widths)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text(ids).last_hidden_state).sample


@torch.no_grad()
def sample(model: Denoiser, scheduler: Any, ids: Tensor, empty: Tensor, steps: int, guidance: float = 2.0) -> Tensor:
    scheduler.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))] * len(ids))
    text = model.text(torch.cat([empty.expand_as(ids), ids])).last_hidden_state
    for t in scheduler.timesteps:
        without, given = model.unet(torch.cat([x, x]), t, text).sample.chunk(2)
        x = scheduler.step(without + guidance * (given - without), t, x).prev_sample
    return x


def small(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SIZE // 32).flatten(1)


def stage_unet(args: argparse.Namespace) -> None:
    concepts, pictures = load_data(args.work)
    vae = build_autoencoder()
    vae.load_state_dict(torch.load(args.work / "autoencoder.pt")["model"])
    latents = normalise_latents(vae, pictures.flatten(0, 1))
    vae.save_pretrained(args.work / "vae")
    tokenizer = build_tokenizer(read_merges(args.data), args.work / "tokenizer")
    rng, styles = np.random.default_rng(0), list(STYLES.values())
    captions = [caption(rng, c, s) for c in concepts for s in styles for _ in range(256)]
    ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True)["input_ids"], dtype=torch.int16)
    prompts = [f"a {c['names'][0]}" for c in concepts]
    test = torch.tensor(tokenizer(["", *prompts], padding="max_length")["input_ids"])
    save_atomically({"latents": latents, "ids": ids.view(len(latents), 256, CONTEXT), "test": test}, args.work / "pairs.pt")
    (args.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(train_unet, (args,), args.workers)


def train_unet(rank: int, args: argparse.Namespace) -> None:
    """One of `workers` processes with one thread each: on few cores that wastes less than threads that wait for each
    other in every operation. Each takes its share of a batch; gradients are averaged."""
    from diffusers.models.attention_processor import AttnProcessor

    keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args.work}/rendezvous", rank=rank, world_size=args.workers)
    pairs = torch.load(args.work / "pairs.pt")
    latents, pool = pairs["latents"], pairs["ids"]
    path = args.work / "unet.pt"
    torch.manual_seed(0)
    scheduler = build_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()[:, None, None, None]  # (1000, 1, 1, 1)
    noise_part = (1 - scheduler.alphas_cumprod).sqrt()[:, None, None, None]
    model = Denoiser().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.unet.set_attn_processor(AttnProcessor())  # trains faster on a CPU than the fused attention: 0.90 s for 1.16 s
    weights, averaged = list(model.parameters()), list(ema.parameters())
    optimiser = torch.optim.AdamW(weights, lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
    used, steps = 0.0, 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        used, steps = state["used"], state["steps"]
    torch.manual_seed(1000 * steps + rank)
    flat = torch.zeros(sum(w.numel() for w in weights))  # all gradients in one piece, to average them in one go
    for w, g in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.grad = g.as_strided(w.shape, w.stride())
    if rank == 0:
        print(f"{len(flat) / 1e6:.1f}M parameters", flush=True)

    budget, batch = args.minutes * 60, args.batch // args.workers
    clock = reported = saved = time.monotonic()
    evaluated = saved - 60 * args.look + 240
    count, total = 0, 0.0
    status = torch.zeros(1)
    while used < budget:
        for rows in torch.randperm(len(latents))[: len(latents) // batch * batch].split(batch):
            x = latents[rows]
            ids = pool[rows, torch.randint(pool.shape[1], (batch,))].long()
            u = (torch.randperm(batch) + torch.rand(batch)) / batch
            t = (1000 * u.pow(0.65)).long().clamp(max=999)
            t[torch.rand(batch) < 0.05] = 999
            eps = torch.randn_like(x)
            noisy = (signal[t] * x + noise_part[t] * eps).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                v = model(noisy, t, ids)
            loss = (v.float() - (signal[t] * eps - noise_part[t] * x)).pow(2).mean()
            loss.backward()
            dist.all_reduce(flat)
            flat /= args.workers
            status[0] = used
            dist.broadcast(status, 0)
            used = status.item()
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(used / budget, args.lr)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            flat.zero_()
            steps += 1
            if rank == 0:
                torch._foreach_lerp_(averaged, weights, 1 - min(0.999, (1 + steps) / (10 + steps)))
            now = time.monotonic()
            used, clock = used + now - clock, now
            count, total = count + 1, total + loss.item()
            if rank == 0 and now - reported > 60:
                print(f"{used / 60:6.1f} min  step {steps}  loss {total / count:.4f}  {count * batch * args.workers / (now - reported):.1f}/s", flush=True)
                reported, count, total = now, 0, 0.0
        status[0] = used
        dist.broadcast(status, 0)
        used = status.item()
        if rank == 0:
            if now - saved > 240 or used >= budget:
                save_atomically({"model": model.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(), "used": used, "steps": steps}, path)
                saved = now
            if now - evaluated > 60 * args.look or used >= budget:
                evaluate(args, ema, scheduler, pairs["test"], f"{used / 60:.0f}")
                evaluated = time.monotonic()


def evaluate(args: argparse.Namespace, ema: Denoiser, scheduler: Any, ids: Tensor, tag: str) -> None:
    from diffusers import AutoencoderKL

    pictures = load_data(args.work)[1]
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    chosen = torch.arange(0, len(pictures), len(pictures) // 54)[:54]
    reference = small(pictures.flatten(0, 1).float() / 255)
    for steps in (8, 4):
        with torch.no_grad():
            z = sample(ema, scheduler, ids[1:][chosen], ids[:1], steps)
            images = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        near = torch.cdist(small(images), reference).argmin(1) // len(STYLES)
        print(f"   {steps} steps: {(near == chosen).float().mean():.0%} of {len(chosen)} nearest to their concept", flush=True)
        if steps == 8:
            grid = images.reshape(6, 9, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(6 * SIZE, 9 * SIZE, 3)
            Image.fromarray((grid.numpy() * 255).round().astype(np.uint8)).save(args.work / f"grid_{tag}.png")


def stage_export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder in float16."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    model = Denoiser()
    if (args.work / "unet.pt").exists():
        model.load_state_dict(torch.load(args.work / "unet.pt")["ema"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.work / "vae"),
        text_encoder=model.text,
        tokenizer=CLIPTokenizer.from_pretrained(args.work / "tokenizer"),
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(args.out)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copy(args.work / "tokenizer" / name, args.out / "tokenizer")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("stage")
    p.add_argument("--data", type=Path)
    p.add_argument("--work", type=Path)
    p.add_argument("--minutes", type=float, default=25)
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--look", type=float, default=10)
    p.add_argument("--out", type=Path)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(2)
    {"data": stage_data, "autoencoder": stage_autoencoder, "unet": stage_unet, "export": stage_export}[a.stage](a)
