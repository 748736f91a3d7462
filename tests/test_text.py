"""Text conditioning against diffusers: `encode_prompt` on tiny encoders with seeded random weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tokenizer_folders import SDXL2_NAMES, write_folder
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastldm.conditioning.prompt import parse_weights
from fastldm.conditioning.text import Conditioning, TextStage, encode_prompts
from fastldm.conditioning.tokenizer import EOS, Tokenizer, clip_vocabulary
from fastldm.errors import CheckpointError, InputError
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig

WINDOW = 16
CONTENT = WINDOW - 2
VOCABULARY = 1000
PROMPTS = ["a photo of a cat", "", "the end"]
NEGATIVES = ["ugly", "", "a man in the sea"]


class Judge:
    """diffusers' pipelines over tiny encoders, and fastldm's stages over the same weights and tokenizer folders."""

    def __init__(self, root: Path) -> None:
        settings = {"tokenizer_config.json": {**SDXL2_NAMES, "pad_token": EOS, "model_max_length": WINDOW}}
        first = write_folder(root / "tokenizer", *clip_vocabulary(VOCABULARY), settings)
        settings = {"tokenizer_config.json": {**SDXL2_NAMES, "model_max_length": WINDOW}}
        second = write_folder(root / "tokenizer_2", *clip_vocabulary(VOCABULARY), settings)
        torch.manual_seed(0)
        # widths differ so that mixed-up encoders fail; the two kinds of activation and of eos_token_id are both there
        first_encoder = tiny_encoder(CLIPTextModel, 32, hidden_act="quick_gelu", eos_token_id=2)
        second_encoder = tiny_encoder(CLIPTextModelWithProjection, 48, hidden_act="gelu", eos_token_id=VOCABULARY - 1)
        tokenizers = [CLIPTokenizer.from_pretrained(folder) for folder in (first, second)]
        nothing = {"vae": None, "unet": None, "scheduler": None}
        self.sd = StableDiffusionPipeline(
            text_encoder=first_encoder,
            tokenizer=tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **nothing,
        )
        self.sdxl = StableDiffusionXLPipeline(
            text_encoder=first_encoder,
            tokenizer=tokenizers[0],
            text_encoder_2=second_encoder,
            tokenizer_2=tokenizers[1],
            **nothing,
        )
        self.stages = [
            TextStage(Tokenizer(first), ours(first_encoder)),
            TextStage(Tokenizer(second), ours(second_encoder)),
        ]


def tiny_encoder(kind: Any, width: int, **options: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        projection_dim=24,
        bos_token_id=VOCABULARY - 2,
        pad_token_id=VOCABULARY - 1,
        **options,
    )
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and norms too, which start as zeros and ones
        parameter.add_(torch.randn_like(parameter) * 0.2)
    if kind is CLIPTextModel:
        # diffusers' clip_skip wants `text_model`, which transformers 5 took away; as a module it would be its own child
        object.__setattr__(model, "text_model", model)
    return model


def ours(judge: nn.Module) -> CLIPText:
    model = CLIPText(TextConfig.from_dict({**judge.config.to_dict(), "architectures": [type(judge).__name__]}))
    state = judge.state_dict()
    if isinstance(judge, CLIPTextModel):
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("judge"))


def assert_close(got: Tensor | None, expected: Tensor | None) -> None:
    """Two float32 implementations of a few layers: rounding only."""
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 3])
def test_sd_equals_diffusers(judge: Judge, clip_skip: int | None) -> None:
    got = encode_prompts(judge.stages[:1], PROMPTS, NEGATIVES, clip_skip=clip_skip).repeat(2)
    hidden, negative = judge.sd.encode_prompt(PROMPTS, "cpu", 2, True, NEGATIVES, clip_skip=clip_skip)
    assert_close(got.hidden, hidden)
    assert_close(got.negative_hidden, negative)
    assert got.pooled is None
    assert got.negative_pooled is None


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
@pytest.mark.parametrize("negatives", [NEGATIVES, [""] * 3, None], ids=["given", "empty", "none"])
def test_sdxl_equals_diffusers(judge: Judge, clip_skip: int | None, negatives: list[str] | None) -> None:
    assert judge.sdxl.config.force_zeros_for_empty_prompt
    got = encode_prompts(judge.stages, PROMPTS, negatives, clip_skip=clip_skip, zero_negative=True).repeat(2)
    expected = judge.sdxl.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=2, negative_prompt=negatives, clip_skip=clip_skip
    )
    assert_close(got.hidden, expected[0])
    assert_close(got.negative_hidden, expected[1])
    assert_close(got.pooled, expected[2])
    assert_close(got.negative_pooled, expected[3])
    assert bool(got.negative_hidden.any()) == (negatives is not None)


def test_second_encoder_alone_is_read_as_in_sdxl(judge: Judge) -> None:
    got = encode_prompts(judge.stages[1:], PROMPTS)
    both = encode_prompts(judge.stages, PROMPTS)
    assert_close(got.hidden, both.hidden[..., 32:])
    assert_close(got.pooled, both.pooled)
    assert got.negative_hidden is None
    assert got.negative_pooled is None


def test_one_negative_is_for_all_prompts(judge: Judge) -> None:
    got = encode_prompts(judge.stages[:1], PROMPTS, "ugly")
    _, negative = judge.sd.encode_prompt(PROMPTS, "cpu", 1, True, ["ugly"] * 3)
    assert_close(got.negative_hidden, negative)
    assert encode_prompts(judge.stages[:1], PROMPTS).negative_hidden is None


def test_full_window_equals_diffusers(judge: Judge) -> None:
    text = "a " * CONTENT
    assert len(judge.stages[0].tokenizer.ids(text)) == CONTENT
    got = encode_prompts(judge.stages[:1], text)
    assert_close(got.hidden, judge.sd.encode_prompt(text, "cpu", 1, False)[0])
    assert encode_prompts(judge.stages[:1], text + "a").hidden.shape[1] == 2 * WINDOW


def test_literal_prompts_and_escaped_ones_equal_diffusers(judge: Judge) -> None:
    text = "a (cat:1.3) [b]"
    expected = judge.sd.encode_prompt(text, "cpu", 1, False)[0]
    assert_close(encode_prompts(judge.stages[:1], text, literal=True).hidden, expected)
    assert_close(encode_prompts(judge.stages[:1], r"a \(cat:1.3\) \[b\]").hidden, expected)


def read(model: Any, ids: list[int], pad: int) -> Tensor:
    """transformers' states (W, D) of one window that holds these tokens."""
    window = [VOCABULARY - 2, *ids, VOCABULARY - 1]
    return model(torch.tensor([window + [pad] * (WINDOW - len(window))])).last_hidden_state[0]


def test_long_prompts_are_concatenated_windows(judge: Judge) -> None:
    text = "the man in the sea with a cat and the end of an hour in there, a man at sea in an hour"
    ids = judge.sd.tokenizer(text).input_ids[1:-1]
    assert 2 * CONTENT < len(ids) <= 3 * CONTENT
    got = encode_prompts(judge.stages[:1], text, "")
    windows = [ids[k : k + CONTENT] for k in range(0, len(ids), CONTENT)]
    assert_close(got.hidden[0], torch.cat([read(judge.sd.text_encoder, window, VOCABULARY - 1) for window in windows]))
    empty = read(judge.sd.text_encoder, [], VOCABULARY - 1)
    assert_close(got.negative_hidden[0], torch.cat([empty] * 3))


def test_pooled_is_of_first_window(judge: Judge) -> None:
    long = encode_prompts(judge.stages, "a " * CONTENT + "cat", "a " * CONTENT + "man", clip_skip=1)
    short = encode_prompts(judge.stages, "a " * CONTENT, "a " * CONTENT)
    assert_close(long.pooled, short.pooled)
    assert_close(long.negative_pooled, short.negative_pooled)


def test_repeated_windows_do_not_change_attention(judge: Judge) -> None:
    first, second, third = (word * CONTENT for word in ("a ", "the ", "of "))
    prompts = ["a cat", first + second, first + second + third]
    together = encode_prompts(judge.stages[:1], prompts, second + first)
    assert together.hidden.shape == together.negative_hidden.shape == (3, 6 * WINDOW, 32)
    query = torch.randn(1, 5, 32)
    for k, prompt in enumerate(prompts):
        alone = encode_prompts(judge.stages[:1], prompt)
        assert alone.hidden.shape[1] == (k + 1) * WINDOW
        expected = F.scaled_dot_product_attention(query, alone.hidden, alone.hidden)
        row = together.hidden[k : k + 1]
        assert_close(F.scaled_dot_product_attention(query, row, row), expected)


def test_lengths_without_small_multiple_use_longest(judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["a " * (count * CONTENT) for count in (7, 8, 9)]
    with caplog.at_level(logging.WARNING, "fastldm"):
        got = encode_prompts(judge.stages[:1], prompts)
        assert got.hidden.shape[1] == 9 * WINDOW
        assert "7, 8, 9 windows" in caplog.text
        caplog.clear()
        longest = encode_prompts(judge.stages[:1], "a " * (70 * CONTENT))  # alone it may be as long as it likes
    assert longest.hidden.shape[1] == 70 * WINDOW
    assert not caplog.records


def test_break_starts_next_window(judge: Judge) -> None:
    """AUTOMATIC1111's rule: each part is read in windows of its own, and a BREAK at the end begins nothing."""
    stages = judge.stages

    def hidden(text: str, **options: Any) -> Tensor:
        return encode_prompts(stages, text, **options).hidden

    cat, dog, empty = hidden("a cat"), hidden("a dog"), hidden("")
    assert_close(hidden("a cat BREAK a dog"), torch.cat([cat, dog], dim=1))
    assert_close(hidden("a cat BREAK"), cat)
    assert_close(hidden("BREAK a cat"), torch.cat([empty, cat], dim=1))
    assert_close(hidden("a cat BREAK BREAK a dog"), torch.cat([cat, empty, dog], dim=1))
    full = "a " * CONTENT
    assert_close(hidden(f"{full} BREAK a dog"), torch.cat([hidden(full), dog], dim=1))
    assert_close(encode_prompts(stages, "a cat BREAK a dog").pooled, encode_prompts(stages, "a cat").pooled)
    assert hidden("a BREAK b", literal=True).shape[1] == WINDOW


def test_second_encoder_reads_second_prompt(judge: Judge) -> None:
    got = encode_prompts(judge.stages, ["a cat", "a dog"], "ugly", prompts_2=["sea", "end"], negatives_2="there")
    first = encode_prompts(judge.stages, ["a cat", "a dog"], "ugly")
    second = encode_prompts(judge.stages, ["sea", "end"], "there")
    for both, a, b in (
        (got.hidden, first.hidden, second.hidden),
        (got.negative_hidden, first.negative_hidden, second.negative_hidden),
    ):
        assert_close(both[..., :32], a[..., :32])
        assert_close(both[..., 32:], b[..., 32:])
    assert_close(got.pooled, second.pooled)
    assert_close(got.negative_pooled, second.negative_pooled)


def test_many_windows_are_encoded_in_groups(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastldm.conditioning.text.MAX_WINDOWS", 2)
    counts: list[int] = []

    def run(key: Any, function: Any, ids: Tensor) -> Any:
        counts.append(len(ids))
        return function(ids)

    prompts = ["a cat", "a dog", "sea", "end", "there"]
    got = encode_prompts(judge.stages, prompts, run=run)
    assert counts == [2, 2, 1] * 2
    monkeypatch.undo()
    expected = encode_prompts(judge.stages, prompts)
    assert_close(got.hidden, expected.hidden)
    assert_close(got.pooled, expected.pooled)


def test_encoders_with_unequal_windows_are_padded(judge: Judge) -> None:
    text = "!! " * 10  # ten tokens to the first tokenizer, twenty to the second, where `!` is a token by itself
    assert [len(stage.tokenizer.ids(text)) > CONTENT for stage in judge.stages] == [False, True]
    got = encode_prompts(judge.stages, text)
    assert got.hidden.shape == (1, 2 * WINDOW, 80)
    empty = encode_prompts(judge.stages, "").hidden[0, :, :32]
    expected = encode_prompts(judge.stages[1:], text)
    assert_close(got.hidden[..., 32:], expected.hidden)
    assert_close(got.hidden[0, WINDOW:, :32], empty)
    assert_close(got.pooled, expected.pooled)


def test_weights_scale_distance_from_empty_prompt(judge: Judge) -> None:
    weighted = "a (cat:1.5) in the (sea:-2) [there] (end:1)"
    tokenizer = judge.stages[0].tokenizer
    weights = torch.ones(WINDOW)
    position = 1
    for text, weight in parse_weights(weighted):
        count = len(tokenizer.ids(text))
        weights[position : position + count] = weight
        position += count
    assert len(weights.unique()) == 4
    unweighted, empty = encode_prompts(judge.stages[:1], ["a cat in the sea there end", ""]).hidden
    got, neighbour = encode_prompts(judge.stages[:1], [weighted, "a man"]).hidden
    assert_close(got, empty + weights[:, None] * (unweighted - empty))
    assert got[weights == 1].equal(unweighted[weights == 1])
    assert_close(neighbour, encode_prompts(judge.stages[:1], "a man").hidden[0])


def test_weights_reach_all_encoders_negatives_and_later_windows(judge: Judge) -> None:
    long = "a " * CONTENT
    got = encode_prompts(judge.stages, f"{long}(cat:2)", f"{long}(man:3)", clip_skip=1)
    unweighted = encode_prompts(judge.stages, f"{long}cat", f"{long}man", clip_skip=1)
    empty = encode_prompts(judge.stages, "", "", clip_skip=1)
    cat, man = WINDOW + 1, WINDOW + 1
    for weight, position, x, y, e in (
        (2, cat, got.hidden, unweighted.hidden, empty.hidden),
        (3, man, got.negative_hidden, unweighted.negative_hidden, empty.negative_hidden),
    ):
        assert_close(x[0, position], e[0, 1] + weight * (y[0, position] - e[0, 1]))
        assert_close(x[:, :position], y[:, :position])
    assert_close(got.pooled, unweighted.pooled)


def in_dtype(stage: TextStage, dtype: torch.dtype) -> TextStage:
    model = CLIPText(stage.model.config)
    model.load_state_dict(stage.model.state_dict())
    return TextStage(stage.tokenizer, model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(judge: Judge, dtype: torch.dtype) -> None:
    first, second = (in_dtype(stage, dtype) for stage in judge.stages)
    got = encode_prompts([first], "a (((cat:9))) (sea:1000)", "")
    assert got.hidden.dtype == got.negative_hidden.dtype == dtype
    assert got.hidden.isfinite().all()
    # SDXL's encoders may differ in it: diffusers takes the second's
    for stages in ((judge.stages[0], second), (first, judge.stages[1])):
        got = encode_prompts(stages, "a cat", "")
        assert got.hidden.dtype == got.pooled.dtype == next(stages[1].model.parameters()).dtype


def test_distinct_windows_are_encoded_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = CLIPText.forward

    def counted(self: CLIPText, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(CLIPText, "forward", counted)
    encode_prompts(judge.stages[:1], ["a cat"] * 4, "")
    assert rows == [2]
    encode_prompts(judge.stages[:1], ["a cat", "a (cat)"], ["ugly", ""])
    assert rows == [2, 3]


def test_window_is_limited_by_encoder_positions(judge: Judge) -> None:
    stage = TextStage(Tokenizer(), judge.stages[0].model)
    assert stage.window == WINDOW
    with pytest.raises(CheckpointError, match=r"id 49407 but the text encoder has 1000 embeddings"):
        encode_prompts([stage], "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": None}, "prompt is None"),
        ({"prompts": []}, "prompt is an empty list"),
        ({"prompts": ["a"] * 3, "negatives": ["b"] * 2}, "negative_prompt has 2 texts for 3 prompts"),
        ({"prompts": "a", "negatives": 3}, "negative_prompt is 3"),
        ({"prompts": "a", "prompts_2": ["b"] * 2}, "prompt_2 has 2 texts for 1 prompts"),
        ({"prompts": "a " * 10_000}, "has more than the 1792 tokens that it may have"),
        ({"prompts": "BREAK " * 200}, "has more than the 1792 tokens that it may have"),
        ({"prompts": "a", "clip_skip": 3}, "clip_skip is 3: expected a whole number, 0 to 2"),
        ({"prompts": "a", "clip_skip": -1}, "clip_skip is -1"),
        ({"prompts": "a", "clip_skip": 1.5}, "clip_skip is 1.5"),
    ],
)
def test_bad_calls_are_input_errors(judge: Judge, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_prompts(judge.stages, **options)


def test_repeat_and_select() -> None:
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 5), torch.randn(2, 3, 4), None]
    conditioning = Conditioning(*tensors)
    repeated = conditioning.repeat(2)
    assert repeated.hidden.equal(tensors[0][[0, 0, 1, 1]])
    assert repeated.pooled.equal(tensors[1][[0, 0, 1, 1]])
    assert repeated.select([3, 0]).negative_hidden.equal(tensors[2][[1, 0]])
    assert repeated.negative_pooled is None
