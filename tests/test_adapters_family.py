"""The family that a file is for, from names and shapes."""

from __future__ import annotations

import adapter_files
import pytest

from fastldm.adapters.family import family_of_keys, family_of_spec

CROSS = "attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
FILES = {
    "SD 1.5": {f"lora_unet_down_blocks_0_{CROSS}": (4, 768)},
    "SD 2": {f"lora_unet_down_blocks_0_{CROSS}": (4, 1024)},
    "the SDXL refiner": {f"lora_unet_down_blocks_0_{CROSS}": (4, 1280)},
    "SDXL": {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora.down.weight": (4, 2048)},
    None: {"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3)},
}
MARKED = (
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha",
    "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.alpha",
    "unet.down_blocks.2.attentions.1.transformer_blocks.7.ff.net.2.lora_A.weight",
    "lora_unet_label_emb_0_0.alpha",
)


@pytest.mark.parametrize("family", FILES)
def test_width_of_the_text_tells_the_family(family: str | None) -> None:
    assert family_of_keys(FILES[family]) == family


@pytest.mark.parametrize("key", MARKED)
def test_names_tell_sdxl(key: str) -> None:
    assert family_of_keys({key: (1,)}) == "SDXL"


def test_width_of_the_text_tells_the_refiner_from_sdxl() -> None:
    """Whose names are alike: deep transformers, and the second text encoder."""
    (cross,) = FILES["the SDXL refiner"]
    assert family_of_keys(dict.fromkeys(MARKED, (1,)) | {cross: (4, 1280)}) == "the SDXL refiner"
    assert family_of_keys(dict.fromkeys(MARKED, (1,)) | {cross: (4, 2048)}) == "SDXL"


def test_names_tell_other_models() -> None:
    assert "FLUX" in str(family_of_keys({"lora_unet_double_blocks_0_img_attn_qkv.alpha": (1,)}))
    assert "SD 3" in str(family_of_keys({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64)}))


def test_models_have_families_too() -> None:
    assert family_of_spec(adapter_files.spec("sdxl")) == "SDXL"
    assert family_of_spec(adapter_files.spec("tiny-sd")) == "of the family sd1"
