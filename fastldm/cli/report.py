"""How a command ends: one line that gives the reason, an exit status, and streams that may be closed, full or gone.

Exit status: 0 done, 1 failed, 2 used wrongly, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

import click

from fastldm.errors import Cancelled, FastLDMError, InputError, out_of_memory_named

_MAX_LINE = 2000


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn the exception that ends a command into one line on stderr and an exit status."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is an error here, not when the interpreter ends
    except Exception as error:
        if debug:
            with suppress(OSError):
                traceback.print_exc()
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        sys.exit(_fail(Cancelled()))


def run(command: click.Command) -> None:
    """The command as a process: handles errors outside of its body, where `reported` does not reach."""
    _open_streams()
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # PIL's, before our own error
    status: Any = 0
    try:
        command.main(prog_name="fastldm")
    except SystemExit as end:
        status = end.code
    except Exception as error:  # click's own output, such as --help, into a full disk
        status = _fail(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or _fail(error)
    with suppress(OSError):
        sys.stderr.flush()
    _discard_unwritten_output()
    sys.exit(status)


def _fail(error: Exception) -> int:
    """Print the reason on stderr, and return the exit status."""
    error = out_of_memory_named(error)
    text = " ".join(str(error).split())
    if isinstance(error, Cancelled):
        _print_error("\nstopped")
        return 130
    if isinstance(error, FastLDMError):
        _print_error(f"fastldm: {text}")
        return 2 if isinstance(error, InputError) else 1
    if isinstance(error, BrokenPipeError):  # the reader of our output has closed it, as `head` does
        return 1
    if isinstance(error, OSError):  # of the machine: a full disk, a lost network
        of = "the output" if error.filename is None else repr(error.filename)
        _print_error(
            f"fastldm: {of}: {error.strerror}" if error.strerror else f"fastldm: {text or type(error).__name__}"
        )
        return 1
    _print_error(f"fastldm: {type(error).__name__}: {text or 'no message'} (--debug shows where; this may be a bug)")
    return 1


def _print_error(line: str) -> None:
    with suppress(OSError):
        click.echo(line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 3]}...", err=True)


def _open_streams() -> None:
    """Open closed streams on the null device: a file that is opened later would get the number of a closed stream, and
    what is printed to it. Names that are not UTF-8 are printed escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, TextIOWrapper):
            output.reconfigure(errors="backslashreplace")


def _discard_unwritten_output() -> None:
    """The interpreter would try to write what is left in a buffer when it ends, and print an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


class Commands(click.Group):
    """A group whose messages are cut where an argument is long: a number of 5,000 digits fills a screen."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _short_messages():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _short_messages():
            return super().invoke(ctx)


@contextmanager
def _short_messages() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        if len(error.message) > 300:
            error.message = f"{error.message[:120]}...{error.message[-120:]}"  # type: ignore[misc]
        raise
