"""Tuning: finds the fastest launch configurations on this machine's GPU, and writes them to a file that can ship.

Never part of a request: kernels take their configuration from a table (`kernels/tuned.json`, overridden by the file
that FASTLDM_TUNED names). This writes such a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastldm.errors import InputError
from fastldm.files import whole_file
from fastldm.kernels import dispatch
from fastldm.loading.spec import Spec
from fastldm.planning import dry_run
from fastldm.planning.timing import take_turns
from fastldm.reading import read_json

Shapes = dict[tuple[str, str], tuple[tuple[Any, ...], dict[str, Any]]]  # (op, shape class) -> arguments of one call


def check_gpu() -> None:
    """InputError where there is no GPU to tune on."""
    if not torch.cuda.is_available():
        raise InputError("tuning times kernels on a GPU, and torch sees none here")


def shapes_of(spec: Spec, *, width: int, height: int, batch: int, dtype: torch.dtype) -> Shapes:
    """A call, on meta tensors, for each op and shape class of a request that has a tunable kernel."""
    shapes: Shapes = {}

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.space and op.supports(*args, **kwargs):
            shapes.setdefault((op.name, op.shape_class(*args, **kwargs)), (args, kwargs))

    h, w = height // spec.vae.factor, width // spec.vae.factor
    with dispatch.targeting(dispatch.Target(90)), dispatch.observe(watch):
        dry_run.run_text(spec.encoders, batch=1, dtype=dtype)
        dry_run.run_unet(spec.unet, height=h, width=w, rows=2 * batch, tokens=spec.window, dtype=dtype)
        dry_run.run_decoder(spec.vae, height=h, width=w, batch=batch, dtype=dtype)
    return shapes


def tune(
    shapes: Shapes, *, rounds: int = 5, on_done: Callable[[str, str, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Time the candidate configurations of each op, and the reference. Needs a GPU.

    Returns a table as dispatch.table() reads it: sm_NN -> op -> shape class -> {config, path, us, torch_us}. `path` is
    "torch" where that is faster. on_done is called with each entry.
    """
    check_gpu()
    arch = f"sm_{dispatch.device_capability(torch.cuda.current_device())}"
    table: dict[str, Any] = {}
    for (name, shape_class), (args, kwargs) in shapes.items():
        op = dispatch.OPS[name]
        entry = best_of(
            op, candidates(op, shape_class, int(arch[3:]), args, kwargs), args, kwargs, "cuda", rounds=rounds
        )
        if entry is not None:
            table.setdefault(arch, {}).setdefault(name, {})[shape_class] = entry
            if on_done is not None:
                on_done(name, shape_class, entry)
    return table


def candidates(
    op: dispatch.Op[..., Any], shape_class: str, arch: int, args: Any, kwargs: Any, limit: int | None = None
) -> list[dispatch.Config]:
    """The configurations of an op that may be fast for these arguments: the default, then those that differ from it in
    one constant, in two, and so on; at most `limit`.
    """
    default = op.default(shape_class, arch)
    rest = [config for config in op.space if config != default and op.is_candidate(config, *args, **kwargs)]
    rest.sort(key=lambda config: sum(config.get(name) != value for name, value in default.items()))
    return [default, *rest][:limit]


def best_of(
    op: dispatch.Op[..., Any],
    configs: Sequence[dispatch.Config],
    args: Any,
    kwargs: Any,
    device: str,
    *,
    rounds: int = 5,
    seconds: float = 0.02,
) -> dict[str, Any] | None:
    """The entry of dispatch.table() for the fastest of these configurations, on tensors like the arguments, which may
    be meta tensors; None where none of them runs here.
    """
    args, kwargs = op.example(args, kwargs, device)
    # A call that counts would reach its last step, and then be timed doing nothing: counters are reset after each call.
    named = op.bind(*args, **kwargs)
    counters = [named[name] for name in op.mutates if name in named and not named[name].is_floating_point()]
    saved = [x.clone() for x in counters]

    def call(function: Callable[..., object], config: dispatch.Config | None = None) -> None:
        with dispatch.forced(op.name, config) if config is not None else nullcontext():
            function(*args, **kwargs)
        for x, before in zip(counters, saved, strict=True):
            x.copy_(before)

    contenders = {str(i): [partial(call, op.triton, config)] for i, config in enumerate(configs)}
    us, _, _ = take_turns({"torch": [partial(call, op.reference)], **contenders}, rounds, seconds)
    torch_us = us.pop("torch", None)
    if not us:
        return None  # the reference runs
    best = min(us, key=us.__getitem__)
    entry: dict[str, Any] = {"config": dict(configs[int(best)]), "path": "triton", "us": round(us[best], 2)}
    if torch_us is not None:  # a reference that waits for the device cannot be captured
        entry |= {"path": "triton" if us[best] <= torch_us else "torch", "torch_us": round(torch_us, 2)}
    return entry


def read_table(path: Path) -> dict[str, Any]:
    """The table of a file, {} where there is none. InputError for a file that has no table."""
    table: dict[str, Any] = read_json(path, error=InputError) if path.exists() else {}
    if not all(
        isinstance(ops, dict) and all(isinstance(entries, dict) for entries in ops.values()) for ops in table.values()
    ):
        raise InputError(f"{path} is not a table of tuned kernels: choose another with -o")
    return table


def merge_into(path: Path, table: dict[str, Any]) -> None:
    """Merge the table into that of the file, atomically."""
    merged = dispatch.merge_tables(read_table(path), table)
    with whole_file(path) as file:
        file.write(f"{json.dumps(merged, indent=1, sort_keys=True)}\n".encode())
