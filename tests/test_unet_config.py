"""U-Nets beyond Stable Diffusion's kind against diffusers, on seeded random weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from other_networks import (
    ATTN_DOWN,
    ATTN_UP,
    NETWORKS,
    RESNET_DOWN,
    RESNET_UP,
    SIMPLE_DOWN,
    SIMPLE_UP,
    inputs,
    judge,
    network,
)
from peer_networks import config_of, error, go_as_gpus_do, unet_of
from torch import Tensor

from fastldm.errors import CheckpointError, InputError
from fastldm.models import UNet
from fastldm.models.unet import Reuse

pytestmark = pytest.mark.usefixtures("_no_grad")
TOLERANCE = 4e-6


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def parts(
    ours: UNet, arguments: dict[str, Any], rows: slice = slice(None)
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The arguments of `step`: model input, time rows, and text, of these rows."""
    added = {name: value[rows] for name, value in (arguments.get("added_cond_kwargs") or {}).items()}
    conditions = {name: arguments[name][rows] for name in ("class_labels", "timestep_cond") if name in arguments}
    sample, text = arguments["sample"][rows], arguments.get("encoder_hidden_states")
    text = None if text is None else text[rows]
    if "hint" in added:
        sample = torch.cat((sample, ours.hint(added["hint"])), dim=1)
    image = added.get("image_embeds")
    time = ours.time_rows(arguments["timestep"][rows], encoder_hidden_states=text, image_embeds=image, **conditions)
    text = image if ours.config.encoder_hid_dim_type == "image_proj" else text
    return sample, time, () if text is None else ours.cross_kv(text)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_diffusers(name: str) -> None:
    theirs = judge(name)
    ours, arguments = unet_of(theirs), inputs(theirs)
    expected = theirs(**arguments).sample
    assert error(ours(**arguments), expected) < TOLERANCE
    model_input, rows, text = parts(ours, arguments)
    assert rows.shape == (2, ours.config.time_channels)
    assert [kv.shape[2] // 2 for kv in text] == list(ours.config.cross_widths)
    assert error(ours.step(model_input, rows, text), expected) < TOLERANCE
    for i in range(2):
        alone = parts(ours, arguments, slice(i, i + 1))
        assert error(ours.step(*alone), expected[i : i + 1]) < TOLERANCE


@pytest.mark.parametrize("name", ["ddpm", "adm", "if-2", "x2-upscaler"])
def test_gpus_way_equals_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_as_gpus_do(monkeypatch)
    theirs = judge(name)
    arguments = inputs(theirs)
    assert error(unet_of(theirs)(**arguments), theirs(**arguments).sample) < TOLERANCE


@pytest.mark.parametrize("name", ["adm", "karlo-decoder", "x2-upscaler"])
def test_bfloat16_error_is_like_diffusers(name: str) -> None:
    theirs = network(name)
    ours, arguments = unet_of(theirs), inputs(theirs)
    exact = theirs(**arguments).sample
    whole = ("timestep",) if name == "x2-upscaler" else ("timestep", "class_labels") * (name == "adm")
    arguments = {key: value if key in whole else value.bfloat16() for key, value in arguments.items()}
    out = ours.bfloat16()(**arguments)
    assert out.dtype == torch.bfloat16
    assert error(out, exact) < 1.5 * error(theirs.bfloat16()(**arguments).sample, exact) + 2**-8


@pytest.mark.parametrize("only_text", [False, True])
def test_invisible_tokens_are_not_read(only_text: bool) -> None:
    """Beside the pixels' own keys and alone; texts by slot, whose tokens may be NaN where they are not visible."""
    theirs = network("karlo-decoder", only_cross_attention=only_text)
    ours, arguments = unet_of(theirs), inputs(theirs)
    lengths = torch.tensor([7, 4], dtype=torch.int32)
    rows = [{name: value[i : i + 1] for name, value in arguments.items()} for i in range(2)]
    texts = [row.pop("encoder_hidden_states")[:, :length] for row, length in zip(rows, lengths, strict=True)]
    expected = torch.cat(
        [theirs(**row, encoder_hidden_states=text).sample for row, text in zip(rows, texts, strict=True)]
    )
    if not only_text:  # with text alone, diffusers takes no mask
        mask = (torch.arange(11) < lengths[:, None]).float()
        assert error(theirs(**arguments, attention_mask=mask).sample, expected) < TOLERANCE
    model_input, time, text = parts(ours, arguments)
    for kv in text:
        kv[0, 7:], kv[1, 4:] = torch.nan, torch.nan
    assert error(ours.step(model_input, time, text, kv_len=lengths), expected) < TOLERANCE
    swapped, slots = [kv.flip(0) for kv in text], torch.tensor([1, 0], dtype=torch.int32)
    assert error(ours.step(model_input, time, swapped, kv_len=lengths.flip(0), slots=slots), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["ldm", "adm", "if-1", "x2-upscaler"])
def test_a_row_reuses_deep_features(name: str) -> None:
    """Two rows, of which the first computes all. diffusers computes both, and what the second reuses is put there."""
    theirs = network(name)
    ours, arguments = unet_of(theirs), inputs(theirs)
    deep: list[Tensor] = []
    theirs.up_blocks[-2].register_forward_hook(lambda *call: deep.append(call[2]))
    theirs(**arguments)
    kept = torch.randn(deep[0][1:].shape, generator=torch.Generator().manual_seed(1))
    theirs.up_blocks[-2].register_forward_hook(lambda *call: torch.cat((call[2][:1], kept)))
    expected = theirs(**arguments).sample
    states, both = parts(ours, arguments), torch.cat((deep[0][:1], kept))
    assert kept.shape[1] == ours.config.deep_channels
    first = ours.step(*states, reuse=Reuse(1, lambda computed: torch.cat((computed, kept))))
    assert error(first, expected) < TOLERANCE
    assert error(ours.step(*states, reuse=Reuse(0, lambda computed: both)), expected) < TOLERANCE


def test_step_uses_no_weights_of_admission() -> None:
    theirs = judge("x2-upscaler")
    ours, arguments = unet_of(theirs), inputs(theirs)
    states = parts(ours, arguments)
    expected = ours.step(*states)
    fixed = ("time_embedding", "time_proj", "norm1.linear", "norm2.linear", "norm_cross", "attn2.to_k", "attn2.to_v")
    spoiled = 0
    for name, parameter in ours.named_parameters():
        if any(key in name for key in fixed):
            parameter.data = torch.full_like(parameter, torch.nan)
            spoiled += 1
    assert spoiled > 50
    assert torch.equal(ours.step(*states), expected)


def test_what_only_diffusers_reads_is_not_mistaken() -> None:
    """Learned variance, a small picture and a map make channels that mean something else in Stable Diffusion. Only a
    network without text that reads more channels than it makes enlarges what they are."""
    for name in NETWORKS:
        config = config_of(judge(name))
        assert not config.is_standard
        assert not any((config.edits, config.inpaints, config.reads_depth, config.needs_guidance))
        assert config.upscales == (name == "karlo-super-resolution")
    assert all(config_of(tiny.unet(name)).is_standard for name in ("sd1", "sdxl", "x4-upscaler"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddpm", {"down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
        ("ddpm", {"time_embedding_type": "fourier"}, "'time_embedding_type' is 'fourier'"),
        ("ddpm", {"attention_head_dim": 5}, "32 channels do not divide into 'attention_head_dim' 5"),
        ("ddpm", {"act_fn": "mish"}, "'act_fn' is 'mish'"),
        ("adm", {"resnet_time_scale_shift": "spatial"}, "'resnet_time_scale_shift' is 'spatial'"),
        ("adm", {"attn_norm_num_groups": 5}, "48 channels do not divide into 'attn_norm_num_groups' 5"),
        ("if-1", {"addition_embed_type": "text_image"}, "'addition_embed_type' is 'text_image'"),
        ("if-1", {"class_embed_type": "simple_projection"}, "'class_embed_type' is 'simple_projection'"),
        ("if-1", {"cross_attention_norm": "layer_norm"}, "'cross_attention_norm' is 'layer_norm'"),
        ("if-1", {"encoder_hid_dim_type": "text_image_proj"}, "'encoder_hid_dim_type' is 'text_image_proj'"),
        ("if-1", {"norm_num_groups": None}, "'norm_num_groups' is null"),
        ("kandinsky", {"encoder_hid_dim": None}, "'encoder_hid_dim_type' is 'image_proj' and there is no"),
        ("x2-upscaler", {"mid_block_type": "UNetMidBlock2D"}, "'mid_block_type' is 'UNetMidBlock2D', expected null"),
        ("x2-upscaler", {"time_embedding_dim": 32}, "reads a skip connection, and 'down_block_types' a block 3"),
        ("x2-upscaler", {"down_block_types": ["KDownBlock2D"] * 3 + ["DownBlock2D"]}, "K blocks beside others"),
    ],
)
def test_unsupported_values_are_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(judge(name), **changes)


def test_missing_conditions_are_named() -> None:
    for name, word in (
        ("adm", "class"),
        ("if-1", "encoder_hidden_states"),
        ("kandinsky", "image_embeds"),
    ):
        with pytest.raises(InputError, match=word):
            unet_of(judge(name)).time_rows(torch.tensor([1]))
    with pytest.raises(InputError, match="reads no text"):
        unet_of(judge("ddpm"))(torch.zeros(1, 3, 8, 8), 1, torch.zeros(1, 1, 8))
    with pytest.raises(InputError, match="reads no hint"):
        unet_of(judge("ddpm")).hint(torch.zeros(1, 3, 8, 8))
    uneven = inputs(judge("x2-upscaler"), 12, 8)
    with pytest.raises(InputError, match="multiples of 8"):
        unet_of(judge("x2-upscaler"))(**uneven)


# Published networks: what differs from the small ones, and their parameters in millions.
WIDE = {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3, "norm_num_groups": 32}
SIMPLE = {
    "down_block_types": (RESNET_DOWN, *[SIMPLE_DOWN] * 3),
    "up_block_types": (*[SIMPLE_UP] * 3, RESNET_UP),
    "attention_head_dim": 64,
}
FULL: dict[str, tuple[dict[str, Any], float]] = {
    "ddpm": (
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": (tiny.DOWN, ATTN_DOWN, tiny.DOWN, tiny.DOWN),
            "up_block_types": (tiny.UP, tiny.UP, ATTN_UP, tiny.UP),
            "norm_num_groups": 32,
        },
        35.7,
    ),
    "adm": (
        {
            "block_out_channels": (192, 384, 576, 768),
            "down_block_types": (RESNET_DOWN, *[ATTN_DOWN] * 3),
            "up_block_types": (*[ATTN_UP] * 3, RESNET_UP),
            "layers_per_block": 3,
            "attention_head_dim": 64,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,
            "num_class_embeds": 1000,
        },
        295.9,
    ),
    "karlo-decoder": ({**WIDE, **SIMPLE, "cross_attention_dim": 1536}, 885.0),
    "if-1": (
        {
            **SIMPLE,
            "block_out_channels": (704, 1408, 2112, 2816),
            "layers_per_block": 3,
            "norm_num_groups": 32,
            "cross_attention_dim": 2816,
            "encoder_hid_dim": 4096,
            "addition_embed_type_num_heads": 64,
        },
        4305.0,
    ),
    "x2-upscaler": (
        {
            "attention_head_dim": 64,
            "block_out_channels": (384, 384, 768, 768),
            "cross_attention_dim": 768,
            "layers_per_block": 4,
            "time_cond_proj_dim": 896,
            "time_embedding_dim": 768,
        },
        373.0,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_published_networks_have_their_parameters(name: str) -> None:
    changes, millions = FULL[name]
    with torch.device("meta"):
        theirs = network(name, **changes)
        ours = UNet(config_of(theirs))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(millions * 1e6, rel=2e-2)
