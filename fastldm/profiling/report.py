"""A profile in words and numbers: a table that fits a screen, and a trace for Perfetto."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from fastldm.planning.memory import size
from fastldm.profiling.results import OUTSIDE, Profile, Row, Spread, percent

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
    counts: dict[str, int] = {}
    for reason, calls in row.paths.items():
        name = reason.partition(":")[0]
        counts[name] = counts.get(name, 0) + calls
    if len(counts) < 2:
        return next(iter(counts), "")
    return ", ".join(f"{calls / per:g} {name}" for name, calls in counts.items())


def title(profile: Profile) -> str:
    info, machine = profile.about, profile.about["machine"]
    added = [f"{name}:{weight}" for name, weight in info["adapters"].items()]
    how = f", guidance {info['guidance']:g}"
    how += f", with {', '.join(added)} {info['adapted']}" if added else ""
    how += f", controlled by {', '.join(info['controls'])}" if info["controls"] else ""
    pictures = f"{info['pictures']} picture{'s' * (info['pictures'] > 1)} of {info['width']}x{info['height']}"
    return (
        f"{info['model']}: {pictures}, {info['steps']} steps of {info['sampler']}{how}; "
        f"{info['backend']} {info['dtype']} on {machine['name']}"
        + ("" if "sm" in machine else f", {info['threads']} thread{'s' * (info['threads'] > 1)}")
    )


def facts(profile: Profile) -> dict[str, str]:
    """What is no table."""
    counts, info = profile.operations, profile.about
    total = sum(counts.values())
    rest = ", ".join(f"{name} {scaled(flop, 'FLOP')}" for name, flop in counts.items() if name != "step")
    reasons = {reason for row in profile.rows for reason in row.paths if ": " in reason}
    entries = {
        "only the first time": ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in profile.first.items()),
        "this machine": f"{rate(profile.ceilings.flops, 'FLOP')} and {rate(profile.ceilings.bytes, 'B')} measured in "
        f"{info['dtype']}; floor: what these allow, for the least that an op must do",
        "operations": f"a step computes {scaled(counts['step'], 'FLOP')} of the whole U-Net's "
        f"{scaled(total, 'FLOP')} for {info['rows']} rows; {rest}",
        "paths": "; ".join(sorted(reasons)),
    }
    if profile.memory:
        entries["memory"] = f"{size(profile.memory['measured'])} at most, {size(profile.memory['planned'])} planned"
    return {name: text for name, text in entries.items() if text}


# -------------------------------------------------------------------------------------------------------- the terminal

ROWS = 10  # of ops in the terminal, the slowest; the others are one row
STAGE = 0.05  # of a picture: of stages that take less, no op is shown


def stage_cells(profile: Profile) -> Iterable[list[str]]:
    gpu = profile.stages[0].device is not None

    def cells(name: str, each: Spread, host: Spread, part: str, note: str) -> list[str]:
        spread = f"{percent(each.most - each.least, each.median)}" if each.median else ""
        times = [milliseconds(seconds) for seconds in (each.median, each.p90, each.p99)]
        return [name, *times, milliseconds(host.median) if gpu else spread, part, note]

    yield ["", "median", "p90", "p99", "host" if gpu else "spread", "share", ""]
    yield cells("a picture", profile.wall, profile.wall, "", f"{profile.wall.count} of them, from prompt to file")
    for stage in profile.stages:
        each = stage.device or stage.host
        yield cells(f"  {stage.name}", each, stage.host, percent(each.median, profile.wall.median), stage.note)
        if stage.name == "step" and len(profile.steps) > 1:
            note = f"of {len(profile.steps)} steps, {profile.step.count} in all"
            yield cells("    each", profile.step, profile.step, "", note)


def op_cells(profile: Profile, limit: int) -> Iterable[list[str]]:
    """The slowest ops, `limit` of them and what is outside of them in a step."""
    yield ["", "calls", "time", "share", "GFLOP", "MB", "GFLOP/s", "GB/s", "of floor", "path"]
    long = [row for row in profile.rows if _seconds(profile.of(row.stage)) > STAGE * profile.wall.median]
    selected = sorted(long, key=lambda row: -row.seconds)[:limit]
    selected += [row for row in profile.of("step") if row.name == OUTSIDE]
    stages = {row.stage for row in selected}
    for stage in (stage for stage in ("step", "decode", "text", "conditions") if stage in stages):
        per = len(profile.steps) if stage == "step" else 1
        yield ["each step" if per > 1 else stage, "", milliseconds(_seconds(profile.of(stage)) / per), *[""] * 7]
        yield from (_cells(row, per) for row in profile.of(stage) if row in selected)
    remaining = [row for row in profile.rows if row not in selected]
    if remaining:
        calls = sum(row.calls for row in remaining)
        yield ["others", str(calls), milliseconds(_seconds(remaining)), *[""] * 6, "a picture's"]


def _seconds(rows: Iterable[Row]) -> float:
    return sum(row.seconds for row in rows)


def _cells(row: Row, per: int) -> list[str]:
    calls = "" if row.name == OUTSIDE else f"{row.calls / per:g}"
    figures = [""] * 5
    if row.floor:
        figures = [f"{row.flop / per / 1e9:.2f}", f"{row.bytes / per / 1e6:.1f}", f"{row.flop / row.seconds / 1e9:.1f}"]
        figures += [f"{row.bytes / row.seconds / 1e9:.2f}", percent(row.floor, row.seconds)]
        if not row.flop:
            figures[0] = figures[2] = ""
    return [f"  {row.name}", calls, milliseconds(row.seconds / per), percent(row.share, 1), *figures, path(row, per)]


def table(profile: Profile) -> str:
    """For a terminal."""
    lines = [line for name, text in facts(profile).items() for line in _wrapped(f"{name}: {text}")]
    sections = [
        [title(profile)],
        _aligned(stage_cells(profile)),
        _aligned(op_cells(profile, ROWS)),
        lines,
        _wrapped(profile.advice),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


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


def trace(profile: Profile) -> dict[str, Any]:
    """Of the picture that took the median time: what Perfetto and chrome://tracing open."""
    tracks = {"host": 1, "device": 2}
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tracks[track], "args": {"name": track}}
        for track in dict.fromkeys(event.track for event in profile.events)
    ]
    ranges = [
        {
            "name": event.name,
            "cat": "op" if event.op else "stage",
            "ph": "X",
            "pid": 1,
            "tid": tracks[event.track],
            "ts": 1e6 * event.start,
            "dur": 1e6 * event.seconds,
            "args": {"stage": event.stage},
        }
        for event in profile.events
    ]
    return {"traceEvents": [*names, *ranges], "displayTimeUnit": "ms", "otherData": {"of": title(profile)}}
