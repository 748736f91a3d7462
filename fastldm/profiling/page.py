"""A profile as one page that needs no network: its plots are SVG within it, and follow the reader's light or dark.

Each plot is a function from the profile to SVG of WIDTH units across, which the page scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from fastldm.planning.memory import size
from fastldm.profiling.report import facts, milliseconds, op_cells, path, rate, stage_cells, title
from fastldm.profiling.results import OUTSIDE, Event, Profile, percent

WIDTH = 960
_COLOURS = 8  # of _STYLE, for the slowest ops; the others are grey


def page(profile: Profile) -> str:
    """The whole page."""
    plots = (
        (
            "A picture, stage by stage",
            f"{milliseconds(profile.wall.median)} from its prompt to its file",
            stages(profile),
        ),
        ("Step by step", "median of each step; the line goes from the least to the 90th percentile", steps(profile)),
        ("One step, op by op", "of the picture that took the median time, while each op was timed", one_step(profile)),
        (
            "Ops against their floors",
            "of a step; the solid part is the least time that this machine allows",
            bars(profile),
        ),
        ("Roofline", "each op's operations a byte and a second, under what was measured here", roofline(profile)),
    )
    figures = "\n".join(
        f"<figure><figcaption><h2>{head}</h2><p>{note}</p></figcaption>{plot}</figure>" for head, note, plot in plots
    )
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(profile).items())
    versions = ", ".join(f"{name} {value}" for name, value in profile.about["machine"].items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>fastldm profile: {escape(profile.about['model'])}</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>fastldm profile</h1><p>{escape(title(profile))}</p></header>"
        f'<p class="advice">{escape(profile.advice)}</p>{_tiles(profile)}\n{figures}\n'
        f"<section><h2>Stages</h2>{_table(stage_cells(profile))}</section>"
        f"<section><h2>Ops</h2>{_table(op_cells(profile, len(profile.rows)))}</section>"
        f"<dl>{entries}<dt>measured on</dt><dd>{escape(versions)}</dd></dl></main></body></html>"
    )


def _tiles(profile: Profile) -> str:
    rows = profile.of("step")
    floor, seconds = sum(row.floor for row in rows), sum(row.seconds for row in rows)
    tiles = [
        (milliseconds(profile.wall.median), "a picture"),
        (milliseconds(profile.step.median), "a step"),
        (percent(floor, seconds), "of what this machine allows, in a step"),
        (rate(sum(row.flop for row in rows) / seconds, "FLOP"), "achieved in a step"),
    ]
    if profile.memory:
        tiles.append((size(profile.memory["measured"]), f"at most, {size(profile.memory['planned'])} planned"))
    divs = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    return f'<div class="tiles">{divs}</div>'


def _table(cells: Iterable[Sequence[str]]) -> str:
    head, *rows = cells

    def line(row: Sequence[str], tag: str) -> str:
        kind = ' class="head"' if tag == "td" and not row[0].startswith(" ") and not row[1] else ""
        indent = [' class="in"' if cell.startswith("  ") else "" for cell in row]
        return (
            f"<tr{kind}>"
            + "".join(f"<{tag}{i}>{escape(c)}</{tag}>" for i, c in zip(indent, row, strict=True))
            + "</tr>"
        )

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


# ------------------------------------------------------------------------------------------------------------ the plots


def stages(profile: Profile) -> str:
    """One bar of all stages. What is too narrow for its name has it below."""
    total, x, shapes, below = sum(stage.seconds for stage in profile.stages), 0.0, [], []
    ranked = sorted(profile.stages, key=lambda stage: -stage.seconds)
    for stage in profile.stages:
        width, colour = WIDTH * stage.seconds / total, _colour(ranked.index(stage))
        label = f"{stage.name} {milliseconds(stage.seconds)}"
        shapes.append(_rect(x, 0, width, 44, colour, f"{label}, {percent(stage.seconds, total)}"))
        if width > 8 * len(label):
            shapes.append(_text(x + width / 2, 27, label, "middle on"))
        else:
            below.append((colour, label))
        x += width
    return _svg(44 + 18 + 20 * math.ceil(len(below) / 5), [*shapes, *_legend(below, 62, 5)], "stages of a picture")


def steps(profile: Profile) -> str:
    """A bar for each step."""
    height, left = 180, 60
    top = 1.05 * max(each.p90 for each in profile.steps)
    pitch = (WIDTH - left) / len(profile.steps)
    shapes = [_line(left, height, WIDTH, height, "axis")]
    for seconds, label in _ticks(top):
        y = height - height * seconds / top
        shapes += [_line(left, y, WIDTH, y, "grid"), _text(left - 8, y + 4, label, "end")]
    bar_width = min(0.76 * pitch, 90)
    for k, each in enumerate(profile.steps):
        x, bar_height = left + (k + 0.5) * pitch, height * each.median / top
        label = f"step {k + 1}: {milliseconds(each.median)}"
        shapes.append(_rect(x - bar_width / 2, height - bar_height, bar_width, bar_height, _colour(0), label))
        low, high = (height - height * value / top for value in (each.least, each.p90))
        shapes.append(_line(x, low, x, high, "whisker"))
        if len(profile.steps) <= 30 or k % 5 == 4:
            shapes.append(_text(x, height + 17, str(k + 1), "middle"))
    return _svg(height + 24, shapes, "latency of each step")


def one_step(profile: Profile) -> str:
    """The ops of the step in the middle, one after the other."""
    track = "device" if any(event.track == "device" for event in profile.events) else "host"
    events = [event for event in profile.events if event.track == track]
    timed_steps = [event for event in events if event.name == "step"]
    step = timed_steps[len(timed_steps) // 2]
    end = step.start + step.seconds
    ops = [event for event in events if event.op and step.start <= event.start < end]
    colours = _op_colours(profile)
    scale = WIDTH / step.seconds

    def drawing(event: Event) -> str:
        x = (event.start - step.start) * scale
        label = f"{event.name}: {event.seconds * 1e6:.0f} us"
        return _rect(x, 0, max(event.seconds * scale, 0.4), 60, colours.get(event.name, "var(--other)"), label)

    shapes = [_rect(0, 0, WIDTH, 60, "var(--quiet)", OUTSIDE), *(drawing(event) for event in ops)]
    for seconds, label in _ticks(step.seconds):
        shapes.append(_text(min(seconds * scale, WIDTH - 20), 78, label, "middle" if seconds else "start"))
    names = [name for name in colours if any(event.name == name for event in ops)]
    legend = [*((colours[name], name) for name in names), ("var(--quiet)", OUTSIDE)]
    return _svg(92 + 20 * math.ceil(len(legend) / 5), [*shapes, *_legend(legend, 104, 5)], "ops of one step in time")


def bars(profile: Profile) -> str:
    """A bar for each op of a step, its floor within."""
    rows, per, left, colours = profile.of("step"), len(profile.steps), 150, _op_colours(profile)
    labels = []
    for row in rows:
        floor = f"{percent(row.floor, row.seconds)} of floor" if row.floor else ""
        labels.append(", ".join(filter(None, (milliseconds(row.seconds / per), floor, path(row, per)))))
    # As long as leaves room for the words behind each bar, of about seven units a letter.
    ends = [WIDTH - left - 16 - 7 * len(label) for label in labels]
    scale, shapes = min(end / row.seconds for end, row in zip(ends, rows, strict=True)), []
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y, colour = 30 * k, colours.get(row.name, "var(--other)")
        tooltip = f"{row.name}: {milliseconds(row.seconds / per)}, floor {milliseconds(row.floor / per)}"
        shapes.append(_text(left - 10, y + 17, row.name, "end"))
        shapes.append(_rect(left, y + 2, row.seconds * scale, 22, colour, tooltip, "light"))
        shapes.append(_rect(left, y + 2, min(row.floor, row.seconds) * scale, 22, colour, tooltip))
        shapes.append(_text(left + row.seconds * scale + 8, y + 17, label, "start"))
    return _svg(30 * len(rows), shapes, "ops of a step against their floors")


def roofline(profile: Profile) -> str:
    """Operations a second over operations a byte, both by powers of ten, of all ops that multiply."""
    rows = [row for stage in ("step", "decode") for row in profile.of(stage) if row.flop and row.bytes]
    rows = [row for row in rows if row.seconds >= 0.01 * profile.wall.median]
    if not rows:
        return _svg(30, [_text(0, 20, "no op multiplies here", "start")], "roofline")
    ceilings, height, left = profile.ceilings, 330, 100
    measured = [(row, row.flop / row.bytes, row.flop / row.seconds) for row in rows]
    ridge = ceilings.flops / ceilings.bytes
    low = math.floor(math.log10(min(ridge / 2, *(x for _, x, _ in measured))))
    high = math.ceil(math.log10(2 * max(ridge, *(x for _, x, _ in measured))))
    top = math.log10(2 * max(ceilings.flops, *(y for *_, y in measured)))
    bottom = math.log10(min(ceilings.bytes * 10**low, *(y for *_, y in measured)) / 2)

    def x_of(value: float) -> float:
        return left + (WIDTH - left) * (math.log10(value) - low) / (high - low)

    def y_of(value: float) -> float:
        return height * (top - math.log10(value)) / (top - bottom)

    shapes = []
    for power in range(math.ceil(bottom), math.floor(top) + 1):
        y = y_of(10**power)
        shapes += [_line(left, y, WIDTH, y, "grid"), _text(left - 8, y + 4, rate(10**power, "FLOP"), "end")]
    for power in range(low, high + 1):
        x = x_of(10**power)
        shapes += [_line(x, 0, x, height, "grid"), _text(min(x, WIDTH - 30), height + 18, f"{10**power:g}", "middle")]
    shapes.append(_text((left + WIDTH) / 2, height + 38, "operations a byte", "middle"))
    start = max(10.0**low, 10**bottom / ceilings.bytes)
    points = [(start, start * ceilings.bytes), (ridge, ceilings.flops), (10.0**high, ceilings.flops)]
    roof = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    shapes.append(f'<polyline class="roof" points="{roof}"/>')
    shapes.append(_text(WIDTH - 6, y_of(ceilings.flops) - 8, rate(ceilings.flops, "FLOP"), "end"))
    middle = math.sqrt(start * ridge)
    shapes.append(_text(x_of(middle) - 10, y_of(middle * ceilings.bytes) - 8, rate(ceilings.bytes, "B"), "end"))
    colours, longest = _op_colours(profile), max(row.seconds for row in rows)
    dots = [(x_of(x), y_of(y), 4 + 10 * math.sqrt(row.seconds / longest)) for row, x, y in measured]
    taken = [(x - r, y - r, x + r, y + r) for x, y, r in dots]
    for (row, per_byte, per_second), (x, y, r) in zip(measured, dots, strict=True):
        kind, name = ("dot", row.name) if row.stage == "step" else ("dot ring", f"{row.name} ({row.stage})")
        tooltip = f"{name}: {per_byte:.3g} FLOP/B, {rate(per_second, 'FLOP')}, {milliseconds(row.seconds)} a picture"
        shapes.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" '
            f'style="--c:{colours.get(row.name, "var(--other)")}"><title>{escape(tooltip)}</title></circle>'
        )
        width = 7.2 * len(name)
        sides = [(x + r + 5, y), (x - r - 5 - width, y), (x - width / 2, y + r + 11), (x - width / 2, y - r - 11)]
        boxes = [(left, middle - 8, left + width, middle + 8) for left, middle in sides]
        box = next((box for box in boxes if not any(_meet(box, other) for other in taken)), boxes[0])
        taken.append(box)
        shapes.append(_text(box[0], box[1] + 12.5, name, "start"))
    return _svg(height + 46, shapes, "roofline")


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) have a point in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _op_colours(profile: Profile) -> dict[str, str]:
    names = [row.name for row in profile.of("step") if row.name != OUTSIDE]
    names += [row.name for row in profile.of("decode") if row.name not in (OUTSIDE, *names)]
    return {name: _colour(k) for k, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------------ the means


def _colour(rank: int) -> str:
    return f"var(--c{rank})" if rank < _COLOURS else "var(--other)"


def _ticks(top: float) -> list[tuple[float, str]]:
    """Round times from 0, four to eight of them, and what to write there."""
    unit_seconds, unit = (1.0, "s") if top >= 1 else (1e-3, "ms")
    power = 10 ** math.floor(math.log10(top / unit_seconds / 4))
    gap = next(power * n for n in (1, 2, 5, 10) if top / unit_seconds / (power * n) <= 8)
    return [(unit_seconds * gap * k, f"{gap * k:.6g} {unit}") for k in range(int(top / unit_seconds / gap) + 1)]


def _rect(x: float, y: float, width: float, height: float, colour: str, tooltip: str, kind: str = "") -> str:
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:.2f}" '
        f'style="fill:{colour}"><title>{escape(tooltip)}</title></rect>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _legend(entries: Sequence[tuple[str, str]], y: float, columns: int) -> list[str]:
    shapes = []
    for k, (colour, label) in enumerate(entries):
        x, line = WIDTH * (k % columns) / columns, y + 20 * (k // columns)
        shapes += [_rect(x, line - 10, 11, 11, colour, label), _text(x + 17, line, label, "start")]
    return shapes


def _svg(height: float, shapes: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
    )


_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --fg: #1d2127; --muted: #68707b; --edge: #e3e5e8;
  --quiet: #e9ebee; --other: #9aa3ad; --on: #fff; --c0: #2f6fd0; --c1: #d9722e; --c2: #2b9a77; --c3: #a24fb5;
  --c4: #c23b5a; --c5: #7d8a1f; --c6: #14909e; --c7: #8a6b4e; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --card: #1b1f25; --fg: #e6e9ed; --muted: #98a1ad;
  --edge: #2d333b; --quiet: #2a3038; --other: #6d7783; --on: #10131a; --c0: #6ea4f4; --c1: #f09a5d; --c2: #56c49f;
  --c3: #cb87dc; --c4: #ec7c95; --c5: #b7c455; --c6: #4fc0ce; --c7: #bd9c7d; } }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 16px; margin: 0; }
header p, figcaption p { margin: 2px 0 0; color: var(--muted); }
.advice { border-left: 4px solid var(--c1); background: var(--card); padding: 12px 16px; font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tiles div, figure, section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tiles div { padding: 12px 14px; } .tiles b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: 13px; }
figure, section { margin: 18px 0 0; padding: 16px 18px; } figcaption { margin-bottom: 14px; }
svg { display: block; width: 100%; height: auto; } text { fill: var(--fg); font: 13px system-ui, sans-serif; }
text.end { text-anchor: end; } text.middle { text-anchor: middle; } text.on { fill: var(--on); font-weight: 600; }
rect.light { opacity: .35; } .grid { stroke: var(--edge); } .axis { stroke: var(--muted); }
.whisker { stroke: var(--fg); stroke-width: 1.5; } .roof { fill: none; stroke: var(--muted); stroke-width: 2; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.ring { fill: var(--card); stroke: var(--c); stroke-width: 3; }
section { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin-top: 10px; font-size: 13.5px; }
th, td { text-align: right; padding: 3px 8px; white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; } tbody tr { border-top: 1px solid var(--edge); }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.head td { font-weight: 600; } .in:first-child { padding-left: 22px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 18px 2px 0; font-size: 13.5px; }
dt { color: var(--muted); } dd { margin: 0; }
"""
