"""adapters/selection.py: scales by component and block, and what a selection is."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

from benchmarks.networks import SD15
from fastldm.adapters.forms import Change, Difference, LoRA
from fastldm.adapters.read import Adapter
from fastldm.adapters.selection import Parameter, Selected, Selection, expand
from fastldm.adapters.targets import Target
from fastldm.errors import InputError

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
MODULES = (
    Target("unet", ATTENTION),
    Target("unet", "down_blocks.1.resnets.0.conv1"),
    Target("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
)


def adapter(rank: int = 4) -> Adapter:
    factors = LoRA(torch.ones(rank, 2), torch.ones(2, rank), 1.0)
    changes = {target: Change(factors, bias=torch.ones(2)) for target in MODULES}
    return Adapter("a", "nowhere", "kohya", "0" * 12, MappingProxyType(changes), ())


def selected(weight: Any) -> Selected:
    return Selected.of("a", adapter(), weight, SD15)


def test_blocks_scale_their_attention_only() -> None:
    weight = {"text_encoder": 0.5, "unet": {"down": {"block_1": [0.3, 0.7]}, "mid": 2.0}}
    one = selected(weight)
    assert [one.scale(target) for target in MODULES] == [0.3, 1.0, 0.5]
    assert one.scale(Target("unet", "down_blocks.1.attentions.1.proj_in")) == 0.7
    assert one.scale(Target("unet", "down_blocks.2.attentions.1.proj_in")) == 1.0
    assert one.scale(Target("unet", "mid_block.attentions.0.proj_in")) == 2.0
    assert one.scale(Target("unet", "mid_block.resnets.0.conv1")) == 1.0


def test_block_one_is_not_block_ten() -> None:
    scales = (("unet.down_blocks.1.attentions.1", 0.5), ("", 1.0))
    one = Selected(adapter(), scales)
    assert one.scale(Target("unet", "down_blocks.1.attentions.10.proj_in")) == 1.0


def test_parts_are_when_parameters_are_read() -> None:
    parts = {
        ("unet", ATTENTION, "weight"): "step",
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "weight"): "conditions",
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "weight"): "step",
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "weight"): "step",
        ("unet", "up_blocks.0.resnets.0.time_emb_proj", "bias"): "conditions",
        ("unet", "up_blocks.0.resnets.0.conv1", "bias"): "conditions",
        ("unet", "up_blocks.0.resnets.0.conv1", "weight"): "step",
        ("unet", "time_embedding.linear_1", "weight"): "conditions",
        ("unet", "add_embedding.linear_2", "weight"): "conditions",
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "weight"): "text",
    }
    assert {names: Parameter(*names).part for names in parts} == parts


def test_scale_zero_is_absent() -> None:
    assert not Selection([selected(0.0)]).selected
    assert selected({"unet": 0}).deltas.keys() == {
        Parameter("text_encoder", MODULES[2].module, leaf) for leaf in ("weight", "bias")
    }
    assert not Selection([selected({"unet": 0})]).step


def test_within_keeps_some_components() -> None:
    one = selected({"unet": {"mid": 0.5}}).within(["text_encoder"])
    assert {parameter.component for parameter in one.deltas} == {"text_encoder"}


def test_selection_is_a_mapping_of_weights() -> None:
    selection = Selection([selected(0.5)], fused=[selected(2.0)])
    assert selection == {"a": 0.5}
    assert dict(selection) == {"a": 0.5}
    assert len(selection.deltas[Parameter("unet", ATTENTION, "weight")]) == 2
    assert len(selection.step) == 2
    assert len(selection.own_step) == 1


def test_bias_in_a_step_is_not_of_low_rank() -> None:
    """A row's own bias would be a pass of its own."""
    selection = Selection([selected(1.0)])
    assert not selection.of_low_rank
    forms = {type(form) for deltas in selection.deltas.values() for form, _ in deltas}
    assert forms == {LoRA, Difference}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"unet": {"down": {"block_3": 1}}}, "names 'block_3': expected block_0, block_1, block_2"),
        ({"unet": {"mid": [1, 2]}}, "has 2 scales for mid: expected 1"),
        ({"unet": {"up": {"block_1": {"x": 1}}}}, "expected a number or a list"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand(weight, SD15, "a")
