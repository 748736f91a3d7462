"""Checks of arguments: a value of the right type, or an InputError that names the argument.

A number is an int, a float, or a scalar of numpy or torch, including 0-d arrays and tensors; texts such as "7" and True
are no numbers. A list is a list, a tuple, or an array or tensor of one dimension.

Values are converted only after their size was checked, and of foreign objects only repr is called.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from fastldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Larger than any realistic request, and small enough for lists and tensors.
MAX_IMAGES = 4096  # per request
MAX_SIDE = 2**20  # pixels
MAX_STEPS = 10_000
MAX_GUIDANCE = 10_000.0
MAX_PROMPT_LENGTH = 32_768  # characters of a prompt
MAX_TEXT = 2**20  # characters of all prompts together
FINITE = sys.float_info.max
_MAX_SHOWN = 60  # characters of a value in a message


def show(value: Any) -> str:
    """A value as shown in messages: one short line, without the content of tensors and long lists."""
    kind = type(value).__name__
    if _is(value, "torch", "Tensor") or (_is(value, "numpy", "ndarray") and value.ndim):
        kind = "an array" if kind == "ndarray" else f"a {kind}"
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (str, bytes)):
        text = repr(value[: _MAX_SHOWN + 1])
    elif isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) > 8:
        return f"{_article(kind)} {kind} of {len(value)}"
    else:
        try:
            text = repr(value)
        except Exception:  # raised by a foreign object
            text = f"{_article(kind)} {kind}"
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def whole(name: str, value: Any, low: int, high: int, unit: str = "") -> int:
    """A whole number from low to high."""
    number = _number(value)
    if not isinstance(number, int) or not low <= number <= high:
        of = f" of {unit}" if unit else ""
        raise InputError(f"{name} is {show(value)}: expected a whole number{of}, {low} to {high}")
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """A number from low to high."""
    number = _number(value)
    if number is None or not low <= number <= high:
        bounds = "a finite number" if high == FINITE else f"a number from {low:g} to {high:g}"
        raise InputError(f"{name} is {show(value)}: expected {bounds}")
    return float(number)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not (isinstance(value, bool) or _is(value, "numpy", "bool_")):
        raise InputError(f"{name} is {show(value)}: expected True or False")
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {show(value)}: expected one of {', '.join(choices)}")
    return value


def instance(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
    """A value of one of these types. expected: as described in the message."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} is {show(value)}: expected {expected}")
    return value


def known(names: Iterable[str], among: Sequence[str]) -> None:
    """Check names of arguments; an unknown one is an InputError that suggests the most similar."""
    for name in names:
        if name not in among:
            suggestions = difflib.get_close_matches(name[:100], among, n=1)
            hint = f"did you mean {suggestions[0]!r}?" if suggestions else f"known are: {', '.join(among)}"
            raise InputError(f"unknown argument {show(name)}: {hint}")


def short_text(name: str, value: Any, expected: str) -> str:
    """A name, such as a sampler's: a text of at most 200 characters. expected: as described in the message."""
    if not isinstance(value, str) or len(value) > 200:
        raise InputError(f"{name} is {show(value)}: expected {expected}")
    return value


def numbers(name: str, value: Any, longest: int) -> tuple[float, ...]:
    """Finite numbers, at least one and at most `longest`."""
    items = listed(name, value, longest, "numbers")
    if not items:
        raise InputError(f"{name} is an empty list: expected at least one number")
    return tuple(real(f"{name}[{k}]", item, -FINITE, FINITE) for k, item in enumerate(items))


def pair(name: str, value: Any, low: int, high: int, label: str) -> tuple[int, int]:
    """Two whole numbers from low to high. label: such as "(height, width) in pixels"."""
    items = None
    if _is_list(value) and len(value) == 2:
        items = [_number(item) for item in value]
    if items is None or not all(isinstance(item, int) and low <= item <= high for item in items):
        raise InputError(f"{name} is {show(value)}: expected {label}, whole numbers from {low} to {high}")
    return items[0], items[1]  # type: ignore[return-value]


def listed(name: str, value: Any, longest: int, label: str) -> list[Any]:
    """The items of a list of at most `longest` items; those of arrays as Python numbers."""
    if not _is_list(value):
        raise InputError(f"{name} is {show(value)}: expected a list of {label}")
    if len(value) > longest:
        raise InputError(f"{name} is a list of {len(value)}: expected at most {longest} {label}")
    return list(value) if isinstance(value, (list, tuple)) else value.tolist()


def texts(name: str, value: Any, longest: int, length: int) -> list[str]:
    """A text, or a list of at most `longest`, as a list of texts of at most `length` characters, all of them UTF-8."""
    if not isinstance(value, (str, list, tuple)):
        raise InputError(f"{name} is {show(value)}: expected a text or a list of texts")
    items = [value] if isinstance(value, str) else listed(name, value, longest, "texts")
    if not items:
        raise InputError(f"{name} is an empty list: give at least one text (an empty text is fine)")
    for item in items:
        if not isinstance(item, str):
            raise InputError(f"{name} holds {show(item)}: expected a text or a list of texts")
        if len(item) > length:
            raise InputError(f"{name} has {len(item)} characters: expected at most {length}")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not valid Unicode ({error.reason} at character {error.start})") from error
    return [str(item) for item in items]


def tensor(name: str, value: Any, shape: Sequence[int | None]) -> Tensor:
    """A dense, non-empty floating point tensor with storage and of this shape; None is any size. Its values are not
    checked."""
    sizes = ", ".join("any" if n is None else str(n) for n in shape)
    if not _is(value, "torch", "Tensor"):
        raise InputError(f"{name} is {show(value)}: expected a floating point tensor ({sizes})")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}: expected a floating point tensor ({sizes})")
    fits = value.ndim == len(shape) and all(n in (None, got) for n, got in zip(shape, value.shape, strict=True))
    if not fits or value.numel() == 0:
        raise InputError(f"{name} has shape {tuple(value.shape)}: expected ({sizes})")
    if value.is_meta or str(value.layout) != "torch.strided":
        kind = "on the meta device" if value.is_meta else f"{value.layout}"
        raise InputError(f"{name} is {kind}: expected a dense tensor ({sizes})")
    return value


def finite(name: str, value: Tensor) -> Tensor:
    """A tensor without NaN and infinity. Waits for its device."""
    if not bool(value.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity: expected finite numbers")
    return value


def _number(value: Any) -> int | float | None:
    """A real number as an int or float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return int.__int__(value)
    if _is(value, "numpy", "generic") or _is(value, "numpy", "ndarray"):
        value = value.item() if value.ndim == 0 and value.dtype.kind in "iuf" else None
    elif _is(value, "torch", "Tensor"):
        usable = value.ndim == 0 and not value.is_meta and not value.is_complex()
        value = value.item() if usable else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except Exception:  # a fraction beyond all floats, or raised by a foreign object
        return None
    return None if math.isnan(number) else number


def _is_list(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return True
    array = _is(value, "numpy", "ndarray") or _is(value, "torch", "Tensor")
    return array and value.ndim == 1 and not getattr(value, "is_meta", False)


def _is(value: Any, module: str, kind: str) -> bool:
    """Whether a value is of a type of a module, without importing it."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, kind))


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"
