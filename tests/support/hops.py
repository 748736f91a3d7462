"""How many files one passes through from a prompt to its PNG, and from a weight to the kernel that reads it.

    python tests/support/hops.py        # both ways, a line for each call

A hop is a call of a function in another file. Returns do not count, nor does the queue between threads, nor calls
within a file. A way is the smallest tree of calls that holds all of its landmarks: the calls that are on the stack at
the first call of each. What a function on the way calls besides (checks, sizes, layers) returns to it and is not on it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = tuple(f"{ROOT / name}/" for name in ("fastldm", "kernels", "export"))


class Station(NamedTuple):
    file: str  # relative to the checkout; empty for what is not ours
    function: str


Stack = tuple[Station, ...]  # outermost first, without calls within a file

PROMPT = (  # what happens to a prompt
    Station("fastldm/request.py", "__post_init__"),
    Station("fastldm/serving/admission.py", "check"),
    Station("fastldm/conditioning/text.py", "encode_prompts"),
    Station("fastldm/samplers/table.py", "make_table"),
    Station("fastldm/models/unet.py", "step"),
    Station("fastldm/models/vae.py", "decode_pieces"),
    Station("fastldm/image.py", "save_result"),
)
WEIGHT = (  # what happens to a weight
    Station("fastldm/loading/hub.py", "resolve"),
    Station("fastldm/loading/diffusers_folder.py", "open_diffusers"),
    Station("fastldm/loading/spec.py", "spec_of"),
    Station("fastldm/loading/tensors.py", "read_tensors"),
    Station("fastldm/loading/state.py", "load_module"),
    Station("fastldm/loading/prepare.py", "prepare"),
    Station("kernels/dispatch.py", "__call__"),
)
STARTS = {  # a way's stacks begin here: what is outside of them is another way's
    PROMPT: Station("fastldm/cli/generate.py", "generate"),
    WEIGHT: Station("fastldm/model.py", "open_model"),
}


def first_stacks(call: Callable[[], object], landmarks: Sequence[Station]) -> dict[Station, Stack]:
    """The stack at the first call of each landmark, in whatever thread, in the order of those calls."""
    station_of: dict[CodeType, Station] = {}
    stacks: dict[Station, Stack] = {}

    def station(code: CodeType) -> Station:
        if code not in station_of:
            file = code.co_filename if code.co_filename.startswith(FOLDERS) else ""
            station_of[code] = Station(file.removeprefix(f"{ROOT}/"), code.co_name)
        return station_of[code]

    def watch(frame: FrameType | None, event: str, argument: Any) -> None:
        assert frame is not None
        if event != "call" or station(frame.f_code) not in landmarks or station(frame.f_code) in stacks:
            return
        landmark, stack = station(frame.f_code), []
        while frame is not None:
            stack.append(station(frame.f_code))
            frame = frame.f_back
        ours = [entry for entry in reversed(stack) if entry.file]
        stacks[landmark] = tuple(b for a, b in zip([Station("", ""), *ours], ours, strict=False) if a.file != b.file)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert not set(landmarks) - stacks.keys(), f"never called: {set(landmarks) - stacks.keys()}"
    return stacks


def calls_of(way: tuple[Station, ...], stacks: dict[Station, Stack]) -> list[Stack]:
    """The calls of a way, in the order in which one reads them: each a stack, whose last is what is called."""
    start, calls = STARTS[way], {}
    for landmark, stack in stacks.items():
        if landmark in way:
            if start in stack:
                stack = stack[stack.index(start) :]
            elif way is WEIGHT:  # the networks are loaded: from where they run, which is the prompt's way
                stack = stack[next(k for k, entry in enumerate(stack) if entry.file.startswith("fastldm/models/")) :]
            calls |= {stack[: n + 1]: None for n in range(len(stack))}
    return list(calls)


def hops(calls: Sequence[Stack]) -> int:
    """Without the first of each thread, which is a start, or comes out of the queue."""
    return sum(len(stack) > 1 for stack in calls)


def generate() -> dict[Station, Stack]:
    """The stacks of both ways in one `fastldm generate` with the default model."""
    from click.testing import CliRunner

    from fastldm.cli import main

    with tempfile.TemporaryDirectory() as folder:
        command = ["generate", "an owl", "--steps", "2", "--device", "cpu", "-o", f"{folder}/owl.png"]
        results: list[Any] = []
        stacks = first_stacks(lambda: results.append(CliRunner().invoke(main, command)), [*PROMPT, *WEIGHT])
        assert results[0].exit_code == 0, results[0].output
    return stacks


def show(calls: Sequence[Stack]) -> str:
    lines = [f"{'    ' * (len(stack) - 1)}{stack[-1].file}  {stack[-1].function}" for stack in calls]
    return "\n".join([*lines, f"{hops(calls)} hops"])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    stacks = generate()
    print(*(show(calls_of(way, stacks)) for way in (PROMPT, WEIGHT)), sep="\n\n")
