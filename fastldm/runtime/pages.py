"""The pages of adapters that run beside a U-Net's weights (kernels/lora.py): which adapter has which, in all layers.

A page has the same number in every layer: it is one adapter's next rank of 16, zeros where the adapter changes less. On
a GPU there are `ON_GPU` pages, in memory that captured graphs read and that never moves; those of adapters that no run
has make room for others. On a CPU there are as many as are wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.adapters.forms import LoRA
from fastldm.adapters.read import Adapter
from fastldm.adapters.selection import Selected, Selection
from fastldm.kernels.dispatch import cdiv
from fastldm.kernels.lora import RANK
from fastldm.models.layers import Adaptable, Attention, Beside, LowRank
from fastldm.models.unet import UNet

ON_GPU = 16
"""Pages: a rank of 256 together."""
OF_A_ROW = 8
"""Pages that a row of the U-Net has at most, on a GPU: a rank of 128."""

Applied = tuple[tuple[int, float, tuple[float, float]], ...]
"""Pages with their scales and intervals of the steps, of a run."""


class Variant(NamedTuple):
    """An adapter, with the scales of its layers where they differ and so are a part of the pages."""

    adapter: Adapter
    scales: tuple[tuple[str, float], ...]


class Pool(ABC):
    """Numbered parts of a memory, each a part of at most one adapter. Number 0 is none."""

    layers_added = 0

    def __init__(self, count: int | None) -> None:
        """count: None is as many as are wanted; else there are as many, of which a row has at most `of_a_row`."""
        self._fixed = count is not None
        self._count = 1 + (count or 0)
        self._held: dict[Variant, tuple[int, ...]] = {}  # the last used is the last

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it takes."""

    @property
    def of_a_row(self) -> int:
        """How many a row has at most."""
        return self._count - 1

    @abstractmethod
    def size(self, one: Selected) -> int:
        """How many an adapter takes."""

    @abstractmethod
    def trim(self) -> None:
        """Free what no adapter wants any more."""

    def fits(self, selections: Collection[Selection]) -> bool:
        """Whether runs with these could be beside each other."""
        if not self._fixed:
            return True
        sizes = {variant: self.size(one) for s in selections for one in s.own_step for variant, _ in [_variant(one)]}
        rows = max((sum(self.size(one) for one in s.own_step) for s in selections), default=0)
        return rows <= self.of_a_row and sum(sizes.values()) < self._count

    @torch.no_grad()
    def apply(self, selection: Selection, others: Collection[Selection]) -> Applied:
        """The parts of a selection, filled. others: those whose parts have to stay. It fits beside them."""
        keep = {_variant(one)[0] for each in (selection, *others) for one in each.own_step}
        applied: list[tuple[int, float, tuple[float, float]]] = []
        for one in selection.own_step:
            variant, scale = _variant(one)
            parts = self._held.pop(variant, None)
            if parts is None:
                parts = self._take(self.size(one), keep)
                self._fill(one, variant, parts)
            self._held[variant] = parts
            applied += [(part, scale, one.interval) for part in parts]
        return tuple(applied)

    @abstractmethod
    def _fill(self, one: Selected, variant: Variant, parts: Sequence[int]) -> None:
        """Write an adapter to parts."""

    def _take(self, count: int, keep: Collection[Variant]) -> tuple[int, ...]:
        """Free parts: of none, of adapters that are not to be kept, or new ones."""
        while True:
            used = {part for parts in self._held.values() for part in parts}
            free = [part for part in range(1, self._count) if part not in used][:count]
            if len(free) == count:
                return tuple(free)
            idle = next((variant for variant in self._held if variant not in keep), None)
            if idle is not None and self._fixed:
                del self._held[idle]
            else:
                self._grow(max(self._count + count, 2 * self._count))

    def _grow(self, count: int) -> None:
        raise AssertionError("adapters were applied that do not fit")


class Pages(Pool):
    """Of one U-Net. The worker's thread alone uses it."""

    def __init__(self, unet: UNet, fixed: int | None = None) -> None:
        """fixed: the number of pages; None is as many as are wanted, on a GPU ON_GPU."""
        self._unet = unet
        self._device = unet.conv_in.weight.device
        super().__init__(ON_GPU if fixed is None and self._device.type == "cuda" else fixed)
        self._layers: dict[str, tuple[LowRank, int]] = {}  # by path: its pages, and which of the joint layers it is
        self.layers_added = 0

    @property
    def beside(self) -> Beside:
        return self._unet.beside

    @property
    def nbytes(self) -> int:
        pages = {id(low_rank): low_rank for low_rank, _ in self._layers.values()}
        return sum(low_rank.down.nbytes + low_rank.up.nbytes for low_rank in pages.values())

    @property
    def of_a_row(self) -> int:
        return OF_A_ROW

    def size(self, one: Selected) -> int:
        return cdiv(rank_of(one), RANK)

    def _fill(self, one: Selected, variant: Variant, parts: Sequence[int]) -> None:
        forms = loras_of(one)
        for module in forms:
            if module not in self._layers:
                self.add(module)
        for low_rank, _ in self._layers.values():
            for page in parts:
                low_rank.down[page].zero_(), low_rank.up[page].zero_()
        for module, (form, scale) in forms.items():
            low_rank, j = self._layers[module]
            a, b, own = form.factors()
            up = b.to(self._device).float() * (own * (scale if variant.scales else 1.0))  # (O, rank)
            down = a.to(self._device).view(-1, *low_rank.down.shape[-1 if low_rank.down.ndim == 4 else 2 :])
            for k, page in enumerate(parts):
                part = slice(k * RANK, (k + 1) * RANK)
                rank = len(down[part])
                to = low_rank.down[page, j] if low_rank.down.ndim == 4 else low_rank.down[page]
                to[:rank] = down[part]
                low_rank.up[page, j * len(up) : (j + 1) * len(up), :rank] = up[:, part]

    def _grow(self, count: int) -> None:
        if self._fixed:
            super()._grow(count)
        self._count = count
        moved: dict[int, LowRank] = {}
        for path, (low_rank, j) in list(self._layers.items()):
            if id(low_rank) not in moved:
                down, up = (_more(pages, count) for pages in low_rank[:2])
                moved[id(low_rank)] = LowRank(down, up, self.beside)
            self._set(path, moved[id(low_rank)], j)

    def add(self, path: str) -> None:
        """Give a layer pages; queries, keys and values of one attention together."""
        name = path.rpartition(".")[2]
        parent = self._unet.get_submodule(path.rpartition(".")[0])
        names = [path]
        if isinstance(parent, Attention) and parent.by_qkv and name in (joint := ("to_q", "to_k", "to_v")):
            names = [f"{path.rpartition('.')[0]}.{each}" for each in joint]
        weight = self._unet.get_parameter(f"{path}.weight")
        up = weight.new_zeros(self._count, len(names) * weight.shape[0], RANK)
        shape = (len(names), RANK, weight.shape[1]) if _is_product(weight) else (RANK, *weight.shape[1:])
        down = weight.new_zeros(self._count, *shape)
        low_rank = LowRank(down, up, self.beside)
        for j, each in enumerate(names):
            self._set(each, low_rank, j)
        self.layers_added += self._fixed

    def trim(self) -> None:
        """Free all pages, of which none is wanted; not on a GPU, where captured graphs read them."""
        if not self._fixed:
            self.close()
            self._count = 1

    def close(self) -> None:
        """Take the pages from the layers."""
        for path in self._layers:
            self._unet.get_submodule(path).low_rank = None  # type: ignore[assignment]
        self._layers, self._held = {}, {}

    def _set(self, path: str, low_rank: LowRank, j: int) -> None:
        layer: nn.Module = self._unet.get_submodule(path)
        assert isinstance(layer, Adaptable)
        layer.low_rank = low_rank
        self._layers[path] = (low_rank, j)


def _is_product(weight: Tensor) -> bool:
    return weight.ndim == 2 or weight.shape[2:] == (1, 1)


def _more(pages: Tensor, count: int) -> Tensor:
    out = pages.new_zeros(count, *pages.shape[1:])
    out[: len(pages)] = pages
    return out


def rank_of(one: Selected) -> int:
    """Of an adapter, in what every step reads."""
    return max((form.rank or 0 for form, _ in one.step.values()), default=0)


def loras_of(one: Selected) -> dict[str, tuple[LoRA, float]]:
    """What an adapter of low rank changes of what every step reads, with scales, by the layer's path."""
    return {
        name.removesuffix(".weight"): (form, scale)
        for name, (form, scale) in one.step.items()
        if isinstance(form, LoRA)
    }


def _variant(one: Selected) -> tuple[Variant, float]:
    """An adapter of one scale has that with each row; of several, in its pages."""
    if len(one.scales) == 1:
        return Variant(one.adapter, ()), one.scales[0][1]
    return Variant(one.adapter, one.scales), 1.0
