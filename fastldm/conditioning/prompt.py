"""The syntax of prompts: weights of words, and ends of text encoder windows.

    "a (red:1.3) car BREAK a blue house" -> [[("a ", 1.0), ("red", 1.3), (" car", 1.0)], [("a blue house", 1.0)]]

The syntax is AUTOMATIC1111's. Unsupported parts of it are read as text, with a warning once per process.
"""

from __future__ import annotations

import logging
import operator
import re
import threading
from itertools import groupby

from fastldm.checks import show
from fastldm.errors import InputError

logger = logging.getLogger("fastldm")

Fragments = list[tuple[str, float]]

EMPHASIS = 1.1
"""Factor of a pair of round brackets; a pair of square brackets divides by it."""
MAX_WEIGHT = 1000.0
"""Weights are clamped to +-1000: a hidden state (some tens) times more than that would overflow in float16."""

_WEIGHTS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")
# All patterns must take linear time for any text.
_UNSUPPORTED = {
    "<name:...>, a network or style by name": re.compile(r"<[A-Za-z]{1,20}:[^<>\s][^<>]{0,200}>"),
    "AND, several weighted prompts": re.compile(r"\bAND\b"),
    "[from:to:when], a prompt that changes between steps": re.compile(
        r"\[[^\[\]:]{0,400}:(?:[^\[\]:]{0,400}:)?\s{0,9}[0-9.]{1,20}\s{0,9}\]"
    ),
    "[a|b], alternating words": re.compile(r"\[[^\[\]|]{0,400}\|[^\[\]]{0,400}\]"),
}
_warned: set[str] = set()
_warning_lock = threading.Lock()


def parse(prompt: str, *, literal: bool = False) -> list[Fragments]:
    """The sections of a prompt, each of which starts a window, as (text, weight) pairs; a section may be empty.

    BREAK, as a word in capitals, ends a section. literal: brackets and BREAK are text.
    """
    if literal:
        return [[(prompt, 1.0)]]
    _warn_unsupported(prompt)
    sections: list[Fragments] = [[]]
    for text, weight in parse_weights(prompt):
        first, *rest = _BREAK.split(text)
        sections[-1].append((first, weight))
        sections += [[(section, weight)] for section in rest]
    return sections


def _warn_unsupported(prompt: str) -> None:
    """Warn once per process and syntax that unsupported syntax is read as text."""
    for syntax, pattern in _UNSUPPORTED.items():
        if syntax in _warned or not pattern.search(prompt):
            continue
        with _warning_lock:
            if syntax not in _warned:
                _warned.add(syntax)
                logger.warning("in a prompt, %s, is not supported: it is read as text", syntax)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight), neighbours of equal weight joined; at least one pair.

    `(word:1.3)` has weight 1.3, `(word)` 1.1, `[word]` 1 / 1.1; nested weights multiply; a backslash escapes a bracket
    or a backslash. (AUTOMATIC1111's syntax.) Anything else is text, never an error: unmatched brackets, weights that
    are no numbers. Of two crossing pairs, as in `(a [b) c]`, the one that closes first counts.
    """
    texts: list[str] = []
    opened: list[int] = []  # indices in `texts` of brackets that are still open
    open_counts = {"(": 0, "[": 0}  # number of each kind in `opened`
    factors: dict[int, float] = {}
    closed: set[int] = set()
    end = 0
    for match in _WEIGHTS.finditer(prompt):
        texts.append(prompt[end : match.start()])
        end = match.end()
        token = match.group()
        kind = "[" if token == "]" else "("
        if token in open_counts:
            opened.append(len(texts))
            open_counts[token] += 1
        elif token[0] == "\\":
            token = token[1]
        elif open_counts[kind]:
            while True:
                start = opened.pop()
                open_counts[texts[start]] -= 1
                if texts[start] == kind:
                    break
            number = match.group(1)
            factors[start] = _clamped(float(number)) if number else EMPHASIS if kind == "(" else 1 / EMPHASIS
            closed.add(len(texts))
        texts.append(token)
    texts.append(prompt[end:])

    levels = [1.0]
    pairs: list[tuple[str, float]] = []
    for k, text in enumerate(texts):
        if k in factors:
            levels.append(_clamped(levels[-1] * factors[k]))
        elif k in closed:
            levels.pop()
        elif text:
            pairs.append((text, levels[-1]))
    groups = groupby(pairs, key=operator.itemgetter(1))
    return [("".join(text for text, _ in group), weight) for weight, group in groups] or [("", 1.0)]


def _clamped(weight: float) -> float:
    return min(max(weight, -MAX_WEIGHT), MAX_WEIGHT)


_LORA = re.compile(r"\s*<lora:([^<>:]{1,200})(?::([^<>:]{0,30}))?>")


def split_lora_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without `<lora:NAME:SCALE>`, AUTOMATIC1111's, and the names and scales that were in it. InputError for a
    scale that is no number."""
    tags = []
    for name, scale in _LORA.findall(prompt):
        try:
            tags.append((name, float(scale or 1)))
        except ValueError:
            raise InputError(f"<lora:{name}:{scale}> has {show(scale)} for a scale: expected a number") from None
    return _LORA.sub("", prompt).strip(), tags
