"""GLIDE against a plain reference of its paper's equations, on random weights in its published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clients
import glide
import numpy as np
import pytest
import torch
from command import run
from pairs import generator
from PIL import Image
from torch import Tensor

from fastldm import Pipeline, Session
from fastldm.conditioning.tokenizer import GlideTokenizer
from fastldm.errors import CheckpointError, InputError
from fastldm.loading.glide import fast27
from fastldm.loading.single_file import read_layout
from fastldm.model import describe
from fastldm.models.unet_config import UNetConfig
from fastldm.planning import memory

PROMPT, NEGATIVE = "A red cat, it's 42!", "a dog"
Options = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glide")
    glide.write(path, "base")
    glide.write(path, "upsample", glide.UPSAMPLER)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder / "base.safetensors", dtype="float32")


@pytest.fixture(scope="module")
def upsampler(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder / "upsample.safetensors", dtype="float32")


def compare(made: Tensor, expected: Tensor) -> None:
    expected = (expected / 2 + 0.5).clamp(0, 1)
    assert made.shape == expected.shape
    assert made.std() > 0.05
    assert (made - expected).abs().max() < 1e-4


def drawing(batch: int, height: int = 16, width: int = 16) -> Any:
    g = generator()
    return lambda: torch.randn(batch, 3, height, width, generator=g)


CALLS: dict[str, Options] = {
    "plain": {},
    "a negative": {"negative_prompt": NEGATIVE, "guidance_scale": 5.0},
    "unguided": {"guidance_scale": 1.0},
    "several prompts": {"prompt": [PROMPT, "a cat"]},
    "a size": {"height": 24, "width": 32},
    "no text": {"prompt": ""},
    "times": {"timesteps": [900, 500, 0]},
    "one step": {"num_inference_steps": 1},
}


@pytest.mark.parametrize("case", [*CALLS])
def test_base_equals_its_equations(case: str, base: Pipeline) -> None:
    options = {"prompt": PROMPT, "num_inference_steps": 3, **CALLS[case]}
    prompts = options["prompt"] if isinstance(options["prompt"], list) else [options["prompt"]]
    times = options.get("timesteps") or [[999, 500, 0], [0]][options["num_inference_steps"] == 1]
    draw = drawing(len(prompts), options.get("height", 16), options.get("width", 16))
    scale, negative = options.get("guidance_scale", 3.0), options.get("negative_prompt", "")
    expected = glide.sample_base(glide.state(), prompts, negative, scale, times, draw)
    compare(base(**options, generator=generator(), output_type="pt").images, expected)


SMALL = torch.rand(1, 3, 5, 6, generator=generator(2))
ENLARGING: dict[str, Options] = {
    "its own timesteps": {},
    "ten steps": {"num_inference_steps": 10},
    "a size": {"height": 24, "width": 24, "num_inference_steps": 3},
}


@pytest.mark.parametrize("case", [*ENLARGING])
def test_upsampler_equals_its_equations(case: str, upsampler: Pipeline) -> None:
    options = ENLARGING[case]
    steps, size = options.get("num_inference_steps", 27), options.get("height", 32)
    times = fast27() if steps == 27 else np.linspace(0, 999, steps).round()[::-1].astype(int).tolist()
    weights, low = glide.state(glide.UPSAMPLER), SMALL * 2 - 1
    expected = glide.enlarge(weights, [PROMPT], low, size, times, drawing(1, size, size))
    made = upsampler(PROMPT, image=SMALL, **options, generator=generator(), output_type="pt").images
    compare(made, expected)


def test_fast27_is_the_published_list() -> None:
    assert fast27() == [  # 10, 10, 3, 2, 2 of five parts of 200, and 997 for 999
        *(997, 800, 799, 600, 599, 500, 400),
        *(399, 377, 355, 333, 311, 288, 266, 244, 222, 200),
        *(199, 177, 155, 133, 111, 88, 66, 44, 22, 0),
    ]


def test_defaults_are_the_published_ones(base: Pipeline, upsampler: Pipeline) -> None:
    for pipe, side, expected in ((base, 16, ("glide", 100, 3.0)), (upsampler, 32, ("glide-upsampler", 27, 1.0))):
        family = pipe.family
        assert (family.name, family.num_inference_steps, family.guidance_scale) == expected
        assert pipe.stages.spec.default_size == (side, side)


@pytest.mark.parametrize("name", [*glide.PUBLISHED])
def test_published_files_are_understood(name: str) -> None:
    layout = read_layout(glide.shapes(glide.PUBLISHED[name]), source=name)
    unet = UNetConfig.from_dict(layout.components["unet"].config)
    size = glide.PUBLISHED[name]
    assert unet.sample_size == ((64, 64) if name == "base" else (256, 256))
    assert [level.channels for level in unet.down] == [192 * times for times in size.mult]
    assert [level.attention == "added" for level in unet.down] == [k in size.attends for k in range(unet.levels)]
    assert {level.channels // level.heads for level in (*unet.down, unet.mid) if level.attention == "added"} == {64}
    assert (unet.cross_attention_dim, unet.time_embedding_dim, unet.out_channels) == (512, 768, 6)
    text = layout.components["text_encoder"].config
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["max_position_embeddings"]) == (16, 8, 128)
    assert not layout.ignored


def test_tokens_are_those_of_gpt2(folder: Path) -> None:
    tokenizer = GlideTokenizer(folder)
    for text in (PROMPT, "", "  two  spaces ", "Ünïcode — 日本語 🐈", "<|endoftext|> a", "a\n\nb_c"):
        assert tokenizer.ids(text) == glide.token_ids(text)
    assert (tokenizer.max_length, tokenizer.ends, tokenizer.pad) == (128, 0, tokenizer.size - 1)


def test_zipped_vocabulary_and_pickle_load(base: Pipeline, tmp_path: Path) -> None:
    import gzip

    path = glide.write(tmp_path, "base", pickled=True)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="is a pickle"):
        Pipeline.from_pretrained(path)
    loaded = Pipeline.from_pretrained(path, dtype="float32", allow_pickle=True)
    options: Options = {"num_inference_steps": 1, "seed": 4, "output_type": "np"}
    assert np.array_equal(loaded(PROMPT, **options).images, base(PROMPT, **options).images)


def test_requests_share_steps(base: Pipeline) -> None:
    queries: list[Options] = [
        {"prompt": PROMPT, "seed": 1},
        {"prompt": "a cat", "guidance_scale": 1.0, "seed": 2},
        {"prompt": "a (red:1.3) cat " * 12, "negative_prompt": NEGATIVE, "seed": 3, "num_images_per_prompt": 2},
    ]
    more: Options = {"num_inference_steps": 3, "output_type": "np"}
    with Session(base, max_batch=8) as session:
        together = [session.submit(**query, **more) for query in queries]
        for future, query in zip(together, queries, strict=True):
            made = future.result().images
            assert np.isfinite(made).all()
            assert np.abs(made - base(**query, **more).images).max() < 1e-4


def test_embeds_replace_texts(base: Pipeline) -> None:
    texts, pooled = glide.read_text(glide.state(), [glide.token_ids(text) for text in (PROMPT, "")])
    options: Options = {"num_inference_steps": 2, "seed": 4, "output_type": "np"}
    embeds = {"prompt_embeds": texts[:1], "pooled_prompt_embeds": pooled[:1]}
    embeds |= {"negative_prompt_embeds": texts[1:], "negative_pooled_prompt_embeds": pooled[1:]}
    assert np.abs(base(**embeds, **options).images - base(PROMPT, **options).images).max() < 1e-4


def test_both_stages_are_one_request(base: Pipeline, upsampler: Pipeline) -> None:
    """Equal to two calls, whose picture has whole bytes in between; of several requests they share steps."""
    options: Options = {"num_inference_steps": 3, "seed": 4}
    base.attach_upscaler(upsampler)
    try:
        both = base(PROMPT, **options, num_images_per_prompt=2, output_type="np").images
        alone = base("a cat", **options, output_type="np").images
        with Session(base, max_batch=4) as session:
            together = [session.submit(prompt, **options, output_type="np") for prompt in (PROMPT, "a cat")]
            made = [each.result().images[0] for each in together]
    finally:
        base.detach_upscalers()
    assert both.shape == (2, 32, 32, 3)
    assert np.abs(made[0] - both[0]).max() < 1e-3
    assert np.abs(made[1] - alone[0]).max() < 1e-3
    small = base(PROMPT, **options).images[0]
    g = torch.Generator().manual_seed(4)
    for _ in range(3):  # the start and two steps of the first stage draw before the second
        torch.randn(1, 3, 16, 16, generator=g)
    apart = upsampler(PROMPT, image=small, generator=g, output_type="np").images
    assert np.abs(both[0] - apart[0]).max() < 1e-3


def test_server_makes_pictures(base: Pipeline) -> None:
    with clients.client(base, models={"glide": "default"}) as http:
        body = {"prompt": PROMPT, "seed": 5, "num_inference_steps": 2}
        answer = http.post("/v1/images/generations", json=body).json()
        made = np.asarray(clients.picture(answer["data"][0]["b64_json"])).astype(int)
        expected = np.asarray(base(PROMPT, seed=5, num_inference_steps=2).images[0]).astype(int)
        assert np.abs(made - expected).max() <= 1


def test_what_glide_does_not_read_is_named(base: Pipeline, upsampler: Pipeline, tmp_path: Path) -> None:
    refused: dict[str, tuple[Pipeline, Options]] = {
        "clip_skip is 1: .* GLIDE's": (base, {"clip_skip": 1}),
        "only SDXL reads it": (base, {"prompt_2": "a dog"}),
        "noise_level is 3": (base, {"noise_level": 3}),
        "this model enlarges an image: give it image": (upsampler, {}),
        "enlarges a picture without noise": (upsampler, {"image": SMALL, "noise_level": 3}),
        "strength is 0.5": (upsampler, {"image": SMALL, "strength": 0.5}),
    }
    for message, (pipe, options) in refused.items():
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, **options)
    with pytest.raises(InputError, match=r"exports are of Stable Diffusion|not one that a bundle holds"):
        base.export(tmp_path / "out")


def changed(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {**glide.shapes(), name: shape}


def test_other_files_are_refused_by_name() -> None:
    refused: dict[str, dict[str, tuple[int, ...]]] = {
        "GLIDE for inpainting, of 7 input channels": changed("input_blocks.0.0.weight", 64, 7, 3, 3),
        "GLIDE for inpainting at 256x256": changed("input_blocks.0.0.weight", 64, 10, 3, 3),
        "'padding_embedding' is missing": {k: v for k, v in glide.shapes().items() if k != "padding_embedding"},
        "its padding_embedding is": changed("padding_embedding", 8, 128),
        "no GLIDE checkpoint has": changed("output_blocks.0.0.other.weight", 4),
        "its time has 32 channels": changed("time_embed.0.weight", 256, 32),
    }
    for message, shapes in refused.items():
        with pytest.raises(CheckpointError, match=message):
            read_layout(shapes, source="file")
    with pytest.raises(InputError, match="predicts epsilon"):
        read_layout(glide.shapes(), source="file", prediction_type="v_prediction")


def test_lack_of_vocabulary_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").symlink_to(folder / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"expected GPT-2's encoder\.json and vocab\.bpe"):
        Pipeline.from_pretrained(tmp_path / "base.safetensors")


def test_plan_counts_both_networks(folder: Path) -> None:
    spec = describe(folder / "base.safetensors")
    workload: Options = {"width": 16, "height": 16, "batch": 2, "dtype": torch.float32, "arch": 0}
    plan = memory.plan(memory.Workload.of_spec(spec, **workload))
    parameters = sum(x.numel() for x in glide.state().values())
    assert spec.parameters == parameters
    assert sum(line.bytes for line in plan.weights) == 4 * parameters


def test_command_makes_both_stages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (str(folder / f"{name}.safetensors") for name in ("base", "upsample"))
    done = run("generate", PROMPT, "-m", first, "--steps", "2", "--seed", "4", "-o", "small.png")
    assert done.exit_code == 0, done.stderr
    done = run("generate", PROMPT, "-m", second, "--image", "small.png", "--steps", "2", "-o", "large.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("large.png").size == (32, 32)
    done = run("generate", PROMPT, "-m", first, "--upscaler", second, "--steps", "2", "--seed", "4", "-o", "both.png")
    assert done.exit_code == 0, done.stderr
    assert Image.open("both.png").size == (32, 32)
    planned = run("plan", "-m", first, "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr
