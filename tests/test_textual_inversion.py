"""Tokens on a loaded pipeline: what diffusers' load_textual_inversion gives, and changes while requests run."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adopted import image, small_pipeline
from counters import Recorder
from safetensors.torch import save_file
from torch import Tensor

from fastldm import CheckpointError, InputError, Pipeline, Request, Session
from fastldm.conditioning.text import Conditioning, encode_prompts
from fastldm.image import read_parameters, save_result
from fastldm.runtime.graph import Graphs

PROMPTS = ("a <thing> here", "<thing>", "two <thing><thing>s, <one>", "a<THING>b <one> <thing>_9", "<one>_1", "nothing")


def vectors(count: int, width: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@cache
def judge(family: str) -> Any:
    """diffusers' pipeline, to which nothing is added; tests that do copy it."""
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # says how it grows its table
    return tiny.pipeline(family)


def encoded(pipe: Pipeline, prompt: Any, negative: Any = None) -> Conditioning:
    return pipe.stages.encode(pipe.stages.complete(Request(prompt, negative_prompt=negative)))


def check_equal(pipe: Pipeline, peer: Any, prompt: str, negative: str) -> None:
    """Prompt embeds, and pooled vectors of SDXL. diffusers expands tokens only in their own case."""
    got = encoded(pipe, prompt, negative)
    spelled = [text.replace("<THING>", "<thing>") for text in (prompt, negative)]
    options = {"prompt": spelled[0], "negative_prompt": spelled[1], "device": "cpu"}
    theirs = peer.encode_prompt(**options, num_images_per_prompt=1, do_classifier_free_guidance=True)
    ours = (got.hidden, got.negative_hidden, got.pooled, got.negative_pooled)
    for mine, expected in zip(ours, theirs, strict=False):
        assert mine is not None
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_prompts_equal_diffusers(family: str, tmp_path: Path) -> None:
    peer, pipe = deepcopy(judge(family)), Pipeline.from_diffusers(judge(family))
    before = encoded(pipe, PROMPTS[0]).hidden
    for token, count in (("<thing>", 3), ("<one>", 1)):
        path = tmp_path / f"{count}.safetensors"
        save_file({token: vectors(count, seed=count)}, path)
        peer.load_textual_inversion(str(path))
        pipe.load_textual_inversion(path)
    for prompt in PROMPTS:
        check_equal(pipe, peer, prompt, "an ugly <one>, <thing>")
    assert (encoded(pipe, PROMPTS[0]).hidden - before).abs().max() > 0.1


def test_png_says_which_tokens_made_it(tmp_path: Path) -> None:
    """Those that are in its prompt or negative, each with the SHA-256 of its file; of tensors there is none."""
    pipe = Pipeline.from_diffusers(judge("sd1"))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("good", "bad", "idle")}
    for k, (name, file) in enumerate(files.items()):
        save_file({f"<{name}>": vectors(2, seed=k)}, file)
        pipe.load_textual_inversion(file)
    pipe.load_textual_inversion({"<tensor>": vectors(1)})
    prompts = ["a <GOOD> cat", "a <tensor>"]
    result = pipe(prompts, negative_prompt="<bad>", seed=0, num_inference_steps=1)
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in files.items()}
    assert result.embeddings == {f"<{name}>": digests[name] for name in ("good", "bad")}
    save_result(result, [tmp_path / "a.png", tmp_path / "b.png"], "tiny")
    fields = [read_parameters(tmp_path / f"{k}.png")[1] for k in "ab"]
    assert fields[0]["TI hashes"] == f"<good>: {digests['good']}, <bad>: {digests['bad']}"
    assert fields[1]["TI hashes"] == f"<bad>: {digests['bad']}"
    pipe.unload_textual_inversion("<good>")
    assert pipe("a <good> cat", num_inference_steps=1).embeddings == {}


def test_files_of_automatic1111_equal_diffusers(tmp_path: Path) -> None:
    peer, pipe = deepcopy(judge("sd1")), Pipeline.from_diffusers(judge("sd1"))
    save_file({"emb_params": vectors(3)}, tmp_path / "a.safetensors")
    old = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(1, seed=2)}, "name": "<one>", "step": 9}
    torch.save(old, tmp_path / "b.pt")
    peer.load_textual_inversion(str(tmp_path / "a.safetensors"), token="<thing>")  # which it reads with a token only
    peer.load_textual_inversion(str(tmp_path / "b.pt"))
    pipe.load_textual_inversion(tmp_path / "a.safetensors", token="<thing>")
    pipe.load_textual_inversion(tmp_path / "b.pt", allow_pickle=True)
    check_equal(pipe, peer, PROMPTS[2], "an ugly <one>, <thing>")


@pytest.mark.parametrize("eos", [tiny.VOCABULARY - 1, 2])
def test_sdxl_equals_diffusers(eos: int, tmp_path: Path) -> None:
    """diffusers needs two calls for a file of two encoders. eos 2: the pooled vector is that of the highest id."""
    peer = deepcopy(judge("sdxl"))
    peer.text_encoder_2.config.eos_token_id = peer.text_encoder_2.text_model.eos_token_id = eos
    pipe = Pipeline.from_diffusers(deepcopy(peer))
    both = {"clip_l": vectors(2, 32), "clip_g": vectors(2, 40, seed=2)}
    save_file(both, tmp_path / "thing.safetensors")
    pipe.load_textual_inversion(tmp_path / "thing.safetensors", token="<thing>")
    peer.load_textual_inversion({"<thing>": both["clip_l"]}, token="<thing>")
    second = {"text_encoder": peer.text_encoder_2, "tokenizer": peer.tokenizer_2}
    peer.load_textual_inversion({"<thing>": both["clip_g"]}, token="<thing>", **second)
    for prompt in PROMPTS[:3]:
        check_equal(pipe, peer, prompt, "no <thing>")

    peer.load_textual_inversion({"<one>": vectors(1)})  # the first encoder alone, as by default
    pipe.load_textual_inversion({"<one>": vectors(1)})
    pair = {"token": ["<s0>", "<s1>"]}
    pipe.load_textual_inversion(both["clip_g"], **pair, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    peer.load_textual_inversion(both["clip_g"], **pair, **second)
    check_equal(pipe, peer, "<one>, a <s1> with <s0>", "<one>")
    pipe.unload_textual_inversion("<thing>")
    for encoder in ({}, second):
        for name in ("<thing>", "<thing>_1"):  # it leaves the rest of a token
            peer.unload_textual_inversion(name, **encoder)
    check_equal(pipe, peer, "<one>, a <s1> with <thing>", "<one>")


def test_refiner_reads_the_second_encoders_vectors(tmp_path: Path) -> None:
    """Of a file for SDXL's two, of one for clip_g alone, and of one that does not say."""
    peer, pipe = deepcopy(judge("sdxl-refiner")), Pipeline.from_diffusers(judge("sdxl-refiner"))
    files = {"thing": ("clip_l", "clip_g"), "one": ("clip_g",), "s0": ("<s0>",)}
    second = {"text_encoder": peer.text_encoder_2, "tokenizer": peer.tokenizer_2}
    for seed, (name, keys) in enumerate(files.items()):
        own = {key: vectors(2, 32 if key == "clip_l" else 40, seed=seed) for key in keys}
        save_file(own, tmp_path / f"{name}.safetensors")
        pipe.load_textual_inversion(tmp_path / f"{name}.safetensors", token=f"<{name}>")
        peer.load_textual_inversion({f"<{name}>": own[keys[-1]]}, token=f"<{name}>", **second)
    check_equal(pipe, peer, "a <thing> here, <s0>", "no <one>")
    save_file({"clip_l": vectors(2)}, tmp_path / "first.safetensors")
    with pytest.raises(CheckpointError, match="it has no first text encoder"):
        pipe.load_textual_inversion(tmp_path / "first.safetensors")
    pipe.unload_textual_inversion("<one>", text_encoder=pipe.text_encoder_2)
    with pytest.raises(InputError, match="no token of textual inversion"):
        pipe.unload_textual_inversion("<one>")


def test_pictures_equal_diffusers() -> None:
    original = small_pipeline()
    peer, pipe = deepcopy(original), Pipeline.from_diffusers(original)
    peer.load_textual_inversion({"<thing>": vectors(3)})
    pipe.load_textual_inversion({"<thing>": vectors(3)})
    assert np.abs(image(pipe, "a <thing>") - image(peer, "a <thing>")).max() < 1e-3
    pipe.unload_textual_inversion()
    assert np.array_equal(image(pipe, "a <thing>"), image(Pipeline.from_diffusers(original), "a <thing>"))


def test_an_adopted_pipeline_keeps_its_own_tokens() -> None:
    peer = deepcopy(judge("sd1"))
    peer.load_textual_inversion({"<thing>": vectors(3)})
    pipe = Pipeline.from_diffusers(peer)
    both = deepcopy(peer)
    for each in (pipe, both):
        each.load_textual_inversion({"<one>": vectors(1)})
    check_equal(pipe, both, PROMPTS[2], "<one>")
    pipe.unload_textual_inversion()
    check_equal(pipe, peer, PROMPTS[2], "<one>")
    with pytest.raises(InputError, match="'<thing>' is no token of textual inversion that was loaded: none is loaded"):
        pipe.unload_textual_inversion("<thing>")
    with pytest.raises(InputError, match="'<thing>' is in the tokenizer already"):
        pipe.load_textual_inversion({"<thing>": vectors(3)})


# --- weights, and prompts of several windows


@pytest.fixture
def pipe() -> Pipeline:
    pipe = Pipeline.from_diffusers(judge("sd1"))
    pipe.load_textual_inversion([{"<thing>": vectors(3)}, {"<one>": vectors(1, seed=2)}])
    return pipe


def hidden(pipe: Pipeline, prompt: str) -> Tensor:
    return encode_prompts(pipe.stages.text_stages, prompt).hidden[0]


def test_a_weight_is_that_of_all_vectors(pipe: Pipeline) -> None:
    weighted, unweighted, empty = (hidden(pipe, text) for text in ("a (<thing>:1.3) cat", "a <thing> cat", ""))
    start = 1 + len(pipe.tokenizer.ids("a"))
    expected = unweighted.clone()
    own = slice(start, start + 3)
    expected[own] = empty[own] + 1.3 * (unweighted[own] - empty[own])
    assert (weighted - expected).abs().max() < 1e-5
    assert (weighted - unweighted).abs().max() > 0.01


@pytest.mark.parametrize("before", [71, 72, 73, 75])
def test_vectors_of_a_token_share_a_window(pipe: Pipeline, before: int) -> None:
    words = "! " * before
    assert len(pipe.tokenizer.ids(words)) == before
    got = hidden(pipe, f"{words}<thing> !")
    assert len(got) == (77 if before == 71 else 2 * 77)
    if before > 72:  # no room for three: it begins the next
        assert torch.equal(got, hidden(pipe, f"{words}BREAK <thing> !"))


def test_a_token_longer_than_a_window() -> None:
    pipe = Pipeline.from_diffusers(judge("sd1"))
    pipe.load_textual_inversion({"<long>": vectors(160)})
    assert len(hidden(pipe, "<long>")) == 3 * 77
    assert torch.equal(hidden(pipe, "! <long>")[77:], hidden(pipe, "<long>"))


# --- names


@pytest.mark.parametrize(
    ("token", "count", "message"),
    [
        ("<thing>", 1, "'<thing>' is loaded already"),
        ("<THING>", 1, "'<THING>' is in the tokenizer already"),
        ("<thing>_1", 1, "'<thing>_1' is in the tokenizer already"),
        ("<thing>_3", 1, "would become a vector of '<thing>'"),
        ("<one>_1", 2, "would become a vector of '<one>'"),
        ("the", 1, "'the' is in the tokenizer already"),
        ("The", 1, "'The' is in the tokenizer already"),
        ("<|endoftext|>", 1, "is in the tokenizer already"),
        ("a b", 1, "expected a text without spaces"),
        ("a\x07b", 1, "expected a text without spaces"),
    ],
)
def test_names_that_collide_are_refused(pipe: Pipeline, token: str, count: int, message: str) -> None:
    before = pipe.stages.text_stages
    with pytest.raises(InputError, match=message):
        pipe.load_textual_inversion([vectors(1), vectors(count)], token=["<new>", token])
    assert pipe.stages.text_stages is before  # nothing of the call


def test_part_of_a_loaded_token_is_refused() -> None:
    pipe = Pipeline.from_diffusers(judge("sd1"))
    pipe.load_textual_inversion(vectors(1), token="<new>_2")
    with pytest.raises(InputError, match=r"'<new>_2' is in the tokenizer already"):
        pipe.load_textual_inversion(vectors(3), token="<new>")
    with pytest.raises(InputError, match="'<new>_2' is a token: it would become a vector of '<new>'"):
        pipe.load_textual_inversion(vectors(2), token="<new>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": ["<a>", "<b>"]}, "token has 2 texts for 3 vectors"),
        ({"token": ["<a>", "<a>", "<b>"]}, "token has a text twice"),
        ({}, "does not say its token: pass token="),
        ({"token": 3}, "token is 3: expected a text or a list of texts"),
        (
            {"token": "<a>", "text_encoder": "text_encoder_2"},
            "text_encoder is 'text_encoder_2': expected pipe.text_enc",
        ),
        ({"token": "<a>", "tokenizer": 3}, "tokenizer is 3: expected"),
        ({"token": "<a>", "use_safetensors": True}, "unknown argument 'use_safetensors'"),
        ({"token": "<a>", "revision": 3}, "revision is 3"),
        ({"token": "<a>", "allow_pickle": "yes"}, "allow_pickle is 'yes'"),
    ],
)
def test_bad_arguments_are_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    before = pipe.stages.text_stages
    with pytest.raises(InputError, match=message):
        pipe.load_textual_inversion(vectors(3), **options)
    assert pipe.stages.text_stages is before


def test_files_of_another_model_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(CheckpointError, match=r"1024 channels, which are for SD 2; .*: its text encoder has 32"):
        pipe.load_textual_inversion(torch.zeros(1, 1024), token="<a>")
    with pytest.raises(CheckpointError, match="it has no second text encoder"):
        pipe.load_textual_inversion({"clip_l": vectors(1), "clip_g": vectors(1, 40)}, token="<a>")
    for source in ([], [vectors(1)] * 1001):
        with pytest.raises(InputError, match="is a list of"):
            pipe.load_textual_inversion(source)


def test_unloading_unknown_tokens_changes_nothing(pipe: Pipeline) -> None:
    before = pipe.stages.text_stages
    with pytest.raises(InputError, match=r"'<two>' is no token .*: loaded are '<thing>', '<one>'"):
        pipe.unload_textual_inversion(["<thing>", "<two>"])
    assert pipe.stages.text_stages is before
    pipe.unload_textual_inversion("<thing>")
    with pytest.raises(InputError, match="loaded are '<one>'"):
        pipe.unload_textual_inversion("<thing>")
    pipe.unload_textual_inversion()
    pipe.unload_textual_inversion()  # nothing is left, which is no error


# --- while requests run


def test_requests_under_way_keep_their_tokens() -> None:
    pipe = Pipeline.from_diffusers(small_pipeline())
    options = {"prompt": "a <thing>", "num_inference_steps": 4, "seed": 1, "output_type": "np"}
    pictures = {None: pipe(**options).images}
    for seed in (1, 2):
        pipe.load_textual_inversion({"<thing>": vectors(3, seed=seed)})
        pictures[seed] = pipe(**options).images
        pipe.unload_textual_inversion()
    assert np.abs(pictures[1] - pictures[2]).max() > 1e-3

    with Session(pipe) as session:
        running = session.submit(**options)
        steps = running.progress()
        next(steps)
        pipe.load_textual_inversion({"<thing>": vectors(3, seed=1)})
        joined = session.submit(**options)
        assert np.abs(running.result(60).images - pictures[None]).max() < 2e-5
        assert np.abs(joined.result(60).images - pictures[1]).max() < 2e-5


def test_swaps_from_threads_never_mix() -> None:
    """Each thread has a token of its own, and what it loads is there when it asks, whatever others do meanwhile."""
    pipe = Pipeline.from_diffusers(small_pipeline())
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
    expected = {}
    for k in range(3):
        pipe.load_textual_inversion({f"<t{k}>": vectors(2, seed=k)})
        expected[k] = pipe(f"a <t{k}>", **options).images
        pipe.unload_textual_inversion()

    def work(k: int) -> None:
        for _ in range(4):
            pipe.load_textual_inversion({f"<t{k}>": vectors(2, seed=k)})
            got = pipe(f"a <t{k}>", **options).images
            pipe.unload_textual_inversion(f"<t{k}>")
            assert np.abs(got - expected[k]).max() < 2e-5

    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(work, k) for k in range(3)]:
            future.result(60)
    assert not pipe.stages.text_stages[0].added


def test_a_swap_captures_nothing() -> None:
    """One graph serves all tokens: vectors are looked up before it."""
    pipe = Pipeline.from_diffusers(judge("sd1"))
    driver = Recorder()
    graphs = Graphs(driver)
    for seed in range(6):
        pipe.load_textual_inversion({"<thing>": vectors(1 + seed, seed=seed)})
        (stage,) = pipe.stages.text_stages
        got = encode_prompts([stage], "a <thing>", run=graphs.call).hidden
        assert torch.equal(got, encode_prompts([stage], "a <thing>").hidden)
        pipe.unload_textual_inversion()
    assert driver.calls == ["capture", *["replay"] * 4]


def test_weights_stay_where_they_are(pipe: Pipeline) -> None:
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    assert len(table) == tiny.VOCABULARY
    assert table.data_ptr() == judge("sd1").text_encoder.get_input_embeddings().weight.data_ptr()
    assert pipe.weights_changed() == []
