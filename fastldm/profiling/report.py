"""A profile in words and numbers: a table that fits a screen, and a trace for Perfetto."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from fastldm.planning.memory import size
from fastldm.profiling.profile import OUTSIDE, Profile, Row, Spread, share

# ---------------------------------------------------------------------------------------------------------- in words


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def scaled(number: float, unit: str) -> str:
    """Such as "1.2 TFLOP"."""
    step = next((k for k in (12, 9, 6) if number >= 10**k), 6)
    return f"{number / 10**step:.3g} {'MGT'[step // 3 - 2]}{unit}"


def rate(number: float, unit: str) -> str:
    return f"{scaled(number, unit)}/s"


def path(row: Row, per: int = 1) -> str:
    """Which way the calls of a row took, in a word each. per: steps that they are of."""
    ways: dict[str, int] = {}
    for said, calls in row.paths.items():
        way = said.partition(":")[0]
        ways[way] = ways.get(way, 0) + calls
    return next(iter(ways), "") if len(ways) < 2 else ", ".join(f"{calls / per:g} {way}" for way, calls in ways.items())


def title(made: Profile) -> str:
    about, where = made.about, made.about["machine"]
    pictures = f"{about['pictures']} picture{'s' * (about['pictures'] > 1)} of {about['width']}x{about['height']}"
    return (
        f"{about['model']}: {pictures}, {about['steps']} steps of {about['sampler']}, guidance {about['guidance']:g}; "
        f"{about['backend']} {about['dtype']} on {where['name']}"
        + ("" if "sm" in where else f", {about['threads']} thread{'s' * (about['threads'] > 1)}")
    )


def facts(made: Profile) -> dict[str, str]:
    """What is no table."""
    counts, about = made.operations, made.about
    whole = sum(counts.values())
    others = ", ".join(f"{name} {scaled(flop, 'FLOP')}" for name, flop in counts.items() if name != "step")
    reasons = {said for row in made.rows for said in row.paths if ": " in said}
    told = {
        "only the first time": ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in made.first.items()),
        "this machine": f"{rate(made.ceilings.flops, 'FLOP')} and {rate(made.ceilings.bytes, 'B')} measured in "
        f"{about['dtype']}; floor: what these allow, for the least that an op must do",
        "operations": f"a step computes {scaled(counts['step'], 'FLOP')} of the whole U-Net's "
        f"{scaled(whole, 'FLOP')} for {about['rows']} rows; {others}",
        "paths": "; ".join(sorted(reasons)),
    }
    if made.memory:
        told["memory"] = f"{size(made.memory['measured'])} at most, {size(made.memory['planned'])} planned"
    return {name: text for name, text in told.items() if text}


# -------------------------------------------------------------------------------------------------------- the terminal

ROWS = 10  # of ops in the terminal, the slowest; the others are one row
STAGE = 0.05  # of a picture: of stages that take less, no op is shown


def stage_cells(made: Profile) -> Iterable[list[str]]:
    gpu = made.stages[0].device is not None

    def cells(name: str, each: Spread, host: Spread, part: str, note: str) -> list[str]:
        spread = f"{share(each.most - each.least, each.median)}" if each.median else ""
        times = [milliseconds(seconds) for seconds in (each.median, each.p90, each.p99)]
        return [name, *times, milliseconds(host.median) if gpu else spread, part, note]

    yield ["", "median", "p90", "p99", "host" if gpu else "spread", "share", ""]
    yield cells("a picture", made.wall, made.wall, "", f"{made.wall.count} of them, from prompt to file")
    for stage in made.stages:
        each = stage.device or stage.host
        yield cells(f"  {stage.name}", each, stage.host, share(each.median, made.wall.median), stage.note)
        if stage.name == "step" and len(made.steps) > 1:
            yield cells("    each", made.step, made.step, "", f"of {len(made.steps)} steps, {made.step.count} in all")


def op_cells(made: Profile, most: int) -> Iterable[list[str]]:
    """The slowest ops, `most` of them and what is outside of them in a step."""
    yield ["", "calls", "time", "share", "GFLOP", "MB", "GFLOP/s", "GB/s", "of floor", "path"]
    long = [row for row in made.rows if _seconds(made.of(row.stage)) > STAGE * made.wall.median]
    shown = sorted(long, key=lambda row: -row.seconds)[:most]
    shown += [row for row in made.of("step") if row.name == OUTSIDE]
    stages = {row.stage for row in shown}
    for stage in (stage for stage in ("step", "decode", "text", "conditions") if stage in stages):
        per = len(made.steps) if stage == "step" else 1
        yield ["each step" if per > 1 else stage, "", milliseconds(_seconds(made.of(stage)) / per), *[""] * 7]
        yield from (_cells(row, per) for row in made.of(stage) if row in shown)
    small = [row for row in made.rows if row not in shown]
    if small:
        yield ["others", str(sum(row.calls for row in small)), milliseconds(_seconds(small)), *[""] * 6, "a picture's"]


def _seconds(rows: Iterable[Row]) -> float:
    return sum(row.seconds for row in rows)


def _cells(row: Row, per: int) -> list[str]:
    calls = "" if row.name == OUTSIDE else f"{row.calls / per:g}"
    work = [""] * 5
    if row.floor:
        work = [f"{row.flop / per / 1e9:.2f}", f"{row.bytes / per / 1e6:.1f}", f"{row.flop / row.seconds / 1e9:.1f}"]
        work += [f"{row.bytes / row.seconds / 1e9:.2f}", share(row.floor, row.seconds)]
        if not row.flop:
            work[0] = work[2] = ""
    return [f"  {row.name}", calls, milliseconds(row.seconds / per), share(row.share, 1), *work, path(row, per)]


def table(made: Profile) -> str:
    """For a terminal."""
    told = [line for name, text in facts(made).items() for line in _wrapped(f"{name}: {text}")]
    parts = [[title(made)], _aligned(stage_cells(made)), _aligned(op_cells(made, ROWS)), told, _wrapped(made.advice)]
    return "\n\n".join("\n".join(part) for part in parts)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent="  ")


def _aligned(cells: Iterable[Sequence[str]]) -> list[str]:
    """Columns: the first and the last to the left, numbers to the right."""
    rows = list(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < k < len(row) - 1 else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------ a trace


def trace(made: Profile) -> dict[str, Any]:
    """Of the picture that took the median time: what Perfetto and chrome://tracing open."""
    tracks = {"host": 1, "device": 2}
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tracks[track], "args": {"name": track}}
        for track in dict.fromkeys(event.track for event in made.events)
    ]
    ranges = [
        {
            "name": event.name,
            "cat": "op" if event.op else "stage",
            "ph": "X",
            "pid": 1,
            "tid": tracks[event.track],
            "ts": 1e6 * event.began,
            "dur": 1e6 * event.seconds,
            "args": {"stage": event.stage},
        }
        for event in made.events
    ]
    return {"traceEvents": [*names, *ranges], "displayTimeUnit": "ms", "otherData": {"of": title(made)}}
