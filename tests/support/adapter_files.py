"""Adapter files as lycoris-lora and peft write them, with the outputs of the live modules that wrote them.

The judge is the network that wrote a file, while it ran: readers of these formats disagree with it (they drop
`dora_scale`, apply alpha twice, or fail), and so does a file written by fastldm's own idea of the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.adapters.forms import Change
from fastldm.adapters.read import Adapter
from fastldm.adapters.targets import Target
from fastldm.loading.adoption import describe_diffusers
from fastldm.loading.spec import Spec, spec_of


@cache
def pipeline(family: str) -> Any:
    """A diffusers pipeline whose networks tests adapt and restore."""
    return tiny.pipeline(family)


@cache
def spec(family: str) -> Spec:
    return spec_of(describe_diffusers(tiny.pipeline(family)))


@dataclass(frozen=True)
class Live:
    """A module as it was, an input, and the outputs of the live module that an adapter changes, by the user's scale."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    outputs: dict[float, Tensor]


def sample_input(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    if isinstance(module, nn.Conv2d):
        return torch.randn(2, weight.shape[1], 5, 6)
    if isinstance(module, nn.GroupNorm):
        return torch.randn(2, weight.shape[0], 3, 4)
    return torch.randn(2, 5, weight.shape[-1])


def apply(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A module's function with another weight and bias."""
    if isinstance(module, nn.Conv2d):
        padding: Any = module.padding
        return F.conv2d(x, weight, bias, module.stride, padding)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, weight.shape, weight, bias, module.eps)
    return F.linear(x, weight, bias)


def error(live: Live, change: Change, scale: float = 1.0) -> float:
    """max|ours - live| / max|live| of a module's output at a scale."""
    weight, bias = live.weight, live.bias
    if (delta := change.weight_delta(weight, scale)) is not None:
        assert delta.dtype == torch.float32
        assert delta.shape == weight.shape
        weight = weight.float() + delta
    if (shift := change.bias_delta(scale)) is not None:
        assert bias is not None
        bias = bias + shift
    ours = apply(live.module, weight, bias, live.x)
    y = live.outputs[scale]
    return float((ours - y).abs().max() / y.abs().max())


def visible(live: Live) -> bool:
    """Whether its outputs differ from those without an adapter."""
    base = apply(live.module, live.weight, live.bias, live.x)
    return all(bool((y - base).abs().max() > 1e-3 * base.abs().max()) for y in live.outputs.values())


def worst(adapter: Adapter, lives: Mapping[Target, Live]) -> float:
    """The largest error of all modules and scales; the adapter changes exactly the modules that the live network did,
    and nearly all visibly."""
    assert set(adapter.changes) == set(lives)
    assert not adapter.left
    with torch.no_grad():
        seen = [visible(live) for live in lives.values()]
        assert sum(seen) >= 0.95 * len(seen)  # blocks of one row, of `conv_out`, cannot turn
        return max(error(live, adapter.changes[at], scale) for at, live in lives.items() for scale in live.outputs)


# --- lycoris-lora ---


@contextmanager
def lycoris(network: nn.Module, prefix: str, **options: Any) -> Iterator[Any]:
    """lycoris' live network on a module, with random weights; the module is restored afterwards."""
    wrapper = tiny.peer("lycoris.wrapper")
    wrapper.LycorisNetwork.LORA_PREFIX = prefix
    live = wrapper.create_lycoris(network, warn_on_unmatched=False, **options)
    live.apply_to()
    try:
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                noise = torch.randn_like(parameter)
                if name.endswith("dora_scale"):
                    parameter *= 1 + 0.2 * noise
                elif name.endswith("rescale"):
                    parameter += 0.2 * noise
                elif options.get("algo") == "full" or parameter.ndim < 2:
                    parameter += 0.1 * noise
                else:
                    parameter.copy_(noise * (0.1 if "oft" in name else 0.4))
        yield live.eval()
    finally:
        live.restore()


def lycoris_file(
    path: Path, network: nn.Module, component: str, *, prefix: str = "lycoris", **options: Any
) -> dict[Target, Live]:
    """Write the file of a live network at `path`; its modules with their outputs at two scales."""
    paths = {module: name for name, module in network.named_modules()}
    before = {
        module: (module.weight.clone(), None if getattr(module, "bias", None) is None else module.bias.clone())
        for module in paths
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    lives = {}
    with lycoris(network, prefix, **options) as live, torch.no_grad():
        for lora in live.loras:
            module = lora.org_module[0]
            weight, bias = before[module]
            x = sample_input(lora_like(module, weight))
            name = paths[module]
            if component != "unet" and not name.startswith("text_"):
                name = f"text_model.{name}"  # which transformers has left out since version 5
            outputs = {}
            for scale in (1.0, 0.6):
                lora.multiplier = scale
                outputs[scale] = module(x)
            lives[Target(component, name)] = Live(module, weight, bias, x, outputs)
        live.save_weights(str(path), None, None)
    return lives


def lora_like(module: nn.Module, weight: Tensor) -> Any:
    """A stand-in with the weight that `full` takes off a module."""
    if isinstance(getattr(module, "weight", None), Tensor):
        return module
    stand_in = nn.Conv2d(1, 1, 1) if isinstance(module, nn.Conv2d) else nn.Linear(1, 1)
    stand_in.weight = nn.Parameter(weight)
    return stand_in


# --- peft ---


def adapt(network: nn.Module, component: str, **options: Any) -> dict[Target, Live]:
    """Add a LoRA of peft to a network of diffusers or transformers, with random weights, as `network.add_adapter` does;
    its modules with their outputs at two scales. Options are those of peft's LoraConfig."""
    config = tiny.peer("peft").LoraConfig(**{"r": 4, "init_lora_weights": False, **options})
    network.add_adapter(config)  # type: ignore[operator]
    return peft_outputs(network, component)


def peft_outputs(network: nn.Module, component: str) -> dict[Target, Live]:
    """Randomise what peft added to a network, and run each module that it changed."""
    lives = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_magnitude_vector." in name:
                parameter *= 1 + 0.2 * torch.randn_like(parameter)
            elif ".lora_" in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
        for name, layer in network.named_modules():
            module: Any = getattr(layer, "base_layer", None)
            if module is None or not hasattr(layer, "set_scale"):
                continue
            path = name.removeprefix("base_model.model.")
            if component != "unet" and not path.startswith("text_"):
                path = f"text_model.{path}"
            x, outputs = sample_input(module), {}
            for scale in (0.6, 1.0):
                layer.set_scale("default", scale)
                outputs[scale] = layer(x)
            lives[Target(component, path)] = Live(module, module.weight, module.bias, x, outputs)
    return lives
