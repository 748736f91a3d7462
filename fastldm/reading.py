"""Reading files: checked paths, JSON files, and tables of the values in them.

    check_path(value)                     an argument           -> Path
    read_file(path), read_json(path)      a file                -> bytes, an object
    read_fields(config, FIELDS, source)   an object and a table -> its values, each as the table says

A table has the keys that are read, the kind of each, and the default of a missing one. Other keys are ignored:

    FIELDS = {
        "hidden_size": Field(Integer(1, MAX_CHANNELS)),                          # required
        "norm_eps": Field(Number(0, 1), 1e-5),
        "block_out_channels": Field(ListOf(Integer(1, MAX_CHANNELS), 1, 12)),
        "act_fn": Field(OneOf("silu", "swish"), "silu"),
        "files": Field(MapOf(Object({"bytes": Field(Integer(0)), "sha256": Field(Text(64))}))),
    }
    values = read_fields(config, FIELDS, "unet/config.json")

Any problem with a file or a value is an error of one line that has the file, the key ("files.a.json.bytes"), the
value and what was expected: CheckpointError, or the type in `error`. So a bundle's manifest is
`read_fields(read_json(path, error=BundleError), FIELDS, str(path), error=BundleError)`. All kinds are bounded, and so
is everything that is built from the values. A new kind is a class with `expected` and `read`.
"""

from __future__ import annotations

import codecs
import errno
import json
import numbers
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastldm.checks import show
from fastldm.errors import CheckpointError, FastLDMError, InputError

MAX_CHANNELS = 2**16
"""Limit for channels of a layer, and for heads, positions and the like: far above those of all known models."""
MAX_JSON = 2**26
"""Limit for bytes of a JSON file. The largest in models, CLIP's tokenizer.json, has 4 MB."""
_MAX_DIGITS = 400  # of a whole number in JSON: a float64 has 309


# --- Names of files ---


def check_path(value: Any, name: str) -> Path:
    """An argument as a path, with ~ expanded. InputError, naming the argument, for values that are no path."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InputError(f"{name} is {show(value)}, expected a path as str or pathlib.Path")
    if not text:
        raise InputError(f"{name} is empty, expected a path")
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (ValueError, RuntimeError) as error:  # NUL, lone surrogates; ~ of an unknown user
        raise InputError(f"{name} is {show(text)}, which is no path ({error})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{name} is {show(text)}, a name of {len(text):,} characters: too long") from error
    return path


# --- Files ---


def check_file(path: Path, error: type[FastLDMError] = CheckpointError) -> os.stat_result:
    """The status of a regular file, following links. `error` for anything else: opening a pipe would wait."""
    try:
        status = path.stat()
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', None) or reason}.") from reason
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} cannot be read: {_describe_mode(status.st_mode)}.")
    return status


def read_file(
    path: Path, *, first: int | None = None, max_bytes: int = MAX_JSON, error: type[FastLDMError] = CheckpointError
) -> bytes:
    """All bytes of a regular file, or the first `first` ones. `error` for no file, or more than `max_bytes`."""
    try:
        # Does not wait for the writer of a pipe, and checks the open file, not the path.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:  # noqa: PTH123
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                if first is None and status.st_size > max_bytes:
                    raise error(f"{path} has {status.st_size:,} bytes, expected at most {max_bytes:,}.")
                return file.read(max_bytes if first is None else first)
    except (OSError, ValueError) as reason:
        if isinstance(reason, FastLDMError):
            raise
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', None) or reason}.") from reason
    raise error(f"{path} cannot be read: {_describe_mode(status.st_mode)}.")


def _describe_mode(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "Is a directory"
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return f"it is {kinds.get(stat.S_IFMT(mode), 'something else')}, not a file"


def what_bytes_are(head: bytes) -> str | None:
    """The kind of a wrong file, if it can be recognised from its first bytes."""
    if not head:
        return "empty (0 bytes): fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page, as when a login or error page is saved in a file's place: fetch it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file, whose quantised weights fastldm does not run"
    return None


def read_json(path: Path, error: type[FastLDMError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8 (RFC 8259). NaN and infinities are read, since diffusers writes some; tables
    define where they are allowed. A duplicate key is an error.
    """
    data = read_file(path, error=error)
    try:
        if data.startswith(codecs.BOM_UTF8):
            raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole)
    except ValueError as reason:
        raise error(f"{path} is not JSON: {what_bytes_are(data[:512]) or reason}.") from reason
    except RecursionError as reason:
        raise error(f"{path} is not JSON that can be read: its lists or objects are nested too deep.") from reason
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}; an object was expected.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(duplicate)} is there twice")
    return content


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


# --- Values ---


class _Unfit(Exception):
    """A value that is not of its kind: its key, and the problem."""

    def __init__(self, at: str, problem: str) -> None:
        super().__init__(at, problem)
        self.at, self.problem = at, problem


class Kind(Protocol):
    """The allowed values of a key."""

    @property
    def expected(self) -> str:
        """A description for errors."""

    def read(self, value: Any, at: str) -> Any:
        """Check and convert a value. Raises `unfit(value, at, self)` for one that is not of this kind."""


@dataclass(frozen=True)
class Field:
    """A key of a table: its kind and its default."""

    kind: Kind
    default: Any = ...
    """`...` for a required key. Defaults are not checked."""


def read_fields(
    config: Mapping[str, Any],
    fields: Mapping[str, Field],
    source: str,
    *,
    error: type[FastLDMError] = CheckpointError,
) -> dict[str, Any]:
    """The values of all keys of the table `fields`. source: the file, for errors."""
    try:
        return _read(config, fields, "")
    except _Unfit as unfit:
        raise error(f"{source}: {unfit.at!r} {unfit.problem}") from None


def _read(config: Mapping[str, Any], fields: Mapping[str, Field], at: str) -> dict[str, Any]:
    values = {}
    for key, field in fields.items():
        full_key = f"{at}.{key}" if at else key
        if key in config:
            values[key] = field.kind.read(config[key], full_key)
        elif field.default is ...:
            raise _Unfit(full_key, f"is missing, expected {field.kind.expected}")
        else:
            values[key] = field.default
    return values


def unfit(value: Any, at: str, kind: Kind) -> _Unfit:
    """The error for a value that is not of a kind."""
    return _Unfit(at, f"is {show(value)}, expected {kind.expected}")


@dataclass(frozen=True)
class Integer:
    """A whole number."""

    min: int = 1
    max: int = 2**31 - 1

    @property
    def expected(self) -> str:
        return f"a whole number from {self.min:,} to {self.max:,}"

    def read(self, value: Any, at: str) -> int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (whole and self.min <= value <= self.max):
            raise unfit(value, at, self)
        return int(value)


@dataclass(frozen=True)
class Number:
    """A number, finite unless a bound is infinite."""

    min: float = -1e30
    max: float = 1e30

    @property
    def expected(self) -> str:
        return f"a number from {self.min:g} to {self.max:g}"

    def read(self, value: Any, at: str) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and self.min <= value <= self.max):  # False for NaN
            raise unfit(value, at, self)
        return float(value)


@dataclass(frozen=True)
class Flag:
    """True or False; null is False, as in diffusers, which tests the truth of values."""

    expected: str = "true or false"

    def read(self, value: Any, at: str) -> bool:
        if value is not None and not isinstance(value, bool):
            raise unfit(value, at, self)
        return bool(value)


@dataclass(frozen=True)
class Text:
    """A text in one line."""

    max: int = 1000

    @property
    def expected(self) -> str:
        return f"a text of one line of at most {self.max} characters"

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str) or len(value) > self.max or not value.isprintable():
            raise unfit(value, at, self)
        return value


@dataclass(frozen=True, init=False)
class OneOf:
    """One of the values that are implemented: texts, numbers, truth values or None."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    @property
    def expected(self) -> str:
        return " or ".join(repr(value) for value in self.values)

    def read(self, value: Any, at: str) -> Any:
        if value is None or isinstance(value, str | bool | numbers.Real):
            for allowed in self.values:
                if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                    return allowed
        raise _Unfit(at, f"is {show(value)}; fastldm implements {self.expected}")


@dataclass(frozen=True)
class Maybe:
    """None, or a value of a kind."""

    kind: Kind

    @property
    def expected(self) -> str:
        return f"{self.kind.expected}, or null"

    def read(self, value: Any, at: str) -> Any:
        return None if value is None else self.kind.read(value, at)


@dataclass(frozen=True)
class ListOf:
    """A list of `min` to `max` values of a kind, as a tuple.

    scalar: also allow a single value, which is repeated `max` times. each: what has one entry, for errors.
    """

    kind: Kind
    min: int = 0
    max: int = 10**6
    scalar: bool = False
    each: str = ""

    @property
    def expected(self) -> str:
        count = f"{self.max:,}" if self.min == self.max else f"{self.min:,} to {self.max:,}"
        return f"{f'{self.kind.expected}, or ' if self.scalar else ''}a list of {count}"

    def read(self, value: Any, at: str) -> tuple[Any, ...]:
        if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1 and len(value) <= self.max:
            value = value.tolist()  # a numpy array, from a config in memory
        if not isinstance(value, list | tuple):
            if self.scalar:
                return (self.kind.read(value, at),) * self.max
            raise unfit(value, at, self)
        if not self.min <= len(value) <= self.max:
            count = f"{self.max:,}" if self.min == self.max else f"{self.min:,} to {self.max:,}"
            raise _Unfit(
                at, f"has {len(value):,} entries, expected {count}{f' (one per {self.each})' * bool(self.each)}"
            )
        return tuple(self.kind.read(entry, f"{at}[{i}]") for i, entry in enumerate(value))


@dataclass(frozen=True)
class MapOf:
    """An object of any keys, whose values are of a kind."""

    kind: Kind
    min: int = 0
    max: int = 10**6

    @property
    def expected(self) -> str:
        return f"an object of {self.min:,} to {self.max:,} entries"

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not self.min <= len(value) <= self.max:
            raise unfit(value, at, self)
        return {str(key): self.kind.read(entry, f"{at}.{key}") for key, entry in value.items()}


@dataclass(frozen=True)
class Object:
    """An object with a table of its own."""

    fields: Mapping[str, Field]
    expected: str = "an object"

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise unfit(value, at, self)
        return _read(value, self.fields, at)


@dataclass(frozen=True, init=False)
class Either:
    """A value of one of several kinds; the first match counts."""

    kinds: tuple[Kind, ...]

    def __init__(self, *kinds: Kind) -> None:
        object.__setattr__(self, "kinds", kinds)

    @property
    def expected(self) -> str:
        return ", or ".join(kind.expected for kind in self.kinds)

    def read(self, value: Any, at: str) -> Any:
        for kind in self.kinds:
            try:
                return kind.read(value, at)
            except _Unfit:
                continue
        raise unfit(value, at, self)
