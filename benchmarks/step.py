"""The end of a step on a GPU: one kernel against diffusers' scheduler, PyTorch functions, and torch.compile.

    python -m benchmarks.step            a row of DPM-Solver++ 2M, guided, in float16
    python -m benchmarks.step --list     the shapes and the bytes they move; needs no GPU

All contenders are timed inside CUDA graphs. The table has more rows than there are replays, so that no slot ends; the
state is checked against the functions first.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from fastldm.kernels import use
from fastldm.kernels.step import END_STEP, StepState, end_step, guide, model_input, step, table_rows
from fastldm.planning.timing import ceilings, take_turns
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCALE, STEPS, ROW = 7.5, 20, 10  # every replay is step 11 of 20
WEIGHTS = (1 - SCALE, SCALE)
ROWS = 1 << 15  # of a table: more than replays
COPIES = 4  # of the state, each with a call in the graph
SHAPES = {  # slots, height and width of the latents
    "sd15-512 1 slot": (1, 64, 64),
    "sd15-512 8 slots": (8, 64, 64),
    "sdxl-1024 1 slot": (1, 128, 128),
    "sdxl-1024 4 slots": (4, 128, 128),
}


def arguments(slots: int, height: int, width: int, dtype: torch.dtype, device: str, rows: int = ROWS) -> Any:
    """(out, state) in the middle of a guided run: the unguided rows of the network first, as the runtime has them."""
    state = StepState.empty(
        slots=slots, rows=2 * slots, channels=4, height=height, width=width, steps=rows, dtype=dtype, device=device
    )
    table = make_table(read_config({"_class_name": "DDIMScheduler", **SD}), STEPS, sampler="dpm++ 2m")
    row = table_rows(table.rows, table.draws, [(*WEIGHTS, 0.0, 0.0)] * STEPS)[ROW]
    state.table.copy_(row)
    state.steps.fill_(rows)
    at = torch.arange(slots, dtype=torch.int32, device=device)
    for own in (state.rows, state.next_rows):
        own[:, :2] = torch.stack((at, at + slots), 1)
    for t in (state.x, state.y, state.history):
        t.normal_()
    out = torch.randn(2 * slots, 4, height, width, device=device).to(dtype, memory_format=torch.channels_last)
    return out, state


def functions(row: list[float], out: Tensor, x: Tensor, last: Tensor, dtype: torch.dtype) -> Any:
    """The functions that the kernel replaces: (model input, x, m)."""
    after, _, (m, _) = step(row, x, None, (last,), guide(dict(enumerate(out.chunk(2))), WEIGHTS), None, depth=2)
    return model_input(after, row[0], dtype, 2), after, m


def rivals(out: Tensor, state: StepState, compiled: bool = True) -> dict[str, Callable[[], object]]:
    row = state.table[0, 0].tolist()
    x, last, dtype = state.x.clone(), state.history[:, 0].clone(), out.dtype
    contenders: dict[str, Callable[[], object]] = {"eager": lambda: functions(row, out, x, last, dtype)}
    if compiled:
        fused = torch.compile(functions)
        contenders["torch.compile"] = lambda: fused(row, out, x, last, dtype)
    if importlib.util.find_spec("diffusers") is None:
        return contenders
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(SD)
    scheduler.set_timesteps(STEPS)
    scheduler.model_outputs, scheduler.lower_order_nums = [None, last.to(dtype)], 2
    latents = x.to(dtype)  # diffusers has latents in the model's dtype

    def diffusers_step() -> Tensor:
        scheduler._step_index = ROW
        unguided, guided = out.chunk(2)
        model_output = unguided + SCALE * (guided - unguided)
        after = scheduler.step(model_output, scheduler.timesteps[ROW], latents, return_dict=False)[0]
        return scheduler.scale_model_input(torch.cat([after] * 2), scheduler.timesteps[ROW + 1])

    return {"diffusers": diffusers_step, **contenders}


def wrong(slots: int, height: int, width: int, dtype: torch.dtype, device: str) -> str | None:
    """The first difference between kernel and functions after two steps; None if there is none."""
    out, state = arguments(slots, height, width, dtype, device, rows=4)
    row = state.table[0, 0].tolist()
    x, last = state.x.clone(), state.history[:, -1].clone()
    for _ in range(2):
        with use("triton"):
            end_step(out, state)
        inputs, x, last = functions(row, out, x, last, dtype)
    for name, got, expected, allowed in (("x", state.x, x, 1e-5), ("u", state.u, inputs, torch.finfo(dtype).eps)):
        off = float((got.float() - expected.float()).abs().max() / expected.abs().max())
        if not off <= allowed:
            return f"{name}: error {off:.1e}, allowed {allowed:.1e}"
    return None if state.counter.eq(2).all() else f"counters {state.counter.tolist()} after two steps"


def bench(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    ceiling: float,
    device: str = "cuda",
    compiled: bool = True,
) -> dict[str, Any]:
    """The row of one shape: (slots, height, width). ceiling: bytes a second. compiled: torch.compile takes its turn."""
    slots, height, width = shape
    moved = bytes_moved(*arguments(*shape, dtype, "meta"))
    row: dict[str, Any] = {"workload": name, "count": 1, "call": f"end_step {slots}x4x{height}x{width}", "flop": 0}
    row |= {"bytes": moved, "floor_us": moved / ceiling * 1e6}
    if (reason := wrong(*shape, dtype, device)) is not None:
        return row | {"wrong": reason}
    contenders: dict[str, list[Callable[[], object]]] = {}
    sets = [arguments(*shape, dtype, device) for _ in range(COPIES)]
    rescaled = [arguments(*shape, dtype, device) for _ in range(COPIES)]
    for _, state in rescaled:
        state.rescale.fill_(0.7)
    contenders["triton"] = [(lambda o=out, s=state: end_step(o, s)) for out, state in sets]
    contenders["triton with rescale"] = [
        (lambda o=out, s=state: end_step(o, s, rescales=True)) for out, state in rescaled
    ]
    for out, state in sets:
        for rival, call in rivals(out, state, compiled).items():
            contenders.setdefault(rival, []).append(call)
    with use("triton"):
        row["us"], row["spread"], row["failed"] = take_turns(contenders)
    if not all(bool((state.counter < state.steps).all()) for _, state in (*sets, *rescaled)):
        return row | {"wrong": "a slot ended while it was timed: ROWS is too small"}
    return row | harness.against_rivals(row["us"])


def bytes_moved(out: Tensor, state: StepState) -> int:
    """The op's own cost, and a plane of history read and one written."""
    return END_STEP.cost(out, *state).bytes + 2 * 4 * state.x.numel()


def rows(dtype: torch.dtype, ceiling: float, device: str, dry: bool) -> Iterator[dict[str, Any]]:
    """A row for each of SHAPES, or for a tiny one, without torch.compile: for benchmarks/first.py."""
    for name, shape in ({"tiny": (1, 8, 8)} if dry else SHAPES).items():
        yield bench(name, shape, dtype, ceiling, device, compiled=False)


ROWS_OF = {END_STEP.name: rows}
"""The ops that are timed at shapes of this file, and not at the calls of a network."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only the shapes with their bytes; needs no GPU")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="float16")
    parser.add_argument("--results", type=Path, help="folder for the JSON  [default: benchmarks/results/GPU]")
    args = parser.parse_args()
    dtype = harness.DTYPES[args.dtype]
    if args.list:
        for name, shape in SHAPES.items():
            print(f"{name:20} {bytes_moved(*arguments(*shape, dtype, 'meta')) / 1e6:6.2f} MB")
        return
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: this times kernels on one. --list prints shapes and bytes without.")
    measured = ceilings(torch.device("cuda"), dtype)
    header = {"source": harness.source("step"), "ceilings": measured._asdict(), "dtype": args.dtype}
    record = harness.Record(args.results, f"step-{args.dtype}", **header)
    for name in SHAPES:
        row = bench(name, SHAPES[name], dtype, measured.bytes)
        record.add(row)
        print(harness.line(row), flush=True)
    record.end()


if __name__ == "__main__":
    main()
