"""What CLIP guidance by gradient brings: the default model, guided by its own image tower, from strength 0 to too much.

    python -m benchmarks.train_default_model data --work W --data ../shared/data/emoji     the training pictures
    python -m benchmarks.clip_guidance --work W --json benchmarks/results/clip_guidance.json
    python -m benchmarks.clip_guidance --sheet benchmarks/results/clip_guidance.png        the sheet needs none

By strength: the tower's own score of picture and prompt, which guidance climbs; and two judges that have no part in it,
whether the nearest of all training pictures is one of the thing that the prompt names, and how far the picture is from
the nearest one of that thing (RMSE, in 255ths). Prompts are two tags that neither the model nor the tower was trained
on, as in benchmarks/ranking.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import fastldm
from benchmarks.default_data import WORK, load_data, tag_pairs
from benchmarks.default_model import Nearest, cleanness

STRENGTHS = (0.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
FORMS = {"through the U-Net": True, "straight through": False}
SHEET = ("red apple", "a cat", "car", "guitar", "flower purple", "animal striped", "fruit tropical", "house snow")


def guided(pipe: fastldm.Pipeline, texts: list[str], scale: float, through: bool, args: argparse.Namespace) -> Any:
    """Pictures of seed 0 each, and the tower's scores of them."""
    options: dict[str, Any] = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    if scale:
        options["guidance_fn"] = fastldm.CLIPGuidance(scale, through_unet=through)
    result = pipe(texts, candidates=1, seed=[0] * len(texts), **options)
    return result.images, result.scores


def judge(args: argparse.Namespace, pipe: fastldm.Pipeline, path: Path) -> None:
    """Write the figures of each form and strength, each as soon as it is there."""
    concepts, pictures = load_data(args.work)
    own = pictures.permute(0, 1, 3, 4, 2).numpy()
    nearest = Nearest(own)
    prompts = {k: " ".join(pairs[0]) for k, pairs in enumerate(tag_pairs(concepts)) if pairs and k % args.every == 0}
    record: dict[str, Any] = {"steps": args.steps, "one thing in": args.every, "prompts": len(prompts)}
    for form, through in FORMS.items():
        record[form] = {}
        for scale in args.strengths:
            made, scores, start = [], [], time.perf_counter()
            for first in range(0, len(prompts), 6):
                images, own_scores = guided(pipe, [*prompts.values()][first : first + 6], scale, through, args)
                made += [np.asarray(image, np.float32) / 255 for image in images]
                scores += own_scores
            right = nearest(np.stack(made))[0] == np.array([*prompts])
            record[form][f"{scale:g}"] = figures = {
                "tower score": round(float(np.mean(scores)), 4),
                "right, %": round(100 * float(np.mean(right)), 1),
                "from the nearest of its own": round(cleanness(np.stack(made), [own[k] for k in prompts])[0], 2),
            }
            print(
                f"{form} {scale:g}: {figures}, {(time.perf_counter() - start) / len(made):.2f} s a picture", flush=True
            )
            path.write_text(json.dumps(record, indent=1) + "\n")


def sheet(args: argparse.Namespace, pipe: fastldm.Pipeline, path: Path) -> None:
    """Prompts by strength; the tower's score under each picture."""
    strengths = args.strengths
    side, left, top = 68, 96, 18
    canvas = Image.new("RGB", (left + side * len(strengths), top + (side + 12) * len(args.prompts)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, scale in enumerate(strengths):
        draw.text((left + side * x + 4, 3), f"{scale:g}", "black")
        images, scores = guided(pipe, list(args.prompts), scale, not args.straight, args)
        for y, (image, score) in enumerate(zip(images, scores, strict=True)):
            at = left + side * x, top + (side + 12) * y
            canvas.paste(image, at)
            draw.text((at[0] + 4, at[1] + 64), f"{score:.3f}", "grey")
    for y, prompt in enumerate(args.prompts):
        draw.text((4, top + (side + 12) * y + 26), prompt, "black")
    canvas.quantize(256).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where the data stage left the training pictures")
    parser.add_argument("--steps", type=int, default=8, help="of the sampler")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--every", type=int, default=36, help="test one thing in so many")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="by which to guide")
    parser.add_argument("--prompts", nargs="+", default=SHEET, help="of the sheet")
    parser.add_argument("--straight", action="store_true", help="the sheet's guidance is straight through")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write pictures by prompt and strength here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = fastldm.Pipeline.default(device="cpu", dtype="float32")
    if args.sheet:
        sheet(args, pipe, args.sheet)
    if args.json:
        judge(args, pipe, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
