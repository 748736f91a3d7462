"""Step callbacks: what they are given and may change, held against diffusers' pipelines and its own callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from pairs import Pairs

from fastldm import InputError, Pipeline, Request, Session
from fastldm.runtime.batch import EagerBatch
from fastldm.runtime.denoise import Run
from fastldm.runtime.slots import Slots, StaticBuffers
from fastldm.runtime.stages import Change
from fastldm.serving.bucket import Bucket

Callback = Callable[..., Any]
STEPS = 3
TOLERANCE = 3e-4  # of latents up to 10
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": 30.0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs("sdxl")


def latents(pipe: Any, callback: Any = None, **options: Any) -> np.ndarray:
    start = torch.Generator().manual_seed(3)
    options = {**OPTIONS, "output_type": "latent", "generator": start, **options}
    return pipe(options.pop("prompt", "a cat"), callback_on_step_end=callback, **options).images.numpy()


def agree(pair: tuple[Any, Pipeline], callback: Any = None, **options: Any) -> np.ndarray:
    theirs, ours = (latents(pipe, callback, **options) for pipe in pair)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    return ours


# --- what it may change


def scale_latents(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9}


def scale_latents_in_place(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.9)
    return tensors


def less_guidance(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = pipe.guidance_scale * 0.8
    return tensors


def other_prompt(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if i == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.5
    return tensors


def cut_off(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As the documentation of diffusers has it."""
    if i == int(pipe.num_timesteps * 0.5):
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


def interrupt(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = i == 1
    return tensors


@pytest.mark.parametrize(
    ("callback", "names"),
    [
        (scale_latents, ["latents"]),
        (scale_latents_in_place, ["latents"]),
        (less_guidance, ["latents"]),
        (other_prompt, ["latents", "prompt_embeds", "negative_prompt_embeds"]),
        (cut_off, ["prompt_embeds"]),
        (interrupt, ["latents"]),
    ],
)
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "two dogs"]], ids=["one", "two"])
def test_callback_changes_match_diffusers(pipes: Any, callback: Callback, names: list[str], prompt: Any) -> None:
    pair = pipes("sd1")
    changed = agree(pair, callback, prompt=prompt, callback_on_step_end_tensor_inputs=names)
    assert np.abs(changed - latents(pair[1], prompt=prompt)).max() > 10 * TOLERANCE, "the callback changed nothing"


@pytest.mark.parametrize(
    ("family", "callback"),
    [
        ("sd1", SDCFGCutoffCallback(cutoff_step_ratio=0.5)),
        ("sd1", MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)])),
        ("sdxl", SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)),
    ],
)
def test_callbacks_of_diffusers_run_unchanged(pipes: Any, family: str, callback: Callback) -> None:
    pair = pipes(family)
    changed = agree(pair, callback)
    assert np.abs(changed - latents(pair[1])).max() > 10 * TOLERANCE, "the callback changed nothing"


def test_sdxl_callback_changes_match_diffusers(pipes: Any) -> None:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            tensors["add_time_ids"] = tensors["add_time_ids"] * 2
            tensors["add_text_embeds"] = -tensors["add_text_embeds"]
        return tensors

    pair = pipes("sdxl")
    changed = agree(pair, callback, callback_on_step_end_tensor_inputs=["add_time_ids", "add_text_embeds"])
    assert np.abs(changed - latents(pair[1])).max() > 10 * TOLERANCE


def test_callback_tensors_match_diffusers(pipes: Any) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    seen: list[dict[str, Any]] = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(tensors))
        return {}

    agree(pipes("sd1"), callback, prompt=["a cat", "dogs"], callback_on_step_end_tensor_inputs=names)
    for theirs, ours in zip(seen[:STEPS], seen[STEPS:], strict=True):
        assert list(ours) == names
        for name in names:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=2e-4)


def test_callback_latents_may_have_any_real_dtype(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    same = latents(ours, lambda pipe, i, t, tensors: {"latents": tensors["latents"].double()})
    np.testing.assert_allclose(same, latents(ours), atol=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "the callback returned 3: expected a dict"),
        ("no", "the callback returned 'no'"),
        (torch.zeros(2), "the callback returned a Tensor of shape"),
        ([("latents", 1)], "expected a dict"),
        ({"latents": "no"}, "the callback's latents is 'no': expected a floating point tensor (1, 4, 4, 4)"),
        ({"latents": torch.zeros(1, 4, 4, 5)}, "latents has shape (1, 4, 4, 5)"),
        ({"latents": torch.zeros(1, 4, 4, 4, dtype=torch.long)}, "latents has dtype torch.int64"),
        ({"latents": torch.zeros(1, 4, 4, 4, dtype=torch.complex64)}, "latents has dtype torch.complex64"),
        ({"latents": torch.zeros(1, 4, 4, 4, device="meta")}, "latents is on the meta device"),
        ({"latents": torch.full((1, 4, 4, 4), float("nan"))}, "latents holds NaN"),
        ({"latents": np.zeros((1, 4, 4, 4), np.float32)}, "expected a floating point tensor"),
        ({"latent": torch.zeros(1)}, "did you mean 'latents'?"),
        ({5: 5}, "the callback returned 5"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "prompt_embeds has 1 rows: expected 2, negatives first"),
        ({"prompt_embeds": torch.zeros(2, 78, 32)}, "prompt_embeds has shape (2, 78, 32)"),
        ({"prompt_embeds": None}, "prompt_embeds is None"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 32)}, "which no step reads"),
    ],
    ids=str,
)
def test_bad_callback_results_are_input_errors(pipes: Any, returned: Any, message: str) -> None:
    ours = pipes("sd1")[1]
    with pytest.raises(InputError) as caught:
        latents(ours, lambda *_: returned, num_inference_steps=1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback": 3}, "callback_on_step_end is 3: expected a function"),
        ({"callback": print, "callback_on_step_end_tensor_inputs": 3}, "is 3: expected a list"),
        ({"callback": print, "callback_on_step_end_tensor_inputs": ["mask"]}, "holds 'mask': expected some of latents"),
        ({"callback": print, "callback_on_step_end_tensor_inputs": ["add_time_ids"]}, "holds 'add_time_ids'"),
    ],
)
def test_callbacks_must_be_callable(pipes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        latents(pipes("sd1")[1], num_inference_steps=1, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("_guidance_scale", "high"), ("_guidance_scale", float("nan"))])
def test_call_attributes_take_numbers_only(pipes: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is"):
        latents(pipes("sd1")[1], lambda pipe, *_: setattr(pipe, name, value))


def test_guidance_without_negatives_is_refused(pipes: Any) -> None:
    def callback(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 3.0

    with pytest.raises(InputError, match="prompt_embeds has 1 rows: expected 2, negatives first, at guidance_scale 3"):
        latents(pipes("sd1")[1], callback, guidance_scale=1.0)


# --- whose call it is


def test_call_attributes_exist_only_in_callbacks(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    seen = []

    def callback(pipe: Any, *_: Any) -> None:
        guided = pipe.do_classifier_free_guidance
        seen.append((pipe.guidance_scale, guided, pipe.num_timesteps, pipe.interrupt, pipe.clip_skip))

    latents(ours, callback, guidance_rescale=0.3, clip_skip=1)
    assert seen == [(30.0, True, STEPS, False, 1)] * STEPS
    assert not hasattr(ours, "guidance_scale")
    assert ours.interrupt is False
    with pytest.raises(AttributeError, match="belongs to a call"):
        ours._guidance_scale = 3.0


def test_threads_have_separate_call_attributes(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    factors = (0.5, 0.7)

    def result(factor: float, meet: Callable[[], object]) -> np.ndarray:
        def callback(pipe: Any, i: int, *_: Any) -> None:
            meet()
            pipe._guidance_scale = pipe.guidance_scale * factor
            meet()

        return latents(ours, callback)

    with ThreadPoolExecutor(2) as pool:
        meet = threading.Barrier(2, timeout=60).wait
        together = list(pool.map(lambda factor: result(factor, meet), factors))
    for factor, changed in zip(factors, together, strict=True):
        np.testing.assert_allclose(changed, result(factor, lambda: None), atol=TOLERANCE)


def test_an_answer_in_the_middle_of_a_turn_counts(pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the changes of a turn were applied, and before its step; another request keeps the turns going."""
    ours, admit = pipes("sd1")[1], Bucket._admit

    def fifteen(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 15.0

    expected = latents(ours, fifteen)

    def answering(bucket: Bucket) -> None:
        for generation in bucket.running:
            if generation.paused:
                generation.answer(Change(guidance_scale=15.0, guidance_rescale=0.0))
        admit(bucket)

    monkeypatch.setattr(Bucket, "_admit", answering)
    other = ours.session.submit("a dog", **{**OPTIONS, "num_inference_steps": 60})
    request = Request("a cat", **OPTIONS, output_type="latent", generator=torch.Generator().manual_seed(3))
    answered = ours.session.submit_request(request, waits_for_answer=True)
    np.testing.assert_allclose(answered.result(60).images.numpy(), expected, atol=TOLERANCE)
    assert other.result(60)


def test_another_thread_interrupts_all_calls(pipes: Any) -> None:
    ours = pipes("sd1")[1]

    def callback(pipe: Any, i: int, *_: Any) -> None:
        if i == 1:
            stopper = threading.Thread(target=lambda: setattr(ours, "_interrupt", True))
            stopper.start()
            stopper.join(60)

    stopped = latents(ours, callback)
    np.testing.assert_array_equal(stopped, latents(ours, interrupt))


def test_interrupted_generations_are_decoded(pipes: Any) -> None:
    with Session(pipes("sd1")[1]) as session:
        generation = session.submit("a cat", num_inference_steps=200, seed=0)
        next(generation.progress())
        generation.interrupt()
        result = generation.result(timeout=60)
    assert 1 <= len(result.timings.steps) < 200
    assert result.images[0].size == (64, 64)


def test_return_dict_false_returns_a_tuple(pipes: Any) -> None:
    for family, length in (("sd1", 2), ("sdxl", 1)):
        theirs, ours = (pipe("a cat", return_dict=False, output_type="np", **OPTIONS) for pipe in pipes(family))
        assert type(ours) is type(theirs) is tuple
        assert len(ours) == len(theirs) == length
        assert ours[0].shape == theirs[0].shape


# --- in the batches


def test_slots_and_eager_batches_change_alike(pipes: Any) -> None:
    """A run reconditioned between two steps, beside one that is not."""
    ours = pipes("sdxl")[1]
    requests = [ours.stages.complete(_request(seed, prompt)) for seed, prompt in ((1, "a cat"), (2, "a dog"))]

    def runs() -> list[Run]:
        with torch.no_grad():
            return [ours.stages.prepare(request) for request in requests]

    def slots() -> Slots:
        buffers = StaticBuffers.empty(
            ours.unet.config, slots=2, rows=4, height=4, width=4, tokens=77, steps=STEPS, dtype=ours.dtype, device="cpu"
        )
        return Slots(ours.unet, buffers)

    results = []
    for batch in (EagerBatch(ours.unet), slots()):
        pair = runs()
        for run in pair:
            batch.admit(run)
        for k in range(STEPS):
            batch.step(pair)
            embeds, scale = pair[0].embeds, pair[0].guidance.scale
            if k == 0:
                embeds = embeds._replace(prompt_embeds=embeds.prompt_embeds * 0.5)
            if k == 1:
                embeds, scale = type(embeds)(*(x if x is None else x[-1:] for x in embeds)), 0.0
            if k < 2:
                with torch.no_grad():
                    ours.stages.change(batch, pair[0], Change(scale, 0.0, embeds=embeds))
        results.append([batch.latents(run) for run in pair])
    for eager, slot in zip(*results, strict=True):
        torch.testing.assert_close(slot, eager, atol=1e-4, rtol=1e-4)
    alone = torch.from_numpy(latents(ours, seed=2, generator=None, prompt="a dog"))
    torch.testing.assert_close(results[0][1], alone, atol=TOLERANCE, rtol=0)


def _request(seed: int, prompt: str) -> Request:
    return Request(prompt, seed=seed, **OPTIONS)
