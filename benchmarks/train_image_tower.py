"""Train the CLIP image tower of the default model, which tells pictures apart by what a prompt says.

    python -m benchmarks.train_default_model data --work W --data ../shared/data/emoji     its pictures
    python -m benchmarks.train_image_tower train --work W --minutes 30                     writes W/image_encoder
    python -m benchmarks.train_image_tower measure --work W --tower fastldm/assets/default/image_encoder

The text tower is the model's own text encoder, as it is, with a projection that is learned here: a cosine then ranks
pictures against the very states that they were made from. The image tower is a transformer of 1.9 M parameters
(transformers' CLIPVisionModelWithProjection, 64 patches of 8x8). Both projections learn by CLIP's loss on captions,
and by the same cosine with all names.

It sees the training pictures alone: moved, turned, bent, in other colours, blurred, noisy, through the autoencoder, or
with another shining through. What it is measured on it has not seen: pictures that the model made, and those that it
made in the styles of its adapters. Files are in float16 and have transformers' names; the folder's config is a
CLIPModel's, of which the text tower's weights are those of the model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.default_data import SIZE, STYLES, WORK, caption, load_data, tag_pairs
from benchmarks.train_adapters import bent
from benchmarks.train_default_model import Budget, Every, Optimiser, encode, keep_memory, save_atomically

MODEL = Path(__file__).resolve().parent.parent / "fastldm" / "assets" / "default"
WIDTH, LAYERS, PATCH, PROJECTION = 192, 4, 8, 128
CAPTIONS = 12  # for each picture
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class TowerOptimiser(Optimiser):
    ELSEWHERE = re.compile(r"embedding|projection|head")


class Towers(nn.Module):
    """The image tower, and what the text's states are projected with."""

    def __init__(self, text_config: Any) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=PROJECTION,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="quick_gelu",
        )
        self.text_config = text_config
        self.image = CLIPVisionModelWithProjection(config)
        self.image.set_attn_implementation("eager")  # of 65 tokens, a sixth less time than one fused op
        self.text_projection = nn.Linear(text_config.hidden_size, PROJECTION, bias=False)
        nn.init.normal_(self.text_projection.weight, std=text_config.hidden_size**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def images(self, pictures: Tensor) -> Tensor:
        """(N, 3, 64, 64) in 0..1 -> unit vectors (N, 128)"""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            embeds = self.image((pictures - MEAN) / STD).image_embeds
        return F.normalize(embeds.float(), dim=-1)

    def texts(self, states: Tensor) -> Tensor:
        """The text encoder's last states (N, D) -> unit vectors (N, 128)"""
        return F.normalize(self.text_projection(states), dim=-1)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file
        from transformers import CLIPConfig, CLIPImageProcessor

        config = CLIPConfig(
            text_config={**self.text_config.to_dict(), "projection_dim": PROJECTION},
            vision_config=self.image.config.to_dict(),
            projection_dim=PROJECTION,
            architectures=["CLIPModel"],
        )
        config.save_pretrained(folder)
        CLIPImageProcessor(size=SIZE, crop_size=SIZE).save_pretrained(folder)
        weights = {**self.image.state_dict(), "text_projection.weight": self.text_projection.weight.detach()}
        weights = {key: w.half().contiguous() for key, w in weights.items() if "position_ids" not in key}
        weights["logit_scale"] = self.logit_scale.detach().clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)


# ----------------------------------------------------------------------------------------------------------- data


@torch.no_grad()
def pooled(texts: Sequence[str]) -> Tensor:
    """The text encoder's states at the end of each text, after its last norm: (N, D)."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    rows = [tokenizer(text, truncation=True, max_length=32)["input_ids"] for text in texts]
    states = torch.empty(len(rows), encoder.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), 256):  # of about the same length
        part = order[start : start + 256]
        width = max(len(rows[i]) for i in part)
        ids = torch.tensor([rows[i] + [encoder.config.eos_token_id] * (width - len(rows[i])) for i in part])
        states[part] = encoder(ids).last_hidden_state[range(len(part)), [len(rows[i]) - 1 for i in part]]
    return states


def prepare(work: Path) -> dict[str, Tensor]:
    """The pictures, the same through the autoencoder, and states of their captions and names."""
    path = work / "tower_data.pt"
    if path.exists():
        return torch.load(path)
    from diffusers import AutoencoderKL

    concepts, pictures = load_data(work)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    flat = pictures.flatten(0, 1)  # (N, 3, 64, 64)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(z).sample for z in encode(vae, flat).split(32)])
    rng = np.random.default_rng(0)
    known = {name for concept in concepts for name in concept["names"]}
    texts = []
    for concept, pairs in zip(concepts, tag_pairs(concepts), strict=True):
        for style in STYLES.values():  # the first pair of tags is for the measurement
            many = (caption(rng, concept, style, known, pairs[1:]) for _ in range(10 * CAPTIONS))
            texts += [text for text in many if text][:CAPTIONS]
    names = pooled([f"a {concept['names'][0]}" for concept in concepts])
    data = {
        "pictures": flat,
        "decoded": ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte(),
        "captions": pooled(texts).unflatten(0, (-1, CAPTIONS)),  # (N, CAPTIONS, D)
        "names": names,  # (C, D)
    }
    save_atomically(data, path)
    return data


def varied(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, 64, 64) -> 0..1, each changed in its own way."""
    b = len(pictures)
    x = torch.where((torch.rand(b) < 0.25)[:, None, None, None], bent(pictures), pictures).float() / 255
    size = 1 + 0.24 * (torch.rand(b) - 0.5)
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = size, size * (1 + 0.16 * (torch.rand(b) - 0.5))
    affine[:, :, 2] = 0.2 * (torch.rand(b, 2) - 0.5)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # white around

    def some(share: float) -> Tensor:
        return (torch.rand(b) < share).float()[:, None, None, None]

    x = x.lerp(x[torch.randperm(b)], some(0.25) * 0.4 * torch.rand(b, 1, 1, 1))  # another shines through
    x = x.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), some(0.3) * torch.rand(b, 1, 1, 1))
    x = x.lerp(x.mean(1, keepdim=True), some(0.15) * torch.rand(b, 1, 1, 1))
    mix = torch.eye(3) + 0.15 * torch.randn(b, 3, 3) * some(0.4)[:, 0]
    mix = mix / mix.sum(2, keepdim=True)  # white stays white
    x = torch.einsum("bij,bjhw->bihw", mix, x)
    coarse = F.interpolate(torch.randn(b, 3, 16, 16), size=SIZE, mode="bilinear")
    x = x + some(0.4) * 0.08 * torch.randn_like(x) * torch.rand(b, 1, 1, 1) + some(0.3) * 0.08 * coarse
    return x.clamp(0, 1)


# ------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    from transformers import CLIPTextConfig

    keep_memory()
    torch.manual_seed(0)
    data = prepare(args.work)
    pools = (data["pictures"], data["decoded"])
    towers = Towers(CLIPTextConfig.from_pretrained(MODEL / "text_encoder"))
    average = {key: w.detach().clone() for key, w in towers.named_parameters()}
    optimiser, started, due, steps = TowerOptimiser(towers), time.monotonic(), Every(2), 0
    budget = Budget(args.minutes)
    losses: list[float] = []
    while budget.progress < 1:
        rows = torch.randperm(len(data["captions"]))[: args.batch]
        concepts = rows // len(STYLES)
        captions = data["captions"][rows, torch.randint(CAPTIONS, (len(rows),))]
        pictures = torch.where((torch.rand(len(rows)) < 0.5)[:, None, None, None], *(pool[rows] for pool in pools))
        towers.train()
        images, texts, names = (
            towers.images(varied(pictures)), towers.texts(captions), towers.texts(data["names"]),
        )  # fmt: skip
        scale = towers.logit_scale.clamp(max=np.log(100)).exp()
        logits, here = scale * images @ texts.T, torch.arange(len(rows))
        loss = F.cross_entropy(scale * images @ names.T, concepts)
        loss = loss + 0.5 * (F.cross_entropy(logits, here) + F.cross_entropy(logits.T, here))
        loss.backward()
        optimiser.step(budget.learning_rate(args.peak, warm=0.03))
        towers.zero_grad()
        budget.tick()
        if args.wall:  # the time of day may end it too
            budget.used = max(budget.used, budget.seconds * (time.monotonic() - started) / (60 * args.wall))
        steps += 1
        for key, w in towers.named_parameters():
            average[key].lerp_(w.detach(), max(0.01, 1 / steps))
        losses.append(loss.item())
        if due(anyway=budget.progress >= 1):
            save_atomically({"average": average, "steps": steps}, args.work / "tower.pt")
            print(f"{budget.used / 60:6.1f} min  step {steps}  loss {np.mean(losses):.3f}", flush=True)
            losses.clear()
    towers.load_state_dict(average, strict=False)
    towers.save(args.work / "image_encoder")


# ---------------------------------------------------------------------------------------------------- measurement


def measured_pictures(work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What the tower is measured on, by name: pictures uint8 (N, 3, 64, 64) of the model, and the concept of each."""
    path = work / "tower_test.pt"
    if path.exists():
        return torch.load(path)
    import fastldm

    concepts, _ = load_data(work)
    pipe = fastldm.Pipeline.default(device="cpu", dtype="float32")

    def draw(rows: range, **options: Any) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(rows), 32):
            prompts = [f"a {concepts[i]['names'][0]}" for i in rows[start : start + 32]]
            parts.append(np.stack([np.asarray(image) for image in pipe(prompts, seed=0, **options).images]))
        return torch.from_numpy(np.concatenate(parts)).movedim(-1, 1), torch.tensor(rows)

    sets = {"a NAME, 4 steps": draw(range(len(concepts)))}
    for steps in (1, 2):
        sets[f"a NAME, {steps} steps"] = draw(range(0, len(concepts), 2), num_inference_steps=steps)
    for style in ("sketch", "pixel", "gold"):
        pipe.load_lora_weights(style, adapter_name=style)
        sets[f"a NAME, {style}"] = draw(range(0, len(concepts), 4), adapters={style: 1.0})
    torch.save(sets, path)
    return sets


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, float]:
    """The share of pictures whose own name has the largest cosine of all, in percent."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig

    data = prepare(args.work)
    towers = Towers(CLIPTextConfig.from_pretrained(MODEL / "text_encoder")).eval()
    if args.tower.suffix == ".pt":
        towers.load_state_dict(torch.load(args.tower)["average"], strict=False)
    else:
        weights = load_file(args.tower / "model.safetensors")
        moved = {key if key.startswith(("text", "logit")) else f"image.{key}": w.float() for key, w in weights.items()}
        towers.load_state_dict(moved, strict=False)
    names = towers.texts(data["names"])
    sets = {"training pictures": (data["pictures"], torch.arange(len(data["pictures"])) // len(STYLES))}
    figures = {}
    for name, (pictures, concepts) in {**sets, **measured_pictures(args.work)}.items():
        embeds = torch.cat([towers.images(part.float() / 255) for part in pictures.split(64)])
        right = (embeds @ names.T).argmax(1) == concepts
        figures[name] = round(100 * right.float().mean().item(), 1)
        print(f"{name:<24} {figures[name]:5.1f}%  of {len(concepts)}", flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "measure"))
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--minutes", type=float, default=30, help="of CPU time, to train")
    parser.add_argument("--wall", type=float, help="minutes of the clock, after which it ends in any case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=2e-3, help="the largest learning rate")
    parser.add_argument("--tower", type=Path, default=MODEL / "image_encoder", help="what is measured")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "train":
        train(args)
        return 0
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
