"""The gates of the default model: does a prompt give an image of the concept that it names?

    python -m benchmarks.train_default_model data --data FOLDER    # the training pictures
    python -m benchmarks.default_model --json benchmarks/results/default_model.json

A generated image counts for the concept and the style of its nearest training image (RMSE over RGB, both reduced to
32x32). Two figures measure how clean it is, against the nearest image of its own concept at 64x64: the RMSE, and the
deviation inside 4x4 cells that have one colour there. Everything runs on the shipped float16 weights through the public
`fastldm.Pipeline` with its own defaults; `--peer diffusers` generates the same images with diffusers, as a cross-check.
`--every 4` tests one concept in four, against all. Exits with 1 if a gate fails.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.default_data import COMMON_WORDS, STYLES, WORK, load_data, tag_pairs

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "fastldm" / "assets" / "default"
BATCH = 36
STEPS = 4  # the model's default: more do not make cleaner images
Pictures = NDArray[np.float32]  # (B, H, W, 3) in 0..1


class Model(Protocol):
    def generate(self, prompts: list[str], seeds: list[int], steps: int) -> Pictures: ...
    def reconstruct(self, pictures: Pictures) -> Pictures: ...


class FastLDM:
    def __init__(self, path: Path) -> None:
        import fastldm

        self.pipe = fastldm.Pipeline.from_pretrained(path)

    def generate(self, prompts: list[str], seeds: list[int], steps: int) -> Pictures:
        return self.pipe(prompt=prompts, seed=seeds, num_inference_steps=steps, output_type="np").images

    @torch.inference_mode()
    def reconstruct(self, pictures: Pictures) -> Pictures:
        x = torch.from_numpy(pictures).movedim(-1, 1).to(self.pipe.dtype) * 2 - 1  # (B, 3, H, W)
        vae = self.pipe.vae
        mean, _ = vae.encode(x).chunk(2, dim=1)
        return _unit(vae.decode(mean))


class Diffusers:
    def __init__(self, path: Path) -> None:
        from diffusers import StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(path)
        self.pipe.set_progress_bar_config(disable=True)

    def generate(self, prompts: list[str], seeds: list[int], steps: int) -> Pictures:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"guidance_scale": 2.0, "num_inference_steps": steps, "output_type": "np"}
        return self.pipe(prompt=prompts, generator=generators, **settings).images

    @torch.inference_mode()
    def reconstruct(self, pictures: Pictures) -> Pictures:
        x = torch.from_numpy(pictures).movedim(-1, 1) * 2 - 1
        return _unit(self.pipe.vae.decode(self.pipe.vae.encode(x).latent_dist.mode()).sample)


def _unit(x: torch.Tensor) -> Pictures:
    return (x.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()


PEERS: dict[str, Callable[[Path], Model]] = {"fastldm": FastLDM, "diffusers": Diffusers}


class Nearest:
    """Finds the nearest training image."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:  # (C, styles, H, W, 3)
        self.styles = pictures.shape[1]
        self.known = _reduce(pictures.reshape(-1, *pictures.shape[2:]).astype(np.float32) / 255)  # (N, D)

    def __call__(self, made: Pictures) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The concept and the style nearest to each picture: (B,), (B,)"""
        made = _reduce(made)
        # |a - b|^2 without a (B, N, D) array; |a|^2 is the same for every b
        distance = (self.known**2).sum(1) - 2 * made @ self.known.T  # (B, N)
        return np.divmod(distance.argmin(1), self.styles)


def cleanness(made: Pictures, own: list[NDArray[np.uint8]]) -> tuple[float, float]:
    """How far pictures are from the nearest of their own, `own[k]` (P, H, W, 3), in 255ths: the mean RMSE, and the
    deviation from a cell's mean (RMS) over all 4x4 cells that are one colour in the own picture, the white around it
    left out. The autoencoder alone, of the true latents, has 7 and 3."""
    errors, cells = [], []
    for picture, candidates in zip(made, own, strict=True):
        rmse = np.sqrt(((candidates / np.float32(255) - picture) ** 2).mean((1, 2, 3)))  # (P,)
        errors.append(rmse.min())
        true, drawn = _cells(candidates[rmse.argmin()] / np.float32(255)), _cells(picture)  # (256, 16, 3)
        low, high = true.min(1), true.max(1)  # (256, 3)
        flat = ((high - low) <= 4 / 255).all(1) & (low.min(1) < 0.99)
        cells.append(drawn[flat].var(1).mean(1))
    return 255 * float(np.mean(errors)), 255 * float(np.sqrt(np.concatenate(cells).mean()))


def _cells(picture: NDArray[np.float32], side: int = 4) -> NDArray[np.float32]:
    """(H, W, 3) to its cells' pixels (H * W / side^2, side^2, 3)"""
    h, w, c = picture.shape
    return picture.reshape(h // side, side, w // side, side, c).swapaxes(1, 2).reshape(-1, side * side, c)


def _reduce(pictures: Pictures) -> Pictures:
    """(B, H, W, 3) to 32x32 by box averaging, flattened: (B, 32 * 32 * 3)"""
    b, h, w, c = pictures.shape
    return pictures.reshape(b, 32, h // 32, 32, w // 32, c).mean((2, 4)).reshape(b, -1)


@dataclass
class Gate:
    name: str
    value: float
    bound: float
    unit: str = "%"
    upper: bool = False  # whether the bound is the largest value that passes, not the smallest
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.value <= self.bound if self.upper else self.value >= self.bound

    def __str__(self) -> str:
        verdict, limit = "pass" if self.passed else "FAIL", "at most" if self.upper else "at least"
        return f"{verdict}  {self.name:<50} {self.value:7.2f} {self.unit:<3} ({limit} {self.bound:g})"


class Judge:
    """Generates images for prompts and measures which concepts they show."""

    def __init__(self, model: Model, nearest: Nearest) -> None:
        self.model, self.nearest = model, nearest

    def draw(self, prompts: list[str], seeds: list[int] | None = None, steps: int = STEPS) -> Pictures:
        seeds = seeds or [0] * len(prompts)
        parts = range(0, len(prompts), BATCH)
        return np.concatenate([self.model.generate(prompts[i : i + BATCH], seeds[i : i + BATCH], steps) for i in parts])

    def gate(self, name: str, bound: float, prompts: dict[int, str], **how: Any) -> Gate:
        """The percentage of prompts, by concept, whose image is nearest to their concept."""
        return self.judged(name, bound, prompts, self.draw([*prompts.values()], **how))

    def judged(self, name: str, bound: float, prompts: dict[int, str], made: Pictures) -> Gate:
        right = self.nearest(made)[0] == np.array([*prompts])
        missed = [prompt for prompt, ok in zip(prompts.values(), right, strict=True) if not ok]
        return Gate(name, percent(right), bound, details={"prompts": len(prompts), "missed": missed})


def percent(right: NDArray) -> float:
    return float(100 * right.mean())


def run_gates(
    model: Model, concepts: list[dict[str, Any]], pictures: NDArray[np.uint8], every: int = 1
) -> Iterator[Gate]:
    """pictures (C, styles, H, W, 3); every: tests one concept in so many."""
    judge = Judge(model, Nearest(pictures))
    asked = {i: concept["names"][0] for i, concept in enumerate(concepts) if i % every == 0}
    plain = {i: f"a {name}" for i, name in asked.items()}
    yield Gate("concepts", len(concepts), 848, "")
    drawn = judge.draw([*plain.values()])
    yield judge.gate("a NAME, 8 steps", 97, plain, steps=8)
    yield judge.judged(f"a NAME, {STEPS} steps", 95, plain, drawn)
    yield judge.gate("a NAME, 2 steps", 90, plain, steps=2)
    also = {i: f"a {concepts[i]['names'][-1]}" for i in range(len(concepts)) if len(concepts[i]["names"]) > 1}
    yield judge.gate("a WORD that people use for it", 95, also)
    yield judge.gate("picture of NAME (never trained on)", 95, {i: f"picture of {name}" for i, name in asked.items()})
    pairs = {i: " ".join(pairs[0]) for i, pairs in enumerate(tag_pairs(concepts)) if i in asked and pairs}
    yield judge.gate("two tags (never trained on)", 75, pairs)

    words = list(STYLES.values())
    wanted = np.repeat(np.arange(len(words)), len(asked))
    concept, style = judge.nearest(judge.draw([f"a {word} {name}" for word in words for name in asked.values()]))
    details = {
        "prompts": len(wanted),
        "by style": {word: percent(style[wanted == k] == k) for k, word in enumerate(words)},
        "concept right too": percent((style == wanted) & (concept == np.tile([*asked], len(words)))),
    }
    yield Gate("a STYLE NAME: the style asked for", percent(style == wanted), 85, details=details)
    seeds = [1 + k % 4 for k in range(len(plain))]
    yield judge.gate("a NAME, seeds 1 to 4 in turn", 95, plain, seeds=seeds)

    # no worse than the first edition, of 324 things, on its own: 35.6 and 13.6
    rmse, flat = cleanness(drawn, [pictures[i] for i in plain])
    yield Gate("a NAME: RMSE to its nearest own picture", rmse, 35.6, "/255", upper=True)
    yield Gate("a NAME: deviation inside areas of one colour", flat, 13.6, "/255", upper=True)

    true = pictures.reshape(-1, *pictures.shape[2:])[::every]  # (N, H, W, 3)
    psnr = np.concatenate(
        [_psnr(model, true[i : i + BATCH].astype(np.float32) / 255) for i in range(0, len(true), BATCH)]
    )
    details = {"worst 5% are below": float(np.quantile(psnr, 0.05)), "worst": float(psnr.min())}
    yield Gate("autoencoder, mean PSNR of the pictures", float(psnr.mean()), 32, "dB", details=details)


def _psnr(model: Model, pictures: Pictures) -> NDArray[np.float32]:
    """(B, H, W, 3) -> (B,)"""
    return -10 * np.log10(((model.reconstruct(pictures) - pictures) ** 2).mean((1, 2, 3)))


def contact_sheet(model: Model, path: Path) -> None:
    """COMMON_WORDS in 8 rows of 8, twice their size, each with its prompt below."""
    prompts = [f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in COMMON_WORDS.split()]
    made = np.concatenate([model.generate(prompts[i : i + 32], [0] * 32, STEPS) for i in (0, 32)])
    cell, label = 2 * made.shape[1], 18
    sheet = Image.new("RGB", (8 * cell, 8 * (cell + label)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, (prompt, picture) in enumerate(zip(prompts, made, strict=True)):
        x, y = k % 8 * cell, k // 8 * (cell + label)
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        draw.text((x + cell // 2, y + cell + label // 2), prompt, fill="black", font=font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True, quality=92)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a diffusers folder (default: the one that ships)")
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, default=HERE / "results" / "default_model_sheet.jpg")
    parser.add_argument("--peer", choices=PEERS, default="fastldm", help="what generates the images")
    parser.add_argument("--every", type=int, default=1, help="test one concept in so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    started = time.perf_counter()
    concepts, pictures = load_data(args.work)
    model = PEERS[args.peer](args.model)
    gates = []
    for gate in run_gates(model, concepts, pictures.permute(0, 1, 3, 4, 2).numpy(), args.every):
        print(gate, flush=True)
        gates.append(gate)
    print(f"worst 5% of the autoencoder's pictures: below {gates[-1].details['worst 5% are below']:.2f} dB")
    contact_sheet(model, args.sheet)
    if args.json:
        packages = ["torch", "numpy", *(["diffusers", "transformers"] if args.peer == "diffusers" else [])]
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "made by": args.peer,
            "one thing in": args.every,
            "machine": f"{_processor()}, {args.threads} threads, {platform.system()} {platform.machine()}",
            "versions": {
                "python": platform.python_version(),
                **{p: importlib.metadata.version(p) for p in packages},
            },
            "weights (sha256)": _digest(args.model),
            "seconds": round(time.perf_counter() - started),
            "gates": [{**vars(gate), "value": round(gate.value, 3), "passed": bool(gate.passed)} for gate in gates],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
