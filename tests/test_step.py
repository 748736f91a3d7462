"""kernels/step.py: the kernel that ends a step, against the functions that define correct."""

from __future__ import annotations

from typing import Any

import ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from named import NAMED
from step_states import SHAPES, full_state, in_blocks_of, output_for
from torch import Tensor

from fastldm.kernels import dispatch, use
from fastldm.kernels.step import (
    COLUMNS,
    END_STEP,
    EXTRA,
    NEVER,
    RARE,
    ROW,
    SAMPLER,
    W0,
    StepState,
    end_step,
    fuses,
    guide,
    table_rows,
)
from fastldm.runtime.denoise import Guidance
from fastldm.samplers.scheduler_config import read_config
from fastldm.samplers.table import StepTable, make_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DEVICE = ops.DEVICE
NAN, INF = float("nan"), float("inf")


def table_of(sampler: str, steps: int, **arguments: Any) -> StepTable:
    config = read_config({"_class_name": "DDIMScheduler", **SD})
    return make_table(config, steps, sampler=sampler, **arguments)


def clone(state: StepState) -> StepState:
    return StepState(*(t if t is None else t.clone() for t in state))


def assert_same(got: StepState, expected: StepState, float32: float = 3e-6) -> None:
    """All fields of two states: integers equal, floats within rounding, u within its last place."""
    for name, value, reference in zip(StepState._fields, got, expected, strict=True):
        if reference is None or not reference.is_floating_point():
            assert reference is value or torch.equal(value, reference), name
            continue
        assert torch.equal(value.isfinite(), reference.isfinite()), name
        allowed = float32 if reference.dtype == torch.float32 else torch.finfo(reference.dtype).eps
        off = ops.error(value.nan_to_num(0, 0, 0), reference.nan_to_num(0, 0, 0))
        assert off <= allowed, f"{name}: {off:.1e}, allowed {allowed:.1e}"


def run_both(out: Tensor, state: StepState, rare: bool = False) -> StepState:
    """The kernel's state after a step, which is checked against the reference's."""
    expected, got = clone(state), clone(state)
    END_STEP.reference(out, *expected)
    END_STEP.triton(out, *got, rare=rare)
    assert_same(got, expected)
    return got


# ---- one step ----


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_matches_reference(shape: dict[str, int], dtype: torch.dtype) -> None:
    """All terms at once, floats within the error budget, integers equal."""
    state = full_state(**shape, dtype=dtype)
    out = output_for(state)
    ops.check(END_STEP, out, *state)
    run_both(out, state)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["odd"], SHAPES["three-channels"], SHAPES["inpainting"]], ids=str)
def test_kernel_matches_reference_with_rare_terms(shape: dict[str, int], dtype: torch.dtype) -> None:
    """Three rows a slot, a clamp, the raw output, learned variance, guidance beside it; channels that nobody reads."""
    state = full_state(**shape, dtype=dtype, rare=True)
    out = output_for(state, channels=2 * state.x.shape[1] + 1)
    out[:, -1] = NAN
    with in_blocks_of(8):
        ops.check(END_STEP, out, *state, rare=True)
        after = run_both(out, state, rare=True)
    assert {*(after.u != state.u).flatten(1).any(1).nonzero().flatten().tolist()} == {
        *state.next_rows.flatten().tolist()
    }


@pytest.mark.parametrize("column", [*RARE, "w2"])
def test_a_rare_number_of_zero_reads_nothing(column: str) -> None:
    """With all others: what a term of zero would read is NaN, and it counts where it is not zero."""
    state = full_state(rare=True)
    changed, out = clone(state), output_for(state, channels=8)
    changed.table[..., len(COLUMNS) + EXTRA.index(column)] = 0.0
    if column == "d_ratio":
        out[:, 4:] = NAN
    elif column == "w2":
        out[state.rows[:, 2].long()] = NAN
    elif column == "gx":
        changed.table[..., W0] = 0.0  # the other reader of row 0
        out[state.rows[:, 0].long()] = NAN
    after = run_both(out, changed, rare=True)
    assert after.x.isfinite().all()
    assert not torch.equal(run_both(out, state, rare=True).x, after.x)


def test_nan_is_not_clamped_away() -> None:
    """A bad output of a slot that clamps is found all the same."""
    state = full_state(rare=True)
    out = output_for(state, channels=8)
    out[int(state.rows[0, 1]), 1, 2, 1] = NAN
    after = run_both(out, state, rare=True)
    assert after.first_bad.tolist() == [int(state.counter[0]), NEVER]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_kernel_matches_reference_in_blocks_and_layouts(
    memory_format: torch.memory_format, channels_last: bool
) -> None:
    """Several programs a slot, the last not full, whatever the layouts of state and output."""
    state = full_state(channels_last=channels_last, extra_channels=1)
    with in_blocks_of(4):
        after = run_both(output_for(state, memory_format), state)
    assert torch.equal(after.counter, state.counter + 1)
    assert not after.arrived.any()
    assert torch.equal(after.u[:, 4:], state.u[:, 4:])


@settings(max_examples=5, deadline=None)
@given(
    slots=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    block=st.sampled_from([8, 32]),
)
def test_kernel_matches_reference_at_any_size(slots: int, channels: int, height: int, width: int, block: int) -> None:
    state = full_state(slots, channels, height, width)
    with in_blocks_of(block):
        run_both(output_for(state), state)


def test_kernel_leaves_idle_slots_unchanged() -> None:
    """Slots that have not started or have ended are neither read (all NaN) nor written; their neighbour is."""
    state = full_state(slots=3)
    state.steps.copy_(torch.tensor([0, 6, 6]))
    state.counter.copy_(torch.tensor([0, 2, 6]))
    for name in ("x", "y", "history", "noise", "mask", "init", "init_noise", "table"):
        getattr(state, name)[[0, 2]] = NAN
    out = output_for(state)
    out[state.rows[[0, 2], :2].flatten().long()] = NAN
    after = run_both(out, state)
    assert torch.equal(after.counter.cpu(), torch.tensor([0, 3, 6], dtype=torch.int32))
    for name in ("x", "y", "history"):
        assert getattr(after, name)[[0, 2]].isnan().all()
        assert getattr(after, name)[1].isfinite().all()
    written = torch.zeros(6, dtype=torch.bool).index_fill(0, state.next_rows[1, :2].long().cpu(), True)
    assert torch.equal((after.u != state.u).flatten(1).any(1).cpu(), written)


def test_kernel_reads_no_term_with_coefficient_zero() -> None:
    """A DDIM row, unguided, in a state that is NaN but for x and the guided branch of the output."""
    state = full_state()
    state.table.zero_()
    numbers = dict.fromkeys((*COLUMNS, *EXTRA), 0.0) | {"c_in": 0.5, "q": 1.0, "a": 0.9, "b0": -0.2, "e1": 1.0}
    numbers["w1"] = 1.0
    state.table[..., : len(numbers)] = torch.tensor(list(numbers.values()), device=DEVICE)
    for name in ("u", "y", "history", "noise", "mask", "init", "init_noise"):
        getattr(state, name).fill_(NAN)
    out = output_for(state)
    out[state.rows[:, 0].long()] = NAN
    after = run_both(out, state)
    expected = 0.9 * state.x - 0.2 * out[state.rows[:, 1].long()]
    torch.testing.assert_close(after.x, expected)
    torch.testing.assert_close(after.u[after.next_rows[:, 0].long()], 0.5 * expected)
    assert after.y.isnan().all()  # nothing is written that no row will read
    assert after.history.isnan().all()


def weights(state: StepState, *numbers: float) -> StepState:
    """The same slots with other weights."""
    state = clone(state)
    state.table[..., W0 : W0 + 3] = torch.tensor(numbers, device=DEVICE)
    return state


def test_kernel_without_guidance_takes_the_guided_branch() -> None:
    """Whatever the factor, and with no row that is not guided; as it is where the two are the same row."""
    state = full_state()
    alone, same, out = weights(state, 0.0, 1.0, 0.0), weights(state, -3.0, 4.0, 0.0), output_for(state)
    alone.rows[:, 0] = -1
    alone.factor.fill_(NAN)
    same.rows[:, 0] = same.rows[:, 1]
    same.rescale.zero_()
    assert_same(
        run_both(out, alone)._replace(rows=same.rows, rescale=same.rescale, factor=same.factor, table=same.table),
        run_both(out, same),
    )


def test_kernel_ignores_the_factor_without_rescale() -> None:
    state = full_state()
    state.rescale.zero_()
    state.factor.fill_(NAN)
    assert run_both(output_for(state), state).x.isfinite().all()


def test_kernel_keeps_u_after_the_last_row() -> None:
    state = full_state()
    state.counter.fill_(5)
    after = run_both(output_for(state), state)
    assert torch.equal(after.u, state.u)
    assert torch.equal(after.counter, after.steps)


def test_kernel_writes_only_existing_rows() -> None:
    state = full_state()
    state.next_rows.copy_(torch.tensor([[-1, 3, -1], [-1, -1, -1]]))
    after = run_both(output_for(state), state)
    assert (after.u != state.u).flatten(1).any(1).tolist() == [False, False, False, True]


def test_a_slot_is_independent_of_its_neighbours() -> None:
    """Bitwise, with any neighbours."""
    state = full_state(slots=3)
    out = output_for(state)
    together = run_both(out, state)
    alone = StepState(state.u.clone(), *(t[1:2].clone() for t in state[1:]))
    END_STEP.triton(out, *alone)
    for name in ("x", "y", "history", "counter"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_kernel_records_the_first_bad_step(bad: float) -> None:
    """Of each slot separately, though later steps are bad too."""
    state = full_state(slots=3)
    state.table[..., 1 : len(COLUMNS)].clamp_(0.1, 0.5)
    out = output_for(state)
    bad_out = out.clone()
    bad_out[int(state.rows[1, 1]), 2, 3, 1] = bad
    for given_out in (out, bad_out, out):
        END_STEP.triton(given_out, *state)
    assert state.first_bad.tolist() == [NEVER, 2, NEVER]  # slot 1 started at step 1


# ---- whole trajectories ----


def network(model_input: Tensor, channels: int) -> Tensor:
    """A stub for a U-Net, with a different output for each row."""
    shift = torch.linspace(-0.5, 0.5, len(model_input), device=model_input.device).view(-1, 1, 1, 1)
    return torch.tanh(model_input[:, :channels].float() + shift).to(model_input.dtype)


def admit(state: StepState, slot: int, table: StepTable, guidance: Guidance, masked: bool, rows: list[int]) -> None:
    """Start a request in a slot, as the runtime does."""
    numbers = table_rows(table.rows, table.draws, guidance.weights(table), masked)
    state.table[slot].fill_(NAN)
    state.table[slot, : len(numbers)] = numbers.to(DEVICE)
    state.noise[slot, : sum(table.draws)].normal_()
    state.x[slot].normal_().mul_(table.init_noise_sigma)
    if masked:
        state.mask[slot] = torch.rand(state.mask[slot].shape).round()
        state.init[slot].normal_()
        state.init_noise[slot].normal_()
    state.rescale[slot] = guidance.rescale
    state.rows[slot] = state.next_rows[slot] = torch.tensor(rows, dtype=torch.int32)
    for row in rows:
        if row >= 0:
            state.u[row, : state.x.shape[1]] = (float(table.rows[0, 0]) * state.x[slot]).to(state.u.dtype)
    state.counter[slot] = 0
    state.steps[slot] = len(table)


@pytest.mark.parametrize("dtype", [pytest.param(ops.DTYPES[0], marks=pytest.mark.full), *ops.DTYPES[1:]], ids=str)
def test_all_samplers_in_one_batch_match_reference(dtype: torch.dtype) -> None:
    """A slot for each sampler, with its own steps, scale, interval, rescale and mask, started in turns, to the end:
    every state after every step is the reference's. In float16 for each of diffusers', and for one with rare terms.
    """
    names = [param.values[0] for param in NAMED if dtype == ops.DTYPES[0] or not param.marks] + ["dpm++ 2m cfg++"]
    slots = len(names) + 1  # one stays idle
    buffers = StepState.empty(
        slots=slots,
        rows=2 * slots,
        channels=4,
        height=3,
        width=5,
        steps=16,
        draws=12,
        extra_channels=5,
        masked=True,
        dtype=dtype,
        device=DEVICE,
    )
    for name in ("x", "y", "history", "noise", "mask", "init", "init_noise", "table"):
        getattr(buffers, name).fill_(NAN)  # nothing is read that was not written
    buffers.u[:, 4:].normal_()
    got, rows = buffers, torch.randperm(2 * slots).tolist()
    launches, ended = 0, [0] * slots
    while launches < 3 or bool((got.counter < got.steps).any()):
        for slot, sampler in enumerate(names):
            if slot % 3 != launches:
                continue
            table = table_of(sampler, 4 + slot % 3, eta=0.5 if slot % 2 else 0.0)
            guidance = Guidance((1.0, 4.0, 7.5)[slot % 3], 0.7 * (slot % 4 == 0), 0.0, 0.6 + 0.4 * (slot % 2))
            own = [*rows[2 * slot : 2 * slot + 2], -1] if guidance.scale > 1 else [-1, rows[2 * slot], -1]
            admit(got, slot, table, guidance, slot % 3 == 0, own)
            ended[slot] = len(table)
        expected, out = clone(got), network(got.u, 4)
        with use("torch"):
            end_step(out, expected, rescales=True, rare=True)
        with use("triton"):
            end_step(out, got, rescales=True, rare=True)
        assert_same(got, expected)
        launches += 1
    assert got.counter.tolist() == ended
    assert got.x[:-1].isfinite().all()
    assert got.first_bad.tolist() == [NEVER] * slots
    assert got.x[-1].isnan().all()


# ---- guidance rescale ----


def test_rescaled_steps_match_guide() -> None:
    """Both kernels together, on a row of guidance alone; a slot that does not rescale, or is idle, keeps its factor."""
    state = full_state(slots=4)
    numbers = dict.fromkeys((*COLUMNS, *EXTRA), 0.0) | {"q": 1.0, "b0": 1.0, "e1": 1.0, "w0": -3.0, "w1": 4.0}
    state.table[..., : len(numbers)] = torch.tensor(list(numbers.values()), device=DEVICE)
    state.rescale.copy_(torch.tensor([0.7, 0.0, 1.0, 0.5]))
    state.steps[3] = 0
    out, before = output_for(state), state.factor.clone()
    state.x[3] = 1.0
    with use("triton"):
        end_step(out, state, rescales=True)
    for slot, rescale in enumerate((0.7, 0.0, 1.0)):
        expected = guide(dict(enumerate(out[state.rows[slot, :2].long()].split(1))), (-3.0, 4.0, 0.0), rescale)
        torch.testing.assert_close(state.x[slot], expected[0])
    assert (state.x[3] == 1.0).all()
    assert torch.equal(state.factor[[1, 3]], before[[1, 3]])


# ---- tables, refusals, registration ----


def test_table_rows_have_the_extra_columns() -> None:
    """Behind the sampler's own columns: weights, masked, keep, the index of the draw, and what few samplers have."""
    table = table_of("dpm++ 3m sde", 5)
    table.rows[:, SAMPLER.index("clip") :] = torch.arange(25).view(5, 5)
    mixing = torch.rand(5, 4)
    rows = table_rows(table.rows, table.draws, mixing.tolist(), masked=True)
    assert rows.shape == (5, ROW)
    assert torch.equal(rows[:, : len(COLUMNS)], torch.from_numpy(table.rows[:, : len(COLUMNS)]))
    extra = dict(zip(EXTRA, rows[:, len(COLUMNS) :].T, strict=False))
    assert torch.equal(torch.stack([extra[name] for name in ("w0", "w1", "w2", "gx")], 1), mixing)
    assert extra["masked"].tolist() == [1.0] * 5
    assert extra["keep"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]  # the last is of order 1, the last but one of order 2
    assert extra["draw"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert extra["o"].tolist() == [1.0, 6.0, 11.0, 16.0, 21.0]
    assert extra["d_ratio"].tolist() == [2.0, 7.0, 12.0, 17.0, 22.0]
    assert not rows[:, len(COLUMNS) + len(EXTRA) :].any()

    place = {name: len(COLUMNS) + k for k, name in enumerate(EXTRA)}
    alternating = table_of("dpm2 a", 3)  # draws at every second row
    assert alternating.draws == (False, True, False, True, False)
    draw = table_rows(alternating.rows, alternating.draws, [(0.0, 1.0, 0.0, 0.0)] * 5)[:, place["draw"]]
    assert [draw[1], draw[3]] == [0.0, 1.0]
    for sampler, count in (("ddim", 0), ("euler a", 0), ("heun", 3), ("dpm++ 2m", 3), ("lms", 5)):
        table = table_of(sampler, 4 if sampler == "heun" else 5 if sampler != "lms" else 6)
        keep = table_rows(table.rows, table.draws, [(0.0, 1.0, 0.0, 0.0)] * len(table))[:, place["keep"]]
        assert keep.sum() == count, sampler


def test_refusals_name_the_reason() -> None:
    state = full_state()
    out = output_for(state)

    def refusal(out: Tensor = out, **changed: Tensor) -> str:
        return END_STEP.supports(out, *state._replace(**changed)).reason

    assert END_STEP.supports(out, *state)
    assert "not float32" in refusal(y=state.y.double())
    assert "neither contiguous nor channels-last" in refusal(x=torch.randn(2, 4, 5, 6)[..., ::2])
    assert "layout, or have gaps" in refusal(y=state.y.contiguous())
    assert "layout, or have gaps" in refusal(history=state.history[:, ::2])
    assert "not contiguous" in refusal(table=state.table[:, ::2])
    assert "not adjacent" in refusal(torch.randn(4, 4, 5, 6)[..., :3])
    assert "more than 64" in refusal(torch.randn(4, 65, 5, 3))


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_a_cpu_runs_the_reference() -> None:
    assert not fuses(torch.zeros(2, 4, 5, 3))
    state = full_state()
    expected, out = clone(state), output_for(state)
    end_step(out, state)
    END_STEP.reference(out, *expected)
    assert_same(state, expected, float32=0.0)


def test_registered_op_agrees_with_its_schema() -> None:
    state = full_state()
    out = output_for(state)
    ops.check_registered(END_STEP, out, *state)


# ---- where many programs run at once ----


@pytest.mark.gpu
def test_no_program_reads_a_changed_counter() -> None:
    """Thousands of programs a step, in every launch configuration: each must see the counter before it moves."""
    state = full_state(slots=8, height=96, width=96)
    state.counter.zero_()
    out, expected = output_for(state), clone(state)
    for _ in range(6):
        END_STEP.reference(out, *expected)
    for config in END_STEP.space:
        if not END_STEP.is_candidate(config, out, *state):
            continue
        got = clone(state)
        with dispatch.forced("end_step", config):
            for _ in range(8):  # two more than there are steps
                END_STEP.triton(out, *got)
        assert_same(got, expected, float32=1e-5)


@pytest.mark.gpu
def test_a_captured_step_serves_every_table() -> None:
    """One graph; table and scale of a slot change between replays."""
    state = full_state()
    out = output_for(state)
    for _ in range(2):
        END_STEP.triton(out, *clone(state))
    graph = torch.cuda.CUDAGraph()
    before = clone(state)
    with torch.cuda.graph(graph):
        end_step(out, state)
    for _ in range(2):
        for t, value in zip(state, before, strict=True):
            t.copy_(value)
        state.table[..., : W0 + 2].normal_()
        expected = clone(state)
        graph.replay()
        END_STEP.reference(out, *expected)
        assert_same(state, expected)
