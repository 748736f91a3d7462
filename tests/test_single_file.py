"""What a single file is, where its keys are not as its family's own code writes them. The shapes are
original_layout's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import (
    SCHEDULE_BUFFERS,
    Shapes,
    converted_by_diffusers,
    full_size,
    ldm_unet,
    ldm_vae,
    openai_clip,
    random_state,
    small,
    write_sparse,
)
from safetensors.torch import save_file
from states import named_tensors
from torch import Tensor, nn

from fastldm.errors import CheckpointError, InputError
from fastldm.loading import spec as loading
from fastldm.loading.key_names import convert
from fastldm.loading.single_file import open_single_file
from fastldm.loading.state import load_module

CLIP_H = "cond_stage_model.model."


def with_transformers_names(shapes: Shapes, prefix: str, layers: int) -> Shapes:
    """SD2's keys with its text encoder as transformers names it."""
    rest = {key: shape for key, shape in shapes.items() if not key.startswith(CLIP_H)}
    vocabulary, width = shapes[f"{CLIP_H}token_embedding.weight"]
    return rest | openai_clip(prefix, width, layers, vocabulary)


def as_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of a U-Net's transformers as 1x1 convolutions."""
    ends = ("proj_in.weight", "proj_out.weight")
    projections = [k for k in state if k.startswith("model.diffusion_model.") and k.endswith(ends)]
    return state | {key: state[key][:, :, None, None].contiguous() for key in projections}


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model."])
@pytest.mark.parametrize("layers", [23, 24])
def test_sd2_with_transformers_text_names_is_sd2(tmp_path: Path, prefix: str, layers: int) -> None:
    path, shapes = tmp_path / "model.safetensors", full_size("sd2")
    write_sparse(path, shapes)
    usual = open_single_file(path)
    write_sparse(path, with_transformers_names(shapes, prefix, layers))
    got = open_single_file(path)
    assert {name: component.config for name, component in got.components.items()} == {
        name: component.config for name, component in usual.components.items()
    }
    assert got.scheduler == usual.scheduler
    assert got.tokenizers == usual.tokenizers
    ours, theirs = ({k for names in c.components["text_encoder"].names.values() for k in names} for c in (got, usual))  # type: ignore[union-attr]
    assert ours == theirs


def test_sd2_with_transformers_names_equals_diffusers_conversion(tmp_path: Path) -> None:
    state = random_state(with_transformers_names(small("sd2"), "cond_stage_model.transformer.", 24))
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    theirs = {k: t for k, t in convert_ldm_clip_checkpoint(dict(state)).items() if "position_ids" not in k}
    ours = checkpoint.components["text_encoder"].state()
    dropped = {key for key in theirs if ".layers.23." in key}  # a model of 23 layers has no use for them
    assert len(dropped) == 16
    assert ours.keys() == theirs.keys() - dropped
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sd1_with_transformers_text_names_stays_sd1(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model.safetensors", full_size("sd1"))
    spec = loading.describe(tmp_path / "model.safetensors")
    assert spec.family.name == "sd1"
    assert spec.text[0].act == "quick_gelu"


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_projections_stored_as_convolutions_load(tmp_path: Path, family: str) -> None:
    state = random_state(small(family))
    networks: list[nn.Module] = []
    for name, tensors in (("linear", state), ("convolutions", as_convolutions(state))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        spec = loading.describe(tmp_path / f"{name}.safetensors")
        component = spec.checkpoint.components["unet"]
        with torch.device("meta"):
            unet = loading.UNet(spec.unet)
        networks.append(load_module(unet, component.state(to_prepare=True), dtype=torch.float32, source="file"))
        assert [level.heads for level in spec.unet.down] == [1, 2]
    first, second = (network.state_dict() for network in networks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_sdxl_second_encoder_may_have_transformers_names(tmp_path: Path) -> None:
    old, new = "conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."
    shapes = small("sdxl")
    state = random_state(shapes)
    save_file(state, tmp_path / "usual.safetensors")
    usual = open_single_file(tmp_path / "usual.safetensors")
    gold = converted_by_diffusers(state, usual)["text_encoder_2"]
    renamed = {key: tensor for key, tensor in state.items() if not key.startswith(old)}
    save_file(renamed | {f"{new}{key}": t.contiguous() for key, t in gold.items()}, tmp_path / "other.safetensors")
    encoder = open_single_file(tmp_path / "other.safetensors").components["text_encoder_2"]
    assert encoder.config == usual.components["text_encoder_2"].config
    got = encoder.state()
    assert got.keys() == gold.keys()
    assert all(torch.equal(got[key], gold[key]) for key in got)


def test_unneeded_text_encoder_keys_are_ignored(tmp_path: Path) -> None:
    prefix = "cond_stage_model.transformer."
    rest = {f"{prefix}{key}": torch.ones(4, 4) for key in ("text_projection.weight", "visual_projection.weight")}
    rest |= {f"{prefix}logit_scale": torch.ones(())}
    state = random_state(small("sd1"))
    save_file(state | rest, tmp_path / "whole.safetensors")
    save_file(state, tmp_path / "text.safetensors")
    full, text = (open_single_file(tmp_path / f"{n}.safetensors").components["text_encoder"] for n in ("whole", "text"))
    assert full.config == text.config
    assert full.state().keys() == text.state().keys()


def test_single_file_of_compiled_model_loads(tmp_path: Path) -> None:
    state = random_state(small("sd1"))
    unet = "model.diffusion_model."
    save_file({k.replace(unet, f"{unet}_orig_mod."): t for k, t in state.items()}, tmp_path / "compiled.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    compiled, original = (open_single_file(tmp_path / f"{n}.safetensors").components for n in ("compiled", "plain"))
    for name, component in original.items():
        got, expected = compiled[name].state(), component.state()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_absurd_shapes_are_refused_at_once(tmp_path: Path) -> None:
    shapes = small("sd1") | {"model.diffusion_model.input_blocks.0.0.weight": (10**9, 4, 3, 3)}
    shapes |= {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (10**9, 10**9, 3, 3)}
    from fastldm.loading.single_file import read_layout

    with pytest.raises(CheckpointError, match="built differently"):
        read_layout(shapes, source="file")


FAMILIES = ("sd1", "sd1-inpaint", "sd2", "sd2-inpaint", "sdxl", "sdxl-inpaint", "sdxl-refiner", "x4")


def test_layout_has_published_numbers_of_keys() -> None:
    counts = {family: len(full_size(family)) for family in ("sd1", "sd2", "sdxl")}
    unets = {family: sum(key.startswith("model.") for key in full_size(family)) for family in ("sd1", "sd2", "sdxl")}
    assert unets == {"sd1": 686, "sd2": 686, "sdxl": 1680}
    assert len(ldm_vae(128)) == 248
    assert counts["sdxl"] == 2515  # sd_xl_base_1.0.safetensors
    assert counts["sd1"] == 686 + 248 + 197 + len(SCHEDULE_BUFFERS)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner", "x4", "sd2-unclip"])
def test_full_size_single_file_matches_diffusers_network(tmp_path: Path, family: str) -> None:
    import diffusers
    import transformers

    shapes = full_size(family)
    write_sparse(tmp_path / "model.safetensors", shapes)
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    original = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    gold = converted_by_diffusers(original, checkpoint)
    encoder = checkpoint.components.pop("image_encoder", None)
    if encoder is not None:  # which diffusers takes from elsewhere
        assert encoder.names is not None
        with torch.device("meta"):
            vision = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**encoder.config))
        got = {key: tuple(tensor.shape) for key, tensor in convert(original, encoder.names).items()}
        assert got == {key: tuple(tensor.shape) for key, tensor in vision.state_dict().items()}
        assert {key: encoder.config[key] for key in H14} == H14
        assert checkpoint.components.pop("image_normalizer").config == {"embedding_dim": 1024}
        del gold["image_normalizer"]
    assert set(checkpoint.components) == set(gold)
    for name, component in checkpoint.components.items():
        assert component.names is not None
        got = {key: tuple(tensor.shape) for key, tensor in convert(original, component.names).items()}
        assert got == {key: tuple(tensor.shape) for key, tensor in gold[name].items()}
        with torch.device("meta"):
            if name.startswith("text"):
                config = transformers.CLIPTextConfig(**component.config)
                network: nn.Module = getattr(transformers, component.class_name)(config)
            else:
                network = getattr(diffusers, component.class_name).from_config(component.config)
        # from 5.6 on, transformers names CLIPTextModel's weights without `text_model.`
        bare = {key.removeprefix("text_model."): shape for key, shape in got.items()}
        assert bare == {key.removeprefix("text_model."): tuple(t.shape) for key, t in network.state_dict().items()}


H14 = {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "image_size": 224, "patch_size": 14}
H14 |= {"hidden_act": "gelu", "intermediate_size": 5120, "projection_dim": 1024}  # type: ignore[dict-item]
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
    "sdxl-refiner": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 4, 4, 4],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "x4": {
        "attention_head_dim": 8,
        "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [False, True, True, False],  # the first level has no transformers, whatever is said
        "sample_size": 128,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "use_linear_projection": True,
    },
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
    "x4": ("DDIMScheduler", "v_prediction"),
}
BETAS = {"x4": (0.0001, 0.02)}
SCALES = {"sdxl": 0.13025, "x4": 0.08333}


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_configs_equal_published_configs(tmp_path: Path, family: str) -> None:
    write_sparse(tmp_path / "model.safetensors", full_size(family))
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    name = family.removesuffix("-inpaint").removesuffix("-refiner")
    assert checkpoint.index.get("requires_aesthetics_score", False) == family.endswith("-refiner")
    assert checkpoint.components["unet"].config.items() >= CONFIGS[family].items()
    text = checkpoint.components["text_encoder_2" if name == "sdxl" else "text_encoder"]
    assert text.config.items() >= TEXT_CONFIGS["sd2" if name == "x4" else name].items()
    vae = checkpoint.components["vae"].config
    assert vae["block_out_channels"] == ([128, 256, 512] if name == "x4" else [128, 256, 512, 512])
    assert vae["scaling_factor"] == SCALES.get(name, 0.18215)
    assert vae.get("force_upcast", False) == (name == "sdxl")
    scheduler = checkpoint.scheduler
    expected = SCHEDULERS.get(family, SCHEDULERS[name])
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == expected
    betas = BETAS.get(name, (0.00085, 0.012))
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["steps_offset"]) == (*betas, 1)
    assert (checkpoint.low_res_scheduler is not None) == (name == "x4")
    pads = {key: files.pad_token for key, files in checkpoint.tokenizers.items()}
    end = "<|endoftext|>"
    assert (
        pads
        == {
            "sd1": {"tokenizer": end},
            "sd2": {"tokenizer": "!"},
            "x4": {"tokenizer": "!"},
            "sdxl": {"tokenizer": end, "tokenizer_2": "!"},
            "sdxl-refiner": {"tokenizer_2": "!"},
        }[family.removesuffix("-inpaint")]
    )
    assert checkpoint.index["_class_name"].endswith("InpaintPipeline") == family.endswith("-inpaint")
    assert checkpoint.index.get("force_zeros_for_empty_prompt", False) == (family in ("sdxl", "sdxl-inpaint"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "x4", "sd1-edit", "sd2-depth", "sdxl-refiner", "sd2-unclip"])
def test_single_file_values_equal_diffusers_conversion(tmp_path: Path, family: str) -> None:
    state = random_state(small(family))
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_single_file(tmp_path / "model.safetensors")
    gold = converted_by_diffusers(state, checkpoint)
    components = {name: own for name, own in checkpoint.components.items() if name != "image_encoder"}
    assert set(components) == set(gold)
    for name, component in components.items():
        got = component.state()
        assert set(got) == set(gold[name])
        for key, tensor in got.items():
            assert torch.equal(tensor, gold[name][key]), key


def test_variants_of_original_layout_load(tmp_path: Path) -> None:
    """generative-models' prefix for SD2's text encoder, and the SD1 files of 2022 whose CLIP has no inner prefix."""
    for family, old, new in (
        ("sd2", "cond_stage_model.model.", "conditioner.embedders.0.model."),
        ("sd1", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ):
        state = random_state(small(family))
        save_file(state, tmp_path / "usual.safetensors")
        save_file({key.replace(old, new): t for key, t in state.items()}, tmp_path / "other.safetensors")
        usual = open_single_file(tmp_path / "usual.safetensors").components["text_encoder"]
        variant = open_single_file(tmp_path / "other.safetensors").components["text_encoder"]
        assert usual.config == variant.config
        expected, got = usual.state(), variant.state()
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
def test_prediction_type_is_argument_or_metadata_or_default(
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


def test_training_state_is_ignored_with_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert "ignored 13 keys" in ours[0]  # the 12 above and position_ids
    assert "8 of them moving averages" in ours[0]
    save_file(state, tmp_path / "plain.safetensors")
    without_state = open_single_file(tmp_path / "plain.safetensors")
    for name, component in checkpoint.components.items():
        assert set(component.state()) == set(without_state.components[name].state())


def _sd1_with(more: Shapes | None = None, in_channels: int = 4) -> Shapes:
    clip = openai_clip("cond_stage_model.transformer.", 64, 1, vocabulary=9)
    return (
        ldm_unet(64, (1,), (1,), 64, in_channels=in_channels, layers=1)
        | ldm_vae(32, (1,), layers=1)
        | clip
        | (more or {})
    )


def _without_middle_block() -> Shapes:
    return {key: shape for key, shape in _sd1_with().items() if ".middle_block." not in key}


OTHER_FILES: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "kohya LoRA": (lambda: named_tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "is a LoRA"),
    "peft LoRA": (lambda: named_tensors("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"), "is a LoRA"),
    "LoKr": (lambda: named_tensors("lycoris_unet_mid_block.lokr_w1"), "is a LoRA"),
    "ControlNet": (lambda: named_tensors("control_model.input_hint_block.0.weight"), "is a ControlNet"),
    "T2I-Adapter": (
        lambda: named_tensors("adapter.body.0.resnets.0.block1.weight"),
        r"T2I-Adapter.*pipe\.attach_control",
    ),
    "diffusers ControlNet": (lambda: named_tensors("controlnet_cond_embedding.conv_in.weight"), "is a ControlNet"),
    "IP-Adapter": (lambda: named_tensors("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    "embedding": (lambda: named_tensors("emb_params", shape=(3, 768)), "is a textual inversion"),
    "diffusers embedding": (lambda: named_tensors("<my-cat>", shape=(768,)), "is a textual inversion"),
    "SDXL embedding": (lambda: named_tensors("clip_l", "clip_g", shape=(1, 768)), "is a textual inversion"),
    "motion": (lambda: named_tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "AnimateDiff"),
    "Flux": (lambda: named_tensors("double_blocks.0.img_attn.qkv.weight"), "a FLUX transformer"),
    "SD3": (lambda: named_tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Diffusion 3"),
    "Playground": (lambda: named_tensors("edm_mean", "edm_std"), "Playground"),
    "VAE": (
        lambda: named_tensors("encoder.down.0.block.0.conv1.weight"),
        "is a VAE alone; a file with U-Net, VAE and text encoder was expected",
    ),
    "no VAE": (
        lambda: {k: v for k, v in random_state(_sd1_with()).items() if "first_stage" not in k},
        r"has no VAE \(first_stage_model\.\*\); a file with",
    ),
    "U-Net of diffusers": (
        lambda: named_tensors("down_blocks.0.resnets.0.conv1.weight"),
        "a U-Net alone, in diffusers",
    ),
    "text encoder": (lambda: named_tensors("text_model.embeddings.token_embedding.weight"), "a text encoder alone"),
    "three channels": (
        lambda: random_state(_sd1_with(in_channels=3)),
        r"3 input channels: it is a model of an unknown kind",
    ),
    "upscaler": (
        lambda: random_state(_sd1_with({"low_res_model.betas": (9,)}, in_channels=7)),
        "an upscaler without noise levels",
    ),
    "GLIGEN": (lambda: random_state(_sd1_with({"model.diffusion_model.position_net.null": (9,)})), "is GLIGEN"),
    "Paint by Example": (
        lambda: random_state(_sd1_with({"learnable_vector": (1, 1, 9)}, in_channels=9)),
        "Paint by Example",
    ),
    "unCLIP": (lambda: random_state(_sd1_with({"embedder.model.visual.proj": (2, 2)})), "stable unCLIP but is built"),
    "cut down": (lambda: random_state(_without_middle_block()), "built differently: its middle block is not as deep"),
    "quantised": (
        lambda: random_state(_sd1_with({"model.diffusion_model.out.2.weight.absmax": (2,)})),
        r"holds model\.diffusion_model\.out\.2\.weight\.absmax, which no Stable Diffusion checkpoint has \(and 0 more",
    ),
    "something else": (
        lambda: named_tensors("transformer.wte.weight", "lm_head.bias"),
        "no Stable Diffusion checkpoint",
    ),
    "nothing": (dict, r"its keys are like \(none\)"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_single_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = OTHER_FILES[kind]
    save_file(make(), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single_file(tmp_path / "file.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "file.safetensors"))
