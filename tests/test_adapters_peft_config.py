"""Files that peft and diffusers write, against the live layers of peft that wrote them, and the configs in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_files
import pytest
import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastldm.adapters.module_tensors import Alpha
from fastldm.adapters.peft_config import METADATA, configs_of_header, read_config
from fastldm.adapters.read import read_adapter
from fastldm.errors import CheckpointError

BOUND = 1e-5
WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_in", "time_emb_proj"]
BIASED = ["to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"]

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6, "target_modules": ALL},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True, "target_modules": ALL},
    "DoRA": {"lora_alpha": 6, "use_dora": True, "target_modules": ALL},
    "bias": {"lora_alpha": 6, "lora_bias": True, "target_modules": BIASED},
    "patterns": {
        "lora_alpha": 6,
        "target_modules": ALL,
        "rank_pattern": {"attn2.to_q": 2, "conv1": 3},
        "alpha_pattern": {"to_k": 5, "^conv_in": 1, "down_blocks.0.resnets.0.conv2": 9},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_adapter_of_diffusers_matches_live_layers(case: str, tmp_path: Path) -> None:
    """A U-Net's `save_lora_adapter`: keys without a component, alpha in the header."""
    unet = tiny.unet("tiny-sd")
    lives = adapter_files.adapt(unet, "unet", **CONFIGS[case])
    unet.save_lora_adapter(tmp_path, adapter_name="default")
    adapter = read_adapter(tmp_path / WEIGHTS, adapter_files.spec("tiny-sd"))
    assert adapter.key_format == "diffusers"
    assert adapter_files.worst(adapter, lives) < BOUND


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
@pytest.mark.parametrize("headed", [True, False])
def test_pipeline_file_matches_live_layers(family: str, headed: bool, tmp_path: Path) -> None:
    """`save_lora_weights` of all components: DoRA with alphas in the header, which diffusers does not read back into a
    text encoder; and without a header, which states a scale of 1."""
    peft, convert = tiny.peer("peft"), tiny.peer("diffusers.utils").convert_state_dict_to_diffusers
    pipe = tiny.pipeline(family)
    lives, layers, headers = {}, {}, {}
    names = ["unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    for k, name in enumerate(names):
        network = getattr(pipe, name)
        targets = ALL if name == "unet" else ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]
        alpha = 4 if not headed else 3 + k
        lives |= adapter_files.adapt(network, name, lora_alpha=alpha, target_modules=targets, use_dora=headed)
        state = peft.utils.get_peft_model_state_dict(network)
        layers[f"{name}_lora_layers"] = convert(state)
        if headed:
            headers[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **layers, **headers)
    adapter = read_adapter(tmp_path / WEIGHTS, adapter_files.spec(family))
    assert adapter.components == tuple(names)
    assert adapter_files.worst(adapter, lives) < BOUND


def test_file_of_peft_reads_the_config_beside_it(tmp_path: Path) -> None:
    peft = tiny.peer("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, init_lora_weights=False)
    model = peft.get_peft_model(tiny.unet("tiny-sd"), config)
    lives = adapter_files.peft_outputs(model, "unet")
    model.save_pretrained(tmp_path)
    file, spec = tmp_path / "adapter_model.safetensors", adapter_files.spec("tiny-sd")
    adapter = read_adapter(file, spec)
    assert adapter.key_format == "peft"
    assert adapter_files.worst(adapter, lives) < BOUND
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"keeps alpha in adapter_config\.json"):
        read_adapter(file, spec)


# What the older layouts call a tensor. diffusers still reads them and is the judge; nothing writes them any more.
PROCESSOR = {
    ".to_q.lora_A": ".processor.to_q_lora.down",
    ".to_q.lora_B": ".processor.to_q_lora.up",
    ".to_k.lora_A": ".processor.to_k_lora.down",
    ".to_k.lora_B": ".processor.to_k_lora.up",
    ".to_v.lora_A": ".processor.to_v_lora.down",
    ".to_v.lora_B": ".processor.to_v_lora.up",
    ".to_out.0.lora_A": ".processor.to_out_lora.down",
    ".to_out.0.lora_B": ".processor.to_out_lora.up",
}
DOWN_UP = {".lora_A": ".lora.down", ".lora_B": ".lora.up"}
LINEAR_LAYER = {".lora_A": ".lora_linear_layer.down", ".lora_B": ".lora_linear_layer.up"}


@pytest.mark.parametrize("layout", ["processor", "down and up"])
def test_older_names_read_as_diffusers_reads_them(layout: str, tmp_path: Path) -> None:
    peft, convert = tiny.peer("peft"), tiny.peer("diffusers.utils").convert_state_dict_to_diffusers
    pipe = tiny.pipeline("tiny-sd")
    adapter_files.adapt(pipe.unet, "unet", target_modules=ATTENTION)
    adapter_files.adapt(pipe.text_encoder, "text_encoder", target_modules=["q_proj", "out_proj", "fc1"])
    states = {name: peft.utils.get_peft_model_state_dict(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    pipe.save_lora_weights(
        tmp_path,
        states["unet"],
        text_encoder_lora_layers=convert(states["text_encoder"]),
        weight_name="new.safetensors",
    )
    renames = PROCESSOR if layout == "processor" else DOWN_UP
    renamed = {}
    for key, tensor in load_file(tmp_path / "new.safetensors").items():
        for new, old in renames.items() if key.startswith("unet.") else LINEAR_LAYER.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    save_file(renamed, tmp_path / "old.safetensors")

    judge = tiny.pipeline("tiny-sd")
    judge.load_lora_weights(tmp_path, weight_name="old.safetensors", adapter_name="default")
    lives = {}
    for name in ("unet", "text_encoder"):
        lives |= adapter_files.peft_outputs(getattr(judge, name), name, randomise=False)
    adapter = read_adapter(tmp_path / "old.safetensors", adapter_files.spec("tiny-sd"))
    assert adapter_files.worst(adapter, lives) < BOUND


# --- The config ---


def test_alpha_of_a_module_is_its_first_pattern() -> None:
    config = read_config(
        {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2, "to_k": 3, r"^conv\.in$": 4}, "use_rslora": True}, "here"
    )
    assert config.alpha("down.attn2.to_k") == Alpha(2, True)
    assert config.alpha("down.attn1.to_k") == Alpha(3, True)
    assert config.alpha("down.attn1.not_to_k") == Alpha(8, True)
    assert config.alpha("conv.in") == Alpha(4, True)
    assert config.alpha("up.conv.in") == Alpha(8, True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "weights that were changed"),
        ({"peft_type": "LOHA"}, "'peft_type' is 'LOHA'; fastldm implements 'LORA'"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"use_qalora": True}, "'use_qalora' is True"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "no regular expressions"),
        ({"alpha_pattern": {"to_q": -2}}, "'alpha_pattern.to_q' is -2"),
        ({"lora_alpha": "much"}, "'lora_alpha' is 'much'"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is nan"),
    ],
)
def test_config_refuses_what_it_cannot_follow(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match="here: ") as caught:
        read_config(config, "here")
    assert message in str(caught.value)


@pytest.mark.parametrize("header", ["{", "[]", "[" * 100_000, json.dumps({"r": "x" * 2**20})])
def test_header_that_is_no_object_is_refused(header: str) -> None:
    with pytest.raises(CheckpointError, match=METADATA):
        configs_of_header({METADATA: header}, ["unet"], "here")


def test_header_states_each_component_apart(tmp_path: Path) -> None:
    content = {"unet.lora_alpha": 2, "text_encoder.lora_alpha": 3, "text_encoder_2.lora_alpha": 4}
    save_file({}, tmp_path / "a.safetensors", {METADATA: json.dumps(content)})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        configs = configs_of_header(file.metadata(), ["unet", "text_encoder", "text_encoder_2"], "here")
    assert [config.lora_alpha for config in configs.values()] == [2, 3, 4]
