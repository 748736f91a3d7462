"""The whole way from prompt to picture, held against diffusers' pipelines on seeded random weights."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pairs import Pairs, close, generator
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import fastldm
from fastldm import InputError, NonFinite, OutOfMemory, Pipeline, Request
from fastldm.planning import memory


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs()


# what each family is normally run with: guided, or distilled and not


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask_array = np.zeros((64, 64), np.uint8)
    mask_array[16:48, 8:40] = 255
    return Image.fromarray(mask_array)


def test_latents_of_another_size_are_refused(pipes: Any, mask: Image.Image) -> None:
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(InputError, match="image is latents for 64x64 pixels, not 128x64"):
        pipes("sd1")[1]("a cat", image=latents, width=128)
    with pytest.raises(InputError, match="needs pixels"):
        pipes("sd1-inpaint")[1]("a cat", image=latents, mask_image=mask)


def test_images_that_cannot_fit_are_never_decoded(pipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9000, 9000)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 2**20
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    with pytest.raises(OutOfMemory, match="9000x9000"):
        pipes("sd1")[1]("a cat", image=tmp_path / "large.png")


def test_results_name_what_ran(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    listed = ours("a cat", timesteps=[900, 500, 200], sampler="dpm++ 2m", seed=1)
    assert listed.request.num_inference_steps == 3
    assert listed.seeds == (1,)
    assert ours("a cat", latents=torch.randn(1, 4, 8, 8), num_inference_steps=1).seeds == ()


def test_prompt_embeds_in_place_of_a_prompt(pipes: Any) -> None:
    theirs, ours = pipes("sdxl")
    embeds = theirs.encode_prompt("a cat", negative_prompt="x", device="cpu")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", "height": 64, "width": 64}
    arguments = dict(zip(names, embeds, strict=True))
    close(
        ours(**arguments, **options, generator=generator()).images,
        ours("a cat", negative_prompt="x", **options, generator=generator()).images,
    )


def test_a_saved_folder_makes_the_same_image(tmp_path: Path, pipes: Any) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    close(loaded("a cat", **options).images, pipes("sd1")[1]("a cat", **options).images)


def test_adopted_weights_are_shared(pipes: Any) -> None:
    theirs, ours = pipes("sd1")
    assert ours.unet.conv_in.weight.data_ptr() == theirs.unet.conv_in.weight.data_ptr()


# --- one picture of many


def test_batched_images_match_single_images(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    options = {"num_inference_steps": 3, "sampler": "euler a", "output_type": "np"}
    batch = ours(["a cat", "a dog"], num_images_per_prompt=2, seed=7, **options)
    assert batch.seeds == (7, 8, 9, 10)
    for k, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
        close(batch.images[k : k + 1], ours(prompt, seed=7 + k, **options).images)
    listed = ours(["a cat", "a dog"], seed=[9, 3], **options)
    close(listed.images[:1], ours("a cat", seed=9, **options).images)


def test_equal_calls_give_equal_bytes(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    first, second = (ours("a cat", seed=1, num_inference_steps=2, output_type="np").images for _ in range(2))
    assert np.array_equal(first, second)
    reseeded = ours("a cat", seed=2, num_inference_steps=2, output_type="np").images
    assert np.abs(first - reseeded).max() > 0.01


def test_two_threads_may_share_a_pipeline(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    jobs = [
        {"prompt": f"thing {k}", "seed": k, "sampler": name, "num_inference_steps": 2 + k % 2, "output_type": "np"}
        for k, name in enumerate(["ddim", "euler a", "unipc", "dpm++ 2m"])
    ]
    alone = [ours(**job).images for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: ours(**job).images, jobs))
    for expected, got in zip(alone, together, strict=True):
        assert np.abs(expected - got).max() < 1e-5, "steps are taken together, and sums rounded otherwise"


# --- how much work a call is


class Counted:
    """Rows of each U-Net pass."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        step = pipe.unet.step

        def counting(model_input: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.rows.append(model_input.shape[0])
            return step(model_input, *rest)

        monkeypatch.setattr(pipe.unet, "step", counting)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"guidance_scale": 5.0}, [2, 2, 2, 2]),
        ({"guidance_scale": 1.0}, [1, 1, 1, 1]),
        ({"guidance_scale": 0.0}, [1, 1, 1, 1]),
        ({"guidance_scale": 5.0, "guidance_interval": (0.25, 0.75)}, [1, 2, 2, 1]),
    ],
    ids=str,
)
def test_guidance_doubles_the_rows(
    pipes: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], rows: list[int]
) -> None:
    ours = pipes("sd1")[1]
    counted = Counted(ours, monkeypatch)
    ours("a cat", sampler="ddim", num_inference_steps=4, seed=0, **options)
    assert counted.rows == rows


def test_embedded_guidance_needs_no_second_row(pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pipes("lcm")[1]
    counted = Counted(ours, monkeypatch)
    ours("a cat", seed=0, guidance_scale=8.0)
    assert counted.rows == [1] * 4, "four steps are the family's default"


def test_cfg_pp_is_guided_below_scale_one(pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default at 0.6; with the interval, and never where the scale or its rescale mean something else."""
    ours, distilled = pipes("sd1")[1], pipes("lcm")[1]
    counted = Counted(ours, monkeypatch)
    ours("a cat", sampler="dpm++ 2m cfg++", num_inference_steps=4, seed=0, guidance_interval=(0.0, 0.5))
    assert counted.rows == [2, 2, 1, 1]
    completed = ours.stages.complete(Request("a cat", sampler="Euler CFG++"))
    assert completed.guidance_scale == 0.6
    with pytest.raises(InputError, match="'euler cfg\\+\\+' is CFG\\+\\+, and guidance_rescale is above 0"):
        ours("a cat", sampler="euler cfg++", guidance_rescale=0.5)
    with pytest.raises(InputError, match="this model reads the guidance scale itself"):
        distilled("a cat", sampler="euler cfg++")


# --- callback, result, output


def test_the_signature_names_every_field_of_a_request() -> None:
    parameters = inspect.signature(Pipeline.__call__).parameters
    assert {field.name for field in dataclasses.fields(Request)} <= set(parameters)
    assert {"callback_on_step_end", "progress"} <= set(parameters)


def test_callbacks_see_each_step(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    seen: list[tuple[int, float]] = []

    def watch(pipe: Pipeline, i: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert pipe is ours
        seen.append((i, t))
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 2 else {}

    result = ours("a cat", sampler="ddim", num_inference_steps=3, callback_on_step_end=watch, output_type="latent")
    assert [i for i, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    assert result.images.abs().max() == 0


def test_cancelled_leaves_the_pipeline_usable(pipes: Any) -> None:
    ours = pipes("sd1")[1]

    def stop(*_: Any) -> None:
        raise fastldm.Cancelled("enough")

    with pytest.raises(fastldm.Cancelled, match="enough"):
        ours("a cat", callback_on_step_end=stop)
    assert ours("a cat", num_inference_steps=1).images[0].size == (64, 64)


def test_results_have_request_seeds_and_timings(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    result = ours(Request(prompt="a cat", num_inference_steps=3, sampler="ddim"))
    assert (result.backend, result.dtype) == ("torch", "float32")
    assert len(result.timings.steps) == 3
    components = result.timings.text + sum(result.timings.steps) + result.timings.decode
    assert 0 < components <= result.timings.total
    assert (result.request.height, result.request.guidance_scale) == (64, 7.5)
    assert ours("a cat", num_inference_steps=1).request.sampler == "plms", "the checkpoint's own, by name"
    again = ours("a cat", num_inference_steps=3, sampler="ddim", seed=result.seeds[0])
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(again.images[0]))


def test_output_types_agree(pipes: Any) -> None:
    ours = pipes("sd1")[1]
    pil, array, tensor, latent = (
        ours("a cat", seed=0, num_inference_steps=1, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(tensor.movedim(1, -1).numpy(), array)
    assert latent.shape == (1, 4, 8, 8)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt is None"),
        ({"height": 60}, "height is 60: expected a multiple of 8 pixels for this model, such as 64"),
        ({"width": 3}, "width is 3: expected a multiple of 8 pixels for this model, such as 8"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents have shape (2, 4, 8, 8): expected (1, 4, "),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents hold NaN or infinity before the first step"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 128}, "latents are for 64x64 pixels, not 64x128"),
        ({"generator": [torch.Generator()] * 2}, "a list of one for each of 1 pictures"),
        ({"generator": 3}, "generator is 3"),
        ({"sampler": "eulr"}, "euler"),
        ({"image": np.zeros((3, 64, 64, 3)), "num_inference_steps": 2}, "image holds 3 pictures for a batch of 1"),
        ({"image": np.zeros((64, 64, 3)), "strength": 0.2, "num_inference_steps": 2}, "leaves none"),
        ({"steps": 4}, "unknown argument 'steps'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(pipes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pipes("sd1")[1](**{"prompt": "a cat", **options})
    assert message in str(caught.value)


def test_inpainting_models_need_image_and_mask(pipes: Any) -> None:
    with pytest.raises(InputError, match="this model is for inpainting: give it image and mask_image"):
        pipes("sd1-inpaint")[1]("a cat")


def test_a_size_beyond_memory_is_refused_before_any_work(pipes: Any) -> None:
    says = r"1 picture of 800000x800000 need .* GiB beside the weights, and .* GiB are free: ask for a smaller size"
    with pytest.raises(OutOfMemory, match=says):
        pipes("sd1")[1]("a cat", height=800000, width=800000)


def test_allocator_failures_are_out_of_memory(pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pipes("sd1")[1]

    def fails(*_: Any) -> None:
        torch.empty(2**56)

    monkeypatch.setattr(ours.vae, "decoding", lambda: [fails])
    with pytest.raises(OutOfMemory, match="memory ran out"):
        ours("a cat", num_inference_steps=1)


def test_sizes_off_the_unets_stride_run(pipes: Any) -> None:
    assert pipes("sd1")[1]("a cat", height=72, width=88, num_inference_steps=1).images[0].size == (88, 72)


def test_nan_names_its_step(pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pipes("sd1")[1]
    calls: list[int] = []

    def broken(model_input: torch.Tensor, *_: Any) -> torch.Tensor:
        calls.append(1)
        return torch.full_like(model_input, float("nan")) if len(calls) == 3 else model_input

    monkeypatch.setattr(ours.unet, "step", broken)
    with pytest.raises(NonFinite, match="after step 3 of 4"):
        ours("a cat", sampler="ddim", num_inference_steps=4)


def test_overflowing_decodes_are_retried_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    exact = Pipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    ours = Pipeline.from_pretrained(tmp_path, dtype="bfloat16", device="cpu")
    decoding = type(ours.vae).decoding

    def overflows(self: Any) -> list[Any]:
        return [*decoding(self), lambda x: x * (float("inf") if x.dtype == torch.bfloat16 else 1.0)]

    monkeypatch.setattr(type(ours.vae), "decoding", overflows)
    start = torch.randn(1, 4, 8, 8, generator=generator())
    options = {"latents": start, "num_inference_steps": 1, "output_type": "np"}
    images = ours("a cat", **options).images
    assert "once more in float32" in caplog.text
    assert np.abs(images - exact("a cat", **options).images).mean() < 0.02


def test_half_precision_is_close_to_float32(tmp_path: Path) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    exact, bfloat16 = (
        Pipeline.from_pretrained(tmp_path, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")
    )
    options = {"seed": 0, "num_inference_steps": 3, "output_type": "np"}
    error = exact("a cat", **options).images - bfloat16("a cat", **options).images
    assert bfloat16.dtype == torch.bfloat16
    assert np.sqrt((error**2).mean()) < 0.02


def test_float16_on_a_cpu_warns_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    ours = Pipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, device="cpu")
    assert ours.dtype in (torch.float32, torch.bfloat16)
    assert "float16 is slow or missing on CPUs" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"), [({"device": "warp:9"}, "cannot be used here"), ({"dtype": "int8"}, "int8")]
)
def test_unknown_devices_and_dtypes_are_refused(tmp_path: Path, option: dict[str, str], message: str) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(tmp_path, **option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU threads")
def test_small_steps_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a second thread makes the default model's picture ten times slower, not faster."""

    pipe, before, seen = fastldm.Pipeline.default(), torch.get_num_threads(), []
    step = pipe.unet.step

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "step", watched)
    monkeypatch.setattr("fastldm.openmp.cpus", lambda: 8)
    try:
        torch.set_num_threads(3)
        for work_per_thread in (8e9, 1e9, 1e3):
            monkeypatch.setattr("fastldm.runtime.stages._OPERATIONS_PER_THREAD", work_per_thread)
            pipe("a cat", num_inference_steps=2)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 2, 3, 3]
