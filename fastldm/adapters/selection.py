"""Which adapters a request is made with, and how strongly: `Selection`.

A weight is a number for all that an adapter changes, or diffusers' dictionary by component and block:

    {"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 1.0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}}

What it does not name has 1, and of a block it means the attention, as in diffusers: resnets have 1. Either may have an
interval, {"scale": 0.8, "start": 0.0, "end": 0.5}: the steps between those fractions, as of `guidance_interval`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fastldm.adapters.forms import Form, LoRA
from fastldm.adapters.key_formats import COMPONENTS
from fastldm.adapters.read import Adapter
from fastldm.adapters.targets import Target
from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.models.config import UNetConfig
from fastldm.models.unet_config import TimeNorm

Weight = float | Mapping[str, Any]
Part = Literal["text", "conditions", "step"]
"""When a parameter is read: by the text encoders, once a request by the U-Net (keys and values of the text, all that
comes from the timestep), or in every step."""


class Parameter(NamedTuple):
    """A parameter of a model, as a change names it."""

    component: str
    module: str
    leaf: str  # "weight" or "bias"
    of_text: bool = False  # whether it is in a first attention that reads the text, as second ones do
    time_norm: TimeNorm = "shift"  # of its U-Net

    @staticmethod
    def of(component: str, module: str, leaf: str, config: UNetConfig) -> Parameter:
        if component != "unet":
            return Parameter(component, module, leaf)
        return Parameter(component, module, leaf, config.reads_text_first(module), config.time_norm)

    def __str__(self) -> str:
        return ".".join(self[:3])

    @property
    def part(self) -> Part:
        if self.component != "unet":
            return "text"
        once = self.module.startswith(_EMBEDDINGS) or self.module.endswith(
            (*_READERS, *((".to_k", ".to_v") if self.of_text else ()))
        )
        # What time rows are folded with (models/resnet.py): a resnet's first bias, or its second norm.
        if self.time_norm == "shift":
            once |= self.module.endswith(".conv1") and self.leaf == "bias"
        elif self.time_norm == "scale":
            once |= _SECOND_NORM.search(self.module) is not None
        return "conditions" if once else "step"


_EMBEDDINGS = ("time_embedding.", "add_embedding.", "class_embedding.", "encoder_hid_proj")
_READERS = (  # of the text, and of the time
    *(".attn2.to_k", ".attn2.to_v", ".add_k_proj", ".add_v_proj", ".norm_cross"),
    *(".time_emb_proj", ".norm1.linear", ".norm2.linear"),
)
_SECOND_NORM = re.compile(r"(resnets|samplers)\.\d+\.norm2$")

Deltas = tuple[tuple[Form, float], ...]
"""What is added to a parameter: forms with the user's scales."""


@dataclass(frozen=True)
class Selected:
    """An adapter and its scales: those of `scales` by the start of a target's path, the longest first. Hashed by them
    and by the adapter's identity."""

    adapter: Adapter
    scales: tuple[tuple[str, float], ...]
    interval: tuple[float, float] = (0.0, 1.0)
    """What a step reads counts from this fraction of the steps on and before that; the rest counts at every scale."""
    config: UNetConfig | None = field(compare=False, default=None, repr=False)
    name: str = field(compare=False, default="")
    weight: Weight = field(compare=False, default=1.0)

    @staticmethod
    def of(name: str, adapter: Adapter, weight: Weight, config: UNetConfig) -> Selected:
        """InputError for a weight that names what the model does not have."""
        scale, interval = _interval(weight, name)
        return Selected(adapter, _longest_first(expand(scale, config, name)), interval, config, name, weight)

    def within(self, components: Collection[str]) -> Selected:
        """The same for some components only."""
        rest = [component for component in COMPONENTS if component not in components]
        scales = {path: 0.0 if path.split(".")[0] in rest else scale for path, scale in self.scales}
        return replace(self, scales=_longest_first(scales | dict.fromkeys(rest, 0.0)))

    def scale(self, target: Target) -> float:
        path = f"{target}."
        return next((scale for start, scale in self.scales if not start or path.startswith(f"{start}.")), 1.0)

    @property
    def absent(self) -> bool:
        """Whether all scales are 0."""
        return not any(scale for _, scale in self.scales)

    @cached_property
    def deltas(self) -> Mapping[Parameter, tuple[Form, float]]:
        """By parameter, without those of scale 0."""
        deltas: dict[Parameter, tuple[Form, float]] = {}
        for target, change in self.adapter.changes.items():
            scale = self.scale(target)
            for leaf, form in (("weight", change.weight), ("bias", change.bias_form)):
                if form is not None and scale != 0:
                    deltas[self._parameter(target, leaf)] = (form, scale)
        return deltas

    def _parameter(self, target: Target, leaf: str) -> Parameter:
        return Parameter(*target, leaf) if self.config is None else Parameter.of(*target, leaf, self.config)

    @cached_property
    def step(self) -> Mapping[str, tuple[Form, float]]:
        """Those of weights and biases that every step reads, by the parameter's name in the U-Net."""
        return {
            f"{parameter.module}.{parameter.leaf}": delta
            for parameter, delta in self.deltas.items()
            if parameter.part == "step"
        }


class Selection(Mapping[str, Weight]):
    """Adapters by name, in the order in which they are added; a mapping to their weights. Never changes."""

    def __init__(self, selected: Iterable[Selected] = (), fused: Iterable[Selected] = ()) -> None:
        """fused: more adapters, which belong to the model and are not in the mapping."""
        self.selected = tuple(one for one in selected if not one.absent)
        self.fused = tuple(one for one in fused if not one.absent)

    def __getitem__(self, name: str) -> Weight:
        return next(one.weight for one in self.selected if one.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter([one.name for one in self.selected])

    def __len__(self) -> int:
        return len(self.selected)

    def __hash__(self) -> int:
        return hash(frozenset(self))  # as equality is a mapping's

    def __repr__(self) -> str:
        return repr(dict(self))

    @property
    def hashes(self) -> dict[str, str]:
        """The short hashes of all files, by name."""
        return {one.name: one.adapter.short_hash for one in (*self.fused, *self.selected)}

    def record(self) -> list[str]:
        """A line for each: its name, weight and short hash."""
        return [
            f"{one.name}:{json.dumps(one.weight)} ({one.adapter.short_hash})" for one in (*self.fused, *self.selected)
        ]

    @cached_property
    def deltas(self) -> Mapping[Parameter, Deltas]:
        """All that changes, by parameter."""
        deltas: dict[Parameter, Deltas] = {}
        for one in (*self.fused, *self.selected):
            for parameter, delta in one.deltas.items():
                deltas[parameter] = (*deltas.get(parameter, ()), delta)
        return deltas

    @cached_property
    def by_part(self) -> Mapping[Part, Mapping[Parameter, Deltas]]:
        """The same by when it is read."""
        parts: dict[Part, dict[Parameter, Deltas]] = {"text": {}, "conditions": {}, "step": {}}
        for parameter, deltas in self.deltas.items():
            parts[parameter.part][parameter] = deltas
        return parts

    @cached_property
    def step(self) -> frozenset[Selected]:
        """The adapters that change what every step reads; two requests with the same take their steps with the same
        weights."""
        return frozenset(one for one in (*self.fused, *self.selected) if one.step)

    @cached_property
    def own_step(self) -> tuple[Selected, ...]:
        """Those that are not fused."""
        return tuple(one for one in self.selected if one.step)

    @property
    def in_intervals(self) -> bool:
        """Whether any counts in some steps only, which the weights of all cannot follow."""
        return any(one.interval != (0.0, 1.0) for one in self.own_step)

    @cached_property
    def of_low_rank(self) -> bool:
        """Whether the steps can apply these beside the weights."""
        return all(isinstance(form, LoRA) for one in self.own_step for form, _ in one.step.values())


NONE = Selection()


def _longest_first(scales: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(scales.items(), key=lambda item: (-len(item[0]), item[0])))


def scaled(weight: Any, factor: float) -> Any:
    """A weight of any kind, times a number; what a dictionary does not name had 1, and keeps it in its block."""
    if isinstance(weight, Mapping):
        return {name: value if name in ("start", "end") else scaled(value, factor) for name, value in weight.items()}
    if isinstance(weight, (list, tuple)):
        return [scaled(value, factor) for value in weight]
    return float(weight) * factor


def _interval(weight: Weight, name: str) -> tuple[Weight, tuple[float, float]]:
    """A weight without its interval, and that."""
    if not isinstance(weight, Mapping) or not {"scale", "start", "end"} & weight.keys():
        return weight, (0.0, 1.0)
    _known(weight, ("scale", "start", "end"), f"weight of adapter {show(name)}")
    start, end = weight.get("start", 0.0), weight.get("end", 1.0)
    if not (isinstance(start, float) and isinstance(end, float) and 0 <= start <= end <= 1):
        raise InputError(
            f"the weight of adapter {show(name)} has the interval {show((start, end))}: expected 0 <= start <= end <= 1"
        )
    return weight.get("scale", 1.0), (start, end)


def expand(weight: Weight, config: UNetConfig, name: str) -> dict[str, float]:
    """Scales by the start of a target's path ("" is all). InputError for what the model does not have.

    The rules are those of diffusers' `set_adapters`: a dictionary of a U-Net scales the attention of its blocks.
    """
    if not isinstance(weight, Mapping):
        return {"": float(weight)}
    _known(weight, COMPONENTS, f"weight of adapter {show(name)}")
    scales = {component: float(weight.get(component, 1.0)) for component in COMPONENTS if component != "unet"}
    unet = weight.get("unet", 1.0)
    if not isinstance(unet, Mapping):
        return scales | {"unet": float(unet)}
    _known(unet, ("down", "mid", "up"), f"U-Net weight of adapter {show(name)}")
    scales["unet"] = 1.0
    if "mid" in unet:
        scales["unet.mid_block.attentions.0"] = _one(unet["mid"], 1, name, "mid")[0]
    for side, levels in (("down", config.down), ("up", config.up)):
        counts = {f"block_{i}": sum(d is not None for d in level.depths) for i, level in enumerate(levels)}
        blocks = [block for block, count in counts.items() if count]
        given = unet.get(side, 1.0)
        if not isinstance(given, Mapping):
            given = dict.fromkeys(blocks, given)
        _known(given, blocks, f"U-Net weight {side!r} of adapter {show(name)}")
        for block, value in given.items():
            path = f"unet.{side}_blocks.{block.removeprefix('block_')}.attentions"
            for k, scale in enumerate(_one(value, counts[block], name, f"{side}.{block}")):
                scales[f"{path}.{k}"] = scale
    return scales


def _known(names: Iterable[str], among: Sequence[str], label: str) -> None:
    for name in names:
        if name not in among:
            raise InputError(f"the {label} names {show(name)}: expected {', '.join(among)}")


def _one(value: Any, count: int, name: str, block: str) -> list[float]:
    """A scale for each attention of a block: one for all, or a list."""
    if isinstance(value, Mapping):
        raise InputError(
            f"the weight of adapter {show(name)} for {block} is {show(value)}: expected a number or a list"
        )
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise InputError(f"the weight of adapter {show(name)} has {len(values)} scales for {block}: expected {count}")
    return [float(item) for item in values]
