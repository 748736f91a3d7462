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


def sample_input(module: nn.Module, weight: Tensor) -> Tensor:
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
def running(live: Any, *networks: Any, algo: str = "locon") -> Iterator[Any]:
    """A network of lycoris at work with random weights. networks: what its `apply_to` takes."""
    live.apply_to(*networks)
    try:
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                noise = torch.randn_like(parameter)
                if name.endswith("dora_scale"):
                    parameter *= 1 + 0.2 * noise
                elif name.endswith("rescale"):
                    parameter += 0.2 * noise
                elif algo == "full" or parameter.ndim < 2:
                    parameter += 0.1 * noise
                else:
                    parameter.copy_(noise * (0.1 if "oft" in algo else 0.4))
        yield live.eval()
    finally:
        for lora in live.loras:
            lora.restore()


def lycoris_file(path: Path, network: nn.Module, component: str, **options: Any) -> dict[Target, Live]:
    """Write the file of a live network on a module, with `lycoris_`; its modules with their outputs at two scales.
    Options are those of create_lycoris."""
    live = tiny.peer("lycoris.wrapper").create_lycoris(network, warn_on_unmatched=False, **options)
    before = weights({component: network})
    with running(live, algo=options.get("algo", "locon")) as live:
        lives = lycoris_outputs(live, before)
        live.save_weights(str(path), None, None)
    return lives


def kohya_file(
    path: Path, pipe: Any, *, dtype: torch.dtype | None = None, rank: int = 4, alpha: float = 2, **options: Any
) -> dict[Target, Live]:
    """The same of a pipeline's U-Net and text encoders, with the prefixes of kohya's trainers. Options are those of
    create_network."""
    texts = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    text = texts if len(texts) > 1 else texts[0]
    create = tiny.peer("lycoris.kohya").create_network
    live = create(1.0, rank, alpha, None, text, pipe.unet, warn_on_unmatched=False, **options)
    before = weights({"unet": pipe.unet} | dict(zip(("text_encoder", "text_encoder_2"), texts, strict=False)))
    with running(live, text, pipe.unet, True, True, algo=options.get("algo", "locon")) as live:
        if dtype is not None:
            live.to(dtype).float()  # what the file will hold
        lives = lycoris_outputs(live, before)
        live.save_weights(str(path), dtype, {})
    return lives


Before = dict[nn.Module, tuple[Target, Tensor, Tensor | None]]


def weights(networks: Mapping[str, nn.Module]) -> Before:
    """The modules of networks with their weights and biases, before anything adapts them."""
    before: Before = {}
    for component, network in networks.items():
        for name, module in network.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor):
                target = Target(component, text_path(name) if component != "unet" else name)
                before[module] = (target, weight.clone(), None if bias is None else bias.clone())
    return before


def text_path(name: str) -> str:
    """A module's path in our text encoders; transformers has left `text_model.` out of some since version 5."""
    return name if name.startswith("text_") else f"text_model.{name}"


def lycoris_outputs(live: Any, before: Before) -> dict[Target, Live]:
    lives = {}
    with torch.no_grad():
        for lora in live.loras:
            module = lora.org_module[0]
            target, weight, bias = before[module]
            x, outputs = sample_input(module, weight), {}
            for scale in (1.0, 0.6):
                lora.multiplier = scale
                outputs[scale] = module(x)
            lives[target] = Live(module, weight, bias, x, outputs)
    return lives


# --- peft ---


def adapt(network: nn.Module, component: str, **options: Any) -> dict[Target, Live]:
    """Add a LoRA of peft to a network of diffusers or transformers, with random weights, as `network.add_adapter` does;
    its modules with their outputs at two scales. Options are those of peft's LoraConfig."""
    config = tiny.peer("peft").LoraConfig(**{"r": 4, "init_lora_weights": False, **options})
    network.add_adapter(config)  # type: ignore[operator]
    return peft_outputs(network, component)


def peft_outputs(network: nn.Module, component: str, *, randomise: bool = True) -> dict[Target, Live]:
    """Randomise what peft added to a network, and run each module that it changed."""
    lives = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters() if randomise else ():
            if ".lora_magnitude_vector." in name:
                parameter *= 1 + 0.2 * torch.randn_like(parameter)
            elif ".lora_" in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
        for name, layer in network.named_modules():
            module: Any = getattr(layer, "base_layer", None)
            if module is None or not hasattr(layer, "set_scale"):
                continue
            path = name.removeprefix("base_model.model.")
            path = text_path(path) if component != "unet" else path
            x, outputs = sample_input(module, module.weight), {}
            for scale in (0.6, 1.0):
                layer.set_scale("default", scale)
                outputs[scale] = layer(x)
            lives[Target(component, path)] = Live(module, module.weight, module.bias, x, outputs)
    return lives
