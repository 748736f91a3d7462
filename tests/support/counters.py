"""Stand-ins that count instead of launching: a driver of graphs, a GPU, and a mode of dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.predict import FREE
from fastldm.kernels import dispatch


class Recorder:
    """graph.Driver that keeps the function to capture, and calls it on replay."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def capture(self, work: Any) -> Any:
        self.calls.append("capture")
        return work

    def held(self) -> int:
        return 100

    def replay(self, handle: Any) -> None:
        self.calls.append("replay")
        handle()

    def destroy(self, handle: Any) -> None:
        self.calls.append("destroy")

    def trim(self) -> None:
        self.calls.append("trim")


class Launches(dispatch.Target):
    """A GPU that only counts."""

    def __init__(self) -> None:
        super().__init__(90)
        self.count = 0

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.count += 1


class Nodes(TorchDispatchMode):
    """Counts operators that launch something: no views, no empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in FREE
        return func(*args, **(kwargs or {}))
