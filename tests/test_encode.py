"""Conditioning of a request: texts, tensors in their place, sizes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline

from fastldm import InputError, Pipeline, Request
from fastldm.conditioning import encode as conditioning


def embeds(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(2, 7, 8),
        "negative_prompt_embeds": torch.randn(2, 7, 8),
        "pooled_prompt_embeds": torch.randn(2, 5),
        "negative_pooled_prompt_embeds": torch.randn(2, 5),
        "width": 8,
        "pooled_width": 5,
        "guided": True,
        "dtype": torch.bfloat16,
        "device": "cpu",
        **changes,
    }


def test_tensors_become_conditioning() -> None:
    options = embeds()
    got = conditioning.from_tensors(**options)
    assert got.hidden.equal(options["prompt_embeds"].bfloat16())
    assert got.pooled.equal(options["pooled_prompt_embeds"].bfloat16())
    assert got.negative_hidden.equal(options["negative_prompt_embeds"].bfloat16())
    assert got.negative_pooled.equal(options["negative_pooled_prompt_embeds"].bfloat16())
    # what is not needed is not looked at
    got = conditioning.from_tensors(**{**options, "negative_prompt_embeds": 1, "guided": False, "pooled_width": None})
    assert got.pooled is got.negative_hidden is got.negative_pooled is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_embeds": [1.0]}, r"^prompt_embeds is \[1.0\]: expected a floating point tensor \(any, any, 8\)"),
        ({"prompt_embeds": torch.ones(2, 7, 8, dtype=torch.long)}, "^prompt_embeds has dtype torch.int64"),
        ({"prompt_embeds": torch.ones(2, 7, 9)}, r"^prompt_embeds has shape \(2, 7, 9\): expected \(any, any, 8\)"),
        ({"prompt_embeds": torch.ones(7, 8)}, r"^prompt_embeds has shape \(7, 8\)"),
        ({"prompt_embeds": torch.ones(0, 7, 8)}, r"^prompt_embeds has shape \(0, 7, 8\)"),
        ({"prompt_embeds": torch.full((2, 7, 8), math.nan)}, "^prompt_embeds holds NaN"),
        ({"negative_prompt_embeds": None}, r"^negative_prompt_embeds is missing: .* tensor \(2, any, 8\)"),
        ({"negative_prompt_embeds": torch.ones(1, 7, 8)}, "^negative_prompt_embeds has shape"),
        ({"negative_prompt_embeds": torch.ones(2, 7, 6)}, "^negative_prompt_embeds has shape"),
        ({"pooled_prompt_embeds": None}, "^pooled_prompt_embeds is missing"),
        ({"pooled_prompt_embeds": torch.ones(2, 4)}, "^pooled_prompt_embeds has shape"),
        ({"negative_pooled_prompt_embeds": torch.full((2, 5), math.inf)}, "^negative_pooled_prompt_embeds holds NaN"),
    ],
)
def test_unfit_tensors_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conditioning.from_tensors(**embeds(**changes))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"original_size": (1024, 768), "crops_coords_top_left": (8, 16), "target_size": (512, 640)},
        {"crops_coords_top_left": (8, 16)},
        {"negative_original_size": (32, 48), "negative_target_size": (64, 32), "crops_coords_top_left": (8, 16)},
        {
            "negative_original_size": (32, 48),
            "negative_crops_coords_top_left": (1, 2),
            "negative_target_size": (64, 32),
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("guided", [False, True])
def test_size_ids_equal_diffusers_ids(sizes: dict[str, Any], guided: bool) -> None:
    request = Request(["a", "b"], height=64, width=96, **sizes)
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=1),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=6)),
    )

    def theirs(prefix: str, default: dict[str, Any]) -> torch.Tensor:
        names = ("original_size", "crops_coords_top_left", "target_size")
        values = [{**default, **sizes}.get(f"{prefix}{name}", default[name]) for name in names]
        return StableDiffusionXLPipeline._get_add_time_ids(SimpleNamespace(unet=unet), *values, torch.float32, 0)

    own = {"original_size": (64, 96), "crops_coords_top_left": (0, 0), "target_size": (64, 96)}
    positive = theirs("", own)
    both = "negative_original_size" in sizes and "negative_target_size" in sizes
    negative = theirs("negative_", own) if both else positive
    expected = torch.cat([negative] * (2 * guided) + [positive] * 2)
    assert conditioning.size_ids(request, 4 if guided else 2).equal(expected)


# Halves of texts and of tensors, judged by diffusers' encode_prompt


@pytest.fixture(scope="module")
def pipes() -> Any:
    pairs: dict[str, tuple[Any, Pipeline]] = {}

    def get(family: str) -> tuple[Any, Pipeline]:
        if family not in pairs:
            theirs = tiny.pipeline(family)
            pairs[family] = theirs, Pipeline.from_diffusers(theirs)
        return pairs[family]

    return get


def states(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HALVES = {
    "negative tensor": {"prompt": "a cat", "negative_prompt_embeds": states(1, 1, 77, 32)},
    "positive tensor": {"prompt_embeds": states(2, 1, 77, 32)},
    "positive tensor, negative text": {"prompt_embeds": states(2, 1, 77, 32), "negative_prompt": "ugly"},
    "a short positive tensor": {"prompt_embeds": states(2, 1, 16, 32), "negative_prompt": "an ugly thing"},
    "both tensors": {"prompt_embeds": states(2, 1, 9, 32), "negative_prompt_embeds": states(1, 1, 9, 32)},
    "clip_skip": {"prompt_embeds": states(2, 1, 77, 32), "negative_prompt": "ugly", "clip_skip": 1},
}


@pytest.mark.parametrize("options", HALVES.values(), ids=HALVES)
def test_mixed_texts_and_tensors_match_diffusers(pipes: Any, options: dict[str, Any]) -> None:
    theirs, ours = pipes("sd1")
    prompt = options.get("prompt")
    rest = {name: value for name, value in options.items() if name != "prompt"}
    expected = theirs.encode_prompt(prompt, "cpu", 2, True, **rest)
    request = ours.stages.complete(Request(**options, num_images_per_prompt=2, seed=0))
    got = ours.stages.encode(request)
    torch.testing.assert_close(got.hidden, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.negative_hidden, expected[1], atol=1e-5, rtol=1e-5)


XL_HALVES = {
    "second prompts": {
        "prompt": "a cat",
        "prompt_2": "a house",
        "negative_prompt": "ugly",
        "negative_prompt_2": "blurry",
    },
    "zeros": {"prompt": "a cat"},
    "zeros beside a tensor": {"prompt_embeds": states(1, 1, 77, 72), "pooled_prompt_embeds": states(2, 1, 24)},
    "negative text beside a tensor": {
        "prompt_embeds": states(1, 1, 77, 72),
        "pooled_prompt_embeds": states(2, 1, 24),
        "negative_prompt": "ugly",
    },
    "negative tensor beside a text": {
        "prompt": "a cat",
        "negative_prompt_embeds": states(1, 1, 77, 72),
        "negative_pooled_prompt_embeds": states(2, 1, 24),
    },
    "a pooled vector beside a text": {"prompt": "a cat", "pooled_prompt_embeds": states(2, 1, 24)},
    "pooled vectors beside texts": {
        "prompt": "a cat",
        "negative_prompt": "ugly",
        "pooled_prompt_embeds": states(2, 1, 24),
        "negative_pooled_prompt_embeds": states(3, 1, 24),
    },
}


@pytest.mark.parametrize("options", XL_HALVES.values(), ids=XL_HALVES)
def test_mixed_sdxl_branches_match_diffusers(pipes: Any, options: dict[str, Any]) -> None:
    theirs, ours = pipes("sdxl")
    expected = theirs.encode_prompt(device="cpu", **{"prompt": None, **options})
    got = ours.stages.encode(ours.stages.complete(Request(**options, seed=0)))
    for tensor, reference in zip(
        (got.hidden, got.negative_hidden, got.pooled, got.negative_pooled), expected, strict=True
    ):
        torch.testing.assert_close(tensor, reference, atol=1e-5, rtol=1e-5)


def test_long_text_and_tensor_get_equal_lengths(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    negative = states(1, 1, 77, 32)
    got = ours.stages.encode(ours.stages.complete(Request("a " * 100, negative_prompt_embeds=negative, seed=0)))
    assert got.hidden.shape[1] == 2 * 77
    assert torch.equal(got.negative_hidden, negative.repeat(1, 2, 1)), "attention does not notice"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd1", {"prompt": "a", "prompt_embeds": states(1, 1, 77, 32)}, "prompt and prompt_embeds were both given"),
        (
            "sd1",
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": states(1, 1, 77, 32)},
            "negative_prompt and negative_prompt_embeds were both given",
        ),
        (
            "sdxl",
            {"prompt_2": "a", "prompt_embeds": states(1, 1, 77, 72)},
            "prompt_2 and prompt_embeds were both given",
        ),
        ("sdxl", {"prompt_embeds": states(1, 1, 77, 72)}, "pooled_prompt_embeds is missing"),
        (
            "sdxl",
            {"prompt": "a", "negative_prompt_embeds": states(1, 1, 77, 72)},
            "negative_pooled_prompt_embeds is missing",
        ),
        ("sd1", {"prompt": "a", "negative_prompt_embeds": states(1, 1, 1999, 32)}, "which cannot be brought to one"),
        ("sd1", {"prompt": "a", "prompt_2": "b"}, "prompt_2 is 'b': only SDXL reads it"),
        ("sd1", {"prompt": "a", "original_size": (8, 8)}, "original_size is (8, 8): only SDXL reads it"),
        ("sd1", {"prompt": "a", "pooled_prompt_embeds": states(1, 1, 24)}, "only SDXL reads it"),
        ("sd1", {"prompt_embeds": states(1, 2, 77, 32), "negative_prompt": ["a"] * 3}, "3 texts for 2 prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unfit_branches_are_refused(pipes: Any, family: str, options: dict[str, Any], message: str) -> None:
    ours = pipes(family)[1]
    with pytest.raises(InputError) as caught:
        ours.stages.encode(ours.stages.complete(Request(**options, seed=0)))
    assert message in str(caught.value)
