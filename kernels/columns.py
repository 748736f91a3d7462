"""A slot's table in device memory: its columns, and the row that each slot takes next, where ops rewrite it just before
the kernel that ends a step reads it (projection.py, threshold.py)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

COLUMNS = ("c_in", "p", "q", "a", "a1", "b0", "b1", "b2", "b3", "d", "e", "e1", "f0", "f1", "f2", "f3", "r", "s")
SAMPLER = (*COLUMNS, "deep", "clip", "o", "d_ratio", "gm", "gx")
EXTRA = ("w0", "w1", "w2", "masked", "keep", "draw", "clip", "o", "d_ratio", "gx")  # see `step.table_rows`
RARE = EXTRA[6:]  # most samplers have only zeros there
W0 = len(COLUMNS)  # where w0, w1, w2 begin


class State(Protocol):
    """What is read of a `step.StepState`, and the table, which is written."""

    @property
    def x(self) -> Tensor: ...
    @property
    def table(self) -> Tensor: ...
    @property
    def counter(self) -> Tensor: ...
    @property
    def steps(self) -> Tensor: ...
    @property
    def rescale(self) -> Tensor: ...
    @property
    def factor(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...


class NextRows(NamedTuple):
    """Of S slots the row of its table that each takes next; fixed shapes, and no value read by the host."""

    slots: Tensor  # (S,) 0, 1, 2, ...
    at: Tensor  # (S,) int64: which row; the last one of slots that are idle
    values: Tensor  # (S, ROW) a copy: `state.table[slots, at] = values` writes it back
    running: Tensor  # (S,) bool: whether the slot takes it


def next_rows(state: State) -> NextRows:
    """The rows that all slots take at the end of this step."""
    index = state.counter.clamp_max(state.table.shape[1] - 1).long()
    slots = torch.arange(len(index), device=index.device)
    return NextRows(slots, index, state.table[slots, index], state.counter < state.steps)


def branch_output(out: Tensor, state: State, k: int) -> Tensor:
    """Of each slot the output of its row k of the network (S, C, h, w); anything where it has none."""
    return out.index_select(0, state.rows[:, k].clamp_min(0).long())[:, : state.x.shape[1]]
