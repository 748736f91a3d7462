"""The tables of README.md and docs/server.md, written between their markers from benchmarks/results/.

python -m benchmarks.readme             writes them
python -m benchmarks.readme --check     exit status 1 where they differ from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving import PARTS
from benchmarks.suite import RESULTS, newest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "server.md")
_MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """A page with current tables. KeyError for a marker that names no table."""
    return _MARKED.sub(lambda match: match[1] + "\n".join([*TABLES[match[2]](), "", ""]) + match[3], text)


def compared(*cases: str) -> list[str]:
    """The newest runs of benchmarks/suite.py: a table for each task, the fastest row last."""
    lines = []
    for case in cases:
        record = newest(case)
        if record is None:
            lines += [f"{case}: not yet measured; `python -m benchmarks.suite --case {case}` does.", ""]
            continue
        task, machine = record["task"], record["machine"]
        rows = [row for row in record["rows"] if not (row["failure"] or row["wrong"])]
        size = f"{task['width']}x{task['height']}"
        work = f"one guided step at {size}" if task["what"] == "step" else f"a {size} picture, {task['steps']} steps"
        title = "default model" if task["model"] == "default" else "SD1.5 size"
        lines += [
            f"| {title}, {work} | seconds | times faster than {rows[0]['contender']['title']} |",
            "|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: row["ratio"]):
            low, high = row["spread"]
            title, seconds = row["contender"]["title"], _number(row["median"])
            lines.append(f"| {title} | {seconds} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        lines += ["", f"{machine['name']}, {task['threads']} threads; torch {machine['torch']}, {versions}.", ""]
    return lines[:-1]


def on_gpu() -> list[str]:
    """The step of each GPU, rung by rung, from benchmarks/gpu.py's first quarter of an hour or else the ladder."""
    lines = ["| GPU, model | rung | ms a step | floor |", "|---|---|---|---|"]
    for folder in sorted({path.parent for name in ("first", "ladder-*") for path in RESULTS.glob(f"*/{name}.json")}):
        for model, rung, ms, floor in _rungs(folder):
            lines.append(f"| {folder.name}, {model} | {rung} | {ms:.2f} | {floor} |")
    if len(lines) > 2:
        return lines
    return ["GPUs: not yet measured, for none was at hand; `make gpu-first` does, in twice six minutes."]


def _rungs(folder: Path) -> list[tuple[str, str, float, float]]:
    """(model, rung, ms a step, floor in ms)"""
    first = folder / "first.json"
    if first.is_file():
        rows = [row for row in json.loads(first.read_text())["rows"] if row["stage"] == "step" and "ms" in row]
        last = {(row["model"], row["rung"]): row for row in rows}
        return [(model, rung, row["ms"], row["floor_ms"]) for (model, rung), row in last.items()]
    return [
        (row["model"], rung, result["ms"], row["floor_ms"])
        for path in sorted(folder.glob("ladder-*.json"))
        for row in json.loads(path.read_text())["rows"]
        for rung, result in row["rungs"].items()
        if "ms" in result
    ]


def deployed() -> list[str]:
    """The newest run of benchmarks/deployment.py."""
    record = newest("deployment")
    if record is None:
        return ["Not yet measured."]
    lines = ["| SD1.5, full size | seconds | most memory | written |", "|---|---|---|---|"]
    for name, row in record["commands"].items():
        written = f"{row['MiB'] / 1024:.2f} GiB" if "MiB" in row else ""
        steps = ""
        if "timings" in row:
            timings = row["timings"]
            steps = f" (a step {_number(sorted(timings['steps'])[len(timings['steps']) // 2])})"
        lines.append(f"| {name} | {row['seconds']:.0f}{steps} | {row['peak_MiB'] / 1024:.1f} GiB | {written} |")
    return [*lines, "", f"{record['machine']['name']}, {record['threads']} threads."]


def served() -> list[str]:
    """The newest run of each part of benchmarks/serving.py."""
    runs = {part: newest(f"serving-{part}") for part in PARTS}
    record = {part: run for part, run in runs.items() if run is not None}
    if len(record) < len(PARTS):
        return ["Not yet measured: `python -m benchmarks.serving --keep` does."]
    lines = [
        "| requests | clients | server | pictures/s (rounds) | p50, p95, p99 ms | s of a core |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kind']} | {row['clients']} | {row['server']} | {_load(row)} |"
        for row in record["comparison"]["table"]
    ]
    lines += [
        "",
        "| one kind, mixed | clients | pictures/s (rounds) | p50, p95, p99 ms | s of a core |",
        "|---|---|---|---|---|",
    ]
    for row in record["batch"]["table"]:
        lines.append(f"| {row['kind']}, {row['server']} | {row['clients']} | {_load(row)} |")
    for row in record["streams"]["table"]:
        lines.append(f"| one kind, {row['answer']} | {row['clients']} | {_load(row)} |")
    lines += ["", "| one request at a time | ms |", "|---|---|"]
    lines += [f"| {name} | {ms} |" for name, ms in record["overhead"]["ms"].items()]
    machine = record["comparison"]["machine"]
    others = ", ".join(f"{part} {100 * run['others']:.0f}%, {run['rounds']} rounds" for part, run in record.items())
    about = f"{machine['name']}, {machine['cores']} cores; torch {machine['torch']}."
    return [*lines, "", f"{about} What other processes took of the cores: {others}."]


def served_in_short() -> list[str]:
    """The comparison's requests of one kind, for the README."""
    run = newest("serving-comparison")
    if run is None:
        return ["Not yet measured: `python -m benchmarks.serving --keep` does."]
    lines = ["| clients | server | pictures/s | p50 | p95 | p99 |", "|---|---|---|---|---|---|"]
    for row in run["table"]:
        if row["kind"] == "one kind":
            ms = " | ".join(f"{row[f'p{percent} ms']:.0f} ms" for percent in (50, 95, 99))
            lines.append(f"| {row['clients']} | {row['server']} | {row['pictures/s']:.1f} | {ms} |")
    return lines


def _load(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    ms = ", ".join(f"{row[f'p{percent} ms']:.0f}" for percent in (50, 95, 99))
    return f"{row['pictures/s']:.2f} ({low:.2f} to {high:.2f}) | {ms} | {row['core s a picture']:.2f}"


def _number(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


TABLES: dict[str, Callable[[], list[str]]] = {
    "performance": lambda: [*compared("sd15-step", "sd15-picture", "cpu-picture"), "", *on_gpu()],
    "deployment": deployed,
    "serving": served,
    "serving-short": served_in_short,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a page is not current")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        updated = rendered(text)
        if not args.check:
            page.write_text(updated, encoding="utf-8")
        elif updated != text:
            sys.exit(f"{page.name} has tables that benchmarks/results does not say: run python -m benchmarks.readme")


if __name__ == "__main__":
    main()
