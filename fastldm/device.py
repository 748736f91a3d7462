"""What crosses, in order and without waiting: numbers between host and device, tensors between two threads' streams.

The host's memory reaches a GPU without the host waiting for it only where it is pinned: a copy of any other waits until
the device has done all that it was asked before. So nothing is sent but by `send`, nor fetched but by `to_host`.

Each thread asks a GPU for work on a stream of its own, and two streams know nothing of each other. So whoever hands a
tensor to another thread makes a `Mark` behind what made it, and whoever takes it follows the mark before the first use:
the worker what a caller gives it, a caller what the worker gives it, both ways where one works while the other waits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def send(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device, in `dtype` if one is given, without waiting for what the device is about."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.contiguous()  # of any other the copy is made by way of memory that is not pinned
        x = (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
    return x.to(device, dtype)


def send_numbers(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers of the host, nested or not, as a tensor on the device."""
    return send(torch.tensor(numbers, dtype=dtype), device)


def to_host(x: Tensor) -> Tensor:
    """x on the CPU, without waiting: it is there when the device has come so far."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Mark:
    """A place in the current stream of a device: behind it lies what this thread asks from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def follow(self, value: T) -> T:
        """Order what this thread asks from now on behind the mark, and keep the memory of the value's tensors, however
        deep in it, until that is done. Returns the value."""
        if self._event is not None:
            tensors = [*_tensors(value)]
            for device in {self._device, *(tensor.device for tensor in tensors)}:
                torch.cuda.current_stream(device).wait_event(self._event)
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return value

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Until the device has come so far: what was fetched before the mark is there."""
        if self._event is not None:
            self._event.synchronize()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those on a GPU."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
