"""The syntax of prompts: weights of words, and where a window of the text encoder ends.

    "a (red:1.3) car BREAK a blue house" -> [[("a ", 1.0), ("red", 1.3), (" car", 1.0)], [("a blue house", 1.0)]]

The syntax is AUTOMATIC1111's. What is not supported of it is read as text, and named once a process.
"""

from __future__ import annotations

import logging
import operator
import re
import threading
from itertools import groupby

logger = logging.getLogger("fastldm")

Fragments = list[tuple[str, float]]

EMPHASIS = 1.1
"""What one pair of round brackets multiplies by, and one pair of square brackets divides by."""
MAX_WEIGHT = 1000.0
"""Weights are held within +-1000: a hidden state (some tens) times more than that would leave float16's range."""

_WEIGHTS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")
# Nothing here may take more than linear time, whatever the text.
_UNSUPPORTED = {
    "<name:...>, a network or style by its name": re.compile(r"<[A-Za-z]{1,20}:[^<>\s][^<>]{0,200}>"),
    "AND, prompts that are weighed against each other": re.compile(r"\bAND\b"),
    "[from:to:when], a prompt that changes with the steps": re.compile(
        r"\[[^\[\]:]{0,400}:(?:[^\[\]:]{0,400}:)?\s{0,9}[0-9.]{1,20}\s{0,9}\]"
    ),
    "[a|b], words that take turns": re.compile(r"\[[^\[\]|]{0,400}\|[^\[\]]{0,400}\]"),
}
_named: set[str] = set()
_naming = threading.Lock()


def parse(prompt: str, *, literal: bool = False) -> list[Fragments]:
    """The parts of a prompt that begin a window each, as (text, weight) pairs; a part may be empty.

    BREAK, as a word in capitals, ends a part. literal: brackets and BREAK are text.
    """
    if literal:
        return [[(prompt, 1.0)]]
    _warn_unsupported(prompt)
    parts: list[Fragments] = [[]]
    for text, weight in parse_weights(prompt):
        first, *rest = _BREAK.split(text)
        parts[-1].append((first, weight))
        parts += [[(part, weight)] for part in rest]
    return parts


def _warn_unsupported(prompt: str) -> None:
    """Warn once a process of each syntax of other tools that it is read as text."""
    for syntax, pattern in _UNSUPPORTED.items():
        if syntax in _named or not pattern.search(prompt):
            continue
        with _naming:
            if syntax not in _named:
                _named.add(syntax)
                logger.warning("in a prompt, %s, is not supported: it is read as text", syntax)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight), neighbours of equal weight joined; at least one pair.

    `(word:1.3)` weighs 1.3, `(word)` 1.1, `[word]` 1 / 1.1; nested weights multiply; a backslash before a bracket
    or a backslash takes it as text. (AUTOMATIC1111's syntax.) Whatever is no such weight is text, never an error: a
    bracket without its partner, a weight that is no number. Of two pairs that cross, as in `(a [b) c]`, the one
    that closes first counts.
    """
    texts: list[str] = []
    opened: list[int] = []  # where in `texts` the brackets lie that are still open
    waiting = {"(": 0, "[": 0}  # how many of each kind are in `opened`
    factors: dict[int, float] = {}
    closed: set[int] = set()
    end = 0
    for match in _WEIGHTS.finditer(prompt):
        texts.append(prompt[end : match.start()])
        end = match.end()
        token = match.group()
        kind = "[" if token == "]" else "("
        if token in waiting:
            opened.append(len(texts))
            waiting[token] += 1
        elif token[0] == "\\":
            token = token[1]
        elif waiting[kind]:
            while True:
                start = opened.pop()
                waiting[texts[start]] -= 1
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
