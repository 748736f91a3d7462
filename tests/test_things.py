"""What the default model knows: its list, which prompts name a thing of it, and what is nearest to other prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run

import fastldm
from fastldm.cli import things
from fastldm.errors import InputError

KNOWN = {thing.names[0]: thing for thing in things.things()}


def test_names_are_unique() -> None:
    names = [name for thing in things.things() for name in thing.names]
    assert len(set(names)) == len(names) > 300


def test_names_are_known_in_singular_and_plural() -> None:
    for thing in things.things():
        for name in thing.names:
            assert things.knows_a_word(f"a {name}!"), name
    for prompt in ("two buses", "strawberries", "Foxes", "glasses of milk", "3 ROCKETS", "a shiny red apple"):
        assert things.knows_a_word(prompt), prompt


@pytest.mark.parametrize("prompt", ["a quokka", "the beautiful red zyzzyva", "1, 2, of the", "кот", "a catalogue"])
def test_prompts_without_a_thing_are_recognised(prompt: str) -> None:
    assert not things.knows_a_word(prompt)


def test_list_has_every_thing_once_by_group() -> None:
    done = run("generate", "--list")
    assert done.exit_code == 0
    groups = [text.split("\n", 1) for text in done.stdout.strip().split("\n\n")]
    for title, names in groups:
        group, count = title.rstrip(")").split(" (")
        listed = names.replace("\n", " ").split(", ")
        assert listed == sorted(name for name, thing in KNOWN.items() if thing.group == group)
        assert len(listed) == int(count)
    assert sum(int(title.rstrip(")").split(" (")[1]) for title, _ in groups) == len(KNOWN)


def test_part_of_a_name_selects_the_group() -> None:
    done = run("generate", "--list", "animals")
    assert done.exit_code == 0
    assert done.stdout.startswith("Animals & Nature (")
    assert "Food" not in done.stdout
    assert things.listing("FOOD").startswith("Food & Drink (")


def test_unknown_group_is_refused_with_the_groups() -> None:
    done = run("generate", "--list", "minerals")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("fastldm: --list 'minerals' is no group of things: expected a part of Activities, ")
    with pytest.raises(InputError, match="Travel & Places"):
        things.listing("minerals")


def test_known_things_are_nearest_to_themselves() -> None:
    pipe = fastldm.Pipeline.default(device="cpu", dtype="float32")
    for name in ("guitar", "owl", "pizza", "castle"):
        suggestions = things.nearest(pipe, f"a {name}")
        assert suggestions[0] == name
        assert len(set(suggestions)) == 3
        assert set(suggestions) <= KNOWN.keys()


def test_command_warns_when_no_thing_is_known(tmp_path: Path) -> None:
    out = str(tmp_path / "a.png")
    done = run("generate", "a quokka", "--steps", "1", "--json", "--device", "cpu", "-o", out)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["files"] == [out]
    assert done.stderr.startswith("warning: the prompt names nothing that the default model knows; ")
    assert sum(repr(name) in done.stderr for name in KNOWN) == 3
    assert run("generate", "an owl", "--steps", "1", "--device", "cpu", "-o", out, "--force").stderr == ""
