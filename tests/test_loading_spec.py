"""A checkpoint's components held against each other, and where and in what they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from original_layout import (
    random_state,
    small,
)
from safetensors.torch import save_file
from states import same_as
from torch import nn

import fastldm
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import spec as loading
from fastldm.loading.state import load_module

# --- Components that are not of one model, in a folder and in memory ---

MISFITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": (
        "sd1",
        {"text_encoder": lambda: tiny.text_encoder("l", hidden_size=48)},
        r"the U-Net reads text of 32 channels \('cross_attention_dim'\), and 48 come from the text encoder",
    ),
    "texts": (
        "sdxl",
        {"text_encoder": lambda: tiny.text_encoder("l", hidden_size=48)},
        r"reads text of 72 channels .* 48 \+ 40 come from the text encoders",
    ),
    "latents": (
        "sd1",
        {"vae": lambda: tiny.vae(latent_channels=16)},
        "in_channels|input channels",
    ),
    "latents made": (
        "sd1",
        {"unet": lambda: tiny.unet("sd1", out_channels=8)},
        r"the U-Net makes 8 channels \('out_channels'\), and the VAE's latents have 4",
    ),
    "colours": (
        "sd1",
        {"vae": lambda: tiny.vae(out_channels=4)},
        r"reads images of 3 channels \('in_channels'\) and makes 4",
    ),
    "pooled": (
        "sdxl",
        {"text_encoder_2": lambda: tiny.text_encoder("bigg", projection_dim=32)},
        r"added embedding has 72 channels .*expected 32 of pooled text .*6 x 8 of sizes",
    ),
    "five sizes": (
        "sdxl",
        {"unet": lambda: tiny.unet("sdxl", projection_class_embeddings_input_dim=24 + 5 * 8)},
        r"6 x 8 of sizes \('addition_time_embed_dim'\), not 5 x as in the XL refiner",
    ),
    "tokenizer": (
        "sd1",
        {"text_encoder": lambda: tiny.text_encoder("l", vocab_size=999, eos_token_id=998, bos_token_id=997)},
        r"the tokenizer has ids up to 999, and text_encoder has 999 embeddings \('vocab_size'\)",
    ),
    "second tokenizer": (
        "sdxl",
        {"text_encoder_2": lambda: tiny.text_encoder("bigg", vocab_size=600, eos_token_id=5, bos_token_id=4)},
        "the tokenizer has ids up to 999, and text_encoder_2 has 600 embeddings",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_components_of_different_models_are_refused(tmp_path: Path, kind: str) -> None:
    family, replaced, message = MISFITS[kind]
    pipe = tiny.pipeline(family, **{name: make() for name, make in replaced.items()})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refused:
        fastldm.Pipeline.from_pretrained(tmp_path, dtype="float32")
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match=message):
        fastldm.Pipeline.from_diffusers(pipe)


def test_score_for_a_network_of_six_sizes_is_refused(tmp_path: Path) -> None:
    """diffusers' image-to-image class of XL gives five numbers in place of six to a U-Net that asks for them."""
    components = tiny.pipeline("sdxl").components
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{k: components[k] for k in names}, requires_aesthetics_score=True
    )
    pipe.save_pretrained(tmp_path)
    for load in (lambda: loading.describe(tmp_path), lambda: fastldm.Pipeline.from_diffusers(pipe)):
        with pytest.raises(
            CheckpointError, match=r"expected 24 of pooled text .* and 5 x 8 .* requires_aesthetics_score"
        ):
            load()


# --- What a pipeline takes of its files ---


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_default_image_size_is_trained_size() -> None:
    pipe = tiny.pipeline("sd1", unet=tiny.unet("sd1", sample_size=(8, 12)))
    theirs = pipe("a cat", num_inference_steps=1, output_type="np").images
    ours = fastldm.Pipeline.from_diffusers(pipe)
    assert ours("a cat", num_inference_steps=1, seed=0).images[0].size == (theirs.shape[2], theirs.shape[1]) == (96, 64)


def test_sample_size_of_early_files_is_64(tmp_path: Path) -> None:
    tiny.save_pipeline("sd1", tmp_path)
    for version, size in (("0.6.0.dev0", 64), ("0.9.0", 8)):
        edit(tmp_path / "unet" / "config.json", _diffusers_version=version)
        theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
        spec = loading.describe(tmp_path)
        assert spec.unet.sample_size == (theirs.unet.config.sample_size,) * 2 == (size, size)
        assert spec.default_size == (8 * size, 8 * size)


def test_shift_factor_is_ignored_as_in_diffusers() -> None:
    pipe: Any = tiny.pipeline("sd1", vae=tiny.vae(shift_factor=0.3))
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(pipe("a cat", latents=latents, output_type="np", **arguments).images)
    ours = fastldm.Pipeline.from_diffusers(pipe)("a cat", latents=latents, output_type="pt", **arguments).images
    assert (ours.permute(0, 2, 3, 1) - theirs).abs().max() < 1e-4


def test_float64_pipeline_is_not_adopted() -> None:
    with pytest.raises(
        CheckpointError, match=r"weights in float64 on cpu .*; they must be float32, float16 or bfloat16"
    ):
        fastldm.Pipeline.from_diffusers(tiny.pipeline("sd1").to(torch.float64))


@pytest.mark.parametrize("name", [None, "", b"default", "a" * 5000, "a\0b", 3, ["default"], "~no-such-user/model"])
@pytest.mark.parametrize(
    "load", [fastldm.Pipeline.from_pretrained, fastldm.Pipeline.from_single_file, loading.describe]
)
def test_invalid_paths_are_refused(load: Any, name: Any) -> None:
    with pytest.raises(InputError, match=r"^path(_or_id)? is ") as refused:
        load(name)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("variant", 3),
        ("variant", ""),
        ("variant", "a\0b"),
        ("revision", ["main"]),
        ("cache_dir", ""),
        ("cache_dir", b"cache"),
        ("local_files_only", "yes"),
        ("allow_pickle", "no"),
        ("prediction_type", ["epsilon"]),
    ],
)
def test_options_of_another_type_are_refused(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(InputError, match=option):
        loading.describe("default", **{option: value})


def test_link_to_itself_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a link that leads nowhere, or to itself"):
        fastldm.Pipeline.from_pretrained(tmp_path / "a")


def fill(spec: loading.Spec) -> loading.LoadedModel:
    def weighted(module: nn.Module, name: str) -> nn.Module:
        component = spec.checkpoint.components[name]
        return load_module(module, component.state(), dtype=torch.float32, source=component.source)

    return loading.load(spec, weighted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_networks_of_every_family_load_strictly(tmp_path: Path, family: str) -> None:
    theirs: Any = tiny.pipeline(family)
    theirs.save_pretrained(tmp_path)
    networks = fill(loading.describe(tmp_path))
    assert same_as(theirs.unet, networks.unet.state_dict())
    assert same_as(theirs.vae, networks.vae.state_dict())
    assert len(networks.text_stages) == (2 if tiny.UNETS[family]["cross_attention_dim"] == 72 else 1)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_single_file_loads_into_the_networks(tmp_path: Path, family: str) -> None:
    save_file(random_state(small(family, vocabulary=49408)), tmp_path / "model.safetensors")
    spec = loading.describe(tmp_path / "model.safetensors")
    networks = fill(spec)
    assert spec.family.name == {"sd2": "sd2-v"}.get(family, family)
    assert [stage.tokenizer.pad for stage in networks.text_stages] == {
        "sd1": [49407],
        "sd2": [0],
        "sdxl": [49407, 0],
        "sdxl-refiner": [0],
    }[family]
    names = [name for name in spec.checkpoint.components if name.startswith("text")]
    loaded: dict[str, nn.Module] = {"unet": networks.unet, "vae": networks.vae}
    loaded |= {name: stage.model for name, stage in zip(names, networks.text_stages, strict=True)}
    for name, network in loaded.items():
        state = spec.checkpoint.components[name].state()
        assert same_as(network, state), name
