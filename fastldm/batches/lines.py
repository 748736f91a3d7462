"""The lines of a file of prompts, and what becomes of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.reading import read_file
from fastldm.request import Request, picture_seeds

MAX_BYTES = 2**30
"""Of a file of prompts."""
_PICTURES = ("image", "original_image", "mask_image", "control_image", "ip_adapter_image")


@dataclass(frozen=True)
class Line:
    """One of a file of prompts: a request, or why it is none."""

    number: int
    """From 1."""
    key: str
    """Its number, a hash of all that it asks for, and its seed: the name of its files."""
    request: Request | None = None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A line that is done, that failed, or that is set aside."""

    line: Line
    files: tuple[str, ...] = ()
    """Names in the folder."""
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None


def read_lines(
    path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None, *, reads_text: bool = True
) -> list[Line]:
    """The lines of a .jsonl file (an object with fields of `Request`, or a text), of a .csv file with a header of such
    fields, or of a .txt file, a prompt a line. Empty ones are none. Pictures are files beside it, or absolute.

    defaults: fields for lines that do not have them. reads_text: whether the model does: then a line without an image
    has a prompt. A line without a seed gets one from its number and its text, so
    that it is the same when it is read again. One that is wrong has an `error`, and costs nothing else.

    InputError for a file that cannot be read, or is of another kind.
    """
    path = Path(path).expanduser()
    content = read_file(path, max_bytes=MAX_BYTES, error=InputError)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    readers = {".jsonl": _of_jsonl, ".txt": _of_txt, ".csv": _of_csv}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path} is not a file of prompts: expected one of {', '.join(readers)}")
    found = readers[path.suffix.lower()](text)
    return [_line(number, fields, defaults or {}, path.parent, reads_text) for number, fields in found]


def _of_txt(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"no JSON: {error}")
                continue
            yield number, {"prompt": fields} if isinstance(fields, str) else fields


def _of_csv(text: str) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the rest cannot be told apart from it
            yield number, InputError(f"no CSV: {error}")
            return
        if names is None:
            names = [name.strip() for name in row]
        elif len(row) > len(names):
            yield number, InputError(f"{len(row)} columns, and the header has {len(names)}")
        elif any(row):
            yield number, {name: _value(name, cell) for name, cell in zip(names, row, strict=False) if cell != ""}


def _value(name: str, cell: str) -> Any:
    """A cell: a text where the field is one, else as JSON writes it."""
    if "prompt" in name or name in ("sampler", *_PICTURES):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _line(number: int, fields: Any, defaults: Mapping[str, Any], folder: Path, reads_text: bool) -> Line:
    try:
        if isinstance(fields, InputError):
            raise fields
        if not isinstance(fields, dict):
            raise InputError(f"it is {show(fields)}: expected an object with fields such as prompt")
        if unknown := sorted(fields.keys() - Request.__dataclass_fields__.keys()):
            raise InputError(f"there is no field {show(unknown[0])}: see fastldm.Request")
        if "output_type" in fields:
            raise InputError("output_type is for programs: pictures are files here")
        values = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
        if reads_text and not values.keys() & {"prompt", "image"}:
            raise InputError("prompt is missing")
        values.setdefault("prompt", "")
        for name in _PICTURES:
            if name in values:
                values[name] = _beside(folder, values[name])
        digest = hashlib.sha256(json.dumps([number, values], sort_keys=True).encode()).hexdigest()
        values.setdefault("seed", int(digest[:7], 16))
        request = Request(**values)
        seeds = picture_seeds(request)
        return Line(number, f"{number:06d}-{digest[:10]}-{seeds[0]}", request.replace(seed=seeds))
    except (InputError, TypeError) as error:
        return Line(number, f"{number:06d}", error=str(error))


def _beside(folder: Path, value: Any) -> Any:
    """Paths from the file's own folder."""
    if isinstance(value, dict):
        return {name: _beside(folder, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_beside(folder, one) for one in value]
    return str(folder / value) if isinstance(value, str) else value


def shard(lines: Sequence[Line], index: int, count: int) -> list[Line]:
    """Every count-th line, from number `index`, 1 to count: machines that share a file need nothing else in common."""
    if not 1 <= index <= count:
        raise InputError(f"shard {index}/{count}: expected 1/{count} to {count}/{count}")
    return [line for line in lines if (line.number - 1) % count == index - 1]
