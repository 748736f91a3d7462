"""A prompt's own syntax: weights, BREAK, and what is only named."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.conditioning import prompt as prompts
from fastldm.conditioning.prompt import parse, parse_weights
from fastldm.conditioning.text import prompt_list
from fastldm.errors import InputError


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(red)", [("red", 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(a (b:1.5) c:2)", [("a ", 2.0), ("b", 3.0), (" c", 2.0)]),
        ("(a:0.5)(b:.5)(c : 2. )", [("ab", 0.5), ("c ", 2.0)]),
        ("(a:-1)(b:+2)", [("a", -1.0), ("b", 2.0)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        (r"\(a\) \[b\] \\ \c", [(r"(a) [b] \ \c", 1.0)]),
        (r"(a\):2)", [("a)", 2.0)]),
        (r"\\(a)", [("\\", 1.0), ("a", 1.1)]),
        ("()[]", [("", 1.0)]),
        # what is no weight is text
        ("(a", [("(a", 1.0)]),
        ("a)", [("a)", 1.0)]),
        ("a] [b", [("a] [b", 1.0)]),
        (":-) 8:30 a:1.3)", [(":-) 8:30 a:1.3)", 1.0)]),
        ("((a)", [("(", 1.0), ("a", 1.1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1.0)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:high)", [("a:high", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("(a:٣)", [("a:٣", 1.1)]),
        # held within float16's reach
        ("(a:99999999)(b:-99999999)", [("a", 1000.0), ("b", -1000.0)]),
        (f"((a:{'9' * 400}):0)", [("a", 0.0)]),
        ("(" * 9999 + "a" + ")" * 9999, [("a", 1000.0)]),
        ("[" * 9999 + "a" + "]" * 9999, [("a", 0.0)]),
    ],
)
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    got = parse_weights(prompt)
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


SYNTAX = st.text(st.sampled_from("()[]\\:.1a -"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(SYNTAX)
def test_any_text_parses_and_escapes_back_to_itself(prompt: str) -> None:
    for _, weight in parse_weights(prompt):
        assert math.isfinite(weight)
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in prompt)
    assert parse_weights(escaped) == [(prompt, 1.0)]


def test_parsing_time_is_linear_in_length() -> None:
    # each of these takes minutes where a bracket or a number is searched for again and again
    for piece in ("(", "[", "[)", ":1", "1", "\\", "\\(", ": "):
        text = ":" + piece * 200_000
        assert sum(len(fragment) for fragment, _ in parse_weights(text)) <= len(text)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [[("a ", 1.0)], [(" b", 1.0)]]),
        ("a (b BREAK c:2) d", [[("a ", 1.0), ("b ", 2.0)], [(" c", 2.0), (" d", 1.0)]]),
        ("a\nBREAK\nBREAK b", [[("a\n", 1.0)], [("\n", 1.0)], [(" b", 1.0)]]),
        ("(BREAK)", [[("", 1.1)], [("", 1.1)]]),
        ("BREAKING break BREAKs", [[("BREAKING break BREAKs", 1.0)]]),
    ],
)
def test_break_ends_section(prompt: str, expected: list[prompts.Fragments]) -> None:
    got = parse(prompt)
    assert [[text for text, _ in fragments] for fragments in got] == [
        [text for text, _ in fragments] for fragments in expected
    ]
    for section, reference in zip(got, expected, strict=True):
        assert [weight for _, weight in section] == pytest.approx([weight for _, weight in reference])


def test_literal_prompt_has_no_syntax(caplog: pytest.LogCaptureFixture) -> None:
    text = "a (b:2) BREAK [c:d:0.5] <lora:x:1> AND [e|f]"
    assert parse(text, literal=True) == [[(text, 1.0)]]
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a <lora:detail:0.8> b", "<name:...>"),
        ("<hypernet:x>", "<name:...>"),
        ("a cat AND a dog :1.2", "AND"),
        ("a [cat:dog:0.5]", "[from:to:when]"),
        ("a [dog:12]", "[from:to:when]"),
        ("a [cat::0.5]", "[from:to:when]"),
        ("a [cat|dog] b", "[a|b]"),
    ],
)
def test_unsupported_syntax_warns_once(
    prompt: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prompts, "_warned", set())
    with caplog.at_level(logging.WARNING, "fastldm"):
        assert "".join(text for text, _ in parse(prompt)[0]) == prompt.translate({ord(c): None for c in "[]"})
        parse(prompt)
    (record,) = caplog.records
    assert name in record.getMessage()


@pytest.mark.parametrize("prompt", ["a (b) [c] {d}", "ANDY and SAND", "<3 :) a<b>c", "8:30 [sic]", "a|b", "<a b:c>"])
def test_plain_text_warns_about_no_syntax(
    prompt: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prompts, "_warned", set())
    parse(prompt)
    assert not caplog.records


def test_syntax_search_takes_linear_time() -> None:
    for piece in ("[", "[a:", "<a:", "BREAK ", " ", "[a|", "[:1"):
        parse(piece * (32_000 // len(piece)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected a text or a list"),
        (3, "expected a text or a list"),
        (b"a", "expected a text or a list"),
        ([], "empty list"),
        ((), "empty list"),
        (["a", None], "holds None"),
        ("a \ud800", "not valid Unicode"),
    ],
)
def test_invalid_prompts_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^negative_prompt .*{message}"):
        prompt_list(value, "negative_prompt")


def test_prompts_become_lists() -> None:
    assert prompt_list("") == [""]
    assert prompt_list(("a", "b")) == ["a", "b"]
