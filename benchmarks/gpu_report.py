"""The report of the first quarter of an hour on a GPU (benchmarks/first.py), as text and as a page.

print(text(read(folder)))              # the last output of the command
publish(folder, results)               # results/GPU/first.json and first.html, from a folder of results
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.stages import Row, ended, of, read

STYLE = """
:root { color-scheme: light dark; --edge: #8884; --bad: #d55e00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 32px auto; padding: 0 16px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--edge); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; } td:last-child { white-space: normal; }
.bad { color: var(--bad); font-weight: 600; } .wide { overflow-x: auto; }
"""


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The tables that have rows, most important first."""
    sections = (_stages, _steps, _wrong, _ops, _variants, _tests, _pictures, _slots, _compiled, _tuned)
    yield from (table for section in sections if (table := section(rows)) is not None and table.rows)


def _stages(rows: Sequence[Row]) -> Table | None:
    status = [row for row in rows if "status" in row]
    last = {row["stage"]: row for row in status}
    lines = [(name, r["status"], f"{r['seconds']:.0f} s", r.get("why", "")) for name, r in last.items()]
    return Table("Stages", ("stage", "ended", "took", "why"), lines)


def _steps(rows: Sequence[Row]) -> Table | None:
    last = {(row["model"], row["rung"]): row for row in of(rows, "step")}
    first: dict[str, float] = {}
    lines = []
    for (model, rung), row in last.items():
        if "ms" not in row:
            lines.append((model, rung, f"failed: {row['failed']}", "", "", ""))
            continue
        base = first.setdefault(model, row["ms"])
        percent = f"{100 * row['floor_ms'] / row['ms']:.0f}%" if row.get("floor_ms") else ""
        lines.append((model, rung, _ms(row["ms"]), f"{base / row['ms']:.2f} x", _ms(row["host_ms"]), percent))
    return Table("A guided step", ("model", "rung", "ms", "times faster", "host ms", "of floor"), lines)


def _wrong(rows: Sequence[Row]) -> Table | None:
    checks = list(of(rows, "checks"))
    lines = [(row["op"], row.get("call", ""), row["wrong"]) for row in checks if "wrong" in row]
    ends = {row["op"] for row in checks if row.get("ended")}
    lines += [(row["op"], "", "did not end") for row in checks if row.get("begun") and row["op"] not in ends]
    tried = sum(row["tried"] for row in checks if row.get("ended"))
    note = f"{tried} calls of {len(ends)} ops tried against float32."
    if not lines and checks:
        lines = [("none", "", "")]
    return Table("Kernels that are wrong", ("op", "call", "error"), lines, note)


def _ops(rows: Sequence[Row]) -> Table | None:
    lines = []
    for row in of(rows, "ops"):
        if "us" not in row:
            lines.append(
                (row["op"], row.get("call", ""), row.get("skipped") or f"WRONG: {row['wrong']}", "", "", "", "")
            )
            continue
        kernel_us = row["us"].get("triton")
        rest = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items() if name != "triton")
        ratio = f"{row['ratio']:.2f} x {row['best_rival']}" if "ratio" in row else ""
        percent = f"{100 * row['floor_us'] / kernel_us:.0f}%" if kernel_us else ""
        result = f"{kernel_us:.1f}" if kernel_us else row.get("unsupported") or str(row["failed"].get("triton", ""))
        lines.append((row["op"], row["call"].partition(" ")[2], str(row["count"]), result, percent, ratio, rest))
    head = ("op", "call", "count", "us", "of floor", "against the best", "rivals, us")
    return Table("Ops at their largest calls", head, lines)


def _variants(rows: Sequence[Row]) -> Table | None:
    lines = []
    for row in (*of(rows, "attention"), *of(rows, "group norm")):
        if not row.get("us"):
            continue
        for rank, (config, us) in enumerate(sorted(row["us"].items(), key=lambda item: item[1])):
            default = us == row["default_us"]
            if rank < 3 or default:
                text = ", ".join(f"{key} {value}" for key, value in json.loads(config).items())
                lines.append((row["op"], row["shape_class"], f"{us:.1f}", text + (" (default)" if default else "")))
    return Table("Launch configurations", ("op", "shape", "us", "configuration"), lines)


def _tests(rows: Sequence[Row]) -> Table | None:
    lines = []
    for row in of(rows, "tests"):
        if "tests" in row:
            lines.append(("all", ", ".join(f"{count} {outcome}" for outcome, count in row["tests"].items())))
        elif "failed" in row:
            lines.append((row["test"], row["failed"]))
    lines += [("sanitizer ran", str(row["ran"])) for row in of(rows, "sanitizer") if "ran" in row]
    return Table("Tests", ("test", "result"), lines)


def _pictures(rows: Sequence[Row]) -> Table | None:
    names = ("text_ms", "steps_ms", "decode_ms", "total_ms")
    lines = [
        (r["model"], str(r["steps"]), *(_ms(r[name]) for name in names)) for r in of(rows, "pictures") if "steps" in r
    ]
    return Table("Images, ms", ("model", "steps", "text", "steps", "decode", "total"), lines)


def _slots(rows: Sequence[Row]) -> Table | None:
    lines = [
        (row["model"], f"{row['one_at_a_time_per_s']:.2f}", f"{row['together_per_s']:.2f}")
        for row in of(rows, "slots")
        if "together_per_s" in row
    ]
    return Table("Images a second", ("model", "one at a time", "eight together"), lines)


def _compiled(rows: Sequence[Row]) -> Table | None:
    lines = [
        (row["model"], name, _ms(us / 1e3), f"{row['compile_seconds']:.0f} s")
        for row in of(rows, "torch.compile")
        for name, us in row.get("us", {}).items()
    ]
    return Table("The U-Net in a CUDA graph", ("model", "by", "ms", "compiled in"), lines)


def _tuned(rows: Sequence[Row]) -> Table | None:
    lines = [
        (
            row["op"],
            row["shape_class"],
            row["path"],
            f"{row['us']:.1f}",
            f"{row.get('torch_us', 0):.1f}",
            str(row["config"]),
        )
        for row in of(rows, "tune")
        if "config" in row and "us" in row
    ]
    return Table("Tuned", ("op", "shape", "path", "us", "torch us", "configuration"), lines)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def machine_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine as described by the first stage; empty if that did not run."""
    return next((row["machine"] for row in rows if "machine" in row), {})


def text(rows: Sequence[Row]) -> str:
    """The tables as text."""
    machine = machine_of(rows)
    blocks = [", ".join(f"{key} {value}" for key, value in machine.items())]
    for table in tables(rows):
        cells = [table.head, *table.rows]
        widths = [min(60, max(len(row[k]) for row in cells)) for k in range(len(table.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        blocks.append("\n".join([f"== {table.title}", *([table.note] if table.note else []), *lines]))
    return "\n\n".join(blocks)


def page(rows: Sequence[Row]) -> str:
    """The tables as HTML."""
    machine = machine_of(rows)
    ceilings = [row for row in of(rows, "ceilings") if "flops" in row]
    measured = "".join(
        f" {r['flops'] / 1e12:.0f} TFLOP/s, {r['bytes'] / 1e12:.2f} TB/s measured." for r in ceilings[-1:]
    )
    blocks = []
    for table in tables(rows):
        head = "".join(f"<th>{escape(cell)}" for cell in table.head)
        body = "".join(
            "<tr>" + "".join(f"<td{_class(cell)}>{escape(cell)}" for cell in row) + "</tr>" for row in table.rows
        )
        note = f"<p>{escape(table.note)}</p>" if table.note else ""
        blocks.append(f"<h2>{escape(table.title)}</h2>{note}<div class=wide><table><tr>{head}</tr>{body}</table></div>")
    name = escape(str(machine.get("gpu", "a CPU: a rehearsal, whose figures mean nothing")))
    versions = escape(", ".join(f"{key} {value}" for key, value in machine.items() if key != "gpu"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastldm on {name}</title><style>{STYLE}</style><h1>{name}</h1><p>{versions}.{measured}</p>"
        f"{''.join(blocks)}</html>\n"
    )


def _class(cell: str) -> str:
    return " class=bad" if cell.startswith(("failed", "timed out", "killed", "WRONG", "error")) else ""


def publish(folder: Path, results: Path) -> Path:
    """Write a folder's results as results/GPU/first.json, first.html and, if there is one, tuned.json.

    Raises FileNotFoundError for a folder without results.
    """
    rows = read(folder)
    if not rows:
        raise FileNotFoundError(f"{folder} has no results: expected {folder / 'results.jsonl'}")
    machine = machine_of(rows)
    target = results / str(machine.get("folder", "unknown-machine"))
    target.mkdir(parents=True, exist_ok=True)
    stored = [{key: value for key, value in row.items() if key != "say"} for row in rows]
    content = {"machine": machine, "ended": ended(rows), "rows": stored}
    (target / "first.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (target / "first.html").write_text(page(rows), encoding="utf-8")
    if (folder / "tuned.json").is_file():
        shutil.copyfile(folder / "tuned.json", target / "tuned.json")
    return target
