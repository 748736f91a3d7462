"""Token ids against transformers, for every form of a tokenizer folder; what damaged files get."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import SD1_CONFIG, SD1_MAP, SDXL2_ADDED, SDXL2_NAMES, write_folder
from transformers import CLIPTokenizer

from fastldm.conditioning.tokenizer import BOS, EOS, Tokenizer, clip_vocabulary
from fastldm.errors import CheckpointError

ASTRONAUT = [320, 1125, 539, 550, 18376, 6765, 320, 4558]


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


# As transformers 5 writes it
SERIALIZED = {"tokenizer.json": "sd1", "tokenizer.json with !": "sd2", "tokenizer.json and extra": "extra"}


# As older versions wrote it, beside older files, of which vocabulary and merges are not read; nor is how it splits
OLDER = "older tokenizer.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    written = {}
    for name, (size, files) in FOLDERS.items():
        vocab, merges = clip_vocabulary(size)
        written[name] = write_folder(root / name, vocab, merges, files)
    letters = {c: k for k, c in enumerate(["a", "b", "c</w>", "ab", "abc</w>", BOS, EOS])}
    written[HOLES] = write_folder(root / HOLES, letters, [("a", "b"), ("ab", "c</w>")], {})
    for name, origin in SERIALIZED.items():
        written[name] = root / name
        CLIPTokenizer.from_pretrained(written[origin]).save_pretrained(written[name])
        assert not (written[name] / "vocab.json").exists()
    serialized = json.loads((written["tokenizer.json"] / "tokenizer.json").read_text(encoding="utf-8"))
    serialized["model"]["merges"] = [" ".join(pair) for pair in serialized["model"]["merges"]]
    serialized["normalizer"] = serialized["pre_tokenizer"] = None
    files = {"tokenizer.json": serialized, "special_tokens_map.json": SD1_MAP}
    written[OLDER] = write_folder(root / OLDER, *clip_vocabulary(600), files)
    return written


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


@pytest.mark.parametrize("name", [*FOLDERS, HOLES, *SERIALIZED, OLDER])
def test_ids_equal_transformers_on_hostile_texts(folders: dict[str, Path], name: str) -> None:
    judge, ours = CLIPTokenizer.from_pretrained(folders[name]), Tokenizer(folders[name])
    assert (ours.bos, ours.eos, ours.pad) == (judge.bos_token_id, judge.eos_token_id, judge.pad_token_id)
    assert ours.max_length == (judge.model_max_length if judge.model_max_length < 1e6 else 77)
    texts = hostile_texts(1000, seed=0)
    wrong = [text for text in texts if [ours.bos, *ours.ids(text), ours.eos] != judge(text).input_ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]!a}"


@pytest.mark.parametrize(("pad_token", "folder"), [(None, "bare"), ("!", "sdxl2")])
def test_built_in_tokenizer_is_clips(folders: dict[str, Path], pad_token: str | None, folder: str) -> None:
    ours, judge = Tokenizer(pad_token=pad_token), CLIPTokenizer.from_pretrained(folders[folder])
    assert ours.ids("a photo of an astronaut riding a horse") == ASTRONAUT  # as openai/CLIP gives them
    assert (ours.bos, ours.eos, ours.pad, ours.max_length) == (49406, 49407, judge.pad_token_id, 77)
    texts = [text.replace(BOS.upper(), "").replace(EOS.title(), "") for text in hostile_texts(200, seed=1)]
    assert [ours.ids(text) for text in texts] == [judge(text).input_ids[1:-1] for text in texts]


@pytest.mark.parametrize("size", [514, 515, 8192, 49408])
def test_truncated_vocabulary_is_start_of_full_one(size: int) -> None:
    vocab, merges = clip_vocabulary(size)
    full, all_merges = clip_vocabulary()
    assert len(vocab) == size
    assert merges == all_merges[: size - 514]
    assert list(vocab)[:-2] == list(full)[: size - 2]
    assert (vocab[BOS], vocab[EOS]) == (size - 2, size - 1)


def put(name: str, content: str) -> Any:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "expected vocab.json and merges.txt"),
        (lambda folder: (folder / "vocab.json").unlink(), "expected vocab.json and merges.txt"),
        (put("vocab.json", "<!doctype html>"), "not one of CLIP's kind"),
        (put("merges.txt", "#version: 0.2\na b c d\n"), "not one of CLIP's kind"),
        (put("merges.txt", "#version: 0.2\nnever seen\n"), "not one of CLIP's kind"),
        (put("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1"), "is not JSON"),
        (put("tokenizer_config.json", "[1, 2]"), "holds a list; an object was expected"),
        (put("special_tokens_map.json", '{"pad_token": 3}'), "not one of CLIP's kind"),
        (put("tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}'), "is a 'Unigram' tokenizer"),
        (put("tokenizer.json", '{"truncated": '), "is not JSON"),
    ],
)
def test_bad_files_raise_errors_with_folder(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_folder(tmp_path / "tokenizer", *clip_vocabulary(600), {})
    Tokenizer(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(folder)
    assert str(folder) in str(caught.value)


# --- textual inversion


@pytest.mark.parametrize("folder", ["sd1", "sd2", "extra", "added"])
def test_added_tokens_equal_transformers_and_are_saved(folders: dict[str, Path], folder: str, tmp_path: Path) -> None:
    judge, base = CLIPTokenizer.from_pretrained(folders[folder]), Tokenizer(folders[folder])
    names = ["<Thing>", "<Thing>_1", "<Thing>_2", "é-style", "xq"]
    judge.add_tokens(names)
    ours = base.with_tokens({"<Thing>": 3, "é-style": 1, "xq": 1})
    assert ours.size == base.size + 5
    assert base.ids("xq") == CLIPTokenizer.from_pretrained(folders[folder])("xq").input_ids[1:-1]  # as it was
    texts = [
        f"{a}{b}{c}" for a in ("", "a ", "((") for b in [*names, "<thing>", "E\u0301-STYLE"] for c in ("", "xq_1", " b")
    ]
    texts += hostile_texts(100, seed=3)

    def expanded(text: str) -> list[int]:
        """The judge's, each first vector followed by the rest, if they do not follow already."""
        ids, (first, *rest) = judge(text).input_ids[1:-1], judge.convert_tokens_to_ids(names[:3])
        follow = [ids[k + 1 : k + 3] == rest for k in range(len(ids))]
        return [x for k, id in enumerate(ids) for x in ([id] if id != first or follow[k] else [id, *rest])]

    assert [ours.ids(text) for text in texts] == [expanded(text) for text in texts]
    ours.save_pretrained(tmp_path)
    again, saved = Tokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    kept = ("bos", "eos", "pad", "size", "max_length")
    assert [getattr(again, name) for name in kept] == [getattr(ours, name) for name in kept]
    assert [again.ids(text) for text in texts] == [ours.ids(text) for text in texts]
    assert [saved(text).input_ids for text in texts] == [judge(text).input_ids for text in texts]
    assert (saved.pad_token, saved.model_max_length) == (judge.pad_token, ours.max_length)
