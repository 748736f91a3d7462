"""Token ids against transformers, for every form of a tokenizer folder; what damaged files get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizer_folders import FOLDERS, HOLES, SD1_MAP, hostile_texts, write_folder, write_holes
from transformers import CLIPTokenizer

from fastldm.conditioning.tokenizer import BOS, EOS, BertTokenizer, Tokenizer, clip_vocabulary
from fastldm.errors import CheckpointError

ASTRONAUT = [320, 1125, 539, 550, 18376, 6765, 320, 4558]


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
    written[HOLES] = write_holes(root / HOLES)
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


# --- BERT's


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json", "cased"])
def test_bert_ids_equal_transformers_on_hostile_texts(form: str, tmp_path: Path) -> None:
    options = {"do_lower_case": False, "strip_accents": False} if form == "cased" else {}
    judge = tiny.bert_tokenizer(**options)
    judge.save_pretrained(tmp_path)
    if form == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tiny.bert_vocabulary()), "utf-8")
    ours = BertTokenizer(tmp_path)
    assert (ours.bos, ours.eos, ours.pad, ours.max_length) == (2, 3, 0, 77)
    texts = [*hostile_texts(300, seed=0), "Unbelievable [MASK] Cats, [PAD] eating [SEP]", "CAT Cat cat"]
    wrong = [text for text in texts if [ours.bos, *ours.ids(text), ours.eos] != judge(text).input_ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]!a}"
    (again := tmp_path / "again").mkdir()
    ours.save_pretrained(again)
    assert [BertTokenizer(again).ids(text) for text in texts[:50]] == [ours.ids(text) for text in texts[:50]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "expected vocab.txt, or tokenizer.json"),
        (put("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}'), "is a 'BPE' tokenizer: expected BERT's"),
        (put("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": "a cat"}}'), "not one of BERT's kind"),
    ],
)
def test_bad_files_of_bert_raise_errors_with_folder(tmp_path: Path, damage: Any, message: str) -> None:
    tiny.bert_tokenizer().save_pretrained(tmp_path)
    BertTokenizer(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        BertTokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


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
