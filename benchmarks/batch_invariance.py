"""What `batch_invariant` is for, and what it costs: images of one request against the same images made alone.

    python -m benchmarks.batch_invariance                  the default model, 4 images, a minute or two
    python -m benchmarks.batch_invariance -m ./sd15 --device cuda

For each dtype: how many of the images' values differ from those made alone, and by how many levels of 255 at most, with
the option and without; and the request's time with it over that without, both in one run, alternating.
Results go to benchmarks/results/MACHINE/batch_invariance.json.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.suite import machine_folder
from fastldm.pipeline import Pipeline
from fastldm.serving.session import Session
from fastldm.system import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="default")
    parser.add_argument("--device")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=dtype)
        rows.append({"dtype": pipe.precision, **measure(pipe, args.images, args.rounds)})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    folder = machine_folder(pipe.device)
    record = {"machine": machine(pipe.device), "model": pipe.name, "images": args.images, "rounds": args.rounds}
    (folder / "batch_invariance.json").write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def measure(pipe: Pipeline, images: int, rounds: int, **options: Any) -> dict[str, float | str]:
    """options: fields of the requests."""
    sessions = {"plain": Session(pipe, batch_invariant=False), "invariant": Session(pipe, batch_invariant=True)}

    def request(session: Session, seed: int, count: int) -> tuple[NDArray[np.uint8], float]:
        start = perf_counter()
        result = session.submit("a red apple", seed=seed, num_images_per_prompt=count, **options).result()
        return np.stack([np.asarray(image) for image in result.images]), perf_counter() - start

    row: dict[str, float | str] = {}
    for name, session in sessions.items():
        alone = np.concatenate([request(session, seed, 1)[0] for seed in range(images)])
        levels = np.abs(request(session, 0, images)[0].astype(int) - alone)
        row[f"{name}: differing values"] = f"{100 * (levels > 0).mean():.3g}%"
        row[f"{name}: levels"] = int(levels.max())
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            times[name].append(request(session, 0, images)[1])
    ratios = sorted(slow / fast for fast, slow in zip(times["plain"], times["invariant"], strict=True))
    row["seconds"] = round(median(times["plain"]), 4)
    row["time ratio"] = round(median(ratios), 3)
    row["quartiles"] = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
    return row


if __name__ == "__main__":
    main()
