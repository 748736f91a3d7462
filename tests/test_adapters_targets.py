"""The modules of a model and their names in files, at full size; diffusers' reader of LoRA files is the judge."""

from __future__ import annotations

import pytest
import tiny
import torch
from adapter_files import spec
from original_layout import full_size

from fastldm.adapters import targets
from fastldm.adapters.targets import Target, modules_of
from fastldm.loading.single_file import read_layout
from fastldm.models.config import TextConfig, UNetConfig
from fastldm.models.families import TEXT_ENCODERS


def full_modules(family: str) -> tuple[targets.Modules, list[str]]:
    """The modules of a full-size model, and the original names of its U-Net's layers and norms."""
    shapes = full_size(family)
    layout = read_layout(shapes, source="here")
    configs = {name: component.config for name, component in layout.components.items()}
    texts = tuple((name, TextConfig.from_dict(configs[name])) for name in TEXT_ENCODERS if name in configs)
    prefix = "model.diffusion_model."
    names = [key[len(prefix) :].removesuffix(".weight") for key in shapes if key.startswith(prefix)]
    modules = targets.of_configs(UNetConfig.from_dict(configs["unet"]), texts)
    return modules, [name for name in names if not name.endswith(".bias")]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_original_names_cover_the_unet_once(family: str) -> None:
    modules, names = full_modules(family)
    found = [modules.find("unet", name.replace(".", "_")) for name in names]
    assert None not in found
    assert len(set(found)) == len(names)
    assert set(found) == {target for target in modules.modules if target.component == "unet"}


def test_original_names_mean_what_diffusers_reads() -> None:
    modules, names = full_modules("sdxl")
    convert = tiny.peer("diffusers.loaders.lora_conversion_utils")
    config = tiny.unet("sdxl").config
    layers = [name for name in names if not name.endswith(("norm", "norm1", "norm2", "norm3", "layers.0", "out.0"))]
    ends = ("lora_down.weight", "lora_up.weight")
    state = {f"lora_unet_{name.replace('.', '_')}.{end}": torch.zeros(1) for name in layers for end in ends}
    for k, key in enumerate(state):
        state[key] = torch.tensor([float(k // 2)])
    mapped = convert._maybe_map_sgm_blocks_to_diffusers(dict(state), config)
    theirs, _ = convert._convert_non_diffusers_lora_to_diffusers(mapped)
    for key, tensor in theirs.items():
        stem = key.removeprefix("unet.").replace(".processor", "").replace("_lora.", ".lora.").partition(".lora.")[0]
        ours = modules.find("unet", layers[int(tensor)].replace(".", "_"))
        assert ours == modules.find("unet", stem), key
    assert len(theirs) == 2 * len(layers)


def test_full_size_models_have_their_modules() -> None:
    counts = {}
    for family in ("sd1", "sdxl"):
        modules = full_modules(family)[0].modules
        counts[family] = sum(len(module.weight) > 1 and at.component == "unet" for at, module in modules.items())
    assert counts == {"sd1": 282, "sdxl": 794}


def test_text_names_are_found_with_and_without_prefix() -> None:
    modules = modules_of(spec("sdxl"))
    target = Target("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1")
    for name in ("text_model_encoder_layers_1_mlp_fc1", "encoder_layers_1_mlp_fc1", "encoder.layers.1.mlp.fc1"):
        assert modules.find("text_encoder_2", name) == target
    assert modules.find("text_encoder_2", "text_projection") == Target("text_encoder_2", "text_projection")
    assert modules.find("text_encoder", "text_projection") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "_",
        "input_blocks_9999_1_proj_in",
        "input_blocks_1_1_",
        "middle_block_1",
        "../../conv_in",
        "conv_in\0",
        "unet",
    ],
)
def test_absurd_names_name_nothing(name: str) -> None:
    for family in ("sd1", "sdxl"):
        assert modules_of(spec(family)).find("unet", name) is None


def test_uneven_levels_have_no_original_names() -> None:
    modules = modules_of(spec("sd1"))
    assert modules.find("unet", "input_blocks_1_1_proj_in") == Target("unet", "down_blocks.0.attentions.0.proj_in")
    config = UNetConfig.from_dict(dict(tiny.unet("uneven").config))
    assert targets.of_configs(config, ()).find("unet", "input_blocks_1_0_in_layers_2") is None
