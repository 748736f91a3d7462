"""Folders of tokenizers, in the forms that published models have, and texts that are hard to split."""

from __future__ import annotations

import json
import random
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


# The forms in which tokenizers lie on disk: each a reason for tokens to come out otherwise. (vocabulary size, files)
FOLDERS: dict[str, tuple[int, dict[str, Any]]] = {
    # vocabulary and merges alone
    "bare": (49408, {}),
    # SD 1.x: special tokens as dicts, found in the normalised text, so in capitals too
    "sd1": (49408, {"tokenizer_config.json": SD1_CONFIG, "special_tokens_map.json": SD1_MAP}),
    # SD 2.x: the map overrides the settings' pad token; `!` in a prompt is the pad token
    "sd2": (49408, {"tokenizer_config.json": SD1_CONFIG, "special_tokens_map.json": {**SD1_MAP, "pad_token": "!"}}),
    # SDXL's second: added_tokens_decoder replaces the map
    "sdxl2": (
        49408,
        {
            "tokenizer_config.json": {**SDXL2_NAMES, "added_tokens_decoder": SDXL2_ADDED, "model_max_length": 77},
            "special_tokens_map.json": {"pad_token": "never read"},
        },
    ),
    # the default model's: a short vocabulary and window
    "small": (8192, {"tokenizer_config.json": {**SDXL2_NAMES, "pad_token": EOS, "model_max_length": 32}}),
    # textual inversion: a token of its own, at the end of the vocabulary
    "added": (49408, {"added_tokens.json": {"<cat-toy>": 49408}, "special_tokens_map.json": SD1_MAP}),
    "extra": (1000, {"tokenizer_config.json": {"additional_special_tokens": ["<Toy>"], "model_max_length": 1e30}}),
}


# Vocabularies that lack most single bytes: what they do not know becomes the unknown token
HOLES = "holes"


def write_folder(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], files: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def write_holes(path: Path) -> Path:
    letters = {c: k for k, c in enumerate(["a", "b", "c</w>", "ab", "abc</w>", BOS, EOS])}
    return write_folder(path, letters, [("a", "b"), ("ab", "c</w>")], {})


WORDS = "the quick brown fox of a photo astronaut riding horse unbelievableness internationalization 8k hdr"


POOLS: tuple[list[str], ...] = (
    WORDS.split(),
    list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    list("0123456789٣४²½Ⅷ④百"),
    list(" \t\n\r\v\f\x1c\x1d\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"),
    [chr(c) for c in [*range(32), *range(127, 160)]],
    [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "...", "!!!", "-->", ":)", "¯\\_(ツ)_/¯"],
    ["'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'LL", "'d", "’s", "ʼs", "''", "dog's", "don't", "I'M", "o'clock"],
    ["é", "e\u0301", "E\u0301", "ñ", "n\u0303", "Å", "A\u030a", "\u212b", "d\u0323\u0307", "\u0308" * 9],
    ["ß", "ẞ", "İ", "ı", "I", "Σ", "ΟΔΟΣ", "ς", "ǅ", "ﬁ", "ÀÉÎÕÜ", "Ж", "ԱԲ", "Ⅻ", "𝐀", "Ａ", "Ꭰ", "𐐀"],
    ["你好", "日本語", "カタカナ", "ｶﾀｶﾅ", "がぎ", "か\u3099", "한국어", "\u1112\u1161\u11ab", "漢字𠮷", "、"],
    ["繁體", "。", "ไทย", "नमस्ते", "עברית", "مرحبا", "\u202eabc", "\u0378", "\u034f", "\u0300"],
    ["😀", "🇩🇪", "👍🏽", "☃", "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001f469\u200d\U0001f467", "\U0001f3f4\U000e007f"],
    [BOS, EOS, BOS.upper(), EOS.title(), "<|", "|>", "<|endoftext", "</w>", "a</w>", "Ġ", "ġthe", "<cat-toy>", "<toy>"],
    ["\ue000", "\U000f0000", "\ufffd", "\uffff", "\U0010ffff", "<Toy>"],
)


def hostile_texts(count: int, seed: int) -> list[str]:
    """Seeded texts of mixed kinds, from empty to thousands of characters."""
    draw = random.Random(seed)
    texts = ["", " ", "a" * 5000, "ab" * 3000 + "'s", "1" * 999, "!" * 999, "字" * 999, "é" * 999, "\0" * 99, EOS * 99]
    while len(texts) < count:
        pools = draw.sample(POOLS, draw.randint(1, 4))
        length = draw.choice((1, 2, 5, 20, 80, 400))
        joint = draw.choice(("", " ", "  ", "'"))
        pieces = [draw.choice(draw.choice(pools)) for _ in range(length)]
        if draw.random() < 0.2:  # anything that Unicode has, assigned or not, but surrogates, which have no UTF-8 form
            pieces = [chr(c) for c in (draw.randrange(0x110000) for _ in range(length)) if not 0xD800 <= c < 0xE000]
        texts.append(joint.join(pieces))
    return texts
