"""A profile in words and numbers: a table that fits a screen, and a trace for Perfetto."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from fastldm.memory import size
from fastldm.profile import OUTSIDE, Profile, Row, Spread, share

# ---------------------------------------------------------------------------------------------------------- in words


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def rate(number: float, unit: str) -> str:
    """Such as "1.2 TFLOP/s"."""
    step = next((k for k in (12, 9, 6) if number >= 10**k), 6)
    return f"{number / 10**step:.3g} {' kMGT'[step // 3]}{unit}/s"


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
    others = ", ".join(f"{name} {gigaflop(flop)}" for name, flop in counts.items() if name != "step")
    reasons = {said for row in made.rows for said in row.paths if ": " in said}
    told = {
        "only the first time": ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in made.first.items()),
        "this machine": f"{rate(made.ceilings.flops, 'FLOP')} and {rate(made.ceilings.bytes, 'B')} measured in "
        f"{about['dtype']}; floor: what these allow, for the least that an op must do",
        "operations": f"a step computes {gigaflop(counts['step'])} of the whole U-Net's {gigaflop(whole)} for "
        f"{about['rows']} rows; {others}",
        "paths": "; ".join(sorted(reasons)),
    }
    if made.memory:
        told["memory"] = f"{size(made.memory['measured'])} at most, {size(made.memory['planned'])} planned"
    return {name: text for name, text in told.items() if text}


def gigaflop(flop: int) -> str:
    return f"{flop / 1e9:,.3g} GFLOP" if flop < 1e12 else f"{flop / 1e9:,.0f} GFLOP"


# -------------------------------------------------------------------------------------------------------- the terminal

STAGE, ROW = 0.05, 0.01  # of a picture: stages and rows of less are one row together


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


def op_cells(made: Profile) -> Iterable[list[str]]:
    yield ["", "calls", "time", "share", "GFLOP", "MB", "GFLOP/s", "GB/s", "of floor", "path"]
    small = []
    for stage in ("step", "decode", "text", "conditions"):
        rows = made.of(stage)
        if sum(row.seconds for row in rows) < STAGE * made.wall.median:
            small += rows
            continue
        per = len(made.steps) if stage == "step" else 1
        each = "each step" if per > 1 else stage
        yield [each, "", milliseconds(sum(row.seconds for row in rows) / per), *[""] * 7]
        for row in rows:
            kept = row.name == OUTSIDE or row.seconds >= ROW * made.wall.median
            if kept:
                yield _cells(row, per)
            else:
                small.append(row)
    if small:
        whole = sum(row.seconds for row in small)
        yield ["others", str(sum(row.calls for row in small)), milliseconds(whole), *[""] * 6, "a picture's, all small"]


def _cells(row: Row, per: int = 1) -> list[str]:
    work = (
        [f"{row.flop / per / 1e9:.2f}" if row.flop else "", f"{row.bytes / per / 1e6:.1f}"] if row.floor else ["", ""]
    )
    rates = [f"{row.flop / row.seconds / 1e9:.4g}" if row.flop else "", f"{row.bytes / row.seconds / 1e9:.3g}"]
    achieved = [*rates, share(row.floor, row.seconds)] if row.floor else ["", "", ""]
    calls = "" if row.name == OUTSIDE else f"{row.calls / per:g}"
    return [
        f"  {row.name}",
        calls,
        milliseconds(row.seconds / per),
        share(row.share, 1),
        *work,
        *achieved,
        path(row, per),
    ]


def table(made: Profile) -> str:
    """For a terminal."""
    told = [line for name, text in facts(made).items() for line in _wrapped(f"{name}: {text}")]
    parts = [[title(made)], _aligned(stage_cells(made)), _aligned(op_cells(made)), told, _wrapped(made.advice)]
    return "\n\n".join("\n".join(part) for part in parts)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent="  ")


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
