"""Diffusers folders: which files are taken, and what a folder that is no pipeline is called. diffusers writes them."""

from __future__ import annotations

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from original_layout import (
    SD_INDEX,
)
from safetensors.torch import save_file
from states import named_tensors, same_as

from fastldm.errors import CheckpointError, InputError
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.loading.open_checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline("sd1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipe` as diffusers saves it; tests that change it copy it first."""
    return tiny.save_pipeline("sd1", tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_diffusers_folder(pipe: Any, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    components = checkpoint.components
    assert {name: component.class_name for name, component in components.items()} == {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    assert components["unet"].config["block_out_channels"] == [16, 32, 48, 48]
    assert [file.name for file in components["unet"].files] == ["diffusion_pytorch_model.safetensors"]
    assert [file.name for file in components["text_encoder"].files] == ["model.safetensors"]
    assert all(same_as(getattr(pipe, name), component.state()) for name, component in components.items())
    assert checkpoint.scheduler["_class_name"] == "PNDMScheduler"
    assert checkpoint.tokenizers["tokenizer"].folder == folder / "tokenizer"
    assert checkpoint.tokenizer("tokenizer").max_length == 77
    assert checkpoint.index["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(InputError, match="prediction_type is for single files"):
        open_checkpoint(folder, prediction_type="epsilon")


def test_variant(pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    float16 = deepcopy(pipe).to(torch.float16)
    float16.save_pretrained(tmp_path / "fp16", variant="fp16")
    components = open_diffusers(tmp_path / "fp16", "fp16").components
    assert components["unet"].files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert all(same_as(getattr(pipe, name), component.state(), torch.float16) for name, component in components.items())
    with pytest.raises(CheckpointError, match=r'unet has no weights without a variant.*load with variant="fp16"\.'):
        open_diffusers(tmp_path / "fp16")
    pipe.unet.save_pretrained(tmp_path / "fp16" / "unet")
    with pytest.raises(CheckpointError, match=r'no variant "bf16".*load with no variant or variant="fp16"\.'):
        open_diffusers(tmp_path / "fp16", "bf16")
    assert open_diffusers(tmp_path / "fp16", "fp16").components["unet"].files == components["unet"].files

    (tmp_path / "fp16" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    pipe.vae.save_pretrained(tmp_path / "fp16" / "vae")
    caplog.clear()
    mixed = open_diffusers(tmp_path / "fp16", "fp16").components
    assert mixed["vae"].files[0].name == "diffusion_pytorch_model.safetensors"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'fp16'}/vae has no variant 'fp16': its weights without a variant are used"
    ]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(pipe: Any, copied: Path, variant: str | None) -> None:
    shutil.rmtree(copied / "unet")
    pipe.unet.save_pretrained(copied / "unet", max_shard_size="300KB", variant=variant)
    unet = open_diffusers(copied, variant).components["unet"]
    assert len(unet.files) > 2
    assert same_as(pipe.unet, unet.state())
    unet.files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {unet.files[1].name}, which is not in .*: fetch all"):
        open_diffusers(copied, variant)
    index = next((copied / "unet").glob("*.index*.json"))
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names \.\./vae/"):
        open_diffusers(copied, variant)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="'weight_map' is missing"):
        open_diffusers(copied, variant)


def test_folder_of_pickles(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "bin")
    for path in [*(tmp_path / "bin").rglob("*.safetensors")]:
        path.unlink()
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
    for component, stem in names.items():
        torch.save(getattr(pipe, component).state_dict(), tmp_path / "bin" / component / f"{stem}.bin")
    with pytest.raises(CheckpointError, match=r"unet has only pickled weights \(diffusion_pytorch_model\.bin\)"):
        open_diffusers(tmp_path / "bin")
    components = open_diffusers(tmp_path / "bin", allow_pickle=True).components
    assert all(same_as(getattr(pipe, name), loaded.state()) for name, loaded in components.items())


def test_unneeded_components_are_logged_once(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["image_encoder"] = [None, None]
    (copied / "model_index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.INFO, "fastldm"):
        open_diffusers(copied)
    assert [r.getMessage() for r in caplog.records] == [
        f"{copied}: not needed and ignored: safety_checker, feature_extractor"
    ]


OTHER_PIPELINES: dict[str, tuple[dict[str, Any], str]] = {
    "flux": (
        {
            **{k: v for k, v in SD_INDEX.items() if k != "unet"},
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
        },
        r"is a FluxPipeline and has transformer \(FluxTransformer2DModel\): fastldm cannot run it",
    ),
    "controlnet": (
        {**SD_INDEX, "controlnet": ["diffusers", "ControlNetModel"]},
        r"has controlnet \(ControlNetModel\): fastldm cannot run it",
    ),
    "unconditional": (
        {"_class_name": "ScoreSdeVePipeline", **{k: SD_INDEX[k] for k in ("unet", "scheduler")}},
        "is a ScoreSdeVePipeline: score SDE",
    ),
    "no text encoder": ({**SD_INDEX, "text_encoder": [None, None]}, "and has no text_encoder: fastldm cannot run it"),
    "T5": (
        {**SD_INDEX, "text_encoder": ["transformers", "T5EncoderModel"]},
        "text_encoder is a T5EncoderModel; fastldm runs CLIPTextModel or",
    ),
    "no second tokenizer": (
        {**SD_INDEX, "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        "has no tokenizer_2",
    ),
}


@pytest.mark.parametrize("kind", OTHER_PIPELINES)
def test_other_pipelines_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    index, message = OTHER_PIPELINES[kind]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_diffusers(tmp_path)


def test_other_folders_are_refused_by_content(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_diffusers(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "gone", "gone does not exist")
    refused(folder / "model_index.json", "is a file, not a folder: open it as a single file")
    refused(folder / "unet", "has no model_index.json: it holds UNet2DConditionModel alone")
    refused(folder / "text_encoder", "it holds CLIPTextModel alone")
    refused(folder / "tokenizer", "it holds .*Give the folder of a diffusers pipeline")
    empty, lora, single, broken = (tmp_path / name for name in ("empty", "lora", "single", "broken"))
    for path in (empty, lora, single, broken):
        path.mkdir()
    refused(empty, "empty is empty; a model folder with a model_index.json was expected")
    save_file(named_tensors("unet.mid_block.to_q.lora_A.weight"), lora / "pytorch_lora_weights.safetensors")
    refused(lora, r"pytorch_lora_weights\.safetensors in it is a LoRA\. .*pipe\.load_lora_weights\(path\)")
    save_file(named_tensors("model.diffusion_model.out.2.weight"), single / "v1-5.safetensors")
    refused(single, r"to load one of its files, give that file \(v1-5\.safetensors\)")
    (broken / "model_index.json").write_text("<html>no such page</html>")
    refused(broken, r"model_index\.json is not JSON: an HTML page")
    (broken / "model_index.json").write_text("[]")
    refused(broken, "holds a list; an object was expected")


def test_missing_components_are_named(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.safetensors").rename(copied / "unet" / "model_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"unet has no weights: expected .*found config\.json, model_weights"):
        open_diffusers(copied)
    (copied / "unet" / "model_weights.safetensors").rename(copied / "unet" / "diffusion_pytorch_model.safetensors")
    (copied / "unet" / "config.json").rename(copied / "kept.json")
    with pytest.raises(CheckpointError, match=r"unet.config\.json cannot be read: No such file"):
        open_diffusers(copied)
    (copied / "kept.json").rename(copied / "unet" / "config.json")
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer is missing, though .*model_index\.json names it"):
        open_diffusers(copied)
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json cannot be read"):
        open_diffusers(copied)
