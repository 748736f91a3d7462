"""What a single file is, where its keys are not as its family's own code writes them. The shapes are
original_layout's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_layout import Shapes, converted_by_diffusers, full_size, openai_clip, random_state, small, write_sparse
from safetensors.torch import save_file
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.loading import spec as loading
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
    assert {name: part.config for name, part in got.components.items()} == {
        name: part.config for name, part in usual.components.items()
    }
    assert got.scheduler == usual.scheduler
    assert got.tokenizers == usual.tokenizers
    ours, theirs = ({k for names in c.components["text_encoder"].names.values() for k in names} for c in (got, usual))  # type: ignore[union-attr]
    assert ours == theirs


def test_sd2_with_transformers_text_names_is_diffusers_conversion(tmp_path: Path) -> None:
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
def test_projections_as_convolutions_are_the_linear_ones(tmp_path: Path, family: str) -> None:
    state = random_state(small(family))
    networks: list[nn.Module] = []
    for name, tensors in (("linear", state), ("convolutions", as_convolutions(state))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        spec = loading.describe(tmp_path / f"{name}.safetensors")
        part = spec.checkpoint.components["unet"]
        with torch.device("meta"):
            unet = loading.UNet(spec.unet)
        networks.append(load_module(unet, part.state(to_prepare=True), dtype=torch.float32, source="file"))
        assert [level.heads for level in spec.unet.down] == [1, 2]
    first, second = (network.state_dict() for network in networks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_sdxl_with_transformers_names_for_its_second_encoder(tmp_path: Path) -> None:
    old, new = "conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."
    shapes = small("sdxl")
    state = random_state(shapes)
    save_file(state, tmp_path / "usual.safetensors")
    usual = open_single_file(tmp_path / "usual.safetensors")
    gold = converted_by_diffusers(state, usual)["text_encoder_2"]
    renamed = {key: tensor for key, tensor in state.items() if not key.startswith(old)}
    save_file(renamed | {f"{new}{key}": t.contiguous() for key, t in gold.items()}, tmp_path / "other.safetensors")
    other = open_single_file(tmp_path / "other.safetensors").components["text_encoder_2"]
    assert other.config == usual.components["text_encoder_2"].config
    got = other.state()
    assert got.keys() == gold.keys()
    assert all(torch.equal(got[key], gold[key]) for key in got)


def test_what_a_text_encoder_does_not_need_is_left_alone(tmp_path: Path) -> None:
    prefix = "cond_stage_model.transformer."
    rest = {f"{prefix}{key}": torch.ones(4, 4) for key in ("text_projection.weight", "visual_projection.weight")}
    rest |= {f"{prefix}logit_scale": torch.ones(())}
    state = random_state(small("sd1"))
    save_file(state | rest, tmp_path / "whole.safetensors")
    save_file(state, tmp_path / "text.safetensors")
    whole, text = (
        open_single_file(tmp_path / f"{n}.safetensors").components["text_encoder"] for n in ("whole", "text")
    )
    assert whole.config == text.config
    assert whole.state().keys() == text.state().keys()


def test_names_of_torch_compile_in_a_single_file(tmp_path: Path) -> None:
    state = random_state(small("sd1"))
    unet = "model.diffusion_model."
    save_file({k.replace(unet, f"{unet}_orig_mod."): t for k, t in state.items()}, tmp_path / "compiled.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    compiled, plain = (open_single_file(tmp_path / f"{n}.safetensors").components for n in ("compiled", "plain"))
    for name, part in plain.items():
        got, expected = compiled[name].state(), part.state()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_absurd_shapes_are_refused_at_once(tmp_path: Path) -> None:
    shapes = small("sd1") | {"model.diffusion_model.input_blocks.0.0.weight": (10**9, 4, 3, 3)}
    shapes |= {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (10**9, 10**9, 3, 3)}
    from fastldm.loading.single_file import read_layout

    with pytest.raises(CheckpointError, match="built differently"):
        read_layout(shapes, source="file")
