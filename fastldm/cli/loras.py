"""Adapters on the command line: `--lora FILE:SCALE`, and `<lora:NAME:SCALE>` in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.pipeline import Pipeline


def split_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its tags, and what they name with their scales. A name is that of a file without its ending, in
    the working folder, or of an adapter that ships. InputError for a scale that is no number."""
    from fastldm.conditioning.prompt import split_lora_tags

    prompt, tags = split_lora_tags(prompt)
    files = [(Path(f"{name}.safetensors"), name, scale) for name, scale in tags]
    return prompt, [(str(file) if file.is_file() else name, scale) for file, name, scale in files]


def find(loras: Sequence[tuple[str, float]], *, allow_pickle: bool = False) -> list[tuple[str, Path, float]]:
    """Of each its name, its file and its scale, before a model is loaded. CheckpointError for a file that there is
    not."""
    from fastldm.adapters.locate import find_weights
    from fastldm.request import MAX_WEIGHT

    found: list[tuple[str, Path, float]] = []
    for source, scale in loras:
        if not abs(scale) <= MAX_WEIGHT:
            raise InputError(f"the scale of --lora {source} is {scale}: expected a number from -1000 to 1000")
        file = find_weights(source, kind="lora", allow_pickle=allow_pickle)
        names = {name for name, *_ in found}
        name = next(n for n in (file.stem, *(f"{file.stem} {k}" for k in range(2, 1000))) if n not in names)
        found.append((name, file, scale))
    return found


def load(pipe: Pipeline, found: Sequence[tuple[str, Path, float]], *, allow_pickle: bool = False) -> None:
    """Load adapters, and make them active."""
    for name, file, _ in found:
        pipe.load_lora_weights(file, adapter_name=name, allow_pickle=allow_pickle)
    if found:
        pipe.set_adapters([name for name, *_ in found], [scale for *_, scale in found])
