"""Adapters merged into weights in place, and the weights they were copied back.

A parameter's original is copied when it is first changed. Every later value is computed from that copy, never from what
is there: going back is a copy, bitwise, however often adapters were swapped. A captured graph goes on reading the same
addresses.

A change of low rank is one matrix product from the original into the weight, W = W0 + B A with all adapters' factors
side by side, and no dW is materialised. The other forms (LoHa, LoKr, DoRA and so on) compute dW in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastldm.adapters.forms import LoRA
from fastldm.adapters.selection import Deltas, Parameter

T = TypeVar("T")
_HALF_LIMIT = 6e4  # of factors in float16: above, dW is computed in float32


class Merged:
    """The parameters of some networks that adapters are merged into."""

    def __init__(self, read: Callable[[Parameter], Tensor]) -> None:
        """read: a parameter's memory."""
        self._read = read
        self._originals: dict[Parameter, Tensor] = {}
        self._current: dict[Parameter, Deltas | None] = {}  # None: not known, for writing failed in the middle
        self.writes = 0
        """How many parameters have been written."""

    @property
    def nbytes(self) -> int:
        """Bytes of the copies of originals."""
        return sum(original.nbytes for original in self._originals.values())

    @property
    def parameters(self) -> set[Parameter]:
        """Those whose originals are kept."""
        return set(self._originals)

    def has_copy(self, parameter: Parameter) -> bool:
        """Whether its original is kept. Any thread may ask."""
        return parameter in self._originals

    @torch.no_grad()
    def switch(self, deltas: Mapping[Parameter, Deltas]) -> bool:
        """Make the parameters what they are with these changes and no others. Returns whether any was written.

        Whatever is raised, each parameter is as before or as asked for, and the next call goes on from there.
        """
        changed = [p for p in {**self._current, **deltas} if self._current.get(p, ()) != deltas.get(p, ())]
        for parameter in changed:
            if parameter not in self._originals:
                self._originals[parameter] = self._read(parameter).clone()
        for parameter in changed:
            weight, original = self._read(parameter), self._originals[parameter]
            self._current[parameter] = None
            _write(weight, original, deltas.get(parameter, ()))
            self._current[parameter] = deltas.get(parameter, ())
            self.writes += 1
        for parameter in changed:
            if not self._current[parameter]:
                del self._current[parameter]
        return bool(changed)

    def forget(self, parameter: Parameter) -> None:
        """A parameter was given another value by its owner, which is its original from now on."""
        self._originals.pop(parameter, None)
        self._current.pop(parameter, None)

    def trim(self) -> None:
        """Free the copies of originals that are back in place."""
        for parameter in self._originals.keys() - self._current.keys():
            del self._originals[parameter]


def _write(weight: Tensor, original: Tensor, deltas: Deltas) -> None:
    """weight = original + what the deltas add."""
    if not deltas:
        weight.copy_(original)
        return
    forms = [(on_device(form, weight.device), scale) for form, scale in deltas]
    loras = [(form, scale) for form, scale in forms if isinstance(form, LoRA)]
    if len(loras) == len(forms) and (matrix := _matrix(weight)) is not None and (base := _matrix(original)) is not None:
        a, b = factors(loras, weight)
        if weight.dtype != torch.float16 or bool(b.abs().amax() < _HALF_LIMIT):
            torch.addmm(base, b.to(weight.dtype), a.to(weight.dtype), out=matrix)
            return
    total = original.float()
    for form, scale in forms:
        total = total + form.delta(original, scale)
    weight.copy_(total)


def factors(loras: list[tuple[LoRA, float]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """A (rank, n) and B (out, rank), float32, with dW = B A, of LoRAs together; n in the order of `_matrix`."""
    downs, ups = [], []
    for form, scale in loras:
        a, b, own = form.factors()
        a = a.float()
        if weight.ndim == 4:
            a = a.view(-1, *weight.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        downs.append(a)
        ups.append(b.float() * (own * scale))
    return torch.cat(downs), torch.cat(ups, dim=1)


def _matrix(weight: Tensor) -> Tensor | None:
    """A weight (out, ...) as a matrix of its memory, (out, in), of convolutions (out, kh * kw * in); None where the
    memory is no such matrix."""
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1)
    try:
        return weight.view(weight.shape[0], -1)
    except RuntimeError:
        return None


def on_device(form: T, device: torch.device) -> T:
    """A form with its tensors on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return on_device(value, device) if dataclasses.is_dataclass(value) else value

    if all(tensor.device == device for tensor in _tensors(form)):
        return form
    fields = {field.name: moved(getattr(form, field.name)) for field in dataclasses.fields(form) if field.init}  # type: ignore[arg-type]
    return type(form)(**fields)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in _tensors(getattr(value, field.name))]
    return []
