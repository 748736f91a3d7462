"""What comes from outside: files that are none, JSON that is none, and values of every wrong kind."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import BundleError, CheckpointError, FastLDMError, InputError
from fastldm.reading import (
    MAX_JSON,
    Either,
    Field,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Object,
    OneOf,
    Text,
    check_file,
    check_path,
    read_fields,
    read_file,
    read_json,
)

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and sockets have names on POSIX systems")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 600
    return text


# --- Files ---


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # such names have at most 108 bytes


def _loop(path: Path) -> None:
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "Is a directory"),
    "pipe": (_pipe, "it is a pipe, not a file"),
    "socket": (_socket, "cannot be read"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "dangling link": (lambda path: path.symlink_to("gone"), "No such file"),
    "loop of links": (_loop, "symbolic links"),
    "in a file": (lambda path: path.parent.with_name("file").write_text(""), "No such file"),
}


@needs_posix
@pytest.mark.parametrize("kind", NO_FILES)
def test_non_files_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = NO_FILES[kind]
    path = tmp_path / "config.json"
    make(path)
    for read in (read_json, read_file, check_file):
        with pytest.raises(CheckpointError, match=message) as refused:
            read(path)  # type: ignore[operator]
        assert one_line(refused.value).startswith(f"{path} cannot be read: ")
    with pytest.raises(BundleError):
        read_json(path, error=BundleError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not JSON: empty \(0 bytes\)"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": "\u00e9"}'.encode("latin-1"), "is not JSON: .utf-8. codec can't decode"),
        ("{}".encode("utf-16"), "is not JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": ' * 200_000 + b"1" + b"}" * 200_000, "nested too deep"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"x": {"a\\nb": 1, "a\\nb": 3}}', r"the key 'a\\nb' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b"[1]", "holds a list; an object was expected"),
        (b"null", "holds a NoneType; an object was expected"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b'{"a\x00": 1}', "Invalid control character"),
    ],
)
def test_invalid_json_is_refused_with_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_json(path)
    assert one_line(refused.value).startswith(f"{path} ")


def test_large_json_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON + 1)  # a sparse file
    with pytest.raises(CheckpointError, match=r"has 67,108,865 bytes, expected at most 67,108,864"):
        read_json(path)
    assert read_file(path, first=4) == bytes(4)


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(st.text(), st.integers(-(10**300), 10**300) | st.floats() | st.text() | st.none()))
def test_json_is_read_as_python_writes_it(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert repr(read_json(path)) == repr(value)  # NaN is not equal to itself


# --- Names ---


@pytest.mark.skipif(sys.platform == "win32", reason="other names are none there")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "model is None, expected a path as str or pathlib.Path"),
        (b"folder", "model is b'folder', expected a path"),
        (3, "model is 3, expected a path"),
        (["a"], r"model is \['a'\], expected a path"),
        ("", "model is empty, expected a path"),
        ("a\0b", r"model is 'a\\x00b', which is no path"),
        ("a" * 5000, "a name of 5,000 characters: too long"),
        ("a/" * 5000, "a name of 10,000 characters: too long"),
        ("~nobody-of-this-name/model", "which is no path"),
        ("\ud800", r"'\\ud800', which is no path"),
    ],
)
def test_values_that_are_no_path_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        check_path(value, "model")
    one_line(refused.value)


def test_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_path("~/model", "model") == tmp_path / "model"
    assert check_path(tmp_path, "model") == tmp_path
    assert check_path("owner/name", "model") == Path("owner/name")


# --- Values ---

FIELDS = {
    "width": Field(Integer(1, 64)),
    "eps": Field(Number(0, 1), 1e-5),
    "low": Field(Number(-math.inf, 0), -math.inf),
    "flip": Field(Flag(), True),
    "act": Field(OneOf("silu", None, 3, False), "silu"),
    "name": Field(Maybe(Text(5)), None),
    "sizes": Field(ListOf(Integer(1, 64), 2, 2), (8, 8)),
    "levels": Field(ListOf(Number(), 3, 3, scalar=True, each="level"), (1.0,) * 3),
    "depths": Field(Either(Integer(1, 4), ListOf(Integer(1, 4), 1, 2)), 1),
    "files": Field(MapOf(Object({"bytes": Field(Integer(0))})), {}),
}


def test_values_are_read_by_table() -> None:
    defaults = read_fields({"width": 3, "unknown": math.nan}, FIELDS, "config.json")
    assert defaults == {key: field.default for key, field in FIELDS.items()} | {"width": 3}
    config = {
        "width": np.int64(4),
        "eps": np.float32(0.5),
        "low": -1,
        "flip": None,
        "act": 3.0,
        "name": "cat",
        "sizes": [8, 12],
        "levels": np.array([1.0, 2.0, 3.0]),
        "depths": (1, 2),
        "files": {"a.json": {"bytes": 7, "more": 1}},
    }
    values = read_fields(config, FIELDS, "config.json")
    assert values == {
        "width": 4,
        "eps": 0.5,
        "low": -1.0,
        "flip": False,
        "act": 3,
        "name": "cat",
        "sizes": (8, 12),
        "levels": (1.0, 2.0, 3.0),
        "depths": (1, 2),
        "files": {"a.json": {"bytes": 7}},
    }
    assert type(values["width"]) is int
    assert type(values["eps"]) is float
    assert read_fields({"width": 1, "levels": 2}, FIELDS, "")["levels"] == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "'width' is None, expected a whole number from 1 to 64"),
        ({"width": True}, "'width' is True, expected"),
        ({"width": 8.0}, r"'width' is 8\.0, expected"),
        ({"width": "8"}, "'width' is '8', expected"),
        ({"width": 10**5000}, "'width' is a whole number of 16610 bits, expected"),
        ({"eps": math.nan}, "'eps' is nan, expected a number from 0 to 1"),
        ({"eps": math.inf}, "'eps' is inf, expected"),
        ({"eps": "1e-5"}, "'eps' is '1e-5', expected"),
        ({"low": math.nan}, "'low' is nan, expected a number from -inf to 0"),
        ({"flip": 1}, "'flip' is 1, expected true or false"),
        ({"act": "gelu"}, "'act' is 'gelu'; fastldm implements 'silu' or None or 3 or False"),
        ({"act": 0}, "'act' is 0; fastldm"),
        ({"act": ["silu"]}, r"'act' is \['silu'\]; fastldm"),
        ({"act": np.zeros(3)}, "'act' is an array"),
        ({"name": "a longer one"}, "'name' is 'a longer one', expected a text of one line of at most 5 characters"),
        ({"sizes": 8}, "'sizes' is 8, expected a list of 2"),
        ({"sizes": [8]}, "'sizes' has 1 entries, expected 2"),
        ({"sizes": [8, 0]}, r"'sizes\[1\]' is 0, expected a whole number"),
        ({"levels": [1, 2]}, r"'levels' has 2 entries, expected 3 \(one per level\)"),
        ({"levels": {}}, r"'levels' is \{\}, expected a number"),
        ({"depths": [5]}, r"'depths' is \[5\], expected a whole number from 1 to 4, or a list of 1 to 2"),
        ({"files": []}, r"'files' is \[\], expected an object"),
        ({"files": {"a.json": 3}}, r"'files\.a\.json' is 3, expected an object"),
        ({"files": {"a.json": {}}}, r"'files\.a\.json\.bytes' is missing, expected a whole number"),
        ({"files": {"a\n": {}}}, r"'files\.a\\n\.bytes' is missing"),
    ],
)
def test_wrong_values_are_named_by_file_and_key(change: dict[str, Any], message: str) -> None:
    for error in (CheckpointError, BundleError):
        with pytest.raises(error, match=message) as refused:
            read_fields({"width": 3, **change}, FIELDS, "unet/config.json", error=error)
        assert one_line(refused.value).startswith("unet/config.json: ")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(10**400),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@settings(max_examples=100, deadline=None)
@given(config=st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING))
def test_any_value_is_read_or_refused_in_one_line(config: dict[str, Any]) -> None:
    try:
        values = read_fields(config, FIELDS, "config.json")
    except FastLDMError as refused:
        one_line(refused)
    else:
        assert values.keys() == FIELDS.keys()
