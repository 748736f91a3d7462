"""Devices: which device and dtype a model runs in, and transfers that never make the host wait.

Host memory reaches a GPU asynchronously only if it is pinned: a copy of pageable memory waits for all work queued on
the device. So every transfer goes through `send` or `to_host`.

Each thread queues GPU work on its own stream, and streams are not ordered with each other. A thread that hands a tensor
to another thread records a `Mark` after the work that computes it, and the receiver follows the mark before the first
use: the worker for what a caller passes in, a caller for what the worker returns.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastldm import openmp
from fastldm.checks import show
from fastldm.errors import InputError

logger = logging.getLogger("fastldm")

T = TypeVar("T")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What networks compute in."""


def choose_device(device: str | torch.device | None) -> torch.device:
    """The requested device, by default a GPU if there is one, else the CPU. InputError if it does not exist here."""
    try:
        selected = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        selected = torch.empty(0, device=selected).device  # with its index: "cuda" is the current device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"device {show(device)} cannot be used here ({reason}): try cpu, or see `fastldm doctor`"
        ) from error
    if selected.type == "meta":
        raise InputError("device 'meta' holds no numbers, so that nothing can run there: try cpu or cuda")
    return selected


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype, by default the fastest one on `device`.

    On a GPU the default is float16, as fast as bfloat16 and eight times finer. On a CPU it is bfloat16 where that is
    faster, else float32. float16 requested on a CPU is replaced by the default, with a warning, so that code written
    for a GPU runs unchanged. InputError for any other dtype.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if dtype is not None:
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, str | torch.dtype) else ""
        if name not in known:
            raise InputError(f"dtype is {show(dtype)}: expected float32, float16 or bfloat16")
        dtype = known[name]
    if device.type != "cpu":
        return dtype or torch.float16
    best = torch.bfloat16 if bfloat16_is_faster() else torch.float32
    if dtype == torch.float16:
        logger.warning("float16 is slow or missing on CPUs: running in %s", str(best).removeprefix("torch."))
        return best
    return dtype or best


_FASTER = 1.3
"""How many times as fast as in float32 products in bfloat16 are to be. Between what processors do: a half or as fast
where they split one dot instruction into two, twice where they do not, and more with AMX."""


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32. Where it has instructions for that, it is
    measured, once in a process, in 20 ms: processors with the same ones differ by a factor of three and more."""
    supports = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if not any(supported() for supported in supports if supported is not None):
        return False
    factors = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = [[_seconds(x) for x in factors] for _ in range(7)][1:]  # the first one compiles
    openmp.rest()
    float32, bfloat16 = map(min, zip(*seconds, strict=True))
    return float32 > _FASTER * bfloat16


def _seconds(x: Tensor) -> float:
    start = perf_counter()
    torch.mm(x, x)
    return perf_counter() - start


def send(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device, optionally cast to `dtype`, without waiting for work queued on the device."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.contiguous()  # a copy of a strided tensor would go through pageable memory
        x = (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
    return x.to(device, dtype)


def send_numbers(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Python numbers, nested or not, as a tensor on the device."""
    return send(torch.tensor(numbers, dtype=dtype), device)


def to_host(x: Tensor) -> Tensor:
    """x on the CPU, without waiting: its values are valid once the device has reached this point."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Mark:
    """An event in the current stream of a device, which other threads' streams can wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def follow(self, value: T) -> T:
        """Make this thread's later work wait for the mark, and keep the memory of all tensors nested in `value` until
        that work is done. Returns the value."""
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
        """Block until the device has reached the mark: what was copied to the host before it is valid."""
        if self._event is not None:
            self._event.synchronize()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The GPU tensors nested in a value."""
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
