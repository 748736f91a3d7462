"""Draws architecture.svg from the imports: a box for each floor with its modules, and the floors that it sees.

    python docs/architecture.py

The floors are the table in tests/test_floors.py, which fails where the drawing is not what this script makes.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_floors import FLOORS, MODULES, floor, imports  # noqa: E402

DRAWING = ROOT / "docs" / "architecture.svg"
MARGIN, TEXT, LINE, GAP, PITCH = 12, 780, 17, 12, 24  # in pixels


def seen() -> set[tuple[int, int]]:
    """(A floor, another one that a module on it imports from), by their numbers from the top."""
    pairs = {(floor(name), floor(other)) for name in MODULES for other in imports(name)}
    return {(one, other) for one, other in pairs if one != other and one >= 0}


def lines_of(number: int) -> list[str]:
    """The text of a box: what the floor is, then its modules."""
    rooms = FLOORS[number]
    inside = [name for name in MODULES if floor(name) == number]
    packages = [room for room in rooms if any(name.startswith(f"{room}.") for name in inside)]
    if number == len(FLOORS) - 1:
        title, about = "basement", "What all of them share"
    else:
        title = ", ".join(f"{room}/" if room in packages else room for room in rooms)
        about = (ast.get_docstring(MODULES[rooms[-1]]) or "").split("\n\n")[0].replace("\n", " ").partition(". ")[0]
        inside = [name for name in inside if name not in rooms]
    modules = ", ".join(sorted(name.partition(".")[2] or name for name in inside))
    return [title, about.rstrip(".:"), *textwrap.wrap(modules, width=118)]


def svg() -> str:
    texts = [lines_of(number) for number in range(len(FLOORS))]
    spans, y = [], MARGIN  # of each box: its top and its bottom
    for lines in texts:
        spans.append((y, y + 14 + LINE * (len(lines) - 1)))
        y = spans[-1][1] + GAP
    width = 2 * MARGIN + TEXT + PITCH * len(FLOORS)
    boxes = [box(lines, *span, width) for lines, span in zip(texts, spans, strict=True)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
            'font-family="sans-serif" font-size="12">',
            "<!-- docs/architecture.py writes this -->",
            f'<rect width="{width}" height="{y}" fill="white"/>',
            *boxes,
            *(arrows(number, spans) for number in range(len(FLOORS))),
            "</svg>\n",
        ]
    )


def box(lines: list[str], top: int, bottom: int, width: int) -> str:
    title, about, *modules = map(escape, lines)
    return "\n".join(
        [
            f'<rect x="{MARGIN}" y="{top}" width="{width - 2 * MARGIN}" height="{bottom - top}" rx="5" '
            'fill="#eef3f8" stroke="#7a8fa6"/>',
            f'<text x="{MARGIN + 10}" y="{top + 18}"><tspan font-weight="bold" font-size="14">{title}</tspan>'
            f'<tspan dx="12" fill="#345">{about}</tspan></text>',
            *(
                f'<text x="{MARGIN + 10}" y="{top + 18 + LINE * k}" fill="#667">{line}</text>'
                for k, line in enumerate(modules, 1)
            ),
        ]
    )


def arrows(number: int, spans: list[tuple[int, int]]) -> str:
    """From a floor down to each that it sees, in a column of its own; what goes up is red."""
    x, y = MARGIN + TEXT + PITCH * number + PITCH // 2, spans[number][0] + 14
    others = sorted(other for one, other in seen() if one == number)
    out = [f'<circle cx="{x}" cy="{y}" r="4" fill="#245"/>'] if others else []
    for group, edge, tip, colour in (
        ([other for other in others if other > number], 0, -8, "#245"),
        ([other for other in reversed(others) if other < number], 1, 8, "#c22"),
    ):
        if group:
            out.append(f'<path d="M{x} {y}V{spans[group[-1]][edge] + tip}" stroke="{colour}" fill="none"/>')
        out += [f'<path d="M{x - 5} {spans[other][edge] + tip}h10l-5 {-tip}z" fill="{colour}"/>' for other in group]
    return "\n".join(out)


if __name__ == "__main__":
    DRAWING.write_text(svg(), "utf-8")
