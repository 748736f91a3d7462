"""LoRA of networks beyond Stable Diffusion's against peft at work in diffusers' pipelines, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepfloyd
import glide
import kandinsky
import numpy as np
import pytest
import tiny
import torch
from both_ways import in_slots
from other_networks import latent_upscaler
from pairs import generator
from safetensors.torch import load_file, save_file
from torch import nn

from fastldm import Pipeline, Session
from fastldm.errors import CheckpointError
from fastldm.request import Request

Options = dict[str, Any]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv_in", "conv_out")
ONCE = ("time_emb_proj", "linear_1", "linear_2", "encoder_hid_proj", "linear", "image_embeds", "image_proj", "q_proj")
PICTURE = torch.rand(1, 3, 8, 8, generator=generator(2)) * 2 - 1
VECTORS = torch.randn(2, 40, generator=generator(3))
TEXT: Options = {"prompt": "a cat", "clean_caption": False}
FAMILIES: dict[str, tuple[Callable[[], Any], Options]] = {
    "if": (deepfloyd.first_stage, TEXT),
    "if super-resolution": (deepfloyd.super_resolution, {**TEXT, "image": PICTURE}),
    "kandinsky": (kandinsky.decoder, {"image_embeds": VECTORS[:1], "negative_image_embeds": VECTORS[1:]}),
    "latent diffusion": (lambda: tiny.ldm_text(vqvae=tiny.vae("sd1", 1)), {"prompt": "a cat", "guidance_scale": 3.0}),
    "x2 upscaler": (
        latent_upscaler,
        {"prompt": "a cat", "image": torch.rand(1, 3, 64, 64, generator=generator(2)) * 2 - 1},
    ),
}
FEW = {"num_inference_steps": 2, "output_type": "np"}
SIZE: dict[str, Options] = {"kandinsky": {"height": 64, "width": 64}}


def layers(pipe: Any, wanted: tuple[str, ...]) -> list[str]:
    """Those of a network with these ends."""
    modules = pipe.unet.named_modules()
    return [name for name, module in modules if name.endswith(wanted) and isinstance(module, nn.Linear | nn.Conv2d)]


def adapted(pipe: Any, path: Path, wanted: tuple[str, ...], seed: int = 0, rank: int = 4) -> Any:
    """A copy of a pipeline, whose U-Net has a LoRA of peft's at work; path: the file that diffusers writes of it."""
    live = copy.deepcopy(pipe)
    options: Options = {"r": rank, "lora_alpha": 3, "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        live.unet.add_adapter(tiny.peer("peft").LoraConfig(**options, target_modules=layers(pipe, wanted)))
    live.unet.save_lora_adapter(path.parent, weight_name=path.name)
    return live


@pytest.fixture(
    scope="module", params=["if", *(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES if name != "if")]
)
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Pipeline, Options]:
    make, options = FAMILIES[request.param]
    theirs = make()
    return (
        request.param,
        theirs,
        Pipeline.from_diffusers(copy.deepcopy(theirs)),
        {**options, **FEW, **SIZE.get(request.param, {})},
    )


def picture(pipe: Any, options: Options, **more: Any) -> np.ndarray:
    if isinstance(pipe, Pipeline):
        options = {key: value for key, value in options.items() if key != "clean_caption"}
    return np.asarray(pipe(**options, **more, generator=generator()).images)


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(ATTENTION, id="attention"),
        pytest.param(CONVOLUTIONS, id="convolutions", marks=pytest.mark.full),
        pytest.param(ONCE, id="once", marks=pytest.mark.full),
        pytest.param((*ATTENTION, *CONVOLUTIONS, *ONCE), id="all", marks=pytest.mark.full),
    ],
)
def test_lora_equals_peft(family: tuple[str, Any, Pipeline, Options], wanted: tuple[str, ...], tmp_path: Path) -> None:
    _, theirs, ours, options = family
    live = adapted(theirs, tmp_path / "a.safetensors", wanted)
    before, expected = picture(ours, options), picture(live, options)
    ours.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    try:
        assert np.abs(picture(ours, options) - expected).max() < 2e-4
        assert np.abs(expected - before).max() > 5e-3
        ours.set_adapters("a", 0.0)
        assert np.array_equal(picture(ours, options), before)
    finally:
        ours.delete_adapters("a")


def test_loras_share_steps(family: tuple[str, Any, Pipeline, Options], tmp_path: Path) -> None:
    """Merged, beside in a session, and in slots as of a GPU."""
    _, theirs, ours, options = family
    for k, (name, wanted) in enumerate({"a": ATTENTION, "b": (*ATTENTION[:3], "conv1", "time_emb_proj")}.items()):
        adapted(theirs, tmp_path / f"{name}.safetensors", wanted, seed=k + 1, rank=4 + 20 * k)
        ours.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    mixed: list[Options] = [{"a": 1.0}, {}, {"b": 0.7}, {"a": 0.4, "b": 0.5}]
    options = {key: value for key, value in options.items() if key != "clean_caption"} | {"seed": 1}
    try:
        alone = [ours(**options, adapters=weights) for weights in mixed]
        assert [each.adapters for each in alone] == ["merged", "", "merged", "merged"]
        with Session(ours, max_batch=8) as session:
            together = [session.submit(**options, adapters=weights) for weights in mixed]
            results = [each.result() for each in together]
        assert [each.adapters for each in results] == ["beside", "", "beside", "beside"]
        for made, expected in zip(results, alone, strict=True):
            assert np.abs(made.images - expected.images).max() < 1e-4
        requests = [Request(**options, adapters=weights) for weights in mixed]
        latents = ours.session.call(lambda: in_slots(ours.stages, requests, tokens=80))
        expected_latents = [ours(**{**options, "output_type": "latent"}, adapters=weights).images for weights in mixed]
        for made, expected in zip(latents, expected_latents, strict=True):
            assert (made - expected).abs().max() < 1e-4 * expected.abs().max()
    finally:
        ours.delete_adapters(["a", "b"])


def test_early_names_of_added_keys_are_read(tmp_path: Path) -> None:
    """Those of diffusers' DreamBooth for IF."""
    theirs = deepfloyd.first_stage()
    adapted(theirs, tmp_path / "a.safetensors", ATTENTION)
    early = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        place, _, name = key.rpartition(".lora_")
        at, _, layer = place.replace("to_out.0", "to_out").rpartition(".")
        early[f"unet.{at}.processor.{layer}_lora.{'down' if name[0] == 'A' else 'up'}.weight"] = tensor * (
            1 if name[0] == "A" else 0.75
        )
    save_file(early, tmp_path / "early.safetensors")
    ours = Pipeline.from_diffusers(theirs)
    for name in ("a", "early"):
        ours.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    made = [picture(ours, {"prompt": "a cat", **FEW}, adapters={name: 1.0}) for name in ("a", "early")]
    assert np.abs(made[0] - made[1]).max() < 1e-5


def test_what_takes_no_lora_is_named(tmp_path: Path) -> None:
    theirs = deepfloyd.first_stage()
    adapted(theirs, tmp_path / "a.safetensors", ATTENTION)
    base = Pipeline.from_pretrained(glide.write(tmp_path, "base"), dtype="float32")
    with pytest.raises(CheckpointError, match="is GLIDE's"):
        base.load_lora_weights(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"44 of 66 modules fit.*add_k_proj': a tensor is \(4, 64\)"):
        Pipeline.from_diffusers(kandinsky.decoder()).load_lora_weights(tmp_path / "a.safetensors")
    of_text = {
        f"text_encoder.{name}.lora_{x}.weight": torch.ones(4, 4) for x in "AB" for name in ("encoder.block.0.q",)
    }
    save_file(of_text, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="the model has no such module"):
        Pipeline.from_diffusers(theirs).load_lora_weights(tmp_path / "text.safetensors")
