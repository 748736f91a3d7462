"""What the first quarter of an hour on a GPU has shown (benchmarks/first.py), as a text and as a page.

print(text(read(folder)))              # what the command prints last
publish(folder, results)               # results/GPU/first.json and first.html, from a folder that came back
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
    """What was found, most important first; only what there is."""
    sections = (_stages, _steps, _red, _ops, _variants, _tests, _pictures, _slots, _compiled, _tuned)
    yield from (table for section in sections if (table := section(rows)) is not None and table.rows)


def _stages(rows: Sequence[Row]) -> Table | None:
    status = [row for row in rows if "status" in row]
    last = {row["stage"]: row for row in status}
    found = [(name, r["status"], f"{r['seconds']:.0f} s", r.get("why", "")) for name, r in last.items()]
    return Table("Stages", ("stage", "ended", "took", "why"), found)


def _steps(rows: Sequence[Row]) -> Table | None:
    last = {(row["model"], row["rung"]): row for row in of(rows, "step")}
    first: dict[str, float] = {}
    found = []
    for (model, rung), row in last.items():
        if "ms" not in row:
            found.append((model, rung, f"failed: {row['failed']}", "", "", ""))
            continue
        base = first.setdefault(model, row["ms"])
        share = f"{100 * row['floor_ms'] / row['ms']:.0f}%" if row.get("floor_ms") else ""
        found.append((model, rung, _ms(row["ms"]), f"{base / row['ms']:.2f} x", _ms(row["host_ms"]), share))
    return Table("A guided step", ("model", "rung", "ms", "times faster", "host ms", "of floor"), found)


def _red(rows: Sequence[Row]) -> Table | None:
    checks = list(of(rows, "checks"))
    found = [(row["op"], row.get("call", ""), row["wrong"]) for row in checks if "wrong" in row]
    ends = {row["op"] for row in checks if row.get("ended")}
    found += [
        (row["op"], "", "did not come to its end") for row in checks if row.get("begun") and row["op"] not in ends
    ]
    tried = sum(row["tried"] for row in checks if row.get("ended"))
    note = f"{tried} calls of {len(ends)} ops tried against float32."
    if not found and checks:
        found = [("none", "", "")]
    return Table("Kernels that are wrong", ("op", "call", "how"), found, note)


def _ops(rows: Sequence[Row]) -> Table | None:
    found = []
    for row in of(rows, "ops"):
        if "us" not in row:
            found.append(
                (row["op"], row.get("call", ""), row.get("skipped") or f"WRONG: {row['wrong']}", "", "", "", "")
            )
            continue
        mine = row["us"].get("triton")
        others = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items() if name != "triton")
        ratio = f"{row['ratio']:.2f} x {row['best_rival']}" if "ratio" in row else ""
        share = f"{100 * row['floor_us'] / mine:.0f}%" if mine else ""
        took = f"{mine:.1f}" if mine else row.get("unsupported") or str(row["failed"].get("triton", ""))
        found.append((row["op"], row["call"].partition(" ")[2], str(row["count"]), took, share, ratio, others))
    head = ("op", "call", "count", "us", "of floor", "against the best", "others, us")
    return Table("Ops at their largest calls", head, found)


def _variants(rows: Sequence[Row]) -> Table | None:
    found = []
    for row in (*of(rows, "attention"), *of(rows, "group norm")):
        if not row.get("us"):
            continue
        for rank, (config, us) in enumerate(sorted(row["us"].items(), key=lambda item: item[1])):
            default = us == row["default_us"]
            if rank < 3 or default:
                said = ", ".join(f"{key} {value}" for key, value in json.loads(config).items())
                found.append((row["op"], row["shape_class"], f"{us:.1f}", said + (" (default)" if default else "")))
    return Table("Launch configurations", ("op", "shape", "us", "configuration"), found)


def _tests(rows: Sequence[Row]) -> Table | None:
    found = []
    for row in of(rows, "tests"):
        if "tests" in row:
            found.append(("all", ", ".join(f"{count} {outcome}" for outcome, count in row["tests"].items())))
        elif "failed" in row:
            found.append((row["test"], row["failed"]))
    found += [("sanitizer ran", str(row["ran"])) for row in of(rows, "sanitizer") if "ran" in row]
    return Table("Tests", ("test", "result"), found)


def _pictures(rows: Sequence[Row]) -> Table | None:
    names = ("text_ms", "steps_ms", "decode_ms", "total_ms")
    found = [
        (r["model"], str(r["steps"]), *(_ms(r[name]) for name in names)) for r in of(rows, "pictures") if "steps" in r
    ]
    return Table("Pictures, ms", ("model", "steps", "text", "steps", "decode", "total"), found)


def _slots(rows: Sequence[Row]) -> Table | None:
    found = [
        (row["model"], f"{row['one_at_a_time_per_s']:.2f}", f"{row['together_per_s']:.2f}")
        for row in of(rows, "slots")
        if "together_per_s" in row
    ]
    return Table("Pictures a second", ("model", "one at a time", "eight together"), found)


def _compiled(rows: Sequence[Row]) -> Table | None:
    found = [
        (row["model"], name, _ms(us / 1e3), f"{row['compile_seconds']:.0f} s")
        for row in of(rows, "torch.compile")
        for name, us in row.get("us", {}).items()
    ]
    return Table("The U-Net in a CUDA graph", ("model", "by", "ms", "compiled in"), found)


def _tuned(rows: Sequence[Row]) -> Table | None:
    found = [
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
    return Table("Tuned", ("op", "shape", "path", "us", "torch us", "configuration"), found)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def machine_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What the first stage said of the machine; nothing where it did not come to it."""
    return next((row["machine"] for row in rows if "machine" in row), {})


def text(rows: Sequence[Row]) -> str:
    """The tables for a terminal."""
    about = machine_of(rows)
    parts = [", ".join(f"{key} {value}" for key, value in about.items())]
    for table in tables(rows):
        cells = [table.head, *table.rows]
        widths = [min(60, max(len(row[k]) for row in cells)) for k in range(len(table.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        parts.append("\n".join([f"== {table.title}", *([table.note] if table.note else []), *lines]))
    return "\n\n".join(parts)


def page(rows: Sequence[Row]) -> str:
    """The tables for a browser."""
    about = machine_of(rows)
    ceilings = [row for row in of(rows, "ceilings") if "flops" in row]
    measured = "".join(
        f" {r['flops'] / 1e12:.0f} TFLOP/s, {r['bytes'] / 1e12:.2f} TB/s measured." for r in ceilings[-1:]
    )
    parts = []
    for table in tables(rows):
        head = "".join(f"<th>{escape(cell)}" for cell in table.head)
        body = "".join(
            "<tr>" + "".join(f"<td{_class(cell)}>{escape(cell)}" for cell in row) + "</tr>" for row in table.rows
        )
        note = f"<p>{escape(table.note)}</p>" if table.note else ""
        parts.append(f"<h2>{escape(table.title)}</h2>{note}<div class=wide><table><tr>{head}</tr>{body}</table></div>")
    name = escape(str(about.get("gpu", "a CPU: a rehearsal, whose figures mean nothing")))
    versions = escape(", ".join(f"{key} {value}" for key, value in about.items() if key != "gpu"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastldm on {name}</title><style>{STYLE}</style><h1>{name}</h1><p>{versions}.{measured}</p>"
        f"{''.join(parts)}</html>\n"
    )


def _class(cell: str) -> str:
    return " class=bad" if cell.startswith(("failed", "timed out", "killed", "WRONG", "error")) else ""


def publish(folder: Path, results: Path) -> Path:
    """Results that came back as the project keeps them: results/GPU/first.json, first.html and, if there is one,
    tuned.json. Raises FileNotFoundError for a folder without results."""
    rows = read(folder)
    if not rows:
        raise FileNotFoundError(f"{folder} has no results: expected {folder / 'results.jsonl'}")
    about = machine_of(rows)
    target = results / str(about.get("folder", "unknown-machine"))
    target.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in row.items() if key != "say"} for row in rows]
    content = {"machine": about, "ended": ended(rows), "rows": kept}
    (target / "first.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (target / "first.html").write_text(page(rows), encoding="utf-8")
    if (folder / "tuned.json").is_file():
        shutil.copyfile(folder / "tuned.json", target / "tuned.json")
    return target
