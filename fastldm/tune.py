"""Finding launch configurations on the GPU at hand, and writing them where users can ship them.

Never part of a request: kernels take their configuration from a table (`kernels/tuned.json`, and over it the file named
by FASTLDM_TUNED). This fills such a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm import dry
from fastldm.bench import take_turns
from fastldm.errors import InputError
from fastldm.kernels import dispatch
from fastldm.loading import Spec

Shapes = dict[tuple[str, str], tuple[tuple[Any, ...], dict[str, Any]]]  # (op, shape class) -> arguments of one call


def check_gpu() -> None:
    """InputError where there is nothing to tune on."""
    if not torch.cuda.is_available():
        raise InputError("tuning times kernels on a GPU, and torch sees none here")


def shapes_of(spec: Spec, *, width: int, height: int, batch: int, dtype: torch.dtype) -> Shapes:
    """One call, on meta tensors, of each op and shape class that a request runs through a tunable kernel."""
    found: Shapes = {}

    def watch(op: dispatch.Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.space and op.supports(*args, **kwargs):
            found.setdefault((op.name, op.shape_class(*args, **kwargs)), (args, kwargs))

    h, w = height // spec.vae.factor, width // spec.vae.factor
    with dispatch.targeting(dispatch.Target(90)), dispatch.observe(watch):
        dry.run_text(spec.text, batch=1, dtype=dtype)
        dry.run_unet(spec.unet, height=h, width=w, rows=2 * batch, tokens=spec.text[0].max_position, dtype=dtype)
        dry.run_decoder(spec.vae, height=h, width=w, batch=batch, dtype=dtype)
    return found


def tune(
    shapes: Shapes, *, rounds: int = 5, on_done: Callable[[str, str, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Time every configuration of each op's space that is worth a try, and the reference. Needs a GPU.

    Returns a table as dispatch.table() reads it: sm_NN -> op -> shape class -> {config, path, us, torch_us}. `path` is
    "torch" where that won. on_done hears of each entry.
    """
    check_gpu()
    arch = f"sm_{dispatch.device_capability(torch.cuda.current_device())}"
    table: dict[str, Any] = {}
    for (name, shape_class), (args, kwargs) in shapes.items():
        entry = _tune_one(dispatch.OPS[name], shape_class, int(arch[3:]), args, kwargs, rounds)
        if entry is not None:
            table.setdefault(arch, {}).setdefault(name, {})[shape_class] = entry
            if on_done is not None:
                on_done(name, shape_class, entry)
    return table


def _tune_one(
    op: dispatch.Op[..., Any], shape_class: str, arch: int, args: Any, kwargs: Any, rounds: int
) -> dict[str, Any] | None:
    args, kwargs = _on_gpu(args), dict(zip(kwargs, _on_gpu(tuple(kwargs.values())), strict=True))
    default = op.default(shape_class, arch)
    configs = [default, *(one for one in op.space if one != default and op.keep(one, *args, **kwargs))]

    def run(config: dispatch.Config) -> object:
        with dispatch.forced(op.name, config):
            return op.triton(*args, **kwargs)

    contenders = {str(i): [partial(run, config)] for i, config in enumerate(configs)}
    us, _, _ = take_turns({"torch": [partial(op.reference, *args, **kwargs)], **contenders}, rounds)
    torch_us = us.pop("torch", float("inf"))
    if not us:
        return None  # no configuration runs here: the reference goes on
    best = min(us, key=us.__getitem__)
    return {
        "config": dict(configs[int(best)]),
        "path": "triton" if us[best] <= torch_us else "torch",
        "us": round(us[best], 2),
        "torch_us": round(torch_us, 2),
    }


def merge_into(path: Path, table: dict[str, Any]) -> None:
    """Write the table over what the file has. Whole or not at all."""
    merged = json.loads(path.read_text()) if path.exists() else {}
    for arch, ops in table.items():
        for op, entries in ops.items():
            merged.setdefault(arch, {}).setdefault(op, {}).update(entries)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)


def _on_gpu(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random tensors in place of meta tensors, with their strides."""

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return made.normal_() if value.is_floating_point() else made.zero_()

    return tuple(map(real, values))
