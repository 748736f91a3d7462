"""Key formats: files of real tools against the live modules that wrote them, and names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastldm.adapters.key_formats import COMPONENTS, Key, group_keys, recognise_adapter
from fastldm.adapters.read import read_adapter

BOUND = 1e-5

KOHYA: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1": ("tiny-sd", {"algo": "locon", "conv_dim": 3, "conv_alpha": 1, "preset": "unet-convblock-only"}),
    "SD2": ("sd2", {"algo": "lora", "preset": "attn-mlp"}),
    "SDXL": ("sdxl", {"algo": "lora", "preset": "attn-mlp"}),
    "bfloat16": ("tiny-sd", {"algo": "lokr", "dtype": torch.bfloat16, "preset": "attn-mlp"}),
}


@pytest.mark.parametrize("case", KOHYA)
def test_kohya_file_matches_live_networks(case: str, tmp_path: Path) -> None:
    family, options = KOHYA[case]
    lives = adapter_files.kohya_file(tmp_path / "a.safetensors", adapter_files.pipeline(family), **options)
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec(family))
    assert adapter.key_format == "kohya"
    components = {"SD1": 1, "SDXL": 3}.get(case, 2)  # a preset for convolutions has none in a text encoder
    assert adapter.components == COMPONENTS[:components]
    assert adapter_files.worst(adapter, lives) < BOUND


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_lycoris_prefix_finds_text_encoders(family: str, tmp_path: Path) -> None:
    """The prefix does not say which component: names do, and of two text encoders the shapes."""
    name = "text_encoder" if family == "sd1" else "text_encoder_2"
    network = getattr(adapter_files.pipeline(family), name)
    lives = adapter_files.lycoris_file(tmp_path / "a.safetensors", network, name, algo="locon")
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec(family))
    assert adapter_files.worst(adapter, lives) < BOUND


@pytest.mark.parametrize("alpha", [True, False])
def test_layout_of_lcm_lora_matches_live_layers(alpha: bool, tmp_path: Path) -> None:
    """LCM-, TCD- and Hyper-SD-LoRA have kohya's names of diffusers' modules, here by diffusers' own conversion, which
    states an alpha that is the rank."""
    utils, peft = tiny.peer("diffusers.utils"), tiny.peer("peft")
    unet = tiny.unet("tiny-sd")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "conv"]
    lives = adapter_files.adapt(unet, "unet", lora_alpha=4, target_modules=[*targets, "time_embedding.linear_1"])
    state = {f"unet.{key}": tensor for key, tensor in peft.utils.get_peft_model_state_dict(unet).items()}
    kohya = utils.convert_state_dict_to_kohya(state)
    assert any(key.endswith(".alpha") for key in kohya)
    kohya = {key: tensor.contiguous() for key, tensor in kohya.items() if alpha or not key.endswith(".alpha")}
    save_file(kohya, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", adapter_files.spec("tiny-sd"))
    assert adapter.key_format == "kohya"
    assert adapter_files.worst(adapter, lives) < BOUND


def test_every_module_has_its_own_alpha(tmp_path: Path) -> None:
    """diffusers reads the majority's alpha for all."""
    unet = adapter_files.pipeline("tiny-sd").unet
    file, spec = tmp_path / "a.safetensors", adapter_files.spec("tiny-sd")
    adapter_files.lycoris_file(file, unet, "unet", algo="locon")
    state = load_file(file)
    alphas = {key: torch.tensor(1.0 + k) for k, key in enumerate(key for key in state if key.endswith(".alpha"))}
    save_file(state | alphas, file)
    scales = {change.lora.scale for change in read_adapter(file, spec).changes.values() if change.lora}
    assert scales == {float(alpha) / 4 for alpha in alphas.values()}


NAMES = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (
        "kohya",
        Key(("unet",), "mid_block_attentions_0_proj_in", "lora_down"),
    ),
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": (
        "kohya",
        Key(("text_encoder",), "text_model_encoder_layers_0_mlp_fc1", "alpha"),
    ),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (
        "kohya",
        Key(("text_encoder",), "text_model_encoder_layers_0_mlp_fc1", "hada_w1_a"),
    ),
    "lora_te2_text_projection.lora_up.weight": ("kohya", Key(("text_encoder_2",), "text_projection", "lora_up")),
    "lycoris_conv_in.diff_b": ("lycoris", Key(COMPONENTS, "conv_in", "diff_b")),
    "unet.conv_in.lora_A.weight": ("diffusers", Key(("unet",), "conv_in", "lora_down")),
    "unet.conv_in.lora_B.bias": ("diffusers", Key(("unet",), "conv_in", "lora_up_bias")),
    "conv_in.lora_magnitude_vector": ("diffusers", Key(COMPONENTS, "conv_in", "magnitude")),
    "unet.mid.attn1.processor.to_out_lora.up.weight": ("diffusers", Key(("unet",), "mid.attn1.to_out", "lora_up")),
    "text_encoder.layers.0.self_attn.to_q_lora.down.weight": (
        "diffusers",
        Key(("text_encoder",), "layers.0.self_attn.q_proj", "lora_down"),
    ),
    "text_encoder_2.layers.0.mlp.fc1.lora_linear_layer.up.weight": (
        "diffusers",
        Key(("text_encoder_2",), "layers.0.mlp.fc1", "lora_up"),
    ),
    "base_model.model.conv_in.lora_B.weight": ("peft", Key(COMPONENTS, "conv_in", "lora_up")),
}


@pytest.mark.parametrize("name", NAMES)
def test_key_names_its_module_and_tensor(name: str) -> None:
    expected_format, expected = NAMES[name]
    key_format = recognise_adapter([name])
    assert key_format is not None
    assert (key_format.name, key_format.read(name)) == (expected_format, expected)


def test_other_files_have_no_format() -> None:
    for key in ("down_blocks.0.resnets.0.conv1.weight", "ip_adapter.1.to_k_ip.weight", "emb_params", "lora", ""):
        assert recognise_adapter([key]) is None


def test_keys_of_a_module_are_collected() -> None:
    keys = ["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.b.lora.up.weight", "unet.b.lora_B.weight", "x"]
    key_format = recognise_adapter(keys)
    assert key_format is not None
    groups, rest = group_keys(keys, key_format)
    assert [(group.module, sorted(group.keys)) for group in groups] == [
        ("a", ["lora_down", "lora_up"]),
        ("b", ["lora_up"]),
    ]
    assert rest == ["unet.b.lora_B.weight", "x"]
