"""Models that enlarge a picture, beside diffusers' pipelines on the same seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import diffusers
import lora
import numpy as np
import pytest
import tiny
import torch
from both_ways import both_ways
from pairs import Pairs, close, generator
from PIL import Image

from fastldm import Pipeline, Request
from fastldm.errors import CheckpointError, InputError
from fastldm.export.bundle import Bundle
from fastldm.export.verify import verify
from fastldm.loading import spec as loading
from fastldm.planning import memory


@pytest.fixture(scope="module")
def pipes() -> Pairs:
    return Pairs()


def picture(width: int = 16, height: int = 16, seed: int = 1) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image": picture(22, 17)},  # of no multiples of four: made smaller by bicubic interpolation
        {"image": torch.rand(1, 3, 17, 22, generator=generator(2))},  # and by the nearest pixel
        {"noise_level": 0, "guidance_scale": 1.0},
        {"noise_level": 350, "num_images_per_prompt": 2},
        {"prompt": ["a cat", "two dogs"], "image": [picture(), picture(seed=2)], "num_images_per_prompt": 2},
        {"prompt": ["a cat", "two dogs"], "image": [picture(), picture(seed=2)], "generator": "list"},
        {"num_images_per_prompt": 2, "generator": "list"},
        {"eta": 1.0, "negative_prompt": "blurry"},  # draws noise at every step, after the picture's and the latents'
        {"latents": torch.randn(1, 4, 16, 16, generator=generator(3))},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_x4_upscaler_matches_diffusers(pipes: Any, options: dict[str, Any]) -> None:
    theirs, ours = pipes("x4-upscaler")
    options = {"prompt": "a cat", "image": picture(), "num_inference_steps": 2, "output_type": "np", **options}
    many = options.pop("generator", None) == "list"

    def draws() -> Any:
        return [generator(1), generator(2)] if many else generator()

    close(ours(**options, generator=draws()).images, theirs(**options, generator=draws()).images)


def test_upscaler_of_a_folder_is_the_adopted_one(pipes: Any, tmp_path: Path) -> None:
    _, ours = pipes("x4-upscaler")
    loaded = Pipeline.from_pretrained(tiny.save_pipeline("x4-upscaler", tmp_path), dtype="float32")
    assert loaded.family.name == "x4-upscaler"
    assert (loaded.stages.spec.enlarges, loaded.stages.spec.max_noise_level) == (4, 350)
    options = {"image": picture(), "num_inference_steps": 2, "output_type": "np", "seed": 3}
    assert np.array_equal(loaded("a cat", **options).images, ours("a cat", **options).images)


def test_adapters_of_all_attentions_match_diffusers(tmp_path: Path) -> None:
    """Keys and values of its first attentions are of the text, too, and so computed once a prompt."""
    theirs, ours = tiny.pipeline("x4-upscaler"), Pipeline.from_diffusers(tiny.pipeline("x4-upscaler"))
    file = lora.write(tmp_path / "keys.safetensors", "x4-upscaler", unet=("attn1.to_k", "attn1.to_v"), text=())
    options = {"prompt": "a cat", "image": picture(), "num_inference_steps": 2, "output_type": "np"}
    plain = ours(**options, generator=generator()).images
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    ours.load_lora_weights(file)
    made = ours(**options, generator=generator()).images
    close(made, theirs(**options, generator=generator()).images)
    assert np.abs(made - plain).max() > 1e-3, "it has an effect"
    with pytest.raises(InputError, match="only_cross_attention"):
        ours.load_ip_adapter({"image_proj": {}, "ip_adapter": {}})


def test_enlarged_image_is_the_one_made_alone(pipes: Any) -> None:
    _, ours = pipes("x4-upscaler")
    options = {"num_inference_steps": 2, "output_type": "np"}
    both = ours(["a cat", "two dogs"], image=[picture(), picture(seed=2)], seed=[7, 9], **options)
    alone = ours("two dogs", image=picture(seed=2), seed=9, **options)
    assert both.images.shape == (2, 64, 64, 3)
    assert np.abs(both.images[1] - alone.images[0]).max() < 1e-5
    assert alone.request.noise_level == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "give it image"),
        ({"noise_level": 351}, "noise_level is 351: expected at most 350"),
        ({"strength": 0.5}, "strength is 0.5: this model enlarges image from noise"),
        ({"mask_image": picture()}, "mask_image was given"),
        ({"width": 128}, "4 times the picture, 64x64"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "image is latents"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents are for 32x32 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_upscaler_cannot_do_is_named(pipes: Any, options: dict[str, Any], message: str) -> None:
    _, ours = pipes("x4-upscaler")
    with pytest.raises(InputError, match=message):
        ours("a cat", **{"image": picture(), **options})


def test_noise_level_is_refused_elsewhere(pipes: Any) -> None:
    _, ours = pipes("sd1")
    with pytest.raises(InputError, match="only models that enlarge"):
        ours("a cat", noise_level=20)


def test_noise_levels_that_do_not_fit_are_refused() -> None:
    unet = tiny.unet("x4-upscaler", num_class_embeds=300)
    with pytest.raises(CheckpointError, match=r"'max_noise_level' is 350, expected less than 300"):
        Pipeline.from_diffusers(tiny.pipeline("x4-upscaler", unet=unet))


@pytest.mark.parametrize("arch", [0, 90])
def test_plan_of_an_upscaler_has_its_buffers(tmp_path: Path, arch: int) -> None:
    spec = loading.describe(tiny.save_pipeline("x4-upscaler", tmp_path))
    assert spec.default_size == (64, 64)
    plan = memory.plan(memory.Workload.of_spec(spec, width=64, height=64, batch=2, dtype=torch.float16, arch=arch))
    text = next(line for line in plan.buffers if line.name == "text")
    keys_and_values = 2 * 2 * 77 * 2 * sum(spec.unet.cross_widths) * 2  # slots, texts, tokens, k and v, of two bytes
    assert keys_and_values <= text.bytes < 1.01 * keys_and_values


@pytest.mark.full
@pytest.mark.parametrize("whole_picture", [False, True])
def test_upscalers_bundle_makes_the_same_images(whole_picture: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, bundle = bundles.exported(
        "x4-upscaler", whole_picture, bundles.shared(tmp_path_factory), whole_picture=whole_picture
    )
    checks = list(verify(Bundle.open(bundle), model=loading.describe(source)))
    assert [check.problem for check in checks if check.problem] == []
    options = {"image": picture(16, 8), "num_inference_steps": 3, "output_type": "np", "seed": 3, "noise_level": 77}
    expected = Pipeline.from_pretrained(source, dtype="float32", backend="torch")("a cat", **options).images
    for backend in ("onnxruntime", "onnxruntime-graph") if whole_picture else ("onnxruntime", "openvino"):
        made = Pipeline.from_pretrained(bundle, backend=backend, dtype="float32")("a cat", **options).images
        assert np.abs(made - expected).max() < 1e-4, backend


@pytest.mark.full
def test_upscalers_bundle_takes_adapters(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of both attentions, of which the first reads the text too."""
    folder = bundles.shared(tmp_path_factory)
    source, bundle = bundles.exported("x4-upscaler", True, folder, adapter_rank=4)
    assert [check.problem for check in verify(Bundle.open(bundle)) if check.problem] == []
    theirs = tiny.peer("diffusers").DiffusionPipeline.from_pretrained(source)
    file = lora.write(tmp_path_factory.mktemp("loras") / "all.safetensors", theirs, unet=lora.ALL)
    options = {"image": picture(16, 8), "num_inference_steps": 3, "output_type": "np", "seed": 3}
    images = []
    for path, backend in ((source, "torch"), (bundle, "onnxruntime")):
        pipe = Pipeline.from_pretrained(path, backend=backend, dtype="float32")
        plain = pipe("a cat", **options).images
        pipe.load_lora_weights(file)
        images.append(pipe("a cat", **options).images)
        assert np.abs(images[-1] - plain).max() > 1e-3
    assert np.abs(images[0] - images[1]).max() < 1e-4


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    folder = tiny.save_pixel_upscaler(tmp_path_factory.mktemp("pixels"))
    return folder, Pipeline.from_pretrained(folder, dtype="float32")


@torch.no_grad()
def enlarged(folder: Path, small: torch.Tensor, seeds: list[int], steps: int) -> np.ndarray:
    """What the model inside computes, as a plain loop: small (B, 3, h, w) in -1..1."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    base = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
    extra = torch.nn.functional.pixel_unshuffle(base, 4)
    latents = torch.cat([torch.randn(1, *extra.shape[1:], generator=generator(seed)) for seed in seeds])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = unet(torch.cat([latents, extra], 1), t, encoder_hidden_states=None).sample
        latents = scheduler.step(out, t, latents).prev_sample
    made = torch.nn.functional.pixel_shuffle(latents / 4.0 + extra, 4)
    return (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_pixel_upscaler_computes_a_plain_loop(pixels: tuple[Path, Pipeline]) -> None:
    folder, pipe = pixels
    small = torch.rand(2, 3, 14, 32, generator=generator(2)) * 2 - 1
    result = pipe(image=small, num_inference_steps=3, seed=[4, 7], output_type="np")
    assert result.images.shape == (2, 28, 64, 3)
    assert np.abs(result.images - enlarged(folder, small, [4, 7], 3)).max() < 1e-5
    again = pipe(image=small[1:], num_inference_steps=3, seed=7, output_type="np").images
    assert np.abs(result.images[1:] - again).max() < 1e-5
    assert result.request.prompt == ("", "")
    assert pipe.family.num_inference_steps == len(pipe(image=picture()).timings.steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "enlarges an image: give it image"),
        ({"prompt": "a cat", "image": picture()}, "prompt is 'a cat': this model reads no text"),
        ({"guidance_scale": 2.0, "image": picture()}, "no text to be guided by"),
        ({"noise_level": 1, "image": picture()}, "without noise"),
        ({"width": 64, "height": 64, "image": picture()}, "2 times the picture, 32x32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pixel_upscaler_does_not_read_is_named(
    pixels: tuple[Path, Pipeline], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pixels[1](**options)


def test_pixel_upscaler_is_planned(pixels: tuple[Path, Pipeline]) -> None:
    spec = loading.describe(pixels[0])
    assert spec.default_size == (64, 64)
    for arch in (0, 90):
        memory.plan(memory.Workload.of_spec(spec, width=64, height=64, batch=2, dtype=torch.float16, arch=arch))


@pytest.mark.full
def test_bundle_of_a_pixel_upscaler_enlarges(pixels: tuple[Path, Pipeline], tmp_path: Path) -> None:
    pytest.importorskip("fastldm.export.onnx", reason="exporting needs fastldm[onnx]", exc_type=ImportError)
    out = pixels[1].export(tmp_path / "out", split=True)
    assert {path.parent.name for path in out.rglob("model.onnx")} == {"time_rows", "unet_step"}
    options = {"image": picture(), "seed": 3, "output_type": "np"}
    made = Pipeline.from_pretrained(out, backend="onnxruntime", device="cpu")(**options).images
    assert np.abs(made - pixels[1](**options).images).max() < 1e-4


def test_slots_run_a_network_without_text(pixels: tuple[Path, Pipeline]) -> None:
    stages = pixels[1].stages
    request = stages.complete(Request(image=picture(), seed=3, num_inference_steps=2))
    assert torch.allclose(*both_ways(stages, request, rows=1, tokens=1), atol=1e-5)
