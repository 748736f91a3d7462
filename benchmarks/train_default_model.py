"""Trains the model that ships with fastldm: prompts to 64x64 images of everyday things, on two CPU cores. It is a small
Stable Diffusion of the same components: AutoencoderKL (4 latent channels, factor 4), CLIPTextModel (8,192
tokens) and UNet2DConditionModel (v-prediction, zero terminal SNR).

    python -m benchmarks.train_default_model all           # every stage below in this order, up to one that fails

    python -m benchmarks.train_default_model data          # renders the images first if they are missing
    python -m benchmarks.train_default_model autoencoder   # at least 32 dB
    python -m benchmarks.train_default_model text          # first the text encoder alone: 95% of names told apart
    python -m benchmarks.train_default_model unet          # then both: 95% of names drawn at 4 steps
    python -m benchmarks.train_default_model decoder       # sharpens; latents are unchanged
    python -m benchmarks.train_default_model export        # writes fastldm/assets/default
    python -m benchmarks.default_model                     # the gates of the full model

Each reads the output of the one before in the work folder, reports whether it passed its own gate, and exits with 1 if
not. With `--start FOLDER` it starts from the weights of a diffusers folder, such as fastldm/assets/default; the
autoencoder then keeps its latents unchanged, and the text encoder the states of each name, so that the U-Net's weights
remain valid.

A stage that was stopped resumes from its last checkpoint. Its learning rate follows the trained time as a fraction of
--minutes, so that a slow machine ends with a finished model too; a larger --minutes trains longer. Time is the
processor time of one thread: other load on the machine does not count. Needs `pip install diffusers
transformers`, and `npm` and `resvg-py` to rebuild the images.

Over 500 lines, for it is one recipe, which is read from top to bottom and trained once.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.default_data import (
    ASSETS,
    CONCEPTS_FILE,
    SIZE,
    STYLES,
    WORK,
    caption,
    choose_concepts,
    load_data,
    load_pictures,
    read_merges,
    rebuild_emoji,
    shrink,
    tag_pairs,
)

Passed = tuple[str, float, float]  # a gate: what was measured, how much there is of it, and the least that passes

LATENT = 16  # positions of a latent's side
VOCABULARY, CONTEXT, TEXT_WIDTH = 8192, 32, 192


def stage_data(args: argparse.Namespace) -> Passed:
    """choose the concepts and keep their pictures as one tensor"""
    folder = args.data or rebuild_emoji(args.work / "emoji")
    if not CONCEPTS_FILE.exists():
        concepts = choose_concepts(folder)
        lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in concepts)
        CONCEPTS_FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    concepts = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    pictures = load_pictures(folder, [c["codes"][0] for c in concepts])
    torch.save({"concepts": concepts, "pictures": pictures}, args.work / "data.pt")
    print(f"{len(concepts)} concepts, {pictures.shape[1]} pictures of each")
    return "things", len(concepts), 300


# --------------------------------------------------------------------------------------------------- networks


def build_autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIZE,
        force_upcast=False,
    )
    with torch.no_grad():  # a posterior that starts with little noise, exp(-7 / 2) = 0.03
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-7)
    return vae.to(memory_format=torch.channels_last)


def load_part(part: nn.Module, name: str, start: Path | None, trained: Path | None = None) -> None:
    """Give a network the weights that an earlier stage left, else those of a part of the diffusers folder `start`,
    else none."""
    if trained and trained.exists():
        part.load_state_dict(torch.load(trained))
    elif start:
        state = load_file(next((start / name).glob("*.safetensors")))
        part.load_state_dict({key: w.float() for key, w in state.items()})


class Denoiser(nn.Module):
    """The text encoder and the U-Net, which learn together."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        config = CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
        self.text = CLIPTextModel(config)
        widths = (64, 128, 192)
        self.unet = UNet2DConditionModel(
            sample_size=LATENT,
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            block_out_channels=widths,
            layers_per_block=1,
            attention_head_dim=tuple(w // 32 for w in widths),  # what diffusers calls so is the number of heads
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=16,
        )

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text(ids).last_hidden_state).sample


def build_scheduler() -> Any:
    """SD's noise, with the last step all noise (zero terminal SNR): so pictures may be white, and few steps
    do."""
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


def build_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with the most common 8,192 of its tokens, written to `folder`."""
    from transformers import CLIPTokenizer

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges = read_merges()[: VOCABULARY - 2 * len(letters) - 2]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges]
    vocabulary = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges], model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes tokenizer.json alone; these are what everything older reads
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    return tokenizer


# --------------------------------------------------------------------------------------------------- training


class Budget:
    """Time to train for, of the processor that the training thread gets: what else a machine does then delays a
    stage, and takes nothing from it. Schedules follow `progress`, which counts the time of earlier runs too."""

    def __init__(self, minutes: float, used: float = 0.0) -> None:
        self.seconds, self.used, self._last = minutes * 60, used, time.thread_time()

    def tick(self) -> None:
        now = time.thread_time()
        self.used, self._last = self.used + now - self._last, now

    @property
    def progress(self) -> float:
        return min(self.used / self.seconds, 1.0)

    def learning_rate(self, peak: float, warm: float = 0.02, floor: float = 0.01) -> float:
        """A linear warm-up, then a cosine down to `floor` of the peak."""
        if self.progress < warm:
            return peak * (self.progress + 1e-3) / (warm + 1e-3)
        x = (self.progress - warm) / (1 - warm)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


class Every:
    """True once in so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = minutes * 60, time.monotonic()

    def __call__(self, anyway: bool = False) -> bool:
        due = anyway or time.monotonic() - self.last > self.seconds
        if due:
            self.last = time.monotonic()
        return due


class Optimiser:
    """Muon (Jordan et al., 2024: momentum made orthogonal) for the matrices inside a network, AdamW for the
    rest.

    What all pictures have in common makes a few large directions of a gradient, and what tells 324 things
    apart many small ones, which Muon makes equally large. Put in AdamW's place midway through the U-Net, it
    brought the loss from 0.367 to 0.327 in four minutes; the three minutes before had brought it from 0.380.
    Each of several workers, which all have the same gradients, does its share of the matrices.
    """

    ELSEWHERE = re.compile(r"^text\.|conv_in\.|conv_out\.|quant_conv\.")  # the text encoder, and first and last layers

    def __init__(self, network: nn.Module, rank: int = 0, workers: int = 1) -> None:
        named = {name: w for name, w in network.named_parameters() if w.requires_grad}
        inner = {name for name, w in named.items() if w.ndim > 1 and not self.ELSEWHERE.search(name)}
        self.every, self.inner = list(named.values()), [named[name] for name in named if name in inner]
        groups = [
            {"params": [w for n, w in named.items() if n.startswith("text.")], "share": 0.15},
            {
                "params": [w for n, w in named.items() if n not in inner and not n.startswith("text.")],
                "share": 0.5,
            },
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.update = torch.zeros(sum(w.numel() for w in self.inner))
        self.parts = self.update.split([w.numel() for w in self.inner])
        by_cost = sorted(range(len(self.inner)), key=lambda i: self.inner[i].numel() * len(self.inner[i]))
        # Not in checkpoints: a moment of training brings it back.
        self.momentum = {i: torch.zeros_like(self.inner[i].flatten(1)) for i in by_cost[rank::workers]}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        nn.utils.clip_grad_norm_(self.every, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = group["share"] * rate
        self.adamw.step()
        self.update.zero_()
        for i, momentum in self.momentum.items():
            g = self.inner[i].grad.flatten(1)  # (out, in * kernel)
            momentum.lerp_(g, 0.05)
            # the size that AdamW's updates have, so that its learning rates fit
            u = orthogonalised(g.lerp(momentum, 0.95)) * (0.2 * max(g.shape) ** 0.5)
            self.parts[i].copy_(u.flatten())
        if dist.is_initialized():
            dist.all_reduce(self.update)
        for w, u in zip(self.inner, self.parts, strict=True):
            w.add_(u.view(w.shape), alpha=-rate)


def go_on(path: Path, model: nn.Module, average: nn.Module, optimiser: Optimiser, minutes: float) -> tuple[int, Budget]:
    """The steps that were taken, and the time, with what an earlier run left at path, if it left anything."""
    if not path.exists():
        return 0, Budget(minutes)
    state = torch.load(path)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    optimiser.adamw.load_state_dict(state["adamw"])
    return state["steps"], Budget(minutes, state["used"])


def orthogonalised(g: Tensor) -> Tensor:
    """g (M, N) with its singular values all brought near 1, by five Newton-Schulz steps."""
    x = g.bfloat16()
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).float()


def save_atomically(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def keep_memory() -> None:
    """Keep freed blocks in the process: handing activations back to the kernel and faulting them in costs
    6%."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def shuffled(count: int, batch: int) -> Iterator[Tensor]:
    """One epoch: row numbers in random order, in batches, without the incomplete last one."""
    yield from torch.randperm(count)[: count // batch * batch].split(batch)


def to_network(pictures: Tensor) -> Tensor:
    """uint8 to -1..1"""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def distance(y: Tensor, x: Tensor) -> Tensor:
    """Each picture's RMSE, which is what PSNR measures, and L1, which keeps edges."""
    rmse = ((y - x).pow(2).mean((1, 2, 3)) + 1e-6).sqrt()  # (B,)
    return rmse.mean() + (y - x).abs().mean()


def stage_autoencoder(args: argparse.Namespace) -> Passed:
    """train the autoencoder; from --start, its latents stay near where they are"""
    pictures = load_data(args.work)[1].flatten(0, 1)  # (N, 3, 64, 64)
    vae = build_autoencoder()
    load_part(vae, "vae", args.start)
    before = encode(vae, pictures) if args.start else None  # (N, 4, 16, 16)

    def loss(rows: Tensor) -> Tensor:
        x = to_network(pictures[rows])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            y = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).sample.float()
        if before is not None:
            return distance(y, x) + 0.02 * (mean - before[rows]).pow(2).mean()
        return distance(y, x) + 1e-5 * 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()  # KL to N(0, 1)

    fit_pictures(args, vae, pictures, loss, args.work / "autoencoder.pt")
    if before is None:
        normalise_latents(vae, pictures)
    vae.save_pretrained(args.work / "vae")
    return "dB, mean PSNR of all pictures", psnr(vae, pictures).mean().item(), 32


def stage_decoder(args: argparse.Namespace) -> Passed:
    """train the decoder alone some more; the latents, and so the U-Net, stay as they are"""
    vae = load_autoencoder(args.work)
    pictures = load_data(args.work)[1].flatten(0, 1)
    latents = encode(vae, pictures)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(latents[rows]).sample.float()
        return distance(y, to_network(pictures[rows]))

    before = psnr(vae, pictures).mean().item()
    fit_pictures(args, vae, pictures, loss, args.work / "decoder.pt")
    vae.save_pretrained(args.work / "vae")
    return "dB, mean PSNR of all pictures", psnr(vae, pictures).mean().item(), before


def fit_pictures(
    args: argparse.Namespace,
    vae: nn.Module,
    pictures: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    path: Path,
) -> None:
    """Minimise loss_of(rows of pictures) until the time is used."""
    keep_memory()
    torch.manual_seed(0)
    optimiser, budget = Optimiser(vae), Budget(args.minutes)
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimiser.adamw.load_state_dict(state["adamw"])
        budget = Budget(args.minutes, state["used"])
        torch.manual_seed(int(state["used"]))
    test = pictures[torch.linspace(0, len(pictures) - 1, 64).long()]
    save = Every(2)
    while budget.progress < 1:
        total = count = 0
        for rows in shuffled(len(pictures), args.batch):
            loss = loss_of(rows)
            loss.backward()
            optimiser.step(budget.learning_rate(args.peak))
            vae.zero_grad()
            budget.tick()
            total, count = total + loss.item(), count + 1
        if save(anyway=budget.progress >= 1):
            state = {"model": vae.state_dict(), "adamw": optimiser.adamw.state_dict(), "used": budget.used}
            save_atomically(state, path)
            quality = psnr(vae, test).mean()
            print(f"{budget.used / 60:6.1f} min  loss {total / count:.4f}  {quality:.2f} dB", flush=True)


@torch.no_grad()
def psnr(vae: nn.Module, pictures: Tensor) -> Tensor:
    """PSNR of each picture after encoding to the posterior's mode and decoding; uint8 (N, 3, 64, 64) ->
    (N,)"""
    y = torch.cat([vae.decode(z).sample for z in encode(vae, pictures).split(32)])
    return -10 * ((y / 2 + 0.5).clamp(0, 1) - pictures / 255).pow(2).mean((1, 2, 3)).log10()


@torch.no_grad()
def encode(vae: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 64, 64) to the posterior's mode (N, 4, 16, 16)"""
    return torch.cat([vae.encode(to_network(x)).latent_dist.mode() for x in pictures.split(32)])


@torch.no_grad()
def normalise_latents(vae: nn.Module, pictures: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1. Pipelines know one factor for all channels, so it
    goes into the 1x1 convolutions around the latents, which take it exactly."""
    std, mean = torch.std_mean(encode(vae, pictures), (0, 2, 3))  # (4,)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()  # the log variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def load_autoencoder(work: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)


def stage_text(args: argparse.Namespace) -> Passed:
    """teach the text encoder which picture a caption means"""
    # Trained along with the U-Net alone, it tells things apart too slowly: after 22 minutes its states for
    # 324 prompts varied in 3.4 directions (participation ratio), and the U-Net drew the colour of a thing
    # without its shape. Here it learns first to name the picture, as its coordinates along the principal
    # components of all latents, each scaled to deviation 1 so that fine differences count as much as colour.
    keep_memory()
    torch.manual_seed(0)
    pairs = make_pairs(args.work)
    if args.start:
        return align_text(args, pairs)
    latents, captions = pairs["latents"].flatten(1), pairs["ids"]  # (N, D), (N, 256, 32)
    left, _, _ = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
    targets = left[:, :128] * len(left) ** 0.5  # (N, 128)
    text = Denoiser().text
    text.set_attn_implementation("eager")
    nn.init.normal_(text.get_input_embeddings().weight, std=0.2)  # CLIP's 0.02 makes words too much alike to begin with
    load_part(text, "text_encoder", args.start)
    head = nn.Linear(TEXT_WIDTH, targets.shape[1])

    def loss(rows: Tensor) -> Tensor:
        ids = captions[rows, torch.randint(captions.shape[1], (len(rows),))].long()  # (B, 32)
        full = (ids == VOCABULARY - 1).float()  # from <|endoftext|> on, a state has seen all of the caption
        with torch.autocast("cpu", torch.bfloat16):
            guess = head(text(ids).last_hidden_state).float()  # (B, 32, 128)
        error = (guess - targets[rows, None]).pow(2).mean(2)  # (B, 32)
        return ((error * full).sum(1) / full.sum(1)).mean()

    train_text(args, text, loss, len(latents), [*head.parameters()])
    save_atomically(text.state_dict(), args.work / "text.pt")
    with torch.no_grad():
        guess = torch.cat([head(text(ids).last_hidden_state[:, -1]) for ids in pairs["test"][1:].split(64)])  # (C, 128)
    right = torch.cdist(guess, targets).argmin(1) // len(STYLES) == torch.arange(len(guess))
    return "% of names whose guess is nearest to their picture", 100 * right.float().mean().item(), 95


def train_text(
    args: argparse.Namespace,
    text: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    more: Sequence[Tensor] = (),
) -> None:
    """Train the text encoder, and `more` weights, to make loss(rows) of a batch of `count` rows small."""
    embedding = text.get_input_embeddings().weight
    rest = [w for w in text.parameters() if w is not embedding]
    groups = [{"params": [*rest, *more], "share": 1.0}, {"params": [embedding], "share": 5.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    budget, due = Budget(args.minutes), Every(0.5)
    losses: list[float] = []
    batches = itertools.chain.from_iterable(shuffled(count, args.batch) for _ in itertools.count())
    while budget.progress < 1:
        value = loss(next(batches))
        value.backward()
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * budget.learning_rate(args.peak)
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        budget.tick()
        losses.append(value.item())
        if due(anyway=budget.progress >= 1):
            print(f"{budget.used / 60:6.1f} min  loss {mean(losses):.4f}", flush=True)
            losses.clear()


def align_text(args: argparse.Namespace, pairs: dict[str, Tensor]) -> Passed:
    """Distil a trained text encoder: every caption gets the hidden states of its concept's name, those of `a NAME` for
    the flat image and of `a noto NAME` for noto's. The U-Net's weights remain valid, and a caption costs a hundredth of
    a training step of the U-Net. Four minutes brought common words from 62% to 95% nearest to their own states, and two
    tags from 54% to 65%.

    States of `a 3d NAME` had a twelfth of noto's distance from the flat ones, too little for the U-Net: here they are
    the flat ones plus one direction, the same for all concepts.
    """
    names = [c["names"][0] for c in load_data(args.work)[0]]  # C of them, N = 3 * C
    tokenizer = build_tokenizer(args.work / "tokenizer")
    prompts = [text.format(n) for n in names for text in ("a noto {}", "a {}", "a 3d {}")]  # in the order of STYLES
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt")["input_ids"]  # (N + 1, 32)
    text = Denoiser().text
    text.set_attn_implementation("eager")
    load_part(text, "text_encoder", args.start)
    with torch.no_grad():
        targets = torch.cat([text(rows).last_hidden_state for rows in ids.split(64)])  # (N + 1, 32, 192)
    ends = ids == VOCABULARY - 1  # from <|endoftext|> on, a state has seen all of the caption
    flat, solid = targets[1:-1:3], targets[2:-1:3]  # (C, 32, 192)
    direction = (solid - flat)[:, -1].mean(0)
    both = (ends[1:-1:3] & ends[2:-1:3])[..., None]
    targets[2:-1:3] = torch.where(both, flat + 6 * direction / direction.norm(), solid)
    spread = targets[1:-1:3, -1].var(0).mean()

    captions, rehearsed = pairs["ids"], args.batch // 8  # rows of a batch that are the prompts themselves

    def loss(rows: Tensor) -> Tensor:
        batch = captions[rows, torch.randint(captions.shape[1], (len(rows),))].long()  # (B, 32)
        batch[:rehearsed] = ids[rows[:rehearsed]]
        rows = rows.masked_fill(batch[:, 1] == VOCABULARY - 1, len(ids) - 1)  # the empty prompt
        mask = (batch == VOCABULARY - 1) & ends[rows]
        mask[:rehearsed] |= (rows[:rehearsed] % len(STYLES) != 2)[:, None]
        length = CONTEXT if torch.rand(()) < 0.25 else int((batch != VOCABULARY - 1).sum(1).max()) + 2
        weight = mask[:, :length].float()
        with torch.autocast("cpu", torch.bfloat16):
            states = text(batch[:, :length]).last_hidden_state.float()
        error = (states - targets[rows, :length]).pow(2).mean(2) / spread  # (B, length)
        return ((error * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()

    train_text(args, text, loss, len(captions))
    save_atomically(text.state_dict(), args.work / "text.pt")
    with torch.no_grad():
        states = torch.cat([text(rows).last_hidden_state[:, -1] for rows in pairs["test"][1:].split(64)])
    right = torch.cdist(states, targets[1:-1:3, -1]).argmin(1) == torch.arange(len(states))
    return "% of names whose states are nearest to their own", 100 * right.float().mean().item(), 95


def make_pairs(work: Path) -> dict[str, Tensor]:
    """What the networks learn from: latents (N, 4, 16, 16), 256 captions of each as token ids (N, 256, 32), which of
    them have a name in them and so mean one picture (N, 256), and the empty prompt and `a NAME` for every concept
    (1 + C, 32)."""
    concepts, pictures = load_data(work)
    tokenizer = build_tokenizer(work / "tokenizer")
    rng = np.random.default_rng(0)
    known = {name for c in concepts for name in c["names"]}
    owners = [c for c in concepts for _ in range(256 * len(STYLES))]
    styles = [s for _ in concepts for s in STYLES.values() for _ in range(256)]
    pairs_of = {c["names"][0]: pairs[1:] for c, pairs in zip(concepts, tag_pairs(concepts), strict=True)}
    captions = [caption(rng, c, s, known, pairs_of[c["names"][0]]) for c, s in zip(owners, styles, strict=True)]
    named = [any(name in text for name in c["names"]) for c, text in zip(owners, captions, strict=True)]
    prompts = ["", *(f"a {c['names'][0]}" for c in concepts)]
    ids = tokenizer([*captions, *prompts], padding="max_length", truncation=True)["input_ids"]
    trained, tested = torch.tensor(ids[: len(captions)]), torch.tensor(ids[len(captions) :])
    latents = encode(load_autoencoder(work), pictures.flatten(0, 1))
    pairs = {"latents": latents, "ids": trained.short().view(len(latents), -1, CONTEXT), "test": tested}
    pairs["named"] = torch.tensor(named).view(len(latents), -1)
    save_atomically(pairs, work / "pairs.pt")
    return pairs


def stage_unet(args: argparse.Namespace) -> Passed:
    """train the U-Net, and the text encoder along with it"""
    if not (args.work / "pairs.pt").exists():  # there was no text stage
        make_pairs(args.work)
    (args.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(train_unet, (args,), args.workers)
    model = Denoiser().eval().requires_grad_(False)
    model.load_state_dict(torch.load(args.work / "unet.pt")["ema"])
    right = look_at(model, torch.load(args.work / "pairs.pt")["test"], args.work, "end")
    return "% of names nearest to their thing at 4 steps", 100 * right, 95


def train_unet(rank: int, args: argparse.Namespace) -> None:
    """One of `workers` processes of one thread, each with its share of every batch; gradients are averaged.

    On two cores that is faster than one process of two threads, which wait for each other in every operation:
    38.8 pictures a second for 31.9.
    """
    from diffusers.models.attention_processor import AttnProcessor

    keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{args.work.resolve()}/rendezvous", rank=rank, world_size=args.workers)
    pairs = torch.load(args.work / "pairs.pt")
    latents, captions = pairs["latents"], pairs["ids"]  # (N, 4, 16, 16), (N, 256, 32)
    scheduler = build_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()[:, None, None, None]  # (1000, 1, 1, 1)
    noise = (1 - scheduler.alphas_cumprod).sqrt()[:, None, None, None]

    torch.manual_seed(0)
    model = Denoiser().to(memory_format=torch.channels_last)
    load_part(model.text, "text_encoder", args.start, args.work / "text.pt")
    load_part(model.unet, "unet", args.start)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    # Trains faster on a CPU than the fused attention, whose backward pass is slow: 0.90 s for 1.16 s a batch
    # of 32.
    model.unet.set_attn_processor(AttnProcessor())
    weights, optimiser = list(model.parameters()), Optimiser(model, rank, args.workers)
    path = args.work / "unet.pt"
    steps, budget = go_on(path, model, average, optimiser, args.minutes)
    torch.manual_seed(1000 * steps + rank)

    # All gradients in one piece, to average them in one go; its last number makes the workers agree on the
    # time.
    gradients = torch.zeros(sum(w.numel() for w in weights) + 1)
    for w, g in zip(weights, gradients[:-1].split([w.numel() for w in weights]), strict=True):
        w.grad = g.as_strided(w.shape, w.stride())

    # two flat images and three in 3d for one of noto: most prompts mean flat, and 3d is hard to tell from it
    times = {"noto": 1, "flat": 2, "3d": 3}
    rows_of = enumerate(STYLES.values())
    shown = torch.cat([torch.arange(k, len(latents), len(STYLES)).repeat(times[s]) for k, s in rows_of])
    batch = args.batch // args.workers
    report, save, look = Every(1), Every(4), Every(args.look)
    total = count = 0
    epochs = itertools.chain.from_iterable(shuffled(len(shown), batch) for _ in itertools.count())
    while budget.progress < 1:
        rows = shown[next(epochs)]
        x = latents[rows]
        drawn = torch.randint(captions.shape[1], (batch,))
        t = draw_timesteps(batch)
        eps = torch.randn_like(x)
        noisy = (signal[t] * x + noise[t] * eps).contiguous(memory_format=torch.channels_last)
        own = (pairs["named"][rows, drawn] & (torch.rand(batch) < args.own) & (t < 999)).nonzero()[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            text = model.text(captions[rows, drawn].long()).last_hidden_state
            if len(own):
                noisy[own] = come_from(model.unet, signal, noise, x[own], eps[own], t[own], text[own])
            v = model.unet(noisy, t, text).sample
        # The error of the picture that v means. Over the noise's variance it is the error of v; on the network's
        # own way there is no v to be right about, as what is wrong with `noisy` is not noise.
        error = (signal[t] * noisy - noise[t] * v.float() - x).pow(2).mean((1, 2, 3))  # (B,)
        weight = noise[t].flatten().pow(-2).index_fill(0, own, 1.0)
        loss = (error * weight).mean()
        loss.backward()
        budget.tick()
        gradients[-1] = budget.used
        dist.all_reduce(gradients)
        gradients /= args.workers
        budget.used = gradients[-1].item()
        optimiser.step(budget.learning_rate(args.peak))
        gradients.zero_()
        steps += 1
        if rank == 0:
            keep = min(0.999, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(average.parameters()), weights, 1 - keep)
        total, count = total + loss.item(), count + 1
        done = budget.progress >= 1
        if rank == 0 and report(done):
            print(f"{budget.used / 60:6.1f} min  step {steps}  loss {total / count:.4f}", flush=True)
            total = count = 0
        if rank == 0 and save(done):
            state = {"model": model.state_dict(), "ema": average.state_dict()}
            state |= {"adamw": optimiser.adamw.state_dict(), "used": budget.used, "steps": steps}
            save_atomically(state, path)
        if rank == 0 and look(done):
            look_at(average, pairs["test"], args.work, f"{budget.used / 60:.0f}")


@torch.no_grad()
def come_from(
    unet: nn.Module, signal: Tensor, noise: Tensor, x: Tensor, eps: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    """What a sampler has at timesteps t (B,) when a DDIM step has brought it there from an earlier one: from the
    first, which is all noise, half of the time. It shows the network its own faults, which noise on a finished
    picture never does, and few steps leave in: (B, 4, 16, 16)."""
    before = torch.where(torch.rand(len(t)) < 0.5, 999, t + ((999 - t) * torch.rand(len(t))).long())
    a, s = signal[before], noise[before]
    noisy = a * x + s * eps
    v = unet(noisy.contiguous(memory_format=torch.channels_last), before, text).sample.float()
    return signal[t] * (a * noisy - s * v) + noise[t] * (s * noisy + a * v)


def draw_timesteps(batch: int) -> Tensor:
    """Timesteps (B,), spread evenly over a batch, more of them where there is much noise: what a picture
    shows is decided there. One in ten is the last timestep, from which sampling always starts."""
    u = (torch.randperm(batch) + torch.rand(batch)) / batch
    t = (1000 * u.pow(0.6)).long().clamp(max=999)
    return t.masked_fill(torch.rand(batch) < 0.1, 999)


@torch.no_grad()
def look_at(model: Denoiser, ids: Tensor, work: Path, name: str) -> float:
    """Sample 54 of the prompts, say how many come out nearest to their concept, and keep the pictures. The share at 4
    steps."""
    pictures, vae, scheduler = load_data(work)[1], load_autoencoder(work), build_scheduler()
    chosen = torch.linspace(0, len(pictures) - 1, 54).long()
    known = shrink(pictures.flatten(0, 1).float() / 255)
    text = model.text(torch.cat([ids[:1].expand(54, -1), ids[1:][chosen]])).last_hidden_state
    for steps in (8, 4):
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0)).expand(54, -1, -1, -1)
        for t in scheduler.timesteps:
            without, given = model.unet(torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(without + 2.0 * (given - without), t, x).prev_sample
        made = (vae.decode(x).sample / 2 + 0.5).clamp(0, 1)  # (54, 3, 64, 64)
        right = torch.cdist(shrink(made), known).argmin(1) // len(STYLES) == chosen
        print(
            f"   {steps} steps: {right.float().mean():.0%} of {len(chosen)} nearest to their concept",
            flush=True,
        )
    grid = made.unflatten(0, (6, 9)).permute(0, 3, 1, 4, 2).reshape(6 * SIZE, 9 * SIZE, 3)
    Image.fromarray((grid.numpy() * 255).round().astype(np.uint8)).save(work / f"look_{name}.png")
    return right.float().mean().item()


# ----------------------------------------------------------------------------------------------------- export


def stage_export(args: argparse.Namespace) -> Passed:
    """write the averaged weights as a diffusers folder in float16"""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    model = Denoiser()
    model.load_state_dict(torch.load(args.work / "unet.pt")["ema"])
    pipe = StableDiffusionPipeline(
        vae=load_autoencoder(args.work),
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
    config = json.loads((args.out / "vae" / "config.json").read_text())
    del config["_name_or_path"]  # a folder of this machine
    (args.out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    return f"MB below 36 in {args.out}", 36 - size / 1e6, 0


# ---------------------------------------------------------------------------------------------------- command


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def add(
        name: str, run: Callable[[argparse.Namespace], Passed] | None, about: str
    ) -> Callable[..., argparse.Action]:
        described = argparse.ArgumentDefaultsHelpFormatter
        stage = stages.add_parser(name, help=about, description=about, formatter_class=described)
        stage.set_defaults(run=run)
        stage.add_argument("--work", type=Path, default=WORK, help="folder for data, checkpoints and samples")
        stage.add_argument("--threads", type=int, default=2, help="CPU threads")
        return stage.add_argument

    def add_training(
        name: str, run: Callable[[argparse.Namespace], Passed], minutes: float, batch: int, peak: float
    ) -> Callable[..., argparse.Action]:
        option = add(name, run, run.__doc__ or "")
        option("--minutes", type=float, default=minutes, help="time to train for, of one processor")
        option("--batch", type=int, default=batch, help="pictures a step")
        option("--peak", type=float, default=peak, help="highest learning rate")
        option("--start", type=Path, help="a diffusers folder whose weights to go on from")
        return option

    drawn = {"type": Path, "help": "folder of pictures drawn before, to draw none"}
    add("data", stage_data, stage_data.__doc__ or "")("--data", **drawn)
    add_training("autoencoder", stage_autoencoder, minutes=24, batch=12, peak=2e-3)
    add_training("text", stage_text, minutes=6, batch=108, peak=1e-3)
    unet = add_training("unet", stage_unet, minutes=90, batch=96, peak=3e-3)
    unet("--look", type=float, default=10, help="minutes between samples to look at")
    unet("--own", type=float, default=0.4, help="share of pictures on the network's own way to them")
    unet("--workers", type=int, default=2, help="processes, one a core")
    add_training("decoder", stage_decoder, minutes=5, batch=12, peak=2e-3)
    written = {"type": Path, "default": ASSETS / "default", "help": "where to"}
    add("export", stage_export, stage_export.__doc__ or "")("--out", **written)
    every = list(stages.choices)
    whole = add("all", None, "run every stage in turn, up to one that fails")
    whole("--data", **drawn)
    whole("--start", type=Path, help="a diffusers folder whose weights to go on from")
    whole("--out", **written)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(args).items() if name not in ("stage", "run")}
    for name in every if args.stage == "all" else [args.stage]:
        stage = argparse.Namespace(**{**vars(parser.parse_args([name])), **given})
        gate, measured, least = stage.run(stage)
        passed = measured >= least
        print(f"{'pass' if passed else 'FAIL'}  {name}: {measured:.2f} {gate} (at least {least:.2f})", flush=True)
        if not passed:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
