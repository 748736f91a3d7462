"""Train the adapters that ship with the default model: what they teach, on its own training pictures.

    python -m benchmarks.train_default_model data --work W --data ../shared/data/emoji     its pictures
    python -m benchmarks.train_adapters sketch --work W --minutes 8                        its file

    sketch    a pencil drawing on white: a LoRA of all attention and feed-forward layers, by peft
    pixel     blocks of four pixels in few colours: a LoCon, which changes convolutions too, by lycoris

The U-Net alone is trained, with the model's own captions, whatever style they ask for; so every prompt comes out in the
adapter's style. Files are written by the tools that trained them, in float16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor, nn

from benchmarks.default_data import ASSETS, WORK, load_data
from benchmarks.train_default_model import build_scheduler, draw_timesteps, encode, keep_memory

MODEL = ASSETS / "default"
OUT = ASSETS / "adapters"
FLAT = 1  # the style whose pictures are drawn anew: that of a prompt without one
SEED = 0


def sketch(image: Image.Image) -> Image.Image:
    """Pencil on white: the grey picture divided by its own blurred negative, with the outlines darker."""
    gray = ImageOps.grayscale(image)
    blurred = ImageOps.invert(gray).filter(ImageFilter.GaussianBlur(3))
    light, shade = (np.asarray(x, np.float32) for x in (gray, blurred))
    pencil = np.clip(255 * light / np.maximum(255 - shade, 1), 0, 255)
    edges = np.asarray(ImageOps.invert(image.filter(ImageFilter.FIND_EDGES).convert("L")), np.float32)
    edges[[0, -1]] = edges[:, [0, -1]] = 255  # the filter does not look beyond the border
    drawn = np.minimum(pencil, 64 + 0.75 * np.clip(edges, 0, 255))
    return Image.fromarray(drawn.astype(np.uint8)).convert("RGB")


def pixel(image: Image.Image) -> Image.Image:
    """A quarter of the size in 12 colours, enlarged again without smoothing; white stays white."""
    small = image.resize((16, 16), Image.Resampling.BOX).quantize(12, dither=Image.Dither.NONE).convert("RGB")
    white = ImageChops.lighter(small, small.point(lambda v: 255 if v > 240 else 0))
    return white.resize(image.size, Image.Resampling.NEAREST)


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {"sketch": sketch, "pixel": pixel}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def styled(pictures: Tensor, draw: Callable[[Image.Image], Image.Image]) -> Tensor:
    """uint8 (N, 3, 64, 64) in another style."""
    drawn = [np.asarray(draw(Image.fromarray(x.permute(1, 2, 0).numpy()))) for x in pictures]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def train(args: argparse.Namespace) -> Path:
    """Train one adapter. Returns its file."""
    from diffusers import StableDiffusionPipeline

    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    concepts, pictures = load_data(args.work)
    targets = styled(pictures[:, FLAT], STYLES[args.adapter])
    latents = encode(pipe.vae, targets)  # (C, 4, 16, 16)
    names = [concept["names"][0] for concept in concepts]
    prompts = [[text.format(name) for name in names] for text in ("a {}", "{}", "a 3d {}", "a noto {}")]
    with torch.no_grad():
        states = torch.stack([_states(pipe, each) for each in prompts])  # (4, C, 32, D)

    parameters, save = (_peft if args.adapter == "sketch" else _lycoris)(pipe, args)
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    alphas = build_scheduler().alphas_cumprod
    signal, noise = (x.sqrt()[:, None, None, None] for x in (alphas, 1 - alphas))
    start, losses, steps = time.process_time(), [], 0
    while (used := (time.process_time() - start) / 60 / args.threads) < args.minutes:
        for group in optimiser.param_groups:  # warmed up, then straight down
            group["lr"] = args.lr * min(1, (steps + 1) / 20) * (1 - used / args.minutes)
        rows = torch.randint(len(latents), (args.batch,))
        x, t, eps = latents[rows], draw_timesteps(args.batch), torch.randn(args.batch, *latents.shape[1:])
        text = states[torch.randint(len(prompts), (args.batch,)), rows]
        noisy = signal[t] * x + noise[t] * eps
        with torch.autocast("cpu", torch.bfloat16):
            v = pipe.unet(noisy, t, text).sample.float()
        error = (signal[t] * noisy - noise[t] * v - x).pow(2).mean((1, 2, 3))
        loss = (error * noise[t].flatten().pow(-2)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        steps += 1
        if steps % 25 == 0:
            print(f"{used:6.1f} min  step {steps}  loss {mean(losses[-25:]):.4f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return save(args.out / f"{args.adapter}.safetensors")


def _states(pipe: Any, prompts: list[str]) -> Tensor:
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return torch.cat([pipe.text_encoder(rows).last_hidden_state for rows in ids.split(64)])


def _peft(pipe: Any, args: argparse.Namespace) -> tuple[list[nn.Parameter], Callable[[Path], Path]]:
    from peft import LoraConfig, get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))

    def save(path: Path) -> Path:
        layers = {key: w.half() for key, w in get_peft_model_state_dict(pipe.unet).items()}
        pipe.save_lora_weights(path.parent, weight_name=path.name, unet_lora_layers=layers)
        return path

    return [p for p in pipe.unet.parameters() if p.requires_grad], save


def _lycoris(pipe: Any, args: argparse.Namespace) -> tuple[list[nn.Parameter], Callable[[Path], Path]]:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]})
    network = create_lycoris(pipe.unet, 1.0, linear_dim=args.rank, linear_alpha=args.rank, algo="locon")
    network.apply_to()

    def save(path: Path) -> Path:
        network.save_weights(str(path), torch.float16, {})
        return path

    return list(network.parameters()), save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=STYLES)
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the file (default: {OUT})")
    parser.add_argument("--minutes", type=float, default=8, help="of CPU time a thread")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    path = train(parser.parse_args())
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
