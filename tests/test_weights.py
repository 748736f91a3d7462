"""Loading: diffusers folders, hub ids, single files in the original layout, and what bad files get.

diffusers judges: what it writes is read here, and its own conversion of the original layout gives the same tensors.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from original_layout import (
    SCHEDULE_BUFFERS,
    SD_INDEX,
    Shapes,
    converted_by_diffusers,
    full_size,
    ldm_unet,
    ldm_vae,
    open_clip,
    openai_clip,
    random_state,
    small,
    write_sparse,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from fastldm.errors import CheckpointError, InputError
from fastldm.loading import adoption
from fastldm.loading import hub as hub_module
from fastldm.loading import spec as loading
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.loading.hub import resolve
from fastldm.loading.key_names import convert
from fastldm.loading.open_checkpoint import open_checkpoint
from fastldm.loading.single_file import open_single_file
from fastldm.loading.state import load_module
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig

ROOT = Path(__file__).resolve().parent.parent


FAMILIES = ("sd1", "sd1-inpaint", "sd2", "sd2-inpaint", "sdxl", "sdxl-inpaint")


def test_official_layout_has_the_published_numbers_of_keys() -> None:
    counts = {family: len(full_size(family)) for family in ("sd1", "sd2", "sdxl")}
    unets = {family: sum(key.startswith("model.") for key in full_size(family)) for family in ("sd1", "sd2", "sdxl")}
    assert unets == {"sd1": 686, "sd2": 686, "sdxl": 1680}
    assert len(ldm_vae(128)) == 248
    assert counts["sdxl"] == 2515  # sd_xl_base_1.0.safetensors
    assert counts["sd1"] == 686 + 248 + 197 + len(SCHEDULE_BUFFERS)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_full_size_single_file_is_the_network_that_diffusers_builds(tmp_path: Path, family: str) -> None:
    import diffusers
    import transformers

    shapes = full_size(family)
    write_sparse(tmp_path / "model.safetensors", shapes)
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    original = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    gold = converted_by_diffusers(original, checkpoint)
    assert set(checkpoint.components) == set(gold)
    for name, part in checkpoint.components.items():
        assert part.names is not None
        got = {key: tuple(tensor.shape) for key, tensor in convert(original, part.names).items()}
        assert got == {key: tuple(tensor.shape) for key, tensor in gold[name].items()}
        with torch.device("meta"):
            if name.startswith("text"):
                config = transformers.CLIPTextConfig(**part.config)
                network: nn.Module = getattr(transformers, part.class_name)(config)
            else:
                network = getattr(diffusers, part.class_name).from_config(part.config)
        # from 5.6 on, transformers names CLIPTextModel's weights without `text_model.`
        bare = {key.removeprefix("text_model."): shape for key, shape in got.items()}
        assert bare == {key.removeprefix("text_model."): tuple(t.shape) for key, t in network.state_dict().items()}


CONFIGS: dict[str, dict[str, Any]] = {  # of the families' repositories on the hub
    "sd1": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 2,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": False,
    },
    "sd1-inpaint": {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 768, "sample_size": 64},
    "sd2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sd2-inpaint": {"attention_head_dim": [5, 10, 20, 20], "in_channels": 9, "sample_size": 64},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "sdxl-inpaint": {"in_channels": 9, "sample_size": 128},
}
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"hidden_act": "quick_gelu", "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "sd2": {"hidden_act": "gelu", "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096},
    "sdxl": {"hidden_act": "gelu", "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
}
SCHEDULERS = {
    "sd1": ("PNDMScheduler", "epsilon"),
    "sd2": ("DDIMScheduler", "v_prediction"),
    "sd2-inpaint": ("PNDMScheduler", "epsilon"),
    "sdxl": ("EulerDiscreteScheduler", "epsilon"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_configs_are_the_published_ones(tmp_path: Path, family: str) -> None:
    write_sparse(tmp_path / "model.safetensors", full_size(family))
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    name = family.removesuffix("-inpaint")
    assert checkpoint.components["unet"].config.items() >= CONFIGS[family].items()
    text = checkpoint.components["text_encoder_2" if name == "sdxl" else "text_encoder"]
    assert text.config.items() >= TEXT_CONFIGS[name].items()
    vae = checkpoint.components["vae"].config
    assert vae["block_out_channels"] == [128, 256, 512, 512]
    assert vae["scaling_factor"] == (0.13025 if name == "sdxl" else 0.18215)
    assert vae.get("force_upcast", False) == (name == "sdxl")
    scheduler = checkpoint.scheduler
    wanted = SCHEDULERS.get(family, SCHEDULERS[name])
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == wanted
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["steps_offset"]) == (0.00085, 0.012, 1)
    pads = {key: files.pad_token for key, files in checkpoint.tokenizers.items()}
    end = "<|endoftext|>"
    assert (
        pads
        == {
            "sd1": {"tokenizer": end},
            "sd2": {"tokenizer": "!"},
            "sdxl": {"tokenizer": end, "tokenizer_2": "!"},
        }[name]
    )
    assert checkpoint.index["_class_name"].endswith("InpaintPipeline") == family.endswith("-inpaint")
    assert checkpoint.index.get("force_zeros_for_empty_prompt", False) == (name == "sdxl")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_file_values_are_those_of_diffusers_conversion(tmp_path: Path, family: str) -> None:
    state = random_state(small(family))
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    gold = converted_by_diffusers(state, checkpoint)
    assert set(checkpoint.components) == set(gold)
    for name, part in checkpoint.components.items():
        got = part.state()
        assert set(got) == set(gold[name])
        for key, tensor in got.items():
            assert torch.equal(tensor, gold[name][key]), key


def test_other_spellings_of_the_original_layout(tmp_path: Path) -> None:
    """generative-models' prefix for SD2's text encoder, and the SD1 files of 2022 whose CLIP has no inner prefix."""
    for family, old, new in (
        ("sd2", "cond_stage_model.model.", "conditioner.embedders.0.model."),
        ("sd1", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ):
        state = random_state(small(family))
        save_file(state, tmp_path / "usual.safetensors")
        save_file({key.replace(old, new): t for key, t in state.items()}, tmp_path / "other.safetensors")
        usual = open_single_file(tmp_path / "usual.safetensors").components["text_encoder"]
        other = open_single_file(tmp_path / "other.safetensors").components["text_encoder"]
        assert usual.config == other.config
        expected, got = usual.state(), other.state()
        assert set(got) == set(expected)
        assert all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.parametrize(
    ("family", "keys", "metadata", "argument", "expected"),
    [
        ("sd2", [], {}, None, ("DDIMScheduler", "v_prediction", 96)),
        ("sd2", [], {}, "epsilon", ("PNDMScheduler", "epsilon", 64)),
        ("sd2", [], {"modelspec.prediction_type": "epsilon"}, None, ("PNDMScheduler", "epsilon", 64)),
        ("sd2", [], {"modelspec.prediction_type": "epsilon"}, "v_prediction", ("DDIMScheduler", "v_prediction", 96)),
        ("sd1", [], {"modelspec.prediction_type": "v"}, None, ("PNDMScheduler", "v_prediction", 64)),
        ("sdxl", ["v_pred", "ztsnr"], {}, None, ("EulerDiscreteScheduler", "v_prediction", 128)),
    ],
)
def test_prediction_type(
    tmp_path: Path,
    family: str,
    keys: list[str],
    metadata: dict[str, str],
    argument: str | None,
    expected: tuple[str, str, int],
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_state(small(family)) | {key: torch.zeros(0) for key in keys}, path, metadata=metadata)
    checkpoint = open_single_file(path, prediction_type=argument)
    got = checkpoint.scheduler
    assert (got["_class_name"], got["prediction_type"], checkpoint.components["unet"].config["sample_size"]) == expected
    assert got.get("rescale_betas_zero_snr", False) == ("ztsnr" in keys)
    with pytest.raises(InputError, match=r"prediction_type is 'v'; expected one of epsilon, v_prediction, sample\."):
        open_single_file(path, prediction_type="v")


def test_leftovers_of_training_are_left_alone_in_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(small("sd1"))
    extra = {f"model_ema.{key.replace('.', '')}": t.clone() for key, t in list(state.items())[:7]}
    extra |= {
        "betas": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    extra |= {"cond_stage_model.transformer.logit_scale": torch.ones(1), "cond_stage_model.logit_scale": torch.ones(1)}
    save_file(state | extra, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "fastldm"):
        checkpoint = open_single_file(tmp_path / "model.safetensors")
    ours = [record.getMessage() for record in caplog.records]
    assert len(ours) == 1
    assert "left alone 13 keys" in ours[0]  # the 12 above and position_ids
    assert "8 of them moving averages" in ours[0]
    save_file(state, tmp_path / "plain.safetensors")
    plain = open_single_file(tmp_path / "plain.safetensors")
    for name, part in checkpoint.components.items():
        assert set(part.state()) == set(plain.components[name].state())


def _tensors(*keys: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, Tensor]:
    return {key: torch.zeros(shape) for key in keys}


def _refiner() -> Shapes:
    unet = ldm_unet(64, (1, 2), (0, 2), 128, linear=True, label=320)
    return unet | ldm_vae(32, (1, 2)) | open_clip("conditioner.embedders.0.model.", 128, 2, vocabulary=9)


def _sd1_with(more: Shapes | None = None, into: int = 4) -> Shapes:
    clip = openai_clip("cond_stage_model.transformer.", 64, 1, vocabulary=9)
    return ldm_unet(64, (1,), (1,), 64, into=into, layers=1) | ldm_vae(32, (1,), layers=1) | clip | (more or {})


def _without_middle_block() -> Shapes:
    return {key: shape for key, shape in _sd1_with().items() if ".middle_block." not in key}


OTHER_FILES: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "kohya LoRA": (lambda: _tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "is a LoRA"),
    "peft LoRA": (lambda: _tensors("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"), "is a LoRA"),
    "LoKr": (lambda: _tensors("lycoris_unet_mid_block.lokr_w1"), "is a LoRA"),
    "ControlNet": (lambda: _tensors("control_model.input_hint_block.0.weight"), "is a ControlNet"),
    "diffusers ControlNet": (lambda: _tensors("controlnet_cond_embedding.conv_in.weight"), "is a ControlNet"),
    "IP-Adapter": (lambda: _tensors("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    "embedding": (lambda: _tensors("emb_params", shape=(3, 768)), "is a textual inversion"),
    "diffusers embedding": (lambda: _tensors("<my-cat>", shape=(768,)), "is a textual inversion"),
    "SDXL embedding": (lambda: _tensors("clip_l", "clip_g", shape=(1, 768)), "is a textual inversion"),
    "motion": (lambda: _tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "AnimateDiff"),
    "Flux": (lambda: _tensors("double_blocks.0.img_attn.qkv.weight"), "a FLUX transformer"),
    "SD3": (lambda: _tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Diffusion 3"),
    "Playground": (lambda: _tensors("edm_mean", "edm_std"), "Playground"),
    "VAE": (
        lambda: _tensors("encoder.down.0.block.0.conv1.weight"),
        "is a VAE alone; a file with U-Net, VAE and text encoder was expected",
    ),
    "no VAE": (
        lambda: {k: v for k, v in random_state(_sd1_with()).items() if "first_stage" not in k},
        r"has no VAE \(first_stage_model\.\*\); a file with",
    ),
    "U-Net of diffusers": (lambda: _tensors("down_blocks.0.resnets.0.conv1.weight"), "a U-Net alone, in diffusers"),
    "text encoder": (lambda: _tensors("text_model.embeddings.token_embedding.weight"), "a text encoder alone"),
    "refiner": (lambda: random_state(_refiner()), "XL refiner, which fastldm does not run"),
    "InstructPix2Pix": (lambda: random_state(_sd1_with(into=8)), "U-Net has 8 input channels: it is InstructPix2Pix"),
    "three channels": (lambda: random_state(_sd1_with(into=3)), r"3 input channels: it is a model of an unknown kind"),
    "upscaler": (lambda: random_state(_sd1_with({"low_res_model.betas": (9,)}, into=7)), "is an upscaler"),
    "GLIGEN": (lambda: random_state(_sd1_with({"model.diffusion_model.position_net.null": (9,)})), "is GLIGEN"),
    "Paint by Example": (lambda: random_state(_sd1_with({"learnable_vector": (1, 1, 9)}, into=9)), "Paint by Example"),
    "unCLIP": (lambda: random_state(_sd1_with({"embedder.model.visual.proj": (2, 2)})), "Stable unCLIP"),
    "cut down": (lambda: random_state(_without_middle_block()), "built differently: its middle block is not as deep"),
    "quantised": (
        lambda: random_state(_sd1_with({"model.diffusion_model.out.2.weight.absmax": (2,)})),
        r"holds model\.diffusion_model\.out\.2\.weight\.absmax, which no Stable Diffusion checkpoint has \(and 0 more",
    ),
    "something else": (lambda: _tensors("transformer.wte.weight", "lm_head.bias"), "no Stable Diffusion checkpoint"),
    "nothing": (dict, r"its keys are like \(none\)"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_single_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    make, message = OTHER_FILES[kind]
    save_file(make(), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single_file(tmp_path / "file.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "file.safetensors"))


# --- Damaged files ---


def _good_bytes() -> bytes:
    from safetensors.torch import save

    return save({"weight": torch.arange(64.0), "bias": torch.zeros(3)})


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"is empty \(0 bytes\): fetch it again"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "html": (lambda: b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is an HTML page"),
    "cut off": (lambda: _good_bytes()[:-100], "is cut off, with 296 of 396 bytes there: fetch it again"),
    "cut within the header": (lambda: _good_bytes()[:40], "is cut off within its header"),
    "noise": (lambda: bytes(range(7, 256)) * 4, r"is no safetensors file, or damaged \("),
    "header is no JSON": (lambda: struct.pack("<Q", 16) + b"{" + b"x" * 40, r"is no safetensors file, or damaged \("),
    "offsets overlap": (
        lambda: (lambda h: struct.pack("<Q", len(h)) + h + bytes(64))(
            b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
        ),
        r"is no safetensors file, or damaged \(",
    ),
    "gguf": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
    "pickle": (lambda: pickle.dumps({"weight": 1}), "is a pickle, which can run any code"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_says_what_it_is(tmp_path: Path, kind: str, folder: Path) -> None:
    make, message = DAMAGED[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=message):
        open_single_file(path)
    shutil.copytree(folder, tmp_path / "pipeline")
    victim = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    victim.write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as caught:
        open_diffusers(tmp_path / "pipeline").components["unet"].state()
    assert str(caught.value).startswith(str(victim))


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        open_single_file(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        open_single_file(tmp_path)


class _Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_then_read_as_tensors_only(tmp_path: Path) -> None:
    state = random_state(small("sd1"))
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run any code.*allow_pickle=True"):
        open_single_file(tmp_path / "model.ckpt")
    got = open_single_file(tmp_path / "model.ckpt", allow_pickle=True).components["unet"].state()
    save_file(state, tmp_path / "model.safetensors")
    expected = open_single_file(tmp_path / "model.safetensors").components["unet"].state()
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in got)

    for name, zipped in (("zip.ckpt", True), ("legacy.ckpt", False)):
        torch.save(
            {"state_dict": state, "x": _Exploit(tmp_path / "ran")},
            tmp_path / name,
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(CheckpointError, match=r"holds objects other than tensors.* and is refused"):
            open_single_file(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "ran").exists()

    content = (tmp_path / "model.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt is damaged \(.*\): fetch it again"):
        open_single_file(tmp_path / "cut.ckpt", allow_pickle=True)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list; tensors by name were expected"):
        open_single_file(tmp_path / "list.ckpt", allow_pickle=True)


# --- diffusers folders ---


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline("sd1")


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipe` as diffusers saves it; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("weights") / "tiny"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def same_as(network: nn.Module, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    expected = network.state_dict()
    return set(state) == set(expected) and all(
        torch.equal(state[key], tensor.to(dtype)) and state[key].dtype == dtype for key, tensor in expected.items()
    )


def test_diffusers_folder(pipe: Any, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    parts = checkpoint.components
    assert {name: part.class_name for name, part in parts.items()} == {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    assert parts["unet"].config["block_out_channels"] == [16, 32, 48, 48]
    assert [file.name for file in parts["unet"].files] == ["diffusion_pytorch_model.safetensors"]
    assert [file.name for file in parts["text_encoder"].files] == ["model.safetensors"]
    assert all(same_as(getattr(pipe, name), part.state()) for name, part in parts.items())
    assert checkpoint.scheduler["_class_name"] == "PNDMScheduler"
    assert checkpoint.tokenizers["tokenizer"].folder == folder / "tokenizer"
    assert checkpoint.tokenizer("tokenizer").max_length == 77
    assert checkpoint.index["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(InputError, match="prediction_type is for single files"):
        open_checkpoint(folder, prediction_type="epsilon")


def fill(spec: loading.Spec) -> loading.LoadedModel:
    def weighted(module: nn.Module, name: str) -> nn.Module:
        part = spec.checkpoint.components[name]
        return load_module(module, part.state(), dtype=torch.float32, source=part.source)

    return loading.load(spec, weighted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_networks_of_every_family_load_strictly(tmp_path: Path, family: str) -> None:
    theirs: Any = tiny.pipeline(family)
    theirs.save_pretrained(tmp_path)
    networks = fill(loading.describe(tmp_path))
    assert same_as(theirs.unet, networks.unet.state_dict())
    assert same_as(theirs.vae, networks.vae.state_dict())
    assert len(networks.text_stages) == (2 if hasattr(theirs, "text_encoder_2") else 1)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_file_loads_into_the_networks(tmp_path: Path, family: str) -> None:
    save_file(random_state(small(family, vocabulary=49408)), tmp_path / "model.safetensors")
    spec = loading.describe(tmp_path / "model.safetensors")
    networks = fill(spec)
    assert spec.family.name == {"sd2": "sd2-v"}.get(family, family)
    assert [stage.tokenizer.pad for stage in networks.text_stages] == {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[
        family
    ]
    names = [name for name in spec.checkpoint.components if name.startswith("text")]
    loaded: dict[str, nn.Module] = {"unet": networks.unet, "vae": networks.vae}
    loaded |= {name: stage.model for name, stage in zip(names, networks.text_stages, strict=True)}
    for name, network in loaded.items():
        state = spec.checkpoint.components[name].state()
        assert same_as(network, state), name


def test_variant(pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = deepcopy(pipe).to(torch.float16)
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    parts = open_diffusers(tmp_path / "fp16", "fp16").components
    assert parts["unet"].files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert all(same_as(getattr(pipe, name), part.state(), torch.float16) for name, part in parts.items())
    with pytest.raises(CheckpointError, match=r'unet has no plain weights \(no variant\).*loads with variant="fp16"\.'):
        open_diffusers(tmp_path / "fp16")
    pipe.unet.save_pretrained(tmp_path / "fp16" / "unet")
    with pytest.raises(CheckpointError, match=r'no variant "bf16".*loads with no variant or variant="fp16"\.'):
        open_diffusers(tmp_path / "fp16", "bf16")
    assert open_diffusers(tmp_path / "fp16", "fp16").components["unet"].files == parts["unet"].files

    (tmp_path / "fp16" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    pipe.vae.save_pretrained(tmp_path / "fp16" / "vae")
    caplog.clear()
    mixed = open_diffusers(tmp_path / "fp16", "fp16").components
    assert mixed["vae"].files[0].name == "diffusion_pytorch_model.safetensors"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'fp16'}/vae has no variant 'fp16': its plain weights are used"
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
    parts = open_diffusers(tmp_path / "bin", allow_pickle=True).components
    assert all(same_as(getattr(pipe, name), part.state()) for name, part in parts.items())


def test_what_is_not_needed_is_named_once(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["image_encoder"] = [None, None]
    (copied / "model_index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.INFO, "fastldm"):
        open_diffusers(copied)
    assert [r.getMessage() for r in caplog.records] == [
        f"{copied}: not needed and left alone: safety_checker, feature_extractor"
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
        {"_class_name": "DDPMPipeline", **{k: SD_INDEX[k] for k in ("unet", "scheduler")}},
        "is a DDPMPipeline and has no vae, no text_encoder, no tokenizer: fastldm cannot run it",
    ),
    "refiner": (
        {**SD_INDEX, "text_encoder": [None, None], "requires_aesthetics_score": True},
        "is the Stable Diffusion XL refiner",
    ),
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
def test_other_pipelines_are_named(tmp_path: Path, kind: str) -> None:
    index, message = OTHER_PIPELINES[kind]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_diffusers(tmp_path)


def test_folders_that_are_no_pipeline(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_diffusers(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "gone", "gone is not there")
    refused(folder / "model_index.json", "is a file, not a folder: open it as a single file")
    refused(folder / "unet", "has no model_index.json: it holds UNet2DConditionModel alone")
    refused(folder / "text_encoder", "it holds CLIPTextModel alone")
    refused(folder / "tokenizer", "it holds .*Give the folder of a diffusers pipeline")
    empty, lora, single, broken = (tmp_path / name for name in ("empty", "lora", "single", "broken"))
    for path in (empty, lora, single, broken):
        path.mkdir()
    refused(empty, "empty is empty; a model folder with a model_index.json was expected")
    save_file(_tensors("unet.mid_block.to_q.lora_A.weight"), lora / "pytorch_lora_weights.safetensors")
    refused(lora, r"pytorch_lora_weights\.safetensors in it is a LoRA, which fastldm does not load yet")
    save_file(_tensors("model.diffusion_model.out.2.weight"), single / "v1-5.safetensors")
    refused(single, r"to load one of its files, give that file \(v1-5\.safetensors\)")
    (broken / "model_index.json").write_text("<html>no such page</html>")
    refused(broken, r"model_index\.json is not JSON: an HTML page")
    (broken / "model_index.json").write_text("[]")
    refused(broken, "holds a list; an object was expected")


def test_missing_parts_of_a_pipeline(copied: Path) -> None:
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


# --- The hub, by stand-ins for huggingface_hub's three functions ---


class Hub:
    """One repository, "acme/tiny", in a folder; records what is fetched from it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.fetched = repository, cache, set[str]()
        self.failing: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def _snapshot(self, revision: str | None) -> Path:
        assert revision in (None, "main", "v2", "c0ffee")
        return self.cache / "snapshots" / "c0ffee"

    def _copy(self, name: str, revision: str | None) -> Path:
        target = self._snapshot(revision) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.repository / name, target)
        self.fetched.add(name)
        return target

    def hf_hub_download(self, repo: str, name: str, **options: Any) -> str:
        self.calls.append(options)
        assert repo == "acme/tiny"
        if self.failing:
            raise self.failing
        return str(self._copy(name, options["revision"]))

    def names(self) -> list[str]:
        return [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]

    def model_info(self, repo: str, *, revision: str, timeout: float) -> SimpleNamespace:
        assert revision == "c0ffee"
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names()])

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append(options)
        for name in filter_repo_objects(self.names(), allow_patterns=allow_patterns):
            self._copy(name, options["revision"])
        return str(self._snapshot(options["revision"]))


@pytest.fixture
def hub(pipe: Any, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository like those people publish: two precisions, pickles, a checker, and a single file in its root."""
    import huggingface_hub

    deepcopy(pipe).to(torch.float16).save_pretrained(copied, variant="fp16")
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (copied / "unet" / "openvino_model.bin").write_bytes(b"other")
    (copied / "safety_checker").mkdir()
    (copied / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (copied / "v1-5-pruned.safetensors").write_bytes(b"large")
    (copied / "README.md").write_text("hello")
    stand_in = Hub(copied, tmp_path / "cache")
    for name in ("hf_hub_download", "model_info", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(stand_in, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return stand_in


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_hub_fetches_only_what_is_needed(pipe: Any, hub: Hub, variant: str | None) -> None:
    checkpoint = open_checkpoint("acme/tiny", variant=variant, revision="v2", cache_dir=hub.cache)
    dot = f".{variant}" if variant else ""
    tokenizer = {f"tokenizer/{path.name}" for path in (hub.repository / "tokenizer").iterdir()}
    assert hub.fetched == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *tokenizer,
        "unet/config.json",
        f"unet/diffusion_pytorch_model{dot}.safetensors",
        "vae/config.json",
        f"vae/diffusion_pytorch_model{dot}.safetensors",
        "text_encoder/config.json",
        f"text_encoder/model{dot}.safetensors",
    }
    assert [call["revision"] for call in hub.calls] == ["v2", "c0ffee"]
    assert {call["cache_dir"] for call in hub.calls} == {str(hub.cache)}
    dtype = torch.float16 if variant else torch.float32
    assert same_as(pipe.unet, checkpoint.components["unet"].state(), dtype)


def test_hub_fetches_shards(pipe: Any, hub: Hub) -> None:
    (hub.repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(hub.repository / "unet", max_shard_size="300KB")
    checkpoint = open_checkpoint("acme/tiny")
    assert same_as(pipe.unet, checkpoint.components["unet"].state())
    assert not any("fp16" in name for name in hub.fetched)


def test_hub_refuses_before_it_fetches_weights(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r'acme/tiny/unet has no variant "bf16".*no variant or variant="fp16"'):
        open_checkpoint("acme/tiny", variant="bf16")
    for path in hub.repository.rglob("diffusion_pytorch_model*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="acme/tiny/unet has only pickled weights"):
        open_checkpoint("acme/tiny")
    assert hub.fetched == {"model_index.json"}


def _hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind("told by the hub") if name in ("EntryNotFoundError", "LocalEntryNotFoundError") else kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "acme/tiny asks for its conditions to be accepted"),
        ("RepositoryNotFoundError", "There is no folder acme/tiny here and no such model on the hub"),
        ("RevisionNotFoundError", "acme/tiny has no revision 'v2' on the hub"),
        ("EntryNotFoundError", r"acme/tiny at revision v2 has no model_index\.json: it is not a diffusers pipeline"),
        (
            "LocalEntryNotFoundError",
            "is neither a folder here nor in the local hub cache, and the hub cannot be reached",
        ),
    ],
)
def test_hub_errors_are_told_in_a_sentence(hub: Hub, error: str, message: str) -> None:
    hub.failing = _hub_error(error)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("acme/tiny", revision="v2")
    hub.failing = TimeoutError("slow")
    with pytest.raises(CheckpointError, match="acme/tiny cannot be fetched from the hub: slow"):
        open_checkpoint("acme/tiny")


def test_hub_that_stops_answering_leaves_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    open_checkpoint("acme/tiny")

    def unreachable(*_: Any, **__: Any) -> SimpleNamespace:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    assert open_checkpoint("acme/tiny").source == str(hub.cache / "snapshots" / "c0ffee")
    assert "the hub cannot be asked (no route); trying what is in the local cache" in caplog.text


@pytest.fixture
def cache(copied: Path, tmp_path: Path) -> Path:
    """huggingface_hub's own cache with "acme/tiny" in it, for its real functions with no network."""
    root = tmp_path / "hub"
    snapshot = root / "models--acme--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(copied, snapshot)
    (root / "models--acme--tiny" / "refs").mkdir()
    (root / "models--acme--tiny" / "refs" / "main").write_text("a" * 40)
    return root


def test_offline_takes_the_local_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "model_info", None)  # a call would raise
    real = huggingface_hub.hf_hub_download

    def download(*names: str, local_files_only: bool, **options: Any) -> str:
        assert local_files_only
        return real(*names, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = resolve("acme/tiny", cache_dir=cache, local_files_only=True)
    assert found == cache / "models--acme--tiny" / "snapshots" / ("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("acme/tiny", cache_dir=cache) == found
    assert resolve("acme/tiny", cache_dir=cache, revision="a" * 40) == found
    for path in (found / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="acme/tiny in the local hub cache/unet has no weights"):
        resolve("acme/tiny", cache_dir=cache)
    with pytest.raises(
        CheckpointError, match="acme/other is neither a folder here nor in the local hub cache, and the hub was not"
    ):
        resolve("acme/other", cache_dir=cache)


def test_local_paths_never_reach_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub_module, "_from_hub", called)
    monkeypatch.chdir(folder.parent.parent)
    inside = f"{folder.parent.name}/{folder.name}"  # a path that would pass for a hub id
    assert open_checkpoint(inside).components["unet"].files[0].is_file()
    for name in (str(tmp_path / "gone"), "./gone/model", "gone", "a/b/c", "models/gone.safetensors", "https://host/x"):
        with pytest.raises(
            CheckpointError, match=r"does not exist here\. Give a model folder, a \.safetensors file, or a hub id"
        ):
            open_checkpoint(name)


# --- Weights into networks ---


class Attention(nn.Module):
    """A VAE's attention as diffusers names it, under a text encoder's buffer: what old files spell differently."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(4, 4)])


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_tensors_of_the_right_dtype_are_taken_as_they_are(folder: Path, pipe: Any) -> None:
    from diffusers import UNet2DConditionModel

    part = open_diffusers(folder).components["unet"]
    state = part.state()
    module = on_meta(lambda: UNet2DConditionModel.from_config(part.config)).train()
    loaded = load_module(module, state, dtype=torch.float32, source=part.source)
    assert loaded is module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == {k: t.data_ptr() for k, t in state.items()}
    half = load_module(on_meta(lambda: nn.Linear(2, 2)), nn.Linear(2, 2).state_dict(), dtype=torch.float16, source="x")
    assert half.weight.dtype == torch.float16


def test_old_spellings(pipe: Any) -> None:
    gold = Attention()
    old = {"query": gold.to_q, "key": gold.to_k, "value": gold.to_v, "proj_attn": gold.to_out[0]}
    state = {f"0.{name}.{end}": t for name, module in old.items() for end, t in module.state_dict().items()}
    module = load_module(on_meta(lambda: nn.Sequential(Attention())), state, dtype=torch.float32, source="old")
    assert same_as(nn.Sequential(gold), module.state_dict())

    for kind, prefix in (("l", ""), ("bigg", "text_model.")):  # as this transformers names them, with either prefix
        encoder = tiny.text_encoder(kind)
        config = TextConfig.from_dict({**encoder.config.to_dict(), "architectures": [type(encoder).__name__]})
        state = {key.removeprefix("text_model."): t for key, t in encoder.state_dict().items()}
        spelled = {key if key == "text_projection.weight" else f"{prefix}{key}": t for key, t in state.items()}
        spelled[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        module = load_module(on_meta(partial(CLIPText, config)), spelled, dtype=torch.float32, source="clip")
        got = {key.removeprefix("text_model."): t for key, t in module.state_dict().items()}
        assert set(got) == set(state)
        assert all(torch.equal(got[key], state[key]) for key in got)


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (
        lambda s: {k: t for k, t in s.items() if k != "to_q.bias"},
        r"1 tensor missing \(to_q\.bias\)\. They belong to",
    ),
    "unexpected": (
        lambda s: s | _tensors("conv.weight", "a", "b", "c"),
        r"4 tensors unexpected \(conv\.weight, a, b, \.\.\.\)",
    ),
    "shape": (
        lambda s: s | {"to_k.weight": torch.zeros(4, 9)},
        r"1 tensor of another shape \(to_k\.weight is \(4, 9\), expected \(4, 4\)\)\. They belong to another model",
    ),
    "another kind": (
        lambda _: _tensors("lm_head.weight", "wte.weight"),
        "They are of another kind of model altogether",
    ),
    "LoRA": (lambda _: _tensors("to_q.lora_A.weight", "to_q.lora_B.weight"), "It is a LoRA or contains one"),
    "loaded LoRA": (lambda s: s | _tensors("to_q.lora_A.default.weight"), "It is a LoRA or contains one"),
    "int8": (
        lambda s: s | {"to_q.weight": torch.zeros(4, 4, dtype=torch.int8)},
        r"1 tensor not floating point.*look quantised",
    ),
    "absmax": (lambda s: s | _tensors("to_q.weight.absmax"), "They look quantised"),
    "both prefixes": (
        lambda s: s | {"text_model.to_q.bias": torch.zeros(4)},
        r"1 tensor unexpected \(text_model\.to_q\.bias\)",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_change_nothing(kind: str) -> None:
    change, message = MISFITS[kind]
    module = on_meta(Attention)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_module(module, change(Attention().state_dict()), dtype=torch.float32, source="unet/weights.safetensors")
    assert str(caught.value).startswith("The weights in unet/weights.safetensors do not fit: ")
    assert all(p.is_meta for p in module.parameters())


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


def test_description_of_a_loaded_pipeline_is_that_of_its_folder(pipe: Any, folder: Path) -> None:
    loaded, saved = adoption.describe_diffusers(pipe), open_diffusers(folder)
    assert set(loaded.components) == set(saved.components)
    for name, part in saved.components.items():
        got = loaded.components[name]
        assert got.class_name == part.class_name
        assert got.files == ()
        volatile = {"_diffusers_version", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
        same = {k: v for k, v in part.config.items() if k not in volatile}
        assert json.loads(json.dumps({k: got.config[k] for k in same})) == same
    assert {"_class_name", "beta_start", "steps_offset"} <= set(loaded.scheduler)
    assert loaded.scheduler == {key: saved.scheduler[key] for key in loaded.scheduler}
    text = "a tiny pipeline"
    assert loaded.tokenizer("tokenizer").ids(text) == saved.tokenizer("tokenizer").ids(text)
    assert loaded.index["_class_name"] == "StableDiffusionPipeline"


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from fastldm.loading.checkpoint import Component
from fastldm.loading.state import load_module

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

path, dtype, width, count = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with torch.device("meta"):
    # half linear layers, half convolutions of as many weights: the latter are copied to be channels-last
    layers = [nn.Conv2d(width // 2, width // 2, 2) if i % 2 else nn.Linear(width, width) for i in range(count)]
    module = nn.Sequential(*layers)
part = Component("unet", "Sequential", {}, (Path(path),), path)
before = resident("VmRSS")
load_module(module, part.state(to_prepare=True), dtype=dtype, source=path)
for p in module.parameters():
    # one number of each page: all weights are resident
    torch.as_strided(p, (p.nbytes // p.itemsize,), (1,))[:: 2048 // p.itemsize].sum().item()
print((resident("VmHWM") - before) / sum(p.nbytes for p in module.parameters()))
unwanted = ("transformers", "diffusers", "huggingface_hub", "torch._dynamo", "triton")
print([name for name in unwanted if name in sys.modules])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_peak_and_imports_in_a_fresh_process(tmp_path: Path, dtype: torch.dtype) -> None:
    width, count = 2048, 24 if dtype == torch.bfloat16 else 12  # 200 MB
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    shapes = [(width // 2, width // 2, 2, 2) if i % 2 else (width, width) for i in range(count)]
    fill = {f"{i}.weight": torch.full(shape, i, dtype=dtype) for i, shape in enumerate(shapes)}
    save_file(fill | {f"{i}.bias": torch.zeros(shape[0], dtype=dtype) for i, shape in enumerate(shapes)}, path)
    command = [sys.executable, "-c", MEASURE, str(path), str(dtype).removeprefix("torch."), str(width), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratio, imported = done.stdout.splitlines()
    assert 0.95 <= float(ratio) <= 1.15  # below: the measurement missed the weights
    assert imported == "[]"
