"""Reading weight files: safetensors, mapped into memory, and pickles, of which only tensors are loaded."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.reading import check_file, read_file, what_bytes_are

Shapes = Mapping[str, tuple[int, ...]]

_PROJECTION = re.compile(r"\b(to_[qkv]|[qkv]_proj)\.")
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")  # added by torch.compile and data parallel


def read_shapes(path: Path, allow_pickle: bool) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and the metadata of a safetensors file.

    Keys come without the prefixes of wrappers that a network was saved in (`_orig_mod.`, `module.`).
    """
    if is_pickle(path):
        return {key: tuple(tensor.shape) for key, tensor in _read_pickle(path, allow_pickle).items()}, {}
    with _safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(raw).get_shape()) for key, raw in _keys(file, path).items()}
        return shapes, file.metadata() or {}


def read_tensors(
    path: Path, keys: Collection[str] | None, allow_pickle: bool, to_prepare: bool = False
) -> dict[str, Tensor]:
    """The tensors `keys`, or all, as views of the mapped file, by keys as in `read_shapes`.

    to_prepare: copy convolution weights, in channels-last memory, and query, key and value projections, so that their
        pages of the file are not held.
    """
    if is_pickle(path):
        tensors, raws = _read_pickle(path, allow_pickle), None
    else:
        with _safetensors(path) as file:
            raws = _keys(file, path)
            tensors = {key: file.get_tensor(raw) for key, raw in raws.items() if keys is None or key in keys}
    if keys is not None:
        tensors = {key: tensors[key] for key in keys}
    for key, tensor in tensors.items():
        convolution = tensor.ndim == 4 and tensor.shape[2:].numel() > 1
        if to_prepare and (convolution or _PROJECTION.search(key)):
            layout = torch.channels_last if convolution else torch.contiguous_format
            if raws is None:
                tensors[key] = tensor.clone(memory_format=layout)
                continue
            # From a separate mapping, whose pages leave memory as soon as it is closed.
            with _safetensors(path) as file:
                tensors[key] = file.get_tensor(raws[key]).clone(memory_format=layout)
    return tensors


def _keys(file: Any, path: Path) -> dict[str, str]:
    """The keys of a safetensors file: without prefixes of wrappers -> as in the file."""
    raws: dict[str, str] = {}
    for raw in file.keys():  # noqa: SIM118
        if raws.setdefault(_WRAPPER.sub("", raw), raw) != raw:
            raise CheckpointError(f"{path} has {_WRAPPER.sub('', raw)!r} twice, once as {raw!r}.")
    return raws


# --- safetensors ---


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        reason = what_bytes_are(_head(path)) or _cut_off(path) or f"no safetensors file, or damaged ({error})"
        raise CheckpointError(f"{path} is {reason}.") from error
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _cut_off(path: Path) -> str | None:
    """Says how much of a truncated safetensors file is there, from its header: 8 bytes of length, JSON, the tensors."""
    size, head = path.stat().st_size, _head(path)
    length = int.from_bytes(head[:8], "little")
    if length >= 10**8:
        return None
    if head[8:9] == b"{" and 8 + length > size:
        return f"cut off within its header, after {size:,} bytes: fetch it again"
    try:
        header = json.loads(read_file(path, first=8 + length)[8:])
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        end = 8 + length + max(ends)
        return f"cut off, with {size:,} of {end:,} bytes there: fetch it again" if size < end else None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None  # the header itself is damaged


def _head(path: Path) -> bytes:
    return read_file(path, first=512)


# --- pickles ---


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by content: torch.save writes a zip archive, and before 2020 a bare pickle."""
    head = _head(path)
    # A safetensors file has "{" after 8 bytes of length, which may look like a pickle's start.
    return head[8:9] != b"{" and (head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head) is not None)


class _Stub:
    """Replaces foreign classes and functions in a pickle: it can be created, called and filled, and does nothing.
    Trainers store such objects in a checkpoint: callbacks, settings, numpy scalars."""

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DictStub:
    """The same for subclasses of dict, which are filled key by key."""

    def __new__(cls, *_: Any) -> Any:
        return {}


_safe_globals_lock = threading.Lock()  # PyTorch has one list of safe globals per process


def read_pickle(path: Path, allow_pickle: bool) -> Any:
    """The content of a pickle: tensors, numbers, texts, and dicts and lists of them. No code of it is run, and objects
    of its own classes are empty. CheckpointError without allow_pickle, and for a damaged file."""
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when loaded. Look for a .safetensors of the model, or pass "
            "allow_pickle=True to load only tensors from it."
        )
    foreign: list[str] = []
    try:
        zipped = _head(path).startswith(b"PK")
        if zipped:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        # Each name is replaced by a new stub class: nothing is imported or run.
        stubs: list[Any] = [
            (type(name.rpartition(".")[2], (_DictStub if re.search(r"[dD]ict$", name) else _Stub,), {}), name)
            for name in foreign
        ]
        with _safe_globals_lock, torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        names = f" ({', '.join(foreign[:3])})" if foreign else ""
        raise CheckpointError(f"{path} holds objects other than tensors{names} and is refused.") from error
    except Exception as error:  # what torch raises on damaged files differs by version
        if "torchscript" in str(error).lower():
            raise CheckpointError(f"{path} is a TorchScript program, not a file of tensors.") from error
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}): fetch it again.") from error


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    content = read_pickle(path, allow_pickle)
    for _ in range(3):
        inner = content.get("state_dict") if isinstance(content, dict) else None
        content = inner if isinstance(inner, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; tensors by name were expected.")
    tensors: dict[str, Tensor] = {}
    for raw, tensor in _flat(content, "", {id(content)}):
        if tensors.setdefault(_WRAPPER.sub("", raw), tensor) is not tensor:
            raise CheckpointError(f"{path} has {_WRAPPER.sub('', raw)!r} twice, once as {raw!r}.")
    return tensors


def _flat(content: Mapping[Any, Any], prefix: str, parents: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts by dotted names, without other values such as a step count. Cycles are skipped."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta:
                yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping) and id(value) not in parents and len(parents) < 16:
            yield from _flat(value, f"{prefix}{key}.", parents | {id(value)})


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", (str(error) or type(error).__name__).splitlines()[0])
