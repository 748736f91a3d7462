"""The choices that were made without a GPU, as tables of launch configurations that make each of them otherwise:
`make gpu-first` times a step by each against the default.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.aot import RESULTS
from benchmarks.networks import Call, calls
from fastldm.kernels import dispatch

Entries = list[tuple[Call, dict[str, Any]]]
"""Entries of a table of launch configurations, each with a call of its class."""


def design_tables(workload: str, dtype: torch.dtype, arch: int) -> dict[str, Entries]:
    """The entries that differ from the default, by the name of the choice."""
    predicted = json.loads((RESULTS / "predicted_table.json").read_text("utf-8"))["sm_90"]
    designs: dict[str, Entries] = {}
    for call in calls(workload, dtype):
        op, (args, kwargs) = dispatch.OPS[call.op], call.arguments("meta")
        with dispatch.targeting(dispatch.Target(arch)):
            if not op.supports(*args, **kwargs):
                continue
            config, shape_class = op.config(*args, **kwargs), op.shape_class(*args, **kwargs)
            by_library = {"path": "torch", "config": config}
            if entry := predicted.get(op.name, {}).get(shape_class):
                designs.setdefault("products as predicted", []).append((call, entry))
            if op.name == "linear_geglu":
                designs.setdefault("gate by the library", []).append((call, by_library))
                large = min(op.space, key=lambda tile: -tile["BLOCK_M"] * tile["BLOCK_N"])
                if large != config and op.is_candidate(large, *args, **kwargs):
                    entry = {"path": "triton", "config": large}
                    designs.setdefault("gate in one program a multiprocessor", []).append((call, entry))
            if op.name in ("conv2d", "upsample_conv2d") and op.path(*args, **kwargs):
                designs.setdefault("convolutions by the library", []).append((call, by_library))
            if op.name == "conv_group_norm" and op.path(*args, **kwargs):
                designs.setdefault("convolution and norm apart", []).append((call, by_library))
            if op.name == "attention" and "BLOCK_N" in config:  # all keys of an image, in blocks
                designs.setdefault("attention by PyTorch", []).append((call, by_library))
                tiles = {True: "in one tile", False: "in two tiles"}[config["SPLIT"]]
                for title, change in (
                    ("by tensor descriptors", {"TMA": True}),
                    (tiles, {"SPLIT": not config["SPLIT"]}),
                ):
                    if op.is_candidate(config | change, *args, **kwargs):
                        entry = {"path": "triton", "config": config | change}
                        designs.setdefault(f"attention {title}", []).append((call, entry))
    return designs


def as_table(arch: int, entries: Entries) -> dispatch.Table:
    """The entries as `dispatch.use_table` takes them."""
    table: dict[str, dict[str, Any]] = {}
    for call, entry in entries:
        table.setdefault(call.op, {})[call.shape_class] = entry
    return {f"sm_{arch}": table}
