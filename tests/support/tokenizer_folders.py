"""Folders of tokenizers, in the forms that published models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastldm.conditioning.tokenizer import BOS, EOS

SD1_TOKEN = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


SD1_MAP = {name: {"content": EOS, **SD1_TOKEN} for name in ("eos_token", "unk_token")}
SD1_MAP |= {"bos_token": {"content": BOS, **SD1_TOKEN}, "pad_token": EOS}


SD1_CONFIG = {
    **{name: {"__type": "AddedToken", **token} for name, token in SD1_MAP.items() if isinstance(token, dict)},
    "pad_token": EOS,
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
    "do_lower_case": True,
    "errors": "replace",
    "add_prefix_space": False,
}


SDXL2_ADDED = {
    "0": {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True},
    "49406": {"content": BOS, **SD1_TOKEN, "special": True},
    "49407": {"content": EOS, **SD1_TOKEN, "special": True},
}


SDXL2_NAMES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": "!"}


def write_folder(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], files: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path
