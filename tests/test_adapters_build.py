"""From the tensors of a module to its change: layouts of the same layer, and what does not belong together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.adapters.build import build_change
from fastldm.adapters.forms import LoRA
from fastldm.adapters.module_tensors import Alpha, Misfit, Tensors
from fastldm.adapters.targets import Module
from fastldm.errors import CheckpointError

LINEAR, POINTWISE, CONV = Module((8, 6), True), Module((8, 6, 1, 1), True), Module((8, 6, 3, 3), True)
NORM, PLAIN = Module((8,), True), Module((8, 6), False)


def ones(**shapes: tuple[int, ...]) -> Tensors:
    return Tensors({name: torch.ones(shape) for name, shape in shapes.items()}, "the module")


@pytest.mark.parametrize("module", [LINEAR, POINTWISE])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_linear_layers_and_1x1_convolutions_take_each_other(module: Module, kernel: tuple[int, ...]) -> None:
    """Stable Diffusion 1 and 2 differ in whether a projection is one, and so do trainers."""
    change = build_change(ones(lora_down=(2, 6, *kernel), lora_up=(8, 2, *kernel)), module)
    delta = change.weight_delta(torch.zeros(module.weight))
    assert delta is not None
    assert torch.equal(delta, torch.full(module.weight, 2.0))


@pytest.mark.parametrize(
    ("alpha", "stored", "scale"),
    [
        (Alpha(), None, 1.0),
        (Alpha(2.0), None, 0.5),
        (Alpha(2.0, True), None, 1.0),
        (Alpha(2.0), 8.0, 2.0),
        (Alpha(rank_stabilised=True), 8.0, 4.0),
    ],
)
def test_alpha_beside_the_tensors_replaces_the_header(alpha: Alpha, stored: float | None, scale: float) -> None:
    tensors = {"lora_down": torch.ones(4, 6), "lora_up": torch.ones(8, 4)}
    if stored is not None:
        tensors["alpha"] = torch.tensor(stored)
    form = build_change(Tensors(tensors, "the module"), LINEAR, alpha).lora
    assert form is not None
    assert math.isclose(form.scale, scale)


def test_bias_of_lora_has_its_scale() -> None:
    tensors = {"lora_down": torch.ones(4, 6), "lora_up": torch.ones(8, 4), "lora_up_bias": torch.ones(8)}
    change = build_change(Tensors(tensors, "the module"), LINEAR, Alpha(2.0))
    bias = change.bias_delta(0.5)
    assert isinstance(change.weight, LoRA)
    assert bias is not None
    assert torch.equal(bias, torch.full((8,), 0.25))


def test_bias_may_change_alone() -> None:
    change = build_change(ones(diff_b=(8,)), LINEAR)
    assert (change.weight, change.rank, change.weight_delta(torch.ones(8, 6))) == (None, None, None)
    assert change.bias_delta() is not None


MISFITS: dict[str, tuple[Module, dict[str, Any]]] = {
    "LoRA of a norm": (NORM, {"lora_down": (2, 8), "lora_up": (8, 2)}),
    "inputs": (LINEAR, {"lora_down": (2, 7), "lora_up": (8, 2)}),
    "outputs": (LINEAR, {"lora_down": (2, 6), "lora_up": (9, 2)}),
    "kernel": (CONV, {"lora_down": (2, 6, 5, 5), "lora_up": (8, 2, 1, 1)}),
    "kernel of a linear layer": (LINEAR, {"lora_down": (2, 6, 3, 3), "lora_up": (8, 2, 1, 1)}),
    "bias": (PLAIN, {"diff": (8, 6), "diff_b": (8,)}),
    "norm": (NORM, {"w_norm": (9,)}),
    "LoHa": (LINEAR, {"hada_w1_a": (8, 2), "hada_w1_b": (2, 5), "hada_w2_a": (8, 2), "hada_w2_b": (2, 5)}),
    "LoKr": (LINEAR, {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}),
    "LoKr across the kernel": (CONV, {"lokr_w1": (2, 9), "lokr_w2": (4, 6)}),
    "OFT": (LINEAR, {"oft_blocks": (2, 3, 3)}),
    "rescale": (LINEAR, {"oft_blocks": (2, 4, 4), "rescale": (7, 1)}),
    "GLoRA": (LINEAR, {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 7)}),
    "(IA)3": (LINEAR, {"ia3": (7,), "on_input": ()}),
    "DoRA": (LINEAR, {"lora_down": (2, 6), "lora_up": (8, 2), "dora_scale": (7, 1)}),
    "magnitudes": (LINEAR, {"lora_down": (2, 6), "lora_up": (8, 2), "magnitude": (6,)}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_of_another_shape_are_a_misfit(case: str) -> None:
    module, shapes = MISFITS[case]
    with pytest.raises(Misfit):
        build_change(ones(**shapes), module)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({"hada_w1_a": (8, 2), "hada_w1_b": (3, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}, "different ranks"),
    "LoHa of two ranks": (
        {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 3), "hada_w2_b": (3, 6)},
        "two products of different ranks",
    ),
    "half a LoHa": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 6)}, "no hada_w2_a"),
    "LoKr": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 3)}, "different ranks"),
    "LoKr of vectors": ({"lokr_w1": (2,), "lokr_w2": (4, 3)}, "a vector for a matrix"),
    "LoKr with a kernel first": ({"lokr_w1": (2, 2, 3, 3), "lokr_w2": (4, 3)}, "a first factor that is no matrix"),
    "Tucker core": ({"lora_down": (2, 6), "lora_up": (8, 2), "lora_mid": (3, 3, 3, 3)}, "joins no pair"),
    "OFT": ({"oft_blocks": (2, 4, 3)}, "expected square blocks"),
    "OFT of negative alpha": ({"oft_blocks": (2, 4, 4), "alpha": -1.0}, "expected a constraint of 0"),
    "BOFT of odd blocks": ({"oft_blocks": (1, 8, 1, 1)}, "pair no 8 rows"),
    "BOFT of too many stages": ({"oft_blocks": (70, 2, 4, 4)}, "pair no 8 rows"),
    "GLoRA": ({"a1": (6, 2), "a2": (3, 6), "b1": (8, 2), "b2": (2, 6)}, "different ranks"),
    "GLoRA with a core": ({"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6), "bm": (2, 2)}, "Tucker core"),
    "(IA)3": ({"ia3": (8,), "on_input": 2.0}, "expected 0 or 1"),
    "DoRA alone": ({"dora_scale": (8, 1)}, "part of no form"),
    "two lengths": (
        {"lora_down": (2, 6), "lora_up": (8, 2), "dora_scale": (8, 1), "magnitude": (8,)},
        "part of no form",
    ),
    "bias in LoHa": ({"oft_blocks": (2, 4, 4), "lora_up_bias": (8,)}, "in another form than plain LoRA"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_contradict_each_other_are_an_error(case: str) -> None:
    shapes, message = DAMAGED[case]
    tensors: dict[str, Tensor] = {
        name: torch.ones(shape) if isinstance(shape, tuple) else torch.tensor(shape) for name, shape in shapes.items()
    }
    with pytest.raises(CheckpointError, match=f"^the module .*{message}"):
        build_change(Tensors(tensors, "the module"), LINEAR)


def test_tucker_core_is_folded_into_down() -> None:
    down, up, mid = torch.randn(2, 6, 1, 1), torch.randn(8, 2, 1, 1), torch.randn(2, 2, 3, 3)
    change = build_change(Tensors({"lora_down": down, "lora_up": up, "lora_mid": mid}, "the module"), CONV)
    delta = change.weight_delta(torch.zeros(CONV.weight))
    assert delta is not None
    direct = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    assert torch.allclose(delta, direct, atol=1e-5)
