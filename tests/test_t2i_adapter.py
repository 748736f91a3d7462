"""T2I-Adapters, and a U-Net with their features, against diffusers, in float32."""

from __future__ import annotations

from typing import Any

import controls
import pytest
import torch
from peer_networks import TOLERANCE, error, go_as_gpus_do, inputs, judge, unet_of

from fastldm.errors import CheckpointError
from fastldm.kernels import dispatch
from fastldm.models import AddedConditions
from fastldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from fastldm.models.unet import Features

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", controls.T2I_ADAPTERS)
def test_features_and_adapted_unet_equal_diffusers(name: str) -> None:
    family, config = controls.T2I_ADAPTERS[name]
    theirs, network = controls.t2i_adapter(name), judge(family)
    ours, unet = controls.our_adapter_of(theirs), unet_of(network)
    for height, width in ((8, 8), (10, 6)):  # 10 is no multiple of the strides
        image = controls.image(8 * height, 8 * width, config.get("in_channels", 3))
        expected, features = theirs(image), ours(image)
        assert len(features) == len(expected)
        for mine, other in zip(features, expected, strict=True):
            assert error(mine, other) < TOLERANCE

        arguments = inputs(network, height, width)
        adapted = network(**arguments, down_intrablock_additional_residuals=[f.clone() for f in expected]).sample
        added = arguments.get("added_cond_kwargs")
        rows = unet.time_rows(arguments["timestep"], added=AddedConditions(**added) if added else None)
        kv = unet.cross_kv(arguments["encoder_hidden_states"])
        out = unet.step(arguments["sample"], rows, kv, features=[Features(features)])
        assert error(out, adapted) < TOLERANCE
        plain = unet.step(arguments["sample"], rows, kv)
        assert error(plain, adapted) > 0.01

        only_second = Features(tuple(feature[1:] for feature in features), first=1)
        out = unet.step(arguments["sample"], rows, kv, features=[only_second])
        assert torch.equal(out[0], plain[0])
        assert error(out[1], adapted[1]) < TOLERANCE


@pytest.mark.parametrize("name", list(controls.T2I_ADAPTERS)[:2])
def test_gpus_way_equals_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features come to convolutions that no norm has run yet; rows without are bitwise the same where that is asked."""
    go_as_gpus_do(monkeypatch)
    with dispatch.batch_invariant():
        test_features_and_adapted_unet_equal_diffusers(name)


@pytest.mark.parametrize("name", controls.T2I_ADAPTERS)
def test_strides_are_those_of_features(name: str) -> None:
    config = T2IAdapterConfig.from_dict(controls.t2i_adapter(name).config)
    with torch.device("meta"):
        features = T2IAdapter(config)(torch.empty(1, config.image_channels, 128, 128))
    assert tuple(128 // feature.shape[2] for feature in features) == config.strides
    assert tuple(feature.shape[1] for feature in features) == config.channels


def test_residuals_and_features_add_up() -> None:
    network, theirs = judge("sd1"), controls.t2i_adapter("full")
    unet, arguments, image = unet_of(network), inputs(network), controls.image()
    control = controls.controlnet("sd1")(**arguments, controlnet_cond=image)
    adapted = network(
        **arguments,
        down_intrablock_additional_residuals=theirs(image),
        down_block_additional_residuals=control.down_block_res_samples,
        mid_block_additional_residual=control.mid_block_res_sample,
    ).sample
    ours = controls.ours_of(controls.controlnet("sd1"))
    rows, kv = ours.time_rows(arguments["timestep"]), ours.cross_kv(arguments["encoder_hidden_states"])
    residuals = ours.step(arguments["sample"], rows, kv, ours.hint(image))
    features = Features(controls.our_adapter_of(theirs)(image))
    rows, kv = unet.time_rows(arguments["timestep"]), unet.cross_kv(arguments["encoder_hidden_states"])
    out = unet.step(arguments["sample"], rows, kv, residuals=[residuals], features=[features])
    assert error(out, adapted) < TOLERANCE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "MultiAdapter"),
        ("adapter_type", "style_adapter"),
        ("channels", []),
        ("num_res_blocks", 0),
        ("downscale_factor", 0),
    ],
)
def test_unsupported_values_are_refused_by_name(key: str, value: Any) -> None:
    config = dict(controls.t2i_adapter("full").config)
    with pytest.raises(CheckpointError, match=f"somewhere/config.json.*{key}"):
        T2IAdapterConfig.from_dict({**config, key: value}, "somewhere/config.json")
