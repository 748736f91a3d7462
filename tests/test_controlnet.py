"""ControlNets, and a U-Net with their residuals, against diffusers, in float32."""

from __future__ import annotations

from typing import Any

import controls
import pytest
import tiny
import torch
from peer_networks import TOLERANCE, error, go_as_gpus_do, inputs, judge, unet_of

from fastldm.errors import CheckpointError
from fastldm.models import AddedConditions
from fastldm.models.controlnet import ControlNet, ControlNetConfig
from fastldm.models.unet import Residuals

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def residuals_of(ours: ControlNet, arguments: dict[str, Any], image: torch.Tensor) -> Residuals:
    added = arguments.get("added_cond_kwargs")
    rows = ours.time_rows(arguments["timestep"], added=AddedConditions(**added) if added else None)
    kv = ours.cross_kv(arguments["encoder_hidden_states"])
    return ours.step(arguments["sample"], rows, kv, ours.hint(image))


@pytest.mark.parametrize("name", controls.CONTROLNETS)
def test_residuals_and_controlled_unet_equal_diffusers(name: str) -> None:
    family = controls.CONTROLNETS[name][0]
    theirs = controls.controlnet(name)
    ours = controls.ours_of(theirs)
    network, factor = judge(family), 8 if name != "small" else 4
    for height, width in ((8, 8), (9, 7)):
        arguments = inputs(network, height, width)
        image = controls.image(factor * height, factor * width)
        expected = theirs(**arguments, controlnet_cond=image)
        residuals = residuals_of(ours, arguments, image)
        assert len(residuals.skips) == len(expected.down_block_res_samples)
        for mine, other in zip(residuals.skips, expected.down_block_res_samples, strict=True):
            assert error(mine, other) < TOLERANCE
        assert error(residuals.mid, expected.mid_block_res_sample) < TOLERANCE

        controlled = network(
            **arguments,
            down_block_additional_residuals=expected.down_block_res_samples,
            mid_block_additional_residual=expected.mid_block_res_sample,
        ).sample
        unet = unet_of(network)
        added = arguments.get("added_cond_kwargs")
        rows = unet.time_rows(arguments["timestep"], added=AddedConditions(**added) if added else None)
        kv = unet.cross_kv(arguments["encoder_hidden_states"])
        assert error(unet.step(arguments["sample"], rows, kv, residuals=[residuals]), controlled) < TOLERANCE
        assert error(network(**arguments).sample, controlled) > 0.01


@pytest.mark.parametrize("name", list(controls.CONTROLNETS)[:2])
def test_gpus_way_equals_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals come to convolutions that no norm has run yet."""
    go_as_gpus_do(monkeypatch)
    test_residuals_and_controlled_unet_equal_diffusers(name)


def test_weights_scale_each_residual_of_each_row() -> None:
    """As guess mode does: factors from 0.1 to 1, and another scale in each row."""
    network, theirs = judge("sd1"), controls.controlnet("sd1")
    ours, unet, arguments, image = controls.ours_of(theirs), unet_of(network), inputs(network), controls.image()
    residuals = residuals_of(ours, arguments, image)
    scales = torch.tensor([0.5, 2.0])
    factors = torch.logspace(-1, 0, len(residuals.skips) + 1)
    weighted = residuals._replace(weights=factors[:, None] * scales)
    rows, kv = unet.time_rows(arguments["timestep"]), unet.cross_kv(arguments["encoder_hidden_states"])
    out = unet.step(arguments["sample"], rows, kv, residuals=[weighted])
    for k, scale in enumerate(scales):
        expected = theirs(**arguments, controlnet_cond=image, conditioning_scale=float(scale), guess_mode=True)
        controlled = network(
            **arguments,
            down_block_additional_residuals=expected.down_block_res_samples,
            mid_block_additional_residual=expected.mid_block_res_sample,
        ).sample
        assert error(out[k], controlled[k]) < TOLERANCE


def test_rows_without_control_are_bitwise_the_same() -> None:
    network, theirs = judge("sd1"), controls.controlnet("sd1")
    ours, unet, arguments = controls.ours_of(theirs), unet_of(network), inputs(network)
    rows, kv = unet.time_rows(arguments["timestep"]), unet.cross_kv(arguments["encoder_hidden_states"])
    plain = unet.step(arguments["sample"], rows, kv)
    second = {name: value[1:] for name, value in arguments.items()}
    residuals = residuals_of(ours, second, controls.image(batch=1))
    nan = residuals._replace(skips=tuple(skip * torch.nan for skip in residuals.skips))
    for controlled in ([residuals._replace(first=1)] * 2, [nan._replace(first=1)]):
        out = unet.step(arguments["sample"], rows, kv, residuals=controlled)
        assert torch.equal(out[0], plain[0])
        assert not torch.equal(out[1], plain[1])


@pytest.mark.parametrize("name", ["bk-sdm", "tiny-sd"])
def test_unet_without_middle_block_adds_residuals(name: str) -> None:
    """Its last skip connection is the middle's output too, and takes only its own residual."""
    network = judge(name)
    unet, arguments = unet_of(network), inputs(network)
    skips = []
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    sides = {"bk-sdm": (8, 8, 4, 4, 2, 2, 1, 1), "tiny-sd": (8, 8, 4, 4, 2, 2)}[name]
    for width, side in zip(unet.config.skip_channels, sides, strict=True):
        skips.append(x[:, :, :side, :side].repeat(1, width, 1, 1))
    mid = -2 * skips[-1]
    expected = network(
        **arguments, down_block_additional_residuals=tuple(skips), mid_block_additional_residual=mid
    ).sample
    rows, kv = unet.time_rows(arguments["timestep"]), unet.cross_kv(arguments["encoder_hidden_states"])
    out = unet.step(arguments["sample"], rows, kv, residuals=[Residuals(tuple(skips), mid)])
    assert error(out, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "ControlNetUnionModel"),
        ("act_fn", "gelu"),
        ("addition_embed_type", "text"),
        ("class_embed_type", "projection"),
        ("num_class_embeds", 4),
        ("only_cross_attention", True),
        ("conditioning_embedding_out_channels", []),
        ("controlnet_conditioning_channel_order", "grb"),
        ("encoder_hid_dim_type", "text_proj"),
        ("mid_block_type", None),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("resnet_time_scale_shift", "scale_shift"),
    ],
)
def test_unsupported_values_are_refused_by_name(key: str, value: Any) -> None:
    config = dict(controls.controlnet("sd1").config)
    ControlNetConfig.from_dict(config)
    with pytest.raises(CheckpointError, match=f"somewhere/config.json.*{key}"):
        ControlNetConfig.from_dict({**config, key: value}, "somewhere/config.json")


# Parameters of the published networks.
FULL: dict[str, tuple[dict[str, Any], int, int]] = {
    "SD 1.5": ({"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}, 361_279_120, 12),
    "SDXL": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": [tiny.DOWN, tiny.CROSS_DOWN, tiny.CROSS_DOWN],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        1_251_014_160,
        9,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_published_networks_have_their_parameters(name: str) -> None:
    config, parameters, skips = FULL[name]
    with torch.device("meta"):
        network = ControlNet(ControlNetConfig.from_dict(config))
        theirs = tiny.peer("diffusers").ControlNetModel(**config)
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.controlnet_down_blocks) == skips
