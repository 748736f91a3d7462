"""Every argument x values of every type: each is taken as what it is, or refused in a line that names the argument."""

from __future__ import annotations

import dataclasses
import fractions
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm import FastLDMError, InputError, Pipeline, Request, checks
from fastldm.cli import main
from fastldm.request import MAX_IMAGES, MAX_PROMPT_LENGTH


class Hostile:
    """An object whose every question is answered with an error."""

    def _fails(self, *_: Any) -> Any:
        raise RuntimeError("hostile")

    __eq__ = __ne__ = __len__ = __iter__ = __bool__ = __index__ = __int__ = __float__ = __str__ = __repr__ = _fails  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Talkative:
    def __repr__(self) -> str:
        return "line\nafter line " * 1000


HOSTILE: list[Any] = [
    None, "", "7", "7.5", "a\ud800", b"7", 7, -7, 0, 2**70, 10**400, 10**5000, 0.5, -0.5, math.nan, math.inf, -math.inf,
    1e300, 1 + 2j, True, [], [7], [None], ["7"], (1, 2), (1, 2, 3), {}, {7}, {"a": 1}, range(3), object(), Hostile(),
    Talkative(), [Hostile()], int, len, fractions.Fraction(10**400), fractions.Fraction(1, 2), np.float32(0.5),
    np.float64("nan"), np.int64(7), np.bool_(True), np.complex64(1), np.datetime64(7, "s"), np.array(7), np.array(0.5),
    np.array([7]), np.array([0.5, 0.25]), np.zeros((2, 2)), np.array(["7"]), np.array(None), np.zeros(0),
    torch.tensor(7), torch.tensor(0.5), torch.tensor(True), torch.tensor(1j), torch.tensor([7]), torch.zeros(2, 2),
    torch.zeros(2, 3, 4), torch.zeros(1, 4, 8, 8), torch.zeros(0), torch.zeros((), device="meta"),
    torch.zeros(1, 4, 8, 8, device="meta"), torch.zeros(2, 2).to_sparse(), torch.Generator(), torch.float32,
]  # fmt: skip


def refused(call: Any, name: str) -> bool:
    """Whether a call raises; anything but one line of fastldm's that names the argument fails the test."""
    try:
        call()
    except FastLDMError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 700, message
        assert name in message
        return True
    return False


PICTURES = (
    "image",
    "original_image",
    "mask_image",
    "control_image",
    "ip_adapter_image",
    "image_embeds",
    "negative_image_embeds",
    "depth_map",
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Request)])
def test_every_request_field_accepts_or_refuses_values(name: str) -> None:
    taken = []
    for value in HOSTILE:
        options = {"prompt": "a", name: value} if "prompt" not in name or "negative" in name else {name: value}
        if not refused(lambda options=options: Request(**options), name.removeprefix("negative_").removesuffix("_2")):
            taken.append(value)
    assert len(taken) < len(HOSTILE) / 2 or name in PICTURES  # which are read later


NUMBERS = {
    "height": 64, "width": 64, "num_inference_steps": 3, "num_images_per_prompt": 2, "clip_skip": 1, "seed": 5,
    "guidance_scale": 2.5, "image_guidance_scale": 1.5, "pag_scale": 1.5, "pag_adaptive_scale": 0.5,
    "apg_rescale": 2.0, "apg_eta": 0.5, "apg_momentum": -0.5, "guidance_rescale": 0.5,
    "eta": 0.5, "strength": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NUMBERS.items())
def test_scalars_of_numpy_and_torch_are_numbers(name: str, value: Any) -> None:
    kinds = [np.int64, np.int32, np.uint8] if isinstance(value, int) else [np.float32, np.float64, np.float16]
    for scalar in (*(kind(value) for kind in kinds), np.array(value), torch.tensor(value)):
        got = getattr(Request("a", **{name: scalar}), name)
        assert got == value
        assert type(got) is type(value), "as Python's own, that whoever reads it trusts"
    for wrong in (str(value), bool(value), [value, value, value], complex(value), np.array([value, value])):
        assert refused(lambda wrong=wrong: Request("a", **{name: wrong}), name)


@pytest.mark.parametrize("name", ["timesteps", "sigmas", "seed", "guidance_interval", "original_size"])
def test_arrays_are_lists(name: str) -> None:
    full = name in ("seed", "original_size")
    items = [9, 1] if full else [0.25, 0.5]
    for form in (items, tuple(items), np.array(items), torch.tensor(items)):
        got = getattr(Request(["a", "b"], **{name: form}), name)
        assert list(got) == items
        assert {type(item) for item in got} == {int if full else float}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x" * 1_000_000}, f"prompt has 1000000 characters: expected at most {MAX_PROMPT_LENGTH}"),
        ({"prompt": ["x" * 20_000] * 100}, "prompt has 2000000 characters in 100 texts"),
        ({"prompt": ["a"] * 2_000_000}, f"prompt is a list of 2000000: expected at most {MAX_IMAGES} texts"),
        ({"prompt": ["a"] * 100, "num_images_per_prompt": 100}, f"for 10000 pictures: expected at most {MAX_IMAGES}"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000"),
        ({"seed": list(range(10**6))}, "seed is a list of 1000000"),
        ({"num_inference_steps": 2**70}, "num_inference_steps is 1180591620717411303424"),
        ({"height": 2**70}, "height is"),
        ({"guidance_scale": 10**400}, "guidance_scale is a whole number of 1329 bits"),
        ({"guidance_scale": 1e300}, "guidance_scale is 1e+300: expected a number from 0 to 10000"),
        ({"seed": 10**5000}, "seed is a whole number of 16610 bits"),
        ({"timesteps": np.zeros(10**6)}, "timesteps is a list of 1000000"),
        ({"sampler": "e" * 10**7}, "sampler is 'eee"),
        ({"n" * 10**7: 3}, "unknown argument 'nnn"),
        ({"negative_prompt": "x" * 1_000_000}, "negative_prompt has 1000000 characters"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_oversized_values_are_refused_early(options: dict[str, Any], message: str) -> None:
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        Request.of(options.get("prompt", "a"), {name: value for name, value in options.items() if name != "prompt"})
    assert message in str(caught.value)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adaptive_projected_guidance_norm_dim",
            "adaptive_projected_guidance_norm_dim is not supported: apg_rescale is of all of a picture",
        ),
        ("callback", "callback is not supported: use callback_on_step_end"),
    ],
)
def test_unsupported_diffusers_arguments_are_refused(name: str, message: str) -> None:
    assert Request.of("a", {name: None}) == Request("a"), "nothing is asked"
    with pytest.raises(InputError) as caught:
        Request.of("a", {name: 0.5})
    assert str(caught.value) == message


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_any_value_is_shown_in_one_short_line(value: Any) -> None:
    text = checks.show(value)
    assert "\n" not in text
    assert len(text) <= 100


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3), "a Tensor of shape (2, 3) and dtype torch.float32"),
        (np.zeros((2, 3)), "an array of shape (2, 3) and dtype float64"),
        ([0] * 9, "a list of 9"),
        (10**5000, "a whole number of 16610 bits"),
        (Hostile(), "a Hostile"),
        ("a\nb", r"'a\nb'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_show_is_short(value: Any, expected: str) -> None:
    assert checks.show(value) == expected


# --- the other public arguments

LOADING = ("device", "dtype", "torch_dtype", "backend", "variant", "revision", "cache_dir", "prediction_type")
NOT_TEXT = [value for value in HOSTILE if not isinstance(value, (str, type(None), torch.dtype))]


@pytest.mark.parametrize("name", LOADING)
def test_loading_arguments_refuse_other_types(name: str) -> None:
    for value in NOT_TEXT:
        assert refused(lambda value=value: Pipeline.default(**{name: value}), name), checks.show(value)


@pytest.mark.parametrize("name", ["local_files_only", "allow_pickle"])
def test_flags_of_loading_are_flags(name: str) -> None:
    for value in ("no", 1, None, [], Hostile(), torch.tensor(True)):
        assert refused(lambda value=value: Pipeline.default(**{name: value}), name)


@pytest.mark.parametrize("value", [3, None, b"x", "", [], Hostile(), np.zeros(2), Pipeline])
def test_loading_refuses_invalid_paths(value: Any) -> None:
    with pytest.raises(FastLDMError) as caught:
        Pipeline.from_pretrained(value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FastLDMError):
        Pipeline.from_single_file(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "devices": 2}, "unknown argument 'devices': did you mean 'device'"),
        ({"dtype": "float32", "torch_dtype": torch.float16}, "dtype and torch_dtype were both given"),
        ({"backend": "tensorflow"}, "backend is 'tensorflow'"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
    ],
)
def test_loading_errors_are_specific(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Pipeline.default(**options)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.default(dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "name", ["progress", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"]
)
def test_call_arguments_refuse_other_types(pipe: Pipeline, name: str) -> None:
    wrong = [3, "no", b"", [], [3], {}, 1.5, np.zeros(2), torch.zeros(2), Hostile(), Talkative()]
    for value in wrong:
        options = {name: value}
        if name == "callback_on_step_end_tensor_inputs":
            if isinstance(value, list) and not value:
                continue  # no tensor is a list of none
            options["callback_on_step_end"] = print
        assert refused(lambda options=options: pipe("a", num_inference_steps=1, **options), name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": 3}, "sizes is 3"),
        ({"sizes": [(64,)]}, "sizes[0] is (64,)"),
        ({"sizes": ["64x64"]}, "sizes[0] is '64x64'"),
        ({"sizes": [(64, 2**70)]}, "sizes[0] is"),
        ({"batches": 4}, "batches is 4"),
        ({"batches": ["4"]}, "batches[0] is '4'"),
        ({"batches": [0]}, "batches[0] is 0"),
        ({"batches": [10**9]}, "batches[0] is 1000000000"),
        ({"prompt": 3}, "prompt is 3"),
        ({"nonsense": 3}, "unknown argument 'nonsense'"),
    ],
    ids=str,
)
def test_warm_up_errors_are_specific(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe.warmup(**options)
    assert message in str(caught.value)


def test_prompt_of_too_many_windows_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="more than the 3840 tokens that it may have"):
        pipe("a " * 10_000, num_inference_steps=1)


@pytest.mark.parametrize("options", [["--n", "1000000000000"], ["--steps", "1000000000000"], ["--size", "9999999x64"]])
def test_oversized_plan_is_refused_at_once(options: list[str]) -> None:
    start = time.process_time()
    result = CliRunner().invoke(main, ["plan", *options])
    assert result.exit_code == 2
    assert "expected a whole number" in result.output
    assert time.process_time() - start < 10
