"""Where the factors of adapters lie in the inputs of a bundle's networks."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from adapter_files import spec

from fastldm.adapters.forms import LoRA
from fastldm.adapters.packing import Layout, Packed, PackedParameters, layouts, products
from fastldm.adapters.selection import Parameter
from fastldm.adapters.targets import modules_of
from fastldm.errors import InputError

RANK = 6


@functools.cache
def layouts_of(family: str) -> Mapping[str, Layout]:
    model = spec(family)
    return layouts(model.unet, model.text, RANK)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_layer_has_a_slice_of_its_own(family: str) -> None:
    layers = {target for target, module in modules_of(spec(family)).modules.items() if len(module.weight) > 1}
    found = layouts_of(family)
    texts = {"text_encoder", "text_encoder_2"} if family == "sdxl" else {"text_encoder"}
    assert found.keys() == {*texts, "text_kv", "time_rows", "unet_step"}
    assert {own.target for layout in found.values() for own in layout} == layers
    for layout in found.values():
        ends = [(0, 0)]
        for own in layout:
            assert (own.down, own.up) == ends[-1]
            ends.append((own.down_end, own.up_end))
            down, up = own.down_shape, own.up_shape
            assert (down[0], up) == (RANK, (own.weight[0], RANK))
            assert own.weight[1:] in (down[1:], (*down[1:], 1, 1))
        assert [own for group in products(layout) for own in group] == list(layout)


def test_products_are_queries_keys_and_values() -> None:
    sizes = {name: {len(group) for group in products(layout)} for name, layout in layouts_of("sd1").items()}
    assert sizes == {"text_encoder": {1, 3}, "text_kv": {2}, "time_rows": {1}, "unet_step": {1, 3}}


def views(packed: Packed, layout: Layout, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = layout[k]
    down = packed.down[own.down : own.down_end].view(own.down_shape)
    return down.flatten(1), packed.up[own.up : own.up_end].view(own.up_shape)


def lora(layout: Layout, k: int, rank: int, fill: float) -> LoRA:
    own = layout[k]
    return LoRA(torch.full((rank, *own.weight[1:]), fill), torch.full((own.weight[0], rank), fill), 0.5)


def test_adapters_add_up_in_a_layer() -> None:
    layout = layouts_of("sd1")["text_kv"]
    packed = Packed(layout, torch.float32, torch.device("cpu"))
    parameters = PackedParameters({"text_kv": packed})
    at = Parameter(*layout[1].target, "weight")
    parameters.switch({at: ((lora(layout, 1, 2, 3.0), 2.0), (lora(layout, 1, 3, 5.0), -1.0))})
    down, up = views(packed, layout, 1)
    assert down[:, 0].tolist() == [3.0, 3.0, 5.0, 5.0, 5.0, 0.0]
    assert up[0].tolist() == [3.0, 3.0, -2.5, -2.5, -2.5, 0.0]
    assert not packed.down.view(-1)[: layout[1].down].any()
    assert not packed.down.view(-1)[layout[1].down_end :].any()
    parameters.switch({at: ((lora(layout, 1, 1, 1.0), 1.0),)})
    assert [x.count_nonzero().item() for x in views(packed, layout, 1)] == [layout[1].weight[1], layout[1].weight[0]]
    parameters.switch({})
    assert not packed.down.any()
    assert not packed.up.any()


def test_what_overflows_the_bundle_is_refused() -> None:
    """In all pictures of a batch: it is not infinite in itself, and becomes so in the dtype."""
    layout = layouts_of("sd1")["time_rows"]
    packed = Packed(layout, torch.float16, torch.device("cpu"))
    at = Parameter(*layout[0].target, "weight")
    parameters = PackedParameters({"time_rows": packed})
    with pytest.raises(InputError, match=r"linear_1 leave the range of this bundle"):
        parameters.switch({at: ((lora(layout, 0, 2, 600.0), 1000.0),)})
    assert not packed.up.any()
    parameters.switch({at: ((lora(layout, 0, 2, 600.0), 1.0),)})
    assert bool(packed.up.isfinite().all())
    assert float(packed.up.max()) == 300.0
