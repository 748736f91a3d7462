"""The model that ships inside: a standard diffusers folder, small, and as good as its committed measurements say."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import fastldm
from benchmarks.default_data import COMMON_WORDS, choose_concepts, plural
from benchmarks.default_model import cleanness
from fastldm.cli import main
from fastldm.loading.spec import DEFAULT_MODEL

ROOT = Path(fastldm.__file__).resolve().parent.parent
GATES = ROOT / "benchmarks" / "results" / "default_model.json"


@pytest.fixture(scope="module")
def pipe() -> fastldm.Pipeline:
    return fastldm.Pipeline.default(device="cpu", dtype="float32")


def test_diffusers_computes_the_same_image(pipe: fastldm.Pipeline) -> None:
    peer = diffusers.StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "np"}
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = pipe("a red apple", latents=start, **options).images
    expected = peer("a red apple", latents=start, **options).images
    assert np.abs((ours * 255).round() - (expected * 255).round()).max() <= 1


def test_folder_is_small_and_documented() -> None:
    size = sum(path.stat().st_size for path in DEFAULT_MODEL.rglob("*") if path.is_file())
    assert size <= 40e6
    card = (DEFAULT_MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    for notice in ("Noto Emoji", "Fluent", "MIT", "Apache"):
        assert notice in card


def test_committed_gates_are_of_these_weights() -> None:
    measured = json.loads(GATES.read_text())
    weights = DEFAULT_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    name = str(weights.relative_to(DEFAULT_MODEL))
    assert measured["weights (sha256)"][name] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_family_gives_steps_guidance_and_size(pipe: fastldm.Pipeline) -> None:
    assert pipe.family.name == "small"
    result = pipe("a red apple", seed=0)
    assert (len(result.timings.steps), result.request.guidance_scale, result.images[0].size) == (4, 2.0, (64, 64))


def test_cleanness_is_measured_on_flat_areas() -> None:
    rng = np.random.default_rng(0)
    own = np.full((1, 64, 64, 3), 255, np.uint8)
    own[:, 16:48, 16:48] = (200, 30, 30)  # one colour in the middle of white
    noisy = rng.integers(0, 256, own.shape, np.uint8)
    true = own[0].astype(np.float32) / 255
    assert max(cleanness(true[None], [np.concatenate([noisy, own])])) < 1e-3
    noise = rng.normal(0, 0.02, true.shape).astype(np.float32)
    center = np.zeros_like(true)
    center[16:48, 16:48] = 1
    rmse, flat = cleanness((true + noise * center)[None], [own])
    assert abs(rmse - 255 * 0.02 / 2) < 0.2  # a quarter of the picture
    assert abs(flat - 255 * 0.02) < 0.3
    assert cleanness((true + noise * (1 - center))[None], [own])[1] < 1e-3  # white does not count
    assert cleanness((true + 0.1 * center)[None], [own])[1] < 1e-3  # another colour is no blot


def test_concepts_are_selected_by_group_and_frequency(tmp_path: Path) -> None:
    def emoji(name: str, group: str = "Food & Drink", sets: str = "noto fluent-emoji-flat fluent-emoji") -> dict:
        return {"name": name, "tags": [], "group": group, "sets": sets.split()}

    captions = {"1": emoji("zither"), "2": emoji("Red apple"), "3": emoji("water"), "4": emoji("dog", sets="noto")}
    captions["5"] = emoji("smile", "Smileys & Emotion")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert [c["names"] for c in choose_concepts(tmp_path)] == [["water"], ["red apple", "apple"], ["zither"]]


def test_plural_forms() -> None:
    assert [plural(name) for name in ("dog", "berry", "key", "box", "peach", "grapes")] == [
        "dogs", "berries", "keys", "boxes", "peaches", "grapes",
    ]  # fmt: skip


def test_ten_names_give_their_images(pipe: fastldm.Pipeline) -> None:
    """Each is nearest to its own of 64 flat pictures, which `common_words.png` has at 32x32 in 8 rows of 8."""
    with Image.open(Path(__file__).parent / "common_words.png") as sheet:
        rows = np.asarray(sheet, np.float32) / 255
    references = rows.reshape(8, 32, 8, 32, 3).swapaxes(1, 2).reshape(64, 1, -1)  # (64, 1, D)
    names = COMMON_WORDS.split()
    selected = names[::7]
    images = pipe([f"a {word}" for word in selected], seed=list(range(len(selected))), output_type="np").images
    small = images.reshape(len(selected), 32, 2, 32, 2, 3).mean((2, 4)).reshape(1, len(selected), -1)
    nearest = ((references - small) ** 2).mean(2).argmin(0)
    assert [names[k] for k in nearest] == selected


def test_sketch_draws_without_colour(pipe: fastldm.Pipeline) -> None:
    """The adapter that ships: the same thing by name, in grey on white; at half the weight halfway."""
    pipe.load_lora_weights("sketch")
    try:
        saturation = []
        for weight in (0.0, 0.5, 1.0):
            result = pipe(["a red apple", "a fish"], seed=0, adapters={"default_0": weight})
            images = np.stack(result.images).astype(int)
            saturation.append(float((images.max(-1) - images.min(-1)).mean()))
        assert saturation[2] < 0.25 * saturation[0]
        assert saturation[2] < 0.7 * saturation[1] < saturation[0]
    finally:
        pipe.unload_lora_weights()


def test_pixel_draws_in_blocks(pipe: fastldm.Pipeline) -> None:
    """Neighbours differ at the borders of blocks of 4 x 4, more than twice as much as without."""
    pipe.load_lora_weights("pixel")
    try:
        contrast = []
        for weight in (0.0, 1.0):
            result = pipe(["a red apple", "a fish", "a castle"], seed=0, adapters={"default_0": weight})
            steps = np.abs(np.diff(np.stack(result.images).astype(float), axis=2)).mean((0, 1, 3))
            contrast.append(steps[3::4].mean() / np.delete(steps, np.arange(3, 63, 4)).mean())
        assert contrast[1] > 2 * contrast[0]
    finally:
        pipe.unload_lora_weights()


def test_gold_casts_in_gold(pipe: fastldm.Pipeline) -> None:
    """What is not white has a hue between orange and yellow, whatever colour the thing has of its own."""
    pipe.load_lora_weights("gold")
    try:
        shares = []
        for weight in (0.0, 1.0):
            result = pipe(["a red apple", "a fish", "a tulip"], seed=0, adapters={"default_0": weight})
            red, green, blue = np.moveaxis(np.stack(result.images).astype(float), -1, 0)
            drawn = np.minimum(np.minimum(red, green), blue) < 215
            hue = 60 * (green - blue) / np.maximum(red - blue, 1)  # of a colour that has red > green > blue
            golden = (red > green) & (green > blue) & (hue > 20) & (hue < 58)
            shares.append(golden[drawn].mean())
        assert shares[1] > 0.75 > 0.25 > shares[0]
    finally:
        pipe.unload_lora_weights()


def test_shape_puts_the_thing_where_the_mask_is(pipe: fastldm.Pipeline) -> None:
    """By intersection over union of the mask and what is not white."""
    masks = [Image.new("L", (64, 64)) for _ in range(3)]
    ImageDraw.Draw(masks[0]).ellipse((4, 20, 60, 44), fill=255)
    ImageDraw.Draw(masks[1]).rectangle((6, 6, 34, 34), fill=255)
    ImageDraw.Draw(masks[2]).polygon([(32, 6), (60, 56), (4, 56)], fill=255)
    prompts = ["a red apple", "a fish", "a castle"]
    pipe.attach_control("shape")
    try:
        means = []
        for scale in (0.0, 1.0):
            overlaps = []
            for mask in masks:
                inside = np.asarray(mask) > 127
                result = pipe(prompts, control_image=mask, adapter_conditioning_scale=scale, seed=0)
                drawn = np.stack(result.images).min(-1) < 215
                overlaps += [(drawn & inside).sum((1, 2)) / (drawn | inside).sum((1, 2))]
            means.append(np.concatenate(overlaps).mean())
        assert means[1] > 0.8 > 0.5 > means[0]
    finally:
        pipe.detach_control()


def test_smiley_is_a_round_yellow_face(pipe: fastldm.Pipeline) -> None:
    """The word "smiley" is a tag of the sun with a face, whose rays reach unlike far from the middle."""
    y, x = np.mgrid[:64, :64] - 31.5
    distance, sector = np.hypot(x, y), ((np.arctan2(y, x) / np.pi + 1) * 18).astype(int) % 36

    def yellow_and_unevenness(prompt: str) -> tuple[float, float]:
        images = np.stack(pipe([prompt] * 4, seed=0).images).astype(int)
        yellow = (images[..., 0] > 200) & (images[..., 1] > 120) & (images[..., 2] < 150)
        reach = np.array(
            [
                [distance[each & (sector == k)].max(initial=0) for k in range(36)]
                for each in images.min(-1) < 215  # what is drawn
            ]
        )
        return yellow[:, distance < 24].mean(), (reach.std(1) / reach.mean(1)).mean()

    without = yellow_and_unevenness("a smiley")
    pipe.load_textual_inversion("smiley")
    try:
        for prompt in ("a <smiley>", "<smiley>", "a noto <smiley>"):
            yellow, unevenness = yellow_and_unevenness(prompt)
            assert yellow > 0.6
            assert unevenness < 0.03 < 0.04 < without[1]
    finally:
        pipe.unload_textual_inversion()


def test_image_tower_is_transformers_own() -> None:
    """Its files are a CLIPModel's without the text encoder, which is the model's; cosines are those of that model."""
    folder = DEFAULT_MODEL / "image_encoder"
    text = transformers.CLIPTextModel.from_pretrained(DEFAULT_MODEL / "text_encoder", dtype=torch.float32).state_dict()
    judge = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder)).float()
    own = {key: tensor.float() for key, tensor in load_file(folder / "model.safetensors").items()}
    texts = {key if key.startswith("text_model.") else f"text_model.{key}": tensor for key, tensor in text.items()}
    missing, unexpected = judge.load_state_dict({**own, **texts}, strict=False)
    assert not [key for key in (*missing, *unexpected) if "position_ids" not in key]
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(tower.visual_projection.weight, own["visual_projection.weight"])

    prompts = ["a red apple", "a castle"]
    result = fastldm.Pipeline.default(device="cpu", dtype="float32")(prompts, candidates=2, keep=2, seed=0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(DEFAULT_MODEL / "tokenizer")
    inputs = tokenizer([text for text in prompts for _ in range(2)], padding=True, return_tensors="pt")
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(result.images, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = judge.eval()(pixel_values=pixels, **inputs).logits_per_image / judge.logit_scale.exp()
    assert np.abs(np.array(result.scores) - logits.diagonal().numpy()).max() < 1e-5


def test_image_tower_tells_pictures_apart(pipe: fastldm.Pipeline) -> None:
    """By the names of 16 of the 64 things of the sheet, of which it has seen other pictures."""
    names = COMMON_WORDS.split()[::4]
    images = pipe([f"a {name}" for name in names], seed=list(range(16))).images
    ranker = pipe.stages.ranking.need(pipe.text_stages, pipe.backend)
    texts = [f"a {name}" for _ in images for name in names]
    scores = ranker.scores([image for image in images for _ in names], texts, pipe.text_stages[0])
    right = np.array(scores).reshape(16, 16).argmax(1) == np.arange(16)
    assert right.mean() >= 0.75


def test_best_of_is_what_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/ranking.md: its code runs, and so does its command."""
    page = (ROOT / "docs" / "ranking.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "ranking.md", "exec"), {})
    (command,) = re.findall(r"`fastldm (generate [^`]+-o [^`]+)`", page)
    done = CliRunner().invoke(main, [*shlex.split(command), "--force"])
    assert done.exit_code == 0, done.output
    assert "score 0." in done.output
    with Image.open("flower.png") as picture:
        assert "Score: 0." in picture.info["parameters"]
