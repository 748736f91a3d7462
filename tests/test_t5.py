"""T5's encoder and tokenizer against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from deepfloyd import spiece, t5, t5_pieces, t5_tokenizer
from peer_networks import TOLERANCE, error, give

from fastldm.conditioning.tokenizer import T5Tokenizer
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.state import fit_names
from fastldm.models.t5 import T5Text, distance_buckets
from fastldm.models.text_encoders import text_config, text_encoder

TEXTS = (
    "a photo of squirrels, eating!",
    "",
    "  A Photo of a DOG.  ",
    "zebra",
    "café 12\n\n x",
    "a cat " * 60,
    "a </s> cat <pad>",
    "日本",
)


def encoder(theirs: Any) -> T5Text:
    config = {**theirs.config.to_dict(), "architectures": ["T5EncoderModel"]}
    with torch.device("meta"):
        ours = text_encoder(text_config(config))
    assert isinstance(ours, T5Text)
    state = theirs.state_dict()
    give(ours, {name: state[key] for name, key in fit_names(ours, state, "a file").items()})
    return ours


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_proj": "relu"},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ],
)
def test_t5_equals_transformers(changes: dict[str, Any]) -> None:
    theirs = t5(**changes)
    ours, tokens = encoder(theirs), t5_tokenizer()
    read = tokens([text.lower() for text in TEXTS], padding="max_length", max_length=77, truncation=True)
    ids, mask = torch.tensor(read["input_ids"]), torch.tensor(read["attention_mask"])
    ids, mask = ids[:6], mask[:6]
    hidden, pooled = ours(ids)
    assert pooled is None
    assert error(hidden, theirs(ids, attention_mask=mask)[0]) < TOLERANCE
    halved = encoder(t5(**changes)).to(torch.float16)
    assert error(halved(ids)[0].float(), hidden) < 0.02


def test_buckets_equal_transformers() -> None:
    attention = tiny.peer("transformers").models.t5.modeling_t5.T5Attention
    for length, count, distance in ((77, 32, 128), (300, 32, 128), (40, 8, 20)):
        places = torch.arange(length)
        expected = attention._relative_position_bucket(places[None] - places[:, None], True, count, distance)
        assert torch.equal(distance_buckets(length, count, distance, places.device), expected)


def test_files_may_have_the_table_twice() -> None:
    theirs = t5()
    ours, state = encoder(theirs), theirs.state_dict()
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= {*state}
    for left in ("shared.weight", "encoder.embed_tokens.weight"):
        assert fit_names(ours, {key: value for key, value in state.items() if key != left}, "a file")


@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_tokens_equal_transformers(form: str, tmp_path: Path) -> None:
    theirs = t5_tokenizer()
    theirs.save_pretrained(tmp_path)
    if form == "spiece.model":
        for path in tmp_path.iterdir():
            path.unlink()
        spiece(tmp_path / form)
    ours = T5Tokenizer(tmp_path)
    assert (ours.bos, ours.eos, ours.pad, ours.ends, ours.max_length) == (None, 1, 0, 1, 77)
    assert ours.size == len(t5_pieces())
    for text in TEXTS:
        assert ours.ids(text) == theirs(text.lower().strip())["input_ids"][:-1], text
    ours.save_pretrained(tmp_path)
    assert T5Tokenizer(tmp_path).ids(TEXTS[0]) == ours.ids(TEXTS[0])
    with pytest.raises(InputError, match="T5's"):
        ours.to_dict()


def test_characters_are_normalised_by_the_files_table(tmp_path: Path) -> None:
    """A table of sentencepiece that makes one letter of another: a trie of doubled arrays is not written by hand, so
    it is one that says no text changes, and damaged ones are refused."""
    spiece(tmp_path / "spiece.model", b"\x00")
    with pytest.raises(CheckpointError, match="not one of T5's kind"):
        T5Tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"\x0b\x01", b"{}"])
def test_other_files_are_no_tokenizer(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected spiece\.model"):
        T5Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(CheckpointError, match="not one of T5's kind"):
        T5Tokenizer(tmp_path)


def test_configs_of_t5_are_read_strictly() -> None:
    config = {**t5().config.to_dict(), "architectures": ["T5EncoderModel"]}
    with pytest.raises(CheckpointError, match="'feed_forward_proj' is 'gated-silu'"):
        text_config({**config, "feed_forward_proj": "gated-silu"})
