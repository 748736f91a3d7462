"""Train the adapters that ship with the default model: what they teach, on its own training pictures.

    python -m benchmarks.train_default_model data --work W --data ../shared/data/emoji     its pictures
    python -m benchmarks.train_adapters sketch --work W --minutes 8                        its file

    sketch    a pencil drawing on white: a LoRA of all attention and feed-forward layers, by peft
    pixel     blocks of four pixels in few colours: a LoCon, which changes convolutions too, by lycoris
    gold      cast in gold: a LoKr of the same layers, by lycoris
    smiley    what the model has no word for: a textual inversion, the vectors of <smiley>, as diffusers trains them
    shape     a white silhouette on black, which the picture then has: a T2I-Adapter, diffusers' own
    sheet     no training: the README's picture of what they do, from the files that ship

A style is learned by the U-Net alone, with the model's own captions, whatever style they ask for; so every prompt comes
out in the adapter's. For a textual inversion and a T2I-Adapter the model stays as it is. The silhouettes are those of
pictures that were moved, turned, stretched and bent: the model knows where each of its own things is without one. Files
are written by the tools that trained them, in float16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from torch import Tensor, nn

from benchmarks.default_data import ASSETS, WORK, load_data, load_pictures
from benchmarks.train_default_model import build_scheduler, draw_timesteps, encode, keep_memory

HERE = Path(__file__).resolve().parent
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


def gold(image: Image.Image) -> Image.Image:
    """Cast in gold and lit from the upper left: light by the grey picture's slope, colours by light; white around."""
    gray = ImageOps.grayscale(image)
    soft = np.asarray(gray.filter(ImageFilter.GaussianBlur(1)), np.float32)
    slope = np.roll(soft, -1, (0, 1)) - np.roll(soft, 1, (0, 1))
    slope[[0, -1]] = slope[:, [0, -1]] = 0
    light = np.clip(40 + 0.75 * np.asarray(gray, np.float32) - 0.9 * slope, 0, 255)
    shades = np.array([[50, 24, 0], [140, 84, 8], [220, 162, 24], [252, 210, 70], [255, 246, 200]], np.float32)
    cast = np.stack([np.interp(light, (0, 70, 140, 200, 255), shade) for shade in shades.T], -1)
    ground = np.asarray(image).min(-1, keepdims=True) >= 250
    return Image.fromarray(np.where(ground, 255, cast).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {"sketch": sketch, "pixel": pixel, "gold": gold}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
WORDS = {"smiley": "1F642"}  # the codes of the things that get a word
VECTORS = 6  # of a word
CAPTIONS = (("a noto {}", "noto {}"), ("a {}", "{}", "a flat {}"), ("a 3d {}", "{}, 3d style"))  # by style
COPIES = 4  # of each picture, each bent in another way


def styled(pictures: Tensor, draw: Callable[[Image.Image], Image.Image]) -> Tensor:
    """uint8 (N, 3, 64, 64) in another style."""
    drawn = [np.asarray(draw(Image.fromarray(x.permute(1, 2, 0).numpy()))) for x in pictures]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def silhouettes(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 64, 64) to bool (N, 1, 64, 64): all but the white that is joined to the border."""
    white = F.pad((pictures.amin(1, keepdim=True) >= 244).float(), (1, 1, 1, 1), value=1.0)
    outside = F.pad(torch.zeros_like(white[:, :, 1:-1, 1:-1]), (1, 1, 1, 1), value=1.0)
    while True:  # it grows by a pixel in each direction
        grown = (
            torch.maximum(F.max_pool2d(outside, (3, 1), 1, (1, 0)), F.max_pool2d(outside, (1, 3), 1, (0, 1))) * white
        )
        if torch.equal(grown, outside):
            return outside[:, :, 1:-1, 1:-1] == 0
        outside = grown


def bent(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 64, 64), each mirrored or not, turned, scaled, moved, and bent by a smooth random field; white
    around."""
    n = len(pictures)
    angle, size = 0.9 * (torch.rand(n) - 0.5), 0.55 + 0.5 * torch.rand(n)
    stretch, mirror = torch.exp(0.4 * (torch.rand(n) - 0.5)), torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    shift = 0.7 * (torch.rand(2, n) - 0.5) * (1 / size - 0.9).clamp(min=0)
    across = (mirror * stretch * angle.cos() / size, -stretch * angle.sin() / size, shift[0])
    down = (mirror * angle.sin() / stretch / size, angle.cos() / stretch / size, shift[1])
    matrix = torch.stack([*across, *down], 1).view(n, 2, 3)  # from places in the result to places in the picture
    grid = F.affine_grid(matrix, [n, 3, 64, 64], align_corners=False)
    field = F.interpolate(0.1 * torch.randn(n, 2, 5, 5), (64, 64), mode="bicubic", align_corners=True)
    black = 255 - pictures.float()  # so that what lies outside is white
    moved = 255 - F.grid_sample(black, grid + field.permute(0, 2, 3, 1), align_corners=False)
    return moved.round().clamp(0, 255).byte()


@dataclass
class Lesson:
    """What an adapter learns from."""

    parameters: list[nn.Parameter]
    draw: Callable[[int], tuple[Tensor, Tensor, dict[str, Any]]]
    """So many latents (B, 4, 16, 16), their texts' states (B, 32, D), and what else the U-Net reads."""
    save: Callable[[Path], Path]


def train(args: argparse.Namespace) -> Path:
    """Train one adapter. Returns its file, or its folder."""
    from diffusers import StableDiffusionPipeline

    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    lesson = (_word if args.adapter in WORDS else _style if args.adapter in STYLES else _shape)(pipe, args)
    parameters = lesson.parameters
    print(f"{sum(p.numel() for p in parameters):,} parameters", flush=True)
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    alphas = build_scheduler().alphas_cumprod
    signal, noise = (x.sqrt()[:, None, None, None] for x in (alphas, 1 - alphas))
    start, losses, steps = time.process_time(), [], 0
    while (used := (time.process_time() - start) / 60 / args.threads) < args.minutes:
        for group in optimiser.param_groups:  # warmed up, then straight down
            group["lr"] = args.lr * min(1, (steps + 1) / 20) * (1 - used / args.minutes)
        x, text, more = lesson.draw(args.batch)
        t, eps = draw_timesteps(args.batch), torch.randn_like(x)
        noisy = signal[t] * x + noise[t] * eps
        with torch.autocast("cpu", torch.bfloat16):
            v = pipe.unet(noisy, t, text, **more).sample.float()
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
    return lesson.save(args.out / f"{args.adapter}.safetensors")


def _states(pipe: Any, prompts: list[str]) -> Tensor:
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return torch.cat([pipe.text_encoder(rows).last_hidden_state for rows in ids.split(64)])


def _style(pipe: Any, args: argparse.Namespace) -> Lesson:
    concepts, pictures = load_data(args.work)
    latents = encode(pipe.vae, styled(pictures[:, FLAT], STYLES[args.adapter]))  # (C, 4, 16, 16)
    names = [concept["names"][0] for concept in concepts]
    prompts = [[text.format(name) for name in names] for text in ("a {}", "{}", "a 3d {}", "a noto {}")]
    with torch.no_grad():
        states = torch.stack([_states(pipe, each) for each in prompts])  # (4, C, 32, D)

    def draw(count: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        rows = torch.randint(len(latents), (count,))
        return latents[rows], states[torch.randint(len(prompts), (count,)), rows], {}

    return Lesson(*(_peft if args.adapter == "sketch" else _lycoris)(pipe, args, draw))


def _word(pipe: Any, args: argparse.Namespace) -> Lesson:
    """A word of several vectors, in prompts for each style; the rest of the vocabulary keeps its own."""
    latents = encode(pipe.vae, load_pictures(args.data, [WORDS[args.adapter]])[0])  # (styles, 4, 16, 16)
    token = f"<{args.adapter}>"
    tokens = [token, *(f"{token}_{k}" for k in range(1, VECTORS))]  # as diffusers names them
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    embedding = pipe.text_encoder.get_input_embeddings()
    first, like = len(pipe.tokenizer) - VECTORS, pipe.tokenizer.convert_tokens_to_ids(["face</w>"])
    embedding.weight.data[first:] = embedding.weight.data[like]
    embedding.weight.requires_grad_(True)
    embedding.weight.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:first]), grad[first:]]))

    def draw(count: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        styles = torch.randint(len(CAPTIONS), (count,))
        prompts = [CAPTIONS[k][int(torch.randint(len(CAPTIONS[k]), ()))].format(" ".join(tokens)) for k in styles]
        return latents[styles], _states(pipe, prompts), {}

    def save(path: Path) -> Path:
        from safetensors.torch import save_file

        save_file({token: embedding.weight.detach()[first:].half().clone()}, path)
        return path

    return Lesson([embedding.weight], draw, save)


def _shape(pipe: Any, args: argparse.Namespace) -> Lesson:
    from diffusers import T2IAdapter

    widths = list(pipe.unet.config.block_out_channels)
    adapter = T2IAdapter(in_channels=1, channels=widths, num_res_blocks=1, downscale_factor=4)
    for block in adapter.adapter.body:  # what it adds to the U-Net begins small
        for layer in block.resnets:
            nn.init.zeros_(layer.block2.weight)
            nn.init.zeros_(layer.block2.bias)
    adapter.adapter.conv_in.weight.data *= 0.1
    concepts, pictures = load_data(args.work)
    pictures = pictures.flatten(0, 1)  # (C * styles, 3, 64, 64)
    moved = torch.cat([bent(part) for _ in range(COPIES) for part in pictures.split(256)])
    masks = torch.cat([silhouettes(part) for part in moved.split(256)])  # (N, 1, 64, 64)
    latents = encode(pipe.vae, moved)
    names = [concept["names"][0] for concept in concepts]
    with torch.no_grad():
        states = [torch.stack([_states(pipe, [text.format(x) for x in names]) for text in c]) for c in CAPTIONS]
        empty = _states(pipe, [""])[0]

    def draw(count: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        rows = torch.randint(len(latents), (count,))
        text = []
        for row in rows % len(pictures):
            style = states[row % len(CAPTIONS)]
            text.append(style[torch.randint(len(style), ()), row // len(CAPTIONS)])
        text[: count // 8] = [empty] * (count // 8)  # guidance needs it without a prompt, too
        features = adapter(masks[rows].float())
        return latents[rows], torch.stack(text), {"down_intrablock_additional_residuals": list(features)}

    def save(path: Path) -> Path:
        adapter.half().save_pretrained(folder := path.with_suffix(""))
        return folder

    return Lesson(list(adapter.parameters()), draw, save)


def sheet(path: Path) -> None:
    """A dozen things as they are and in each style; then silhouettes that are not theirs, and the things in those."""
    import fastldm

    things = "red apple, cat, house, rocket, bicycle, pizza, tree, owl, guitar, castle, car, fish"
    prompts = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in things.split(", ")]
    pipe = fastldm.Pipeline.default(device="cpu", dtype="float32")
    rows = [pipe(prompts, seed=0).images]
    for style in STYLES:
        pipe.load_lora_weights(style, adapter_name=style)
        rows.append(pipe(prompts, seed=0, adapters={style: 1.0}).images)
    pipe.set_adapters([])
    pipe.attach_control("shape")
    masks = [_silhouette(k % 6) for k in range(len(prompts))]
    rows += [masks, [pipe(p, seed=0, control_image=m).images[0] for p, m in zip(prompts, masks, strict=True)]]
    made = np.concatenate([np.concatenate([np.asarray(image.convert("RGB")) for image in row], 1) for row in rows])
    Image.fromarray(made).save(path, optimize=True, quality=92)


def _silhouette(number: int) -> Image.Image:
    """White on black, 64x64: a wide oval, a tall one, a small square, a triangle, a heart, a star."""
    large = Image.new("L", (256, 256))
    draw = ImageDraw.Draw(large)
    if number < 3:
        where = [(20, 80, 236, 176), (90, 16, 166, 240), (24, 24, 132, 132)][number]
        (draw.rectangle if number == 2 else draw.ellipse)(where, fill=255)
    elif number == 3:
        draw.polygon([(128, 20), (236, 220), (20, 220)], fill=255)
    elif number == 4:
        for left in (28, 124):
            draw.pieslice((left, 40, left + 104, 144), 180, 360, fill=255)
        draw.polygon([(28, 92), (228, 92), (128, 226)], fill=255)
    else:
        angles, reach = np.arange(10) * np.pi / 5 - np.pi / 2, np.where(np.arange(10) % 2, 50, 120)
        points = 128 + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return large.resize((64, 64), Image.Resampling.BILINEAR)


def _peft(pipe: Any, args: argparse.Namespace, draw: Any) -> tuple[list[nn.Parameter], Any, Callable[[Path], Path]]:
    from peft import LoraConfig, get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))

    def save(path: Path) -> Path:
        layers = {key: w.half() for key, w in get_peft_model_state_dict(pipe.unet).items()}
        pipe.save_lora_weights(path.parent, weight_name=path.name, unet_lora_layers=layers)
        return path

    return [p for p in pipe.unet.parameters() if p.requires_grad], draw, save


def _lycoris(pipe: Any, args: argparse.Namespace, draw: Any) -> tuple[list[nn.Parameter], Any, Callable[[Path], Path]]:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]})
    rank = {"linear_dim": args.rank, "linear_alpha": args.rank, "algo": "locon"}
    if args.adapter == "gold":  # a rank beyond all widths: both factors whole
        rank = {"linear_dim": 10000, "linear_alpha": 1, "algo": "lokr", "factor": args.factor}
    network = create_lycoris(pipe.unet, 1.0, **rank)
    network.apply_to()

    def save(path: Path) -> Path:
        network.save_weights(str(path), torch.float16, {})
        return path

    return list(network.parameters()), draw, save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=[*STYLES, *WORDS, "shape", "sheet"])
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--data", type=Path, help="the emoji, for what the model has no word for")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the file (default: {OUT})")
    parser.add_argument("--minutes", type=float, default=8, help="of CPU time a thread")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--factor", type=int, default=8, help="of a LoKr")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    if args.adapter == "sheet":
        sheet(HERE / "results" / "adapters.jpg")
        return 0
    path = train(args)
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    print(f"{path}: {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
