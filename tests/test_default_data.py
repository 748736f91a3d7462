"""The default model's captions: what training shows is not what the gates test."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.default_data import CONCEPTS_FILE, Concept, caption, plain_tags, tag_pairs


@pytest.fixture(scope="module")
def concepts() -> list[Concept]:
    return json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))


def test_a_pair_of_tags_means_one_concept(concepts: list[Concept]) -> None:
    vocabularies = [{*c["names"], *plain_tags(c)} for c in concepts]
    for i, pairs in enumerate(tag_pairs(concepts)):
        for pair in pairs[:5]:
            assert [j for j, vocabulary in enumerate(vocabularies) if vocabulary.issuperset(pair)] == [i]


def test_training_never_shows_the_pair_that_is_tested(concepts: list[Concept]) -> None:
    rng, seen = np.random.default_rng(0), 0
    for concept, pairs in zip(concepts[:120], tag_pairs(concepts), strict=False):
        captions = {caption(rng, concept, "flat", (), pairs[1:]).removesuffix(", flat") for _ in range(200)}
        spoken = {tuple(sorted(text.split(", "))) for text in captions if text.count(", ") == 1}
        seen += sum(tuple(sorted(pair)) in spoken for pair in pairs[1:])
        assert not any(tuple(sorted(pair)) in spoken for pair in pairs[:1]), concept["names"]
    assert seen > 200
