"""The things that the default model knows, by name, and the nearest of them to a prompt that names none."""

from __future__ import annotations

import json
import re
import textwrap
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastldm.errors import InputError
from fastldm.loading.spec import DEFAULT_MODEL

if TYPE_CHECKING:
    from fastldm.pipeline import Pipeline

# Words of names and tags that do not identify a thing.
_STOP_WORDS = """
a an the of and with in on at to for by from up down no one two big small little old new good bad beautiful cute
red yellow green blue purple pink brown black white gray grey dark flat noto 3d
"""


class Thing(NamedTuple):
    names: tuple[str, ...]  # the first is the name that it was selected by
    tags: tuple[str, ...]
    group: str


@lru_cache
def things() -> tuple[Thing, ...]:
    """All that the model was trained on, the most common names first."""
    listed = json.loads((DEFAULT_MODEL / "concepts.json").read_text(encoding="utf-8"))
    return tuple(Thing(tuple(entry["names"]), tuple(entry["tags"]), entry["group"]) for entry in listed)


def listing(group: str = "", width: int = 100) -> str:
    """The names of the things in each group whose name contains `group`, in lines of at most `width` characters."""
    groups: dict[str, list[str]] = {}
    for thing in things():
        groups.setdefault(thing.group, []).append(thing.names[0])
    matches = [name for name in sorted(groups) if group.strip().lower() in name.lower()]
    if not matches:
        raise InputError(f"--list {group!r} is no group of things: expected a part of {', '.join(sorted(groups))}")
    return "\n\n".join(
        f"{name} ({len(groups[name])})\n"
        + textwrap.fill(", ".join(sorted(groups[name])), width, break_on_hyphens=False)
        for name in matches
    )


def knows_a_word(prompt: str) -> bool:
    """Whether a prompt contains a thing's name, the last word of a name, or a tag, in the singular or the plural."""
    words = [_stem(word) for word in re.findall(r"\w+", prompt.lower())]
    text = f" {' '.join(words)} "
    return any(f" {phrase} " in text for phrase in _known_phrases())


@lru_cache
def _known_phrases() -> frozenset[str]:
    texts = {text for thing in things() for text in (*thing.names, *thing.tags, *(n.split()[-1] for n in thing.names))}
    normalized = (" ".join(_stem(word) for word in re.findall(r"\w+", text.lower())) for text in texts)
    ignored = {"", *_STOP_WORDS.split(), *"0123456789"}
    return frozenset(text for text in normalized if not ignored.issuperset(text.split()))


def _stem(word: str) -> str:
    """The stem of a word, the same for its singular and plural: `bus` and `buses`, `berry` and `berries`."""
    return re.sub("y$", "i", word[:3] + word[3:].rstrip("es"))


def nearest(pipe: Pipeline, prompt: str, count: int = 3) -> list[str]:
    """The things whose text embeddings are nearest to a prompt's, by cosine once the mean of all is taken off.

    An embedding is the text encoder's hidden state (D,) at the last position of the window, which has attended to all
    of the text.
    """
    import torch

    from fastldm.conditioning.text import encode_prompts

    names = [thing.names[0] for thing in things()]
    texts = [f"a {name}" for name in names]
    embeddings = encode_prompts(pipe.text_stages, texts, literal=True).hidden[:, -1].float()  # (N, D)
    embedding = encode_prompts(pipe.text_stages, prompt, literal=True).hidden[:, -1].float()  # (1, D)
    mean = embeddings.mean(0)
    similarity = torch.cosine_similarity(embeddings - mean, embedding - mean, dim=1)  # (N,)
    return [names[k] for k in similarity.topk(count).indices.tolist()]
