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
    """(A floor, another floor that a module on it imports from), by their numbers from the top."""
    pairs = {(floor(name), floor(imported)) for name in MODULES for imported in imports(name)}
    return {(upper, lower) for upper, lower in pairs if upper != lower and upper >= 0}


def lines_of(number: int) -> list[str]:
    """The text of a box: what the floor is, then its modules."""
    top = FLOORS[number]
    names = [name for name in MODULES if floor(name) == number]
    packages = [package for package in top if any(name.startswith(f"{package}.") for name in names)]
    if number == len(FLOORS) - 1:
        title, text = "basement", "What all of them share"
    else:
        title = ", ".join(f"{name}/" if name in packages else name for name in top)
        text = (ast.get_docstring(MODULES[top[-1]]) or "").split("\n\n")[0].replace("\n", " ").partition(". ")[0]
        names = [name for name in names if name not in top]
    modules = ", ".join(sorted(name.partition(".")[2] or name for name in names))
    return [title, text.rstrip(".:"), *textwrap.wrap(modules, width=118)]


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
    title, text, *modules = map(escape, lines)
    return "\n".join(
        [
            f'<rect x="{MARGIN}" y="{top}" width="{width - 2 * MARGIN}" height="{bottom - top}" rx="5" '
            'fill="#eef3f8" stroke="#7a8fa6"/>',
            f'<text x="{MARGIN + 10}" y="{top + 18}"><tspan font-weight="bold" font-size="14">{title}</tspan>'
            f'<tspan dx="12" fill="#345">{text}</tspan></text>',
            *(
                f'<text x="{MARGIN + 10}" y="{top + 18 + LINE * k}" fill="#667">{line}</text>'
                for k, line in enumerate(modules, 1)
            ),
        ]
    )


def arrows(number: int, spans: list[tuple[int, int]]) -> str:
    """From a floor down to each that it sees, in a column of its own; what goes up is red."""
    x, y = MARGIN + TEXT + PITCH * number + PITCH // 2, spans[number][0] + 14
    targets = sorted(target for source, target in seen() if source == number)
    out = [f'<circle cx="{x}" cy="{y}" r="4" fill="#245"/>'] if targets else []
    for group, edge, tip, colour in (
        ([target for target in targets if target > number], 0, -8, "#245"),
        ([target for target in reversed(targets) if target < number], 1, 8, "#c22"),
    ):
        if group:
            out.append(f'<path d="M{x} {y}V{spans[group[-1]][edge] + tip}" stroke="{colour}" fill="none"/>')
        out += [f'<path d="M{x - 5} {spans[target][edge] + tip}h10l-5 {-tip}z" fill="{colour}"/>' for target in group]
    return "\n".join(out)


if __name__ == "__main__":
    DRAWING.write_text(svg(), "utf-8")
