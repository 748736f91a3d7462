"""Many pictures on one, each with its prompt below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps


def contact_sheet(pictures: Sequence[tuple[Path, Any]], columns: int, most: int) -> Image.Image:
    """pictures: files and prompts. most: pixels of a cell, which is no larger than the first picture, or 96."""
    font, label = ImageFont.load_default(12), 34
    with Image.open(pictures[0][0]) as first:
        cell = min(most, max(96, *first.size))
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * cell, -(-len(pictures) // columns) * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (path, prompt) in enumerate(pictures):
        x, y = k % columns * cell, k // columns * (cell + label)
        with Image.open(path) as image:
            small = ImageOps.contain(image.convert("RGB"), (cell - 4, cell - 4))
        sheet.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
        for row, text in enumerate(_two_lines(str(prompt), lambda text: draw.textlength(text, font) <= cell - 8)):
            draw.text((x + cell // 2, y + cell + 3 + 14 * row), text, fill="black", font=font, anchor="ma")
    return sheet


def _two_lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    words, lines = text.split(), [""]
    for place, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < 2:
            lines.append(word)
        else:
            lines[-1] += " …" if place < len(words) else ""
            break
    while not all(map(fits, lines)):
        lines = [line if fits(line) else f"{line[:-2]}…" for line in lines]
    return lines
