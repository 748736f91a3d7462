"""What ranking brings: the default model's best of 8 on hard prompts, two tags in 1 and 2 steps, beside one picture and
beside what the best choice of the 8 would be.

    python -m benchmarks.train_default_model data --work W --data ../shared/data/emoji     its pictures
    python -m benchmarks.ranking --work W --json benchmarks/results/ranking.json --sheet benchmarks/results/ranking.png

A picture is right if the nearest of all training pictures is one of the thing that has both tags (RMSE over RGB at
32x32, benchmarks/default_model.py): the image tower has no part in that judgement. Prompts are those that the model's
gates test, which neither the model nor the tower was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import fastldm
from benchmarks.default_data import WORK, load_data, tag_pairs
from benchmarks.default_model import Nearest

CANDIDATES = 8


def judge(args: argparse.Namespace, steps: int) -> tuple[dict[str, Any], list[tuple[str, list[Image.Image], Any]]]:
    """The figures of so many steps in percent, and for the sheet each prompt, its candidates best first, and which of
    them are right."""
    concepts, pictures = load_data(args.work)
    nearest = Nearest(pictures.permute(0, 1, 3, 4, 2).numpy())
    prompts = {k: " ".join(pairs[0]) for k, pairs in enumerate(tag_pairs(concepts)) if pairs and k % args.every == 0}
    pipe = fastldm.Pipeline.default(device="cpu")
    rows: list[tuple[str, list[Image.Image], Any]] = []
    first, best = [], []
    for start in range(0, len(prompts), 4):
        part = list(prompts.items())[start : start + 4]
        texts, seeds = [text for _, text in part], [k for _ in part for k in range(CANDIDATES)]
        options = {"num_inference_steps": steps, "guidance_scale": args.guidance}
        result = pipe(texts, candidates=CANDIDATES, keep=CANDIDATES, seed=seeds, **options)
        made = np.stack([np.asarray(image, np.float32) / 255 for image in result.images])
        right = (nearest(made)[0].reshape(-1, CANDIDATES)) == np.array([k for k, _ in part])[:, None]
        for j, text in enumerate(texts):
            own = slice(j * CANDIDATES, (j + 1) * CANDIDATES)
            rows.append((text, list(result.images[own]), right[j]))
            first.append(right[j][list(result.seeds[own]).index(0)])  # as without ranking
            best.append(right[j][0])
    right = np.stack([row[2] for row in rows])
    figures = {
        "one picture, seed 0": first,
        "a candidate at random": right,
        f"best of {CANDIDATES}": best,
        f"any of {CANDIDATES} right": right.any(1),
    }
    shares = {name: round(100 * float(np.mean(value)), 1) for name, value in figures.items()}
    return {"prompts": len(rows), **shares}, rows


def sheet(rows: list[tuple[str, list[Image.Image], Any]], path: Path) -> None:
    """Prompts whose candidates are unlike, each with all of them, the best first; those that are right have a frame."""
    chosen = [row for row in rows if 0 < row[2].sum() < CANDIDATES][:12]
    canvas = Image.new("RGB", (72 * CANDIDATES + 150, 72 * len(chosen)), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (text, images, right) in enumerate(chosen):
        draw.text((4, 72 * y + 30), text[:24], "black")
        for x, (image, is_right) in enumerate(zip(images, right, strict=True)):
            left, top = 150 + 72 * x, 72 * y
            if is_right:
                draw.rectangle((left, top, left + 71, top + 71), outline="green", width=3)
            canvas.paste(image, (left + 4, top + 4))
    canvas.save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2], help="of the sampler")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's, 2)")
    parser.add_argument("--every", type=int, default=4, help="test one thing in so many")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a picture of candidates here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {}
    for steps in args.steps:
        record[f"{steps} steps"], rows = judge(args, steps)
        print(f"{steps} steps: {record[f'{steps} steps']}", flush=True)
    if args.sheet:
        sheet(rows, args.sheet)
    if args.json:
        args.json.write_text(json.dumps({"one thing in": args.every, **record}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
