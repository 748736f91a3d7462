"""Weights into networks: old names, and weights that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from states import Attention, named_tensors, on_meta, same_as
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.loading.diffusers_folder import open_diffusers
from fastldm.loading.state import load_module
from fastldm.models.clip import CLIPText
from fastldm.models.config import TextConfig


def test_tensors_of_right_dtype_are_not_copied(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    component = open_diffusers(tiny.save_pipeline("sd1", tmp_path)).components["unet"]
    state = component.state()
    module = on_meta(lambda: UNet2DConditionModel.from_config(component.config)).train()
    loaded = load_module(module, state, dtype=torch.float32, source=component.source)
    assert loaded is module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == {k: t.data_ptr() for k, t in state.items()}
    float16 = load_module(
        on_meta(lambda: nn.Linear(2, 2)), nn.Linear(2, 2).state_dict(), dtype=torch.float16, source="x"
    )
    assert float16.weight.dtype == torch.float16


def test_old_names_are_converted() -> None:
    gold = Attention()
    old = {"query": gold.to_q, "key": gold.to_k, "value": gold.to_v, "proj_attn": gold.to_out[0]}
    state = {f"0.{name}.{end}": t for name, module in old.items() for end, t in module.state_dict().items()}
    module = load_module(on_meta(lambda: nn.Sequential(Attention())), state, dtype=torch.float32, source="old")
    assert same_as(nn.Sequential(gold), module.state_dict())

    for kind, prefix in (("l", ""), ("bigg", "text_model.")):  # as this transformers names them, with either prefix
        encoder = tiny.text_encoder(kind)
        config = TextConfig.from_dict({**encoder.config.to_dict(), "architectures": [type(encoder).__name__]})
        state = {key.removeprefix("text_model."): t for key, t in encoder.state_dict().items()}
        spelled = {key if key == "text_projection.weight" else f"{prefix}{key}": t for key, t in state.items()}
        spelled[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        module = load_module(on_meta(partial(CLIPText, config)), spelled, dtype=torch.float32, source="clip")
        got = {key.removeprefix("text_model."): t for key, t in module.state_dict().items()}
        assert set(got) == set(state)
        assert all(torch.equal(got[key], state[key]) for key in got)


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (
        lambda s: {k: t for k, t in s.items() if k != "to_q.bias"},
        r"1 tensor missing \(to_q\.bias\)\. They belong to",
    ),
    "unexpected": (
        lambda s: s | named_tensors("conv.weight", "a", "b", "c"),
        r"4 tensors unexpected \(conv\.weight, a, b, \.\.\.\)",
    ),
    "shape": (
        lambda s: s | {"to_k.weight": torch.zeros(4, 9)},
        r"1 tensor of another shape \(to_k\.weight is \(4, 9\), expected \(4, 4\)\)\. They belong to another model",
    ),
    "another kind": (
        lambda _: named_tensors("lm_head.weight", "wte.weight"),
        "They are from an entirely different kind of model",
    ),
    "LoRA": (lambda _: named_tensors("to_q.lora_A.weight", "to_q.lora_B.weight"), "It is a LoRA or contains one"),
    "loaded LoRA": (lambda s: s | named_tensors("to_q.lora_A.default.weight"), "It is a LoRA or contains one"),
    "int8": (
        lambda s: s | {"to_q.weight": torch.zeros(4, 4, dtype=torch.int8)},
        r"1 tensor not floating point.*look quantised",
    ),
    "absmax": (lambda s: s | named_tensors("to_q.weight.absmax"), "They look quantised"),
    "both prefixes": (
        lambda s: s | {"text_model.to_q.bias": torch.zeros(4)},
        r"1 tensor unexpected \(text_model\.to_q\.bias\)",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_misfitting_weights_change_nothing(kind: str) -> None:
    change, message = MISFITS[kind]
    module = on_meta(Attention)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_module(module, change(Attention().state_dict()), dtype=torch.float32, source="unet/weights.safetensors")
    assert str(caught.value).startswith("The weights in unet/weights.safetensors do not fit: ")
    assert all(p.is_meta for p in module.parameters())
