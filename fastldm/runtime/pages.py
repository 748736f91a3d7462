"""The pages of adapters that run beside a U-Net's weights (kernels/lora.py): which adapter has which, in all layers.

A page has the same number in every layer: it is one adapter's next rank of 16, zeros where the adapter changes less. On
a GPU there are `ON_GPU` pages, in memory that captured graphs read and that never moves; those of adapters that no run
has make room for others. On a CPU there are as many as are wanted.
"""

from __future__ import annotations

from collections.abc import Collection
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


class Pages:
    """Of one U-Net. The worker's thread alone uses it."""

    def __init__(self, unet: UNet, fixed: int | None = None) -> None:
        """fixed: the number of pages; None is as many as are wanted, on a GPU ON_GPU."""
        self._unet = unet
        self._device = unet.conv_in.weight.device
        fixed = ON_GPU if fixed is None and self._device.type == "cuda" else fixed
        self._fixed = fixed is not None
        self._count = 1 + (fixed or 0)  # page 0 is none
        self._layers: dict[str, tuple[LowRank, int]] = {}  # by path: its pages, and which of the joint layers it is
        self._held: dict[Variant, tuple[int, ...]] = {}  # the last used is the last
        self.layers_added = 0

    @property
    def beside(self) -> Beside:
        return self._unet.beside

    @property
    def nbytes(self) -> int:
        pages = {id(low_rank): low_rank for low_rank, _ in self._layers.values()}
        return sum(low_rank.down.nbytes + low_rank.up.nbytes for low_rank in pages.values())

    def fits(self, selections: Collection[Selection]) -> bool:
        """Whether runs with these could be beside each other."""
        if not self._fixed:
            return True
        sizes = {variant: _size(one) for s in selections for one in s.own_step for variant, _ in [_variant(one)]}
        rows = max((sum(_size(one) for one in s.own_step) for s in selections), default=0)
        return rows <= OF_A_ROW and sum(sizes.values()) < self._count

    @torch.no_grad()
    def apply(self, selection: Selection, others: Collection[Selection]) -> Applied:
        """The pages of a selection, filled. others: those whose pages have to stay. It fits beside them."""
        keep = {_variant(one)[0] for each in (selection, *others) for one in each.own_step}
        applied: list[tuple[int, float, tuple[float, float]]] = []
        for one in selection.own_step:
            variant, scale = _variant(one)
            pages = self._held.pop(variant, None)
            if pages is None:
                pages = self._fill(one, variant, keep)
            self._held[variant] = pages
            applied += [(page, scale, one.interval) for page in pages]
        return tuple(applied)

    def _fill(self, one: Selected, variant: Variant, keep: Collection[Variant]) -> tuple[int, ...]:
        pages = self._take(_size(one), keep)
        forms = {
            name.removesuffix(".weight"): (form, scale)
            for name, (form, scale) in one.step.items()
            if isinstance(form, LoRA)
        }
        for module in forms:
            if module not in self._layers:
                self.add(module)
        for low_rank, _ in self._layers.values():
            for page in pages:
                low_rank.down[page].zero_(), low_rank.up[page].zero_()
        for module, (form, scale) in forms.items():
            low_rank, j = self._layers[module]
            a, b, own = form.factors()
            up = b.to(self._device).float() * (own * (scale if variant.scales else 1.0))  # (O, rank)
            down = a.to(self._device).view(-1, *low_rank.down.shape[-1 if low_rank.down.ndim == 4 else 2 :])
            for k, page in enumerate(pages):
                part = slice(k * RANK, (k + 1) * RANK)
                rank = len(down[part])
                to = low_rank.down[page, j] if low_rank.down.ndim == 4 else low_rank.down[page]
                to[:rank] = down[part]
                low_rank.up[page, j * len(up) : (j + 1) * len(up), :rank] = up[:, part]
        return pages

    def _take(self, count: int, keep: Collection[Variant]) -> tuple[int, ...]:
        """Free pages: of none, of adapters that are not to be kept, or new ones."""
        while True:
            used = {page for pages in self._held.values() for page in pages}
            free = [page for page in range(1, self._count) if page not in used][:count]
            if len(free) == count:
                return tuple(free)
            idle = next((variant for variant in self._held if variant not in keep), None)
            if idle is not None and self._fixed:
                del self._held[idle]
            else:
                self._grow(max(self._count + count, 2 * self._count))

    def _grow(self, count: int) -> None:
        assert not self._fixed, "adapters were applied that do not fit"
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
        if isinstance(parent, Attention) and name in (joint := ("to_q", "to_k", "to_v")) and ".attn1." in path:
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


def _size(one: Selected) -> int:
    """Pages that an adapter takes."""
    return cdiv(max((form.rank or 0 for form, _ in one.step.values()), default=0), RANK)


def _variant(one: Selected) -> tuple[Variant, float]:
    """An adapter of one scale has that with each row; of several, in its pages."""
    if len(one.scales) == 1:
        return Variant(one.adapter, ()), one.scales[0][1]
    return Variant(one.adapter, one.scales), 1.0
