"""The U-Net's large linear layers in eight bits, on demand (kernels/fp8.py has the arithmetic).

Each input has one scale, from the largest number that it had in all steps of a request of the model's own: calibration
runs one, without graphs, and watches. Weights are quantised beside the originals, which stay: they are read when it is
switched off, and the eight bits are computed again when they change (loading/prepare.py).

A layer is large where its weight has a million numbers and its input 256 rows: below that a product waits for its
launch or its weight and not for the matrix units, and the pass that quantises its input costs what it gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import InputError
from fastldm.kernels import dispatch, fp8
from fastldm.loading.prepare import Derived, ParameterSlot, TensorSpec
from fastldm.models.layers import EightBits, Linear
from fastldm.models.unet import UNet
from fastldm.request import Request
from fastldm.runtime.stages import Stages

LEAST_WEIGHT, LEAST_ROWS = 2**20, 256


def enable(stages: Stages, request: Request, least_weight: int = LEAST_WEIGHT, least_rows: int = LEAST_ROWS) -> int:
    """Calibrate by a request and switch over. Returns the number of layers.

    InputError for a GPU without matrix units for e4m3, for a bundle, and for a model without large layers. Whatever is
    raised, the layers are what they were: in eight bits of before, if they were.
    """
    unet = stages.unet
    if not isinstance(unet, UNet):
        raise InputError(f"backend {stages.backend} cannot change its layers: fp8 is for backend torch")
    if stages.device.type == "cuda" and dispatch.device_capability(stages.device.index or 0) < fp8.OLDEST:
        name = torch.cuda.get_device_name(stages.device)
        raise InputError(f"{name} has no matrix units for fp8: an NVIDIA GPU of Ada or later has (sm_{fp8.OLDEST})")
    layers = _linear_layers(stages)
    with stages.eager(), switched(layers, [None] * len(layers)):
        groups = large_products(unet, lambda: stages.make(request), least_weight, least_rows)
    if not groups:
        raise InputError(
            f"no linear layer of {stages.name} has {least_weight:,} weights and {least_rows} rows of input at "
            f"{request.width}x{request.height}: smaller ones gain nothing by fp8"
        )
    disable(stages)
    names = {layer: name for name, layer in unet.named_modules() if isinstance(layer, Linear)}
    derived = [entry for layers, largest in groups for entry in quantize(layers, largest.item(), names)]
    stages.prepared.add(derived)
    stages.layers_changed()
    return sum(len(layers) for layers, _ in groups)


def disable(stages: Stages) -> None:
    """Go back to the weights. No effect where fp8 is off."""
    if is_on(stages):
        for layer in _linear_layers(stages):
            layer.eight_bits = None
        stages.prepared.remove(lambda derived: derived.name.endswith(_SUFFIXES))
        stages.layers_changed()


def is_on(stages: Stages) -> bool:
    return any(layer.eight_bits is not None for layer in _linear_layers(stages))


def _linear_layers(stages: Stages) -> list[Linear]:
    unet = stages.unet
    return [layer for layer in unet.modules() if isinstance(layer, Linear)] if isinstance(unet, UNet) else []


@contextmanager
def switched(layers: Sequence[Linear], bits: Sequence[EightBits | None]) -> Iterator[None]:
    """Inside, the layers multiply by these eight bits, or by their weights where None."""
    before = [layer.eight_bits for layer in layers]
    try:
        for layer, value in zip(layers, bits, strict=True):
            layer.eight_bits = value
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.eight_bits = value


def large_products(
    unet: nn.Module, run: Callable[[], object], least_weight: int = LEAST_WEIGHT, least_rows: int = LEAST_ROWS
) -> list[tuple[list[Linear], Tensor]]:
    """Layers that `run` multiplies by at once and that are large, each with the largest number of their input."""
    layers = [layer for layer in unet.modules() if isinstance(layer, Linear)]
    largest: dict[tuple[int, int], Tensor] = {}
    groups: dict[tuple[int, int], list[Linear]] = {}

    def place(weight: Tensor) -> tuple[int, int]:
        """Its memory and where it starts there. (Not its address, for on the meta device there is none.)"""
        return weight.untyped_storage()._cdata, int(weight.storage_offset())

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.name not in ("linear", "linear_geglu"):
            return
        x, weight = args[:2]
        if weight.numel() < least_weight or x.numel() // x.shape[-1] < least_rows:
            return
        memory, start = place(weight)
        inside = range(start, start + weight.numel())
        if (memory, start) not in groups:
            places = [(place(layer.weight), layer) for layer in layers]
            groups[memory, start] = [layer for (own, at), layer in places if own == memory and at in inside]
        found = x.abs().amax().float()
        so_far = largest.get((memory, start), found)
        largest[memory, start] = torch.maximum(so_far, found)

    with dispatch.observe(watch):
        run()
    return [(groups[key], value) for key, value in largest.items() if groups[key]]


_SUFFIXES = (".eight_bits.weight", ".eight_bits.scale")


def quantize(layers: list[Linear], largest: float, names: Mapping[Linear, str] = {}) -> list[Derived]:
    """Give layers that are one product their eight bits, side by side in memory. An input of zeros has scale 1."""
    x_scale = largest / fp8.LARGEST or 1.0
    rows = [layer.weight.shape[0] for layer in layers]
    first = layers[0].weight
    weights = torch.empty((sum(rows), first.shape[1]), dtype=fp8.E4M3, device=first.device).split(rows)
    scales = torch.empty(sum(rows), dtype=torch.float32, device=first.device).split(rows)

    def bits_of(weight: Tensor) -> Tensor:
        return fp8.quantize_weight(weight)[0].view(torch.uint8)

    def scale_of(weight: Tensor) -> Tensor:
        return fp8.weight_scale(weight) * x_scale

    derived: list[Derived] = []
    for layer, weight, scale in zip(layers, weights, scales, strict=True):
        source, spec = ParameterSlot(layer._parameters, "weight"), TensorSpec.of(layer.weight)
        bits = weight.view(torch.uint8)
        for suffix, data, compute in zip(_SUFFIXES, (bits, scale), (bits_of, scale_of), strict=True):
            data.copy_(compute(layer.weight))
            derived.append(Derived(f"unet.{names.get(layer, '')}{suffix}", data, source, spec, compute))
        layer.eight_bits = EightBits(weight, scale, x_scale)
    return derived
