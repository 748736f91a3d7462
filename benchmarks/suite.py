"""The benchmarks of a CPU, in under 20 minutes, and their history.

    python -m benchmarks.suite                                  make bench
    python -m benchmarks.suite --deployment /tmp/deployment     with SD1.5's bundles of benchmarks.deployment
    python -m benchmarks.suite --case cpu-picture               a single case

Each run is added to benchmarks/results/MACHINE/CASE.json with its date and commit, and benchmarks/results/index.html is
written again: the history of every case as a plot. `python -m benchmarks.readme` then writes the newest into README.md.
Benchmarks without contenders, such as deployment.py, have their history here too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastldm.system import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
CASES = {  # -> the options of `fastldm bench`
    "cpu-step": ["--suite", "cpu-step"],
    "cpu-picture": [
        "--compare",
        "diffusers,diffusers-compile,onnxruntime,openvino,openvino-genai",
        "--bundle",
        "split",
        "--bundle",
        "whole",
    ],
}
FULL = {  # of SD1.5's bundles
    "sd15-step": [
        *("-m", "sd15", "--what", "step", "--size", "256x256", "--bundle", "split", "--bundle", "whole"),
        *("--compare", "diffusers,onnxruntime,openvino,openvino-genai"),
    ],
    "sd15-picture": [
        *("-m", "sd15", "--size", "256x256", "--steps", "4", "--bundle", "split", "--bundle", "whole"),
        *("--compare", "diffusers,openvino-genai", "--rounds", "3"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, *FULL, "cold-start"]
    parser.add_argument("--case", choices=names, action="append", help="may be repeated  [default: all]")
    parser.add_argument("--deployment", type=Path, help="the folder of benchmarks.deployment, for the full sizes")
    parser.add_argument(
        "--optimum", type=Path, metavar="PYTHON", help="an interpreter with optimum-onnx, to compare too"
    )
    args = parser.parse_args()
    cases = args.case or [case for case in names if case not in FULL or args.deployment]
    if args.deployment is None and FULL.keys() & set(cases):
        parser.error(f"{', '.join(FULL)} need --deployment FOLDER")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if case == "cold-start":
                subprocess.run([sys.executable, "-m", "benchmarks.cold_start"], cwd=ROOT, check=True)
            elif case in FULL:
                add_run(case, bench(with_optimum(FULL[case], args.optimum), args.deployment))
            else:
                if "--bundle" in CASES[case]:
                    make_bundles(Path(folder))
                add_run(case, bench(with_optimum(CASES[case], args.optimum), Path(folder)))


def with_optimum(options: list[str], python: Path | None) -> list[str]:
    """The options of a case, with optimum as a further peer where the case has bundles."""
    if python is None or "--bundle" not in options:
        return options
    peers = options.index("--compare") + 1
    return [*options[:peers], f"{options[peers]},optimum", *options[peers + 1 :], "--python", f"optimum={python}"]


def make_bundles(folder: Path) -> None:
    """Export the bundles of the default model."""
    for name, options in (("split", ["--whole-picture"]), ("whole", [])):
        subprocess.run([sys.executable, "-m", "fastldm", "export", str(folder / name), *options], cwd=ROOT, check=True)


def bench(options: list[str], folder: Path) -> dict[str, Any]:
    """The JSON of `fastldm bench`. Names of bundles and models in the options are relative to the folder."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(folder / option) if (folder / option).exists() else option for option in options]
        command = [sys.executable, "-m", "fastldm", "bench", *arguments, "--json", f"{out}/figures.json"]
        subprocess.run(command, cwd=ROOT, check=True)
        record: dict[str, Any] = json.loads(Path(out, "figures.json").read_text())
    display = [re.sub("^optimum=.*", "optimum=PYTHON", option) for option in options]  # without this machine's path
    return {**record, "command": " ".join(["fastldm bench", *display])}


def add_run(case: str, record: dict[str, Any]) -> None:
    """Add a run to its case's history, and to the page of all histories.

    record: with contenders the JSON of `fastldm bench`; without them "seconds" by name, each a number or the minimum,
        median and maximum of several; "machine", "command", and any further fields.
    """
    path = RESULTS / slug() / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    runs.append({"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "commit": commit.strip(), **record})
    path.write_text(json.dumps({"case": case, "runs": runs}, indent=1) + "\n")
    (RESULTS / "index.html").write_text(page(), encoding="utf-8")


def slug() -> str:
    """The name of this machine's folder."""
    description = machine(torch.device("cpu"))
    return re.sub(r"\W+", "-", f"{description['name']} {description['cores']} cores".lower()).strip("-")


def machine_folder(device: torch.device) -> Path:
    """The folder for results of a device of this machine, made if there is none."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else slug()
    folder = RESULTS / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def newest(case: str) -> dict[str, Any] | None:
    """The last run of a case on any machine; None where there is none."""
    runs = [run for path in RESULTS.glob(f"*/{case}.json") for run in json.loads(path.read_text())["runs"]]
    return max(runs, key=lambda run: run["date"], default=None)


# -------------------------------------------------------------------------------------------------------------- page

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#17becf",
    "#bcbd22",
)
STYLE = """
:root { color-scheme: light dark; --edge: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 32px auto; padding: 0 16px; }
h2 { margin: 32px 0 0; } svg { width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; }
.grid { stroke: var(--edge); } path { fill: none; stroke-width: 2; } code { font-size: 13px; }
"""


def page() -> str:
    """The history of every case on every machine."""
    plots = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.glob("*/scaling.html"))
    links = "".join(f" <a href='{path}'>How cost grows on {path.partition('/')[0]}</a>." for path in plots)
    sections = [section for path in sorted(RESULTS.glob("*/*.json")) for section in _case(path)]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastldm: measured</title><style>{STYLE}</style><h1>fastldm, measured</h1>"
        f"<p>Run by run: how many times faster than the first contender each one was, with the quarter and three "
        f"quarters of the rounds; or the seconds that each thing took, with the least and the most."
        f"{links}</p>{''.join(sections)}</html>\n"
    )


def _case(path: Path) -> Iterator[str]:
    record = json.loads(path.read_text())
    if "runs" not in record:  # an op's benchmark, which harness.py writes
        return
    runs = record["runs"]
    yield f"<h2>{escape(record['case'])}</h2><p>{escape(runs[-1]['machine']['name'])}: "
    yield f"<code>{escape(runs[-1]['command'])}</code></p>{_plot(runs)}"


class Point(NamedTuple):
    """A value of a run, with its spread and its label."""

    low: float
    value: float
    high: float
    label: str


def _points(run: dict[str, Any]) -> dict[str, Point]:
    """The points of a run, by title."""
    if "rows" not in run:
        ends = {
            name: seconds if isinstance(seconds, list) else [seconds] * 3 for name, seconds in run["seconds"].items()
        }
        return {name: Point(*three, f"{name}: {three[1]:.3g} s") for name, three in ends.items()}
    rows = {row["contender"]["title"]: row for row in run["rows"] if not (row["failure"] or row["wrong"])}
    return {
        title: Point(
            row["spread"][0],
            row["ratio"],
            row["spread"][1],
            f"{title}: {row['ratio']:.2f} times, {row['median']:.3f} s",
        )
        for title, row in rows.items()
    }


def _plot(runs: list[dict[str, Any]], width: int = 900, height: int = 320) -> str:
    unit = "×" if "rows" in runs[-1] else " s"
    histories = [_points(run) for run in runs]
    titles = list(dict.fromkeys(title for run in histories for title in run))
    top = 1.1 * max(point.high for run in histories for point in run.values())
    left, right, bottom = 50, 280, 30

    def x(i: int) -> float:
        return left + (width - left - right) * (i + 0.5) / len(runs)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - 10) * value / top

    step = next(size for k in range(-3, 6) for size in (10**k, 2 * 10**k, 5 * 10**k) if size >= top / 7)
    shapes = [
        f"<path class=grid d='M{left} {y(k * step):.1f}H{width - right}'/><text x={left - 8} y={y(k * step) + 4:.1f} "
        f"text-anchor=end>{k * step:g}{unit}</text>"
        for k in range(int(top / step) + 1)
    ]
    for k, title in enumerate(titles):
        colour = _COLOURS[k % len(_COLOURS)]
        dot = f"stroke='{colour}' stroke-width=2 fill='{'none' if k // len(_COLOURS) % 2 else colour}'"  # or a ring
        points = [(x(i), run[title]) for i, run in enumerate(histories) if title in run]
        line = "L".join(f"{px:.1f} {y(point.value):.1f}" for px, point in points)
        shapes.append(f"<path stroke='{colour}' d='M{line}'/>")
        for px, point in points:
            shapes.append(
                f"<path stroke='{colour}' d='M{px:.1f} {y(point.low):.1f}V{y(point.high):.1f}'/><circle cx={px:.1f} "
                f"cy={y(point.value):.1f} r=4 {dot}><title>{escape(point.label)}</title></circle>"
            )
        text_y = 20 + 18 * k
        shapes.append(f"<circle cx={width - right + 20} cy={text_y - 4} r=4 {dot}/>")
        shapes.append(f"<text x={width - right + 32} y={text_y}>{escape(title)}</text>")
    for i, run in enumerate(runs):
        if i in (0, len(runs) - 1):
            shapes.append(
                f"<text x={x(i):.1f} y={height - 8} text-anchor=middle>{run['date'][:10]} {run['commit']}</text>"
            )
    total_height = max(height, 20 + 18 * len(titles))
    return f"<svg viewBox='0 0 {width} {total_height}' role=img>{''.join(shapes)}</svg>"


if __name__ == "__main__":
    main()
