"""How the cost of an image grows with each parameter of its request, and where it departs from the expected growth.

    python -m benchmarks.scaling                       the default model on this machine's CPU, a few minutes
    python -m benchmarks.scaling -m ./sd15 --device cuda

    steps       the loop's time; expected to grow with exponent 1
    pictures    of one request, its loop's time; 1, less where a larger batch uses the machine better
    pixels      the loop's time over height x width; 1, towards 2 as self-attention takes over
    tokens      of the prompt, in windows, the loop's time; 0, since a token is one key of many
    requests    submitted at once, until the last is done; 1, less where they share steps

For each: the exponent fitted over all sizes (the slope of log time over log size), and that from each size to the next.
Results go to benchmarks/results/MACHINE/scaling.json and, as plots, scaling.html beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.suite import STYLE, machine_folder
from fastldm.pipeline import Pipeline
from fastldm.serving.session import Session
from fastldm.system import machine

EXPECTED = {"steps": 1.0, "pictures": 1.0, "pixels": 1.0, "tokens": 0.0, "requests": 1.0}
Timed = Callable[[int], float]  # size -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="default")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model, device=args.device)
    side = pipe.unet.config.sample_size[0] * pipe.vae.config.factor
    measured = measure(series(pipe, side), args.rounds)
    for name, points in measured.items():
        print(f"{name:9} exponent {slope(points):5.2f}, expected {EXPECTED[name]:.0f}: ", end="")
        print("  ".join(f"{size}: {seconds:.3f} s" for size, seconds in points))
    folder = machine_folder(pipe.device)
    record = {
        "machine": machine(pipe.device),
        "model": pipe.name,
        "dtype": pipe.precision,
        "rounds": args.rounds,
        "series": {
            name: {"points": points, "exponent": slope(points), "expected": EXPECTED[name], "between": between(points)}
            for name, points in measured.items()
        },
    }
    (folder / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "scaling.html").write_text(page(record), encoding="utf-8")


def series(pipe: Pipeline, side: int) -> dict[str, tuple[Sequence[int], Timed]]:
    """Name -> (sizes, function that times a size)."""
    small = side // 2
    defaults: dict[str, Any] = {"seed": 0, "output_type": "latent", "num_inference_steps": 4, "sampler": "euler"}

    def loop(**options: Any) -> float:
        return sum(pipe("a red apple", **{**defaults, "height": small, "width": small, **options}).timings.steps)

    def prompt_windows(windows: int) -> float:
        count = (windows - 1) * (pipe.text_stages[0].window - 2) + 1
        return sum(pipe("apple " * count, **defaults, height=small, width=small, literal_prompt=True).timings.steps)

    def submit(requests: int) -> float:
        with Session(pipe, max_batch=8) as session:
            start = perf_counter()
            futures = [
                session.submit("a red apple", **{**defaults, "seed": k}, height=small, width=small)
                for k in range(requests)
            ]
            for future in futures:
                future.result()
            return perf_counter() - start

    unit = side // 4
    return {
        "steps": ((2, 4, 8, 16, 32), lambda n: loop(num_inference_steps=n)),
        "pictures": ((1, 2, 4, 8), lambda n: loop(num_images_per_prompt=n)),
        "pixels": (
            tuple((unit * k) ** 2 for k in (1, 2, 4, 8)),
            lambda n: loop(height=math.isqrt(n), width=math.isqrt(n)),
        ),
        "tokens": ((1, 2, 3, 4), prompt_windows),
        "requests": ((1, 2, 4, 8, 16), submit),
    }


def measure(series: dict[str, tuple[Sequence[int], Timed]], rounds: int) -> dict[str, list[tuple[int, float]]]:
    """Medians over rounds, in each of which every size of a series is timed."""
    medians = {}
    for name, (sizes, timed) in series.items():
        for size in sizes:
            timed(size)  # warm-up: plans and layouts
        times = [[timed(size) for size in sizes] for _ in range(rounds)]
        medians[name] = [(size, median(row[k] for row in times)) for k, size in enumerate(sizes)]
    return medians


def slope(points: Sequence[tuple[int, float]]) -> float:
    """The slope of log seconds over log size, by least squares."""
    xs, ys = [math.log(size) for size, _ in points], [math.log(seconds) for _, seconds in points]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)


def between(points: Sequence[tuple[int, float]]) -> list[float]:
    """The exponent from each size to the next."""
    return [slope(points[k : k + 2]) for k in range(len(points) - 1)]


def page(record: dict[str, Any]) -> str:
    """Each series in logarithmic axes, the expected growth as a dashed line through its first point."""
    text = f"{record['model']}, {record['dtype']}, {record['machine']['name']}"
    plots = "".join(_plot(name, entry) for name, entry in record["series"].items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastldm: scaling</title><style>{STYLE}</style><h1>How the cost grows</h1><p>{escape(text)}. Dashed: "
        f"the expected growth.</p>{plots}</html>\n"
    )


def _plot(name: str, entry: dict[str, Any], width: int = 900, height: int = 300) -> str:
    points = entry["points"]
    expected = [(size, points[0][1] * (size / points[0][0]) ** entry["expected"]) for size, _ in points]
    lowest, highest = (pick(seconds for _, seconds in [*points, *expected]) for pick in (min, max))
    left, right, top, bottom = 70, 20, 26, 34

    def x(size: float) -> float:
        return left + (width - left - right) * math.log(size / points[0][0]) / math.log(points[-1][0] / points[0][0])

    def y(seconds: float) -> float:
        return (
            height
            - bottom
            - (height - top - bottom) * math.log(seconds / lowest) / max(1e-9, math.log(highest / lowest))
        )

    def line(of: Sequence[tuple[int, float]]) -> str:
        return "M" + "L".join(f"{x(size):.1f} {y(seconds):.1f}" for size, seconds in of)

    shapes = [
        f"<path class=grid stroke-dasharray='6 5' d='{line(expected)}'/>",
        f"<path stroke='#0072b2' d='{line(points)}'/>",
    ]
    for size, seconds in points:
        shapes.append(f"<circle cx={x(size):.1f} cy={y(seconds):.1f} r=4 fill='#0072b2'/>")
        shapes.append(f"<text x={x(size):.1f} y={height - 12} text-anchor=middle>{size:,}</text>")
        shapes.append(f"<text x={x(size):.1f} y={y(seconds) - 9:.1f} text-anchor=middle>{seconds:.2f} s</text>")
    bends = ", ".join(f"{value:.2f}" for value in entry["between"])
    exponent, expected_exponent = entry["exponent"], entry["expected"]
    return (
        f"<h2>{name}</h2><p>exponent {exponent:.2f}, expected {expected_exponent:.0f}; from size to size {bends}</p>"
        f"<svg viewBox='0 0 {width} {height}' role=img>{''.join(shapes)}</svg>"
    )


if __name__ == "__main__":
    main()
