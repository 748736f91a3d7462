"""Settings in an image's file: other tools read them, nothing forges them, and they read back as the request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import fastldm
from fastldm import InputError, Request
from fastldm.image import output_paths, read_parameters, save_image, save_result
from fastldm.metadata import SCHEDULE_LABELS, control_unit, parameters_text, parse_parameters
from fastldm.request import Result, Timings
from fastldm.samplers.names import SAMPLERS
from fastldm.samplers.spacing import SCHEDULES

COMPLETE: dict[str, Any] = {
    "height": 64,
    "width": 96,
    "num_inference_steps": 8,
    "guidance_scale": 2.5,
    "sampler": "dpm++ 2m karras",
    "seed": 3,
}


def a1111(text: str) -> dict[str, str]:
    """The text as AUTOMATIC1111 reads it: by lines, the last one by fields, of which there must be three."""
    field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    fields = dict(field.findall(last))
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            current, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        prompts[current].append(line)
    return fields | {name: "\n".join(lines) for name, lines in prompts.items()}


PIECES = st.sampled_from(
    [
        "a cat",
        "\n",
        "\r",
        ", ",
        '"',
        "\\",
        ":",
        " ",
        "Negative prompt: ",
        "Negative prompt:",
        "Steps: 5, Sampler: x, CFG scale: 1, Seed: 666, Size: 8x8",
        "\u2028",
        "\x85",
        "\0",
        "猫",
        "\\u0041",
    ]
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join))
REALS = st.floats(0, 1, allow_nan=False)


@settings(max_examples=400, deadline=None)
@given(
    prompt=TEXTS,
    negative=st.none() | TEXTS,
    second=st.none() | TEXTS,
    model=TEXTS,
    sampler=TEXTS.filter(lambda text: 0 < len(text) <= 200),
)
@example(prompt="", negative="", second=None, model="", sampler="ddim")
@example(prompt='"a" and "b"', negative="\nNegative prompt: x", second="", model='"', sampler="ddim")
def test_all_texts_read_back(prompt: str, negative: str | None, second: str | None, model: str, sampler: str) -> None:
    request = Request(
        **{**COMPLETE, "sampler": sampler}, prompt=prompt, negative_prompt=negative, negative_prompt_2=second
    )
    text = parameters_text(request, 3, model, {"Version": "x"})
    assert parse_parameters(text) == (request, {"Model": model, "Version": "x"})
    assert sum(line.startswith("Steps:") for line in text.splitlines()) == 1
    assert sum(line.startswith("Negative prompt:") for line in text.splitlines()) == (negative is not None)
    fields = a1111(text)
    assert fields["Seed"] == "3", "another reader sees no forged field"
    assert fields["Steps"] == "8"


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "guidance_scale": st.floats(0, 100),
            "guidance_rescale": REALS,
            "pag_scale": st.floats(0, 100),
            "apg_rescale": st.floats(0, 100),
            "apg_eta": REALS,
            "clip_guidance_scale": st.floats(0, 1000),
            "apg_momentum": st.floats(-1, 1),
            "use_original_formulation": st.booleans(),
            "pag_adaptive_scale": REALS,
            "pag_applied_layers": st.lists(st.sampled_from(["mid", "down.*[12]", "up.(0|1)"]), min_size=1).map(tuple),
            "image_guidance_scale": st.floats(0, 100),
            "guidance_interval": st.tuples(REALS, REALS).map(lambda pair: tuple(sorted(pair))),
            "eta": REALS,
            "reuse": st.integers(1, 1000),
            "strength": REALS.filter(lambda strength: strength > 0),
            "clip_skip": st.integers(1, 11),
            "seed": st.integers(0, 2**63 - 1),
            "literal_prompt": st.booleans(),
            "original_size": st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
            "crops_coords_top_left": st.tuples(st.integers(0, 99), st.integers(0, 99)),
            "negative_target_size": st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
            "timesteps": st.lists(st.integers(0, 999), min_size=1, max_size=5, unique=True).map(
                lambda steps: tuple(sorted(steps, reverse=True))
            ),
        },
    )
)
def test_all_numbers_read_back(numbers: dict[str, Any]) -> None:
    with_image = {"image": "start.png"} if "strength" in numbers else {}
    request = Request("a cat", **{**COMPLETE, **numbers, **with_image})
    read, _ = parse_parameters(parameters_text(request, request.seed, "m"))
    assert read == request.replace(image=None)


def test_other_tools_read_the_settings() -> None:
    request = Request("a cat\non a mat, cinematic: soft light", negative_prompt="dog, worm", clip_skip=1, **COMPLETE)
    assert a1111(parameters_text(request, 3, "apples")) == {
        "Prompt": "a cat\non a mat, cinematic: soft light",
        "Negative prompt": "dog, worm",
        "Steps": "8",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "2.5",
        "Seed": "3",
        "Size": "96x64",
        "Model": "apples",
        "Clip skip": "2",  # there 1 leaves none out
    }


def test_settings_of_other_tools_are_read() -> None:
    request, rest = parse_parameters(
        'a cat,\n"quoted"\nNegative prompt: dog\n'
        'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: e1441589a6, Lora hashes: "a: b"'
    )
    assert request == Request(
        'a cat,\n"quoted"',
        negative_prompt="dog",
        num_inference_steps=20,
        sampler="euler a",
        guidance_scale=7.0,
        seed=1,
        width=512,
        height=768,
    )
    assert rest == {"Model hash": "e1441589a6", "Lora hashes": "a: b"}
    assert parse_parameters("Negative prompt: x\nonly: texts") == (Request("", negative_prompt="x\nonly: texts"), {})


def test_samplers_have_their_names_elsewhere() -> None:
    """AUTOMATIC1111 reads a sampler by its exact name, and how its sigmas are spaced apart from it."""
    for name in SAMPLERS:
        for kind in ("", *(f" {kind}" for kind in SCHEDULE_LABELS)):
            text = parameters_text(Request("a", num_inference_steps=8, sampler=name + kind, seed=3), 3, "m")
            label, _, schedule = text.partition("Sampler: ")[2].partition(", ")
            assert label.lower() == name
            assert label != name
            assert not kind or f"Schedule type: {SCHEDULE_LABELS[kind.strip()]}, " in schedule
            assert ("Schedule type: " in schedule) == bool(kind)
            assert parse_parameters(text)[0].sampler == name + kind
    for text, sampler in (
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpm++ 2m"),
        ("Sampler: DPM++ 2M Karras", "DPM++ 2M Karras"),  # of earlier versions
        ("Sampler: my own", "my own"),
    ):
        assert parse_parameters(f"a\nSteps: 1, {text}, Size: 8x8")[0].sampler == sampler
    assert parse_parameters("a\nSteps: 1, Sampler: Euler, Schedule type: Polyexponential, Size: 8x8")[1] == {
        "Schedule type": "Polyexponential"
    }
    assert {*SCHEDULE_LABELS} == {"karras", "exponential", "beta", *SCHEDULES}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nSteps: many, Sampler: x, Size: 8x8", "have Steps: 'many'"),
        ("a\nSteps: 1, Sampler: x, Size: 8", "have Size: '8'"),
        (f"a\nSteps: {'9' * 5000}, Sampler: x, Size: 8x8", "have Steps: '999"),
        ("a\nSteps: 0, Sampler: x, Size: 8x8", "num_inference_steps is 0"),
    ],
)
def test_impossible_values_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_parameters(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


EXTENSION = (
    'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, ControlNet 0: "Module: canny, Model: '
    "control_v11p_sd15_canny [d14c016b], Weight: 0.8, Resize Mode: Crop and Resize, Processor Res: 512, Threshold A: "
    '100.0, Guidance Start: 0.1, Guidance End: 0.9, Pixel Perfect: True, Control Mode: Balanced", ControlNet 1: "'
    'Module: ip-adapter_clip_sd15, Model: ip-adapter_sd15 [6a3f6166], Weight: 0.5, Guidance Start: 0", '
    'ControlNet 2: "preprocessor: none, model: old [0], weight: 1, starting/ending: (0, 1)", TI hashes: "bad: '
    'fff5d51ab655"'
)


def test_units_of_the_controlnet_extension_are_read() -> None:
    """Their weights by name; what the extension's first versions wrote stays text."""
    request, rest = parse_parameters(f"a cat\n{EXTENSION}")
    assert {*rest} == {"ControlNet 0", "ControlNet 1", "ControlNet 2", "TI hashes"}
    name = "control_v11p_sd15_canny"
    assert request.controlnet_conditioning_scale == request.adapter_conditioning_scale == {name: 0.8}
    assert (request.control_guidance_start, request.control_guidance_end) == ({name: 0.1}, {name: 0.9})
    assert request.ip_adapter_scale == (0.5,)
    for value in ("much", "nan", "1e9"):
        with pytest.raises(InputError):
            parse_parameters(f"a cat\n{EXTENSION.replace('Weight: 0.8', f'Weight: {value}')}")


@settings(max_examples=200, deadline=None)
@given(
    name=TEXTS.filter(lambda text: text.isprintable() and text.strip(" ,:")),
    token=TEXTS.filter(bool),
    weight=st.floats(0, 2).map(lambda x: round(x, 3)),
)
@example(name="x, Weight: 5", token="a: b, c", weight=1.0)
def test_names_of_adapters_forge_nothing(name: str, token: str, weight: float) -> None:
    """A control's and a token's name stay one item each."""

    class Pictures(dict[str, Any]):
        units = (control_unit("none", name, "0123456789ab", {"Weight": weight}),)

    request = Request(f"a {token}", control_image=Pictures(), **COMPLETE)
    text = parameters_text(request, 3, "m", embeddings={token: "ba21023c7054", "no token": "0"})
    read, fields = parse_parameters(text)
    assert a1111(text)["Seed"] == "3"
    assert len(fields["ControlNet 0"].split(", ")) == 3
    assert list((read.controlnet_conditioning_scale or {}).values()) == [weight]  # type: ignore[union-attr]
    assert [item.rpartition(": ")[2] for item in fields["TI hashes"].split(", ")] == ["ba21023c7054"]


def test_long_lines_without_fields_are_read_quickly() -> None:
    for line in (
        "x" * 10**6,
        'a: "' * 10**5,
        "a: b, " * 10**5,
    ):  # a pattern that starts anew at each letter takes hours
        with pytest.raises(InputError, match="characters"):
            parse_parameters(f"{line}\nthat was a prompt")
        parse_parameters(f"a prompt\nSteps: 1, Sampler: x, Size: 8x8, {line}")


def test_each_png_of_a_batch_has_its_settings(tmp_path: Path) -> None:
    request = Request(
        ["a red apple", "a blue car"],
        negative_prompt=["worm", "rust"],
        num_images_per_prompt=2,
        **{**COMPLETE, "seed": [5, 6, 9, 2]},
    )
    images = [Image.new("RGB", (96, 64))] * 4
    result = Result(images, (5, 6, 9, 2), Timings(0, (), 0, 0), "torch", "float32", request)
    paths = output_paths(tmp_path / "a.png", 4)
    save_result(result, paths, "default")
    for k, path in enumerate(paths):
        read, rest = fastldm.read_parameters(path)
        assert (read.prompt, read.negative_prompt) == (("a red apple", "worm"), ("a blue car", "rust"))[k // 2]
        assert read.seed == (5, 6, 9, 2)[k]
        assert read.batch == 1
        assert rest["Backend"] == "torch float32"


def test_png_keeps_every_character(tmp_path: Path) -> None:
    request = Request("猫\u2028\0é\nNegative prompt: x", **COMPLETE)
    save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", parameters_text(request, 3, "m"))
    assert read_parameters(tmp_path / "a.png")[0] == request
    assert read_parameters(Image.open(tmp_path / "a.png"))[0] == request


def test_text_after_the_pixels_is_read(tmp_path: Path) -> None:
    request = Request("a cat", **COMPLETE)
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters_text(request, 3, "m"), zip=True)
    text.chunks[0] = (*text.chunks[0][:2], True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    assert read_parameters(tmp_path / "a.png")[0] == request


def test_images_without_settings_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        with pytest.raises(InputError, match="does not say how it was made"):
            read_parameters(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        read_parameters(tmp_path / "b.png")
