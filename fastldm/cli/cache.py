"""`fastldm cache`: lists, verifies and prunes the engine cache."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fastldm.cli.options import debug_option
from fastldm.cli.report import reported

if TYPE_CHECKING:
    from fastldm.export.cache import Entry


class Bytes(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if not match:
            self.fail(f"{value!r} is not a size: write such as 10GiB, 500M or 0", param, ctx)
        return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


@click.group()
def cache() -> None:
    """Engines that were built on this machine, for the next time.

    \b
    fastldm cache ls                    what is there
    fastldm cache verify                read all of it and compare hashes
    fastldm cache prune --keep 10GiB    remove what was used longest ago

    It lies in fastldm's cache folder, which `fastldm doctor` names and FASTLDM_CACHE sets.
    """


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of text.")
@debug_option
def ls(as_json: bool, debug: bool) -> None:
    """List the engines, last used first."""
    with reported(debug):
        from fastldm.export.cache import EngineCache

        engines = EngineCache()
        entries = engines.entries()
        if as_json:
            click.echo(json.dumps([_record(entry) for entry in entries], indent=1))
        elif not entries:
            click.echo(f"no engines in {engines.folder}")
        else:
            click.echo("\n".join(_line(entry) for entry in entries))
            click.echo(f"{_size(sum(entry.bytes for entry in entries))} of {_size(engines.limit)} in {engines.folder}")


@cache.command()
@debug_option
def verify(debug: bool) -> None:
    """Compare each engine with its hash; exit status 1 where one differs."""
    with reported(debug):
        from fastldm.export.cache import EngineCache

        failed = 0
        for entry, problem in EngineCache().verify():
            failed += bool(problem)
            click.echo(f"{'BAD' if problem else 'ok':<4}{_line(entry)}" + (f"\n    {problem}" if problem else ""))
        if failed:
            click.echo(
                f"{failed} will be built again when next asked for; `fastldm cache prune` does not wait", err=True
            )
            sys.exit(1)


@cache.command()
@click.option("--keep", type=Bytes(), help="How much may stay, such as 10GiB; 0 removes all.  [default: the limit]")
@debug_option
def prune(keep: int | None, debug: bool) -> None:
    """Remove what is set aside or unreadable, then what was used longest ago."""
    with reported(debug):
        from fastldm.export.cache import EngineCache

        removed = EngineCache().prune(keep)
        for entry in removed:
            click.echo(f"removed {_line(entry)}")
        click.echo(f"{_size(sum(entry.bytes for entry in removed))} freed")


def _line(entry: Entry) -> str:
    name = entry.folder.name.rpartition("-")[2][:12]
    age = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    if entry.key is None:
        return f"{name}  {_size(entry.bytes):>10}  unreadable"
    fields = (entry.key.network, entry.key.precision, entry.key.machine, entry.key.ranges, entry.key.flags)
    text = "  ".join(field for field in fields if field)
    return f"{name}  {_size(entry.bytes):>10}  {age}  {text}" + ("  (set aside)" if entry.aside else "")


def _record(entry: Entry) -> dict[str, Any]:
    return {
        "folder": str(entry.folder),
        "key": None if entry.key is None else asdict(entry.key),
        "bytes": entry.bytes,
        "used": entry.used,
        "set_aside": entry.aside,
    }


def _size(count: int) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), _UNITS[-1])
    return f"{count / unit:.1f} {name}"


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
