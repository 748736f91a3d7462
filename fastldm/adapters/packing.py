"""The factors of adapters as inputs of a bundle's networks: two flat tensors each, with a slice for each layer.

    lora_down     of each layer A (R, in), or (R, in, kh, kw) of a convolution
    lora_up       of each layer B (out, R)
    lora_scale    (B, R), of the network that runs in each step: row b of its batch has s B A of what has scales there

A network has R places, each of a rank of 1 in all its layers. An adapter of rank r takes r of them, and what is in no
place is zero. Layers are in the order of their network's modules, those that are one product (queries, keys and values)
side by side. Few inputs, whatever the model: a layer's slice is at a fixed offset, which the bundle's manifest says.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastldm.adapters.forms import LoRA
from fastldm.adapters.selection import Deltas, Parameter
from fastldm.adapters.targets import Target, of_configs
from fastldm.errors import InputError
from fastldm.models.config import TextConfig, UNetConfig
from fastldm.models.families import encoder_names

DOWN, UP, SCALE = "lora_down", "lora_up", "lora_scale"
_STACKED = {"to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"}


@dataclass(frozen=True)
class Slice:
    """A layer's factors in the flat tensors of its network."""

    target: Target
    weight: tuple[int, ...]
    """The shape of the layer's weight."""
    rank: int
    down: int
    """Where A begins."""
    up: int
    """Where B begins."""

    @property
    def down_shape(self) -> tuple[int, ...]:
        """(R, in) or (R, in, kh, kw)."""
        product = self.weight[2:] in ((), (1, 1))
        return (self.rank, *self.weight[1:2]) if product else (self.rank, *self.weight[1:])

    @property
    def up_shape(self) -> tuple[int, int]:
        return self.weight[0], self.rank

    @property
    def down_end(self) -> int:
        return self.down + prod(self.down_shape)

    @property
    def up_end(self) -> int:
        return self.up + prod(self.up_shape)

    def to_dict(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        return {
            "module": str(self.target),
            "down": {"offset": self.down, "shape": list(self.down_shape)},
            "up": {"offset": self.up, "shape": list(self.up_shape)},
        }


Layout = tuple[Slice, ...]


def layouts(unet: UNetConfig, texts: Sequence[TextConfig], rank: int) -> dict[str, Layout]:
    """By network of a bundle that is split, the slices of all its linear layers and convolutions."""
    found: dict[str, list[Slice]] = {}
    for target, module in of_configs(unet, tuple(zip(encoder_names(texts), texts, strict=True))).modules.items():
        if len(module.weight) == 1:  # a norm
            continue
        slices = found.setdefault(network_of(Parameter.of(*target, "weight", unet)), [])
        ends = (slices[-1].down_end, slices[-1].up_end) if slices else (0, 0)
        slices.append(Slice(target, module.weight, rank, *ends))
    return {name: tuple(slices) for name, slices in found.items()}


def network_of(parameter: Parameter) -> str:
    """The network of a split bundle that a layer's weight is in."""
    if parameter.part == "text":
        return parameter.component
    if parameter.part == "step":
        return "unet_step"
    return "text_kv" if parameter.module.endswith((".to_k", ".to_v")) else "time_rows"


def products(layout: Layout) -> Iterator[list[Slice]]:
    """The layers of a network, those that are one product together."""

    def product(own: Slice) -> tuple[str, str]:
        parent, _, name = own.target.module.rpartition(".")
        return parent, "" if name in _STACKED else name

    for _, group in itertools.groupby(layout, product):
        yield list(group)


class Packed:
    """The factors of a network, which its engine reads: zeros, and what is written to them."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = layout[0].rank
        self.down = torch.zeros(layout[-1].down_end, dtype=dtype, device=device)
        self.up = torch.zeros(layout[-1].up_end, dtype=dtype, device=device)
        self._slices = {own.target: own for own in layout}

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    @property
    def targets(self) -> Collection[Target]:
        """Its layers."""
        return self._slices.keys()

    def cast(self, target: Target, form: LoRA, scale: float) -> tuple[Tensor, Tensor]:
        """A (r, in * kh * kw) and B (out, r), with its scale, as the network reads them. InputError for what leaves the
        range of its dtype."""
        a, b, own = form.factors()
        pair = (a.float(), b.float() * (own * scale))
        # not infinity either where an engine computes in bfloat16
        limit = min(torch.finfo(self.down.dtype).max, torch.finfo(torch.bfloat16).max)
        if not all(bool(factor.abs().amax() <= limit) for factor in pair):
            name = str(self.down.dtype).removeprefix("torch.")
            raise InputError(f"the factors of {target} leave the range of this bundle, which is in {name}")
        return pair[0].to(self.down), pair[1].to(self.up)

    def write(self, target: Target, places: Sequence[int], factors: tuple[Tensor, Tensor]) -> None:
        """Write factors to places of a layer."""
        down, up = self._views(target)
        down[list(places)], up[:, list(places)] = factors

    def clear(self, target: Target, places: Sequence[int] | None = None) -> None:
        """Zeros in some places of a layer, or in all."""
        down, up = self._views(target)
        rows = list(range(self.rank) if places is None else places)
        down[rows], up[:, rows] = 0, 0

    def _views(self, target: Target) -> tuple[Tensor, Tensor]:
        own = self._slices[target]
        down = self.down[own.down : own.down_end].view(self.rank, -1)
        return down, self.up[own.up : own.up_end].view(own.up_shape)


class PackedParameters:
    """The layers of some networks whose factors are the same for all rows: those of the request in hand. In place of
    `runtime.merge.Merged`."""

    parameters: frozenset[Parameter] = frozenset()

    def __init__(self, networks: Mapping[str, Packed]) -> None:
        self._networks = networks
        self._current: dict[Parameter, Deltas | None] = {}  # None: not known

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in self._networks.values())

    @torch.no_grad()
    def switch(self, deltas: Mapping[Parameter, Deltas]) -> bool:
        """Give the layers these changes and no others. Whatever is raised, the next call goes on from there."""
        changed = [p for p in {**self._current, **deltas} if self._current.get(p, ()) != deltas.get(p, ())]
        for parameter in changed:
            target = Target(parameter.component, parameter.module)
            packed, own = self._networks[network_of(parameter)], deltas.get(parameter, ())
            factors = [packed.cast(target, form, scale) for form, scale in own if isinstance(form, LoRA)]
            self._current[parameter] = None
            packed.clear(target)
            start = 0
            for pair in factors:
                packed.write(target, range(start, start := start + len(pair[0])), pair)
            self._current[parameter] = own
        self._current = {parameter: own for parameter, own in self._current.items() if own}
        return False  # nothing is derived from them

    def has_copy(self, parameter: Parameter) -> bool:
        """Nothing is copied before it is changed."""
        return True

    def forget(self, parameter: Parameter) -> None:
        """Nothing is kept."""

    def trim(self) -> None:
        """Nothing is kept."""
