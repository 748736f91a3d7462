"""A loaded diffusers pipeline, adopted: what was changed in it is in the picture too, or is refused by name.

diffusers judges: after every change, either the adopted pipeline makes the changed picture, or it is not adopted, and
an error of one line names the change.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from adopted import dropout_in_eval, image, same_image, small_pipeline
from diffusers.models import attention_processor
from states import Attention, on_meta
from torch import nn

from fastldm import Pipeline
from fastldm.conditioning.tokenizer import Tokenizer
from fastldm.errors import CheckpointError, InputError
from fastldm.loading import adoption
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.models.families import FAMILIES, pipeline_classes

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def original() -> Any:
    return small_pipeline()


@pytest.fixture
def pipe(original: Any) -> Any:
    return deepcopy(original)


# --- What is honoured ---


def _two_passes_of_freeu(pipe: Any) -> None:
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    pipe.disable_freeu()


def _compile_all(pipe: Any) -> None:
    compiled = functools.partial(torch.compile, backend="eager")
    pipe.unet, pipe.text_encoder, pipe.vae.decoder = map(compiled, (pipe.unet, pipe.text_encoder, pipe.vae.decoder))


def _compile_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


def _fuse(pipe: Any) -> None:
    pipe.fuse_qkv_projections()


def _fuse_and_back(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


def _remove_last_text_layer(pipe: Any) -> None:
    pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:-1]


def _add_a_token(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["wall"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))


def _take_notes(pipe: Any) -> None:
    pipe.unet.loaded_by = "somebody"
    pipe.note = "of no consequence"


def _train_without_dropout(pipe: Any) -> None:
    pipe.unet.train()


HONOURED: dict[str, Change] = {
    "nothing": lambda _: None,
    "one run before": image,
    "FreeU, on and off": _two_passes_of_freeu,
    "plain attention": lambda pipe: pipe.unet.set_attn_processor(attention_processor.AttnProcessor()),
    "sliced attention": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": _fuse,
    "fused and back": _fuse_and_back,
    "a text layer less": _remove_last_text_layer,
    "a token more": _add_a_token,
    "notes": _take_notes,
    "training mode without dropout": _train_without_dropout,
    "dropout in eval mode": dropout_in_eval,
    "another scaling factor": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.3),
    "forward bound again": lambda pipe: setattr(pipe.unet, "forward", pipe.unet.forward),
    "a silent bar": lambda pipe: setattr(pipe, "progress_bar", pipe.progress_bar),
    "a clip_skip left by a run": lambda pipe: setattr(pipe, "_clip_skip", 1),
}


@pytest.mark.parametrize("change", HONOURED)
def test_adopted_changes_give_the_same_image(pipe: Any, change: str) -> None:
    HONOURED[change](pipe)
    assert same_image(pipe)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_what_a_pipeline_sets_of_its_scheduler_is_adopted(pipe: Any, name: str) -> None:
    """Though its file leaves it to the class: that latents are not clamped, and steps' offset."""
    pipe.scheduler = getattr(diffusers, name)()
    changed = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    assert changed.scheduler.config.steps_offset == 1
    assert same_image(changed)
    other = diffusers.PNDMScheduler.from_config(changed.scheduler.config, skip_prk_steps=True)
    assert other.config.steps_offset == 0
    assert Pipeline.from_diffusers(changed).stages.schedule.raw.get("steps_offset", 0) == 0


def test_non_pipelines_are_refused() -> None:
    for value in (None, "sd1", 3, SimpleNamespace(unet=None), nn.Linear(1, 1), tiny.unet("sd1")):
        with pytest.raises(InputError, match=f"pipe is a {type(value).__name__}: expected a loaded diffusers pipeline"):
            Pipeline.from_diffusers(value)


# --- Every class and every scheduler as it comes ---

# Those that read pictures are in test_read_picture.py and test_peer_unclip.py, latent diffusion's in test_peer_ldm.py
# and test_peer_plain.py.
_ELSEWHERE = {name for family in FAMILIES if family.reads_picture or family.by_class for name in family.pipelines}


@pytest.mark.parametrize("name", sorted(name for name in pipeline_classes() - _ELSEWHERE if hasattr(diffusers, name)))
def test_every_supported_class_is_adopted(name: str) -> None:
    xl = "XL" in name
    kinds = {
        "Pix2Pix": "sdxl-edit" if xl else "sd1-edit",
        "Upscale": "x4-upscaler",
        "Depth": "sd2-depth",
        "Latent": "lcm",
    }
    family = next((family for part, family in kinds.items() if part in name), "sdxl" if xl else "sd1")
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    components = {**tiny.pipeline(family).components, "requires_safety_checker": False}
    theirs = getattr(diffusers, name)(**{key: value for key, value in components.items() if key in accepted})
    assert Pipeline.from_diffusers(theirs).name == name


def test_tiled_and_sliced_decoding_is_adopted(pipe: Any) -> None:
    assert Pipeline.from_diffusers(pipe).stages.decoder.mode == "whole"
    pipe.vae.enable_slicing()
    assert Pipeline.from_diffusers(pipe).stages.decoder.mode == "sliced"
    pipe.vae.enable_tiling()
    assert Pipeline.from_diffusers(pipe).stages.decoder.mode == "tiled"


def test_ignored_safety_checker_is_logged(caplog: pytest.LogCaptureFixture, pipe: Any) -> None:
    pipe.register_modules(safety_checker=nn.Identity())
    Pipeline.from_diffusers(pipe)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "StableDiffusionPipeline: its safety checker is not run: images are not filtered"
    ]


@pytest.mark.parametrize("compile_", [_compile_all, _compile_in_place])
def test_compiled_networks_are_unwrapped(original: Any, pipe: Any, compile_: Change) -> None:
    compile_(pipe)
    adopted = Pipeline.from_diffusers(pipe)
    assert np.abs(image(adopted) - image(original)).max() < 1e-4  # the compiled one would take a minute
    pipe.unet.conv_out.weight.mul_(0.5)  # shared
    assert np.abs(image(adopted) - image(original)).max() > 1e-3


# --- Textual inversion of several vectors ---


@pytest.fixture(scope="module")
def inverted(original: Any) -> Any:
    pipe = deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    for token, vectors in (("<thing>", 3), ("<one>", 1)):
        pipe.load_textual_inversion({token: torch.randn(vectors, 32, generator=generator)}, token=token)
    return pipe


PROMPTS = ("a <thing> here", "<thing>", "two <thing><thing>s, <one>", "a<thing>b <one> <thing>_9", "<one>_1", "nothing")


def test_multi_vector_tokens_are_expanded(inverted: Any, tmp_path: Path) -> None:
    inverted.tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for prompt in PROMPTS:
        converted = inverted.maybe_convert_prompt(prompt, inverted.tokenizer)
        expected = inverted.tokenizer(converted, add_special_tokens=False).input_ids
        assert tokenizer.ids(prompt) == expected, prompt
    assert tokenizer.ids("a <thing> <thing>_1 <thing>_2 b") == tokenizer.ids("a <thing> b")  # spelled out


def test_multi_vector_tokens_give_diffusers_image(inverted: Any, tmp_path: Path) -> None:
    prompt = "a <thing> here"
    assert same_image(inverted, prompt)
    inverted.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, dtype="float32")
    assert np.abs(image(loaded, prompt) - image(inverted, prompt)).max() < 1e-4


def test_adopted_weights_are_shared(pipe: Any) -> None:
    from diffusers import UNet2DConditionModel

    unet = deepcopy(pipe.unet).train().requires_grad_(True)
    module = on_meta(lambda: UNet2DConditionModel.from_config(unet.config))
    assert adoption.adopt(module, unet) is module
    theirs = dict(unet.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in module.named_parameters())
    assert unet.training  # theirs stay as they were
    assert all(p.requires_grad for p in theirs.values())
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training
    with pytest.raises(CheckpointError, match=r"The given Attention has weights in float32 on meta; they must be"):
        adoption.adopt(on_meta(Attention), on_meta(Attention))
    mixed = Attention()
    mixed.to_q.half()
    with pytest.raises(CheckpointError, match="has weights in float16 on cpu, float32 on cpu"):
        adoption.adopt(on_meta(Attention), mixed)


def test_loaded_pipeline_has_description_of_its_folder(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded, saved = adoption.describe_diffusers(pipe), open_diffusers(tmp_path)
    assert set(loaded.components) == set(saved.components)
    for name, component in saved.components.items():
        got = loaded.components[name]
        assert got.class_name == component.class_name
        assert got.files == ()
        volatile = {"_diffusers_version", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
        same = {k: v for k, v in component.config.items() if k not in volatile}
        assert json.loads(json.dumps({k: got.config[k] for k in same})) == same
    assert {"_class_name", "beta_start", "steps_offset"} <= set(loaded.scheduler)
    assert loaded.scheduler == {key: saved.scheduler[key] for key in loaded.scheduler}
    text = "a tiny pipeline"
    assert loaded.tokenizer("tokenizer").ids(text) == saved.tokenizer("tokenizer").ids(text)
    assert loaded.index["_class_name"] == "StableDiffusionPipeline"
